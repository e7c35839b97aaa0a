"""The commands as Python functions: they do what the commands do, and take images in memory."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import igpt
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.evaluation.results import read_probe
from igpt.model.directory import weights_sha256
from igpt.training.finetune import FinetuneConfig
from igpt.training.finetune import finetune as train_classifier


def checksum(model: igpt.ImageGPT) -> str:
    return weights_sha256(model.state_dict())


@pytest.fixture(scope="module")
def model(short_run: Path) -> igpt.ImageGPT:
    return igpt.ImageGPT.from_pretrained(short_run)


def test_the_public_names_are_listed_and_described() -> None:
    assert dir(igpt) == sorted(igpt.__all__)
    for name in set(igpt.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(igpt, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        igpt.pretrian  # noqa: B018


def test_tokens_are_prepared_with_keywords(digits: TokenDataset, tmp_path: Path) -> None:
    data = igpt.prepare("digits", tmp_path / "digits", size=8, workers=1)
    assert data.manifest["splits"] == digits.manifest["splits"]


def test_pretraining_gives_the_weights_of_the_command(
    digits: TokenDataset, short: dict[str, object], short_run: Path, tmp_path: Path
) -> None:
    run = igpt.pretrain(digits, tmp_path / "run", model="tiny", **short)
    assert checksum(run.model) == checksum(igpt.ImageGPT.from_pretrained(short_run / "model"))
    losses = [line["loss"] for line in run.metrics if line["kind"] == "validation"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match="exists already"):
        igpt.pretrain(digits, run, model="tiny", **short)
    assert igpt.pretrain(digits, run, resume=True).metrics[-1]["kind"] == "end"


def test_a_run_is_fine_tuned_and_tested(
    digits: TokenDataset, short: dict[str, object], short_run: Path, tmp_path: Path
) -> None:
    wanted = {"steps": 2, "batch_size": 8, "precision": "fp32", "test_images": 20}
    run = igpt.finetune(short_run, digits, tmp_path / "classes", **wanted)
    assert run.test["test_images"] == 20
    assert run.model.config.class_names == tuple(digits.class_names or ())
    # The settings take a run as well as its model directory.
    config = FinetuneConfig(model=short_run, tokens=digits.path, **wanted)
    train_classifier(config, tmp_path / "again")
    assert checksum(igpt.Run(tmp_path / "again").model) == checksum(run.model)


def test_a_probe_is_written_into_a_run_only(
    digits: TokenDataset, short_run: Path, model: igpt.ImageGPT, tmp_path: Path
) -> None:
    settings = {"limit": 60, "layers": (1,), "baselines": False, "strengths": (0.1,)}
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(short_run / "model")
    found = igpt.probe(run, digits, **settings)
    written = read_probe(run / "probe.json")
    assert written | found == written
    assert (run / "probe.safetensors").exists()
    before = set(Path().iterdir())
    assert igpt.probe(model, digits, **settings)["layers"] == found["layers"]
    assert set(Path().iterdir()) == before


def test_scores_of_images_are_those_of_their_tokens(
    digits: TokenDataset, model: igpt.ImageGPT, short_run: Path
) -> None:
    whole = igpt.score(short_run, digits, split="validation")
    assert whole.shape == (180,)
    rows = digits["validation"].rows(range(3)).reshape(-1, 8, 8)
    arrays = digits.palette.inverse_transform(rows)
    pictures = [Image.fromarray(array) for array in arrays]
    for images in (arrays, pictures):
        np.testing.assert_allclose(igpt.score(model, images), whole[:3], rtol=1e-5)
    with pytest.raises(InputError, match="limit selects images of a source"):
        igpt.score(model, arrays, limit=2)


def test_samples_and_completions_are_pictures(digits: TokenDataset, model: igpt.ImageGPT) -> None:
    settings = {"seed": 1, "precision": "fp32"}
    two = igpt.sample(model, 2, **settings)
    assert [image.size for image in two] == [(8, 8)] * 2
    assert [image.tobytes() for image in model.sample(2, **settings)] == [
        image.tobytes() for image in two
    ]
    assert two[0].tobytes() != two[1].tobytes()
    originals = digits.palette.inverse_transform(digits["test"].rows([0, 1]).reshape(-1, 8, 8))
    completed = igpt.complete(model, originals, keep_rows=6, completions=3, **settings)
    assert [len(of_one) for of_one in completed] == [3, 3]
    for original, of_one in zip(originals, completed, strict=True):
        for image in of_one:
            np.testing.assert_array_equal(np.asarray(image)[:6], original[:6])
    hidden = np.zeros((8, 8), np.uint8)
    hidden[:, 0] = 255
    (masked,) = igpt.complete(model, originals[:1], mask=hidden, completions=1, **settings)
    np.testing.assert_array_equal(np.asarray(masked[0])[:, 1:], originals[0][:, 1:])


BLACK = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data, run: igpt.pretrain(data, "new", model="tiny", step=3), "step.*did you mean"),
        (lambda data, run: igpt.pretrain(data, "new", model="tinny"), "'tinny'.*tiny"),
        (lambda data, run: igpt.pretrain(data, "new"), "name a model"),
        (lambda data, run: igpt.finetune(run, data, "new", learning_rates=()), "give either one"),
        (lambda data, run: igpt.sample(run, 0), "at least one sample"),
        (lambda data, run: igpt.sample(run, 1, temprature=2), "no setting.*'temperature'"),
        (lambda data, run: igpt.complete(run, [BLACK], keep_row=4), "no setting 'keep_row'"),
        (lambda data, run: igpt.complete(run, "cat.jpg"), "a list or an array of images"),
        (lambda data, run: igpt.complete(run, ["cat.jpg"]), "image 0: no such file: cat.jpg"),
        (lambda data, run: igpt.Run(run).test, "test.json"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    call, message: str, digits: TokenDataset, short_run: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        call(digits, short_run)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_split_feeds_a_loader_of_pytorch(digits: TokenDataset) -> None:
    split = digits["validation"]
    assert repr(split) == "TokenSplit('validation', 180 images of 64 pixels)"
    assert "180 validation" in repr(digits)
    tokens, labels = next(iter(DataLoader(split, batch_size=4)))
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (4, 64))
    np.testing.assert_array_equal(labels, split.labels[:4])
    np.testing.assert_array_equal(tokens, split.rows(range(4)))
    assert split[-1][1] == split.labels[-1]
    with pytest.raises(IndexError, match="no image 180"):
        split[180]
