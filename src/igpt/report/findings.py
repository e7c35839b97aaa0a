"""Sentences about a run; none claims more than the run's numbers do."""

import math
from pathlib import Path
from typing import Any

from igpt.evaluation.results import best_row
from igpt.report.record import Run, baselines, best_validation, standard_error


def describe_model(run: Run) -> str:
    """What was trained on what: objective, size, images, colours; as much of it as is recorded."""
    shape, start = run.shape, run.start
    kind = run.objective.title
    size = [f"{shape['n_layer']} layers"] if "n_layer" in shape else []
    size += [f"width {shape['n_embd']}"] if "n_embd" in shape else []
    size += [f"{shape['n_head']} heads"] if "n_head" in shape else []
    size += (
        [f"{_short(start['parameters'])} parameters"]
        if isinstance(start.get("parameters"), int)
        else []
    )
    text = f"{'An' if kind[:1] in 'aeiou' else 'A'} {kind} transformer" + (
        f" ({', '.join(size)})" if size else ""
    )
    text += ", fine-tuned with labels" if run.finetuned else ", trained without labels"
    if isinstance(start.get("train_images"), int):
        text += f" on {plural(start['train_images'], 'image')}"
    if "resolution" in shape:
        text += f" of {shape['resolution']} \N{MULTIPLICATION SIGN} {shape['resolution']} pixels"
    if "n_colors" in shape:
        text += f" in {shape['n_colors']} colours"
    if run.finetuned and isinstance(start.get("classes"), int):
        text += f", for {plural(start['classes'], 'class', 'classes')}"
    return text + "."


def describe_state(run: Run) -> str:
    """Whether the run has ended, and how far it came."""
    ended: dict[str, Any] | None = None
    for record in run.metrics:
        if record["kind"] in ("start", "resume", "train"):
            ended = None
        elif record["kind"] == "end":
            ended = record
    steps = [record["step"] for record in run.metrics if isinstance(record.get("step"), int)]
    last, planned, size = (
        steps[-1] if steps else 0,
        run.config.get("steps"),
        run.config.get("batch_size"),
    )
    if ended is not None:
        batch = f" of {plural(size, 'image')}" if isinstance(size, int) else ""
        seconds = ended.get("seconds")
        took = (
            f" in {duration(seconds)}"
            if isinstance(seconds, int | float) and math.isfinite(seconds)
            else ""
        )
        early = (
            f", stopped early (at most {number(planned)})"
            if isinstance(planned, int) and last < planned
            else ""
        )
        text = f"Finished: {plural(last, 'step')}{batch}{took}{early}."
    else:
        of = f" of {number(planned)}" if isinstance(planned, int) else ""
        text = f"Not finished: the last record is of step {number(last)}{of}; what follows is as of then."
    if run.unreadable:
        text += f" {plural(run.unreadable, 'unreadable line')} of metrics.jsonl left out."
    return text


def describe_loss(run: Run) -> str:
    """The lowest validation loss, set against the frequencies of the colours; empty if there is none."""
    best, unigram = best_validation(run.metrics), baselines(run.metrics).get("unigram")
    if best is None:
        return ""
    step, loss = best
    text = f"Its lowest validation loss is {loss:.3f} {run.unit}, at step {number(step)}"
    if unigram is None:
        return text + "."
    difference = unigram - loss
    if difference < 5e-4:
        return f"{text}; colour frequencies alone give {unigram:.3f}: it has not learnt more than those."
    text += f", {difference:.3f} below what colour frequencies alone give ({unigram:.3f})"
    if unigram < 12:
        text += f": as uncertain as an even choice among {math.exp(loss):.1f} colours instead of {math.exp(unigram):.1f}"
    return text + "."


def describe_classifier(run: Run) -> str:
    """A fine-tuned classifier's accuracy: on the test images if it has seen its end, else on the validation ones."""
    best, test = best_validation(run.metrics, "error"), run.test or {}
    count = test.get("test_images")
    if isinstance(test.get("test_accuracy"), int | float) and isinstance(count, int):
        accuracy = test["test_accuracy"]
        text = (
            f"The classifier is right on {percent(accuracy)} of {plural(count, 'test image')} (standard error "
            f"{100 * standard_error(accuracy, count):.1f} points)"
        )
        text += (
            "."
            if best is None
            else f"; it was chosen by validation accuracy, at step {number(best[0])}."
        )
        rates, folded, modal = test.get("rates") or (), test.get("fold_back"), test.get("modal")
        if len(rates) > 1 and test.get("learning_rate") is not None:
            text += f" Its learning rate, {test['learning_rate']:g}, is the best of {len(rates)} by validation accuracy."
        if folded:
            text += (
                f" It was then trained again, on validation images too, for as many epochs; before that, "
                f"{percent(folded['before']['test_accuracy'])}."
            )
        if modal:
            text += f" The modal prediction over {modal['masks']} masks is right on {percent(modal['accuracy'])}."
        return text
    if best is None:
        return ""
    return f"Its best validation accuracy is {percent(1 - best[1])}, at step {number(best[0])}; it is not tested yet."


def describe_probe(probe: dict[str, Any]) -> str:
    """Test accuracy of the chosen layer with its standard error, and an honest word on each comparison."""
    best, count, known = best_row(probe), probe["images"]["test"], probe.get("baselines") or {}
    ours = best["test_accuracy"]
    text = (
        f"A linear classifier on layer {best['layer']} of {probe['layers'][-1]['layer']}, chosen on validation images, "
        f"is right on {percent(ours)} of {plural(count, 'test image')} "
        f"(standard error {100 * standard_error(ours, count):.1f} points)."
    )
    compared = []
    if known.get("raw_pixels"):
        compared.append(("raw pixels", known["raw_pixels"]["test_accuracy"]))
    if known.get("untrained"):
        compared.append(
            (
                "the best layer of an untrained network",
                best_row(known["untrained"])["test_accuracy"],
            )
        )
    for what, theirs in compared:
        text += " " + compare(ours, theirs, count, what)
    return (
        text if compared else text + " It was not compared with raw pixels or an untrained network."
    )


def compare(ours: float, theirs: float, count: int, what: str) -> str:
    """One sentence on two accuracies over `count` images; a difference counts beyond two of its standard errors.

    The two are treated as independent, which overstates the error where they err on the same
    images.
    """
    points = 100 * (ours - theirs)
    error = 100 * math.hypot(standard_error(ours, count), standard_error(theirs, count))
    if abs(points) > 2 * error:
        place = "above" if points > 0 else "below"
        return f"It is {abs(points):.1f} points {place} {what} ({percent(theirs)}; two standard errors: {2 * error:.1f})."
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
