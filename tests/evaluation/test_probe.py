"""Linear probes of a small trained model: every protocol, selected on validation images, reported
with its uncertainty."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.labels import subset_per_class
from igpt.data.tokens.manifest import SPLITS
from igpt.errors import InputError
from igpt.evaluation.features import pooled
from igpt.evaluation.probe import (
    Images,
    ProbeConfig,
    few_labels,
    fit_and_test,
    subset_images,
    write_probe,
)
from igpt.evaluation.probe import probe as probe_and_classifier
from igpt.evaluation.probe_classifier import ProbeClassifier
from igpt.evaluation.results import best_row, read_probe
from igpt.model.config import ModelConfig
from igpt.model.objectives import pixel_losses
from igpt.model.precision import multiplies_bf16
from igpt.model.transformer import ImageGPT
from igpt.statistics import interval_of_share, unpacked

SHAPE = {"resolution": 8, "n_colors": 17, "n_layer": 2, "n_embd": 32, "n_head": 2}
FEW = {"limit": 150, "baselines": False}


def probe(
    model: ImageGPT, data: TokenDataset, config: ProbeConfig, features: Path
) -> dict[str, Any]:
    """Return the contents of probe.json."""
    return probe_and_classifier(model, data, config, features)[0]


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_scikit_learn() -> Iterator[None]:
    """For problems of this size more threads wait for each other, for minutes if other processes
    use the cores."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def model(short_run: Path) -> ImageGPT:
    return ImageGPT.from_pretrained(short_run / "model")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return features that several tests use."""
    return tmp_path_factory.mktemp("features")


def test_every_step_equals_scikit_learns(model: ImageGPT, digits: TokenDataset, kept: Path) -> None:
    """Fitted on training images, selected by validation, fitted again on both, and tested, layer by
    layer."""
    config = ProbeConfig(baselines=False, strengths=(0.001, 0.1, 1.0))
    result = probe(model, digits, config, kept)
    features = {name: np.concatenate(list(pooled(model, digits[name])), axis=1) for name in digits}
    labels = {name: digits[name].labels for name in digits}
    for row in result["layers"]:
        x = {name: array[row["layer"]] for name, array in features.items()}
        scaler = StandardScaler().fit(x["train"])
        rivals = {
            strength: LogisticRegression(C=strength, tol=1e-6, max_iter=20_000)
            .fit(scaler.transform(x["train"]), labels["train"])
            .score(scaler.transform(x["validation"]), labels["validation"])
            for strength in config.strengths
        }
        assert row["converged"]
        assert row["validation_accuracy"] == pytest.approx(rivals[row["regularisation"]], abs=0.006)
        assert row["validation_accuracy"] >= max(rivals.values()) - 0.006, "one image of 180"
        both = np.concatenate([x["train"], x["validation"]])
        scaler = StandardScaler().fit(both)
        final = LogisticRegression(C=row["regularisation"], tol=1e-6, max_iter=20_000)
        final.fit(scaler.transform(both), np.concatenate([labels["train"], labels["validation"]]))
        assert row["test_accuracy"] == pytest.approx(
            final.score(scaler.transform(x["test"]), labels["test"]), abs=0.006
        )
        right = round(row["test_accuracy"] * 180)
        assert row["test_interval_95"] == list(interval_of_share(right, 180))
    assert result["layers"][1]["test_accuracy"] > 0.5, "ten classes: chance is 0.1"


def test_the_tested_classifier_is_saved(
    model: ImageGPT, digits: TokenDataset, kept: Path, tmp_path: Path
) -> None:
    path = tmp_path / "probe.safetensors"
    result, fitted = probe_and_classifier(
        model, digits, ProbeConfig(baselines=False, strengths=(0.1,)), kept
    )
    write_probe(tmp_path / "probe.json", result, fitted)
    assert {**result, "classifier": fitted.fingerprint} == read_probe(tmp_path / "probe.json")
    readout = ProbeClassifier.load(path)
    assert readout.fingerprint == fitted.fingerprint
    assert readout.layer == result["best_layer"]
    assert readout.class_names == tuple(digits.class_names or ())
    tokens = torch.from_numpy(digits["test"].rows(range(180)).astype(np.int64))
    found = readout.probabilities(model, tokens)
    torch.testing.assert_close(found.sum(1), torch.ones(180))
    share = float((found.argmax(1).numpy() == digits["test"].labels).mean())
    assert share == pytest.approx(best_row(result)["test_accuracy"], abs=1e-9)
    with pytest.raises(InputError, match="probe of the run belongs to another model"):
        readout.probabilities(ImageGPT(ModelConfig.layered({**SHAPE, "n_embd": 16})), tokens)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        ProbeClassifier.load(path)


def test_without_fold_back_validation_images_only_select(
    model: ImageGPT, digits: TokenDataset, kept: Path
) -> None:
    config = ProbeConfig(baselines=False, strengths=(1.0,), fold_back=False, layers=(1,))
    (row,) = probe(model, digits, config, kept)["layers"]
    features = {
        name: np.concatenate(list(pooled(model, digits[name])), axis=1)[1]
        for name in ("train", "test")
    }
    scaler = StandardScaler().fit(features["train"])
    rival = LogisticRegression(C=1.0, tol=1e-6, max_iter=20_000)
    rival.fit(scaler.transform(features["train"]), digits["train"].labels)
    expected = rival.score(scaler.transform(features["test"]), digits["test"].labels)
    assert row["test_accuracy"] == pytest.approx(expected, abs=0.006)
    assert row["layer"] == 1


def test_the_command_writes_every_protocol(
    igpt: Any, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    words = [
        "--limit",
        150,
        "--concatenate",
        1,
        2,
        "--labels-per-class",
        2,
        8,
        "--features",
        tmp_path / "features",
    ]
    done = igpt("probe", short_run, digits.path, "-o", tmp_path / "probe.json", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "probe.json").read_text())
    assert (result["format"], result["version"]) == ("igpt-probe", 2)
    assert [row["layer"] for row in result["layers"]] == [0, 1, 2]
    best = max(row["validation_accuracy"] for row in result["layers"])
    assert result["layers"][result["best_layer"]]["validation_accuracy"] == best
    assert result["images"] == {"train": 150, "validation": 150, "test": 150}
    assert np.sum(result["confusion"]) == 150
    right = np.trace(result["confusion"]) / 150
    assert right == result["layers"][result["best_layer"]]["test_accuracy"]
    assert result["layers"][1]["test_accuracy"] > 0.3, "ten classes: chance is 0.1"
    assert result["baselines"]["raw_pixels"]["test_accuracy"] > 0.7
    assert len(result["baselines"]["untrained"]["layers"]) == 3
    assert result["concatenated"]["layers"] == [1, 2]
    assert [few["per_class"] for few in result["few_labels"]] == [2, 8]
    assert result["environment"].keys() >= {"command", "igpt", "torch", "commit", "processor"}
    assert "labels per class: test" in done.stdout
    assert "layers 1 2" in done.stdout
    again = igpt("probe", short_run, digits.path, "-o", tmp_path / "again.json", *words[:-2])
    assert again.returncode == 0
    other = json.loads((tmp_path / "again.json").read_text())
    assert {**other, "environment": 0} == {**result, "environment": 0}, "to the last digit"
    assert not list(tmp_path.glob(".*")), "temporary files were removed"


def test_few_labels_are_seeded_subsets_of_equal_size(
    model: ImageGPT, digits: TokenDataset, kept: Path
) -> None:
    config = ProbeConfig(baselines=False, labels_per_class=(1, 10, 60), subsets=4)
    result = probe(model, digits, config, kept)
    few = result["few_labels"]
    for row in few:
        assert row["layer"] == result["best_layer"]
        assert row["converged"]
        assert len(set(row["test_accuracies"])) > 1, "other subsets, other accuracies"
        assert row["mean"] == pytest.approx(np.mean(row["test_accuracies"]))
        assert row["standard_deviation"] == pytest.approx(np.std(row["test_accuracies"], ddof=1))
    assert few[0]["mean"] < few[1]["mean"] < few[2]["mean"], "more labels are better"
    assert few[2]["mean"] < result["layers"][result["best_layer"]]["test_accuracy"] + 0.05
    other = probe(
        model, digits, config.model_copy(update={"seed": 7}), kept.parent / f"{kept.name}-7"
    )["few_labels"]
    assert other[0]["test_accuracies"] != few[0]["test_accuracies"]
    with pytest.raises(
        InputError,
        match=r"1000 labels a class are asked for, and one class has \d+ training images",
    ):
        probe(model, digits, config.model_copy(update={"labels_per_class": (1000,)}), kept)


def test_raw_pixels_are_also_probed_with_few_labels(
    model: ImageGPT, digits: TokenDataset, kept: Path
) -> None:
    config = ProbeConfig(labels_per_class=(5,), subsets=2, strengths=(0.1,), layers=(0,))
    row = probe(model, digits, config, kept)["baselines"]["raw_pixels"]["few_labels"][0]
    pixels = {
        name: digits.palette.centers_[digits[name].rows(np.arange(len(digits[name])))]
        for name in SPLITS
    }
    for subset, accuracy in enumerate(row["test_accuracies"]):
        rows = subset_per_class(digits["train"].labels, 5, (0, 5, subset))
        scaler = StandardScaler().fit(pixels["train"][rows].reshape(50, -1))
        train, test = (
            scaler.transform(x.reshape(len(x), -1)) for x in (pixels["train"][rows], pixels["test"])
        )
        rival = LogisticRegression(C=0.1, tol=1e-6, max_iter=20_000).fit(
            train, digits["train"].labels[rows]
        )
        assert accuracy == pytest.approx(rival.score(test, digits["test"].labels), abs=0.012)


def test_more_test_images_than_others(model: ImageGPT, digits: TokenDataset, kept: Path) -> None:
    """They are processed like all others, and each prediction is kept."""
    config = ProbeConfig(
        baselines=False, strengths=(0.1,), layers=(1,), fold_back=False, limit=60, test_images=150
    )
    result = probe(model, digits, config, kept.parent / f"{kept.name}-more")
    assert result["images"] == {"train": 60, "validation": 60, "test": 150}
    rows = {
        name: np.sort(np.random.default_rng(0).permutation(len(digits[name]))[:60])
        for name in ("train",)
    }
    rows["test"] = np.sort(np.random.default_rng(0).permutation(len(digits["test"]))[:150])
    x = {
        name: np.concatenate([batch[1] for batch in pooled(model, digits[name])])[rows[name]]
        for name in rows
    }
    scaler = StandardScaler().fit(x["train"])
    rival = LogisticRegression(C=0.1, tol=1e-6, max_iter=20_000)
    rival.fit(scaler.transform(x["train"]), digits["train"].labels[rows["train"]])
    answers = rival.predict(scaler.transform(x["test"])) == digits["test"].labels[rows["test"]]
    found = unpacked(result["layers"][0]["test_right"], 150)
    assert found.mean() == result["layers"][0]["test_accuracy"]
    assert (found == answers).mean() > 0.99


def test_concatenated_layers_are_one_feature(
    model: ImageGPT, digits: TokenDataset, kept: Path
) -> None:
    config = ProbeConfig(
        baselines=False, strengths=(0.1,), concatenate=(0, 2), fold_back=False, layers=(0,)
    )
    row = probe(model, digits, config, kept)["concatenated"]
    features = {
        name: np.concatenate(list(pooled(model, digits[name])), axis=1)
        for name in ("train", "test")
    }
    x = {name: np.concatenate([array[0], array[2]], axis=1) for name, array in features.items()}
    scaler = StandardScaler().fit(x["train"])
    rival = LogisticRegression(C=0.1, tol=1e-6, max_iter=20_000).fit(
        scaler.transform(x["train"]), digits["train"].labels
    )
    expected = rival.score(scaler.transform(x["test"]), digits["test"].labels)
    assert row["test_accuracy"] == pytest.approx(expected, abs=0.006)


def test_sgd_selects_a_learning_rate(model: ImageGPT, digits: TokenDataset, kept: Path) -> None:
    config = ProbeConfig(baselines=False, solver="sgd", steps=400, batch_size=32, layers=(1,))
    config = config.model_copy(
        update={"learning_rates": (1e30, 10.0, 1e-6)}
    )  # the first one diverges
    (row,) = probe(model, digits, config, kept)["layers"]
    assert row["learning_rate"] == 10.0
    assert row["iterations"] == 400
    assert row["converged"] is False
    (optimum,) = probe(model, digits, ProbeConfig(baselines=False, layers=(1,)), kept)["layers"]
    assert row["test_accuracy"] > optimum["test_accuracy"] - 0.15


def test_bert_is_probed_unmasked_or_by_the_mode_over_masks(
    digits: TokenDataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    bert = ImageGPT(ModelConfig.layered(SHAPE, {"objective": "bert"}), digits.palette)
    plain = probe(bert, digits, ProbeConfig(**FEW), tmp_path)
    masked = probe(bert, digits, ProbeConfig(**FEW, masks=3), tmp_path)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "test", "test-mask-0", "test-mask-1", "test-mask-2", "train", "train-mask-0",
        "validation", "validation-mask-0", "validation-mask-1", "validation-mask-2",
    ]  # fmt: skip
    assert plain["layers"] != masked["layers"]
    row = masked["layers"][1]
    features = {
        path.name: np.load(path / "layer-001.npy")
        for path in (tmp_path / "model").iterdir()
        if "mask" in path.name
    }
    sampled = {
        name: np.sort(np.random.default_rng(0).permutation(len(digits[name]))[:150])
        for name in digits
    }
    labels = {name: digits[name].labels_of(rows) for name, rows in sampled.items()}
    both = np.concatenate([features["train-mask-0"], features["validation-mask-0"]])
    scaler = StandardScaler().fit(both)
    rival = LogisticRegression(C=row["regularisation"], tol=1e-6, max_iter=20_000)
    rival.fit(scaler.transform(both), np.concatenate([labels["train"], labels["validation"]]))
    votes = [rival.predict(scaler.transform(features[f"test-mask-{draw}"])) for draw in range(3)]
    counts = np.stack([(np.stack(votes) == number).sum(0) for number in range(10)], axis=1)
    sure = counts.max(1) >= 2  # if all three differ, the seed decides
    share = (counts.argmax(1) == labels["test"])[sure].sum() / 150
    assert share - 0.02 <= row["test_accuracy"] <= share + (~sure).mean() + 0.02


def changed(digits: TokenDataset, **labels: Any) -> TokenDataset:
    """Return the digits with other labels in some splits."""
    data = TokenDataset(digits.path)
    splits = {
        name: TokenSplit(
            name,
            [digits[name].rows(np.arange(len(digits[name])))],
            [labels.get(name, digits[name].labels)],
        )
        for name in digits
    }
    data.__class__ = type(
        "Changed", (TokenDataset,), {"__getitem__": lambda self, name: splits[name]}
    )
    return data


def test_data_sets_that_cannot_be_probed_are_refused(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    train = digits["train"].labels
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (
            {},
            {"train": np.full_like(train, -1)},
            "a probe needs labels, and 1437 of 1437 images of 'train' have none",
        ),
        (
            {},
            {"train": np.zeros_like(train)},
            "a probe needs at least two classes among the training images",
        ),
        (
            {},
            {"train": np.minimum(train, 7)},
            "2 classes of the validation images have no training image",
        ),
        (
            {"limit": 2},
            {},
            "of the (validation|test) images have no training image|every class; there are 2 for "
            "10",
        ),
        ({"layers": (3,)}, {}, "there is no layer 3; the layers are 0 to 2, and layer 2 is"),
        ({"concatenate": (0, -1)}, {}, "there is no layer -1"),
        ({"concatenate": (1,)}, {}, "--concatenate needs at least two"),
        ({"masks": 2}, {}, "masking at test time needs a model trained as 'bert'"),
    ]
    for settings, labels, message in refused:
        with pytest.raises(InputError, match=message):
            probe(
                model,
                changed(digits, **labels),
                ProbeConfig.layered(settings),
                tmp_path / "features",
            )
        assert not (tmp_path / "features").exists(), "nothing was started"
    broken = ImageGPT(model.config, model.palette)
    torch.nn.init.constant_(broken.wpe.weight, torch.nan)
    with pytest.raises(InputError, match="features of the training images are not finite"):
        probe(broken, digits, ProbeConfig(**FEW), tmp_path / "features")


def test_fewer_images_than_classes(model: ImageGPT, digits: TokenDataset, tmp_path: Path) -> None:
    few = changed(digits, **{name: digits[name].labels % 2 for name in digits})
    with pytest.raises(InputError, match="a training image of every class; there are 9 for 10"):
        probe(model, few, ProbeConfig(limit=9), tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", 9], "there is no layer 9"),
        (["--strengths", 0], "strengths"),
        (["--subsets", 1], "subsets"),
        (["--limit", 0], "limit"),
        (["--solver", "newton"], "solver"),
    ],
)
def test_the_command_refuses_in_one_line(
    igpt: Any,
    short_run: Path,
    digits: TokenDataset,
    tmp_path: Path,
    words: list[object],
    message: str,
) -> None:
    done = igpt("probe", short_run, digits.path, "-o", tmp_path / "probe.json", *words)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert message in done.stderr
    assert not (tmp_path / "probe.json").exists()


def test_folders_of_images_are_refused(igpt: Any, photographs: Path, tmp_path: Path) -> None:
    plain = prepare(
        str(photographs), tmp_path / "plain", PrepareConfig(size=8, colors=17, label_column="none")
    )
    fitting = ImageGPT(ModelConfig.layered(SHAPE), plain.palette)
    fitting.save_pretrained(tmp_path / "model")
    done = igpt("probe", tmp_path / "model", plain.path, "-o", tmp_path / "probe.json")
    assert done.returncode == 2
    assert "a probe needs labels, and 38 of 38 images of 'train' have none" in done.stderr


def test_kept_features_serve_other_settings_and_seeds(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    first = probe(model, digits, ProbeConfig(strengths=(1.0,)), tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again = probe(model, digits, ProbeConfig(strengths=(1.0,), seed=5), tmp_path)
    assert again["layers"] == first["layers"], "nothing is computed again"
    assert again["baselines"]["untrained"] != first["baselines"]["untrained"], "another model"
    assert {path: path.stat().st_mtime_ns for path in made} == made
    with pytest.raises(InputError, match="holds features of another model or of other images"):
        probe(model, digits, ProbeConfig(limit=150), tmp_path)


def test_automatic_precision_is_recorded_as_what_it_is(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    config = ProbeConfig(strengths=(1.0,), limit=100, baselines=False, precision="auto")
    found = probe(model, digits, config, tmp_path)
    expected = "bf16" if multiplies_bf16("cpu") else "fp32"
    assert found["config"]["precision"] == expected
    kept = [json.loads(path.read_text())["precision"] for path in tmp_path.rglob("*.json")]
    assert set(kept) == {expected}


def test_the_test_images_do_not_influence_any_selection(
    model: ImageGPT, digits: TokenDataset, kept: Path
) -> None:
    """With shuffled test labels, all selections stay the same, and so do the accuracies on
    validation images."""
    config = ProbeConfig(baselines=False, labels_per_class=(3,), strengths=(1e-5, 1e-2, 10.0))
    permuted = np.random.default_rng(0).permutation(digits["test"].labels)
    true, shuffled = (
        probe(model, data, config, kept) for data in (digits, changed(digits, test=permuted))
    )
    for key in ("validation_accuracy", "regularisation", "converged", "iterations"):
        assert [row[key] for row in true["layers"]] == [row[key] for row in shuffled["layers"]]
    assert true["best_layer"] == shuffled["best_layer"]
    assert true["few_labels"][0]["regularisation"] == shuffled["few_labels"][0]["regularisation"]
    assert max(row["test_accuracy"] for row in shuffled["layers"]) < 0.25, (
        "otherwise nothing was shuffled"
    )


def test_the_best_on_validation_images_is_not_the_best_on_test_images() -> None:
    """Two features: strong regularization uses only the first, and weak regularization also the
    second."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 400)
    sign = 2.0 * labels - 1
    strong = 0.5 * sign + generator.normal(size=400)
    weak = 0.05 * sign + 0.001 * generator.normal(size=400)
    rows = np.arange(400)
    train = np.stack([strong, strong + weak], axis=1).astype(np.float32)
    good = np.stack([strong, strong + weak], axis=1).astype(np.float32)
    bad = np.stack([strong, strong - weak], axis=1).astype(
        np.float32
    )  # the second feature misleads
    for validation, test, expected in ((good, bad, 1e4), (bad, good, 1e-4)):
        found = {"train": train, "validation": validation, "test": test}
        images = {name: Images([[features]], labels, rows) for name, features in found.items()}
        config = ProbeConfig(strengths=(1e-4, 1e4), fold_back=False)
        row, _ = fit_and_test(images, config=config, device=torch.device("cpu"))
        assert row["regularisation"] == expected
        few = few_labels(images, 100, config, torch.device("cpu"))
        assert few["regularisation"] == expected


def test_folders_with_other_files_and_damaged_features_are_refused(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    config = ProbeConfig(**FEW, layers=(1,))
    theirs = tmp_path / "code" / "model" / "train" / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(InputError, match="holds something else than features"):
        probe(model, digits, config, tmp_path / "code")
    assert theirs.read_text() == "mine"
    model.save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(InputError, match="is a run; name a folder of its own"):
        probe(model, digits, config, tmp_path / "run")
    probe(model, digits, config, tmp_path / "kept")
    file = tmp_path / "kept" / "model" / "test" / "layer-001.npy"
    whole = file.read_bytes()
    for damage in (whole[:100], whole[:3000], None):
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(
            InputError, match=r"layer-001\.npy is missing, cut off or damaged .*; remove"
        ):
            probe(model, digits, config, tmp_path / "kept")


def test_features_of_test_images_that_are_not_finite_are_refused(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    config = ProbeConfig(**FEW, layers=(1,))
    probe(model, digits, config, tmp_path)
    file = tmp_path / "model" / "test" / "layer-001.npy"
    features = np.load(file)
    features[7, 3] = np.nan
    np.save(file, features)
    with pytest.raises(InputError, match="features are not finite"):
        probe(model, digits, config, tmp_path)


def test_classification_by_the_likelihood_given_each_class(
    igpt, digits: TokenDataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    names = tuple(reversed("0123456789"))  # another order than the data's
    conditional = ImageGPT(ModelConfig.layered(SHAPE, {"conditions": names}), digits.palette)
    for parameter in conditional.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    conditional.save_pretrained(tmp_path / "model")
    words = ("--limit", 60, "--no-baselines", "--layers", 1, "--by-likelihood")
    done = igpt("probe", tmp_path / "model", digits.path, "-o", tmp_path / "p.json", *words)
    assert done.returncode == 0, done.stderr
    found = read_probe(tmp_path / "p.json")["by_likelihood"]
    split, _ = subset_images(digits["test"], 60, 0)
    tokens = torch.from_numpy(split.rows(range(60)).astype(np.int64))
    losses = []
    for name in "0123456789":
        given = torch.full((60,), names.index(name))
        with torch.no_grad():
            logits = conditional.eval()(tokens, labels=given)
        losses.append(pixel_losses(logits, tokens).sum(1).numpy())
    right = np.argmin(losses, axis=0) == split.labels
    assert 0 < right.sum() < 60
    assert found["test_accuracy"] == right.mean()
    assert (unpacked(found["test_right"], 60) == right).all()
    said = f"likelihood given each class: test accuracy {right.mean():.1%} (95 % interval "
    assert done.stdout.splitlines()[-1].startswith(said)


def test_classification_by_likelihood_needs_the_classes(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    config = ProbeConfig.layered({**FEW, "by_likelihood": True})
    with pytest.raises(InputError, match="the model has no classes; `igpt pretrain --condition"):
        probe(model, digits, config, tmp_path / "features")
    other = ImageGPT(ModelConfig.layered(SHAPE, {"conditions": ("0", "1")}), digits.palette)
    with pytest.raises(InputError, match="the model has no class '2'"):
        probe(other, digits, config, tmp_path / "features")
    assert not (tmp_path / "features").exists()
