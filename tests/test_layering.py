"""The house: a file imports only from rooms above its own, or from earlier files of its own
room."""

import ast
import subprocess
import sys
from pathlib import Path

import igpt

HOME = Path(igpt.__file__).parent
HOUSE = [
    "interrupts",
    "console",
    "errors",
    "progress",
    "allocator",
    "files",
    "locks",
    "hub",
    "environment",
    "statistics",
    "config",
    "data/arrays",
    "data/left_out",
    "data/images/decode",
    "data/images/transform",
    "data/images/masks",
    "data/images/grid",
    "data/images/palette",
    "data/tokens/manifest",
    "data/tokens/shards",
    "data/tokens/dataset",
    "data/tokens/labels",
    "data/tokens/batches",
    "data/tokens/inspect",
    "data/sources/file_kinds",
    "data/sources/classes",
    "data/sources/readers",
    "data/sources/splits",
    "data/sources/metadata",
    "data/sources/folders",
    "data/sources/tars",
    "data/sources/tables",
    "data/sources/unpacking",
    "data/sources/archives",
    "data/sources/catalogue",
    "data/tokenizer",
    "data/palette_fit",
    "data/pool",
    "data/prepare",
    "data/image_set",
    "data/merge",
    "model/precision",
    "model/cpu",
    "model/norm",
    "model/variants",
    "model/objectives",
    "model/config",
    "model/directory",
    "model/transformer",
    "model/images",
    "model/cost",
    "model/resolution",
    "model/classifier",
    "model/openai",
    "model/onnx_export",
    "sampling/decoder",
    "sampling/sampler",
    "sampling/grids",
    "training/presets",
    "training/muon",
    "training/optimizer",
    "training/settings",
    "training/signals",
    "training/distributed",
    "training/memory",
    "training/parallelize",
    "training/engine",
    "training/checkpoints",
    "training/metrics",
    "training/run_directory",
    "training/trainer",
    "training/pretrain",
    "training/classification",
    "training/finetune",
    "planning/plan",
    "evaluation/features",
    "evaluation/logistic_regression",
    "evaluation/results",
    "evaluation/probe_classifier",
    "evaluation/probe",
    "evaluation/likelihood",
    "evaluation/loss_maps",
    "evaluation/published",
    "evaluation/export",
    "evaluation/estimator",
    "report/record",
    "report/findings",
    "report/figures",
    "report/comparison",
    "report/sections",
    "report/page",
    "report/card",
    "report/reproduction",
    "reproduction/scale",
    "reproduction/steps",
    "reproduction/processes",
    "reproduction/runner",
    "reproduction/evidence",
    "reproduction/features",
    "reproduction/transfer",
    "reproduction/questions",
    "reproduction/reproduce",
    "webapp/markup",
    "webapp/guard",
    "webapp/about",
    "webapp/handlers",
    "webapp/server",
    "cli/parser",
    "cli/run",
    "cli/__init__",
    "cli/data",
    "cli/training",
    "cli/evaluation",
    "cli/sampling",
    "cli/sharing",
    "cli/pipeline",
    "cli/demo",
    "cli/reproduce",
    "__main__",
]
MAY_BE_USED_FROM_ANYWHERE = {"igpt"}  # the package itself: its version


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & {module(place) for place in HOUSE} or {node.module or ""}
    return {name for name in found if name.split(".")[0] == "igpt"} - MAY_BE_USED_FROM_ANYWHERE


def module(place: str) -> str:
    return "igpt." + place.replace("/", ".").removesuffix(".__init__")


def test_every_file_has_its_place() -> None:
    files = {
        str(path.relative_to(HOME).with_suffix(""))
        for path in HOME.rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "cli"
    }
    assert files == set(HOUSE)


def test_data_flows_down_the_page() -> None:
    for index, place in enumerate(HOUSE):
        above = {module(earlier) for earlier in HOUSE[:index]}
        wrong = imports(HOME / f"{place}.py") - above
        assert not wrong, f"{place}.py imports {wrong}, which is not above it"


def test_evaluation_never_imports_training_nor_report_torch() -> None:
    for path in (HOME / "evaluation").glob("*.py"):
        assert not any(name.startswith("igpt.training") for name in imports(path)), path
    for path in (HOME / "report").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torch" for name in names), path


def test_training_needs_few_packages() -> None:
    """Training imports with torch, NumPy, safetensors, pydantic and rich alone."""
    absent = [
        "PIL",
        "datasets",
        "sklearn",
        "scipy",
        "huggingface_hub",
        "matplotlib",
        "jinja2",
        "gradio",
        "yaml",
    ]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({absent}))"
    code = f"{blocked}; import igpt.training.pretrain, igpt.training.finetune"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, igpt, igpt.cli; assert 'torch' not in sys.modules, 'help should not "
        "wait for torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
