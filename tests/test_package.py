"""The source distribution and the wheel: both are complete, and the wheel works without the
checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from igpt import __version__

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "benchmarks", "docs", "experiments", "tests")
# What Python starts with when no variable of the tests leads it to the checkout.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
PROGRAM = """
import sys
from pathlib import Path
import igpt
from igpt.cli import main
print(igpt.__file__)
for words in (
    ["demo", "--data", "images", "--steps", "1", "-o", "run"],
    ["complete", "run", "images/0.png", "--completions", "1"],
    ["complete", "images/0.png", "--completions", "1"],
):
    assert main(words) == 0, words
"""


def run(*words: object, cwd: Path) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=cwd, env=CLEAN)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the source distribution from a copy of the checkout, and the wheel from the former."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "checkout").mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "checkout")
        elif path.name in FOLDERS:
            ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
            shutil.copytree(path, folder / "checkout" / path.name, ignore=ignored)
    run(
        sys.executable, "-m", "build", "--no-isolation", "-o", folder, "checkout", cwd=folder
    )  # without the network
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


def test_the_packages_contain_every_file(built: tuple[Path, Path]) -> None:
    source, wheel = built
    modules = {
        f"igpt/{file.relative_to(ROOT / 'src' / 'igpt')}"
        for file in (ROOT / "src" / "igpt").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = message_from_bytes(archive.read(metadata))
    assert {name for name in names if ".dist-info/" not in name} == modules
    assert f"{metadata.removesuffix('METADATA')}licenses/LICENSE" in names
    assert (about["Version"], about["License-Expression"]) == (__version__, "MIT")
    with tarfile.open(source) as archive:
        stored = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {f"src/{name}" for name in modules} | {
        str(file.relative_to(ROOT))
        for folder in FOLDERS[1:]
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    wanted |= {"LICENSE", "CITATION.cff", "CHANGELOG.md", "constraints.txt", "Makefile"}
    assert wanted <= stored, sorted(wanted - stored)


def test_the_wheel_works_in_an_environment_of_its_own(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    """Install the wheel, and run the demo on images without labels, and a completion."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"),
        *("--no-deps", "--disable-pip-version-check", built[1]),
        cwd=tmp_path,
    )
    installed = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # The requirements come from the environment of the tests. Lines of its own .pth files, which
    # lead to the checkout, are not read.
    (installed / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(20):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    assert run(home / "bin" / "igpt", "--version", cwd=tmp_path).strip() == __version__
    said = run(python, "-c", PROGRAM, cwd=tmp_path)
    assert Path(said.partition("\n")[0]).is_relative_to(installed)
    assert "no probe: a probe needs labels" in said
    assert "needs labels" in (tmp_path / "run" / "report.html").read_text()
    for name in ("samples.png", "completions.png"):
        assert (tmp_path / "run" / name).exists(), name


def test_one_version_is_stated_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (citation["version"], changes[0]) == (__version__, __version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"]
