"""The command models: the built-in models, and the presets of igpt pretrain."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from igpt.builtin_models import CARD, NAMES, folder_of, has_builtin
from igpt.cli.parser import Options

FORMAT, VERSION = "igpt-models", 1
# Layers x width; learning rate; images per step.
PRESET_COLUMNS = ("name", "shape", "heads", "px", "optimizer", "rate", "batch", "steps", "for")


class Models(Options):
    """List the built-in models, and the presets of igpt pretrain --model."""

    settings = "igpt.report.card"
    example = "igpt models"

    out: Path | None = Field(None, description="JSON to write, with all settings of the presets")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from rich.console import Console

        from igpt.files import write_json
        from igpt.training.presets import MODELS, PURPOSES

        models = [found for found in map(_builtin, NAMES) if found]
        if self.out:
            presets = [
                {"name": name, "purpose": PURPOSES[name], "settings": dict(recipe)}
                for name, recipe in MODELS.items()
            ]
            built_in = [model._asdict() for model in models]
            written = {"format": FORMAT, "version": VERSION}
            write_json(self.out, {**written, "built_in": built_in, "presets": presets})
        console = Console(highlight=False, emoji=False)
        if models:
            title = f"Built-in models, as in igpt complete {models[0].name} cat.jpg"
            console.print(_table(title, _COLUMNS, [model.row() for model in models]))
        else:
            console.print("This build of igpt has no built-in model.")
        title = "Presets, as in igpt pretrain TOKENS --model tiny -o RUN"
        console.print()
        console.print(_table(title, PRESET_COLUMNS, preset_rows()))
        console.print("shape: layers x width; rate: peak learning rate; batch: images per step")


class _BuiltIn(NamedTuple):
    """A built-in model; results are None if its card does not have them."""

    name: str
    parameters: int
    resolution: int
    colors: int
    loss: float | None
    loss_of: str | None
    bytes: int
    trained_on: str | None

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        loss = "not recorded" if self.loss is None else f"{self.loss:.3f} ({self.loss_of})"
        return (
            self.name,
            f"{self.parameters / 1e6:.1f} M",
            str(self.resolution),
            str(self.colors),
            loss,
            f"{self.bytes / 1e6:.1f} MB",
            self.trained_on or "not recorded",
        )


_COLUMNS = ("name", "parameters", "px", "colours", "nats/pixel", "size", "trained on")


def _builtin(name: str) -> _BuiltIn | None:
    """Return the facts about a built-in model, or None if this build does not have it."""
    from igpt.model.cost import count_parameters
    from igpt.model.directory import read_directory
    from igpt.report.card import card_results

    if not has_builtin(name):
        return None
    folder = folder_of(name)
    config = read_directory(folder).config
    losses = [one for one in card_results(folder / CARD) if one.metric_type == "loss"]
    by_split = {str(one.dataset_split): one for one in losses}
    chosen = by_split.get("test") or by_split.get("validation")
    return _BuiltIn(
        name,
        count_parameters(config),
        config.resolution,
        config.n_colors,
        float(chosen.metric_value) if chosen else None,
        chosen.dataset_split if chosen else None,
        sum(file.stat().st_size for file in folder.iterdir()),
        chosen.dataset_name if chosen else None,
    )


def preset_rows() -> list[tuple[str, ...]]:
    """Return the rows of the table of presets; `PRESET_COLUMNS` are its columns."""
    from igpt.training.presets import MODELS, PURPOSES
    from igpt.training.pretrain import PretrainConfig

    rows: list[tuple[str, ...]] = []
    for name, recipe in MODELS.items():
        fields = PretrainConfig.model_fields.items()
        used = {key: field.get_default() for key, field in fields} | dict(recipe)
        rows.append(
            (
                name,
                f"{used['n_layer']} x {used['n_embd']}",
                str(used["n_head"]),
                str(used["resolution"] or "any"),
                used["optimizer"],
                f"{used['learning_rate']:g}",
                str(used["batch_size"]),
                _rounded(used["steps"]),
                PURPOSES[name],
            )
        )
    return rows


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD}
    # A space between columns: the table of presets has to fit into 80 columns.
    table = Table(title=title, show_edge=False, padding=0, **look)
    for column in columns:
        is_number = column not in ("name", "optimizer", *_SENTENCES)
        justify: Literal["left", "right"] = "right" if is_number else "left"
        table.add_column(column, justify=justify, no_wrap=column not in _SENTENCES)
    for row in rows:
        table.add_row(*row)
    return table


_SENTENCES = ("for", "trained on")  # columns that may be wrapped


def _rounded(count: int) -> str:
    """Return a number of steps, in thousands or millions if it is a multiple of them."""
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {letter}"
    return str(count)
