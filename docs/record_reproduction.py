"""Copy the page of a reproduction into the manual.

python docs/record_reproduction.py runs/reproduction-cpu
python docs/record_reproduction.py runs/reproduction-night reproduction-night  # as another page
"""

import json
import shutil
import sys
from pathlib import Path

from igpt.report.reproduction import FIGURES, write_page

DOCS = Path(__file__).parent


def main(folder: Path, name: str = "reproduction") -> None:
    """Write docs/NAME.md and docs/NAME/ from evidence.json and pictures/."""
    home = DOCS / name
    evidence = json.loads((folder / "evidence.json").read_text())
    page = write_page(folder, evidence)
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(folder / FIGURES, home / FIGURES)
    shutil.copy(page, home / "report.html")
    shutil.copy(folder / "evidence.json", home)
    text = (folder / "report.md").read_text()
    text = text.replace(f"]({FIGURES}/", f"]({home.name}/{FIGURES}/")
    title, rest = text.split("\n", 1)
    source = (
        f"Recorded with `{evidence['environment']['command']}`. "
        f"[The command](commands/reproduce.md); "
        f"[this page as a single file]({home.name}/report.html); "
        f"[all numbers]({home.name}/evidence.json)."
    )
    (DOCS / f"{name}.md").write_text(f"{title}\n\n{source}\n{rest}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
