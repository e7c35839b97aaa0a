"""The command reproduce."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from igpt.cli.parser import Options


class Reproduce(Options):
    """Repeat the paper's experiments with your images, and write one page of answers."""

    settings = "igpt.reproduction.reproduce"
    example = "igpt reproduce --corpus photos/ --labelled cifar10/"
    out_is_folder = True

    out: Path | None = Field(
        None,
        description="folder to write, runs/reproduction-SCALE (or rehearsal-SCALE) by default; "
        "finished steps in it are not repeated",
    )
    scale: Literal["cpu", "night", "gpu"] = Field(
        "cpu",
        description="cpu: about an hour on two cores; night: about ten hours on two cores, in "
        "pieces; gpu: half an hour on an H100, estimated",
    )
    corpus: str = Field(
        "zh-plus/tiny-imagenet",
        description="unlabelled images for pretraining, any source of igpt prepare; if it has "
        "labels, they are probed too",
    )
    labelled: str = Field("uoft-cs/cifar10", description="labelled images for evaluation")
    minutes: float | None = Field(
        None,
        description="time limit; the same command continues afterwards: training resumes, other "
        "unfinished steps start again. Where times are estimated, steps that would take longer "
        "are not started",
    )
    jobs: int | None = Field(None, description="steps that run at the same time, 2 by default")
    tokens_only: bool = Field(
        False,
        description="prepare the tokens and stop; run it again without this flag for the rest, "
        "also on a machine without the images",
    )
    longer: tuple[str, ...] = Field(
        (),
        description="parts that are made twice as long, replacing their results: pretraining, "
        "bert, finetuning, resolution, compute (of night); a part named twice: four times",
    )
    dry_run: bool = Field(
        False, description="print the steps with estimated times, and write nothing"
    )
    rehearsal: bool = Field(False, description="all steps, shortened: a test that everything runs")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.reproduction.reproduce import describe_plan, reproduce
        from igpt.reproduction.scale import longer, scale

        kind = "rehearsal" if self.rehearsal else "reproduction"
        out = self.out or Path("runs", f"{kind}-{self.scale}")
        chosen = longer(scale(self.scale, rehearsal=self.rehearsal), self.longer)
        if self.dry_run:
            print(describe_plan(out, chosen, self.corpus, self.labelled, jobs=self.jobs))
            return
        reproduce(
            out,
            chosen,
            self.corpus,
            self.labelled,
            minutes=self.minutes,
            jobs=self.jobs,
            tokens_only=self.tokens_only,
            replace=bool(self.longer),
        )
