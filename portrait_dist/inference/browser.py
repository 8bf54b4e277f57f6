"""The network as one HTML file: opened from a disk it cuts out portraits, without a server.

The page holds the ONNX network and ONNX Runtime for browsers (the npm package onnxruntime-web, MIT
licence), both compressed, and asks nothing of a network.
"""

from __future__ import annotations

import base64
import gzip
from pathlib import Path

from portrait_dist.errors import InputError

TEMPLATE = Path(__file__).with_name("browser_page.html")
RUNTIME = "node_modules/onnxruntime-web"
"""Where npm puts the package."""
CODE, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
"""Its smallest form: CPU only, one script that needs no other."""


def find_runtime(folder: str | Path) -> tuple[Path, Path]:
    """Find the script and the WebAssembly of onnxruntime-web.

    Args:
        folder: of the package, as npm unpacks it, or its ``dist``.

    Raises:
        InputError: they are not there.
    """
    for place in (Path(folder, "dist"), Path(folder)):
        found = place / CODE, place / WASM
        if all(path.is_file() for path in found):
            return found
    raise InputError(
        f"--onnxruntime-web {folder}: no {CODE} and {WASM} there; run npm install onnxruntime-web "
        "and give node_modules/onnxruntime-web"
    )


def make_page(network: bytes, size: tuple[int, int], runtime: tuple[Path, Path]) -> bytes:
    """Put an ONNX network and its runtime into the page.

    Args:
        network: with the input ``image``, float32 [B, 3, H, W] from 0 to 1, and the output
            ``alpha``, [B, 1, H, W].
        size: (H, W).
        runtime: from :func:`find_runtime`.
    """
    code, wasm = (path.read_bytes() for path in runtime)
    page = TEMPLATE.read_text()
    page = page.replace("@SIZE@", f"[{size[0]}, {size[1]}]")
    for place, content in (("@RUNTIME@", code), ("@WASM@", wasm), ("@NETWORK@", network)):
        page = page.replace(place, _packed(content))
    return page.encode()


def _packed(content: bytes) -> str:
    # mtime: the same network gives the same bytes.
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()
