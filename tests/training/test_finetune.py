"""Fine-tuning on the command line: training, selection, resuming, and errors."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens.batches import Batches
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.labels import subset_per_class
from igpt.data.tokens.manifest import write_manifest, write_shard
from igpt.errors import InputError
from igpt.model.classifier import class_logits, predict
from igpt.model.config import ModelConfig
from igpt.model.objectives import sample_masks
from igpt.model.resolution import at_resolution
from igpt.model.transformer import ImageGPT
from igpt.statistics import interval_of_share, unpacked
from igpt.training.checkpoints import checkpoints
from igpt.training.finetune import FinetuneConfig, finetune
from igpt.training.metrics import read_metrics

from ..helpers.runs import assert_same_tensors, saved

FLAGS = [
    "--steps",
    120,
    "--batch-size",
    32,
    "--learning-rate",
    "3e-3",
    "--validate-every",
    40,
    "--precision",
    "fp32",
]


@pytest.fixture(scope="module")
def classifier(
    igpt, short_run: Path, digits: TokenDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("runs") / "classifier"
    done = igpt("finetune", short_run, digits.path, "-o", run, *FLAGS, "--checkpoint-every", 40)
    assert done.returncode == 0, done.stderr
    return run


def test_accuracy_is_above_chance_and_selected_on_validation(
    classifier: Path, digits: TokenDataset
) -> None:
    result = json.loads((classifier / "test.json").read_text())
    model = ImageGPT.from_pretrained(classifier / "model")
    assert model.config.class_names == tuple("0123456789")
    test = digits["test"]
    with torch.no_grad():
        tokens = torch.from_numpy(test.rows(np.arange(len(test))).astype(np.int64))
        predicted = (
            (list(model.features(tokens))[-1].mean(1) @ model.score.weight.t()).argmax(1).numpy()
        )
    assert result["test_accuracy"] == pytest.approx((predicted == test.labels).mean())
    assert (unpacked(result["test_right"], len(test)) == (predicted == test.labels)).all()
    pairs = zip(test.labels.tolist(), predicted.tolist(), strict=True)
    for (label, answer), count in Counter(pairs).items():
        assert result["confusion"][label][answer] == count
    assert np.sum(result["confusion"]) == len(test)
    assert result["test_accuracy"] > 0.3, "ten classes: chance is 0.1"
    errors = {
        line["step"]: line["error"]
        for line in read_metrics(classifier / "metrics.jsonl")
        if "error" in line
    }
    assert result["best_step"] == min(errors, key=lambda step: (errors[step], step))
    assert result["validation_accuracy"] == pytest.approx(1 - min(errors.values()))
    right = round(result["test_accuracy"] * len(test))
    assert result["test_interval_95"] == pytest.approx(interval_of_share(right, len(test)))
    assert result["epochs"] == result["best_step"] * 32 / len(digits["train"])
    assert (result["format"], result["version"], result["learning_rate"]) == (
        "igpt-finetune",
        1,
        3e-3,
    )
    assert len(result["rates"]) == 1
    assert result["environment"]["torch"] == torch.__version__
    assert "modal" not in result, "nothing was masked"


def test_resume_gives_the_same_classifier(
    igpt, classifier: Path, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["finetune", short_run, digits.path, "-o", run, *FLAGS, "--checkpoint-every", 40]
    assert igpt(*words).returncode == 0
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "state.json").unlink()
    done = igpt("finetune", short_run, digits.path, "-o", run, "--resume")
    assert done.returncode == 0, done.stderr
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (run, classifier)]
    assert weights[0] == weights[1]


def fresh_model(path: Path, digits: TokenDataset, **changes: object) -> Path:
    torch.manual_seed(0)
    shape = {"resolution": 8, "n_colors": 17, "n_layer": 1, "n_embd": 16, "n_head": 2, **changes}
    ImageGPT(ModelConfig.layered(shape), digits.palette).save_pretrained(path)
    return path


SIZES = {
    "batch_size": 8,
    "precision": "fp32",
    "validate_every": 3,
    "checkpoint_every": 3,
    "steps": 6,
    "log_every": 1,
}


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("bert", {}),
        ("bert", {"generation_weight": 0.0}),
        ("bert", {"mask_probability": 0.0}),
        ("autoregressive", {"generation_weight": 0.0}),
    ],
)
def test_all_losses_resume_bit_for_bit(
    objective: str, changes: dict[str, float], digits: TokenDataset, tmp_path: Path
) -> None:
    model = fresh_model(tmp_path / "model", digits, objective=objective)
    config = FinetuneConfig.layered({"model": model, "tokens": digits.path, **SIZES, **changes})
    finetune(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(checkpoints(tmp_path / "cut" / "checkpoints")[0])
    finetune(config, tmp_path / "cut", resume=True)
    weights = [
        (tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "cut")
    ]
    assert weights[0] == weights[1]
    newest = [checkpoints(tmp_path / run / "checkpoints")[0] for run in ("whole", "cut")]
    assert newest[0].name == newest[1].name == "step-00000006"
    assert_same_tensors(
        *(saved(path, tmp_path / f"{number}.pt") for number, path in enumerate(newest))
    )


def test_patience_stops_early(short_run: Path, digits: TokenDataset, tmp_path: Path) -> None:
    # The rate is zero in fp32: the head stays at zero, and any change of it, however small, would
    # be detected.
    settings = {
        "model": short_run / "model",
        "tokens": digits.path,
        "learning_rate": 1e-60,
        "validate_every": 2,
    }
    config = FinetuneConfig.layered(
        {**settings, "steps": 50, "patience": 2, "batch_size": 8, "precision": "fp32"},
        {"checkpoint_every": 4},
    )
    finetune(config, tmp_path / "run")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["kind"] == "end"
    assert last["step"] == 6, "the first validation is the best; two more follow"
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)  # as if it had been killed after the first of those two
    finetune(config, tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6
    finetune(config, tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6, (
        "it had stopped early; it stays stopped"
    )


def test_bert_trains_on_masked_images_and_is_evaluated_on_complete_ones(
    digits: TokenDataset, tmp_path: Path
) -> None:
    model = fresh_model(tmp_path / "model", digits, objective="bert")
    config = FinetuneConfig.layered(
        {"model": model, "tokens": digits.path, "learning_rate": 1e-2, **SIZES, "seed": 3}
    )
    result = finetune(config, tmp_path / "run")
    tuned = ImageGPT.from_pretrained(tmp_path / "run" / "model")
    untuned = ImageGPT.from_pretrained(model)
    assert not torch.equal(tuned.lm_head.weight, untuned.lm_head.weight), (
        "the masked positions are predicted as well"
    )
    recorded = FinetuneConfig.load(tmp_path / "run" / "config.yaml")
    assert recorded.mask_probability == 0.15
    splits = {
        name: (digits[name].rows(range(len(digits[name]))), digits[name].labels) for name in digits
    }
    for name, key in (("test", "test_accuracy"), ("validation", "validation_accuracy")):
        rows, labels = splits[name]
        whole = class_logits(tuned, torch.from_numpy(rows.astype(np.int64))).argmax(1).numpy()
        assert result[key] == pytest.approx((whole == labels).mean())
    rows, labels = splits["test"]
    masked = predict(tuned, rows, np.arange(len(rows)), masks=5, probability=0.15, seed=3).classes
    assert result["modal"]["accuracy"] == pytest.approx((masked == labels).mean())
    assert (result["modal"]["masks"], result["modal"]["images"]) == (5, len(labels))


def test_the_masks_of_a_step_depend_only_on_seed_and_step(
    digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective gets the masks that are sampled here, in the order of the batch's rows."""
    import igpt.training.finetune as module

    seen = []

    def spy(model, tokens, labels, mask=None, **options):
        seen.append(mask.clone())
        return classification(model, tokens, labels, mask, **options)

    classification = module.classification
    monkeypatch.setattr(module, "classification", spy)
    model = fresh_model(tmp_path / "model", digits, objective="bert")
    base = {
        "model": model,
        "tokens": digits.path,
        **SIZES,
        "steps": 2,
        "seed": 5,
        "mask_probability": 0.4,
    }
    finetune(FinetuneConfig.layered(base, {"micro_batch_size": 3}), tmp_path / "run")
    for step, masks in enumerate((torch.cat(seen[:3]), torch.cat(seen[3:]))):
        expected = sample_masks((8, 64), 0.4, np.random.default_rng((5, step, 2)))
        assert np.array_equal(masks.numpy(), expected), f"step {step}"


def test_every_setting_is_used_in_training(
    digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Augmentation, loss weights, learning rate and seed have the given values."""
    import igpt.training.finetune as module

    seen: list[Any] = []

    def spy(model, tokens, labels, mask=None, **options):
        seen.append((tokens.clone(), options))
        return classification(model, tokens, labels, mask, **options)

    classification = module.classification
    monkeypatch.setattr(module, "classification", spy)
    model = fresh_model(tmp_path / "model", digits, objective="autoregressive")
    settings = {
        "model": model,
        "tokens": digits.path,
        **SIZES,
        "steps": 4,
        "seed": 5,
        "flip": True,
        "shift": 2,
    }
    config = FinetuneConfig.layered(settings, {"generation_weight": 0.25, "log_every": 1})
    result = finetune(config, tmp_path / "run")
    batches = Batches(digits["train"], 8, 8, 5, flip=True, shift=2)
    for step, (tokens, options) in enumerate(seen):
        assert torch.equal(tokens, batches.tokens(step))
        assert options == {"generation_weight": 0.25}
    assert len(seen) == 4
    before, after = (
        ImageGPT.from_pretrained(path).state_dict() for path in (model, tmp_path / "run" / "model")
    )
    assert not [name for name, tensor in before.items() if torch.equal(tensor, after[name])], (
        "all weights are trained"
    )
    assert result["seed"] == 5
    rates = {
        line["learning_rate"]
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "learning_rate" in line
    }
    assert rates == {config.learning_rate}
    assert (config.schedule, FinetuneConfig.model_fields["patience"].default) == ("constant", 5)


def test_the_mode_is_over_masks_as_in_training(digits: TokenDataset, tmp_path: Path) -> None:
    model = fresh_model(tmp_path / "model", digits, objective="bert")
    base = {
        "model": model,
        "tokens": digits.path,
        **SIZES,
        "steps": 3,
        "seed": 5,
        "mask_probability": 0.4,
    }
    modal = finetune(FinetuneConfig.layered(base), tmp_path / "run")["modal"]
    assert (modal["probability"], modal["seed"]) == (0.4, 5)
    test = digits["test"]
    rows = np.arange(len(test))
    tuned = ImageGPT.from_pretrained(tmp_path / "run" / "model")
    found = predict(tuned, test.rows(rows), rows, masks=5, probability=0.4, seed=5)
    assert modal["accuracy"] == pytest.approx((found.classes == test.labels).mean())


def test_fold_back_only_repeats_a_constant_rate(digits: TokenDataset, tmp_path: Path) -> None:
    model = fresh_model(tmp_path / "model", digits, objective="autoregressive")
    config = FinetuneConfig(model=model, tokens=digits.path, fold_back=True, schedule="cosine")
    with pytest.raises(InputError, match="--fold-back repeats a constant rate"):
        finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [4, 12])
def test_interpolation_to_another_resolution_is_reported(
    igpt, short_run: Path, photographs: Path, tmp_path: Path, size: int
) -> None:
    pretrained = ImageGPT.from_pretrained(short_run / "model")
    data = prepare(
        str(photographs),
        tmp_path / "tokens",
        PrepareConfig(size=size, palette=str(short_run / "model")),
    )
    words = [
        "finetune",
        short_run,
        data.path,
        "-o",
        tmp_path / "run",
        "--steps",
        2,
        "--batch-size",
        8,
    ]
    # The rate is zero in fp32: the weights do not change.
    done = igpt(*words, "--learning-rate", "1e-60", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert f"position embeddings: interpolated from 8 to {size} px" in done.stdout
    start = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    result = json.loads((tmp_path / "run" / "test.json").read_text())
    for record in (start, result):
        assert (record["resolution"], record["pretrained_resolution"]) == (size, 8)
    tuned = ImageGPT.from_pretrained(tmp_path / "run" / "model")
    assert tuned.config.resolution == size
    for name, tensor in at_resolution(pretrained, size).state_dict().items():
        assert torch.equal(tuned.state_dict()[name], tensor), name


def test_nothing_is_reported_without_interpolation(
    igpt, classifier: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    done = igpt(
        "finetune", classifier, digits.path, "-o", tmp_path / "run", "--steps", 1, "--batch-size", 8
    )
    assert done.returncode == 0, done.stderr
    assert "interpolated" not in done.stdout


def labelled(folder: Path, digits: TokenDataset, **labels: list[int]) -> Path:
    """Write a data set of black images with these labels of its splits."""
    shards = {
        split: [
            write_shard(folder, split, np.zeros((len(of), 64), np.uint16), np.array(of, np.int32))
        ]
        for split, of in labels.items()
    }
    write_manifest(
        folder,
        resolution=8,
        palette=digits.palette,
        class_names=["a", "b", "c"],
        splits=shards,
        source="a test",
        made={},
    )
    return folder


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (([1, 1, 1], [1], [1]), "fine-tuning needs at least two classes among the training images"),
        (([0, 1], [1], [0]), "a training image of every class; there are 2 for 3"),
        (([0, 1, 0], [1, 2], [0]), "1 classes of the validation images have no training image"),
        (([0, 1, 0], [1], [2]), "1 classes of the test images have no training image"),
        (([0, 1, -1], [1], [0]), "1 of 3 images of 'train' have none"),
        (([0, 1, 2], [], [0]), "the split 'validation' is empty"),
    ],
)
def test_unsuitable_classes_are_refused(
    digits: TokenDataset, short_run: Path, tmp_path: Path, labels: tuple[list[int], ...], said: str
) -> None:
    (tmp_path / "tokens").mkdir()
    train, validation, test = labels
    tokens = labelled(tmp_path / "tokens", digits, train=train, validation=validation, test=test)
    with pytest.raises(InputError, match=said):
        finetune(FinetuneConfig(model=short_run / "model", tokens=tokens), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing starts before all settings were checked"


def test_inconsistent_settings_are_refused(
    short_run: Path, digits: TokenDataset, photographs: Path, tmp_path: Path
) -> None:
    plain = prepare(
        str(photographs), tmp_path / "plain", PrepareConfig(size=8, colors=17, label_column="none")
    )
    other = prepare(str(photographs), tmp_path / "other", PrepareConfig(size=8, colors=17))
    broken = ImageGPT.from_pretrained(short_run / "model")
    with torch.no_grad():
        broken.h[1].mlp.c_fc.weight[0, 3] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    base = {"model": short_run / "model", "tokens": digits.path}
    for changes, said in (
        ({"tokens": plain.path}, "has no classes"),
        ({"tokens": other.path}, "the palettes differ"),
        (
            {"model": tmp_path / "broken"},
            r"are broken: h\.1\.mlp\.c_fc\.weight is not finite \(1 such\)",
        ),
        ({"mask_probability": 0.15}, "--mask-probability is for BERT models"),
        ({"shift": 8}, "a shift of 8 does not fit"),
    ):
        with pytest.raises(InputError, match=said):
            finetune(FinetuneConfig.layered(base, changes), tmp_path / "run")
        assert not (tmp_path / "run").exists(), "nothing starts before all settings were checked"


def test_few_labels_and_few_validation_images(
    igpt, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    """The training images are the first subset of a probe with the same seed."""
    few = ["--labels-per-class", 2, "--validation-images", 30, "--test-images", 20, "--seed", 3]
    short = ["--steps", 4, "--batch-size", 8, "--validate-every", 2, "--precision", "fp32"]
    done = igpt("finetune", short_run, digits.path, "-o", tmp_path / "run", *few, *short)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "test.json").read_text())
    names = ("labels_per_class", "train_images", "validation_images", "test_images")
    assert [result[name] for name in names] == [
        2, 20, 30, 20
    ]  # fmt: skip
    assert result["epochs"] == result["best_step"] * 8 / 20
    labels = digits["train"].labels
    rows = subset_per_class(labels, 2, (3, 2, 0))
    assert np.bincount(labels[rows]).tolist() == [2] * 10
    assert (rows != subset_per_class(labels, 2, (3, 2, 1))).any()
    test = digits["test"].spread(20)
    model = ImageGPT.from_pretrained(tmp_path / "run" / "model")
    predicted = predict(model, test.rows(np.arange(20)), np.arange(20)).classes
    assert result["test_accuracy"] == pytest.approx((predicted == test.labels).mean())
    rows = np.arange(20) * len(digits["test"]) // 20
    assert (test.rows(np.arange(20)) == digits["test"].rows(rows)).all(), "evenly spread"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--labels-per-class", 1000],
            r"1000 labels a class are asked for, and one class has \d+ training images",
        ),
        (
            ["--labels-per-class", 2, "--fold-back"],
            "--fold-back would add all validation labels to --labels-per-class",
        ),
    ],
)
def test_impossible_few_labels_are_refused(
    igpt, short_run: Path, digits: TokenDataset, tmp_path: Path, words: list[Any], line: str
) -> None:
    done = igpt("finetune", short_run, digits.path, "-o", tmp_path / "run", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.search(line, done.stderr)
    assert not (tmp_path / "run" / "config.yaml").exists()
