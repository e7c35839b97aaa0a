"""Join the parts of a token data set that several machines prepared independently."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from igpt.data.images.palette import Palette
from igpt.data.left_out import listed
from igpt.data.prepare import (
    MOST_PARTS,
    PICTURE,
    PLAN,
    RECORDS,
    Plan,
    Record,
    record_name,
    require_new,
    write_dataset,
)
from igpt.data.tokens.dataset import TokenDataset
from igpt.data.tokens.manifest import NAMES_SHOWN, Shard, require_counts
from igpt.errors import InputError
from igpt.files import Stored, atomic_folder, read_json, require_regular, sha256_of
from igpt.locks import exclusive

_RECORD = re.compile(r"\d+-\d+\.done\.json")
_MISSING_SHOWN = 20  # parts, in a message


class _Records(Stored):
    """Schema of `records.json`."""

    records: dict[str, Record]


def merge(out: Path) -> TokenDataset:
    """Check the parts of `out`, which are next to it (`OUT.i-of-n`), and join them.

    The parts are kept. On the same disk the shards are linked, not copied.

    Raises:
        InputError: a part is missing, incomplete or damaged, or was made from another source or
            with other settings; or another process is writing `out`.
    """
    require_new(out)
    with exclusive(out):
        require_new(out)
        _join(_find(out), out)
    return TokenDataset(out)


def _join(parts: list[Path], out: Path) -> None:
    plans = [read_json(part / PLAN, "part of a token data set", Plan) for part in parts]
    first = plans[0]
    Palette.load(parts[0] / PLAN)  # checks the palette, which all parts share
    for number, (part, plan) in enumerate(zip(parts, plans, strict=True), 1):
        if plan["part"] != [number, len(parts)]:
            raise InputError(
                f"{part} holds part {plan['part'][0]} of {plan['part'][1]}; make it again"
            )
        _require_alike(first, plan, f"{part} and {parts[0]}")
    records, part_of = dict[str, dict[str, Any]](), dict[str, Path]()
    for part, plan in zip(parts, plans, strict=True):
        made = _records_of(part, plan)
        records |= made
        for shard in _shards(made.values()):
            for file in (shard.tokens, shard.labels):
                if file in part_of:
                    raise InputError(
                        f"{part} and {part_of[file]} both hold {file}; make one of them again"
                    )
                part_of[file] = part
    _require_all_images(out, first, records.values())
    with atomic_folder(out) as folder:
        for shard in _shards(records.values()):
            for file in (shard.tokens, shard.labels):
                if file not in shard.sha256:
                    raise InputError(
                        f"{part_of[file] / RECORDS} has no checksum of {file}; make that part again"
                    )
                _link(part_of[file] / file, folder / file, shard.sha256[file])
        picture = parts[0] / PICTURE
        if picture.exists():
            require_regular(picture)
            shutil.copy(picture, folder / PICTURE)
        write_dataset(
            folder, first, [records[name] for name in sorted(records, key=_reader_and_number)]
        )


def _records_of(part: Path, plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the shard records of a part, by name; raise if some are missing or of another part."""
    path = part / RECORDS
    found: dict[str, dict[str, Any]] = read_json(path, "part of a token data set", _Records)[
        "records"
    ]
    strange = [name for name in found if not _RECORD.fullmatch(name)]
    if "jobs" in plan:
        number, count = plan["part"]
        names = (
            record_name(reader, job)
            for reader, jobs in enumerate(plan["jobs"])
            for job in range(jobs)
        )
        wanted = list(islice(names, number - 1, None, count))
        missing = [name for name in wanted if name not in found]
        if missing:
            raise InputError(
                f"{path} lacks {len(missing)} shard records ({listed(missing, NAMES_SHOWN)}); "
                "make that part again"
            )
        strange = sorted(set(found) - set(wanted))
    if strange:
        raise InputError(
            f"{path} has records that are not of this part ({listed(strange, NAMES_SHOWN)}); "
            "make that part again"
        )
    return found


def _shards(records: Iterable[dict[str, Any]]) -> Iterator[Shard]:
    return (Shard(**shard) for record in records for shard in record["shards"].values())


def _require_all_images(out: Path, plan: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """Raise if all parts together do not have the images of the plan."""
    counts, skipped = Counter[str](), list[str]()
    for record in records:
        counts.update({split: shard["count"] for split, shard in record["shards"].items()})
        skipped += record["skipped"]
    views = plan["config"].get("views", 0)
    require_counts(counts, plan["images"], skipped, views, f"all parts of {out} together")


def _require_alike(one: dict[str, Any], other: dict[str, Any], names: str) -> None:
    """Raise if the plans of two parts differ in the images or the settings."""
    for key in ("palette", "config", "images", "class_names", "shard_images", "fingerprints"):
        a, b = one.get(key), other.get(key)
        if key == "config":
            # Neither the path of the palette nor the allowance for bad images changes the result.
            same = {"palette": None, "max_bad": None}
            usual = {"limit": None, "transparent": False}  # later than version 0.1.0
            a, b = (usual | plan[key] | same for plan in (one, other))
        if a != b:
            name = "the images themselves (their names or sizes)" if key == "fingerprints" else key
            advice = (
                "fit one first (igpt palette) and give it to all"
                if key == "palette"
                else "make one of them again"
            )
            raise InputError(f"{names} differ in {name}; {advice}")


def _find(out: Path) -> list[Path]:
    """Return the folders of all parts, in order; raise if some are missing."""
    pattern = re.compile(re.escape(out.name) + r"\.(\d+)-of-(\d+)")
    found = {}
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match:
            found[int(match[1]), int(match[2])] = path
    counts = {count for _, count in found}
    if not found:
        raise InputError(
            f"no parts next to {out}: igpt prepare SOURCE -o {out} --shard 1/2 makes the first of 2"
        )
    if len(counts) > 1:
        numbers = " and of ".join(map(str, sorted(counts)))
        raise InputError(f"there are parts of {numbers} next to {out}; keep one kind")
    (count,) = counts
    if count > MOST_PARTS:
        raise InputError(
            f"there is a part of {count} next to {out}, and at most {MOST_PARTS} can be joined; "
            "remove it"
        )
    missing = [
        f"{number}/{count}" for number in range(1, count + 1) if (number, count) not in found
    ]
    if missing:
        more = f" and {len(missing) - _MISSING_SHOWN} more" if len(missing) > _MISSING_SHOWN else ""
        shown = ", --shard ".join(missing[:_MISSING_SHOWN])
        raise InputError(f"parts of {out} are missing or unfinished: --shard {shown}{more}")
    return [found[number, count] for number in range(1, count + 1)]


def _reader_and_number(record: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", record)))


def _link(source: Path, target: Path, checksum: str) -> None:
    if not source.exists():
        raise InputError(f"{source} is missing; make that part again")
    require_regular(source)
    if sha256_of(source) != checksum:
        raise InputError(f"{source} has changed since it was written; make that part again")
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
