"""Files behind URLs, through fsspec: objects of S3 and Google Cloud Storage, the Hub, and HTTP.

Credentials, endpoints and other options of a file system come from where its library reads them:
environment variables and its files of settings.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from igpt.errors import InputError
from igpt.files import require_regular

# `Path` joins the two slashes of a URL to one. A single letter is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}([^/].*)", re.DOTALL)
_EXTRAS = {"s3": "remote", "s3a": "remote", "http": "remote", "https": "remote"}
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs"}


def url_of(path: str | os.PathLike[str]) -> str | None:
    """Return the URL that a name or path is; None for a path of this machine."""
    match = _URL.fullmatch(os.fspath(path))
    return f"{match[1].lower()}://{match[2]}" if match else None


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path or URL as a user writes it."""
    return url_of(path) or os.fspath(path)


def name_in(url: str) -> str:
    """Return the name of a file behind a URL, without the query."""
    path = urlsplit(url).path if url.startswith("http") else url
    return path.rstrip("/").rsplit("/", 1)[-1]


@contextmanager
def reasons(url: str, doing: str = "read") -> Iterator[None]:
    """Raise errors of file systems behind URLs, which have many types, as `InputError`."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        protocol = url.partition(":")[0]
        package = f"'igpt[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else _PACKAGES.get(protocol)
        advice = f"pip install {package}" if package else str(error)
        raise InputError(f"{protocol}:// needs a package that is not installed: {advice}") from None
    except Exception as error:
        cause = error.__cause__  # "no file" may stand for a failing network
        status = getattr(getattr(cause, "response", None), "status_code", None)
        is_absent = not isinstance(cause, OSError) or status == 404
        if isinstance(error, FileNotFoundError) and is_absent:
            raise InputError(f"{url} is not there ({_text(error)})") from None
        text = _text(error.__cause__ or error)
        if "credential" in text.lower():
            text += "; for S3, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        raise InputError(
            f"{url} cannot be {'read' if doing == 'read' else doing}: {text}"
        ) from None


def _text(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it.

    Raises:
        InputError: its protocol is not known, or a package is missing.
    """
    import fsspec

    with reasons(url):
        system, path = fsspec.core.url_to_fs(url)
    return system, path


class _Stream(io.RawIOBase):
    """A file of fsspec whose errors are raised as `InputError`."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with reasons(self._url):
            content: bytes = self._file.read(size)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with reasons(self._url):
            position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position


@contextmanager
def opened(file: str) -> Iterator[IO[bytes]]:
    """Open a file of this machine, or the one behind a URL, which is read in ranges.

    Raises:
        InputError: the file is not there, not a regular one, or cannot be read.
    """
    if "://" not in file:
        require_regular(Path(file))
        with Path(file).open("rb") as local:
            yield local
        return
    system, path = file_system(file)
    with reasons(file):
        remote = system.open(path, "rb")
    with remote:
        yield _Stream(file, remote)  # type: ignore[misc]
