"""Run docs/digits.ipynb, and write its cells and their outputs as a page of the manual.

    python docs/notebook.py

The page is docs/notebook.md; its pictures are docs/pictures/notebook-1.png and so on. The notebook
itself is kept without outputs, so that pictures are stored once.
"""

import base64
import re
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
NOTEBOOK = DOCS / "digits.ipynb"
SECONDS = 600  # of a cell
PROGRESS = re.compile(r"^.* left\)\n", re.MULTILINE)
HEADER = """<!-- Made by docs/notebook.py from docs/digits.ipynb. -->

"""


def run(notebook: Any) -> Any:
    """Run the cells of a notebook in a kernel and an empty folder, and store their outputs."""
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}})
        return client.execute()


def cleaned(output: Any) -> Any:
    """Return an output without what depends on the machine, or None if nothing is left."""
    if output["output_type"] == "stream":
        if output["name"] == "stderr":  # warnings of other packages
            return None
        output["text"] = PROGRESS.sub("", output["text"])
        return output if output["text"] else None
    return output


def page(notebook: dict[str, Any]) -> tuple[str, list[bytes]]:
    """Return a notebook with its outputs as Markdown, and its pictures as PNG."""
    parts: list[str] = []
    pictures: list[bytes] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for is_text, outputs in groupby(cell["outputs"], key=lambda output: "text" in output):
            if is_text:  # lines that were printed one by one
                printed = "".join("".join(output["text"]) for output in outputs)
                parts.append(f"```text\n{printed.rstrip()}\n```")
                continue
            for data in (output["data"] for output in outputs):
                if "image/png" in data:
                    pictures.append(base64.b64decode(data["image/png"]))
                    picture = f"pictures/notebook-{len(pictures)}.png"
                    parts.append(f"![Output of the cell above]({picture})")
                else:
                    parts.append(f"```text\n{''.join(data['text/plain'])}\n```")
    return HEADER + "\n\n".join(parts) + "\n", pictures


def main() -> None:
    import nbformat

    notebook = run(nbformat.read(NOTEBOOK, as_version=4))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [shown for output in cell["outputs"] if (shown := cleaned(output))]
    text, pictures = page(notebook)
    (DOCS / "notebook.md").write_text(text)
    for old in (DOCS / "pictures").glob("notebook-*.png"):
        old.unlink()
    for number, picture in enumerate(pictures, 1):
        (DOCS / "pictures" / f"notebook-{number}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
