"""The sections of a run's page: a figure with its caption, or the command that makes it."""

import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from igpt.builtin_models import DEFAULT_MODEL
from igpt.data.images.grid import grid_counts
from igpt.data.images.palette_picture import palette_swatch
from igpt.data.left_out import listed
from igpt.errors import InputError
from igpt.evaluation.results import (
    best_row,
    best_row_by_neighbours,
    read_score,
    score_files,
)
from igpt.files import require_regular, sha256_of
from igpt.report import figures
from igpt.report.findings import describe_sampling, number, percent, plural, short_source
from igpt.report.record import (
    Run,
    baselines,
    best_validation,
    flat,
    history,
    qualities,
    read_sampling,
    standard_error,
)

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

_MOST_PIXELS = 1 << 27
_PAGE = 912  # CSS pixels of a wide page's column, as its style sheet sets it
# Exceptions of Pillow for damaged files; SyntaxError for broken PNG chunks.
_PILLOWS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


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
    """A table; `head` may be empty; the first cell of a row is the heading of that row.

    `wide` gives it the whole width of the page.
    """

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    wide: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure in four versions; the browser shows the one for its width and colour scheme."""

    light: str
    dark: str
    narrow_light: str
    narrow_dark: str
    alt: str


@dataclass(frozen=True)
class Picture:
    """A raster picture and its size on the page in CSS pixels.

    Attributes:
        classes: of its figure in the style sheet. "pixels" keeps squares sharp; "wide" is scrolled
            on a narrow page instead of shrunk, because it contains words.
    """

    uri: str
    width: int
    height: int
    alt: str
    classes: str = "pixels"


@dataclass(frozen=True)
class Section:
    """A section of the page: a chart or a picture with a caption.

    Attributes:
        name: the identifier of the section in HTML.
        code: shown after the caption in a fixed-width font: a command or a fingerprint.
        absent: if there is nothing to show, the reason.
    """

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
        cells = [("This model", *_loss_cells(best and best[1]))]
        for name, words in (
            ("unigram", "Colour frequencies alone"),
            ("uniform", "Uniform distribution over colours"),
        ):
            cells += [(words, *_loss_cells(known[name]))] if name in known else []
        caption = f"Validation loss per {run.unit.removeprefix('nats/')} (lower is better)"
        tables.append(Table(caption, ("", "nats", "bits"), cells))
    if probe is not None and "skipped" not in probe:
        count, compared = probe["images"]["test"], probe.get("baselines") or {}
        tested = [(f"This model, layer {probe['best_layer']}", best_row(probe))]
        if other := compared.get("untrained"):
            tested.append((f"Untrained network, layer {other['best_layer']}", best_row(other)))
        if pixels := compared.get("raw_pixels"):
            tested.append(("Raw pixels", pixels))
        caption = f"Linear probe, accuracy on {plural(count, 'test image')} (higher is better)"
        tables.append(_accuracy_table(caption, tested, count))
        near = [(name, row["knn"]) for name, row in _by_neighbours(probe) if row.get("knn")]
        if near:
            caption = (
                f"{plural(near[0][1]['k'], 'nearest neighbour')}, accuracy on "
                f"{plural(count, 'test image')} (higher is better)"
            )
            tables.append(_accuracy_table(caption, near, count))
    return tables


def _by_neighbours(probe: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the best layers by k nearest neighbours, and raw pixels, with their names."""
    compared = probe.get("baselines") or {}
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, layers in (("This model", probe), ("Untrained network", compared.get("untrained"))):
        if layers and (row := best_row_by_neighbours(layers)):
            found.append((f"{name}, layer {row['layer']}", row))
    return [*found, ("Raw pixels", compared.get("raw_pixels") or {})]


def _accuracy_table(
    caption: str, tested: Sequence[tuple[str, Mapping[str, Any]]], count: int
) -> Table:
    cells = []
    for name, row in tested:
        accuracy = row["test_accuracy"]
        error = 100 * standard_error(accuracy, count)
        cells.append((name, percent(accuracy), f"±\N{NO-BREAK SPACE}{error:.1f}"))
    return Table(caption, ("", "accuracy", "std. error"), cells)


def _loss_cells(loss: float | None) -> tuple[str, str]:
    if loss is None:
        return "not measured yet", "not measured yet"
    return f"{loss:.3f}", f"{loss / math.log(2):.3f}"


def _validation_images(run: Run) -> str:
    count = run.start.get("validation_images")
    return "the validation images" if count is None else plural(count, "validation image")


def loss_section(run: Run) -> Section:
    """Return the section on training and validation loss."""
    title, name = "Loss during training", "loss"
    train, validation = history(run.metrics, "train"), history(run.metrics, "validation")
    if not train and not validation:
        absent = "No loss is recorded yet; `igpt pretrain` records it during training."
        return Section(title, name, absent=absent)
    kind = " (class loss, plus the weighted generative loss if it is used)" if run.finetuned else ""
    caption = (
        f"Loss in {run.unit}{kind}. Training: {plural(len(train), 'point')}, each the mean over "
        "the batches since the previous point."
    )
    if validation:
        caption += (
            f" Validation: {plural(len(validation), 'point')}, on {_validation_images(run)}; the "
            "ring marks the lowest."
        )
    if baselines(run.metrics):
        caption += (
            " Grey lines: baselines without a network (uniform distribution over colours; colour "
            "frequencies)."
        )
    alt = f"Line chart of the loss in {run.unit} by training step"
    if best := best_validation(run.metrics):
        alt += f"; the lowest validation loss is {best[1]:.3f} at step {best[0]:,}"
    plot = partial(figures.loss_curve, run.metrics, unit=run.unit)
    return Section(title, name, chart=chart(plot, f"{alt}."), caption=caption)


def accuracy_section(run: Run) -> Section:
    """Return the section on a classifier's validation accuracy during fine-tuning."""
    title, name = "Accuracy during fine-tuning", "accuracy"
    validation = history(run.metrics, "validation", "error")
    if not validation:
        absent = "Not validated yet; `igpt finetune` validates during training."
        if history(run.metrics, "validation", "error_on_trained"):
            absent = "No held-out accuracy: the validation images were used for training."
        return Section(title, name, absent=absent)
    points = plural(len(validation), "point")
    caption = f"Accuracy on {_validation_images(run)}, {points}; the ring marks the best."
    last = percent(1 - validation[-1]["error"])
    alt = f"Line chart of validation accuracy by training step; the last is {last}."
    plot = partial(figures.accuracy_curve, run.metrics)
    return Section(title, name, chart=chart(plot, alt), caption=caption)


def quality_sections(run: Run) -> list[Section]:
    """Return the sections on the features during training; none if they were not measured."""
    records = qualities(run.metrics)
    if not records:
        return []
    last = records[-1]
    train = plural(last["train_images"], "training image")
    caption = (
        f"Features of layer {last['layer']}, averaged over all positions; "
        f"{plural(len(records), 'point')}. Linear probe: logistic regression fitted to {train}, "
        f"with the best of several regularization strengths. {last['k']}-NN: weighted vote of the "
        f"{plural(last['k'], 'nearest neighbour')} among them, by cosine similarity. Both are "
        f"accuracies on {plural(last['validation_images'], 'validation image')}."
    )
    alt = (
        "Line chart of accuracy by training step; the last linear probe has "
        f"{percent(last['linear_accuracy'])}, {last['k']} nearest neighbours "
        f"{percent(last['knn_accuracy'])}."
    )
    rows = [
        (
            number(record["step"]),
            percent(record["linear_accuracy"]),
            percent(record["knn_accuracy"]),
            f"{record['effective_rank']:.1f}",
        )
        for record in records
    ]
    head = ("step", "linear probe", f"{last['k']}-NN", "effective rank")
    accuracy = Section(
        "Features during training",
        "features",
        chart=chart(partial(figures.quality_curve, run.metrics), alt),
        caption=caption,
        table=Table("Numbers of both figures", head, rows),
    )
    rank = Section(
        "Effective rank during training",
        "rank",
        chart=chart(
            partial(figures.rank_curve, run.metrics),
            "Line chart of the effective rank by training step; the last is "
            f"{last['effective_rank']:.1f}.",
        ),
        caption=(
            f"Effective rank (RankMe) of the features of layer {last['layer']} over {train}: the "
            "exponential of the entropy of their singular values. 1: all features are multiples of "
            "one vector; the width of the model: they use all directions equally."
        ),
    )
    return [accuracy, rank]


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
        "positions. The layer is selected by validation accuracy; its test accuracy is the result."
    )
    source = f" of {probe['source']}" if probe.get("source") else ""
    failed = [str(layer["layer"]) for layer in layers if layer.get("converged") is False]
    caution = f" The fit did not converge at layer {', '.join(failed)}." if failed else ""
    setting = "learning_rate" if "learning_rate" in layers[0] else "regularisation"
    chosen = "learning rate of SGD" if setting == "learning_rate" else "regularization strength"
    folded = (
        f" With the selected {chosen}, it is fitted again to the images of both splits."
        if (probe.get("config") or {}).get("fold_back")
        else ""
    )
    classes = plural(probe["classes"], "class", "classes")
    caption = (
        f"Accuracy of logistic regression over the {classes}{source}. The classifier of a layer is "
        f"fitted to {plural(count['train'], 'training image')}. The {chosen} and the layer (ring) "
        f"are selected by the accuracy on {plural(count['validation'], 'validation image')}."
        f"{folded} The test accuracy is measured on {plural(count['test'], 'image')}; the band is "
        "one standard error of it. Layer 0 is the input of the first block, layer "
        f"{layers[-1]['layer']} the final norm.{caution}{_neighbours_caption(layers)}"
        f"{_other_protocols(probe)}"
    )
    alt = "Line chart of linear probe accuracy by layer: " + ", ".join(
        f"layer {layer['layer']} {percent(layer['test_accuracy'])}" for layer in layers
    )
    rows: list[tuple[str, ...]] = [
        (
            str(layer["layer"]),
            percent(layer["validation_accuracy"]),
            percent(layer["test_accuracy"]),
            "not recorded" if layer.get(setting) is None else f"{layer[setting]:g}",
        )
        for layer in layers
    ]
    head: tuple[str, ...] = ("layer", "validation", "test", setting.replace("_", " "))
    if layers[0].get("knn"):
        k = layers[0]["knn"]["k"]
        head = (*head, f"{k}-NN validation", f"{k}-NN test")
        rows = [
            (*cells, *_neighbours_cells(layer)) for cells, layer in zip(rows, layers, strict=True)
        ]
    table = Table("Numbers of the figure", head, rows)
    plot = partial(figures.probe_by_layer, probe)
    return Section(title, name, lead, chart(plot, alt + "."), caption=caption, table=table)


def _neighbours_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    found = row.get("knn")
    if found is None:
        return "not recorded", "not recorded"
    return percent(found["validation_accuracy"]), percent(found["test_accuracy"])


def _neighbours_caption(layers: Sequence[Mapping[str, Any]]) -> str:
    found = layers[0].get("knn")
    if found is None:
        return ""
    return (
        f" {found['k']}-NN: classification by {plural(found['k'], 'nearest neighbour')} by cosine "
        "similarity of the same features, without training; test accuracy."
    )


def confusion_section(run: Run) -> Section:
    """Return the section on the classes that are confused."""
    title, name = "Classes confused", "confusion"
    if run.finetuned:
        found, who = run.test or {}, "the classifier"
    else:
        found = run.probe or {}
        who = f"the linear probe of layer {found.get('best_layer')}"
    counts, names = found.get("confusion"), found.get("class_names") or []
    if counts is None:
        absent = "The predictions of each class are not recorded; `igpt probe` or `igpt finetune` "
        absent += "records them for up to 100 classes."
        return Section(title, name, absent=absent)
    rows = []
    for index, row in enumerate(counts):
        total, wrong = sum(row), [0 if other == index else n for other, n in enumerate(row)]
        worst = max(range(len(row)), key=lambda other: wrong[other])
        share = percent(row[index] / total) if total else "no images"
        most = f"{names[worst]} ({wrong[worst]})" if wrong[worst] else ""
        rows.append((names[index], str(total), share, most))
    head = ("class", "test images", "accuracy", "most often predicted instead")
    caption = (
        f"Test images of each class (rows) by the class that {who} predicts (columns). The "
        "diagonal has the images that are classified correctly; colours are shares of a row."
    )
    alt = "Confusion matrix: " + ", ".join(f"{row[0]} {row[2]}" for row in rows[:20])
    plot = partial(figures.confusion_matrix, counts, names)
    table = Table("Accuracy of each class", head, rows)
    return Section(title, name, chart=chart(plot, f"{alt}."), caption=caption, table=table)


def score_tables(run: Run) -> list[Table]:
    """Return a table of the likelihoods of `igpt score`, if there are any."""
    rows = []
    for found in (read_score(path) for path in score_files(run.path)):
        source = short_source(str(found.get("source") or run.source))
        split = "" if found.get("split") in (None, "all") else f", {found['split']}"
        error = found.get("standard_error")
        rows.append(
            (
                f"{source}{split}: {plural(found['images'], 'image')}",
                f"{found['nats_per_pixel']:.4f}",
                "" if error is None else f"±\N{NO-BREAK SPACE}{error:.4f}",
            )
        )
    caption = "Negative log-likelihood, nats/pixel (lower is better)"
    return [Table(caption, ("", "nats/pixel", "std. error"), rows)] if rows else []


def generation_tables(run: Run) -> list[Table]:
    """Return a table of the quality of samples and of one of completions, if it was measured."""
    found = run.quality
    if found is None:
        return []
    compared = f"{short_source(found['source'])} in layer {found['layer']} of "
    is_own = found["features"] == found.get("model")
    compared += "this model" if is_own else short_source(found["features"])
    tables = []
    if distance := found.get("frechet"):
        sampled, true = distance["images"]
        low, high = (f"{limit:.4g}" for limit in distance["interval_95"])
        caption = f"Frechet distance of samples to {compared} (lower is better)"
        images = f"{plural(sampled, 'sample')}, {plural(true, 'image')}"
        row = (images, f"{distance['distance']:.4g}", f"{low} to {high}")
        tables.append(Table(caption, ("", "distance", "95 % interval"), [row]))
    if completed := found.get("completions"):
        caption = (
            f"Images of {compared} that are nearer to a completion than its true image "
            "(50 % by chance; lower is better)"
        )
        count = plural(completed["count"], "completion")
        interval = " to ".join(map(percent, completed["interval_95"]))
        rows = [
            (f"{count} of {plural(completed['keep_rows'], 'row')}", completed["mean"], interval),
            ("The rows with another image's below them", completed["other_pixels"]["mean"], ""),
        ]
        tables.append(
            Table(
                caption,
                ("", "share", "95 % interval"),
                [(name, percent(share), limits) for name, share, limits in rows],
            )
        )
    return tables


def maps_sections(run: Run) -> list[Section]:
    """Return a section for each picture of pixel losses that `igpt score` wrote, if it is there.

    A picture that was moved is found next to its score file, and one that was changed is not shown.
    """
    sections = []
    for path in score_files(run.path):
        found = read_score(path)
        maps = found.get("maps") or {}
        if maps.get("sha256") is None:
            continue
        source = short_source(str(found.get("source") or run.source))
        title, name = f"Losses of the pixels: {source}", f"maps-{path.stem}"
        file = Path(maps["file"])
        picture = next(
            (
                place
                for place in (file, path.parent / file.name)
                if os.path.isfile(place) and sha256_of(place) == maps["sha256"]  # noqa: PTH113
            ),
            None,
        )
        if picture is None:
            absent = f"{file.name} is no longer where it was written; `igpt score --maps` draws it."
            sections.append(Section(title, name, absent=absent))
            continue
        image = read_picture(picture)
        shown = plural(len(maps["rows"]), "image")
        caption = (
            f"{shown} of {number(found['images'])}, above the losses of their pixels in nats: "
            "bright pixels were hard to predict. The mean loss is above an image, its file or row "
            "below it."
        )
        scale = min(0.5, _PAGE / image.width)
        uri = figures.data_uri(picture.read_bytes(), "image/png")
        size = round(image.width * scale), round(image.height * scale)
        alt = f"{shown} of {source} above maps of the losses of their pixels."
        drawn = Picture(uri, *size, alt, "wide")
        sections.append(Section(title, name, picture=drawn, caption=caption, code=file.name))
    return sections


def rate_tables(run: Run) -> list[Table]:
    """Return a table of the learning rates that were tried, if there are several."""
    rates = (run.test or {}).get("rates") or ()
    if len(rates) < 2:
        return []
    chosen = (run.test or {}).get("learning_rate")
    rows = []
    for tried in sorted(rates, key=lambda one: bool(one["learning_rate"] != chosen)):
        accuracy = tried.get("validation_accuracy")
        mark = " (selected)" if tried["learning_rate"] == chosen else ""
        shown = "diverged" if accuracy is None else percent(accuracy)
        rows.append((f"{tried['learning_rate']:g}{mark}", shown, str(tried.get("best_step", ""))))
    return [Table("Learning rates tried", ("rate", "validation accuracy", "best step"), rows)]


def _other_protocols(probe: dict[str, Any]) -> str:
    """Return the results with concatenated layers and with few labels as sentences."""
    text = ""
    if together := probe.get("concatenated"):
        layers = ", ".join(map(str, together["layers"]))
        accuracy = percent(together["test_accuracy"])
        text += f" Layers {layers} concatenated: test accuracy {accuracy}."
    for few in probe.get("few_labels") or ():
        layer = "" if few.get("layer") is None else f", layer {few['layer']}"
        text += (
            f" {plural(few['per_class'], 'label')} per class{layer}: test accuracy "
            f"{percent(few['mean'])}, standard deviation {100 * few['standard_deviation']:.1f} "
            f"points over {len(few['test_accuracies'])} label subsets."
        )
    return text


def completions_section(run: Run) -> Section:
    """Return the section on completions."""
    path = run.path / "completions.png"
    if not path.exists():
        absent = "No image has been completed; `igpt complete` writes completions.png."
        return Section("Completions", "completions", absent=absent)
    picture, how = read_picture(path), read_sampling(path)
    counts = _images_per_row(picture, run)
    given = "the given pixels"
    if (kept := how.get("keep_rows")) is not None:
        of = f" of {run.shape['resolution']}" if run.shape.get("resolution") else ""
        given += f" (the upper {kept}{of} pixel rows)"
    each = f"{plural(len(counts), 'image')}, one per row" if counts else "One image per row"
    completions = (
        plural(max(counts) - 2, "completion") if counts and max(counts) > 2 else "completions"
    )
    caption = (
        f"{each}. Left to right: the original, {given}, and {completions} by the "
        f"model{describe_sampling(how)}."
    )
    alt = f"Grid of pictures. {each}: original, given pixels, {completions}."
    return _grid_section("Completions", path, picture, alt, caption, how)


def photographs_section(run: Run) -> Section:
    """Return the section on the photographs that the demo completes with a built-in model."""
    path, title = run.path / "photographs.png", "Photographs, completed by a built-in model"
    if not path.exists():
        absent = "No photograph has been completed; `igpt demo` writes photographs.png."
        return Section(title, "photographs", absent=absent)
    picture, how = read_picture(path), read_sampling(path)
    lead = (
        f"These were not made by the model of this run, but by {DEFAULT_MODEL}, which is part of "
        "igpt: `igpt complete PHOTO.jpg` uses it."
    )
    caption = (
        "Parts of scikit-learn's two photographs, one per row. Left to right: the original at the "
        "model's resolution, the given pixels, and completions by the model"
        f"{describe_sampling(how)}."
    )
    alt = "Grid of pictures. One photograph per row: original, given pixels, completions."
    return replace(_grid_section(title, path, picture, alt, caption, how), lead=lead)


def samples_section(run: Run) -> Section:
    """Return the section on samples."""
    path = run.path / "samples.png"
    if not path.exists():
        absent = "No image has been sampled; `igpt sample` writes samples.png."
        return Section("Samples", "samples", absent=absent)
    picture, how = read_picture(path), read_sampling(path)
    counts = _images_per_row(picture, run)
    many = plural(sum(counts), "image") if counts else "Images"
    what = f"of {listed(how['classes'])}" if how.get("classes") else "unconditionally"
    caption = f"{many} sampled from the model {what}{describe_sampling(how)}."
    alt = f"Grid of pictures: {many.lower()} sampled from the model."
    return _grid_section("Samples", path, picture, alt, caption, how)


def _images_per_row(picture: Image.Image, run: Run) -> list[int] | None:
    """Return the number of images in each row of a grid, if known."""
    resolution = run.shape.get("resolution")
    return grid_counts(picture, resolution) if resolution else None


def _grid_section(
    title: str, path: Path, picture: Image.Image, alt: str, caption: str, how: Mapping[str, Any]
) -> Section:
    classes = "pixels" if path.stem == "samples" else "pixels wide"  # others have headings
    shown = Picture(figures.data_uri(path.read_bytes(), "image/png"), *picture.size, alt, classes)
    code = without_folders(str(how.get("command") or ""))
    return Section(title, path.stem, picture=shown, caption=caption, code=code)


def palette_section(run: Run) -> Section:
    """Return the section on the palette."""
    title, name, palette = "Palette", "palette", run.palette
    if palette is None:
        return Section(
            title, name, absent="There is no palette yet; `igpt pretrain` writes it with the model."
        )
    image = palette_swatch(palette)
    colors = plural(len(palette), "colour")
    caption = f"The {colors} of the palette, under their tokens. Fingerprint:"
    if len(palette) > 32:
        caption = (
            f"The {colors} of the palette in the order of their tokens. A token is the sum of the "
            "numbers left of its row and above its column. Fingerprint:"
        )
    if palette.transparent:
        caption = caption.replace(" Fingerprint:", " The last colour is transparent. Fingerprint:")
    alt = f"The palette's {colors} as squares."
    picture = Picture(figures.encode(image), *image.size, alt, "pixels wide")
    return Section(title, name, picture=picture, caption=caption, code=palette.fingerprint)


def fact_tables(run: Run) -> list[Table]:
    """Return tables of data, configuration and machine, as recorded."""
    rows = [("tokens", shareable(run.config.get("tokens", "not recorded")))]
    if not run.manifest:
        rows.append(("dataset.json", "missing; `igpt prepare` writes it"))
    rows.append(("source", shareable(run.source)))
    rows += [(name, plural(count, "image")) for name, count in run.split_sizes.items()]
    if names := run.manifest.get("class_names"):
        more = f", and {len(names) - 20} more" if len(names) > 20 else ""
        rows.append((plural(len(names), "class", "classes"), ", ".join(names[:20]) + more))
    if run.left_out:
        rows.append(("left out", without_folders(run.left_out.text())))
    rows += [("warning", without_folders(warning)) for warning in run.warnings]
    machine = _settings(run.environment) or [("environment.json", "not in the run directory")]
    return [
        Table("Data", (), rows),
        Table("Configuration", (), _settings(run.config)),
        Table("Machine and software", (), machine),
    ]


def _settings(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, without_folders(str(value)) if key == "command" else shareable(value))
        for key, value in flat(values).items()
    ]


def shareable(value: Any) -> str:
    """Return a value as a page shows it: of an absolute path, only its last part."""
    text = "none" if value is None else str(value)
    return Path(text).name if text.startswith(("/", "~/")) and Path(text).name else text


def without_folders(text: str) -> str:
    """Return a command or a sentence with only the last parts of absolute paths."""
    return re.sub(r"(?<![^\s='\"(])~?/(?:[^\s/'\"]+/)*([^\s/'\"]+)/?", r"\1", text)


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


def read_picture(path: Path) -> Image.Image:
    """Return a PNG picture.

    Raises:
        InputError: it is not a readable PNG, or has more pixels than a page can show.
    """
    require_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # see `_MOST_PIXELS`
            picture = Image.open(path, formats=["PNG"])
        if picture.width * picture.height <= _MOST_PIXELS:
            picture.load()
            return picture
    except (*_PILLOWS, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable PNG picture ({error}); make it again") from None
    raise InputError(f"{path} has {picture.width} x {picture.height} pixels, too many for a page")
