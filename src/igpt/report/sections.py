"""The parts of a run's page: a figure or a picture with its caption, or why there is none and what makes it."""

import math
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    read_drawing,
    standard_error,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PIXELS = 1 << 27
# What Pillow raises of damaged files; "SyntaxError" is of broken PNG chunks.
_PILLOWS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Table:
    """A table: its caption, the column heads (empty: none), and rows of cells, the first of which names the row."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Chart:
    """One figure in four versions, of which the browser takes the one that fits its width and colours."""

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
    """A part of the page: chart or picture and caption, or why there is none (`absent`); `code` ends the caption."""

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
    """The numbers that matter, beside what they are to be compared with."""
    tables = []
    best, known, probe = best_validation(run.metrics), baselines(run.metrics), run.probe
    if best is not None or known:
        rows = [("This model", math.nan if best is None else best[1])]
        for name, words in (
            ("unigram", "Colour frequencies alone"),
            ("uniform", "Every colour equally likely"),
        ):
            rows += [(words, known[name])] if name in known else []
        cells = [
            (name, "not yet", "not yet")
            if math.isnan(loss)
            else (name, f"{loss:.3f}", f"{loss / math.log(2):.3f}")
            for name, loss in rows
        ]
        place = run.unit.removeprefix("nats/")
        tables.append(
            Table(f"Validation loss per {place} (lower is better)", ("", "nats", "bits"), cells)
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
        caption = f"Linear probe, {plural(count, 'test image')} (higher is better)"
        tables.append(Table(caption, ("", "accuracy", "std. error"), cells))
    return tables


def loss_section(run: Run) -> Section:
    """Training and validation loss."""
    title, name = "Loss during training", "loss"
    train, validation = history(run.metrics, "train"), history(run.metrics, "validation")
    if not train and not validation:
        return Section(
            title, name, absent="No loss is recorded yet; `igpt pretrain` writes them as it trains."
        )
    what = (
        " (class loss, plus the weighted generative loss where there is one)"
        if run.finetuned
        else ""
    )
    caption = (
        f"Loss in {run.unit}{what}. Training: {plural(len(train), 'point')}, each the mean over the batches since "
        "the point before it."
    )
    if validation:
        images = run.start.get("validation_images")
        among = (
            plural(images, "validation image")
            if isinstance(images, int)
            else "the validation images"
        )
        caption += f" Validation: {plural(len(validation), 'point')}, on {among}; the ring marks the lowest."
    if baselines(run.metrics):
        caption += " The grey lines need no network: all colours equally likely, and colour frequencies alone."
    alt, best = (
        f"Line chart of the loss in {run.unit} by training step",
        best_validation(run.metrics),
    )
    alt += (
        "."
        if best is None
        else f"; the lowest validation loss is {best[1]:.3f} at step {best[0]:,}."
    )

    def draw(**options: Any) -> "Figure":
        return figures.loss_curve(run.metrics, unit=run.unit, **options)

    return Section(title, name, chart=chart(draw, alt), caption=caption)


def accuracy_section(run: Run) -> Section:
    """A classifier's validation accuracy during fine-tuning."""
    title, name = "Accuracy during fine-tuning", "accuracy"
    validation, images = (
        history(run.metrics, "validation", "error"),
        run.start.get("validation_images"),
    )
    if not validation:
        trained = history(run.metrics, "validation", "error_on_trained")
        why = "Not validated yet; `igpt finetune` does so as it trains."
        return Section(
            title,
            name,
            absent="Nothing was held out: validation images were trained on." if trained else why,
        )
    among = (
        plural(images, "validation image") if isinstance(images, int) else "the validation images"
    )
    caption = f"Share of {among} whose class is predicted rightly, {plural(len(validation), 'point')}; the best is ringed."
    alt = f"Line chart of validation accuracy by training step; the last is {percent(1 - validation[-1]['error'])}."

    def draw(**options: Any) -> "Figure":
        return figures.accuracy_curve(run.metrics, **options)

    return Section(title, name, chart=chart(draw, alt), caption=caption)


def probe_section(run: Run) -> Section:
    """Linear probe accuracy by layer."""
    title, name, probe = "Linear probe of every layer", "probe", run.probe
    if probe is None:
        return Section(
            title, name, absent="The layers have not been probed; `igpt probe` writes probe.json."
        )
    if "skipped" in probe:
        return Section(title, name, absent=f"The probe was skipped: {probe['skipped']}")
    layers, count = probe["layers"], probe["images"]
    lead = (
        "How to read it: each point is a linear classifier trained on one layer's features alone, averaged over all "
        "places of the image; the layer is chosen by validation accuracy, and its test accuracy is what counts."
    )
    source = f" of {probe['source']}" if probe.get("source") else ""
    failed = [str(layer["layer"]) for layer in layers if layer.get("converged") is False]
    caution = f" The fit did not converge at layer {', '.join(failed)}." if failed else ""
    setting = "learning_rate" if "learning_rate" in layers[0] else "regularisation"
    chosen = "learning rate of SGD" if setting == "learning_rate" else "strength of regularisation"
    folded = " fitted anew on both," if (probe.get("config") or {}).get("fold_back") else ""
    caption = (
        f"Accuracy of logistic regression over the {plural(probe['classes'], 'class', 'classes')}{source}: fitted to "
        f"{plural(count['train'], 'image')}, {chosen} and layer (ring) chosen on "
        f"{number(count['validation'])},{folded} tested on {number(count['test'])}. Band: one standard error of the "
        f"test accuracy. Layer 0 is the input of the first block, layer {layers[-1]['layer']} the final norm.{caution}"
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
        "The numbers behind the figure",
        ("layer", "validation", "test", setting.replace("_", " ")),
        rows,
    )

    def draw(**options: Any) -> "Figure":
        return figures.probe_by_layer(probe, **options)

    return Section(title, name, lead, chart(draw, alt + "."), caption=caption, table=table)


def _other_protocols(probe: dict[str, Any]) -> str:
    """What concatenated layers and few labels have given."""
    said = ""
    if together := probe.get("concatenated"):
        layers = ", ".join(map(str, together["layers"]))
        said += f" Layers {layers} side by side: {percent(together['test_accuracy'])} of the test images."
    for few in probe.get("few_labels") or ():
        layer = "" if few.get("layer") is None else f", layer {few['layer']}"
        said += (
            f" {plural(few['per_class'], 'label')} a class{layer}: {percent(few['mean'])}, standard "
            f"deviation {100 * few['standard_deviation']:.1f} points over {len(few['test_accuracies'])} draws."
        )
    return said


def completions_section(run: Run) -> Section:
    """Images that the model has completed."""
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
    given = "what was kept" if kept is None else f"what the model was given of it ({rows})"
    each = f"{plural(len(counts), 'image')}, one a row" if counts else "One image a row"
    drawn = plural(max(counts) - 2, "completion") if counts and max(counts) > 2 else "completions"
    caption = f"{each}. Left to right: the original, {given}, and {drawn} by the model{describe_sampling(how)}."
    alt = f"Grid of pictures. {each}: original, what was kept, {drawn}."
    return Section(
        title,
        name,
        picture=Picture(uri, *size, alt),
        caption=caption,
        code=str(how.get("command") or ""),
    )


def samples_section(run: Run) -> Section:
    """Images that the model has drawn."""
    title, name, path = "Samples", "samples", run.path / "samples.png"
    if not path.exists():
        return Section(
            title, name, absent="No image has been sampled; `igpt sample` writes samples.png."
        )
    uri, size, counts, how = _grid(path, run)
    many = plural(sum(counts), "image") if counts else "Images"
    caption = f"{many} drawn by the model from nothing{describe_sampling(how)}."
    alt = f"Grid of pictures: {many.lower()} drawn by the model."
    return Section(
        title,
        name,
        picture=Picture(uri, *size, alt),
        caption=caption,
        code=str(how.get("command") or ""),
    )


def palette_section(run: Run) -> Section:
    """The model's colours."""
    title, name, palette = "Palette", "palette", run.palette
    if palette is None:
        return Section(
            title, name, absent="No palette is there yet; `igpt pretrain` writes it with the model."
        )
    image = figures.palette_swatch(palette)
    colors = plural(len(palette), "colour")
    caption = f"The {colors} that pixels may take, in the order of their tokens. Fingerprint:"
    picture = Picture(figures.encode(image), *image.size, f"The palette's {colors} as squares.")
    return Section(title, name, picture=picture, caption=caption, code=palette.fingerprint)


def fact_tables(run: Run) -> list[Table]:
    """Data, configuration, machine: all that was recorded, as it was."""
    rows = [("tokens", str(run.config.get("tokens", "not recorded")))]
    if not run.manifest:
        rows.append(("dataset.json", "not there now; `igpt prepare` makes it"))
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


def chart(draw: "Callable[..., Figure]", alt: str) -> Chart:
    """A figure in its four versions."""

    def version(look: figures.Look, width: float) -> str:
        return figures.encode(draw(look=look, width=width))

    return Chart(
        light=version(figures.LIGHT, figures.WIDE),
        dark=version(figures.DARK, figures.WIDE),
        narrow_light=version(figures.LIGHT, figures.NARROW),
        narrow_dark=version(figures.DARK, figures.NARROW),
        alt=alt,
    )


def _grid(path: Path, run: Run) -> tuple[str, tuple[int, int], list[int] | None, dict[str, Any]]:
    """A grid: its URI, its size, the pictures in each row if they can be told, and how they were drawn."""
    resolution = run.shape.get("resolution")
    picture = read_picture(path)
    counts = grid_counts(picture, resolution) if resolution else None
    return (
        figures.data_uri(path.read_bytes(), "image/png"),
        picture.size,
        counts,
        read_drawing(path),
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
            )  # the size is looked at here
            picture = Image.open(path, formats=["PNG"])
        too_large = picture.width * picture.height > _MOST_PIXELS
        if not too_large:
            picture.load()
    except _PILLOWS as error:
        raise InputError(f"{path} is not a readable PNG picture ({error}); draw it again") from None
    if too_large:
        raise InputError(
            f"{path} has {picture.width} x {picture.height} pixels, too many for a page"
        )
    return picture
