"""A module imports only from packages above its own, or from earlier modules of its own package."""

import ast
import subprocess
import sys
from pathlib import Path

import igpt

PACKAGE = Path(igpt.__file__).parent
MODULES = [
    "interrupts",
    "console",
    "errors",
    "progress",
    "allocator",
    "files",
    "remote",
    "outputs",
    "locks",
    "hub",
    "builtin_models",
    "environment",
    "statistics",
    "config",
    "data/arrays",
    "data/left_out",
    "data/images/decode",
    "data/images/transform",
    "data/images/masks",
    "data/images/grid",
    "data/images/photographs",
    "data/images/palette",
    "data/images/palette_picture",
    "data/tokens/manifest",
    "data/tokens/shards",
    "data/tokens/cache",
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
    "data/sources/zips",
    "data/sources/remote",
    "data/sources/tars",
    "data/sources/tables",
    "data/sources/unpacking",
    "data/sources/archives",
    "data/sources/catalogue",
    "data/tokenizer",
    "data/palette_fit",
    "data/pool",
    "data/ray_pool",
    "data/parts",
    "data/prepare",
    "data/image_set",
    "data/merge",
    "model/precision",
    "model/cpu",
    "model/norm",
    "model/variants",
    "model/objectives",
    "model/config",
    "model/locate",
    "model/directory",
    "model/transformer",
    "model/match",
    "model/images",
    "model/cost",
    "model/resolution",
    "model/conditions",
    "model/classifier",
    "model/openai",
    "model/onnx_export",
    "sampling/jobs",
    "sampling/colors",
    "sampling/products",
    "sampling/decoder",
    "sampling/raster",
    "sampling/rounds",
    "sampling/sampler",
    "sampling/images",
    "sampling/grids",
    "evaluation/features",
    "evaluation/gather",
    "evaluation/logistic_regression",
    "evaluation/neighbours",
    "evaluation/results",
    "evaluation/feature_quality",
    "evaluation/probe_classifier",
    "evaluation/likelihood",
    "evaluation/probe",
    "evaluation/loss_maps",
    "evaluation/published",
    "evaluation/export",
    "evaluation/parts",
    "evaluation/quality",
    "evaluation/estimator",
    "training/presets",
    "training/muon",
    "training/shared_updates",
    "training/optimizer",
    "training/trackers",
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
    "training/pretrained",
    "training/pretrain",
    "training/classification",
    "training/finetune",
    "planning/plan",
    "report/record",
    "report/findings",
    "report/figures",
    "report/comparison",
    "report/sections",
    "report/page",
    "report/run_comparison",
    "report/card",
    "report/reproduction",
    "reproduction/scale",
    "reproduction/steps",
    "reproduction/processes",
    "reproduction/schedule",
    "reproduction/runner",
    "reproduction/evidence",
    "reproduction/features",
    "reproduction/transfer",
    "reproduction/questions",
    "reproduction/reproduce",
    "webapp/markup",
    "webapp/guard",
    "webapp/about",
    "webapp/downloads",
    "webapp/handlers",
    "webapp/server",
    "api",
    "cli/parser",
    "cli/run",
    "cli/__init__",
    "cli/spread",
    "cli/data",
    "cli/models",
    "cli/training",
    "cli/sampling",
    "cli/evaluation",
    "cli/image_values",
    "cli/sharing",
    "cli/pipeline",
    "cli/demo",
    "cli/reproduce",
    "__main__",
]
ALLOWED_EVERYWHERE = {"igpt"}  # the package itself, for its version


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & {dotted_name(path) for path in MODULES} or {node.module or ""}
    return {name for name in found if name.split(".")[0] == "igpt"} - ALLOWED_EVERYWHERE


def dotted_name(path: str) -> str:
    return "igpt." + path.replace("/", ".").removesuffix(".__init__")


def test_every_module_is_listed() -> None:
    files = {
        str(path.relative_to(PACKAGE).with_suffix(""))
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "cli"
    }
    assert files == set(MODULES)


def test_modules_import_only_from_modules_listed_above() -> None:
    for index, path in enumerate(MODULES):
        above = {dotted_name(earlier) for earlier in MODULES[:index]}
        wrong = imports(PACKAGE / f"{path}.py") - above
        assert not wrong, f"{path}.py imports {wrong}, which is not listed above it"


def test_evaluation_never_imports_training_nor_report_torch() -> None:
    for path in (PACKAGE / "evaluation").glob("*.py"):
        assert not any(name.startswith("igpt.training") for name in imports(path)), path
    for path in (PACKAGE / "report").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torch" for name in names), path


def test_training_needs_few_packages() -> None:
    """Training can be imported with torch, NumPy, safetensors, pydantic and rich alone."""
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


def test_importing_the_command_line_does_not_import_torch() -> None:
    code = (
        "import sys, igpt, igpt.cli; assert 'torch' not in sys.modules, 'the help must not "
        "import torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
