"""The whole story on one data set, small enough for two CPU cores; interrupted, it goes on where it was."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from igpt.command_line import load_model, passing_folder, progress_bar
from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.sources import DIGITS
from igpt.data.tokens import TokenDataset
from igpt.errors import InputError
from igpt.evaluation.probe import FORMAT, VERSION, ProbeConfig, best_row, probe
from igpt.files import read_json, write_json
from igpt.model.generate import Drawing
from igpt.model.precision import Precision, settle_precision
from igpt.model.transformer import ImageGPT
from igpt.pictures import draw_completions, draw_samples, tokens_of_split
from igpt.presets import preset
from igpt.report.page import write_report
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig, pretrain

_DIGITS = PrepareConfig(size=8)
_PHOTOS = PrepareConfig(size=16, colors=128)
_PROBE_IMAGES = 2000  # of each split: seconds instead of minutes
_COMPLETED, _COMPLETIONS, _SAMPLES = 8, 6, 32
_DRAWING: Drawing = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}


def tell(source: str, run: Path, steps: int | None = None) -> None:
    """Prepares, pretrains, probes, completes, samples and reports; prints a table of what came out.

    Args:
        source: see `open_source`.
        steps: updates of pretraining, if not the preset's.
        run: run directory; the steps whose results it holds already are not repeated.

    Raises:
        InputError: the source is unusable, or `run` tells of another one.
    """
    console = Console(highlight=False)
    digits = source == DIGITS
    data = _tokens(source, run / "tokens", _DIGITS if digits else _PHOTOS, console)
    console.print(f"[bold]2. Pretrain[/] on {len(data['train'])} images, without their labels")
    recipe = {**preset("digits" if digits else "photos"), **({} if steps is None else {"steps": steps})}
    config = PretrainConfig.layered({"tokens": data.path, **recipe})
    if not _finished(run):
        given = {"tokens": data.path} | ({} if steps is None else {"steps": steps})
        pretrain(config, run, given=given, resume=(run / "config.yaml").exists())
    model = load_model(run / "model")
    console.print("[bold]3. Probe[/] every layer, raw pixels and an untrained model")
    if not (run / "probe.json").exists():
        recorded = PretrainConfig.load(run / "config.yaml")
        precision = settle_precision(recorded.precision, model.wte.weight.device)
        write_json(run / "probe.json", {"model": str(run / "model"), **_probe(model, data, precision)})
    console.print("[bold]4. Complete and sample[/]")
    if not (run / "samples.png").exists():
        with progress_bar() as show:
            originals = tokens_of_split(data["test"], min(_COMPLETED, len(data["test"])))
            half = data.resolution // 2
            draw_completions(
                model, originals, run / "completions.png", half, _COMPLETIONS, _DRAWING, partial(show, "completing")
            )
            draw_samples(model, run / "samples.png", _SAMPLES, _DRAWING, partial(show, "sampling"))
    page = write_report(run)
    console.print(_table(run))
    console.print(f"The report, with pictures: {page}", soft_wrap=True)


def _tokens(source: str, path: Path, config: PrepareConfig, console: Console) -> TokenDataset:
    console.print(f"[bold]1. Palette and tokens[/] of {source}")
    if not path.exists():
        with progress_bar() as show:
            prepare(source, path, config, workers=os.cpu_count() or 1, progress=partial(show, "tokenising"))
    data = TokenDataset(path)
    told = data.manifest["source"]
    if told != source and Path(told).resolve() != Path(source).resolve():
        raise InputError(f"{path.parent} tells of {told}, not of {source}; choose another -o")
    console.print(f"   {data.resolution} px, {len(data.palette)} colours, {data.resolution**2} pixels an image")
    return data


def _finished(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and any(line["kind"] == "end" for line in read_metrics(metrics))


def _probe(model: ImageGPT, data: TokenDataset, precision: Precision) -> dict[str, Any]:
    try:
        config = ProbeConfig(limit=_PROBE_IMAGES, precision=precision)
        with progress_bar() as show, passing_folder(data.path.parent / "probe.json") as features:
            return probe(model, data, config, features, progress=show)
    except InputError as error:  # a story without labels has no probe, and says why
        return {"format": FORMAT, "version": VERSION, "skipped": str(error)}


def _table(run: Path) -> Table:
    lines = read_metrics(run / "metrics.jsonl")
    start = next(line for line in lines if line["kind"] == "start")
    end = next(line for line in lines if line["kind"] == "end")
    table = Table(title="What came out", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_row("validation loss, nats/pixel: pretrained model", f"{end['best']:.3f}", style="bold")
    table.add_row("  colour frequencies alone (unigram)", f"{start['unigram_loss']:.3f}")
    table.add_row("  any colour alike (uniform)", f"{start['uniform_loss']:.3f}")
    result = read_json(run / "probe.json", "probe")
    if "skipped" in result:
        table.add_row(f"no probe: {result['skipped']}", "")
        return table
    table.add_section()
    best = best_row(result)
    table.add_row(f"probe accuracy on {result['images']['test']} test images", "")
    for row in result["layers"]:
        chosen = row is best
        label = f"  layer {row['layer']}{' (chosen on validation)' if chosen else ''}"
        table.add_row(label, f"{row['test_accuracy']:.1%}", style="bold" if chosen else "")
    untrained = best_row(result["baselines"]["untrained"])
    table.add_row(f"  untrained model, layer {untrained['layer']}", f"{untrained['test_accuracy']:.1%}")
    table.add_row("  raw pixels", f"{result['baselines']['raw_pixels']['test_accuracy']:.1%}")
    return table
