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
    scale: Literal["cpu", "gpu"] = Field(
        "cpu",
        description="cpu: about an hour on two cores; gpu: half an hour on an H100, estimated",
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
        "unfinished steps start again",
    )
    jobs: int | None = Field(None, description="steps that run at the same time, 2 by default")
    tokens_only: bool = Field(
        False,
        description="prepare the tokens and stop; run it again without this flag for the rest, "
        "also on a machine without the images",
    )
    rehearsal: bool = Field(False, description="all steps, shortened: a test that everything runs")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.reproduction.reproduce import reproduce
        from igpt.reproduction.scale import scale

        kind = "rehearsal" if self.rehearsal else "reproduction"
        reproduce(
            self.out or Path("runs", f"{kind}-{self.scale}"),
            scale(self.scale, rehearsal=self.rehearsal),
            self.corpus,
            self.labelled,
            minutes=self.minutes,
            jobs=self.jobs,
            tokens_only=self.tokens_only,
        )
