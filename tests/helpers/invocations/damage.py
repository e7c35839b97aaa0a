"""Generic damage to a file: the same for every file of a format, whatever it contains.

Each function yields (description of the damage, the bytes of the damaged file).
"""

import copy
import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Damage = Iterator[tuple[str, bytes]]
DIGITS = "9" * 5000
DEEP = 100_000
REPLACEMENTS: tuple[Any, ...] = (
    None, "", "x", 0, -1, 1.5, 1e308, 10**30,
    True, [], {}, [None], ["x"], {"x": 1}, float("nan"), "9" * 300,
)  # fmt: skip


class _Attack:
    """When unpickled, it makes a folder, which proves that code of a file was executed."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        import os

        return os.mkdir, ("executed",)


def damaged(file: Path) -> Damage:
    """Return all damage to a file, by its suffix."""
    content = file.read_bytes()
    yield from any_file(content)
    special = {
        ".json": json_file,
        ".yaml": yaml_file,
        ".jsonl": lines_file,
        ".npy": array_file,
        ".safetensors": tensors_file,
        ".metadata": pickle_file,
        ".png": picture_file,
        ".parquet": parquet_file,
        ".tar": tar_file,
        ".gz": gzip_file,
        ".csv": text_file,
        "": pickle_file,
    }
    ending = file.suffix or (".metadata" if file.name == ".metadata" else "")
    if ending in special:
        yield from special[ending](content)


def any_file(content: bytes) -> Damage:
    """Yield damage that is possible for any file."""
    size = len(content)
    yield "emptied", b""
    for name, kept in (
        ("1 byte", 1),
        ("a quarter", size // 4),
        ("a half", size // 2),
        ("all but a byte", size - 1),
    ):
        yield f"cut off after {name}", content[:kept]
    for seed in range(3):
        generator = np.random.default_rng(seed)
        flipped = np.frombuffer(content, np.uint8).copy()
        flipped[generator.integers(0, size, max(1, size // 200))] ^= 1 << 6
        yield f"bits flipped ({seed})", flipped.tobytes()
    yield "the first 8 bytes overwritten", b"\xff" * 8 + content[8:]
    yield "random bytes", np.random.default_rng(0).bytes(max(size, 64))
    yield "zeros", bytes(size)
    yield "something appended", content + b"\x00garbage"
    yield "another text", b"hello, world\n"


def nodes(value: Any, path: tuple[Any, ...] = (), depth: int = 5) -> Iterator[tuple[Any, ...]]:
    """Return the paths of all values in JSON; of a list, the first and the last item."""
    if path:
        yield path
    if depth == 0:
        return
    if isinstance(value, dict):
        for key in value:
            yield from nodes(value[key], (*path, key), depth - 1)
    elif isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            yield from nodes(value[index], (*path, index), depth - 1)


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Return a copy in which `change(parent, key)` was applied at a path."""
    copied = copy.deepcopy(value)
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return copied


def structures(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key removed, and every value replaced by values of all types."""
    for path in nodes(value):
        name = ".".join(map(str, path))
        yield f"{name} removed", changed(value, path, lambda parent, key: parent.pop(key))
        for new in REPLACEMENTS:
            shown = (
                json.dumps(new)
                if len(json.dumps(new)) < 40
                else f"a string of {len(new)} characters"
            )

            def replace(parent: Any, key: Any, new: Any = new) -> None:
                parent[key] = new

            yield f"{name} = {shown}", changed(value, path, replace)


def first_key(value: Any) -> str:
    """Return a key of a mapping."""
    return next(iter(value), "x")


def json_file(content: bytes) -> Damage:
    """Yield JSON with a damaged text or structure."""
    yield from json_texts(content)
    for name, value in structures(json.loads(content)):
        yield name, json.dumps(value).encode()


def json_texts(content: bytes) -> Damage:
    """Yield JSON with a damaged text or top level."""
    value = json.loads(content)
    key = json.dumps(first_key(value)).encode()
    for top in ([], [value], None, 3, "x", {}, True):
        yield f"the top is {json.dumps(top)[:20]}", json.dumps(top).encode()
    yield "nested 100,000 times", b"[" * DEEP + b"]" * DEEP
    yield "a value nested 100,000 times", b"{" + key + b":" + b"[" * DEEP + b"]" * DEEP + b"}"
    yield "objects nested 100,000 times", (b"{" + key + b":") * DEEP + b"1" + b"}" * DEEP
    yield "a number of 5,000 digits", b"{" + key + b":" + DIGITS.encode() + b"}"
    yield "with a byte order mark", b"\xef\xbb\xbf" + content
    yield "in UTF-16", content.decode().encode("utf-16")
    yield "a lone surrogate", b"{" + key + b': "\\ud800"}'
    yield "a comment", b"// comment\n" + content
    yield "doubled", content + content
    yield (
        "an unknown key",
        json.dumps({**value, "unknown": 1}).encode() if isinstance(value, dict) else b"{}",
    )


def yaml_file(content: bytes) -> Damage:
    """Yield YAML with a damaged text or structure."""
    import yaml

    value = yaml.safe_load(content)
    for name, made in structures(value):
        yield name, yaml.safe_dump(made).encode()
    key = first_key(value)
    yield "the top is a list", b"- 1\n- 2\n"
    yield "only a comment", b"# nothing\n"
    yield "an alias bomb", alias_bomb(key)
    yield "an alias bomb in a list", alias_bomb(key).replace(b"{", b"[").replace(b"}", b"]")
    yield "nested 100,000 times", b"x: " + b"[" * DEEP + b"]" * DEEP
    yield "a number of 5,000 digits", f"{key}: {DIGITS}\n".encode()
    yield "an object of Python", f"{key}: !!python/object/apply:os.mkdir ['executed']\n".encode()
    yield "an alias of itself", f"{key}: &a [*a]\n".encode()
    yield "an unknown alias", f"{key}: *nothing\n".encode()
    yield "two documents", content + b"---\n" + content
    yield "a key twice", content + content
    yield "a tab", b"\t" + content
    yield "a key that is a list", b"? [a, b]\n: 1\n"
    yield "a key that is a number", b"1: 2\n"
    yield "a key that is null", b"~: 2\n"
    yield "a date", f"{key}: 2020-01-01\n".encode()
    yield "a set", f"{key}: !!set {{a, b}}\n".encode()
    yield "bytes", f"{key}: !!binary aGVsbG8=\n".encode()
    yield "infinity", f"{key}: .inf\n".encode()
    yield "a sexagesimal number", f"{key}: 190:20:30\n".encode()
    yield "an unknown key", content + b"unknown: 1\n"
    yield "in UTF-16", content.decode().encode("utf-16")
    yield "a control character", content + b"x: \x07\n"


def alias_bomb(key: str) -> bytes:
    """Return YAML of 400 bytes that stands for 10**9 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, letter in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{letter}: &{letter} [{', '.join([f'*{before}'] * 10)}]")
    return "\n".join([*lines, f"{key}: *i\n"]).encode()


def lines_file(content: bytes) -> Damage:
    """Yield JSON lines of which some are invalid."""
    lines = content.splitlines()
    for number in sorted({0, len(lines) // 2, len(lines) - 1}):
        for name, value in structures(json.loads(lines[number])):
            yield (
                f"line {number + 1}: {name}",
                b"\n".join([*lines[:number], json.dumps(value).encode(), *lines[number + 1 :]]),
            )
        for name, line in (
            ("a list", b"[]"),
            ("null", b"null"),
            ("nested", b"[" * DEEP),
            ("blank", b""),
            ("text", b"hello"),
        ):
            yield (
                f"line {number + 1} is {name}",
                b"\n".join([*lines[:number], line, *lines[number + 1 :]]) + b"\n",
            )
        yield (
            f"line {number + 1} removed",
            b"\n".join([*lines[:number], *lines[number + 1 :]]) + b"\n",
        )
        yield (
            f"line {number + 1} of 5,000 digits",
            b"\n".join([*lines[:number], DIGITS.encode(), *lines[number + 1 :]]),
        )
    yield "every line twice", b"\n".join(line for line in lines for _ in range(2)) + b"\n"
    yield "lines in reverse order", b"\n".join(lines[::-1]) + b"\n"
    yield "no line end", content.rstrip()
    yield "one array", b"[" + b",".join(lines) + b"]"


def text_file(content: bytes) -> Damage:
    """Yield damaged tables in text."""
    lines = content.splitlines()
    yield "only its head", lines[0] + b"\n"
    yield "no head", b"\n".join(lines[1:])
    yield "a row too long", content + b"a,b,c,d,e\n"
    yield "an open quote", content + b'"x,\n'
    yield "a null byte", content + b"\x00,a\n"
    yield "in UTF-16", content.decode().encode("utf-16")
    yield "in Latin-1", content + "\xe9.png,a\n".encode("latin-1")
    yield "a file that is missing", content + b"none.png,a\n"
    yield "a path upwards", content + b"../../../etc/passwd,a\n"
    yield "an absolute path", content + b"/etc/passwd,a\n"
    yield "an empty name", content + b",a\n"
    yield "another separator", content.replace(b",", b";")


def saved(array: Any, pickled: bool = False) -> bytes:
    """Return an array as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def array_file(content: bytes) -> Damage:
    """Yield arrays of another type, shape or content."""
    array = np.load(io.BytesIO(content))
    for kind in (
        "float16",
        "float64",
        "int8",
        "int64",
        "uint8",
        "uint64",
        "bool",
        "complex64",
        "U5",
        "S3",
        ">u2",
        "datetime64[s]",
    ):
        yield f"as {kind}", saved(np.ones(array.shape, bool).astype(kind))
    yield "as objects", saved(array.astype(object), pickled=True)
    yield "as an attack by pickle", saved(np.array([_Attack()], object), pickled=True)
    yield "as records", saved(np.zeros(array.shape, [("a", "<u2"), ("b", "<f4")]))
    yield "0 dimensions", saved(array.ravel()[0])
    yield "no rows", saved(array[:0])
    yield "no columns", saved(array[..., :0])
    yield "flattened", saved(array.ravel())
    yield "one dimension more", saved(array[..., None])
    yield "one row", saved(array[:1])
    yield "half of its rows", saved(array[: len(array) // 2])
    yield "twice its rows", saved(np.concatenate([array, array]))
    yield "a column less", saved(array[..., :-1])
    yield "a column more", saved(np.concatenate([array, array[..., :1]], axis=-1))
    yield "in Fortran's order", saved(np.asfortranarray(array))
    if array.dtype.kind == "f":
        for value in (np.nan, np.inf, -np.inf, 1e30, 2.0, 0.0):
            yield f"filled with {value}", saved(np.full_like(array, value))
        some = array.copy()
        some.flat[0] = np.nan
        yield "with one NaN", saved(some)
    else:
        limits = np.iinfo(array.dtype)
        for value in sorted({limits.max, limits.min, 0, 17}):
            yield f"filled with {value}", saved(np.full_like(array, value))
        some = array.copy()
        some.flat[-1] = limits.max
        yield "with one value too large", saved(some)
    yield "of a later version", content[:6] + b"\x09\x00" + content[8:]
    for shape in ((10**12, 10**6), (-1, 4), (2**63, 2), (0,)):
        yield (
            f"a head that says {shape}",
            _with_head(content, f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"),
        )
    yield "a head of code", _with_head(content, "__import__('os').mkdir('executed')")
    yield "a head nested deeply", _with_head(content, "(" * 60000)
    yield "a head without a type", _with_head(content, "{'fortran_order': False, 'shape': (3,), }")
    yield (
        "a head of another type",
        _with_head(content, "{'descr': 'nonsense', 'fortran_order': False, 'shape': (3,), }"),
    )
    archive = io.BytesIO()
    np.savez(archive, array=array)
    yield "as .npz", archive.getvalue()


def _with_head(content: bytes, head: str) -> bytes:
    length = struct.unpack("<H", content[8:10])[0]
    text = head.encode() + b" " * (64 - (10 + len(head) + 1) % 64) + b"\n"
    if len(text) < 65536:
        return content[:8] + struct.pack("<H", len(text)) + text + content[10 + length :]
    return content[:6] + b"\x02\x00" + struct.pack("<I", len(text)) + text + content[10 + length :]


def tensors_file(content: bytes) -> Damage:
    """Yield safetensors with another header or other values."""
    length = struct.unpack("<Q", content[:8])[0]
    head, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def made(text: bytes, values: bytes = data) -> bytes:
        return struct.pack("<Q", len(text)) + text + values

    yield "a head of 2**60 bytes", struct.pack("<Q", 2**60) + content[8:]
    yield "a head of 0 bytes", struct.pack("<Q", 0) + content[8:]
    yield "a head that is a list", made(b"[]")
    yield "a head nested deeply", made(b"[" * DEEP + b"]" * DEEP)
    yield "a head of 5,000 digits", made(b'{"x": ' + DIGITS.encode() + b"}")
    yield "no tensors", made(b"{}", b"")
    yield "filled with NaN", made(json.dumps(head).encode(), b"\xff" * len(data))
    yield "filled with 0", made(json.dumps(head).encode(), bytes(len(data)))
    yield (
        "filled with 3e38",
        made(json.dumps(head).encode(), struct.pack("<f", 3e38) * (len(data) // 4)),
    )
    yield (
        "a tensor more",
        made(
            json.dumps(
                {**head, "more": {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}}
            ).encode()
        ),
    )
    for name, value in structures(head):
        yield name, made(json.dumps(value).encode())
    for key, entry in head.items():
        if "shape" in entry and len(entry["shape"]) == 2:
            turned = {**entry, "shape": entry["shape"][::-1]}
            yield f"{key} transposed", made(json.dumps({**head, key: turned}).encode())
            halves = {**entry, "dtype": "F16", "shape": [entry["shape"][0], 2 * entry["shape"][1]]}
            yield f"{key} in half precision", made(json.dumps({**head, key: halves}).encode())
            integers = {**entry, "dtype": "I32"}
            yield f"{key} as integers", made(json.dumps({**head, key: integers}).encode())


def pickle_file(content: bytes) -> Damage:
    """Yield pickles of other objects."""
    yield "an attack by pickle", pickle.dumps(_Attack())
    for value in ({}, [], None, 3, {b"data": None, b"labels": None}, {"data": 1}):
        yield f"a pickle of {value}", pickle.dumps(value, protocol=2)
    wide = {b"data": np.zeros((4, 10), np.uint8), b"labels": [0, 1, 2, 3]}
    yield "a pickle of narrow rows", pickle.dumps(wide, protocol=2)
    many = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 10**9]}
    yield "a pickle of large labels", pickle.dumps(many, protocol=2)
    few = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0]}
    yield "a pickle of few labels", pickle.dumps(few, protocol=2)
    yield "a pickle nested deeply", b"\x80\x02" + b"(" * DEEP + b"."
    yield "a pickle of large memory", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."


def picture_file(content: bytes) -> Damage:
    """Yield files that are not images, too large, or of a rare mode."""
    from PIL import Image

    def png(side: int) -> bytes:
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\x00" * 1000)), (b"IEND", b"")]
        made = [
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        ]
        return b"\x89PNG\r\n\x1a\n" + b"".join(made)

    for side in (0, 5000, 30_000, 2**31 - 1):
        yield f"a head that says {side} pixels", png(side)
    for mode in ("1", "L", "LA", "P", "RGBA", "I", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (9, 9)).save(buffer, "PNG")
        yield f"of mode {mode}", buffer.getvalue()
    for mode, kind in (
        ("F", "TIFF"),
        ("CMYK", "JPEG"),
        ("L", "GIF"),
        ("RGB", "BMP"),
        ("L", "PDF"),
        ("1", "XBM"),
    ):
        buffer = io.BytesIO()
        Image.new(mode, (9, 9)).save(buffer, kind)
        yield f"a {kind} of mode {mode}", buffer.getvalue()
    for size in ((1, 1), (1, 5000), (5000, 1)):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        yield f"of {size[0]} x {size[1]} pixels", buffer.getvalue()
    yield "an SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    yield "an EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


def parquet_file(content: bytes) -> Damage:
    """Yield Parquet with other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(content))

    def made(other: pa.Table) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(other, buffer)
        return buffer.getvalue()

    count = len(table)
    images = table.column("image")
    plain = table.replace_schema_metadata()
    yield "no rows", made(table.slice(0, 0))
    yield "no columns", made(table.select([]))
    for name in table.column_names:
        yield f"no column {name}", made(table.drop_columns([name]))
        index = table.column_names.index(name)
        nulls = pa.nulls(count, table.schema.field(name).type)
        yield f"{name} of nulls", made(table.set_column(index, table.schema.field(name), nulls))
        for kind, values in (
            ("nothing", pa.nulls(count)),
            ("numbers", pa.array(range(count))),
            ("large numbers", pa.array([10**12] * count)),
            ("negative numbers", pa.array([-5] * count)),
            ("floats", pa.array([float("nan")] * count)),
            ("words", pa.array(["x"] * count)),
            ("bytes", pa.array([b"x"] * count)),
            ("dates", pa.array([0] * count, pa.timestamp("s"))),
            ("lists", pa.array([[1, 2]] * count)),
            ("empty lists", pa.array([[]] * count, pa.list_(pa.int64()))),
            ("truths", pa.array([True] * count)),
            ("mappings", pa.array([{"x": 1}] * count)),
            ("decimals", pa.array([1] * count, pa.decimal128(38, 0))),
            ("a dictionary", pa.array(["x"] * count).dictionary_encode()),
        ):
            yield f"{name} of {kind}", made(plain.set_column(index, name, values))
    rows = images.to_pylist()
    for what, one in (
        ("no bytes", {"bytes": None, "path": None}),
        ("empty bytes", {"bytes": b"", "path": None}),
        ("other bytes", {"bytes": b"hello", "path": None}),
        ("a path that is missing", {"bytes": None, "path": "none.png"}),
        ("a path of the system", {"bytes": None, "path": "/etc/passwd"}),
        ("a FIFO", {"bytes": None, "path": "fifo.png"}),
        ("an address", {"bytes": None, "path": "http://127.0.0.1:9/x.png"}),
    ):
        kind = images.type
        index = table.column_names.index("image")
        yield (
            f"one image with {what}",
            made(table.set_column(index, "image", pa.array([one, *rows[1:]], kind))),
        )
        yield (
            f"all images with {what}",
            made(table.set_column(index, "image", pa.array([one] * count, kind))),
        )
    image = b'{"_type": "Image"}'
    for name, metadata in (
        ("other metadata", b"{}"),
        ("metadata that are no JSON", b"{"),
        ("metadata nested deeply", b"[" * DEEP + b"]" * DEEP),
        ("metadata of an unknown type", _features(b'{"image": {"_type": "Nonsense"}}')),
        ("metadata of a wrong type", _features(b'{"image": {"_type": "Audio"}, "label": 3}')),
        (
            "metadata without names",
            _features(b'{"image": %b, "label": {"_type": "ClassLabel", "names": []}}' % image),
        ),
    ):
        yield name, made(table.replace_schema_metadata({b"huggingface": metadata}))
    yield "two columns of images", made(plain.append_column("other", images))
    yield "a column twice", made(plain.append_column("image", images))


def _features(columns: bytes) -> bytes:
    return b'{"info": {"features": %b}}' % columns


def tar_file(content: bytes) -> Damage:
    """Yield tars with unusual members."""
    from ...helpers.invocations.samples import picture

    def made(*members: tuple[str, bytes, bytes | None]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, body, kind in members:
                entry = tarfile.TarInfo(name)
                if kind is None:
                    entry.size = len(body)
                else:
                    entry.type, entry.linkname = kind, "/etc/passwd"
                tar.addfile(entry, io.BytesIO(body) if kind is None else None)
        return buffer.getvalue()

    image = picture(0)
    yield "no members", made()
    yield "labels only", made(("0.cls", b"a", None), ("1.cls", b"b", None))
    yield "no images", made(("a.txt", b"hello", None))
    yield "an image that is none", made(("0.png", b"hello", None), ("0.cls", b"a", None))
    yield "an empty image", made(("0.png", b"", None), ("0.cls", b"a", None))
    yield "a label that is no text", made(("0.png", image, None), ("0.cls", b"\xff\xfe", None))
    yield "an empty label", made(("0.png", image, None), ("0.cls", b"", None))
    yield "a label of 5,000 digits", made(("0.png", image, None), ("0.cls", DIGITS.encode(), None))
    yield "JSON that is none", made(("0.png", image, None), ("0.json", b"{", None))
    yield (
        "JSON nested deeply",
        made(("0.png", image, None), ("0.json", b"[" * DEEP + b"]" * DEEP, None)),
    )
    yield "JSON that is a list", made(("0.png", image, None), ("0.json", b"[1]", None))
    yield "names upwards", made(("../../0.png", image, None), ("../../0.cls", b"a", None))
    yield "absolute names", made(("/tmp/0.png", image, None))
    for kind, what in (
        (tarfile.SYMTYPE, "a link"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.DIRTYPE, "a folder"),
    ):
        yield f"{what} as an image", made(("0.png", b"", kind), ("0.cls", b"a", None))
    yield "a name twice", made(("0.png", image, None), ("0.png", image, None))
    yield (
        "a name that is no text",
        made((b"\xff\xfe.png".decode("utf-8", "surrogateescape"), image, None)),
    )
    yield "a size that is wrong", content[:124] + b"77777777777\x00" + content[136:]
    yield "a size that is no number", content[:124] + b"xxxxxxxxxxx\x00" + content[136:]
    yield "only end marks", bytes(10240)


def gzip_file(content: bytes) -> Damage:
    """Yield compressed streams of other contents."""
    import gzip

    yield "no tar inside", gzip.compress(b"hello" * 1000)
    yield "nothing inside", gzip.compress(b"")
    yield "half a tar inside", gzip.compress(gzip.decompress(content)[:5000])
    yield "200 MB of zeros inside", gzip.compress(bytes(1 << 20)) * 200
    yield "garbage behind", content + b"garbage" * 1000
    yield "a wrong checksum", content[:-8] + b"\x00" * 8
