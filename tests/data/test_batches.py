import numpy as np
import pytest
from numpy.typing import NDArray

from igpt.data.batches import Batches, batch_rows, vary
from igpt.data.tokens import TokenSplit
from igpt.errors import InputError

SIDE = 5


def split_of(count: int, side: int = SIDE) -> TokenSplit:
    """Images whose tokens are all different, and whose labels are their rows."""
    tokens = np.arange(count * side**2, dtype=np.uint16).reshape(count, side**2)
    return TokenSplit("train", [tokens], [np.arange(count, dtype=np.int32)])


@pytest.mark.parametrize(("count", "size"), [(12, 4), (12, 5), (7, 7), (3, 8), (10, 1)])
def test_epochs_are_permutations_laid_end_to_end(count: int, size: int):
    steps = 3 * count
    rows = np.concatenate([batch_rows(0, step, size, count) for step in range(steps)])
    epochs = rows[: len(rows) // count * count].reshape(-1, count)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(count), epochs.shape))
    if count >= 7:
        assert len(np.unique(epochs, axis=0)) > len(epochs) * 0.9  # every epoch has an order of its own


def test_a_batch_is_the_same_whatever_came_before():
    in_order = {step: batch_rows(5, step, 6, 20) for step in range(40)}
    for step in (39, 0, 17, 3, 38, 16):
        np.testing.assert_array_equal(batch_rows(5, step, 6, 20), in_order[step])
    batches = Batches(split_of(20), SIDE, 6, seed=5, flip=True, shift=2)
    varied = {step: batches.batch(step)[0] for step in range(40)}
    fresh = Batches(split_of(20), SIDE, 6, seed=5, flip=True, shift=2)
    for step in (39, 0, 17, 3):
        np.testing.assert_array_equal(fresh.batch(step)[0], varied[step])


def test_a_batch_straddles_epochs():
    rows = np.concatenate([batch_rows(1, step, 8, 12) for step in range(3)])
    second = batch_rows(1, 1, 8, 12)
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12))
    np.testing.assert_array_equal(second, rows[8:16])


def test_seeds_differ():
    orders = {tuple(batch_rows(seed, 0, 50, 50)) for seed in range(20)}
    assert len(orders) == 20
    # One image, so that it is not the order that differs
    first, second = (Batches(split_of(1), SIDE, 16, seed=seed, shift=2).batch(0)[0] for seed in (0, 1))
    assert (first != second).any(axis=1).sum() > 8


def test_tokens_and_labels_belong_together():
    batches = Batches(split_of(20), SIDE, 6)
    for step in range(10):
        tokens, labels = batches.batch(step)
        np.testing.assert_array_equal(labels, batch_rows(0, step, 6, 20))
        np.testing.assert_array_equal(tokens, batches.split.rows(labels))
        assert tokens.dtype == np.uint16
    flipped, labels = Batches(split_of(20), SIDE, 6, flip=True, shift=1).batch(0)
    assert (flipped // SIDE**2 == labels[:, None]).all()  # variations move tokens within their image only


def slow_variants(image: NDArray[np.uint16], side: int, flip: bool, shift: int) -> dict[bytes, tuple[bool, int, int]]:
    """All that an image may become: mirrored or not, reflect-padded and cropped, one place at a time."""

    def reflected(place: int) -> int:
        if place < 0:
            return -place
        return 2 * (side - 1) - place if place >= side else place

    variants = {}
    for mirrored in (False, True) if flip else (False,):
        for down in range(2 * shift + 1):
            for right in range(2 * shift + 1):
                out = np.empty_like(image)
                for y in range(side):
                    for x in range(side):
                        from_y, from_x = reflected(y + down - shift), reflected(x + right - shift)
                        out[y * side + x] = image[from_y * side + (side - 1 - from_x if mirrored else from_x)]
                variants[out.tobytes()] = mirrored, down, right
    return variants


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 1), (True, 2), (False, 4)])
def test_variations_on_the_token_grid(flip: bool, shift: int):
    """Each image becomes one of the variants made place by place, and each variant comes about as often."""
    side = 2 * shift + 3  # in smaller ones some variants coincide
    image = np.arange(side**2, dtype=np.uint16) + 100
    variants = slow_variants(image, side, flip, shift)
    assert len(variants) == (1 + flip) * (2 * shift + 1) ** 2
    times = 60
    varied = vary(np.tile(image, (times * len(variants), 1)), side, np.random.default_rng(0), flip=flip, shift=shift)
    assert varied.dtype == np.uint16
    seen = dict.fromkeys(variants, 0)
    for row in varied:
        seen[row.tobytes()] += 1
    # Chi-squared over the variants: 5 standard deviations
    degrees = len(variants) - 1
    assert sum((number - times) ** 2 / times for number in seen.values()) < degrees + 5 * (2 * degrees) ** 0.5


def test_images_of_a_batch_vary_independently():
    tokens = np.tile(np.arange(SIDE**2, dtype=np.uint16), (400, 1))
    kinds = slow_variants(tokens[0], SIDE, True, 1)
    drawn = np.array([kinds[row.tobytes()] for row in vary(tokens, SIDE, np.random.default_rng(0), flip=True, shift=1)])
    assert np.abs(np.corrcoef(drawn.T.astype(float)) - np.eye(3)).max() < 0.2


def test_no_variation_returns_the_tokens():
    tokens = np.arange(2 * SIDE**2, dtype=np.uint16).reshape(2, -1)
    np.testing.assert_array_equal(vary(tokens, SIDE, np.random.default_rng(0), flip=False, shift=0), tokens)


def test_variation_leaves_the_data_set_alone():
    split = split_of(6)
    before = split.rows(np.arange(6)).copy()
    batches = Batches(split, SIDE, 6, flip=True, shift=2)
    tokens, _ = batches.batch(0)
    tokens[:] = 0
    np.testing.assert_array_equal(split.rows(np.arange(6)), before)
    assert batches.batch(0)[0].any()


def test_variations_change_from_epoch_to_epoch():
    batches = Batches(split_of(4), SIDE, 4, shift=2)
    seen = {batches.batch(step)[0][np.argsort(batches.batch(step)[1])].tobytes() for step in range(10)}
    assert len(seen) == 10


def test_what_makes_no_batches():
    empty = TokenSplit("train", [], [])
    with pytest.raises(InputError, match="the split 'train' is empty"):
        Batches(empty, SIDE, 4)
    with pytest.raises(InputError, match="a shift of 5 does not fit images of 5 px"):
        Batches(split_of(4), SIDE, 4, shift=SIDE)
    assert Batches(split_of(4), SIDE, 4, shift=SIDE - 1).batch(0)[0].shape == (4, SIDE**2)
