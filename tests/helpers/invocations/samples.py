"""Valid inputs of every kind that igpt reads, made once by igpt itself: some seconds, some hundred
small files."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

TINY = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "batch_size": 8,
    "steps": 4,
    "warmup_steps": 0,
    "log_every": 1,
    "validate_every": 2,
    "checkpoint_every": 2,
    "validation_images": 8,
    "precision": "fp32",
}
FINETUNE = {
    "batch_size": 8,
    "steps": 4,
    "validate_every": 2,
    "checkpoint_every": 2,
    "validation_images": 8,
    "test_images": 8,
    "precision": "fp32",
}
SETTINGS = {
    "palette": {"size": 8, "colors": 4, "seed": 1, "held_out": 0.2, "filter": "area"},
    "prepare": {
        "size": 8,
        "colors": 4,
        "views": 0,
        "limit": 20,
        "max_bad": 0.5,
        "label_column": None,
    },
    "pretrain": {
        **TINY,
        "betas": [0.9, 0.95],
        "flip": False,
        "learning_rate": 0.003,
        "snapshots": [2],
    },
    "finetune": {**FINETUNE, "learning_rate": 0.001, "patience": 2, "generation_weight": 1.0},
    "probe": {
        "limit": 20,
        "strengths": [1.0],
        "layers": [1],
        "fold_back": False,
        "baselines": False,
    },
}
OPENAI = Path(__file__).parents[2] / "fixtures" / "openai" / "autoregressive"


def make_samples(folder: Path, *, long_work: bool = True) -> None:
    """Fill a folder with samples; without `long_work` there are none of `reproduce` and `demo`.

    Every step runs in a forked process, so that this one starts no thread. What a step imports is
    imported here too, for the later forks.
    """
    folder.mkdir(parents=True)
    steps = [
        _images,
        _settings,
        _tokens,
        _packed,
        _run,
        _of_the_run,
        _classifier,
        _unfinished,
        _archives,
    ]
    for step in [*steps, _long_work] if long_work else steps:
        for name in _in_a_fork(step, folder):
            with suppress(Exception):  # some modules cannot be imported by name
                import_module(name)


def _in_a_fork(step: Callable[[], None], folder: Path) -> list[str]:
    """Run a step in a folder; return the names of the modules that it imported."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(reader)
            os.chdir(folder)
            known = set(sys.modules)
            with Path(os.devnull).open("w") as nowhere:  # what the commands print
                os.dup2(nowhere.fileno(), 1)
            step()
            with os.fdopen(writer, "w") as pipe:
                pipe.write("\n".join(name for name in sys.modules if name not in known))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        names = pipe.read().split()
    _, status = os.waitpid(process, 0)
    if status:
        raise RuntimeError(f"the samples could not be made: {step.__name__.strip('_')} failed")
    return names


def _igpt(words: str) -> None:
    from igpt.cli import main

    if main(words.split()) != 0:
        raise RuntimeError(f"igpt {words} failed")


def picture(number: int, side: int = 12) -> bytes:
    """Return a PNG of random colours."""
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _images() -> None:
    for split, count in (("train", 10), ("test", 4)):
        for kind in ("a", "b"):
            class_folder = Path("images", split, kind)
            class_folder.mkdir(parents=True)
            for number in range(count):
                (class_folder / f"{number}.png").write_bytes(picture(len(kind) + number))
    Path("metadata").mkdir()
    rows = ["file_name,label"]
    for number in range(12):
        Path("metadata", f"{number}.png").write_bytes(picture(number))
        rows.append(f"{number}.png,{'ab'[number % 2]}")
    Path("metadata", "metadata.csv").write_text("\n".join(rows) + "\n")
    Path("picture.png").write_bytes(picture(0, 20))
    mask = np.zeros((20, 20), np.uint8)
    mask[5:12, 5:12] = 255
    Image.fromarray(mask).save("mask.png")


def _settings() -> None:
    import yaml

    for verb, values in SETTINGS.items():
        Path(f"{verb}.yaml").write_text(yaml.safe_dump(values))
        Path(f"{verb}.json").write_text(json.dumps(values))


def _tokens() -> None:
    _igpt("prepare digits -o tokens --size 8 --limit 100 --workers 1")


def _packed() -> None:
    import datasets
    import pyarrow.parquet as pq

    files = sorted(Path("images", "train").rglob("*.png"))
    labels = [file.parent.name for file in files]
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": labels,
    }
    data = datasets.Dataset.from_dict(columns, features=kinds)
    datasets.disable_progress_bars()
    data.to_parquet("images.parquet")
    pq.write_table(pq.read_table("images.parquet").replace_schema_metadata(), "plain.parquet")
    datasets.DatasetDict({"train": data}).save_to_disk("saved")
    _igpt("prepare saved -o from-saved --size 8 --colors 4 --workers 1")
    _igpt("prepare images.parquet -o from-parquet --size 8 --colors 4 --workers 1")
    for name, mode in (("images.tar", "w"), ("images.tar.gz", "w:gz")):
        with tarfile.open(name, mode) as tar:
            for number, file in enumerate(files):
                for ending, content in (
                    ("png", file.read_bytes()),
                    ("cls", labels[number].encode()),
                ):
                    entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def _run() -> None:
    _igpt("pretrain tokens -o run --config pretrain.yaml")
    shutil.copytree("run", "stopped")
    shutil.rmtree("stopped/checkpoints/step-00000004")


def _of_the_run() -> None:
    from safetensors.torch import load_file, save_file

    _igpt("probe run tokens --limit 60 --strengths 1 --no-baselines --features features")
    _igpt("score run tokens --limit 5")
    _igpt("sample run --count 1")
    _igpt("card run user/name")
    _igpt("report run")
    shutil.copytree("run/model", "model")
    shutil.copytree("model", "parts-model")
    tensors = load_file("model/model.safetensors")
    Path("parts-model/model.safetensors").unlink()
    names = sorted(tensors)
    placed = {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{part:05d}-of-00002.safetensors"
        save_file(
            {name: tensors[name] for name in chosen},
            f"parts-model/{file}",
            metadata={"format": "pt"},
        )
        placed |= dict.fromkeys(chosen, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    Path("parts-model/model.safetensors.index.json").write_text(json.dumps(index))
    from igpt.data.images.palette import Palette

    palette = Palette.load("run")
    palette.save("palette.npy")
    Path("clusters.json").write_text(json.dumps({"clusters": palette.centers_.tolist()}))


def _classifier() -> None:
    finetune = "finetune run tokens --config finetune.yaml"
    _igpt(f"{finetune} -o classifier")
    shutil.copytree("classifier", "stopped-classifier")
    shutil.rmtree("stopped-classifier/checkpoints/step-00000004")
    Path("stopped-classifier/test.json").unlink()
    _igpt(f"{finetune} -o rates --learning-rates 0.001 0.002")
    shutil.rmtree("rates/model")
    shutil.rmtree("rates/rates/0.002/checkpoints/step-00000004")
    for file in ("test.json", "metrics.jsonl"):
        Path("rates", file).unlink()
    metrics = Path("rates/rates/0.002/metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["kind"] != "end"))


def _unfinished() -> None:
    from igpt.data.prepare import PrepareConfig, prepare

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        prepare("images", Path("begun"), PrepareConfig(size=8, colors=4), progress=stop)
    if not Path("begun.partial", "plan.json").exists():
        raise RuntimeError("the unfinished work has no plan")
    for part in (1, 2):
        _igpt(f"prepare images -o cut --size 8 --colors 4 --workers 1 --shard {part}/2")


def _archives() -> None:
    generator = np.random.default_rng(0)
    cifar = Path("cifar-10-batches-py")
    cifar.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        rows = generator.integers(0, 255, (4, 3072), dtype=np.uint8)
        cifar.joinpath(name).write_bytes(
            pickle.dumps({b"data": rows, b"labels": [0, 1, 2, 3]}, protocol=2)
        )
    names = [f"class {number}".encode() for number in range(10)]
    cifar.joinpath("batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    with tarfile.open("cifar.tar.gz", "w:gz") as tar:
        tar.add(cifar)
    stl = Path("stl10_binary")
    stl.mkdir()
    for split, count in (("train", 4), ("test", 3), ("unlabeled", 3)):
        images = generator.integers(0, 255, (count, 3 * 96 * 96), dtype=np.uint8)
        stl.joinpath(f"{split}_X.bin").write_bytes(images.tobytes())
        if split != "unlabeled":
            stl.joinpath(f"{split}_y.bin").write_bytes(bytes(range(1, count + 1)))
    stl.joinpath("class_names.txt").write_text("\n".join(f"class{number}" for number in range(10)))
    arrays = Path("arrays")
    arrays.mkdir()
    for short, count in (("tr", 8), ("va", 4), ("te", 6)):
        np.save(arrays / f"x_{short}X.npy", generator.integers(0, 17, (count, 64), dtype=np.int64))
        np.save(arrays / f"x_{short}Y.npy", np.eye(3, dtype=np.float32)[np.arange(count) % 3])
    shutil.copy("palette.npy", arrays / "kmeans_centers.npy")
    shutil.copytree(OPENAI, "openai")


def _long_work() -> None:
    _igpt("reproduce --rehearsal --tokens-only --corpus images --labelled images -o reproduction")
    _igpt("demo --data images -o demo --steps 2")
