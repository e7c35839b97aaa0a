"""Runs every example of the manual anew, and writes what came out back into its page: `python
docs/examples.py`.

An example is a block marked `console`: lines that begin with "$ " are commands, those below are
what they print. All run in one empty folder, in the order of the navigation, so that a page uses
what those before it have made. Blocks marked `bash` are commands that need a GPU or the network;
they are not run. Pictures of the runs that pages show are copied.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from PIL import Image

DOCS = Path(__file__).parent
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# By their names in the folder of the runs.
PICTURES = {
    "runs/tiny/samples.png": "samples.png",
    "runs/tiny/completions.png": "completions.png",
    "masked.png": "masked.png",
    "losses.png": "losses.png",
    "tokens/digits.png": "digits.png",
}
SECONDS = 1800
WIDEST = 1100  # pixels of a picture


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whatever tags it has."""


def pages() -> list[Path]:
    """The pages of the navigation, in order."""
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
    """The commands of a block; one goes on in the next line after a backslash, or while a quotation
    is open."""
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
    """What a command prints, in a terminal of 120 columns without colours."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
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


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        for page in pages():
            if not page.exists():
                continue

            def run(block: re.Match[str]) -> str:
                told = []
                for command in commands(block[1]):
                    print(f"$ {command}", flush=True)
                    told += [f"$ {command}", *filter(None, [output(command, folder)])]
                return "\n".join(["```console", *told, "```"])

            text = page.read_text()
            made = BLOCK.sub(run, text)
            if made != text:
                page.write_text(made)
        for source, target in PICTURES.items():
            picture = Image.open(folder / source).convert("RGB")
            picture.thumbnail((WIDEST, WIDEST))
            picture.quantize(64).save(DOCS / "pictures" / target, optimize=True)


if __name__ == "__main__":
    main()
