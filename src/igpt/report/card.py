"""The model card of a run, RUN/README.md, and its upload with the model.

The card is written from the run's files alone. It describes the training data and objective, the
results, the use and the limits of the model. Its metadata contains the results as the Hub's
`model-index`.
"""

import hashlib
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt.builtin_models import NAMES
from igpt.config import flags, read_settings
from igpt.data.left_out import listed
from igpt.errors import InputError
from igpt.evaluation.results import (
    best_row,
    best_row_by_neighbours,
    read_score,
    score_files,
)
from igpt.files import atomic_file, folder_to_read, require_regular
from igpt.hub import require_name, upload
from igpt.report.findings import (
    describe_classifier,
    describe_loss,
    describe_model,
    describe_probe,
    describe_sampling,
    describe_state,
    number,
    percent,
    plural,
    short_source,
)
from igpt.report.record import Run, best_validation, read_run, read_sampling
from igpt.report.sections import Table, generation_tables, key_tables, template

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


CARD = "README.md"
_LIBRARY = "library_name: igpt"  # distinguishes a card from other README files
_SIGNATURE = "\n<!-- SHA-256 of the text above, as igpt wrote it: "
_PICTURES = ("completions.png", "samples.png")
_SOURCES = ("metrics.jsonl", "probe.json", "test.json", "quality.json", *_PICTURES)
_MAX_CLASSES = 20  # named in the card
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def write_card(
    run: Path, name: str, *, license: str | None = None, terms: str | None = None
) -> Path:
    """Write `run/README.md` and return its path; replace an existing card that was not edited.

    The card ends with a comment that holds the checksum of its text, by which edits are found.

    Args:
        run: a run directory with a model.
        name: USER/NAME or the name of a built-in model, from which the card's examples load it.
        license: its identifier on the Hub, such as apache-2.0; omitted by default.
        terms: terms of use of the training images, in one sentence; omitted by default.

    Raises:
        InputError: a bad name, no run with a model, a damaged file, or a README.md that is no card
            or was edited.
    """
    if name not in NAMES:
        require_name(name)
    if license is not None and not _LICENSE.fullmatch(license):
        raise InputError(
            f"{license!r} is not the identifier of a license on the Hub, such as apache-2.0"
        )
    path = run / CARD
    if path.exists():
        existing = _text(path)
        if _LIBRARY not in existing:
            raise InputError(f"{path} is not a model card written by igpt; move it elsewhere")
        if existing != _signed(existing.rpartition(_SIGNATURE)[0]):
            raise InputError(
                f"{path} was edited, or written by an earlier igpt, and is left as it is; rename "
                "it to get a new one"
            )
    card = template("card.md.j2").render(_contents(_with_model(run), name, license, terms))
    with atomic_file(path) as temporary:
        temporary.write_text(_signed(card), encoding="utf-8")
    return path


def _signed(card: str) -> str:
    """Return a card with its checksum."""
    return f"{card}{_SIGNATURE}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def card_results(card: Path) -> list["EvalResult"]:
    """Return the results in the metadata of a card; none if it does not exist or is damaged."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(card).data.eval_results or [] if card.is_file() else []
    except ValueError:  # including errors of YAML
        return []


def push_to_hub(run: Path, name: str, *, private: bool = False) -> str:
    """Upload a run's model directory, card and pictures to the Hub in one commit; return its URL.

    An existing card is uploaded unchanged, including edits; otherwise it is written first
    (`write_card`).

    Args:
        run: a run directory with a model.
        name: USER/NAME; a missing repository is created.
        private: create a private repository; an existing one must be private.

    Raises:
        InputError: see `write_card` and `igpt.hub.upload`.
    """
    require_name(name)
    if not (run / CARD).exists():
        write_card(run, name)
    model = folder_to_read(_with_model(run).path / "model")
    if not (model / "model.safetensors").is_file():
        raise InputError(f"{model} has no weights: model.safetensors is missing")
    pictures = [run / picture for picture in _PICTURES if (run / picture).exists()]
    sent: dict[str, Path] = {}
    for file in [*sorted(model.iterdir()), run / CARD, *pictures]:
        require_regular(file)
        if not file.is_file():
            raise InputError(f"{file} is not a file; only files are uploaded, so move it elsewhere")
        if file.name in sent:
            raise InputError(
                f"{sent[file.name]} and {file} would be one file on the Hub; move one of them "
                "elsewhere"
            )
        sent[file.name] = file
    return upload(name, sent, private=private, message="Model trained with igpt")


def doubts(run: Path, name: str) -> list[str]:
    """Return possible problems of an existing card: its age, or another name in it."""
    path = run / CARD
    written = path.stat().st_mtime
    sources = [*(run / file for file in _SOURCES), *score_files(run)]
    newer = [file.name for file in sources if file.exists() and file.stat().st_mtime > written]
    found = [f"is older than {', '.join(newer)}"] if newer else []
    return found if name in _text(path) else [*found, f"does not name {name}"]


def _text(card: Path) -> str:
    require_regular(card)
    if card.is_dir():
        raise InputError(f"{card} is a folder; move it elsewhere")
    return card.read_text("utf-8", errors="replace")


def _with_model(path: Path) -> Run:
    run = read_run(path)
    if not run.saved:
        raise InputError(
            f"{path} contains no model yet; igpt pretrain writes one at its first validation"
        )
    for key in ("n_embd", "n_head"):
        if not run.saved.get(key):
            config = path / "model" / "config.json"
            raise InputError(f"{config} has {key} = {run.saved.get(key)}; it must be positive")
    return run


def _contents(run: Run, name: str, license: str | None, terms: str | None) -> dict[str, Any]:
    """Return the values of the template."""
    from huggingface_hub import ModelCardData

    objective, classes = run.objective, _classes(run)
    head_width = run.saved["n_embd"] // run.saved["n_head"]
    if classes:
        task = "image-classification"
    elif objective.has_likelihood:
        task = "unconditional-image-generation"
    else:
        task = "image-feature-extraction"
    probed = run.probe if run.probe and "skipped" not in run.probe else None
    findings = [describe_classifier(run) if run.finetuned else describe_loss(run)]
    findings += [describe_probe(probed)] if probed else []
    trained = "fine-tuned" if run.finetuned else "trained"
    metadata = ModelCardData(
        license=license,
        library_name="igpt",
        pipeline_tag=task,
        tags=["imagegpt", "image-gpt", objective.name],
        model_name=name,
        eval_results=_results(run, probed) or None,
    )
    return {
        "metadata": metadata.to_yaml().strip(),
        "title": _plain(f"Image GPT {trained} on {short_source(run.source)}"),
        "description": describe_model(run),
        "findings": [sentence for sentence in findings if sentence],
        "state": describe_state(run),
        "pictures": _pictures(run),
        "data": _data(run) + ([("terms of use", _plain(terms))] if terms else []),
        "commands": _commands(run),
        "training": _training(run),
        "tables": [
            *_accuracies(run),
            *key_tables(run),
            *([_by_layer(probed)] if probed else []),
            *(replace(table, caption=_plain(table.caption)) for table in generation_tables(run)),
        ],
        "scores": [_score(run, found) for found in _scores(run)],
        "name": name,
        "objective": objective,
        "variant": run.saved.get("model_type") == "igpt",
        "classifier": bool(classes),
        "conditions": [shlex.quote(each) for each in _conditions(run)],
        "joint": bool(run.config.get("generation_weight")),
        "head_width": head_width,
        "root": math.sqrt(head_width),
        "resolution": run.shape["resolution"],
        "colors": run.shape["n_colors"],
        "layer": probed["best_layer"] if probed else run.shape["n_layer"] // 2,
        "version": run.environment.get("igpt"),
    }


def _results(run: Run, probed: Mapping[str, Any] | None) -> list["EvalResult"]:
    """Return the recorded results in the form of the Hub's `model-index`."""
    from huggingface_hub import EvalResult

    def result(
        task: tuple[str, str], source: str, split: str, metric: tuple[str, str], value: float
    ) -> EvalResult:
        (task_type, task_name), (metric_type, metric_name) = task, metric
        return EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=source,
            dataset_name=source,
            dataset_split=split,
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=value,
        )

    found, source, accuracy = [], short_source(run.source), ("accuracy", "test accuracy")
    if run.test:
        task = ("image-classification", "Image classification")
        found.append(result(task, source, "test", accuracy, run.test["test_accuracy"]))
    if probed:
        best = best_row(probed)
        task = ("image-classification", f"Linear probe of layer {best['layer']}")
        probe_source = short_source(str(probed.get("source") or run.source))
        found.append(result(task, probe_source, "test", accuracy, best["test_accuracy"]))
    task = ("unconditional-image-generation", "Density estimation")
    validation = None if run.finetuned else best_validation(run.metrics)
    if validation:
        metric = ("loss", f"validation loss ({run.unit})")
        found.append(result(task, source, "validation", metric, validation[1]))
    for score in _scores(run):
        metric = ("loss", "negative log-likelihood (nats/pixel)")
        scored = short_source(_score_source(run, score))
        found.append(result(task, scored, str(score.get("split")), metric, score["nats_per_pixel"]))
    return found


def _score_source(run: Run, score: Mapping[str, Any]) -> str:
    source = str(score.get("source"))
    return run.source if source == str(run.config.get("tokens")) else source


def _classes(run: Run) -> list[str]:
    if run.saved.get("architectures") != ["ImageGPTForImageClassification"]:
        return []
    labels = run.saved.get("id2label") or {}
    return [labels[number] for number in sorted(labels, key=int)]


def _conditions(run: Run) -> list[str]:
    """Return the classes of a class-conditional model."""
    return (run.saved.get("igpt") or {}).get("conditions") or []


def _data(run: Run) -> list[tuple[str, str]]:
    """Return names and values of the training data."""
    rows = [("source", _code(short_source(run.source)))]
    counts = run.split_sizes or {
        split: run.start[f"{split}_images"]
        for split in ("train", "validation")
        if run.start.get(f"{split}_images") is not None
    }
    rows += [(f"{split} images", number(count)) for split, count in counts.items()]
    resolution = run.shape["resolution"]
    rows.append(("resolution", f"{resolution} \N{MULTIPLICATION SIGN} {resolution} pixels"))
    if run.palette is not None:
        fingerprint = run.palette.fingerprint[:12]
        last = ", the last one transparent" if run.palette.transparent else ""
        rows.append(("palette", f"{len(run.palette)} colours{last}, fingerprint `{fingerprint}`"))
    error = (run.manifest.get("made") or {}).get("palette_error") or {}
    if error.get("mse") is not None:
        size = "none"
        if (psnr := error.get("psnr_db")) is not None:
            size = f"{error['mse']:.1f} (mean squared, per channel), {psnr:.1f} dB PSNR"
        rows.append(("quantization error", size))
    if run.left_out:
        # Counts only: the recorded first name may be a local path.
        kinds = run.left_out.entries.items()
        left_out = "; ".join(f"{_plain(kind)}: {number(entry.count)}" for kind, entry in kinds)
        rows.append(("left out", left_out))
    rows += [("warning", _plain(_without_folders(warning, run))) for warning in run.warnings]
    if classes := _classes(run) or _conditions(run):
        more = f", and {len(classes) - _MAX_CLASSES} more" if len(classes) > _MAX_CLASSES else ""
        names = ", ".join(map(_code, classes[:_MAX_CLASSES])) + more
        rows.append((plural(len(classes), "class", "classes"), names))
    return rows


def _without_folders(text: str, run: Run) -> str:
    """Remove the folders of the images' source and of the given palette from a text."""
    config = (run.manifest.get("made") or {}).get("config") or {}
    for path in filter(None, (config.get("palette"), run.source)):
        text = text.replace(path, short_source(path))
    return text


def _training(run: Run) -> list[tuple[str, str]]:
    """Return names and values of the training settings."""
    config, environment = run.config, run.environment
    rows = [
        (words, _code(config[key]))
        for key, words in _SETTINGS.items()
        if config.get(key) not in (None, 0, False) or (key == "seed" and key in config)
    ]
    if machine := environment.get("gpu") or environment.get("processor"):
        ranks = next((record["ranks"] for record in run.metrics if record.get("ranks")), 1)
        rows.append(("machine", _code(machine) + (f", {ranks} processes" if ranks > 1 else "")))
    versions = [
        f"{name} {environment[name]}" for name in ("igpt", "torch") if environment.get(name)
    ]
    return rows + ([("software", ", ".join(versions))] if versions else [])


_SETTINGS = {
    "batch_size": "batch size",
    "optimizer": "optimizer",
    "share_color_updates": "updates shared by near colours",
    "learning_rate": "learning rate",
    "schedule": "schedule",
    "warmup_steps": "warm-up steps",
    "betas": "betas",
    "weight_decay": "weight decay",
    "grad_clip": "gradient clipping",
    "generation_weight": "weight of the generative loss",
    "flip": "random horizontal flips",
    "shift": "random shifts, pixels",
    "precision": "precision",
    "seed": "seed",
}


def _commands(run: Run) -> list[str]:
    """Return the commands that prepared the tokens and trained the model, without folders."""
    from igpt.data.prepare import PrepareConfig
    from igpt.training.finetune import FinetuneConfig
    from igpt.training.pretrain import PretrainConfig

    found = []
    made = (run.manifest.get("made") or {}).get("config")
    if made and run.manifest.get("source"):
        words = ["igpt", "prepare", short_source(str(run.manifest["source"])), "-o", "TOKENS"]
        found.append(shlex.join([*words, *flags(PrepareConfig, _short(made))]))
    settings = FinetuneConfig if run.finetuned else PretrainConfig
    words = ["finetune", "MODEL", "TOKENS"] if run.finetuned else ["pretrain", "TOKENS"]
    left_out = {"model", "tokens", "log_every", *settings.changeable}

    def words_of(config: Mapping[str, Any]) -> list[str]:
        trained = {name: value for name, value in config.items() if name not in left_out}
        return flags(settings, _short(trained))

    config = dict(run.config)
    if start := config.get("from_model"):
        before = Path(start).parent / "config.yaml"
        if before.is_file():  # of the run that trained the model to start from
            first = words_of(read_settings(before))
            found.append(shlex.join(["igpt", *words, "-o", "START", *first]))
            config["from_model"] = "START"
    return [*found, shlex.join(["igpt", *words, "-o", "RUN", *words_of(config)])]


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the folders of paths."""
    return {
        name: short_source(value) if isinstance(value, str) else value
        for name, value in values.items()
    }


def _accuracies(run: Run) -> list[Table]:
    """Return a classifier's accuracy on the test images."""
    test = run.test
    if test is None:
        return []
    found = {"This classifier": (test["test_accuracy"], test.get("test_interval_95"))}
    if modal := test.get("modal"):
        words = f"Modal prediction over {modal['masks']} masks"
        found[words] = (modal["accuracy"], modal.get("interval_95"))
    if folded := test.get("fold_back"):
        before = folded["before"]
        words = "Before training on the validation images too"
        found[words] = (before["test_accuracy"], before.get("test_interval_95"))
    rows = [
        (words, percent(share), " to ".join(map(percent, interval or ())))
        for words, (share, interval) in found.items()
    ]
    caption = f"Test accuracy on {plural(test['test_images'], 'image')} (higher is better)"
    return [Table(caption, ("", "accuracy", "95 % interval"), rows)]


def _by_layer(probe: Mapping[str, Any]) -> Table:
    """Return the accuracy of the linear probe of every layer, and that by nearest neighbours."""
    nearest = best_row_by_neighbours(probe)

    def row(label: str, found: Mapping[str, Any]) -> tuple[str, ...]:
        accuracies = percent(found["validation_accuracy"]), percent(found["test_accuracy"])
        interval = " to ".join(map(percent, found.get("test_interval_95") or ()))
        return label, *accuracies, interval, *by_neighbours(found)

    def by_neighbours(found: Mapping[str, Any]) -> tuple[str, ...]:
        if nearest is None:
            return ()
        return (percent(found["knn"]["test_accuracy"]) if found.get("knn") else "",)

    rows = []
    for layer in probe["layers"]:
        best = " (best)" if layer["layer"] == probe["best_layer"] else ""
        rows.append(row(f"{layer['layer']}{best}", layer))
    if together := probe.get("concatenated"):
        rows.append(row(f"{', '.join(map(str, together['layers']))} concatenated", together))
    for few in probe.get("few_labels") or ():
        label = f"{few['layer']}, {plural(few['per_class'], 'label')} per class"
        spread = f"\N{PLUS-MINUS SIGN} {100 * few['standard_deviation']:.1f} (standard deviation)"
        rows.append((label, "", percent(few["mean"]), spread, *by_neighbours({})))
    caption = (
        "Accuracy of a linear probe of every layer (0: input of the first block; the last: final "
        "norm)"
    )
    head: tuple[str, ...] = ("layer", "validation", "test", "95 % interval")
    if nearest:
        head = (*head, f"test, {plural(nearest['knn']['k'], 'nearest neighbour')}")
    return Table(caption, head, rows)


def _scores(run: Run) -> list[dict[str, Any]]:
    """Return the results of `igpt score`, one for each set of images."""
    return [read_score(path) for path in score_files(run.path)]


def _score(run: Run, found: Mapping[str, Any]) -> str:
    """Return a result of `igpt score` as a sentence."""
    error = found.get("standard_error")
    spread = "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f} (standard error)"
    split = "" if found.get("split") == "all" else f"{found.get('split')} "
    source = _code(short_source(_score_source(run, found)))
    return (
        f"{plural(found['images'], f'{split}image')} of {source}: {found['nats_per_pixel']:.4f} "
        f"nats/pixel{spread}."
    )


def _pictures(run: Run) -> list[dict[str, str]]:
    """Return the run's existing pictures with their captions."""
    found = []
    for file in _PICTURES:
        path = run.path / file
        if not path.exists():
            continue
        how = read_sampling(path)
        settings = describe_sampling(how)
        caption = f"Unconditional samples of the model{settings}."
        if names := how.get("classes"):
            caption = f"Samples of the model for {listed(names, _MAX_CLASSES)}{settings}."
        if file.startswith("completions"):
            rows = ""
            if (kept := how.get("keep_rows")) is not None:
                rows = f" (the upper {kept} of {run.shape['resolution']} pixel rows)"
            caption = (
                f"Left to right: the original, the given pixels{rows}, and completions by the "
                f"model{settings}."
            )
        found.append({"file": file, "name": path.stem.capitalize(), "caption": caption})
    return found


def _code(value: Any) -> str:
    """Return a value as Markdown code, so that it is shown as it is."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _plain(text: str) -> str:
    """Escape text for Markdown."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))
