"""The whole pipeline on one data set, at a size for two CPU cores; finished parts are kept."""

import os
from functools import partial
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from igpt.api import load_model
from igpt.builtin_models import DEFAULT_MODEL, folder_of, has_builtin
from igpt.data.images.grid import save_png
from igpt.data.images.photographs import photographs
from igpt.data.left_out import left_out_of
from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.sources.catalogue import DIGITS, open_source
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.evaluation.probe import ProbeConfig, probe, write_probe
from igpt.evaluation.results import PROBE, PROBE_VERSION, best_row
from igpt.files import resolved, write_json
from igpt.locks import exclusive, exclusive_folder
from igpt.model.images import tokens_of_files, tokens_of_split
from igpt.model.precision import Precision, resolve_precision
from igpt.model.transformer import ImageGPT
from igpt.outputs import passing_folder
from igpt.progress import progress_bar
from igpt.report.page import write_report
from igpt.report.record import baselines, best_validation, read_metrics, read_run
from igpt.sampling.grids import save_completions, save_samples
from igpt.sampling.jobs import SamplingSettings
from igpt.training.presets import preset
from igpt.training.pretrain import PretrainConfig, pretrain

_DIGITS = PrepareConfig(size=8)
_PHOTOS = PrepareConfig(size=16, colors=128)
_PROBE_IMAGES = 2000  # of each split: seconds instead of minutes
_COMPLETED, _COMPLETIONS, _SAMPLES = 8, 6, 32
_SAMPLING: SamplingSettings = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}
_PICTURES = ("completions.png", "completions.json", "samples.png", "samples.json")
_PHOTOGRAPH_COMPLETIONS = 4


def run_pipeline(source: str, run: Path, steps: int | None = None) -> None:
    """Prepare, pretrain, probe, complete, sample and report; print a table of the results.

    The run of the digits also completes photographs, with a built-in model.

    Args:
        source: see `open_source`.
        steps: steps of pretraining, by default those of the preset.
        run: run directory; the steps whose results it holds already are not repeated.

    Raises:
        InputError: the source is unusable, `run` is of another source or was trained otherwise, or
            another process works in it.
    """
    with exclusive_folder(run):
        _run_pipeline(source, run, steps)


def _run_pipeline(source: str, run: Path, steps: int | None) -> None:
    console = Console(highlight=False, emoji=False)
    digits = source == DIGITS
    recipe = {
        **preset("digits" if digits else "photos"),
        **({} if steps is None else {"steps": steps}),
    }
    config = PretrainConfig.layered({"tokens": run / "tokens", **recipe}, where="the demo")
    recorded = run / "config.yaml"
    if (run / "tokens").exists() and recorded.exists():
        _require_source(TokenDataset(run / "tokens"), source)
        _require_same(config, recorded, recipe)
    data = _tokens(source, run / "tokens", _DIGITS if digits else _PHOTOS, console)
    console.print(f"[bold]2. Pretrain[/] on {len(data['train'])} images, without their labels")
    if _finished(run):
        console.print("   finished earlier; its result is shown")
    else:
        given = {"tokens": data.path} | ({} if steps is None else {"steps": steps})
        pretrain(config, run, given=given, resume=recorded.exists())
    model = load_model(run / "model")
    console.print("[bold]3. Probe[/] every layer, raw pixels and an untrained model")
    if not (run / "probe.json").exists():
        precision = resolve_precision(PretrainConfig.load(recorded).precision, model.device)
        _probe(model, data, run, precision)
    console.print("[bold]4. Complete and sample[/]")
    if not all((run / name).exists() for name in _PICTURES):
        with progress_bar() as show:
            originals = tokens_of_split(data["test"], min(_COMPLETED, len(data["test"])))
            half = data.resolution // 2
            save_completions(
                model,
                originals,
                run / "completions.png",
                half,
                _COMPLETIONS,
                _SAMPLING,
                partial(show, "completing"),
            )
            save_samples(model, run / "samples.png", _SAMPLES, _SAMPLING, partial(show, "sampling"))
    if digits:
        console.print("[bold]5. Complete photographs[/] with a built-in model")
        _complete_photographs(run, console)
    page = write_report(run)
    console.print(_table(run))
    console.print(Text(f"The report, with pictures: {page}"), soft_wrap=True)


def _complete_photographs(run: Path, console: Console) -> None:
    """Write `photographs` and their completions, if this build has the model for it."""
    parts = []
    for name, pixels in photographs().items():
        parts.append(run / "photographs" / f"{name}.png")
        save_png(Image.fromarray(pixels), parts[-1])
    target = run / "photographs.png"
    if target.exists() and target.with_suffix(".json").exists():
        return
    if not has_builtin(DEFAULT_MODEL):
        console.print("   left out: this build of igpt has no built-in model")
        return
    model = load_model(folder_of(DEFAULT_MODEL))
    with progress_bar() as show:
        save_completions(
            model,
            tokens_of_files(model, parts),
            target,
            model.config.resolution // 2,
            _PHOTOGRAPH_COMPLETIONS,
            _SAMPLING,
            partial(show, "completing"),
        )


def _require_source(data: TokenDataset, source: str) -> None:
    """Refuse a run of another source.

    Raises:
        InputError: both are named.
    """
    known = data.manifest["source"]
    if known != source and resolved(Path(known)) != resolved(Path(source)):
        raise InputError(
            f"{data.path.parent} is a run of {known}, not of {source}; choose another -o"
        )


def _require_same_images(data: TokenDataset, source: str, config: PrepareConfig) -> None:
    """Refuse a run of a folder or file in which there are more or fewer images now.

    Raises:
        InputError: both numbers are named.
    """
    known = data.manifest["made"].get("images")
    if known and os.path.exists(source):  # noqa: PTH110  Path.exists raises for invalid names
        splits = open_source(source, config).splits
        found = {name: len(split) for name, split in splits.items()}
        if found != known:
            raise InputError(
                f"{data.path.parent} is a run of {sum(known.values())} images, and {source} has "
                f"{sum(found.values())} now; choose another -o"
            )


def _require_same(config: PretrainConfig, recorded: Path, recipe: dict[str, object]) -> None:
    """Refuse a run that was trained with other settings than those asked for.

    Raises:
        InputError: the first of these settings is named with both values.
    """
    known = PretrainConfig.load(recorded)
    for name in recipe:
        asked, found = getattr(config, name), getattr(known, name)
        if asked not in (found, "auto") and name not in config.changeable:
            remedy = (
                f"give --steps {found}, or choose another -o"
                if name == "steps"
                else "choose another -o"
            )
            raise InputError(
                f"{recorded.parent} was trained with {name} = {found}, not {asked}; {remedy}"
            )


def _tokens(source: str, path: Path, config: PrepareConfig, console: Console) -> TokenDataset:
    console.print(Text.assemble(("1. Palette and tokens", "bold"), f" of {source}"), soft_wrap=True)
    if path.exists():
        _require_same_images(TokenDataset(path), source, config)
    else:
        with progress_bar() as show:
            prepare(
                source,
                path,
                config,
                workers=os.cpu_count() or 1,
                progress=partial(show, "tokenising"),
                phase=show,
            )
    data = TokenDataset(path)
    _require_source(data, source)
    left_out = left_out_of(data.manifest["made"], str(path))
    if left_out:
        console.print(
            f"   left out: {left_out.text()}{left_out.advice()}", markup=False, soft_wrap=True
        )
    console.print(
        f"   {data.resolution} px, {len(data.palette)} colours, {data.resolution**2} pixels "
        "per image"
    )
    return data


def _finished(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and any(line["kind"] == "end" for line in read_metrics(metrics)[0])


def _probe(model: ImageGPT, data: TokenDataset, run: Path, precision: Precision) -> None:
    """Write the run's probe.json; without labels, it says why there is no probe."""
    config, path = ProbeConfig(limit=_PROBE_IMAGES, precision=precision), run / "probe.json"
    about = {"model": str(run / "model")}
    with exclusive(path):
        try:
            with progress_bar() as show, passing_folder(path) as features:
                result, classifier = probe(model, data, config, features, progress=show)
        except InputError as error:
            write_json(
                path, {**about, "format": PROBE, "version": PROBE_VERSION, "skipped": str(error)}
            )
        else:
            write_probe(path, {**about, **result}, classifier)


def _table(run: Path) -> Table:
    record = read_run(run)
    best, known = best_validation(record.metrics), baselines(record.metrics)
    table = Table(title="Results", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    loss = "none" if best is None else f"{best[1]:.3f}"
    table.add_row("validation loss, nats/pixel: pretrained model", loss, style="bold")
    for name, words in (
        ("unigram", "colour frequencies alone (unigram)"),
        ("uniform", "uniform distribution over colours"),
    ):
        if name in known:
            table.add_row(f"  {words}", f"{known[name]:.3f}")
    result = record.probe or {"skipped": "there is no probe.json"}
    if "skipped" in result:
        table.add_row(Text(f"no probe: {result['skipped']}"), "")
        return table
    table.add_section()
    chosen = best_row(result)
    table.add_row(f"probe accuracy on {result['images']['test']} test images", "")
    for row in result["layers"]:
        reason = " (selected by validation accuracy)" if row is chosen else ""
        label = f"  layer {row['layer']}{reason}"
        table.add_row(label, f"{row['test_accuracy']:.1%}", style="bold" if row is chosen else "")
    compared = result.get("baselines") or {}
    if compared.get("untrained"):
        untrained = best_row(compared["untrained"])
        table.add_row(
            f"  untrained model, layer {untrained['layer']}", f"{untrained['test_accuracy']:.1%}"
        )
    if compared.get("raw_pixels"):
        table.add_row("  raw pixels", f"{compared['raw_pixels']['test_accuracy']:.1%}")
    return table
