import json
import os
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from igpt.config import Config, flags, read_settings
from igpt.errors import InputError


class Recipe(Config):
    size: int = Field(32, ge=2)
    rate: float = 1e-3
    order: Literal["raster", "snake"] = "raster"
    betas: tuple[float, float] = (0.9, 0.95)
    palette: Path | None = None


class Flags(Config):
    size: int = 32
    betas: tuple[float, float] = (0.9, 0.95)
    steps: tuple[int, ...] = ()
    flip: bool = False
    stream: bool = True
    from_model: Path | None = Field(None, json_schema_extra={"flag": "--from"})
    name: str


def test_flags_are_the_values_that_are_no_defaults() -> None:
    usual = {"size": 32, "betas": [0.9, 0.95], "steps": [], "flip": False, "stream": True}
    assert flags(Flags, {**usual, "from_model": None, "no_setting": 1}) == []
    assert flags(Flags, usual | {"unknown": 1}, always=["size", "flip"]) == [
        *("--size", "32"),
        "--no-flip",
    ]
    changed = {"betas": (0.9, 0.9), "steps": [1, 2], "flip": True, "stream": False}
    assert flags(Flags, {**changed, "from_model": Path("a"), "name": "b"}) == [
        *("--betas", "0.9", "0.9", "--steps", "1", "2", "--flip", "--no-stream"),
        *("--from", "a", "--name", "b"),
    ]


class Strict(Config):
    steps: int


def test_later_layers_override_earlier_ones_and_keep_the_rest():
    preset, file, flags = {"size": 8, "rate": 0.5}, {"size": 16, "order": "snake"}, {"size": 24}
    recipe = Recipe.layered(preset, file, flags)
    assert (recipe.size, recipe.rate, recipe.order) == (24, 0.5, "snake")
    assert preset == {"size": 8, "rate": 0.5}
    assert Recipe.layered() == Recipe()


def test_unknown_key_names_the_nearest_one():
    with pytest.raises(
        InputError, match=r"^unknown key 'sise' in recipe\.yaml; did you mean 'size'\?$"
    ):
        Recipe.layered({"sise": 8}, where="recipe.yaml")
    with pytest.raises(InputError, match="choose from: betas, order, palette, rate, size"):
        Recipe.layered({"xyzzy": 8})


def test_a_key_that_is_not_a_string_is_unknown(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("on: 1\n")  # YAML reads this as True
    with pytest.raises(InputError, match="unknown key True"):
        Recipe.load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 1}, "size = 1: Input should be greater than or equal to 2"),
        ({"size": "big"}, "size = 'big': Input should be a valid integer"),
        ({"order": "spiral"}, "order = 'spiral': Input should be 'raster' or 'snake'"),
        ({"rate": float("nan")}, "rate = nan: Input should be a finite number"),
        ({"betas": [0.9]}, r"betas.1 is missing, and has no default"),
        ({"betas": [0.9, "x"]}, r"betas.1 = 'x': Input should be a valid number"),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_file(values: dict[str, object], message: str):
    with pytest.raises(InputError) as caught:
        Recipe.layered(values, where="flags")
    assert str(caught.value).startswith("flags: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_named():
    with pytest.raises(InputError, match=r"^settings: steps is missing, and has no default$"):
        Strict.layered({})


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().size = 8


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.json"])
def test_round_trip(tmp_path: Path, name: str):
    recipe = Recipe(
        size=8, rate=3e-5, order="snake", betas=(0.5, 0.75), palette=Path("farben/é.npy")
    )
    recipe.save(tmp_path / "new" / name)
    assert Recipe.load(tmp_path / "new" / name) == recipe
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]


def test_json_is_json_and_yaml_is_yaml(tmp_path: Path):
    Recipe(size=8).save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["size"] == 8
    (tmp_path / "tabs.json").write_text(
        '{\n\t"size": 8,\n\t"rate": 1e-3\n}'
    )  # no YAML: it forbids tabs
    assert Recipe.load(tmp_path / "tabs.json") == Recipe(size=8)
    (tmp_path / "b.yaml").write_text("rate: 1e-3  # YAML 1.1 reads a word here\nsize: 8\n")
    assert Recipe.load(tmp_path / "b.yaml") == Recipe(size=8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"size: [1, 2", "is neither YAML nor JSON"),
        ("a.json", b'{"size": 8', "is neither YAML nor JSON"),
        ("a.yaml", b"\xff\xfe\x00", "is not readable as text"),
        ("a.yaml", b"- size\n- rate\n", "must contain settings as 'name: value' lines"),
        ("a.yaml", b"", "must contain settings as 'name: value' lines"),
        ("a.json", b"[1]", "must contain settings as 'name: value' lines"),
    ],
)
def test_unreadable_settings_are_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_settings(tmp_path / name)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


BOMB = "\n".join(
    ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", BOMB, "it has an alias"),
        ("a.yaml", "size: &a 8\nrate: *a\n", "it has an alias"),
        ("a.yaml", "a: &a [*a]", "it has an alias"),
        ("a.yaml", "[" * 20_000, "nested too deeply"),
        ("a.yaml", "size: " + "[" * 3_000 + "]" * 3_000, "nested too deeply"),
        ("a.json", "[" * 200_000, "nested too deeply"),
        ("a.yaml", f"size: {'9' * 5000}\n", "is neither YAML nor JSON: Exceeds the limit"),
        ("a.yaml", f"rate: 0x{'f' * 9000}\n", "rate = (a number of thousands of digits): "),
        ("a.json", f'{{"size": {"9" * 5000}}}', "is neither YAML nor JSON: Exceeds the limit"),
        ("a.yaml", "size: 2020-13-45\n", "is neither YAML nor JSON"),
        ("a.yaml", "size: !!python/object/apply:os.system [true]\n", "is neither YAML nor JSON"),
        ("a.yaml", "? [1]\n: 2\n", "is neither YAML nor JSON"),
        ("a.yaml", "size: 8\nrate: 1\nsize: 9\n", "the key 'size' is there twice"),
        ("a.json", '{"size": 8, "size": 9}', "the key 'size' is there twice"),
        ("a.yaml", "order: {a: 1, a: 2}\n", "the key 'a' is there twice"),
        ("a.yaml", f"order: {'x' * 300_000}\n", "that is no settings file"),
    ],
)
def test_hostile_settings_are_refused_quickly_in_one_line(
    tmp_path: Path, name: str, content: str, message: str
):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        Recipe.load(tmp_path / name)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_fifo_is_refused_without_blocking(tmp_path: Path):
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(InputError, match="is a FIFO"):
        read_settings(tmp_path / "a.yaml")


def test_a_long_value_is_not_repeated_in_the_message():
    with pytest.raises(InputError) as caught:
        Recipe.layered({"order": "x" * 100_000})
    assert len(str(caught.value)) < 300


def test_a_number_of_thousands_of_digits_is_refused():
    with pytest.raises(InputError, match=r"rate = .* finite number|rate = .* valid number"):
        Recipe.layered({"rate": 10**5000})


def test_a_missing_settings_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no settings file at .*: nowhere\.yaml is missing"):
        read_settings(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match=r"is a folder; a file \(settings file\) is needed"):
        read_settings(tmp_path)


def test_a_failed_save_keeps_the_old_settings(tmp_path: Path):
    path = tmp_path / "a.yaml"
    Recipe(size=8).save(path)

    class Unspeakable(Config):
        value: object = None

    with pytest.raises(Exception, match="serialize"):
        Unspeakable(value=object()).save(path)
    assert Recipe.load(path).size == 8
    assert list(tmp_path.iterdir()) == [path]
