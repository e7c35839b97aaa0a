"""Copy the page of a reproduction into the manual.

python docs/record_reproduction.py runs/reproduction-cpu
"""

import json
import shutil
import sys
from pathlib import Path

from igpt.report.reproduction import FIGURES, write_page

DOCS = Path(__file__).parent
HOME = DOCS / "reproduction"


def main(folder: Path) -> None:
    """Write docs/reproduction.md and docs/reproduction/ from evidence.json and pictures/."""
    evidence = json.loads((folder / "evidence.json").read_text())
    page = write_page(folder, evidence)
    shutil.rmtree(HOME, ignore_errors=True)
    shutil.copytree(folder / FIGURES, HOME / FIGURES)
    shutil.copy(page, HOME / "report.html")
    shutil.copy(folder / "evidence.json", HOME)
    text = (folder / "report.md").read_text()
    text = text.replace(f"]({FIGURES}/", f"]({HOME.name}/{FIGURES}/")
    title, rest = text.split("\n", 1)
    source = (
        f"Recorded with `{evidence['environment']['command']}`. "
        f"[The command](commands/reproduce.md); "
        f"[this page as a single file]({HOME.name}/report.html); "
        f"[all numbers]({HOME.name}/evidence.json)."
    )
    (DOCS / "reproduction.md").write_text(f"{title}\n\n{source}\n{rest}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
