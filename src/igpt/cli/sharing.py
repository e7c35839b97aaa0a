"""The commands that share a run or convert models: report, card, push, import, export."""

from pathlib import Path
from typing import Any

from pydantic import Field

from igpt.cli.parser import Options, argument
from igpt.errors import InputError
from igpt.model.locate import model_and_run
from igpt.model.objectives import DEFAULT_OBJECTIVE, ObjectiveName
from igpt.outputs import require_writable, require_writable_folder


class Report(Options):
    """Write one page with all results of a run, or one that compares several runs."""

    settings = "igpt.report.page"
    example = "igpt report runs/photos runs/longer -o comparison.html"

    run: Path = argument("run directory; its page is RUN/report.html")
    others: tuple[Path, ...] = argument("runs to compare it with, up to three", default=())
    out: Path | None = Field(
        None,
        description="page of the comparison, comparison.html in the current folder by default",
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.report.page import write_report
        from igpt.report.run_comparison import write_comparison

        if self.others:
            target = self.out or Path("comparison.html")
            require_writable(target)
            print(write_comparison((self.run, *self.others), target))
        elif self.out:
            raise InputError(
                f"-o is for the comparison of several runs; the page of one run is {self.run}/"
                "report.html"
            )
        else:
            print(write_report(self.run))


class Card(Options):
    """Write RUN/README.md, the model card, to be read and edited before igpt push."""

    settings = "igpt.report.card"
    example = "igpt card runs/photos me/pixels --license apache-2.0"

    run: Path = argument("run directory")
    name: str = argument("USER/NAME of the model on the Hub, or the name of a built-in model")
    terms: str | None = Field(
        None, description="terms of use of the training images, in one sentence; none by default"
    )
    license: str | None = Field(
        None,
        description="license of the model, by its identifier on the Hub, such as apache-2.0; none "
        "by default",
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.report.card import write_card

        print(write_card(self.run, self.name, license=self.license, terms=self.terms))


class Push(Options):
    """Upload the model of a run, its card, and its sample and completion grids to the Hub."""

    settings = "igpt.report.card"
    example = "igpt push runs/photos me/pixels --private"

    run: Path = argument(
        "run directory; its README.md is uploaded unchanged, or written first if there is none"
    )
    name: str = argument("USER/NAME; the repository is created if it does not exist")
    private: bool = Field(False, description="create a private repository")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.report.card import CARD, doubts, push_to_hub

        outdated = doubts(self.run, self.name) if (self.run / CARD).exists() else []
        address = push_to_hub(self.run, self.name, private=self.private)
        for reason in outdated:
            print(
                f"{self.run / CARD} {reason}; igpt card {self.run} {self.name} writes a new one, "
                "to be pushed again"
            )
        print(address)


class Import(Options):
    """Convert one of OpenAI's TensorFlow checkpoints to a model directory."""

    settings = "igpt.model.openai"
    example = "igpt import model.ckpt-1000000 --clusters kmeans_centers.npy -o openai-s"
    out_is_folder = True

    prefix: Path = argument("checkpoint without its ending, such as model.ckpt-1000000")
    out: Path = Field(description="model directory to write")
    clusters: Path | None = Field(None, description="kmeans_centers.npy, the palette")
    objective: ObjectiveName = Field(DEFAULT_OBJECTIVE, description="objective of the checkpoint")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.locks import exclusive
        from igpt.model.openai import load_openai

        out = self.out
        if out.exists():
            raise InputError(f"{out} exists already; remove it or choose another -o")
        loaded = load_openai(self.prefix, self.clusters, objective=self.objective)
        with exclusive(out):
            if out.exists():
                raise InputError(
                    f"{out} was written by another process in the meantime; remove it or choose "
                    "another -o"
                )
            loaded.save_pretrained(out)
        print(
            f"{out}: {sum(parameter.numel() for parameter in loaded.parameters()) / 1e6:.1f} M "
            "parameters"
        )


class Export(Options):
    """Write a model as ONNX files, for programs without PyTorch, or with its weights in bf16."""

    settings = "igpt.model.onnx_export"
    example = "igpt export runs/photos --onnx photos-onnx"
    one_of = ("onnx", "bf16")

    model: Path = argument("run, model directory, name of a built-in model, or Hub id")
    onnx: Path | None = Field(None, description="folder to create, with ONNX files")
    int8: bool = Field(
        False,
        description="with --onnx, also write a step of generation with products of 8-bit integers",
    )
    bf16: Path | None = Field(
        None,
        description="model directory to create, with the weights rounded to bf16: half the size",
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        import torch

        from igpt.locks import exclusive
        from igpt.model.onnx_export import export_onnx, require_new_export
        from igpt.model.transformer import ImageGPT

        if (self.onnx is None) == (self.bf16 is None):
            raise InputError("name one folder to create: --onnx DIR or --bf16 DIR")
        if self.bf16 and self.int8:
            raise InputError("--int8 belongs to --onnx; bf16 weights have 16 bits")
        out = self.onnx or self.bf16
        assert out is not None
        require_writable_folder(out)
        if self.onnx:
            require_new_export(out)
        elif out.exists():
            raise InputError(f"{out} exists already; remove it or choose another folder")
        path, _ = model_and_run(self.model)
        loaded = ImageGPT.from_pretrained(path)
        with exclusive(out):
            if self.onnx:
                export_onnx(loaded, out, int8=self.int8)
            else:
                weights = loaded.state_dict().items()
                loaded.save_pretrained(
                    out, {name: tensor.to(torch.bfloat16) for name, tensor in weights}
                )
        for file in sorted(out.iterdir()):
            print(f"{file}: {file.stat().st_size:,} bytes")
