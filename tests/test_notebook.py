"""The notebook of the manual: its cells run, and its page shows it."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """Import docs/notebook.py."""
    spec = importlib.util.spec_from_file_location("docs_notebook", DOCS / "notebook.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_notebook(program: ModuleType) -> None:
    text, at = (DOCS / "notebook.md").read_text(), 0
    for cell in json.loads(program.NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        at = text.index(f"```python\n{source}\n```" if is_code else source, at)
        assert not cell.get("outputs"), "outputs belong to the page"
    files = {f"pictures/{file.name}" for file in (DOCS / "pictures").glob("notebook-*.png")}
    assert set(re.findall(r"pictures/notebook-\d+\.png", text)) == files
    assert len(files) == 5


def test_all_cells_run(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the notebook in a kernel, with fewer steps; a cell that fails raises its error."""
    pytest.importorskip("nbclient", reason="needs the extra dev")
    pytest.importorskip("ipykernel", reason="needs the extra dev")
    import nbformat

    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    text = program.NOTEBOOK.read_text()
    for usual, fewer in (("steps = 200", "steps = 2"), ("limit=1000", "limit=60")):
        assert usual in text
        text = text.replace(usual, fewer)
    done = program.run(nbformat.reads(text, as_version=4))
    cells = [cell for cell in done["cells"] if cell["cell_type"] == "code"]
    _, pictures = program.page(done)
    assert len(pictures) == 5
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    said = "".join(out.get("text", "") for out in cells[-1]["outputs"])
    assert "test accuracy" in said
