"""Middleware of the web page: checks of host names and request sizes, and error pages."""

import asyncio
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]  # of ASGI, as are the next two
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_MARGIN = 1 << 20  # bytes of a request around the file that it uploads


class Guard:
    """ASGI middleware around the page's program.

    - A request must address the machine by a name of `names_of`. Otherwise the name of another site
      could resolve to this machine (DNS rebinding), and its page could read everything here with a
      visitor's browser.
    - A request must state its length. Requests larger than a file may be, and more simultaneous
      uploads than the folder of uploads may hold, are refused. A request whose body does not arrive
      in time is closed.
    - An error in the program is one line on the console, and an error as the answer.

    Args:
        program: the ASGI application.
        names, any_number: see `names_of`.
        uploads: folder of the uploaded files.
        largest: bytes of a file.
        most: bytes of all files; the oldest are deleted beyond it.
        seconds: files that were not used for so long are deleted.
        arrival: seconds in which the body of a request has to arrive.
    """

    def __init__(
        self,
        program: Any,
        *,
        names: frozenset[str],
        any_number: bool,
        uploads: Path,
        largest: int,
        most: int,
        seconds: float,
        arrival: float,
    ) -> None:
        self.program, self.names, self.any_number = program, names, any_number
        self.uploads, self.largest, self.most, self.seconds = uploads, largest, most, seconds
        self.arrival = arrival
        self.arriving = 0  # bytes of the uploads that are being received

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.program(scope, receive, send)
            return
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(scope, send, *refusal)
            return
        length = _length(headers) or 0
        arrival = self.arrival if length else None
        if not _is_upload(scope):
            await self._run(scope, receive, send, arrival)
            return
        self.arriving += length
        try:
            await self._run(scope, receive, send, arrival)
        finally:
            self.arriving -= length
            await asyncio.to_thread(delete_unused, self.uploads, self.most, self.seconds)

    def _refusal(self, scope: Message, headers: list[tuple[bytes, str]]) -> tuple[int, str] | None:
        """Return the status and the reason to refuse a request with, or None."""
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1:
            return 400, "a request names one host"
        name = _name(hosts[0])
        if name not in self.names and not (self.any_number and _is_number(name)):
            return 421, f"this page is served as {', '.join(sorted(self.names))} only"
        length = _length(headers)
        if length is None:
            if scope.get("method") not in ("POST", "PUT", "PATCH"):
                return None
            return 411, "a request states its length"
        if length > self.largest + _MARGIN:
            return 413, f"a file has at most {self.largest >> 20} MB"
        if _is_upload(scope) and self.arriving + length > self.most:
            return 503, "too much is being uploaded at once; try again"
        return None

    async def _run(
        self, scope: Message, receive: Receive, send: Send, arrival: float | None
    ) -> None:
        """Run the application, with a time limit for the arrival of the request's body."""
        begun = ended = False

        async def watched(message: Message) -> None:
            nonlocal begun, ended
            begun = True
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        async def received() -> Message:
            message = await receive()
            waiting = limit.when() is not None and not limit.expired()
            if waiting and not message.get("more_body"):
                limit.reschedule(None)
            return message

        try:
            async with asyncio.timeout(arrival) as limit:
                await self.program(scope, received, watched)
        except Exception as error:
            if limit.expired():
                status, answer = 408, "the request did not arrive in time"
            elif type(error).__name__ == "ClientDisconnect":  # Starlette's
                return
            else:
                status, answer = 400, "this page cannot answer such a request"
                reason = " ".join(str(error).split())[:200]
                asked = f"{scope.get('method', scope['type'])} {scope['path']}"[:200]
                print(f"igpt app: {asked!r}: {type(error).__name__}: {reason}", file=sys.stderr)
            if not begun:
                await _answer(scope, send, status, answer)
            elif not ended:
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def _is_upload(scope: Message) -> bool:
    path: str = scope["path"]
    return path.rstrip("/").endswith("/upload")


async def _answer(scope: Message, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # before it was accepted: status 403
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})


def names_of(host: str) -> tuple[frozenset[str], bool]:
    """Return the allowed host names of a page, and whether numeric addresses are allowed.

    A page that listens at a loopback address is served under the names of that only. Others are
    served under the machine's names and under any number: a foreign site cannot have a number as
    its name.
    """
    names = {"localhost", "127.0.0.1", "::1", _name(f"[{host}]" if ":" in host else host)}
    if _is_loopback(host):
        return frozenset(names), False
    own = socket.gethostname().lower()
    short = own.partition(".")[0]
    return frozenset(names | {own, short, f"{short}.local", _name(socket.getfqdn())}), True


def _is_loopback(host: str) -> bool:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _name(host: str) -> str:
    """Return the name of a Host header, without its port and without brackets."""
    host = host.strip().lower()
    name, _, _ = host[1:].partition("]") if host.startswith("[") else host.partition(":")
    name = name.rstrip(".")
    return str(ipaddress.ip_address(name)) if _is_number(name) else name


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _length(headers: list[tuple[bytes, str]]) -> int | None:
    """Return the length that a request states; None if it states none."""
    lengths = [value for name, value in headers if name == b"content-length"]
    in_chunks = any(name == b"transfer-encoding" for name, _ in headers)
    if in_chunks or len(lengths) != 1 or not lengths[0].isdecimal():
        return None
    return int(lengths[0]) if len(lengths[0]) < 20 else sys.maxsize


def delete_unused(folder: Path, most: int, seconds: float) -> None:
    """Delete unused files after some seconds, and the least recently used above `most` bytes.

    Folders stay: another file may be on its way into them.
    """
    found = []
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:  # deleted by another request
            continue
        if not path.is_dir():
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for used, size, path in sorted(found):
        if total <= most and time.time() - used < seconds:
            return
        path.unlink(missing_ok=True)
        total -= size


def mark_used(path: Path) -> None:
    """Postpone the deletion of a file."""
    try:
        os.utime(path)
    except FileNotFoundError:  # the code that opens it raises an error
        return
