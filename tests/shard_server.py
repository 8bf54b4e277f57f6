"""A web server on loopback that serves a folder of shards and misbehaves on demand."""

from __future__ import annotations

import base64
import contextlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from portrait_dist.data.shards.reader import ShardSet

STALL = 16384
"""Bytes of a shard after which an answer waits while ``may_send`` is cleared."""
PIECE = 4096


class ShardServer(http.server.ThreadingHTTPServer):
    """Serves files with ranges, over HTTP/1.0.

    Attributes:
        cuts: bytes after which the next answers end, connection and all; for files whose name ends
            in ``cut_suffix``.
        failures: HTTP codes of the next answers.
        password: ``user:password`` that each request must bring.
        ranges: whether partial requests are understood.
        with_length: whether answers say how long they are.
        delay: seconds between two pieces of 4,096 bytes.
        may_send: while cleared, an answer with a shard stops after ``STALL`` bytes and waits.
        instead: called with (handler, file name); True where it gave the answer.
        asked: names of the files asked for, in order.
        starts: from which byte on each shard was asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.cuts: list[int] = []
        self.cut_suffix = ".tar"
        self.failures: list[int] = []
        self.password = ""
        self.ranges = True
        self.with_length = True
        self.delay = 0.0
        self.may_send = threading.Event()
        self.may_send.set()
        self.instead: Callable[[Handler, str], bool] = lambda handler, name: False
        self.asked: list[str] = []
        self.starts: list[int] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def tars(self) -> list[str]:
        """Shards that were asked for, in order."""
        return [name for name in self.asked if name.endswith(".tar")]


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: ShardServer

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        self.server.asked.append(name)
        path = self.server.folder / name
        token = base64.b64encode(self.server.password.encode()).decode()
        if self.server.password and self.headers.get("Authorization") != f"Basic {token}":
            return self.send_error(401)
        if self.server.failures:
            return self.send_error(self.server.failures.pop(0))
        with contextlib.suppress(ConnectionError):
            if self.server.instead(self, name):
                return None
            if not path.is_file():
                return self.send_error(404)
            self._send(name, path.read_bytes())
        return None

    def _send(self, name: str, data: bytes) -> None:
        start = 0
        if self.server.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self.send_error(416)
        if name.endswith(".tar"):
            self.server.starts.append(start)
        self.send_response(206 if start else 200)
        if self.server.with_length:
            self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        end = len(data)
        if self.server.cuts and name.endswith(self.server.cut_suffix):
            end = start + self.server.cuts.pop(0)
        for offset in range(start, end, PIECE):
            self.wfile.write(data[offset : min(offset + PIECE, end)])
            time.sleep(self.server.delay)  # the latency of a server far away
            if name.endswith(".tar") and offset >= STALL:
                self.server.may_send.wait()
        return None

    def begin(self, length: int | None, status: int = 200, **headers: str) -> None:
        """Send the head of an answer."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    """Serve a folder until the end of the block."""
    with ShardServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.may_send.set()
            server.shutdown()


def content(shards: ShardSet) -> list[tuple[str, bytes, bytes]]:
    """All samples of a split."""
    found = [shards.read(sample) for sample in range(shards.samples)]
    return [(one.key, bytes(one.image), bytes(one.alpha)) for one in found]
