"""Parts of a token data set, made by machines that know nothing of each other, joined to the whole."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from igpt.data.prepare import PICTURE, PLAN, RECORDS, require_new, write_dataset
from igpt.data.tokens import TokenDataset
from igpt.errors import InputError
from igpt.files import atomic_folder, read_json, sha256_of


def merge(out: Path) -> TokenDataset:
    """Checks the parts of `out`, which lie beside it (`OUT.i-of-n`), and joins them; the parts are left as they are.

    On the same disk the shards are linked, not copied.

    Raises:
        InputError: a part is missing or damaged, or was made from something else.
    """
    require_new(out)
    parts = _find(out)
    plans = [read_json(part / PLAN, "part of a token data set") for part in parts]
    first = plans[0]
    for number, (part, plan) in enumerate(zip(parts, plans, strict=True), 1):
        if plan["part"] != [number, len(parts)]:
            raise InputError(f"{part} is part {plan['part'][0]} of {plan['part'][1]} by another name; make it anew")
        _require_alike(first, plan, f"{part} and {parts[0]}")
    records = dict[str, dict[str, Any]]()
    with atomic_folder(out) as folder:
        for part in parts:
            made = read_json(part / RECORDS, "part of a token data set")["records"]
            for shard in (shard for record in made.values() for shard in record["shards"].values()):
                for file, checksum in shard["sha256"].items():
                    _take(part / file, folder / file, checksum)
            records |= made
        picture = parts[0] / PICTURE
        if picture.exists():
            shutil.copy(picture, folder / PICTURE)
        write_dataset(folder, first, [records[name] for name in sorted(records, key=_place)])
    return TokenDataset(out)


def _require_alike(one: dict[str, Any], other: dict[str, Any], names: str) -> None:
    for key in ("palette", "config", "images", "class_names", "shard_images", "fingerprints"):
        a, b = one.get(key), other.get(key)
        if key == "config" and a and b:  # where the palette lies does not matter, nor how many might have been bad
            a, b = ({"limit": None} | value | {"palette": None, "max_bad": None} for value in (a, b))
        if a != b:
            name = "the images themselves (their names or sizes)" if key == "fingerprints" else key
            advice = "fit one first (igpt palette) and give it to all" if key == "palette" else "make one of them anew"
            raise InputError(f"{names} differ in {name}; {advice}")


def _find(out: Path) -> list[Path]:
    pattern = re.compile(re.escape(out.name) + r"\.(\d+)-of-(\d+)")
    found = {}
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match:
            found[int(match[1]), int(match[2])] = path
    counts = {count for _, count in found}
    if not found:
        raise InputError(
            f"there are no parts beside {out}: igpt prepare SOURCE -o {out} --shard 1/2 makes the first of 2"
        )
    if len(counts) > 1:
        raise InputError(f"there are parts of {' and of '.join(map(str, sorted(counts)))} beside {out}; keep one kind")
    (count,) = counts
    missing = [f"{number}/{count}" for number in range(1, count + 1) if (number, count) not in found]
    if missing:
        raise InputError(f"parts of {out} are missing or unfinished: --shard {', --shard '.join(missing)}")
    return [found[number, count] for number in range(1, count + 1)]


def _place(record: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", record)))


def _take(source: Path, target: Path, checksum: str) -> None:
    if not source.exists():
        raise InputError(f"{source} is missing; make that part anew")
    if sha256_of(source) != checksum:
        raise InputError(f"{source} has changed since it was written; make that part anew")
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
