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
from igpt.data.parts import find_parts, require_alike, require_own_numbers, require_unchanged
from igpt.data.prepare import (
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
from igpt.files import Stored, atomic_folder, read_json, require_regular
from igpt.locks import exclusive

_RECORD = re.compile(r"\d+-\d+\.done\.json")


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
        _join(find_parts(out, "igpt prepare SOURCE"), out)
    return TokenDataset(out)


def _join(parts: list[Path], out: Path) -> None:
    plans = [read_json(part / PLAN, "part of a token data set", Plan) for part in parts]
    first = plans[0]
    Palette.load(parts[0] / PLAN)  # checks the palette, which all parts share
    require_own_numbers(parts, plans)
    for part, plan in zip(parts, plans, strict=True):
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
    if one["palette"] != other["palette"]:
        raise InputError(
            f"{names} differ in palette; fit one first (igpt palette) and give it to all"
        )
    require_alike(_in_common(one), _in_common(other), names)


def _in_common(plan: dict[str, Any]) -> dict[str, Any]:
    # Neither the path of the palette nor the allowance for bad images changes the result.
    same = {"palette": None, "max_bad": None}
    usual = {"limit": None, "transparent": False}  # later than version 0.1.0
    keys = ("images", "class_names", "shard_images", "fingerprints")
    return {"config": usual | plan["config"] | same, **{key: plan.get(key) for key in keys}}


def _reader_and_number(record: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", record)))


def _link(source: Path, target: Path, checksum: str) -> None:
    require_unchanged(source, checksum)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
