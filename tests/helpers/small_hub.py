"""A small local Hub that serves data sets and models, and accepts models by commits."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".png")  # suffixes of files that are stored separately, as by LFS


@dataclass
class Hub:
    """Data sets and models by id, each with its files by path, and the files that were sent.

    Attributes:
        log: the path of the file, the first byte and the last one, of each answer that held data.
        closed: whether data are refused.
        private: ids that only their owners see.
        users: who may write to what is theirs, by token.
        commits: the message of each.
        stored: large files by their SHA-256.
        broken: whether large files are refused.
    """

    sets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    address: str = ""
    log: list[tuple[str, int, int]] = field(default_factory=list)
    closed: bool = False
    private: set[str] = field(default_factory=set)
    users: dict[str, str] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    broken: bool = False

    def sent(self, ending: str) -> int:
        """Return how many bytes of the files whose paths have this suffix were sent."""
        return sum(last + 1 - first for path, first, last in self.log if path.endswith(ending))

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process that uses this Hub, with its own cache."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_XET": "1",
        }


FOREIGN = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_CACHE",
    "HF_HUB_CACHE",
    "HF_TOKEN",
)  # of the surrounding environment, which a process with this Hub must not see


class Handler(BaseHTTPRequestHandler):
    """Answer the requests of `datasets` and `huggingface_hub`; all others get 404."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.command == "PUT":
            self.take_large(path.rpartition("/")[2], body)
        elif self.command == "POST" and not re.search("/(tree|paths-info)/", path):
            self.take(path, body)
        else:
            self.give(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    @property
    def user(self) -> str | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def give(self, path: str, body: bytes) -> None:
        url = urlsplit(self.path)
        match = re.fullmatch(
            r"/(api/)?(?:(datasets)/|models/|)([^/]+/[^/]+)(?:/([\w-]+)/[^/]+(?:/(.+))?)?", path
        )
        _, kind, name, verb, inner = match.groups() if match else ("", "", "", "", "")
        files = (self.hub.sets if kind else self.hub.models).get(name)
        if files is None or (name in self.hub.private and name.split("/")[0] != self.user):
            self.send(404, headers={"X-Error-Code": "RepoNotFound"})
        elif verb == "resolve":
            self.send_file(inner, files.get(inner))
        elif verb == "tree":
            recursive = parse_qs(url.query).get("recursive", [""])[0].lower() in ("true", "1")
            self.send_json(
                [
                    entry
                    for entry in tree(files)
                    if lies_in(entry["path"], inner or "", recursive=recursive)
                ]
            )
        elif verb == "paths-info":
            wanted = (
                json.loads(body)["paths"]
                if body.startswith(b"{")
                else parse_qs(body.decode())["paths"]
            )
            self.send_json([entry for entry in tree(files) if entry["path"] in wanted])
        else:
            siblings = [{"rfilename": path} for path in files]
            self.send_json(
                {
                    "id": name,
                    "sha": SHA,
                    "private": name in self.hub.private,
                    "tags": [],
                    "siblings": siblings,
                }
            )

    def take(self, path: str, body: bytes) -> None:
        """Answer requests that create or fill repositories; users can only write to their own."""
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            wrong = (
                []
                if content.startswith("---\n") and "\n---\n" in content[4:]
                else [{"message": "no metadata"}]
            )
            self.send(
                200 if not wrong else 400, json.dumps({"errors": wrong, "warnings": []}).encode()
            )
            return
        if self.user is None:
            self.send(401, json.dumps({"error": "Invalid username or password."}).encode())
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or self.user}/{asked['name']}"
        else:
            match = re.match(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?/", path)
            name = match[1] if match else ""
        if name.split("/")[0] != self.user:
            self.send(
                403,
                json.dumps({"error": "You don't have the rights to create a model there"}).encode(),
            )
        elif path == "/api/repos/create":
            if name in self.hub.models:
                self.send(
                    409, json.dumps({"error": "You already created this model repo"}).encode()
                )
                return
            self.hub.models[name] = {".gitattributes": b""}
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self.send_json({"url": f"{self.hub.address}/{name}"})
        elif path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(LARGE) else "regular" for path in paths]
            files = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in zip(paths, modes, strict=True)
            ]
            self.send_json({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.hub.address}/large/{item['oid']}"}}
            self.send_json({"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    self.hub.models[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.models[name][value["path"]] = self.hub.stored[value["oid"]]
            self.send_json(
                {"commitUrl": f"{self.hub.address}/{name}/commit/{SHA}", "commitOid": SHA}
            )
        else:
            self.send(404)

    def take_large(self, oid: str, body: bytes) -> None:
        if self.hub.broken or hashlib.sha256(body).hexdigest() != oid:
            self.send(400 if self.hub.broken else 422)
            return
        self.hub.stored[oid] = body
        self.send(200)

    def send_file(self, path: str, content: bytes | None) -> None:
        if content is None:
            self.send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
            return
        if self.hub.closed:
            self.send(403)
            return
        headers = {
            "X-Repo-Commit": SHA,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        status, first, last = 200, 0, len(content) - 1
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, first, last = 206, int(match[1]), min(int(match[2] or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        if self.command == "GET":
            self.hub.log.append((path, first, last))
        self.send(status, content[first : last + 1], headers)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def tree(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    folders = {
        str(parent): b"" for path in files for parent in Path(path).parents if parent != Path()
    }
    return [
        {"type": kind, "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        for kind, found in (("directory", folders), ("file", files))
        for path, content in found.items()
    ]


def lies_in(path: str, folder: str, *, recursive: bool) -> bool:
    inner = path.removeprefix(f"{folder}/") if folder else path
    return (inner != path or not folder) and (recursive or "/" not in inner)


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a Hub at its `address` until the end of the block."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub)) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
