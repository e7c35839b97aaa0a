"""The ranges in pyproject.toml and the versions in constraints.txt, which are the upper ends that
tests use."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from .helpers import floors

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
DIRECT = [*floors.requirements([]), *floors.requirements(list(EXTRAS))]


def pins() -> dict[str, Version]:
    """Return the version of each package in constraints.txt."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, version = line.split("==")
        assert canonicalize_name(name) not in found, f"{name} is there twice"
        found[canonicalize_name(name)] = Version(version)
    return found


@pytest.mark.parametrize("line", DIRECT)
def test_the_tested_version_is_pinned_and_within_the_range(line: str) -> None:
    requirement = Requirement(line)
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt lacks {requirement.name}"
    assert pin in requirement.specifier, f"constraints.txt has {requirement.name} {pin}"


@pytest.mark.parametrize("line", DIRECT)
def test_the_lowest_version_of_a_range_is_within_it_and_lower_ones_are_not(line: str) -> None:
    requirement = Requirement(line)
    name, version = floors.floor(line).split("==")
    assert Requirement(name).name == requirement.name
    assert requirement.specifier.contains(version)
    assert not requirement.specifier.contains(f"{version}.dev0", prereleases=True)


def test_requirements_of_the_package_and_of_extras_are_distinguished() -> None:
    assert "torch" in {Requirement(line).name for line in floors.requirements([])}
    assert {Requirement(line).name for line in floors.requirements(["app"])} == {"gradio"}
    assert len({Requirement(line).name for line in DIRECT}) == len(DIRECT)


@pytest.mark.parametrize(
    ("requirement", "lowest"),
    [
        ("torch>=2.11", "torch==2.11"),
        ("numpy>=1.26.4,<3", "numpy==1.26.4"),
        ("mkdocstrings[python]>=1.0", "mkdocstrings[python]==1.0"),
    ],
)
def test_the_lowest_version_is_found(requirement: str, lowest: str) -> None:
    assert floors.floor(requirement) == lowest


@pytest.mark.parametrize(
    "requirement", ["rich", "rich<15", "rich>13", "rich==14.3", "rich~=14.3", "rich>=14,!=14.1"]
)
def test_a_requirement_without_a_lower_bound_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match="has no lower bound"):
        floors.floor(requirement)
