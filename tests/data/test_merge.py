"""Parts that are prepared independently on n machines are merged to the bytes that one machine
writes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from igpt.data import prepare as preparation
from igpt.data.images.palette import Palette
from igpt.data.merge import merge
from igpt.data.prepare import PrepareConfig, prepare, prepare_part
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError

from ..helpers.reading import contents

SMALL = PrepareConfig(size=4, colors=8)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "SHARD_IMAGES", (10, 10))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., bytes]) -> str:
    """Write 48 images with labels, of which one does not decode, and a test split of 12: 5 + 2
    jobs."""
    folder = tmp_path_factory.mktemp("pictures")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    for split, numbers in (("train", range(48)), ("test", range(48, 60))):
        images = [
            {"bytes": b"broken" if number == 17 else picture(number), "path": None}
            for number in numbers
        ]
        rows = {"image": images, "label": [number % 3 for number in numbers]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


LENIENT = SMALL.model_copy(update={"max_bad": 0.1})


@pytest.fixture(scope="module")
def whole(pictures: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "SHARD_IMAGES", (10, 10))
        prepare(pictures, out, LENIENT)
    return contents(out)


@pytest.fixture
def parts(pictures: str, tmp_path: Path) -> list[Path]:
    """Prepare three parts of `tokens`."""
    return [
        prepare_part(pictures, tmp_path / "tokens", LENIENT, (number, 3)) for number in (2, 1, 3)
    ]


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_merged_parts_equal_the_data_set_of_one_machine(
    pictures: str, whole: dict[str, bytes], tmp_path: Path, count: int
):
    """With more parts than shards, some parts are empty."""
    for number in range(1, count + 1):
        made = prepare_part(pictures, tmp_path / "tokens", LENIENT, (number, count))
        assert made == tmp_path / f"tokens.{number}-of-{count}"
    assert not (tmp_path / "tokens").exists()
    dataset = merge(tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == whole
    dataset.verify()
    assert len(dataset.manifest["made"]["skipped"]) == 1
    assert (tmp_path / f"tokens.1-of-{count}").exists()  # the finished files stay


def test_an_interrupted_part_is_continued(
    pictures: str, whole: dict[str, bytes], tmp_path: Path, parts: list[Path]
):
    shutil.rmtree(parts[0])

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_part(pictures, tmp_path / "tokens", LENIENT, (2, 3), progress=interrupt)
    with pytest.raises(
        InputError, match=r"parts of .*tokens are missing or unfinished: --shard 2/3$"
    ):
        merge(tmp_path / "tokens")
    steps: list[tuple[int, int]] = []
    prepare_part(
        pictures,
        tmp_path / "tokens",
        LENIENT,
        (2, 3),
        progress=lambda *counts: steps.append(counts),
    )
    assert steps == [(18, 18)]  # the last of two jobs, with the remaining eight training images
    merge(tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == whole


def test_missing_and_mixed_parts_are_named(pictures: str, tmp_path: Path, parts: list[Path]):
    prepare_part(pictures, tmp_path / "tokens", LENIENT, (1, 2))
    with pytest.raises(
        InputError, match=r"there are parts of 2 and of 3 next to .*; keep one kind"
    ):
        merge(tmp_path / "tokens")
    shutil.rmtree(tmp_path / "tokens.1-of-2")
    shutil.rmtree(parts[0])
    shutil.rmtree(parts[2])
    with pytest.raises(InputError, match=r"--shard 2/3, --shard 3/3$"):
        merge(tmp_path / "tokens")
    with pytest.raises(InputError, match=r"no parts next to .*other: igpt prepare SOURCE"):
        merge(tmp_path / "other")
    with pytest.raises(InputError, match="no parts next to"):
        merge(tmp_path / "nowhere" / "tokens")
    (tmp_path / "tokens").mkdir()
    with pytest.raises(InputError, match="exists already"):
        merge(tmp_path / "tokens")


def test_damaged_parts_are_refused_and_nothing_is_written(tmp_path: Path, parts: list[Path]):
    shard = next(parts[1].glob("train-*.tokens.npy"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(
        InputError, match=rf"{shard.name} has changed since it was written; make that part again"
    ):
        merge(tmp_path / "tokens")
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name} is missing; make that part again"):
        merge(tmp_path / "tokens")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in parts}
    shard.write_bytes(good)
    merge(tmp_path / "tokens").verify()


@pytest.mark.parametrize(
    ("setting", "value"), [("seed", 1), ("held_out", 0.2), ("filter", "bilinear"), ("views", 2)]
)
def test_parts_with_other_settings_are_refused(
    pictures: str, tmp_path: Path, parts: list[Path], setting: str, value: object
):
    shutil.rmtree(parts[2])
    palette = tmp_path / "palette.npy"
    fitted = Palette.from_centers(
        json.loads((parts[0] / "plan.json").read_text())["palette"]["centers"]
    )
    fitted.save(palette)
    other = LENIENT.model_copy(update={setting: value, "palette": str(palette)})
    prepare_part(pictures, tmp_path / "tokens", other, (3, 3))
    with pytest.raises(InputError, match="differ in config; make one of them again"):
        merge(tmp_path / "tokens")


def test_parts_with_another_palette_are_refused(pictures: str, tmp_path: Path, parts: list[Path]):
    shutil.rmtree(parts[2])
    Palette.from_centers(np.random.default_rng(0).uniform(-1, 1, (8, 3))).save(
        tmp_path / "palette.npy"
    )
    other = LENIENT.model_copy(update={"palette": str(tmp_path / "palette.npy")})
    prepare_part(pictures, tmp_path / "tokens", other, (3, 3))
    with pytest.raises(
        InputError, match=r"differ in palette; fit one first \(igpt palette\) and give it to all"
    ):
        merge(tmp_path / "tokens")


def test_the_path_of_the_palette_does_not_matter(pictures: str, tmp_path: Path):
    for number in (1, 2):
        place = tmp_path / f"machine-{number}.npy"
        Palette.from_centers(np.random.default_rng(0).uniform(-1, 1, (8, 3))).save(place)
        prepare_part(
            pictures,
            tmp_path / "tokens",
            LENIENT.model_copy(update={"palette": str(place)}),
            (number, 2),
        )
    merge(tmp_path / "tokens").verify()


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (1, 0)])
def test_folders_that_are_not_parts_are_refused(
    pictures: str, tmp_path: Path, part: tuple[int, int]
):
    with pytest.raises(InputError, match=f"needs 1 <= i <= n <= 65536, not {part[0]}/{part[1]}"):
        prepare_part(pictures, tmp_path / "tokens", LENIENT, part)


def test_merging_on_the_command_line(
    igpt: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preparation, "SHARD_IMAGES", (1000, 1000))
    out = tmp_path / "digits"
    for shard in ("1/2", "2/2"):
        done = igpt("prepare", "digits", "-o", out, "--size", 4, "--shard", shard)
        assert done.returncode == 0, done.stderr
        assert f"merge them: igpt prepare --merge -o {out}" in done.stdout
    done = igpt("prepare", "--merge", "-o", out)
    assert done.returncode == 0, done.stderr
    prepare("digits", tmp_path / "alone", PrepareConfig(size=4))
    assert contents(out) == contents(tmp_path / "alone")
    assert len(TokenDataset(out)["train"]) == 1437
    for words, message in (
        (["prepare", "-o", out], "name a SOURCE of images"),
        (["prepare", "digits", "--merge", "-o", out], "--merge takes no SOURCE"),
        (
            ["prepare", "digits", "-o", tmp_path / "a", "--shard", "1"],
            "--shard takes i/n, such as 1/4",
        ),
        (
            ["prepare", "digits", "-o", tmp_path / "a", "--shard", "3/2"],
            "needs 1 <= i <= n <= 65536, not 3/2",
        ),
    ):
        done = igpt(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr


def test_a_renamed_part(tmp_path: Path, parts: list[Path]):
    shutil.rmtree(parts[0])
    shutil.copytree(parts[1], parts[0])
    with pytest.raises(InputError, match=r"tokens\.2-of-3 holds part 1 of 3; make it again"):
        merge(tmp_path / "tokens")


def test_parts_of_images_that_have_changed_are_refused(
    tmp_path: Path, picture: Callable[..., bytes]
):
    """As many images with the same names, one of another size."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.png").write_bytes(picture(number))
    prepare_part(str(folder), tmp_path / "tokens", LENIENT, (1, 2))
    (folder / "07.png").write_bytes(picture(7, side=9))
    prepare_part(str(folder), tmp_path / "tokens", LENIENT, (2, 2))
    with pytest.raises(
        InputError, match=r"differ in (palette|the images themselves \(their names or sizes\)); "
    ):
        merge(tmp_path / "tokens")


def test_the_path_of_the_images_does_not_matter(tmp_path: Path, picture: Callable[..., bytes]):
    for machine in ("one", "two"):
        (tmp_path / machine).mkdir()
        for number in range(30):
            (tmp_path / machine / f"{number:02}.png").write_bytes(picture(number))
    prepare_part(str(tmp_path / "one"), tmp_path / "tokens", LENIENT, (1, 2))
    prepare_part(f"{tmp_path}/two/", tmp_path / "tokens", LENIENT, (2, 2))
    merge(tmp_path / "tokens").verify()


def rewritten(part: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of a part."""
    content = json.loads((part / name).read_text())
    change(content)
    (part / name).write_text(json.dumps(content))


def test_records_that_are_missing_from_a_part_are_named(tmp_path: Path, parts: list[Path]):
    """Seven records in three parts: 0, 3 and 6 are in the first."""
    rewritten(parts[1], "records.json", lambda found: found["records"].pop("0-00003.done.json"))
    with pytest.raises(
        InputError,
        match=r"tokens\.1-of-3/records\.json lacks 1 shard records \(0-00003\.done\.json\)",
    ):
        merge(tmp_path / "tokens")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in parts}


def test_records_of_another_part_are_refused(tmp_path: Path, parts: list[Path]):
    strange = json.loads((parts[0] / "records.json").read_text())["records"]
    rewritten(parts[1], "records.json", lambda found: found["records"].update(strange))
    with pytest.raises(
        InputError, match=r"has records that are not of this part \(0-00001\.done\.json, 0-00004"
    ):
        merge(tmp_path / "tokens")


def test_missing_images_of_parts_of_version_0_1_0_are_counted(tmp_path: Path, parts: list[Path]):
    """Their plans do not contain the number of records."""
    for part in parts:
        rewritten(part, "plan.json", lambda plan: plan.pop("jobs"))
    merge(tmp_path / "tokens").verify()
    shutil.rmtree(tmp_path / "tokens")
    rewritten(parts[1], "records.json", lambda found: found["records"].pop("0-00000.done.json"))
    with pytest.raises(
        InputError,
        match=r"all parts of .*tokens together has \d+ images of 'train', and there should be 42",
    ):
        merge(tmp_path / "tokens")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("plan.json", "part", "1/3", r"part = '1/3': Input should be a valid list"),
        ("plan.json", "images", None, r"images = None: Input should be a valid dictionary"),
        (
            "plan.json",
            "palette",
            {"centers": [[0, 0]]},
            r"palette\.centers\.0 = \[0, 0\]: List should have at least 3",
        ),
        (
            "plan.json",
            "palette",
            {"centers": [[0, 0, 7]]},
            r".* is not a palette: palette centres lie in",
        ),
        ("records.json", "records", [], r"records = \[\]: Input should be a valid dictionary"),
        (
            "records.json",
            "records",
            {"0-00000.done.json": {}},
            r"the key 'records\.0-00000\.done\.json\.images' is missing",
        ),
    ],
)
def test_a_malformed_part_is_named_with_its_key(
    tmp_path: Path, parts: list[Path], name: str, key: str, value: object, message: str
):
    rewritten(parts[1], name, lambda content: content.update({key: value}))
    with pytest.raises(
        InputError, match=rf"tokens\.1-of-3/{name.replace('.', '[.]')}:? ?{message}"
    ) as caught:
        merge(tmp_path / "tokens")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in parts}


def test_a_part_cannot_name_files_outside_of_it(tmp_path: Path, parts: list[Path]):
    def escape(found: dict[str, Any]) -> None:
        found["records"]["0-00000.done.json"]["shards"]["train"]["tokens"] = "../../secret"

    rewritten(parts[1], "records.json", escape)
    with pytest.raises(
        InputError,
        match=r"tokens = '\.\./\.\./secret': the plain name of a file in this folder is needed",
    ):
        merge(tmp_path / "tokens")


def test_a_file_in_two_parts_is_refused(tmp_path: Path, parts: list[Path]):
    """When merged, one would replace the other, through its link in the part itself."""
    first = json.loads((parts[1] / "records.json").read_text())["records"]["0-00000.done.json"][
        "shards"
    ]["train"]

    def steal(found: dict[str, Any]) -> None:
        found["records"]["0-00001.done.json"]["shards"]["train"] = first

    rewritten(parts[0], "records.json", steal)
    with pytest.raises(
        InputError, match=r"both hold train-00000\.tokens\.npy; make one of them again"
    ):
        merge(tmp_path / "tokens")


def test_a_fifo_instead_of_a_shard_is_refused_without_blocking(tmp_path: Path, parts: list[Path]):
    shard = next(parts[1].glob("train-*.tokens.npy"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(InputError, match="is a FIFO; a regular file is needed"):
        merge(tmp_path / "tokens")


def test_an_absurd_number_of_parts_is_refused(pictures: str, tmp_path: Path):
    with pytest.raises(InputError, match="<= n <= 65536"):
        prepare_part(pictures, tmp_path / "tokens", LENIENT, (1, 10**30))
    (tmp_path / f"tokens.1-of-{10**30}").mkdir()
    with pytest.raises(InputError, match="at most 65536 can be joined; remove it"):
        merge(tmp_path / "tokens")


def test_if_many_parts_are_missing_the_first_are_named(tmp_path: Path):
    (tmp_path / "tokens.1-of-5000").mkdir()
    with pytest.raises(InputError, match=r"--shard 2/5000, .*--shard 21/5000 and 4979 more$"):
        merge(tmp_path / "tokens")
