"""Settings: frozen, checked, in YAML or JSON, and layered (preset, then file, then flags)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from igpt.errors import InputError, suggest
from igpt.files import atomic_file


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        InputError: no such file, a syntax error, or something else than a mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        # Only almost every JSON is YAML: not one that is indented with tabs.
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no settings file {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; a settings file is needed here") from None
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} should hold settings as 'name: value' lines")
    return values


class Config(BaseModel):
    """Base of all settings: immutable, and a key it does not know is an error that names the nearest one it does."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def layered(cls, *layers: Mapping[str, Any], where: str = "settings") -> Self:
        """Settings from several mappings, each overriding the ones before it; `where` names them in errors.

        Raises:
            InputError: an unknown key (the nearest known one is named) or a value that does not fit.
        """
        merged: dict[str, Any] = {}
        for layer in layers:
            merged.update(layer)
        for key in merged:
            if key not in cls.model_fields:
                raise InputError(f"unknown key {key!r} in {where}; {suggest(str(key), cls.model_fields)}")
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            if first["type"] == "missing":
                raise InputError(f"{where}: {name} is missing, and has no default") from None
            given = f"{name} = {first['input']!r}: " if name else ""
            raise InputError(f"{where}: {given}{reason}") from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Settings from a YAML or JSON file."""
        return cls.layered(read_settings(path), where=str(path))

    def save(self, path: Path) -> None:
        """Writes the settings, atomically: JSON if `path` ends in .json, otherwise YAML."""
        values = self.model_dump(mode="json")
        if path.suffix == ".json":
            text = json.dumps(values, indent=2) + "\n"
        else:
            import yaml

            text = yaml.safe_dump(values, sort_keys=False)
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
