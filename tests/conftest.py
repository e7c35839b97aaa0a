"""Session-scoped fixtures: small token data sets and trained runs, made once by the real
commands."""

import contextlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

# Set before any import that reads them, and inherited by all processes that tests start: two test
# processes share two cores.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ["GRADIO_TEMP_DIR"] = str(Path(tempfile.gettempdir()) / f"gradio-{os.getpid()}")

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from igpt import builtin_models
from igpt.cli import main
from igpt.data.images import palette
from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens.dataset import TokenDataset

from .helpers.sample_images import ImageSets, write_sample_sets

# A shell that starts the tests with `&` makes them ignore SIGINT, and all processes that they start
# inherit that. Restore the default handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

Run = Callable[..., subprocess.CompletedProcess[str]]
PROJECT = Path(__file__).parents[1]
REAL_SETS = PROJECT.parent / "shared" / "data"
SHORT = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "batch_size": 16,
    "steps": 24,
    "warmup_steps": 4,
    "learning_rate": 3e-3,
    "precision": "fp32",
    "log_every": 1,
    "validate_every": 8,
    "checkpoint_every": 6,
    "validation_images": 32,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread: small shapes gain nothing from more, and a fixed number gives the same sums
    on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a temporary cache for `datasets` instead of the user's."""
    cache = str(tmp_path_factory.mktemp("datasets-cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", cache)  # of processes that the tests start
        yield


@pytest.fixture(scope="session", autouse=True)
def _tables_once() -> Iterator[None]:
    """Cache the tables of nearest colours of a few palettes: each takes half a second for 512
    colours."""
    made = lru_cache(6)(
        lambda centers, shape: _nearest_table(np.frombuffer(centers, np.float32).reshape(shape))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            palette, "_nearest_table", lambda centers: made(centers.tobytes(), centers.shape)
        )
        yield


_nearest_table = palette._nearest_table


@pytest.fixture(scope="session")
def short() -> dict[str, object]:
    """Return the settings of a pretraining run that takes a second or two."""
    return dict(SHORT)


@pytest.fixture(scope="session")
def short_flags(short: dict[str, object]) -> list[str]:
    """Return the same settings as flags of `igpt pretrain`."""
    return [
        word for key, value in short.items() for word in (f"--{key.replace('_', '-')}", str(value))
    ]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Prepare the bundled digits as tokens."""
    return prepare("digits", tmp_path_factory.mktemp("tokens") / "digits", PrepareConfig(size=8))


@pytest.fixture(scope="session")
def igpt() -> Run:
    """Run the command line in this process, which saves the time of the imports:
    `igpt("probe", model, tokens)`."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(word) for word in words])
        return subprocess.CompletedProcess(list(words), code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def short_run(
    igpt: Run,
    digits: TokenDataset,
    short_flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Train for 24 steps on the digits, by the command line."""
    run = tmp_path_factory.mktemp("runs") / "short"
    done = igpt("pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def packaged(
    short_run: Path, digits: TokenDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Package the short run as the built-in model photos-16, in a folder of the tests."""
    folder = tmp_path_factory.mktemp("packaged")
    shutil.copytree(short_run, folder / "run", ignore=shutil.ignore_patterns("checkpoints"))
    program = PROJECT / "experiments" / "photos-16" / "package.py"
    spec = importlib.util.spec_from_file_location("package_photos_16", program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(builtin_models, "FOLDER", folder / "builtin")
        words = [str(folder / "run"), str(digits.path), str(digits.path)]
        module.main([*words, "--limit", "100", "--fitted", "100"])
    return folder / "builtin" / builtin_models.DEFAULT_MODEL


@pytest.fixture
def builtin_model(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use the small packaged model in place of the built-in one; return its folder."""
    monkeypatch.setattr(builtin_models, "FOLDER", packaged.parent)
    return packaged


@pytest.fixture
def no_builtin_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behave like a build without a built-in model."""
    monkeypatch.setattr(builtin_models, "FOLDER", tmp_path / "no-builtin-models")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 48 colour images in two classes: horizontal and vertical gradients with
    noise."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for index in range(48):
        ramp = np.linspace(0, 200, 20)
        grid = (
            np.broadcast_to(ramp, (20, 20))
            if index % 2
            else np.broadcast_to(ramp[:, None], (20, 20))
        )
        picture = grid[..., None] * generator.uniform(0.5, 1, 3) + generator.uniform(
            0, 50, (20, 20, 3)
        )
        class_folder = folder / "train" / ("across" if index % 2 else "down")
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(class_folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def made_sets(tmp_path_factory: pytest.TempPathFactory) -> ImageSets:
    """Return image sets made of scikit-learn's photographs, for tests that need no real images."""
    folder = tmp_path_factory.mktemp("made-sets")
    write_sample_sets(folder)
    return ImageSets(folder, real=False)


@pytest.fixture(scope="session", params=["made", "real"] if REAL_SETS.is_dir() else ["made"])
def image_sets(request: pytest.FixtureRequest, made_sets: ImageSets) -> ImageSets:
    """Return the made image sets; and CIFAR-10, Tiny ImageNet and 100 ImageNet photographs where
    the checkout has them."""
    return ImageSets(REAL_SETS, real=True) if request.param == "real" else made_sets


@pytest.fixture(scope="session")
def small_images(image_sets: ImageSets) -> NDArray[np.uint8]:
    """Return colour images: uint8 [200, 32, 32, 3]."""
    return image_sets.small_images()
