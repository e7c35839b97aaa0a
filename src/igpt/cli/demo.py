"""The command demo."""

from pathlib import Path
from typing import Any

from pydantic import Field

from igpt.cli.parser import Options


class Demo(Options):
    """Run the whole pipeline on one data set: tokens, pretraining, probe, samples, report."""

    settings = "igpt.cli.pipeline"
    example = "igpt demo --data photos/"
    out_is_folder = True

    data: str = Field("digits", description="'digits' (bundled), or any source of igpt prepare")
    out: Path | None = Field(
        None,
        description="run directory, runs/demo or runs/demo-NAME by default; results that it "
        "already holds are kept",
    )
    steps: int | None = Field(
        None, description="steps of pretraining; a small number gives a quick look"
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.cli.pipeline import run_pipeline

        name = "demo" if self.data == "digits" else f"demo-{Path(self.data).resolve().name}"
        run_pipeline(self.data, self.out or Path("runs", name), self.steps)
