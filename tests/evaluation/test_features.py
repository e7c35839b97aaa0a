"""Features of all layers in one pass: their values, with masks too, and their files."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.evaluation import features
from igpt.evaluation.features import (
    ConcatenatedColumns,
    ConcatenatedRows,
    Masking,
    Pixels,
    pooled,
    stored,
)
from igpt.model.config import ModelConfig
from igpt.model.match import require_match
from igpt.model.transformer import ImageGPT

SHAPE = {"resolution": 8, "n_colors": 17, "n_layer": 2, "n_embd": 32, "n_head": 2}


@pytest.fixture(scope="module")
def model(short_run: Path) -> ImageGPT:
    return ImageGPT.from_pretrained(short_run / "model")


@pytest.fixture(scope="module")
def bert(digits: TokenDataset) -> ImageGPT:
    torch.manual_seed(1)
    return ImageGPT(ModelConfig.layered(SHAPE, {"objective": "bert"}), digits.palette)


def test_they_are_the_mean_over_positions_of_every_layer(
    model: ImageGPT, digits: TokenDataset
) -> None:
    split = digits["test"]
    found = np.concatenate(list(pooled(model, split, batch_size=7)), axis=1)
    assert found.shape == (3, 180, 32)
    tokens = torch.from_numpy(split.rows([4, 100]).astype(np.int64))
    for layer, activations in enumerate(model.features(tokens)):
        np.testing.assert_allclose(found[layer, [4, 100]], activations.mean(1).detach(), atol=1e-5)


def test_a_bert_model_sees_all_pixels_unless_they_are_masked(
    bert: ImageGPT, digits: TokenDataset
) -> None:
    split = digits["test"]
    tokens = torch.from_numpy(split.rows([5]).astype(np.int64))
    (whole,) = pooled(bert, split, batch_size=180)
    expected = [layer.mean(1).detach() for layer in bert.features(tokens)]
    np.testing.assert_allclose(whole[:, 5], torch.cat(expected), atol=1e-5)
    hidden = [
        np.concatenate(list(pooled(bert, split, masking=Masking(draw), batch_size=180)), 1)
        for draw in (0, 1)
    ]
    assert np.abs(hidden[0] - whole).max() > 1e-3
    assert np.abs(hidden[0] - hidden[1]).max() > 1e-3
    again = np.concatenate(list(pooled(bert, split, masking=Masking(1), batch_size=7)), axis=1)
    np.testing.assert_allclose(
        again, hidden[1], atol=1e-5, err_msg="an image's mask does not depend on its batch"
    )


def test_they_are_computed_once_and_read_from_disk(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stored(model, digits["test"], tmp_path / "test", of={"tokens": 1})
    (whole,) = pooled(model, digits["test"], batch_size=180)
    assert all(isinstance(layer, np.memmap) and layer.dtype == np.float32 for layer in first)
    np.testing.assert_allclose(np.stack(first), whole, atol=1e-5)
    monkeypatch.setattr(features, "pooled", None)  # it cannot be called
    again = stored(model, digits["test"], tmp_path / "test", of={"tokens": 1})
    np.testing.assert_array_equal(np.stack(again), np.stack(first))


def test_features_of_another_model_or_data_set_are_refused(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    stored(model, digits["test"], tmp_path / "test", of={"tokens": 1})
    other = ImageGPT(model.config, model.palette)
    wrong = [
        {"model": other},
        {
            "split": digits["validation"].__class__(
                "test", [digits["test"].rows([0])], [digits["test"].labels_of([0])]
            )
        },
        {"of": {"tokens": 2}},
        {"precision": "bf16"},
    ]
    for change in wrong:
        given = {"model": model, "split": digits["test"], "of": {"tokens": 1}, **change}
        with pytest.raises(InputError, match="holds features of another model or of other images"):
            stored(given.pop("model"), given.pop("split"), tmp_path / "test", **given)


def test_an_interrupted_computation_leaves_no_features(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored(model, digits["test"], tmp_path / "features" / "test", of={}, progress=stops)
    assert not list((tmp_path / "features").iterdir())


def test_at_most_two_batches_are_in_memory(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Batch(np.ndarray):
        """An array that counts its instances."""

    alive, most = list[weakref.ref[Batch]](), 0

    def watched(*arguments: Any, **options: Any) -> Iterator[NDArray[np.float32]]:
        nonlocal most
        for batch in made(*arguments, **options, batch_size=4):
            seen = batch.view(Batch)
            alive.append(weakref.ref(seen))
            most = max(most, sum(one() is not None for one in alive))
            yield seen

    made = features.pooled
    monkeypatch.setattr(features, "pooled", watched)
    found = stored(model, digits["test"], tmp_path / "test", of={})
    assert most <= 2, "of 45"
    (whole,) = made(model, digits["test"], batch_size=180)
    np.testing.assert_allclose(np.stack(found), whole, atol=1e-5)
    assert json.loads((tmp_path / "test" / "features.json").read_text())["images"] == 180


def test_tokens_of_another_size_are_refused(
    digits: TokenDataset, photographs: Path, model: ImageGPT, tmp_path: Path
) -> None:
    other = prepare(str(photographs), tmp_path / "coloured", PrepareConfig(size=8, colors=17))
    with pytest.raises(InputError, match="the palettes differ: the model has"):
        require_match(model, other)
    wide = prepare(str(photographs), tmp_path / "wider", PrepareConfig(size=16, colors=17))
    with pytest.raises(InputError, match=r"the model sees 8 px, .* has 16 px") as both:
        require_match(model, wide, "runs/mine/model")
    assert "the palettes differ" in str(both.value)
    assert str(both.value).endswith(
        f"prepare tokens for this model: igpt prepare {photographs} --size 8 "
        f"--palette runs/mine/model -o {tmp_path}/wider-for-mine"
    )
    with pytest.raises(InputError, match="--size 16 --palette MODEL") as palettes:
        require_match(model, wide, any_size=True)
    assert "the model sees" not in str(palettes.value)
    with pytest.raises(InputError, match="no palette"):
        require_match(ImageGPT(model.config), digits)


def test_concatenated_and_stacked_features_read_as_one_array(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    np.save(tmp_path / "a.npy", values[:, :2])
    columns = ConcatenatedColumns([np.load(tmp_path / "a.npy", mmap_mode="r"), values[:, 2:]])
    stacked = ConcatenatedRows(columns, values[:20])
    whole = np.concatenate([values, values[:20]])
    assert (columns.shape, stacked.shape, len(stacked)) == ((50, 6), (70, 6), 70)
    some = np.array([69, 0, 49, 50])
    for rows in (slice(0, 10), slice(45, 60), slice(64, 999), some):
        np.testing.assert_array_equal(stacked[rows], whole[rows])


def test_no_rows_of_pixels_keep_their_width(digits: TokenDataset) -> None:
    """Joined rows of two splits read none of one of them where a block lies in the other."""
    pixels = Pixels(digits["train"], digits.palette, 64)
    assert pixels[np.array([], dtype=np.int64)].shape == (0, 192)
    assert pixels[:3].shape == (3, 192)
