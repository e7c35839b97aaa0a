"""Print the lowest version that pyproject.toml allows of each dependency: `torch==2.11`, one per line for pip."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def direct_dependencies() -> list[str]:
    """Return the requirements of the package and of all its extras, as pyproject.toml has them."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    return [*project["dependencies"], *(line for extra in extras for line in extra)]


def floor(requirement: str) -> str:
    """Return the lowest version that a requirement allows: `numpy==1.26` of `numpy>=1.26,<3`.

    Raises ValueError where the requirement has no lower bound, because such a requirement allows
    versions that nobody has tried.
    """
    found = re.match(r"(?P<name>[\w.-]+(\[[\w,-]+\])?)>=(?P<version>[\d.]+)(,|$)", requirement)
    if found is None:
        raise ValueError(f"{requirement!r} has no lower bound: write name>=version first")
    return f"{found['name']}=={found['version']}"


if __name__ == "__main__":
    print("\n".join(floor(requirement) for requirement in direct_dependencies()))
