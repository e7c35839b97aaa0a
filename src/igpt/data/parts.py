"""Parts: what each of n machines makes of an output `OUT`, next to it in a folder `OUT.i-of-n`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from igpt.errors import InputError
from igpt.files import require_regular, sha256_of

MOST_PARTS = 65536
_MISSING_SHOWN = 20  # parts, in a message
_SHOWN = {
    "fingerprints": "the images themselves (their names or sizes)",
    "model_sha256": "the weights of the model",
}


def _numbered(part: list[int]) -> list[int]:
    if not 1 <= part[0] <= part[1] <= MOST_PARTS:
        raise ValueError(f"[i, n] is needed, with i from 1 to n and n at most {MOST_PARTS}")
    return part


# [i, n] in the JSON of a part: the i-th of n, from 1.
PartNumber = Annotated[list[int], Field(min_length=2, max_length=2), AfterValidator(_numbered)]


def part_number(shard: str) -> tuple[int, int]:
    """Return (i, n) of the value "i/n" of `--shard`.

    Raises:
        InputError: it is something else.
    """
    number, slash, count = shard.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal() or len(shard) > 20:
        raise InputError(
            f"--shard takes i/n, such as 1/4 for the first of four parts, not {shard[:40]!r}"
        )
    return int(number), int(count)


def part_path(out: Path, part: tuple[int, int]) -> Path:
    """Return the folder of a part of `out`.

    Raises:
        InputError: there is no such part.
    """
    if not 1 <= part[0] <= part[1] <= MOST_PARTS:
        raise InputError(f"--shard i/n needs 1 <= i <= n <= {MOST_PARTS}, not {part[0]}/{part[1]}")
    return out.with_name(f"{out.name}.{part[0]}-of-{part[1]}")


def find_parts(out: Path, command: str) -> list[Path]:
    """Return the folders of all parts, in order.

    Args:
        command: how parts are made, such as "igpt prepare SOURCE", for messages.

    Raises:
        InputError: there are none, some are missing, or their numbers differ.
    """
    pattern = re.compile(re.escape(out.name) + r"\.(\d+)-of-(\d+)")
    found = {}
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match:
            found[int(match[1]), int(match[2])] = path
    counts = {count for _, count in found}
    if not found:
        raise InputError(
            f"no parts next to {out}: {command} -o {out} --shard 1/2 makes the first of 2"
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


def require_own_numbers(parts: Sequence[Path], plans: Sequence[Mapping[str, Any]]) -> None:
    """Raise an `InputError` if the name of a part is not that of the content."""
    for number, (part, plan) in enumerate(zip(parts, plans, strict=True), 1):
        if plan["part"] != [number, len(parts)]:
            raise InputError(
                f"{part} holds part {plan['part'][0]} of {plan['part'][1]}; make it again"
            )


def require_alike(one: Mapping[str, Any], other: Mapping[str, Any], names: str) -> None:
    """Raise if two parts were made from other images or with other settings.

    Args:
        one, other: everything that parts of the same output have in common.
        names: of the two parts, for the message.

    Raises:
        InputError: names what differs.
    """
    for key in one:
        if one[key] != other.get(key):
            shown = _SHOWN.get(key, key.replace("_", " "))
            raise InputError(f"{names} differ in {shown}; make one of them again")


def require_unchanged(path: Path, checksum: str) -> None:
    """Raise an `InputError` if a file of a part is missing or has another SHA-256."""
    if not path.exists():
        raise InputError(f"{path} is missing; make that part again")
    require_regular(path)
    if sha256_of(path) != checksum:
        raise InputError(f"{path} has changed since it was written; make that part again")
