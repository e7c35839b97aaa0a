"""Small inputs that public reports about similar tools describe; one function writes each into a
folder."""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]
COLOURS: list[Colour] = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def picture(colour: Colour, size: int = 8) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), colour, np.uint8))


def encoded(colour: Colour, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(colour).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, colour: Colour) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour).save(path)


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def table(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "label"))
        writer.writerows(rows)


def split_names_become_classes(folder: Path) -> None:
    for i in range(60):
        put(folder / ("train" if i < 40 else "test") / f"{i:02}.png", COLOURS[i % 3])
    table(
        folder / "metadata.csv",
        [(f"{'train' if i < 40 else 'test'}/{i:02}.png", "abc"[i % 3]) for i in range(60)],
    )


def weights_index(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    def model(seed: int) -> ImageGPTForCausalImageModeling:
        torch.manual_seed(seed)
        made = ImageGPTForCausalImageModeling(
            ImageGPTConfig(vocab_size=17, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        )
        for parameter in made.parameters():
            parameter.data.normal_(0, 0.3)
        return made

    model(1).save_pretrained(folder / "stale-and-new", max_shard_size="20KB")
    model(2).save_pretrained(folder / "new", max_shard_size="60KB")
    for file in (folder / "new").iterdir():
        (folder / "stale-and-new" / file.name).write_bytes(file.read_bytes())
    model(2).save_pretrained(folder / "named")
    tensors = load_file(folder / "named" / "model.safetensors")
    (folder / "named" / "model.safetensors").unlink()
    keys = sorted(tensors)
    parts = {"first.safetensors": keys[:9], "second.safetensors": keys[9:]}
    for name, part in parts.items():
        save_file(
            {key: tensors[key] for key in part}, folder / "named" / name, metadata={"format": "pt"}
        )
    index = {
        "metadata": {},
        "weight_map": {key: name for name, part in parts.items() for key in part},
    }
    (folder / "named" / "model.safetensors.index.json").write_text(json.dumps(index))


def joined_tars(folder: Path) -> None:
    for name, numbers in (("1.tar", range(20)), ("2.tar", range(20, 60))):
        label = b"0" if name == "1.tar" else b"1"
        members = [(f"{i:03}.png", encoded(COLOURS[int(label)])) for i in numbers]
        members = [
            pair
            for i, member in zip(numbers, members, strict=True)
            for pair in (member, (f"{i:03}.cls", label))
        ]
        tar(folder / name, members)
    (folder / "data").mkdir()
    (folder / "data" / "all.tar").write_bytes(
        (folder / "1.tar").read_bytes() + (folder / "2.tar").read_bytes()
    )


def masks(folder: Path) -> None:
    folder.mkdir(parents=True)
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[2:4, 2:4] = 255
    Image.fromarray(mask).save(folder / "white-on-transparent.png")
    mask[..., 3] = 255
    Image.fromarray(mask).save(folder / "white-on-black.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4, 2:4] = 1
    Image.fromarray(mask).save(folder / "levels-0-and-1.png")
    mask = np.zeros((800, 800), np.uint8)
    mask[300:302, 100:700] = 255
    Image.fromarray(mask).save(folder / "thin-line.png")
    Image.fromarray((np.arange(64).reshape(8, 8) * 4).astype(np.uint8)).save(folder / "picture.png")


def files_left_out(folder: Path) -> None:
    heic = b"\0\0\0\x18ftypheic" + bytes(200)
    for i in range(20):
        put(folder / "mixed" / f"{i}.png", COLOURS[0])
    for i in range(30):
        (folder / "mixed" / f"p{i}.heic").write_bytes(heic)
    for i in range(10):
        (folder / "mixed" / f"no-ending-{i}").write_bytes(encoded(COLOURS[1]))
    with zipfile.ZipFile(folder / "mixed" / "more.zip", "w") as archive:
        for i in range(300):
            archive.writestr(f"b/{i}.png", encoded(COLOURS[2]))
    for i in range(60):
        put(folder / "half-listed" / "train" / f"{i:02}.png", COLOURS[i % 3])
    table(
        folder / "half-listed" / "train" / "metadata.csv",
        [(f"{i:02}.png", "abc"[i % 3]) for i in range(30)],
    )
    (folder / "heic-only").mkdir()
    for i in range(30):
        (folder / "heic-only" / f"p{i}.heic").write_bytes(heic)


def words_as_classes(folder: Path) -> None:
    for name, words in (("country", ["US", "DE", "NA"]), ("code", ["01", "1", "2"])):
        for i in range(60):
            put(folder / name / "train" / f"{i:02}.png", COLOURS[i % 3])
        table(
            folder / name / "train" / "metadata.csv",
            [(f"{i:02}.png", words[i % 3]) for i in range(60)],
        )


def classes_by_depth(folder: Path) -> None:
    for i in range(60):
        name = "abc"[i % 3]
        put(
            folder / "tiny-imagenet-layout" / "train" / name / "images" / f"{i:02}.png",
            COLOURS[i % 3],
        )
        put(folder / "cover" / "train" / name / f"{i:02}.png", COLOURS[i % 3])
        put(folder / "thumbnail" / "train" / name / f"{i:02}.png", COLOURS[i % 3])
    put(folder / "cover" / "train" / "cover.png", COLOURS[0])
    put(
        folder / "thumbnail" / "train" / "a" / "@eaDir" / "00.png" / "SYNOPHOTO_THUMB.png",
        COLOURS[0],
    )


def transparent_grey(folder: Path) -> None:
    folder.mkdir(parents=True)
    ramp = np.zeros((8, 8), np.uint16)
    ramp[:, 4:] = 40000
    Image.fromarray(ramp).save(folder / "16-bit-level-0-transparent.png", transparency=0)
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(
        folder / "8-bit-level-0-transparent.png", transparency=0
    )


def zip_of_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for i in range(60):
            archive.writestr(f"class{i % 2}/{i:02}.png", encoded(COLOURS[i % 2]))


def script_without_guard(folder: Path) -> None:
    for i in range(5000):
        put(folder / "images" / f"{i:04}.png", COLOURS[i % 3])
    (folder / "script.py").write_text(
        "from pathlib import Path\n"
        "from igpt.data.prepare import PrepareConfig, prepare\n\n"
        'prepare("images", Path("tokens"), PrepareConfig(size=8), workers=2)\n'
    )
