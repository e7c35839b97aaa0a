"""Features, probes and likelihoods of a small trained model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens import TokenDataset, TokenSplit
from igpt.errors import InputError
from igpt.evaluation.features import extract, require_match
from igpt.evaluation.likelihood import score, summary
from igpt.evaluation.probe import fit_linear, probe
from igpt.model.transformer import ImageGPT, ModelConfig


@pytest.fixture(scope="module")
def model(short_run: Path) -> ImageGPT:
    return ImageGPT.from_pretrained(short_run / "model")


def test_features_are_the_mean_over_places_of_every_layer(model: ImageGPT, digits: TokenDataset) -> None:
    split = digits["test"]
    found = extract(model, split, batch_size=7)
    assert found.shape == (3, 180, 32)
    tokens = torch.from_numpy(split.rows([4, 100]).astype(np.int64))
    for layer, activations in enumerate(model.features(tokens)):
        np.testing.assert_allclose(found[layer, [4, 100]], activations.mean(1).detach(), atol=1e-5)


def test_linear_fit_is_scikit_learns_and_chosen_on_validation() -> None:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(4, 10))
    labels = {split: generator.integers(0, 4, 300).astype(np.int32) for split in ("train", "validation", "test")}
    features = {
        split: (centers[rows] + generator.normal(size=(300, 10)) * 1.5).astype(np.float32)
        for split, rows in labels.items()
    }
    found = fit_linear(features, labels)
    scaler = StandardScaler().fit(features["train"])
    rivals = {}
    for strength in (0.001, 0.01, 0.1, 1.0):
        rival = LogisticRegression(C=strength, max_iter=2000).fit(scaler.transform(features["train"]), labels["train"])
        rivals[strength] = [
            rival.score(scaler.transform(features[split]), labels[split]) for split in ("validation", "test")
        ]
    best = max(rivals, key=lambda strength: rivals[strength][0])
    assert found["converged"]
    assert found["regularisation"] == best
    assert found["validation_accuracy"] == pytest.approx(rivals[best][0], abs=0.011)
    assert found["test_accuracy"] == pytest.approx(rivals[best][1], abs=0.011)


def test_too_few_iterations_are_reported() -> None:
    generator = np.random.default_rng(0)
    features = {split: generator.normal(size=(200, 20)).astype(np.float32) for split in ("train", "validation", "test")}
    labels = {split: generator.integers(0, 5, 200).astype(np.int32) for split in features}
    assert fit_linear(features, labels, max_iter=1)["converged"] is False


def test_probe_command_writes_every_layer(igpt, short_run: Path, digits: TokenDataset, tmp_path: Path) -> None:
    done = igpt("probe", short_run, digits.path, "-o", tmp_path / "probe.json", "--limit", 150)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "probe.json").read_text())
    assert [row["layer"] for row in result["layers"]] == [0, 1, 2]
    best = max(row["validation_accuracy"] for row in result["layers"])
    assert result["layers"][result["best_layer"]]["validation_accuracy"] == best
    assert result["images"] == {"train": 150, "validation": 150, "test": 150}
    assert result["layers"][1]["test_accuracy"] > 0.3, "ten classes: chance is 0.1"
    assert result["baselines"]["raw_pixels"]["test_accuracy"] > 0.7
    assert len(result["baselines"]["untrained"]["layers"]) == 3
    again = igpt("probe", short_run, digits.path, "-o", tmp_path / "again.json", "--limit", 150)
    assert again.returncode == 0
    other = json.loads((tmp_path / "again.json").read_text())
    assert (other["layers"], other["baselines"]) == (result["layers"], result["baselines"])


def test_probe_refuses_what_it_cannot_measure(model: ImageGPT, digits: TokenDataset, photographs: Path) -> None:
    folder = photographs.parent
    plain = prepare(str(photographs), folder / "plain", PrepareConfig(size=8, colors=17, label_column="none"))
    with pytest.raises(InputError, match="the palettes differ: the model has"):
        probe(model, plain)
    wide = prepare(str(photographs), folder / "wide", PrepareConfig(size=16, colors=17))
    with pytest.raises(InputError, match=r"the model sees 8 px, .* has 16 px"):
        probe(model, wide)
    fitting = ImageGPT(ModelConfig.layered({"resolution": 8, "n_colors": 17, "n_layer": 1, "n_embd": 8, "n_head": 1}))
    fitting.palette = plain.palette
    with pytest.raises(InputError, match="a probe needs labels, and 38 of 38 images of 'train' have none"):
        probe(fitting, plain)
    with pytest.raises(InputError, match="no palette"):
        require_match(ImageGPT(fitting.config), plain)
    with pytest.raises(InputError, match="at least two classes"):
        fit_linear({"train": np.ones((3, 2), np.float32)}, {"train": np.zeros(3, np.int32)})
    with pytest.raises(InputError, match="not finite"):
        fit_linear({"train": np.full((3, 2), np.nan, np.float32)}, {"train": np.arange(3, dtype=np.int32)})


def test_likelihood_is_that_of_the_model(model: ImageGPT, digits: TokenDataset, tmp_path: Path, igpt) -> None:
    split = digits["test"]
    losses = score(model, split, batch_size=50)
    tokens = torch.from_numpy(split.rows([3]).astype(np.int64))
    log_probability = model(tokens).double().log_softmax(-1).gather(-1, tokens[..., None])
    assert losses[3] == pytest.approx(-float(log_probability.detach().mean()), abs=1e-5)
    inverted = TokenSplit("test", [(16 - split.rows(np.arange(180))).astype(np.uint16)], [split.labels])
    assert score(model, inverted).mean() > losses.mean() + 0.3, "inverted digits are far less likely"
    done = igpt("score", model_path(model, tmp_path), digits.path, "-o", tmp_path / "scores.csv")
    assert done.returncode == 0, done.stderr
    assert f"{losses.mean():.4f} nats/pixel" in done.stdout
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "image,nats_per_pixel"
    assert [float(line.split(",")[1]) for line in lines[1:]] == pytest.approx(losses.tolist(), abs=1e-5)


def model_path(model: ImageGPT, folder: Path) -> Path:
    model.save_pretrained(folder / "model")
    return folder / "model"


def test_summary_of_likelihoods() -> None:
    found = summary(np.array([1.0, 2.0, 3.0]))
    assert found["nats_per_pixel"] == 2.0
    assert found["standard_error"] == pytest.approx(1 / np.sqrt(3))
    assert found["bits_per_pixel"] == pytest.approx(2 / np.log(2))


def test_bert_has_no_likelihood(digits: TokenDataset) -> None:
    shape = {"resolution": 8, "n_colors": 17, "n_layer": 1, "n_embd": 8, "n_head": 1, "objective": "bert"}
    with pytest.raises(InputError, match="a likelihood needs a model trained as 'autoregressive'"):
        score(ImageGPT(ModelConfig.layered(shape)), digits["test"])
