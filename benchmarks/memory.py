"""Measure the peak memory of `prepare`, which should not depend on the number of images.

Cases run one after the other, each in its own process. "leading" is that process, "worker" the
largest of the processes that it starts. Files are links to images of CIFAR-10, repeated beyond its
60,000.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from common import CIFAR10, record, run, show

from igpt.errors import InputError

# Not getrusage, which includes the memory that the parent had when it started the process.
PREPARE = """
import json, re, sys
from multiprocessing import active_children
from pathlib import Path
from igpt.data.prepare import PrepareConfig, prepare

def peak(process):
    found = re.search(r"VmHWM:\\s*(\\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0

if __name__ == "__main__":
    source, out, workers = sys.argv[1:]
    largest = [0.0]
    def look(*_):
        largest.append(max((peak(child.pid) for child in active_children()), default=0.0))
    prepare(source, Path(out), PrepareConfig(size=32), workers=int(workers), progress=look)
    print(json.dumps([peak("self"), max(largest)]))
"""


def write_sets(data: Path, home: Path, counts: tuple[int, ...]) -> None:
    """Write so many images as one Parquet file each, and as folders of files."""
    files = sorted(data.rglob("*.parquet"))
    if not files:
        raise InputError(f"no Parquet files of CIFAR-10 below {data}; give its folder with --data")
    images = [
        image for file in files for image in pq.read_table(file, columns=["img"])["img"].to_pylist()
    ]
    stored = home / "stored"
    stored.mkdir()
    images = [images[number % len(images)] for number in range(max(counts))]
    for number, image in enumerate(images):
        (stored / f"{number:06}.jpg").write_bytes(image["bytes"])
    features = datasets.Features({"image": datasets.Image()})
    for count in counts:
        folder = home / f"files-{count}"
        folder.mkdir()
        for number in range(count):
            (folder / f"{number:06}.jpg").symlink_to(stored / f"{number:06}.jpg")
        datasets.Dataset.from_dict({"image": images[:count]}, features=features).to_parquet(
            home / f"{count}.parquet"
        )


def main(data: Path = CIFAR10, counts: tuple[int, ...] = (1_000, 60_000, 180_000)) -> None:
    """Prepare images of CIFAR-10 at 32 px and 512 colours.

    Args:
        data: folder with CIFAR-10 as Parquet.
        counts: numbers of images.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "prepare.py").write_text(PREPARE)
        write_sets(data, home, counts)
        cases = [
            (kind, workers, count)
            for kind in ("Parquet", "files")
            for workers in (1, 2)
            for count in counts
        ]
        for kind, workers, count in cases:
            source = home / (f"{count}.parquet" if kind == "Parquet" else f"files-{count}")
            command = [
                sys.executable,
                home / "prepare.py",
                source,
                home / f"out-{len(rows)}",
                str(workers),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            leading, worker = json.loads(done.stdout.splitlines()[-1])
            rows.append(
                {
                    "source": kind,
                    "workers": workers,
                    "images": count,
                    "leading": leading,
                    "worker": worker,
                }
            )
    show(
        "Peak resident memory, MiB",
        list(rows[0]),
        [[_short(value) for value in row.values()] for row in rows],
    )
    record("memory", {"n": "one run a case", "unit": "MiB", "rows": rows})


def _short(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main)
