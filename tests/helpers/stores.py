"""An object store with the interface of S3, and a web server that sends ranges of files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
from moto.server import ThreadedMotoServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@contextmanager
def object_store(bucket: str) -> Iterator[Any]:
    """Serve a bucket to this process and those that it starts; yield its file system."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "NO_PROXY": "127.0.0.1"}
    try:
        system = fsspec.filesystem("s3", use_listings_cache=False)
        system.mkdir(bucket)
        yield system
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)
        fsspec.get_filesystem_class("s3").clear_instance_cache()


class _Handler(SimpleHTTPRequestHandler):
    """Send files, or the ranges of them that are asked for; log the bytes of each answer."""

    protocol_version = "HTTP/1.1"
    sent: list[int]
    ranges = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def answer(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        total, wanted = len(content), self.headers.get("Range")
        if wanted and self.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or total), total - 1)
            content = content[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.sent.append(len(content))
            self.wfile.write(content)

    do_GET = do_HEAD = answer  # noqa: N815


@contextmanager
def web_server(folder: Path, *, ranges: bool = True) -> Iterator[tuple[str, list[int]]]:
    """Serve a folder; yield its address, and a list of the bytes of each answer."""
    sent = list[int]()
    handler = type("Handler", (_Handler,), {"sent": sent, "ranges": ranges})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
