"""Makes a raw AISegment tree of synthetic portraits: 600x800 JPEG pictures and RGBA PNG mattes.

    OUT/synth.json                                                        what the tree was made with
    OUT/clip_img/<group>/clip_00000000/<group>-<8 digits>.jpg             60 to 150 kB
    OUT/matting/<group>/matting_00000000/<group>-<8 digits>.png           colours of the picture where alpha > 0, else black

Pair i is a pure function of (seed, i): the same for any number of workers, and in a larger tree of the same seed. Files are
written under another name and renamed, so a killed run leaves only complete ones, and the same command finishes the tree.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portrait_dist.errors import InputError
from portrait_dist.system.progress import track

PAIRS_PER_GROUP = 10
JPEG_BYTES = (60_000, 150_000)
MARKER = "synth.json"


def key(index: int) -> str:
    """Stem of pair ``index``, ``<group>-<8 digits>``: groups of ten pairs."""
    return f"{1900000001 + index // PAIRS_PER_GROUP}-{index % PAIRS_PER_GROUP + 1:08d}"


def paths(out: Path, index: int) -> tuple[Path, Path]:
    """Image and matte file of pair ``index``."""
    stem = key(index)
    group = stem.partition("-")[0]
    return (
        out / "clip_img" / group / "clip_00000000" / f"{stem}.jpg",
        out / "matting" / group / "matting_00000000" / f"{stem}.png",
    )


def generate(out: Path, pairs: int, seed: int = 0, workers: int | None = None) -> dict[str, Any]:
    """Make the tree, or finish it.

    Args:
        out: folder to write; new, empty, or one that a run with the same seed began.
        pairs: how many.
        seed: at least 0.
        workers: processes; the CPUs this process may use when None.

    Returns:
        ``pairs``, ``bytes`` of all their files, ``seconds``, ``pairs_per_second`` of those made now.

    Raises:
        InputError: a number out of range, or a folder that holds something else.
    """
    if pairs < 1 or seed < 0:
        raise InputError(
            f"--pairs {pairs} --seed {seed}: --pairs is at least 1 and --seed at least 0"
        )
    begin = time.monotonic()
    _claim(out, pairs, seed)
    missing = [
        index for index in range(pairs) if not all(path.is_file() for path in paths(out, index))
    ]
    for _ in track(_make(out, missing, seed, workers), total=len(missing), what="pairs"):
        pass
    seconds = time.monotonic() - begin
    size = sum(path.stat().st_size for index in range(pairs) for path in paths(out, index))
    return {
        "pairs": pairs,
        "bytes": size,
        "seconds": round(seconds, 3),
        "pairs_per_second": round(len(missing) / seconds, 2),
        "out": str(out),
    }


def _claim(out: Path, pairs: int, seed: int) -> None:
    """Write down what the folder is for, unless it is for something else."""
    marker = out / MARKER
    if marker.is_file():
        try:
            made = json.loads(marker.read_text())
            same_seed, more = int(made["seed"]) == seed, int(made["pairs"]) > pairs
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{marker}: not written by 'portrait-dist synth'; give another --out"
            ) from None
        if not same_seed:
            raise InputError(
                f"{out}: made with --seed {made['seed']}; use that seed or another --out"
            )
        if more:
            raise InputError(
                f"{out}: holds {made['pairs']} pairs, not {pairs}; ask for as many or more, or give another --out"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already holds something else; give a new folder as --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(marker, json.dumps({"format": 1, "pairs": pairs, "seed": seed}).encode())
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); give a folder of yours as --out"
        ) from error


def _make(out: Path, indices: list[int], seed: int, workers: int | None) -> Iterator[int]:
    """Bytes of each pair as it is finished."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(indices))
    make = partial(write_pair, out, seed)
    if workers <= 1:
        yield from map(make, indices)
        return
    # Not forked: this process may hold threads of libraries that a fork would leave locked.
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    ) as pool:
        try:
            yield from pool.map(make, indices, chunksize=4)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One thread, as there is a process for each core; and an end when the parent is killed, for which the pool has no care."""
    import cv2

    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def write_pair(out: Path, seed: int, index: int) -> int:
    """Draw pair ``index`` and write its two files; returns their bytes."""
    import cv2

    from portrait_dist.data.source.drawing import draw_portrait

    image, alpha = draw_portrait(np.random.default_rng([seed, index]))
    image_path, matte_path = paths(out, index)
    matte = np.dstack([np.where(alpha[..., None] > 0, image, 0)[..., ::-1], alpha])
    png = cv2.imencode(".png", matte, [cv2.IMWRITE_PNG_COMPRESSION, 2])[1].tobytes()
    jpeg = encode_jpeg(image)
    _write(matte_path, png)
    _write(image_path, jpeg)
    return len(png) + len(jpeg)


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """JPEG of an RGB image [H, W, 3], of the first quality that brings it into ``JPEG_BYTES``; real photos have such sizes."""
    import cv2

    low, high, quality = 50, 98, 90
    while True:
        data: bytes = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[
            1
        ].tobytes()
        if len(data) > JPEG_BYTES[1]:
            high = quality - 1
        elif len(data) < JPEG_BYTES[0]:
            low = quality + 1
        else:
            return data
        if low > high:
            return data
        quality = (low + high) // 2


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
