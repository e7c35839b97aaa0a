"""Print the lowest versions that pyproject.toml allows, one per line for pip: `torch==2.11`.

python tests/helpers/floors.py            # of what the package needs
python tests/helpers/floors.py app dev    # of what these extras need
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """Return the requirements of extras, or without any those of the package, as written in
    pyproject.toml."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    if not extras:
        return project["dependencies"]
    return [
        requirement for extra in extras for requirement in project["optional-dependencies"][extra]
    ]


def floor(requirement: str) -> str:
    """Return the lowest version that a requirement allows: `numpy==1.26` of `numpy>=1.26,<3`.

    Raises ValueError where a requirement is not written as name>=version, because without a lower
    bound it allows versions that nobody has tried.
    """
    found = re.fullmatch(r"([\w.-]+(?:\[[\w,-]+\])?)>=([\d.]+)(?:,<[\d.]+)?", requirement)
    if found is None:
        raise ValueError(f"{requirement!r} has no lower bound: write name>=version")
    name, version = found.groups()
    return f"{name}=={version}"


if __name__ == "__main__":
    print("\n".join(floor(requirement) for requirement in requirements(sys.argv[1:])))
