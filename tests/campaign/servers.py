"""HTTP servers on loopback that misbehave in a seeded way."""

from __future__ import annotations

import contextlib
import http.server
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from portrait_dist.data.shards.format import DIGEST

WAYS = (
    "is honest",
    "cuts bodies",
    "answers 503",
    "answers 404",
    "flips a bit",
    "sends endless bodies",
    "drips",
    "lies about the length",
    "ignores ranges",
    "answers HTML",
    "redirects in a loop",
    "redirects to a file",
    "resets connections",
    "has a manifest with paths in its hashes",
    "has a manifest with paths in its names",
    "has an endless manifest",
)


@contextlib.contextmanager
def serve(folder: Path, way: str, seed: int) -> Iterator[str]:
    """Serve a folder on loopback in the given way; yields the address."""
    draw = random.Random(seed)
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            with lock:
                odd = draw.random() < 0.5
                number = draw.random()
            path = folder / self.path.partition("?")[0].lstrip("/")
            data = path.read_bytes() if path.is_file() else None
            if data is not None and path.name == "manifest.json":
                data = _manifest(way, data)
            with contextlib.suppress(OSError):
                _answer(
                    self, way if odd or "manifest" in way else "is honest", data, number, path.name
                )

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def _manifest(way: str, data: bytes) -> bytes:
    if way == "has a manifest with paths in its hashes":
        return _edited(data, "sha256", "./../../outside/precious")
    if way == "has a manifest with paths in its names":
        return _edited(data, "name", "../../outside/precious.tar")
    return data


def _edited(data: bytes, field: str, value: str) -> bytes:
    manifest = json.loads(data)
    manifest.pop(DIGEST, None)  # an attacker would write a right one

    def visit(item: Any) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                if key == field and isinstance(inner, str):
                    item[key] = value
                else:
                    visit(inner)
        elif isinstance(item, list):
            for inner in item:
                visit(inner)

    visit(manifest)
    return json.dumps(manifest).encode()


def _answer(
    handler: http.server.BaseHTTPRequestHandler,
    way: str,
    data: bytes | None,
    number: float,
    name: str,
) -> None:
    if data is None or way == "answers 404":
        handler.send_error(404)
        return
    if way == "answers 503":
        handler.send_error(503)
        return
    if way.startswith("redirects"):
        handler.send_response(302)
        target = handler.path if way == "redirects in a loop" else "file:///etc/passwd"
        handler.send_header("Location", target)
        handler.end_headers()
        return
    if way == "resets connections":
        handler.connection.close()
        return
    body = b"<html>welcome to the portal</html>" if way == "answers HTML" else data
    if way == "flips a bit" and body:
        flipped = bytearray(body)
        flipped[int(number * len(body))] ^= 1
        body = bytes(flipped)
    start = 0
    header = handler.headers.get("Range", "")
    if header.startswith("bytes=") and way != "ignores ranges":
        start = int(header[6:].split("-")[0])
        if start >= len(body):
            handler.send_error(416)
            return
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    length = len(body) - start
    endless = way == "sends endless bodies" or (
        way == "has an endless manifest" and name == "manifest.json"
    )
    if way == "lies about the length":
        length += 100
    if not endless:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()
    _send(handler, way, body[start:], number, endless)


def _send(
    handler: http.server.BaseHTTPRequestHandler, way: str, body: bytes, number: float, endless: bool
) -> None:
    if way == "cuts bodies":
        handler.wfile.write(body[: int(number * len(body))])
    elif way == "drips":
        for byte in body[:400]:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)  # the drip itself, not a wait for an event
    elif endless:
        handler.wfile.write(body)
        for _ in range(400):
            handler.wfile.write(bytes(1 << 20))
    else:
        handler.wfile.write(body)
