"""One self-contained HTML page about a run, made from the run's files alone.

It refers to nothing outside itself: figures are embedded, styles are in it, and there are no scripts. What a run does
not hold yet, the page names together with the command that makes it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from igpt.config import read_settings
from igpt.data.palette import Palette
from igpt.data.tokens import MANIFEST
from igpt.errors import InputError
from igpt.files import atomic_file, read_json
from igpt.report import figures
from igpt.report.findings import (
    baselines,
    best_validation,
    chosen_layer,
    describe_loss,
    describe_model,
    describe_probe,
    describe_sampling,
    describe_state,
    flat,
    history,
    number,
    percent,
    plural,
    read_metrics,
    short_source,
    standard_error,
    started,
    unit_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """A part of the page: picture and caption, or why there is none (`absent`)."""

    title: str
    name: str
    lead: str = ""
    chart: Chart | None = None
    picture: Picture | None = None
    caption: str = ""
    command: str = ""
    absent: str = ""
    table: Table | None = None


def write_report(run: Path) -> Path:
    """Writes `run/report.html` and returns its path; a page that is there is replaced.

    Args:
        run: a run directory, finished or not; it needs `config.yaml` and `metrics.jsonl`.

    Raises:
        InputError: `run` is no run directory, or a file in it is damaged.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run / name).is_file():
            raise InputError(f"{run} is no run directory: {name} is missing; `igpt pretrain` writes one")
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("igpt.report").joinpath("page.html.j2").read_text("utf-8"))
    text = template.render(_page(run))
    path = run / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _page(run: Path) -> dict[str, Any]:
    config = read_settings(run / "config.yaml")
    metrics, unreadable = read_metrics(run / "metrics.jsonl")
    machine = read_json(run / "environment.json", "environment") if (run / "environment.json").exists() else {}
    probe = _probe(run)
    manifest = _manifest(config)
    palette = _palette(run)
    source = manifest.get("source") or config.get("tokens") or run.resolve().name
    try:
        findings = [
            describe_loss(config, metrics),
            "" if probe is None or "skipped" in probe else describe_probe(probe),
        ]
        sections = [_loss_section(config, metrics), _probe_section(probe)]
        tables = _key_tables(config, metrics, probe)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # metrics are read leniently: it is the probe
        raise InputError(f"{run / 'probe.json'} is not a whole probe ({error}); `igpt probe` makes it anew") from None
    sections += [_completions_section(run, config), _samples_section(run, config), _palette_section(palette)]
    return {
        "title": f"Image GPT trained on {short_source(str(source))}",
        "run": run.resolve().name,
        "description": describe_model(config, metrics),
        "state": describe_state(config, metrics, unreadable),
        "findings": [sentence for sentence in findings if sentence],
        "tables": tables,
        "sections": sections,
        "details": [table for table in (_data_table(config, manifest), *_settings_tables(config, machine)) if table],
        "made_by": f"igpt {machine['igpt']}" if "igpt" in machine else "igpt",
    }


def _probe(run: Path) -> dict[str, Any] | None:
    path = run / "probe.json"
    if not path.exists():
        return None
    probe = read_json(path, "probe")
    if probe.get("format") != "igpt-probe" or probe.get("version") != 1:
        raise InputError(f"{path} is not a probe of format version 1; `igpt probe` makes it anew")
    return probe


def _manifest(config: dict[str, Any]) -> dict[str, Any]:
    """What the token data set says of itself; the run may outlive it."""
    tokens = config.get("tokens")
    path = Path(str(tokens)) / MANIFEST
    return read_json(path, "token data set") if tokens and path.is_file() else {}


def _palette(run: Path) -> Palette | None:
    path = run / "model" / "preprocessor_config.json"
    clusters = read_json(path, "palette").get("clusters") if path.exists() else None
    return None if clusters is None else Palette.from_centers(clusters)


def _key_tables(config: dict[str, Any], metrics: list[dict[str, Any]], probe: dict[str, Any] | None) -> list[Table]:
    tables = []
    best, known = best_validation(metrics), baselines(metrics)
    rows = [] if best is None else [("This model", best[1])]
    for name, words in (("unigram", "Colour frequencies alone"), ("uniform", "Every colour equally likely")):
        if name in known:
            rows.append((words, known[name]))
    if rows:
        place = unit_of(config).removeprefix("nats/")
        cells = [(name, f"{loss:.3f}", f"{loss / math.log(2):.3f}") for name, loss in rows]
        tables.append(Table(f"Validation loss per {place} (lower is better)", ("", "nats", "bits"), cells))
    if probe is not None and "skipped" not in probe:
        count = probe["images"]["test"]
        reached = [(f"This model, layer {probe['best_layer']}", chosen_layer(probe)["test_accuracy"])]
        known_probes = probe.get("baselines") or {}
        if "untrained" in known_probes:
            other = known_probes["untrained"]
            reached.append((f"Untrained network, layer {other['best_layer']}", chosen_layer(other)["test_accuracy"]))
        if "raw_pixels" in known_probes:
            reached.append(("Raw pixels", known_probes["raw_pixels"]["test_accuracy"]))
        cells = [(name, percent(p), f"± {100 * standard_error(p, count):.1f}") for name, p in reached]
        caption = f"Linear probe, {plural(count, 'test image')} (higher is better)"
        tables.append(Table(caption, ("", "accuracy", "std. error"), cells))
    return tables


def _chart(draw: "Callable[..., Figure]", alt: str) -> Chart:
    def version(look: figures.Look, width: float) -> str:
        return figures.encode(draw(look=look, width=width))

    return Chart(
        light=version(figures.LIGHT, figures.WIDE),
        dark=version(figures.DARK, figures.WIDE),
        narrow_light=version(figures.LIGHT, figures.NARROW),
        narrow_dark=version(figures.DARK, figures.NARROW),
        alt=alt,
    )


def _loss_section(config: dict[str, Any], metrics: list[dict[str, Any]]) -> Section:
    title, name = "Loss during training", "loss"
    train, validation = history(metrics, "train"), history(metrics, "validation")
    if not train and not validation:
        return Section(title, name, absent="No loss is recorded yet; `igpt pretrain` writes them as it trains.")
    unit = unit_of(config)
    images = started(metrics).get("validation_images")
    among = f" of {plural(images, 'image')}" if isinstance(images, int) else ""
    best = best_validation(metrics)
    ring = "" if best is None else " The ring marks the step with the lowest validation loss."
    caption = (
        f"Loss in {unit}: on the training batches as recorded ({plural(len(train), 'point')}) and on the whole "
        f"validation split{among} ({plural(len(validation), 'point')}).{ring} The grey lines need no network: every "
        "colour equally likely, and every pixel guessed from the frequencies of colours alone."
    )
    alt = f"Line chart of training and validation loss in {unit} by training step"
    alt += "." if best is None else f"; the lowest validation loss is {best[1]:.3f} at step {best[0]:,}."

    def draw(**options: Any) -> "Figure":
        return figures.loss_curve(metrics, unit=unit, **options)

    return Section(title, name, chart=_chart(draw, alt), caption=caption)


def _probe_section(probe: dict[str, Any] | None) -> Section:
    title, name = "Linear probe of every layer", "probe"
    if probe is None:
        return Section(title, name, absent="The layers have not been probed; `igpt probe` writes probe.json.")
    if "skipped" in probe:
        return Section(title, name, absent=f"The probe was skipped: {probe['skipped']}")
    layers, count = probe["layers"], probe["images"]
    failed = [str(layer["layer"]) for layer in layers if not layer.get("converged", True)]
    caution = f" The fit did not converge at layer {', '.join(failed)}." if failed else ""
    lead = (
        "How to read it: each point is a linear classifier trained on one layer's features alone, averaged over all "
        "places of the image; the layer is chosen by validation accuracy, and its test accuracy is what counts."
    )
    caption = (
        f"Accuracy of logistic regression over {plural(probe['classes'], 'class', 'classes')}: fitted to "
        f"{plural(count['train'], 'image')}, strength of regularisation and layer (ring) chosen on "
        f"{number(count['validation'])}, tested on {number(count['test'])}. Band: one standard error of the test "
        f"accuracy. Layer 0 is the input of the first block, layer {layers[-1]['layer']} the final norm.{caution}"
    )
    alt = "Line chart of linear probe accuracy by layer: " + ", ".join(
        f"layer {layer['layer']} {percent(layer['test_accuracy'])}" for layer in layers
    )
    rows = [
        (
            str(layer["layer"]),
            percent(layer["validation_accuracy"]),
            percent(layer["test_accuracy"]),
            f"{layer['regularisation']:g}" if layer.get("regularisation") is not None else "not recorded",
        )
        for layer in layers
    ]
    table = Table("The numbers behind the figure", ("layer", "validation", "test", "regularisation"), rows)

    def draw(**options: Any) -> "Figure":
        return figures.probe_by_layer(probe, **options)

    return Section(title, name, lead, _chart(draw, alt + "."), caption=caption, table=table)


def _grid(run: Path, name: str, config: dict[str, Any]) -> tuple[Picture, tuple[int, int] | None, dict[str, Any]]:
    """A grid, its rows and columns where its size tells them, and how it was drawn."""
    path = run / f"{name}.png"
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.format != "PNG":
                raise InputError(f"{path} is {picture.format}, not PNG; draw it anew")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is not a readable picture ({error}); draw it anew") from None
    how = read_json(run / f"{name}.json", name) if (run / f"{name}.json").exists() else {}
    resolution = flat(config).get("model.resolution")
    shape = figures.grid_shape(width, height, resolution) if isinstance(resolution, int) and resolution > 0 else None
    return Picture(figures.data_uri(path.read_bytes(), "image/png"), width, height, ""), shape, how


def _completions_section(run: Path, config: dict[str, Any]) -> Section:
    title, name = "Completions", "completions"
    if not (run / "completions.png").exists():
        return Section(title, name, absent="No image has been completed; `igpt complete` writes completions.png.")
    picture, shape, how = _grid(run, name, config)
    kept, resolution = how.get("keep_rows"), flat(config).get("model.resolution")
    given = f"what the model was given of it (the upper {kept} of {resolution} pixel rows)" if kept else "what was kept"
    each = f"{plural(shape[0], 'image')}, one a row" if shape else "One image a row"
    drawn = f"{plural(shape[1] - 2, 'completion')}" if shape and shape[1] > 2 else "completions"
    caption = f"{each}. Left to right: the original, {given}, and {drawn} by the model{describe_sampling(how)}."
    alt = f"Grid of pictures. {each}: original, what was kept, {drawn}."
    picture = Picture(picture.uri, picture.width, picture.height, alt)
    return Section(title, name, picture=picture, caption=caption, command=str(how.get("command") or ""))


def _samples_section(run: Path, config: dict[str, Any]) -> Section:
    title, name = "Samples", "samples"
    if not (run / "samples.png").exists():
        return Section(title, name, absent="No image has been sampled; `igpt sample` writes samples.png.")
    picture, shape, how = _grid(run, name, config)
    many = f"{shape[0]} \N{MULTIPLICATION SIGN} {shape[1]} images" if shape else "Images"
    caption = f"{many} drawn by the model from nothing{describe_sampling(how)}."
    picture = Picture(picture.uri, picture.width, picture.height, f"Grid of pictures: {many.lower()} by the model.")
    return Section(title, name, picture=picture, caption=caption, command=str(how.get("command") or ""))


def _palette_section(palette: Palette | None) -> Section:
    title, name = "Palette", "palette"
    if palette is None:
        return Section(title, name, absent="No palette is there yet; `igpt pretrain` writes it with the model.")
    image = figures.palette_swatch(palette)
    caption = f"The {plural(len(palette), 'colour')} that pixels may take, in the order of their tokens. Fingerprint:"
    alt = f"The palette's {plural(len(palette), 'colour')} as squares."
    picture = Picture(figures.encode(image), *image.size, alt)
    return Section(title, name, picture=picture, caption=caption, command=palette.fingerprint)


def _data_table(config: dict[str, Any], manifest: dict[str, Any]) -> Table:
    tokens = str(config.get("tokens", "not recorded"))
    if not manifest:
        return Table("Data", (), [("tokens", f"{tokens} (not there now; `igpt prepare` makes such a folder)")])
    rows = [("tokens", tokens), ("source", str(manifest.get("source")))]
    for name, value in flat({"splits": manifest.get("splits")}).items():
        if name.endswith(".count"):
            rows.append((name.split(".")[1], plural(value, "image")))
    names = manifest.get("class_names") or []
    if names:
        more = f", and {len(names) - 20} more" if len(names) > 20 else ""
        rows.append((plural(len(names), "class", "classes"), ", ".join(map(str, names[:20])) + more))
    return Table("Data", (), rows)


def _settings_tables(config: dict[str, Any], machine: dict[str, Any]) -> list[Table]:
    settings = Table("Configuration", (), [(key, str(value)) for key, value in flat(config).items()])
    if not machine:
        return [settings, Table("Machine and software", (), [("environment.json", "is not in the run directory")])]
    rows = [(key, "not known" if value is None else str(value)) for key, value in flat(machine).items()]
    return [settings, Table("Machine and software", (), rows)]
