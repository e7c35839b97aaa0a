"""What a run's records say, and the sentences that they support; no sentence claims more than the numbers do.

Losses are in nats per pixel (of masked pixels under the BERT objective); accuracies are shares from 0 to 1.
"""

import json
import math
from pathlib import Path
from typing import Any

OBJECTIVES = {"autoregressive": "autoregressive", "bert": "BERT-style"}


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a `metrics.jsonl`, and how many lines before the last are unreadable.

    A run in progress may be writing the last line, and a killed one leaves it cut off: that is no damage.
    """
    records, unreadable = [], 0
    lines = path.read_text("utf-8", errors="replace").splitlines()
    for position, line in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            records.append(record)
        elif line.strip() and position < len(lines) - 1:
            unreadable += 1
    return records, unreadable


def history(metrics: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of one kind ("train", "validation") that count, by step.

    A run that was killed and resumed takes some steps twice; those it had taken past the resumed state are dropped.
    """
    kept: dict[int, dict[str, Any]] = {}
    for record in metrics:
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if record["kind"] == "resume":
            kept = {known: earlier for known, earlier in kept.items() if known <= step}
        elif record["kind"] == kind and isinstance(record.get("loss"), int | float):
            kept[step] = record
    return [kept[step] for step in sorted(kept)]


def best_validation(metrics: list[dict[str, Any]]) -> tuple[int, float] | None:
    """Step and value of the lowest validation loss on record, or None."""
    found = [(record["loss"], record["step"]) for record in history(metrics, "validation")]
    finite = [(loss, step) for loss, step in found if math.isfinite(loss)]
    return None if not finite else (min(finite)[1], float(min(finite)[0]))


def baselines(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The losses in nats/pixel that need no model, "uniform" and "unigram": those that the run wrote down."""
    found = {}
    for name in ("uniform", "unigram"):
        value = started(metrics).get(f"{name}_loss")
        if isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def started(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the run wrote down at its start; a resumed run may have written it again."""
    merged: dict[str, Any] = {}
    for record in metrics:
        if record["kind"] == "start":
            merged.update(record)
    return merged


def chosen_layer(probe: dict[str, Any]) -> dict[str, Any]:
    """The entry of a probe's `layers` that its `best_layer` names."""
    for layer in probe["layers"]:
        if layer["layer"] == probe["best_layer"]:
            found: dict[str, Any] = layer
            return found
    raise KeyError(f"layers[{probe['best_layer']}]")


def standard_error(accuracy: float, count: int) -> float:
    """Of a share of `count` independent answers: sqrt(p (1 - p) / n)."""
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / count) if count > 0 else math.nan


def describe_model(config: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """What was trained on what: objective, size, images, colours; as much of it as is recorded."""
    settings, start = flat(config), started(metrics)
    objective = settings.get("model.objective", "autoregressive")
    kind = OBJECTIVES.get(str(objective), str(objective))
    size = [f"{settings['model.n_layer']} layers"] if "model.n_layer" in settings else []
    size += [f"width {settings['model.n_embd']}"] if "model.n_embd" in settings else []
    size += [f"{settings['model.n_head']} heads"] if "model.n_head" in settings else []
    size += [f"{_short(start['parameters'])} parameters"] if isinstance(start.get("parameters"), int) else []
    text = f"{'An' if kind[0] in 'aeiou' else 'A'} {kind} transformer" + (f" ({', '.join(size)})" if size else "")
    if isinstance(start.get("train_images"), int):
        text += f", trained without labels on {plural(start['train_images'], 'image')}"
    if "model.resolution" in settings:
        text += f" of {settings['model.resolution']} \N{MULTIPLICATION SIGN} {settings['model.resolution']} pixels"
    if "model.n_colors" in settings:
        text += f" in {settings['model.n_colors']} colours"
    return text + "."


def describe_state(config: dict[str, Any], metrics: list[dict[str, Any]], unreadable: int) -> str:
    """Whether the run has ended, and how far it came."""
    ended: dict[str, Any] | None = None
    for record in metrics:
        if record["kind"] in ("start", "resume", "train"):
            ended = None
        elif record["kind"] == "end":
            ended = record
    steps = [record["step"] for record in metrics if isinstance(record.get("step"), int)]
    last = steps[-1] if steps else 0
    batch = f" of {plural(config['batch_size'], 'image')}" if isinstance(config.get("batch_size"), int) else ""
    if ended is not None:
        seconds = ended.get("seconds")
        took = f" in {duration(seconds)}" if isinstance(seconds, int | float) and math.isfinite(seconds) else ""
        text = f"Finished: {plural(last, 'step')}{batch}{took}."
    else:
        planned = f" of {number(config['steps'])}" if isinstance(config.get("steps"), int) else ""
        text = f"Not finished: the last record is of step {number(last)}{planned}; what follows is as of then."
    if unreadable:
        text += f" {plural(unreadable, 'unreadable line')} of metrics.jsonl left out."
    return text


def describe_loss(config: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """The lowest validation loss, set against the frequencies of the colours; empty if there is none."""
    best, unigram = best_validation(metrics), baselines(metrics).get("unigram")
    if best is None:
        return ""
    step, loss = best
    text = f"Its lowest validation loss is {loss:.3f} {unit_of(config)}, at step {number(step)}"
    if unigram is None:
        return text + "."
    difference = unigram - loss
    if difference < 5e-4:
        return f"{text}; colour frequencies alone give {unigram:.3f}: it has not learnt more than those."
    text += f", {difference:.3f} below what colour frequencies alone give ({unigram:.3f})"
    if loss < 12:
        text += (
            f": as uncertain as an even choice among {math.exp(loss):.1f} colours instead of {math.exp(unigram):.1f}"
        )
    return text + "."


def describe_probe(probe: dict[str, Any]) -> str:
    """Test accuracy of the chosen layer with its standard error, and an honest word on each comparison."""
    best, count, known = chosen_layer(probe), probe["images"]["test"], probe.get("baselines") or {}
    ours = best["test_accuracy"]
    text = (
        f"A linear classifier on layer {best['layer']} of {probe['layers'][-1]['layer']}, chosen on validation images, "
        f"is right on {percent(ours)} of {plural(count, 'test image')} "
        f"(standard error {100 * standard_error(ours, count):.1f} points)."
    )
    compared = []
    if "raw_pixels" in known:
        compared.append(("raw pixels", known["raw_pixels"]["test_accuracy"]))
    if "untrained" in known:
        compared.append(("the best layer of an untrained network", chosen_layer(known["untrained"])["test_accuracy"]))
    for what, theirs in compared:
        text += " " + compare(ours, theirs, count, what)
    return text if compared else text + " It was not compared with raw pixels or an untrained network."


def compare(ours: float, theirs: float, count: int, what: str) -> str:
    """One sentence on two accuracies over `count` images; a difference counts beyond two of its standard errors.

    The two are treated as independent, which overstates the error where they err on the same images.
    """
    points = 100 * (ours - theirs)
    error = 100 * math.hypot(standard_error(ours, count), standard_error(theirs, count))
    if abs(points) > 2 * error:
        place = "above" if points > 0 else "below"
        return (
            f"It is {abs(points):.1f} points {place} {what} ({percent(theirs)}; two standard errors: {2 * error:.1f})."
        )
    return (
        f"Its difference from {what} ({percent(theirs)}), {signed(points)} points, is within two standard errors "
        f"({2 * error:.1f}): these test images do not show that it is {'better' if points >= 0 else 'worse'}."
    )


def describe_sampling(how: dict[str, Any]) -> str:
    """How images were drawn, in brackets; empty if it is not recorded."""
    parts = [f"temperature {how['temperature']}"] if how.get("temperature") is not None else []
    parts += [f"top-k {how['top_k']}"] if how.get("top_k") is not None else []
    parts += [f"nucleus {how['top_p']}"] if how.get("top_p") is not None else []
    if "top_k" in how and "top_p" in how and how["top_k"] is None and how["top_p"] is None:
        parts.append("no top-k or nucleus cut")
    parts += [f"seed {how['seed']}"] if how.get("seed") is not None else []
    return f" ({', '.join(parts)})" if parts else ""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in the names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def unit_of(config: dict[str, Any]) -> str:
    """The unit of a run's losses."""
    return "nats/masked pixel" if flat(config).get("model.objective") == "bert" else "nats/pixel"


def short_source(source: str) -> str:
    """The end of a path, or a name as it is: `/data/birds/` -> birds, `uoft-cs/cifar10` -> itself."""
    is_path = source.startswith(("/", ".", "~")) or source.strip("/").count("/") > 1
    return Path(source).name if is_path and Path(source).name else source


def number(value: int) -> str:
    """1234567 -> 1,234,567."""
    return f"{value:,}"


def plural(count: int, singular: str, several: str | None = None) -> str:
    """1 image, 2 images."""
    return f"{number(count)} {singular if count == 1 else several or singular + 's'}"


def percent(share: float) -> str:
    """0.9615 -> 96.2 %, with a space that does not break."""
    return f"{100 * share:.1f}\u00a0%"


def signed(value: float) -> str:
    """With a sign, and a true minus."""
    return f"{value:+.1f}".replace("-", "\u2212")


def duration(seconds: float) -> str:
    """81 -> 1 min 21 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{number(whole // 3600)} h {whole % 3600 // 60} min"


def _short(count: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)
