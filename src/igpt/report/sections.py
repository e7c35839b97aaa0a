"""The sections of a run's page: a figure with its caption, or the command that makes it."""

import math
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from igpt.data.images.grid import grid_counts
from igpt.errors import InputError
from igpt.evaluation.results import best_row
from igpt.files import require_regular
from igpt.report import figures
from igpt.report.findings import describe_sampling, number, percent, plural
from igpt.report.record import (
    Run,
    baselines,
    best_validation,
    flat,
    history,
    read_sampling,
    standard_error,
)

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

_MOST_PIXELS = 1 << 27
# Exceptions of Pillow for damaged files; SyntaxError for broken PNG chunks.
_PILLOWS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def template(name: str) -> "Template":
    """Return a Jinja template of this package; its variables must be defined."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("igpt.report", ""),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


@dataclass(frozen=True)
class Table:
    """A table; `head` may be empty, and the first cell of a row is its head."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Chart:
    """One figure in four versions, of which the browser takes the one for its width and colours."""

    light: str
    dark: str
    narrow_light: str
    narrow_dark: str
    alt: str


@dataclass(frozen=True)
class Picture:
    """A raster picture at its natural size in pixels."""

    uri: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Section:
    """A section: chart or picture with a caption and `code`, or the reason why it is `absent`."""

    title: str
    name: str
    lead: str = ""
    chart: Chart | None = None
    picture: Picture | None = None
    caption: str = ""
    code: str = ""
    absent: str = ""
    table: Table | None = None


def key_tables(run: Run) -> list[Table]:
    """Return tables of the main results and their baselines."""
    tables = []
    best, known, probe = best_validation(run.metrics), baselines(run.metrics), run.probe
    if best is not None or known:
        rows = [("This model", math.nan if best is None else best[1])]
        for name, words in (
            ("unigram", "Colour frequencies alone"),
            ("uniform", "Uniform distribution over colours"),
        ):
            rows += [(words, known[name])] if name in known else []
        cells = [
            (name, "not yet", "not yet")
            if math.isnan(loss)
            else (name, f"{loss:.3f}", f"{loss / math.log(2):.3f}")
            for name, loss in rows
        ]
        per = run.unit.removeprefix("nats/")
        tables.append(
            Table(f"Validation loss per {per} (lower is better)", ("", "nats", "bits"), cells)
        )
    if probe is not None and "skipped" not in probe:
        count, compared = probe["images"]["test"], probe.get("baselines") or {}
        reached = [(f"This model, layer {probe['best_layer']}", best_row(probe)["test_accuracy"])]
        if compared.get("untrained"):
            other = compared["untrained"]
            reached.append(
                (
                    f"Untrained network, layer {other['best_layer']}",
                    best_row(other)["test_accuracy"],
                )
            )
        if compared.get("raw_pixels"):
            reached.append(("Raw pixels", compared["raw_pixels"]["test_accuracy"]))
        cells = [
            (name, percent(p), f"± {100 * standard_error(p, count):.1f}") for name, p in reached
        ]
        caption = f"Linear probe, accuracy on {plural(count, 'test image')} (higher is better)"
        tables.append(Table(caption, ("", "accuracy", "std. error"), cells))
    return tables


def loss_section(run: Run) -> Section:
    """Return the section on training and validation loss."""
    title, name = "Loss during training", "loss"
    train, validation = history(run.metrics, "train"), history(run.metrics, "validation")
    if not train and not validation:
        return Section(
            title,
            name,
            absent="No loss is recorded yet; `igpt pretrain` records it during training.",
        )
    kind = " (class loss, plus the weighted generative loss if it is used)" if run.finetuned else ""
    caption = (
        f"Loss in {run.unit}{kind}. Training: {plural(len(train), 'point')}, each the mean over "
        "the batches since "
        "the previous point."
    )
    if validation:
        images = run.start.get("validation_images")
        among = (
            plural(images, "validation image")
            if isinstance(images, int)
            else "the validation images"
        )
        caption += (
            f" Validation: {plural(len(validation), 'point')}, on {among}; the ring marks the "
            "lowest."
        )
    if baselines(run.metrics):
        caption += (
            " Grey lines: baselines without a network (uniform distribution over colours; colour "
            "frequencies)."
        )
    alt, best = (
        f"Line chart of the loss in {run.unit} by training step",
        best_validation(run.metrics),
    )
    alt += (
        "."
        if best is None
        else f"; the lowest validation loss is {best[1]:.3f} at step {best[0]:,}."
    )

    plot = partial(figures.loss_curve, run.metrics, unit=run.unit)
    return Section(title, name, chart=chart(plot, alt), caption=caption)


def accuracy_section(run: Run) -> Section:
    """Return the section on a classifier's validation accuracy during fine-tuning."""
    title, name = "Accuracy during fine-tuning", "accuracy"
    validation, images = (
        history(run.metrics, "validation", "error"),
        run.start.get("validation_images"),
    )
    if not validation:
        trained = history(run.metrics, "validation", "error_on_trained")
        why = "Not validated yet; `igpt finetune` validates during training."
        return Section(
            title,
            name,
            absent="No held-out accuracy: the validation images were used for training."
            if trained
            else why,
        )
    among = (
        plural(images, "validation image") if isinstance(images, int) else "the validation images"
    )
    caption = f"Accuracy on {among}, {plural(len(validation), 'point')}; the ring marks the best."
    alt = (
        "Line chart of validation accuracy by training step; the last is "
        f"{percent(1 - validation[-1]['error'])}."
    )

    plot = partial(figures.accuracy_curve, run.metrics)
    return Section(title, name, chart=chart(plot, alt), caption=caption)


def probe_section(run: Run) -> Section:
    """Return the section on linear probe accuracy by layer."""
    title, name, probe = "Linear probe of every layer", "probe", run.probe
    if probe is None:
        return Section(
            title, name, absent="The layers have not been probed; `igpt probe` writes probe.json."
        )
    if "skipped" in probe:
        return Section(title, name, absent=f"The probe was skipped: {probe['skipped']}")
    layers, count = probe["layers"], probe["images"]
    lead = (
        "Each point is a linear classifier trained on the features of one layer, averaged over all "
        "positions. "
        "The layer is selected by validation accuracy; its test accuracy is the result."
    )
    source = f" of {probe['source']}" if probe.get("source") else ""
    failed = [str(layer["layer"]) for layer in layers if layer.get("converged") is False]
    caution = f" The fit did not converge at layer {', '.join(failed)}." if failed else ""
    setting = "learning_rate" if "learning_rate" in layers[0] else "regularisation"
    chosen = "learning rate of SGD" if setting == "learning_rate" else "regularisation strength"
    folded = " fitted again to both," if (probe.get("config") or {}).get("fold_back") else ""
    caption = (
        "Accuracy of logistic regression over the "
        f"{plural(probe['classes'], 'class', 'classes')}{source}: fitted to "
        f"{plural(count['train'], 'image')}, {chosen} and layer (ring) selected on "
        f"{number(count['validation'])},{folded} tested on {number(count['test'])}. Band: one "
        "standard error of the "
        f"test accuracy. Layer 0 is the input of the first block, layer {layers[-1]['layer']} the "
        f"final norm.{caution}"
        f"{_other_protocols(probe)}"
    )
    alt = "Line chart of linear probe accuracy by layer: " + ", ".join(
        f"layer {layer['layer']} {percent(layer['test_accuracy'])}" for layer in layers
    )
    rows = []
    for layer in layers:
        strength = layer.get(setting)
        accuracies = (percent(layer["validation_accuracy"]), percent(layer["test_accuracy"]))
        rows.append(
            (
                str(layer["layer"]),
                *accuracies,
                "not recorded" if strength is None else f"{strength:g}",
            )
        )
    table = Table(
        "Numbers of the figure",
        ("layer", "validation", "test", setting.replace("_", " ")),
        rows,
    )

    plot = partial(figures.probe_by_layer, probe)
    return Section(title, name, lead, chart(plot, alt + "."), caption=caption, table=table)


def _other_protocols(probe: dict[str, Any]) -> str:
    """Return the results with concatenated layers and with few labels as sentences."""
    text = ""
    if together := probe.get("concatenated"):
        layers = ", ".join(map(str, together["layers"]))
        text += (
            f" Layers {layers} concatenated: test accuracy {percent(together['test_accuracy'])}."
        )
    for few in probe.get("few_labels") or ():
        layer = "" if few.get("layer") is None else f", layer {few['layer']}"
        text += (
            f" {plural(few['per_class'], 'label')} per class{layer}: test accuracy "
            f"{percent(few['mean'])}, standard "
            f"deviation {100 * few['standard_deviation']:.1f} points over "
            f"{len(few['test_accuracies'])} label subsets."
        )
    return text


def completions_section(run: Run) -> Section:
    """Return the section on completions."""
    title, name, path = "Completions", "completions", run.path / "completions.png"
    if not path.exists():
        return Section(
            title,
            name,
            absent="No image has been completed; `igpt complete` writes completions.png.",
        )
    uri, size, counts, how = _grid(path, run)
    kept, resolution = how.get("keep_rows"), run.shape.get("resolution")
    rows = (
        f"the upper {kept} of {resolution} pixel rows"
        if resolution
        else f"the upper {kept} pixel rows"
    )
    given = "its visible part" if kept is None else f"its visible part ({rows})"
    each = f"{plural(len(counts), 'image')}, one per row" if counts else "One image per row"
    completions = (
        plural(max(counts) - 2, "completion") if counts and max(counts) > 2 else "completions"
    )
    caption = (
        f"{each}. Left to right: the original, {given}, and {completions} by the "
        f"model{describe_sampling(how)}."
    )
    alt = f"Grid of pictures. {each}: original, visible part, {completions}."
    return Section(
        title,
        name,
        picture=Picture(uri, *size, alt),
        caption=caption,
        code=str(how.get("command") or ""),
    )


def samples_section(run: Run) -> Section:
    """Return the section on samples."""
    title, name, path = "Samples", "samples", run.path / "samples.png"
    if not path.exists():
        return Section(
            title, name, absent="No image has been sampled; `igpt sample` writes samples.png."
        )
    uri, size, counts, how = _grid(path, run)
    many = plural(sum(counts), "image") if counts else "Images"
    caption = f"{many} sampled from the model unconditionally{describe_sampling(how)}."
    alt = f"Grid of pictures: {many.lower()} sampled from the model."
    return Section(
        title,
        name,
        picture=Picture(uri, *size, alt),
        caption=caption,
        code=str(how.get("command") or ""),
    )


def palette_section(run: Run) -> Section:
    """Return the section on the palette."""
    title, name, palette = "Palette", "palette", run.palette
    if palette is None:
        return Section(
            title, name, absent="There is no palette yet; `igpt pretrain` writes it with the model."
        )
    image = figures.palette_swatch(palette)
    colors = plural(len(palette), "colour")
    caption = f"The {colors} of the palette, in the order of their tokens. Fingerprint:"
    picture = Picture(figures.encode(image), *image.size, f"The palette's {colors} as squares.")
    return Section(title, name, picture=picture, caption=caption, code=palette.fingerprint)


def fact_tables(run: Run) -> list[Table]:
    """Return tables of data, configuration and machine, as recorded."""
    rows = [("tokens", str(run.config.get("tokens", "not recorded")))]
    if not run.manifest:
        rows.append(("dataset.json", "missing; `igpt prepare` writes it"))
    rows.append(("source", run.source))
    for name, split in (run.manifest.get("splits") or {}).items():
        if split.get("count") is not None:
            rows.append((name, plural(split["count"], "image")))
    names = run.manifest.get("class_names") or []
    if names:
        more = f", and {len(names) - 20} more" if len(names) > 20 else ""
        rows.append(
            (plural(len(names), "class", "classes"), ", ".join(map(str, names[:20])) + more)
        )
    if run.left_out:
        rows.append(("left out", run.left_out.text()))
    rows += [("warning", warning) for warning in run.warnings]
    settings = [
        (key, "none" if value is None else str(value)) for key, value in flat(run.config).items()
    ]
    machine = [
        (key, "none" if value is None else str(value))
        for key, value in flat(run.environment).items()
    ]
    return [
        Table("Data", (), rows),
        Table("Configuration", (), settings),
        Table(
            "Machine and software",
            (),
            machine or [("environment.json", "not in the run directory")],
        ),
    ]


def chart(plot: "Callable[..., Figure]", alt: str) -> Chart:
    """Plot a figure in its four versions."""

    def version(look: figures.Look, width: float) -> str:
        return figures.encode(plot(look=look, width=width))

    return Chart(
        light=version(figures.LIGHT, figures.WIDE),
        dark=version(figures.DARK, figures.WIDE),
        narrow_light=version(figures.LIGHT, figures.NARROW),
        narrow_dark=version(figures.DARK, figures.NARROW),
        alt=alt,
    )


def _grid(path: Path, run: Run) -> tuple[str, tuple[int, int], list[int] | None, dict[str, Any]]:
    """Return a grid's URI, size, pictures in each row (if known) and settings of sampling."""
    resolution = run.shape.get("resolution")
    picture = read_picture(path)
    counts = grid_counts(picture, resolution) if resolution else None
    return (
        figures.data_uri(path.read_bytes(), "image/png"),
        picture.size,
        counts,
        read_sampling(path),
    )


def read_picture(path: Path) -> Image.Image:
    """Return a PNG picture.

    Raises:
        InputError: it is no readable PNG, or has more pixels than a page can show.
    """
    require_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # the size is checked below
            picture = Image.open(path, formats=["PNG"])
        too_large = picture.width * picture.height > _MOST_PIXELS
        if not too_large:
            picture.load()
    except _PILLOWS as error:
        raise InputError(f"{path} is not a readable PNG picture ({error}); make it again") from None
    if too_large:
        raise InputError(
            f"{path} has {picture.width} x {picture.height} pixels, too many for a page"
        )
    return picture
