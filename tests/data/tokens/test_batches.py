import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from igpt.data.images.palette import Palette
from igpt.data.tokens.batches import Batches, Prefetch, augment, batch_rows
from igpt.data.tokens.dataset import TokenDataset, TokenSplit
from igpt.data.tokens.manifest import write_manifest, write_shard
from igpt.errors import InputError

SIDE = 5
CPU = torch.device("cpu")


def split_of(count: int, side: int = SIDE) -> TokenSplit:
    """Return images whose tokens are all different, and whose labels are their rows."""
    tokens = np.arange(count * side**2, dtype=np.uint16).reshape(count, side**2)
    return TokenSplit("train", [tokens], [np.arange(count, dtype=np.int32)])


@pytest.mark.parametrize(("count", "size"), [(12, 4), (12, 5), (7, 7), (3, 8), (10, 1)])
def test_epochs_are_consecutive_permutations(count: int, size: int):
    steps = 3 * count
    rows = np.concatenate([batch_rows(0, step, size, count) for step in range(steps)])
    epochs = rows[: len(rows) // count * count].reshape(-1, count)
    np.testing.assert_array_equal(
        np.sort(epochs, axis=1), np.broadcast_to(np.arange(count), epochs.shape)
    )
    if count >= 7:
        assert (
            len(np.unique(epochs, axis=0)) > len(epochs) * 0.9
        )  # every epoch has a different order


def test_a_batch_does_not_depend_on_earlier_ones():
    in_order = {step: batch_rows(5, step, 6, 20) for step in range(40)}
    for step in (39, 0, 17, 3, 38, 16):
        np.testing.assert_array_equal(batch_rows(5, step, 6, 20), in_order[step])
    batches = Batches(split_of(20), SIDE, 6, seed=5, flip=True, shift=2)
    augmented = {step: batches.tokens(step) for step in range(40)}
    fresh = Batches(split_of(20), SIDE, 6, seed=5, flip=True, shift=2)
    for step in (39, 0, 17, 3):
        assert torch.equal(fresh.tokens(step), augmented[step])


def test_a_batch_straddles_epochs():
    rows = np.concatenate([batch_rows(1, step, 8, 12) for step in range(3)])
    second = batch_rows(1, 1, 8, 12)
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12))
    np.testing.assert_array_equal(second, rows[8:16])


def test_seeds_differ():
    orders = {tuple(batch_rows(seed, 0, 50, 50)) for seed in range(20)}
    assert len(orders) == 20
    # One image, so that the order cannot differ
    first, second = (
        Batches(split_of(1), SIDE, 16, seed=seed, shift=2).tokens(0) for seed in (0, 1)
    )
    assert (first != second).any(dim=1).sum() > 8


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000, 100_003])
def test_an_epoch_contains_every_row_once(count: int):
    for seed in (0, 2**63 - 1):
        rows = batch_rows(seed, 1, count, count)
        assert np.bincount(rows, minlength=count).tolist() == [1] * count
    if count >= 64:
        assert (rows == np.arange(count)).sum() < 10, (
            "rows that keep their position: one is expected"
        )


def test_the_order_is_the_same_on_every_machine():
    assert batch_rows(0, 0, 6, 10).tolist() == [0, 9, 3, 7, 5, 2]
    assert batch_rows(2**63 - 1, 10**6, 4, 100_000_000).tolist() == [
        36923723,
        11691933,
        22641314,
        66814247,
    ]


def excess(counts: NDArray[np.int64]) -> float:
    """Return chi-squared of counts that should be equal: standard deviations above its mean."""
    degrees = len(counts) - 1
    expected = counts.sum() / len(counts)
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize("count", [2, 3, 7, 16, 100])
def test_over_epochs_every_row_is_equally_often_first(count: int):
    epochs = batch_rows(0, 0, 4000 * count, count).reshape(4000, count)
    for place in (0, 1, count - 1):
        assert abs(excess(np.bincount(epochs[:, place], minlength=count))) < 4
    steps = (epochs[:, 1] - epochs[:, 0]) % count
    assert count == 2 or abs(excess(np.bincount(steps, minlength=count)[1:])) < 4, (
        "successive epochs are not independent"
    )


def test_successive_rows_and_epochs_are_independent():
    count = 100_003
    first, second = batch_rows(0, 0, 2 * count, count).reshape(2, count).astype(float)
    for one, other in ((first[:-1], first[1:]), (first, np.arange(count)), (first, second)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / count**0.5
    assert abs(np.corrcoef(first, batch_rows(1, 0, count, count))[0, 1]) < 4 / count**0.5


def test_a_hundred_million_images_take_no_memory():
    tracemalloc.start()
    batches = [batch_rows(0, step, 128, 100_000_000) for step in (0, 781_249, 781_250, 10**7)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000, "bytes"
    assert len(np.unique(batches)) == 4 * 128
    assert np.max(batches) > 99_000_000


def test_tokens_and_labels_belong_together():
    batches = Batches(split_of(20), SIDE, 6)
    for step in range(10):
        tokens, labels = batches.tokens(step), batches.labels(step)
        np.testing.assert_array_equal(labels, batch_rows(0, step, 6, 20))
        np.testing.assert_array_equal(tokens, batches.split.rows(labels))
        assert tokens.dtype == labels.dtype == torch.int64
    augmented = Batches(split_of(20), SIDE, 6, flip=True, shift=1)
    # Augmentation moves tokens only within their image
    assert (augmented.tokens(0) // SIDE**2 == augmented.labels(0)[:, None]).all()


GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_batches_in_memory_and_memory_mapped_are_the_same(device: str, tmp_path: Path):
    """Tokens up to 65535, which are negative in int16."""
    generator = np.random.default_rng(0)
    shards = []
    for number in range(3):
        tokens = generator.integers(0, 2**16, (10, SIDE**2), dtype=np.uint16)
        shards.append(
            write_shard(
                tmp_path, f"train-{number:05d}", tokens, np.arange(10, dtype=np.int32) + 10 * number
            )
        )
    palette = Palette.from_centers(np.zeros((2**16, 3)))
    names = {"class_names": [str(number) for number in range(30)], "source": "a test", "made": {}}
    write_manifest(tmp_path, resolution=SIDE, palette=palette, splits={"train": shards}, **names)
    split = TokenDataset(tmp_path)["train"]
    on = torch.device(device)
    for options in ({}, {"flip": True}, {"shift": 2}, {"flip": True, "shift": 2}):
        held = Batches(split, SIDE, 8, seed=3, device=on, **options)
        mapped = Batches(split, SIDE, 8, seed=3, device=on, held_bytes=split.nbytes - 1, **options)
        as_on_gpu = Batches(split, SIDE, 8, seed=3, device=on, **options)
        vars(as_on_gpu)["_source"] = torch.from_numpy(split.rows(np.arange(30)).view(np.int16)).to(
            on
        )
        assert mapped._source is split
        assert held._source is not split
        for step in (5, 0, 3):
            assert mapped.tokens(step).max() > 2**15
            for other in (held, as_on_gpu):
                assert torch.equal(other.tokens(step), mapped.tokens(step))
                assert torch.equal(other.labels(step), mapped.labels(step))
                assert other.tokens(step).device.type == other.labels(step).device.type == device


def slow_variants(
    image: NDArray[np.uint16], side: int, flip: bool, shift: int
) -> dict[bytes, tuple[bool, int, int]]:
    """Return all variants of an image: mirrored or not, reflect-padded and cropped, one pixel at a
    time."""

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
                        out[y * side + x] = image[
                            from_y * side + (side - 1 - from_x if mirrored else from_x)
                        ]
                variants[out.tobytes()] = mirrored, down, right
    return variants


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 1), (True, 2), (False, 4)])
def test_augmentation_on_the_token_grid(flip: bool, shift: int):
    """Each image becomes one of the variants made pixel by pixel, each equally often."""
    side = 2 * shift + 3  # in smaller images some variants coincide
    image = np.arange(side**2, dtype=np.uint16) + 100
    variants = slow_variants(image, side, flip, shift)
    assert len(variants) == (1 + flip) * (2 * shift + 1) ** 2
    times = 60
    augmented = augment(
        np.tile(image, (times * len(variants), 1)),
        side,
        np.random.default_rng(0),
        flip=flip,
        shift=shift,
    )
    assert augmented.dtype == np.uint16
    seen = dict.fromkeys(variants, 0)
    for row in augmented:
        seen[row.tobytes()] += 1
    # Chi-squared over the variants: 5 standard deviations
    degrees = len(variants) - 1
    assert (
        sum((number - times) ** 2 / times for number in seen.values())
        < degrees + 5 * (2 * degrees) ** 0.5
    )


def test_images_of_a_batch_are_augmented_independently():
    tokens = np.tile(np.arange(SIDE**2, dtype=np.uint16), (400, 1))
    kinds = slow_variants(tokens[0], SIDE, True, 1)
    sampled = np.array(
        [
            kinds[row.tobytes()]
            for row in augment(tokens, SIDE, np.random.default_rng(0), flip=True, shift=1)
        ]
    )
    assert np.abs(np.corrcoef(sampled.T.astype(float)) - np.eye(3)).max() < 0.2


def test_no_augmentation_returns_the_tokens():
    tokens = np.arange(2 * SIDE**2, dtype=np.uint16).reshape(2, -1)
    np.testing.assert_array_equal(
        augment(tokens, SIDE, np.random.default_rng(0), flip=False, shift=0), tokens
    )


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_leaves_the_data_set_unchanged(flip: bool):
    split = split_of(6)
    before = split.rows(np.arange(6))
    batches = Batches(split, SIDE, 6, flip=flip)
    batches.tokens(0)[:] = 0
    np.testing.assert_array_equal(split.rows(np.arange(6)), before)
    assert batches.tokens(0).any()


def test_augmentation_changes_from_epoch_to_epoch():
    batches = Batches(split_of(4), SIDE, 4, shift=2)
    seen = {
        batches.tokens(step)[batches.labels(step).argsort()].numpy().tobytes() for step in range(10)
    }
    assert len(seen) == 10


def test_settings_without_batches_are_refused():
    empty = TokenSplit("train", [], [])
    with pytest.raises(InputError, match="the split 'train' is empty"):
        Batches(empty, SIDE, 4)
    with pytest.raises(InputError, match="a shift of 5 does not fit images of 5 px"):
        Batches(split_of(4), SIDE, 4, shift=SIDE)
    assert Batches(split_of(4), SIDE, 4, shift=SIDE - 1).tokens(0).shape == (4, SIDE**2)


def test_the_next_batch_is_made_while_this_one_is_used():
    made: list[int] = []
    next_is_made = threading.Event()

    def make(step: int) -> tuple[torch.Tensor]:
        assert threading.current_thread() is not threading.main_thread()
        made.append(step)
        if step == 4:
            next_is_made.set()
        return (torch.tensor([step]),)

    with Prefetch(make, CPU) as prefetched:
        assert prefetched(3)[0].item() == 3
        assert next_is_made.wait(10), "batch 4 was not requested yet"
        assert [prefetched(step)[0].item() for step in (4, 5, 9, 0, 1)] == [4, 5, 9, 0, 1]
    assert made[:8] == [3, 4, 5, 6, 9, 10, 0, 1], "batches in order are made once"


def test_an_error_is_raised_when_its_batch_is_requested():
    def make(step: int) -> tuple[torch.Tensor]:
        if step == 2:
            raise InputError("a shard is gone")
        return (torch.tensor([step]),)

    with Prefetch(make, CPU) as prefetched:
        assert prefetched(1)[0].item() == 1
        with pytest.raises(InputError, match="a shard is gone"):
            prefetched(2)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_thread_ends_with_the_run(error: type[BaseException] | None):
    def run() -> None:
        with Prefetch(lambda step: (torch.tensor([time.sleep(0.01) or step]),), CPU) as prefetched:
            prefetched(0)
            assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
            if error:
                raise error

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
