"""Run every example of the manual, and write its output into its page: `python docs/examples.py`.

An example is a block marked `console`: lines that begin with "$ " are commands, and the lines below
are their output. All run in one empty folder, in the order of the navigation, so that a page can
use files made by earlier pages. There is an object store with the bucket lab-data, in which
photos.zip has 300 crops of each of scikit-learn's two photographs. Blocks marked `bash` are
commands that need a GPU or the network; they are not run. Pictures that the pages show are copied
from the runs.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
from tests.helpers.stores import object_store  # noqa: E402

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# By their names in the folder of the runs.
PICTURES = {
    "runs/tiny/samples.png": "samples.png",
    "runs/tiny/completions.png": "completions.png",
    "masked.png": "masked.png",
    "losses.png": "losses.png",
    "runs/gems/samples.png": "sprites.png",
    "runs/conditional/samples.png": "classes.png",
    "tokens/digits.png": "digits.png",
}
SECONDS = 1800
WIDEST = 1100  # pixels of a picture


class _Loader(yaml.SafeLoader):
    """Read mkdocs.yml, accepting any tags."""


def pages() -> list[Path]:
    """Return the pages of the navigation, in order."""
    _Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    found: list[Path] = []

    def walk(part: object) -> None:
        if isinstance(part, str):
            found.append(DOCS / part)
        for inner in (
            part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        ):
            walk(inner)

    walk(yaml.load((DOCS.parent / "mkdocs.yml").read_text(), _Loader)["nav"])
    return found


def commands(block: str) -> list[str]:
    """Return the commands of a block; one continues on the next line after a backslash, or in an
    open quotation."""
    found: list[str] = []
    goes_on = False
    for line in block.splitlines():
        if goes_on:
            found[-1] += f"\n{line}"
        elif line.startswith("$ "):
            found.append(line[2:])
        else:
            continue
        goes_on = line.endswith("\\") or found[-1].count('"') % 2 == 1
    return found


def output(command: str, folder: Path) -> str:
    """Return what a command prints, in a terminal of 120 columns without colours."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    environment["XDG_CACHE_HOME"] = str(folder / ".cache")
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        text=True,
        timeout=SECONDS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode not in (0, 2) or "Traceback" in done.stdout:
        raise SystemExit(f"{command} failed with {done.returncode}:\n{done.stdout}")
    shown = done.stdout.replace(str(folder), "/home/me")
    return "\n".join(line.rstrip() for line in shown.splitlines())


def photographs() -> bytes:
    """Return a ZIP archive of 300 crops of each of scikit-learn's photographs, in two folders."""
    content, random = io.BytesIO(), np.random.default_rng(0)
    with zipfile.ZipFile(content, "w") as archive:
        for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
            for number in range(300):
                top, left = (int(random.integers(side - 64)) for side in image.shape[:2])
                crop = io.BytesIO()
                Image.fromarray(image[top : top + 64, left : left + 64]).save(crop, "JPEG")
                archive.writestr(f"photos/{name}/{number:03d}.jpg", crop.getvalue())
    return content.getvalue()


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, object_store("lab-data") as store:
        folder = Path(temporary)
        store.pipe_file("lab-data/photos.zip", photographs())
        for page in pages():
            if not page.exists():
                continue

            def run(block: re.Match[str]) -> str:
                lines = []
                for command in commands(block[1]):
                    print(f"$ {command}", flush=True)
                    lines += [f"$ {command}", *filter(None, [output(command, folder)])]
                return "\n".join(["```console", *lines, "```"])

            text = page.read_text()
            made = BLOCK.sub(run, text)
            if made != text:
                page.write_text(made)
        for source, target in PICTURES.items():
            opened = Image.open(folder / source)
            picture = opened if opened.mode == "RGBA" else opened.convert("RGB")
            picture.thumbnail((WIDEST, WIDEST))
            picture.quantize(64).save(DOCS / "pictures" / target, optimize=True)


if __name__ == "__main__":
    main()
