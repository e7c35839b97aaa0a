"""Sentences about the results of a run, with their uncertainty."""

import math
from pathlib import Path
from typing import Any

from igpt.evaluation.results import best_row, best_row_by_neighbours
from igpt.report.record import Run, baselines, best_validation, standard_error


def describe_model(run: Run) -> str:
    """Describe the model and its training data, as far as recorded."""
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
    if run.finetuned:
        text += ", fine-tuned with labels"
    else:
        text += f", trained {'with' if run.config.get('condition') else 'without'} labels"
    if start_model := run.config.get("from_model"):
        path = Path(str(start_model))
        text += f", starting from {path.parent.name if path.name == 'model' else path.name},"
    if isinstance(start.get("train_images"), int):
        text += f" on {plural(start['train_images'], 'image')}"
    if "resolution" in shape:
        text += f" of {shape['resolution']} \N{MULTIPLICATION SIGN} {shape['resolution']} pixels"
    if "n_colors" in shape:
        text += f" in {shape['n_colors']} colours"
    if isinstance(start.get("classes"), int):
        purpose = "for" if run.finetuned else "with a start token for each of"
        text += f", {purpose} {plural(start['classes'], 'class', 'classes')}"
    return text + "."


def describe_state(run: Run) -> str:
    """Describe the progress of the run."""
    ended: dict[str, Any] | None = None
    for record in run.metrics:
        if record["kind"] in ("start", "resume", "train"):
            ended = None
        elif record["kind"] == "end":
            ended = record
    steps = [record["step"] for record in run.metrics if isinstance(record.get("step"), int)]
    last = steps[-1] if steps else 0
    planned, size = run.config.get("steps"), run.config.get("batch_size")
    if ended is not None:
        text = f"Finished: {plural(last, 'step')}"
        if size is not None:
            text += f" of {plural(size, 'image')}"
        seconds = ended.get("seconds")
        if seconds is not None and math.isfinite(seconds):
            text += f" in {duration(seconds)}"
        if planned is not None and last < planned:
            text += f", stopped early (at most {number(planned)})"
        text += "."
    else:
        of = "" if planned is None else f" of {number(planned)}"
        text = (
            f"Not finished: the last record is of step {number(last)}{of}; the results below are "
            "from that time."
        )
    if run.unreadable:
        text += f" {plural(run.unreadable, 'unreadable line')} of metrics.jsonl skipped."
    return text


def describe_loss(run: Run) -> str:
    """Compare the lowest validation loss, if any, with that of the colour frequencies."""
    best, unigram = best_validation(run.metrics), baselines(run.metrics).get("unigram")
    if best is None:
        return ""
    step, loss = best
    text = f"Lowest validation loss: {loss:.3f} {run.unit}, at step {number(step)}"
    if unigram is None:
        return text + "."
    difference = unigram - loss
    if difference < 5e-4:
        return (
            f"{text}; the colour frequencies alone give {unigram:.3f}, so the model has not learnt "
            "more than those."
        )
    text += f", {difference:.3f} below that of the colour frequencies alone ({unigram:.3f})"
    if unigram < 12:
        text += f": a perplexity of {math.exp(loss):.1f} colours instead of {math.exp(unigram):.1f}"
    return text + "."


def describe_classifier(run: Run) -> str:
    """Describe a classifier's accuracy: on test images, or before the end on validation images."""
    best, test = best_validation(run.metrics, "error"), run.test
    if test is not None:
        accuracy, count = test["test_accuracy"], test["test_images"]
        text = (
            f"Test accuracy {percent(accuracy)} on {plural(count, 'image')} (standard error "
            f"{100 * standard_error(accuracy, count):.1f} points)"
        )
        if best is not None:
            text += f"; step {number(best[0])} was selected by validation accuracy"
        text += "."
        rates, folded, modal = test.get("rates") or (), test.get("fold_back"), test.get("modal")
        if len(rates) > 1 and test.get("learning_rate") is not None:
            text += (
                f" The learning rate, {test['learning_rate']:g}, is the best of {len(rates)} by "
                "validation accuracy."
            )
        if folded:
            text += (
                " The classifier was then trained again, on the validation images too, for the "
                "same number of epochs; test accuracy before that: "
                f"{percent(folded['before']['test_accuracy'])}."
            )
        if modal:
            text += (
                f" Test accuracy of the modal prediction over {modal['masks']} masks: "
                f"{percent(modal['accuracy'])}."
            )
        return text
    if best is None:
        return ""
    return (
        f"Best validation accuracy: {percent(1 - best[1])}, at step {number(best[0])}; not tested "
        "yet."
    )


def describe_probe(probe: dict[str, Any]) -> str:
    """Describe the test accuracy of the best layer, and compare it with the baselines."""
    best, count, known = best_row(probe), probe["images"]["test"], probe.get("baselines") or {}
    ours = best["test_accuracy"]
    text = (
        f"Linear probe: best layer {best['layer']} of {probe['layers'][-1]['layer']} by validation "
        f"accuracy, test accuracy {percent(ours)} on {plural(count, 'image')} (standard error "
        f"{100 * standard_error(ours, count):.1f} points)."
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
    for baseline, theirs in compared:
        text += " " + compare(ours, theirs, count, baseline)
    if not compared:
        text += " It was not compared with raw pixels or an untrained network."
    if nearest := best_row_by_neighbours(probe):
        found = nearest["knn"]
        text += (
            f" By {plural(found['k'], 'nearest neighbour')}: best layer {nearest['layer']} by "
            f"validation accuracy, test accuracy {percent(found['test_accuracy'])}."
        )
    if found := probe.get("by_likelihood"):
        text += (
            f" By the likelihood given each class: test accuracy {percent(found['test_accuracy'])}."
        )
    return text


def compare(ours: float, theirs: float, count: int, what: str) -> str:
    """Compare two accuracies over `count` images, by two standard errors of their difference.

    The accuracies are treated as independent, which overstates the error if they are wrong on the
    same images.
    """
    points = 100 * (ours - theirs)
    error = 100 * math.hypot(standard_error(ours, count), standard_error(theirs, count))
    if abs(points) > 2 * error:
        side = "above" if points > 0 else "below"
        return (
            f"It is {abs(points):.1f} points {side} {what} ({percent(theirs)}; two standard "
            f"errors: {2 * error:.1f})."
        )
    return (
        f"The difference from {what} ({percent(theirs)}), {signed(points)} points, is within two "
        f"standard errors ({2 * error:.1f}): not significantly "
        f"{'better' if points >= 0 else 'worse'}."
    )


def describe_sampling(how: dict[str, Any]) -> str:
    """Return the settings of sampling in parentheses; empty if not recorded."""
    parts = [f"temperature {how['temperature']}"] if how.get("temperature") is not None else []
    parts += [f"top-k {how['top_k']}"] if how.get("top_k") is not None else []
    parts += [f"nucleus {how['top_p']}"] if how.get("top_p") is not None else []
    if "top_k" in how and "top_p" in how and how["top_k"] is None and how["top_p"] is None:
        parts.append("no top-k or nucleus cut")
    parts += [f"guidance {how['guidance']}"] if how.get("guidance") is not None else []
    parts += [f"seed {how['seed']}"] if how.get("seed") is not None else []
    return f" ({', '.join(parts)})" if parts else ""


def short_source(source: str) -> str:
    """Return the last part of a path (`/data/birds/` -> birds), or a name unchanged."""
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
    """Format with a sign, as a true minus if negative."""
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
