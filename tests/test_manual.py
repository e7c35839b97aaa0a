"""The manual: its commands and flags exist, its Python runs, and its pages and pictures exist."""

import contextlib
import importlib.util
import io
import pkgutil
import re
import shlex
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from igpt.cli import COMMANDS
from igpt.data.tokens.dataset import TokenDataset
from igpt.model.objectives import OBJECTIVES
from igpt.model.onnx_export import export_onnx
from igpt.model.transformer import ImageGPT
from igpt.training.presets import MODELS, PURPOSES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FLAG = re.compile(r"--?[a-z][\w-]*")
OTHER_PROGRAMS = {
    "--nproc-per-node",
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--strict",
    "--logdir",
    "--project",
    "--backend-store-uri",
    "--help",
    "--version",
}


def script(name: str) -> ModuleType:
    """Import one of the programs in docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flags() -> Any:
    return script("flags").flags


def blocks(text: str, *languages: str) -> list[str]:
    return [block for language, block in BLOCK.findall(text) if language in languages]


def igpt_commands(text: str) -> list[list[str]]:
    """Return the words after `igpt` of every example in a page: lines after a `$ `, and all lines
    of `bash` blocks."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(
        r"^\$ (.*)", "\n".join(blocks(text, "console")).replace("\\\n", " "), flags=re.MULTILINE
    )
    found = [re.search(r"^(?:torchrun .*-m )?igpt (.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def test_every_command_has_a_section_with_an_example_and_its_flags() -> None:
    sections: dict[str, str] = {}
    for page in (DOCS / "commands").glob("*.md"):
        text = BLOCK.sub(
            lambda block: block[0].replace("\n#", "\n "), page.read_text()
        )  # comments are not headings
        for part in re.split(r"^(?=##? )", text, flags=re.MULTILINE):
            title, _, below = part.partition("\n")
            sections[title.lstrip("# ")] = below
    for command in COMMANDS:
        section = sections.get(command, "")
        assert f"<!-- flags: {command} -->" in section, f"igpt {command} has no section of its own"
        assert command in {words[0] for words in igpt_commands(section)}, (
            f"there is no example of igpt {command}"
        )


def test_every_flag_of_an_example_exists(flags: Any) -> None:
    seen = 0
    for page in PAGES:
        text = page.read_text()
        for command, *words in igpt_commands(text):
            assert command in COMMANDS, f"{page}: igpt {command}"
            known = {name for flag in flags(command) for name in flag.names}
            given = {word for word in words if FLAG.fullmatch(word)}
            shown_as_mistakes = set(re.findall(rf"igpt {command}: unknown flag (--[\w-]+)", text))
            assert given - known == given & shown_as_mistakes, (
                f"{page}: igpt {command} has no {given - known}"
            )
            seen += len(given)
    assert seen > 100


def test_every_flag_in_the_text_exists(flags: Any) -> None:
    known = {
        name for command in COMMANDS for flag in flags(command) for name in flag.names
    } | OTHER_PROGRAMS
    for page in PAGES:
        if page.name != "LOG.md":  # it also describes earlier versions
            text = BLOCK.sub("", page.read_text())
            named = {
                word
                for code in re.findall(r"`([^`\n]+)`", text)
                for word in re.findall(r"--[a-z][\w-]*", code)
            }
            assert named <= known, f"{page}: {named - known}"


def test_the_tables_contain_every_setting(flags: Any) -> None:
    from igpt.training.pretrain import PretrainConfig

    named = {flag.name for flag in flags("pretrain")}
    for setting in PretrainConfig.model_fields:
        assert setting in named
    (chosen,) = (flag for flag in flags("pretrain") if "--objective" in flag.names)
    assert (chosen.choices, chosen.default) == (("autoregressive", "bert"), "autoregressive")
    (several,) = (flag for flag in flags("probe") if "--strengths" in flag.names)
    assert (several.kind, several.nargs) == ("FLOAT", "+")
    assert all(flag.help for command in COMMANDS for flag in flags(command))


def test_the_table_of_presets_has_their_settings() -> None:
    assert "<!-- presets: pretrain -->" in (DOCS / "commands" / "training.md").read_text()
    table = script("flags").on_page_markdown("<!-- presets: pretrain -->", page=None)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(row) for row in rows} == {len(rows[0])}
    by_name = {row[0].strip("`"): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert by_name.keys() == MODELS.keys() == PURPOSES.keys()
    for name, recipe in MODELS.items():
        shown = by_name[name]
        assert shown["shape"] == f"{recipe['n_layer']} x {recipe['n_embd']}"
        assert shown["px"] == str(recipe.get("resolution", "any"))
        assert float(shown["rate"]) == recipe["learning_rate"]
        assert shown["batch"] == str(recipe["batch_size"])
        assert int(shown["steps"].replace(" k", "000").replace(" M", "000000")) == recipe["steps"]
        assert (shown["optimizer"], shown["for"]) == (
            recipe.get("optimizer", "adamw"),
            PURPOSES[name],
        )


def test_the_copy_button_copies_commands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)  # as MkDocs does
    hook = script("copying").on_page_content
    block = '```console\n$ one \\\n  -o x\nits output\n$ python -c "\n1 < 2\n"\n3\n```\n'
    page = SimpleNamespace(markdown=block, file=SimpleNamespace(src_path="x.md"))
    shown = '<div class="language-console highlight">'
    copied = "one \\&#10;  -o x&#10;python -c &quot;&#10;1 &lt; 2&#10;&quot;"
    assert hook(shown, page) == f'{shown[:-1]} data-copy="{copied}">'
    assert hook(shown + shown, page) == shown + shown  # with a warning


def test_pages_and_links_exist() -> None:
    nav = script("examples").pages()
    assert {page for page in nav if not page.exists()} == set()
    assert {page for page in PAGES if page not in nav} == set()
    for page in PAGES:
        text = BLOCK.sub("", page.read_text())
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in link or (page.parent / link).exists(), f"{page} links to {link}"


def test_pictures_are_those_that_their_program_draws(tmp_path: Path) -> None:
    pictures = script("pictures")
    pictures.OUT = tmp_path
    for draw in pictures.ALL:
        draw()
    made = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_text() for file in (DOCS / "pictures").glob("*.svg")}


def test_every_name_of_the_architecture_page_exists() -> None:
    """Check dotted names: one that was moved or renamed would make the page wrong without a
    warning."""
    names = re.findall(r"`(igpt(?:\.\w+)+)`", (DOCS / "architecture.md").read_text())
    assert len(names) > 40
    for name in names:
        assert pkgutil.resolve_name(name) is not None, name


def test_pictures_are_small_files() -> None:
    for picture in (DOCS / "pictures").iterdir():
        assert picture.stat().st_size < 32_000, picture


@pytest.mark.parametrize(
    "page",
    [
        "extending/objective",
        "extending/source",
        "extending/model",
        "python/index",
        "python/training",
        "commands/sampling",
        "commands/sharing",
    ],
)
def test_python_blocks_run(
    page: str,
    digits: TokenDataset,
    short_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run the blocks that begin with an import, after writing those that begin with a file name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("tokens").mkdir()
    Path("tokens/digits").symlink_to(digits.path)
    Path("runs").mkdir()
    Path("runs/tiny").symlink_to(short_run)
    if page == "commands/sharing":
        export_onnx(ImageGPT.from_pretrained("runs/tiny/model"), Path("tiny-onnx"))
    for code in blocks((DOCS / f"{page}.md").read_text(), "python"):
        if named := re.match(r"# (\w+\.py)\n", code):
            Path(named[1]).write_text(code)
    programs = [
        code
        for code in blocks((DOCS / f"{page}.md").read_text(), "python")
        if code.startswith(("import ", "from "))
    ]
    assert programs
    for code in programs:
        with contextlib.redirect_stdout(io.StringIO()), patch.dict(OBJECTIVES):
            exec(compile(code, page, "exec"), {"__name__": "an_example"})
