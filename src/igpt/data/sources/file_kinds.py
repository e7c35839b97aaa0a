"""Kinds of files by their names: images, files of many images, texts, hidden files."""

from functools import cache
from pathlib import PurePosixPath

from igpt.data.images.decode import register_decoders
from igpt.data.left_out import ARCHIVES

# Files that hold many images.
PACKED = (".parquet", ".arrow", ".tar")

# fmt: off
# Texts and tables that people keep with their images: named when left out, never counted as images.
_TEXTS = frozenset([
    ".bib", ".cfg", ".conf", ".css", ".csv", ".dvc", ".htm", ".html", ".ini", ".ipynb", ".js",
    ".json", ".jsonl", ".lock", ".log", ".lst", ".md", ".md5", ".names", ".ndjson", ".py", ".rst",
    ".rtf", ".sh", ".sha1", ".sha256", ".sql", ".tex", ".toml", ".tsv", ".txt", ".url", ".xml",
    ".xmp", ".yaml", ".yml",
])
_TEXT_NAMES = frozenset([
    "authors", "changelog", "changes", "citation", "contributing", "copying", "dockerfile",
    "license", "licence", "makefile", "notice", "readme", "requirements", "version",
])
_SYSTEM_NAMES = frozenset([
    "@eadir", "@recently-snapshot", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin",
    "__macosx", "__pycache__", "desktop.ini", "ehthumbs.db", "lost+found",
    "system volume information", "thumbs.db",
])
# Formats that Pillow registers and that are documents, videos or scientific data.
_NOT_IMAGES = frozenset([
    ".pdf", ".ps", ".eps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".fit", ".fits",
    ".wmf", ".emf",
])
# fmt: on
_LONGEST_ENDING = 12


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or belongs to an operating system."""
    return (name.startswith(".") and name != "..") or name.lower() in _SYSTEM_NAMES


@cache
def image_endings() -> frozenset[str]:
    """Return the endings of files that Pillow opens."""
    from PIL import Image

    register_decoders()
    endings = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in endings if kind in Image.OPEN) - _NOT_IMAGES


def is_image_ending(ending: str) -> bool:
    """Return whether Pillow opens files with this ending; the last of several endings counts."""
    return f".{ending.rpartition('.')[2].lower()}" in image_endings()


def may_hold_images(name: str) -> bool:
    """Return whether a file may be or hold images, by its name: any but known kinds of text."""
    path = PurePosixPath(name.lower())
    return path.suffix not in _TEXTS if path.suffix else path.name not in _TEXT_NAMES


def ending_of(name: str) -> str:
    """Return the ending of a file's name in words: "ending in .tar.gz" or "without an ending".

    Numbers and long words do not count as endings, since there could be thousands of them.
    """
    path = PurePosixPath(name.lower())
    if path.name in _TEXT_NAMES:
        return "named LICENSE, README and the like"
    if not any(map(str.isalpha, path.suffix)) or len(path.suffix) > _LONGEST_ENDING:
        return "without an ending"
    tar = ".tar" if path.suffix in ARCHIVES and path.stem.endswith(".tar") else ""
    return f"ending in {tar}{path.suffix}"
