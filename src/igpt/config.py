"""Settings: frozen, checked, in YAML or JSON, and layered (preset, then file, then flags)."""

import json
import reprlib
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError
from pydantic.fields import FieldInfo

from igpt.errors import InputError, suggest
from igpt.files import atomic_file, read_text
from igpt.remote import shown

_LARGEST = 1 << 18  # bytes of settings: YAML is read slowly, and real ones have some thousands
_DEEPEST = 50  # levels of lists and mappings in YAML


# A path, or a URL. `Path` joins its slashes, and files of settings have it as it was given.
PathOrUrl = Annotated[
    Path,
    PlainSerializer(shown, return_type=str, when_used="json"),
]


def read_settings(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file.

    Raises:
        InputError: no such file, no regular one or one larger than 256 KiB, a syntax error, a key
            that is there twice, a YAML alias, or something else than a mapping.
    """
    import yaml

    text = read_text(path, "settings file", largest=_LARGEST)
    try:
        # JSON indented with tabs is not YAML.
        values = (
            json.loads(text, object_pairs_hook=_once)
            if path.suffix == ".json"
            else _from_yaml(text)
        )
    except RecursionError:
        raise InputError(f"{path} is nested too deeply for settings") from None
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
    ) as error:  # such as a date that does not exist
        raise InputError(
            f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must contain settings as 'name: value' lines")
    return values


def file_settings(path: str | PathLike[str] | None) -> dict[str, Any]:
    """Return the settings of a file, see `read_settings`, or none if there is no file."""
    return read_settings(Path(path)) if path else {}


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the mapping of some keys and values.

    Raises:
        ValueError: a key is there twice; it is unknown which value is meant.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _from_yaml(text: str) -> Any:
    """Parse YAML without aliases, with which a few lines could expand to billions of values."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(
                    "it has an alias (*name), which settings may not have; write the value out"
                )
            if self.depth == _DEEPEST:
                raise RecursionError
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _once(
                [
                    (key.value if isinstance(key, yaml.ScalarNode) else id(key), None)
                    for key, _ in node.value
                ]
            )
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


class Config(BaseModel):
    """Base of all settings: immutable; errors on unknown keys name the nearest known key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def layered(cls, *layers: Mapping[str, Any], where: str = "settings") -> Self:
        """Return settings from several mappings, each overriding the previous ones.

        Args:
            where: names the settings in errors.

        Raises:
            InputError: an unknown key (the nearest known one is named) or a value that does not
                fit.
        """
        merged: dict[str, Any] = {}
        for layer in layers:
            merged.update(layer)
        for key in merged:
            if key not in cls.model_fields:
                raise InputError(
                    f"unknown key {key!r} in {where}; {suggest(str(key), cls.model_fields)}"
                )
        try:
            return cls.model_validate(merged)
        except RecursionError:
            raise InputError(f"{where}: a value is nested too deeply") from None
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            if first["type"] == "missing":
                raise InputError(f"{where}: {name} is missing, and has no default") from None
            given = f"{name} = {_shown(first['input'])}: " if name else ""
            raise InputError(f"{where}: {given}{reason}") from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the settings in a YAML or JSON file."""
        return cls.layered(read_settings(path), where=str(path))

    def save(self, path: Path) -> None:
        """Write the settings, atomically: JSON if `path` ends in .json, otherwise YAML."""
        values = self.model_dump(mode="json")
        if path.suffix == ".json":
            text = json.dumps(values, indent=2) + "\n"
        else:
            import yaml

            text = yaml.safe_dump(values, sort_keys=False)
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def flag_of(name: str, field: FieldInfo) -> str:
    """Return the flag of a setting: --its-name, or the one that the field has for it."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "flag" in extra:
        return str(extra["flag"])
    return f"--{name.replace('_', '-')}"


def flags(
    settings: type[Config], values: Mapping[str, Any], *, always: Collection[str] = ()
) -> list[str]:
    """Return the words of a command line that give values to settings.

    Defaults, None, and values of no setting are left out.

    Args:
        values: by the names of the settings, as Python or JSON has them.
        always: names of settings whose defaults are not left out.
    """
    words = []
    for name, value in values.items():
        field = settings.model_fields.get(name)
        if field is None or value is None:
            continue
        default = field.get_default()
        default = list(default) if isinstance(default, tuple) else default
        value = list(value) if isinstance(value, tuple) else value
        if value == default and name not in always:
            continue
        flag = flag_of(name, field)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def _shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of thousands of digits
        return "(a number of thousands of digits)"
