"""Make a raw AISegment tree of synthetic portraits: 600×800 JPEG images and RGBA PNG mattes.

    OUT/synth.json                                                    what the tree was made with
    OUT/clip_img/<group>/clip_00000000/<group>-<8 digits>.jpg         60 to 150 kB
    OUT/matting/<group>/matting_00000000/<group>-<8 digits>.png       the image's colours where
                                                                      alpha > 0, else black

Pair i is a pure function of (seed, i): the same for any number of workers, and in a larger tree of
the same seed. Files appear whole or not at all, so a killed run leaves only complete ones, and the
same command finishes the tree.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from portrait_dist.errors import InputError
from portrait_dist.files import (
    check_folder_writable,
    claim_folder,
    explained,
    lock_output,
    read_marker,
    remove_temporary_files,
    write_bytes,
)
from portrait_dist.system.info import cores
from portrait_dist.system.progress import track

PAIRS_PER_GROUP = 10
JPEG_BYTES = (60_000, 150_000)
MARKER = "synth.json"


@dataclass(frozen=True)
class SynthResult:
    """What was made.

    Args:
        pairs: in the tree.
        bytes: of all their files.
        seconds: of this run.
        pairs_per_second: of those made in this run.
        out: the tree.
    """

    pairs: int
    bytes: int
    seconds: float
    pairs_per_second: float
    out: str


def sample_key(index: int) -> str:
    """Return the stem of pair ``index``, ``<group>-<8 digits>``: groups of ten pairs."""
    return f"{1900000001 + index // PAIRS_PER_GROUP}-{index % PAIRS_PER_GROUP + 1:08d}"


def paths(out: Path, index: int) -> tuple[Path, Path]:
    """Return the image and matte file of pair ``index``."""
    stem = sample_key(index)
    group = stem.partition("-")[0]
    return (
        out / "clip_img" / group / "clip_00000000" / f"{stem}.jpg",
        out / "matting" / group / "matting_00000000" / f"{stem}.png",
    )


def generate(out: Path, pairs: int, seed: int = 0, workers: int | None = None) -> SynthResult:
    """Make the tree, or finish it.

    Args:
        out: folder to write; new, empty, or one that a run with the same seed began.
        pairs: how many.
        seed: at least 0.
        workers: processes; the CPUs this process may use when None.

    Raises:
        InputError: a number out of range, a folder that holds something else or cannot be written.
        PortraitDistError: the disk is full.
    """
    if pairs < 1 or seed < 0:
        raise InputError(
            f"--pairs {pairs} --seed {seed}: --pairs is at least 1 and --seed at least 0"
        )
    start = time.monotonic()
    _claim(out, pairs, seed)
    with lock_output(out, "synth", out):
        missing = [
            index for index in range(pairs) if not all(path.is_file() for path in paths(out, index))
        ]
        _remove_leftovers(out, missing)
        for _ in track(_make(out, missing, seed, workers), total=len(missing), what="pairs"):
            pass
    seconds = time.monotonic() - start
    return SynthResult(
        pairs=pairs,
        bytes=sum(path.stat().st_size for index in range(pairs) for path in paths(out, index)),
        seconds=round(seconds, 3),
        pairs_per_second=round(len(missing) / seconds, 2),
        out=str(out),
    )


def _claim(out: Path, pairs: int, seed: int) -> None:
    """Write into the folder what it is for, unless it is for something else."""
    check_folder_writable(out)
    before = read_marker(out, MARKER, "synth")
    if before is not None:
        made, made_seed = before.get("pairs"), before.get("seed")
        if type(made) is not int or type(made_seed) is not int:
            raise InputError(
                f"{out / MARKER}: not written by 'portrait-dist synth'; give another --out"
            )
        if made_seed != seed:
            raise InputError(f"{out}: made with --seed {made_seed}; use that seed or another --out")
        if made > pairs:
            raise InputError(
                f"{out}: holds {made} pairs, not {pairs}; "
                "ask for as many or more, or give another --out"
            )
    claim_folder(out, MARKER, {"format": 1, "pairs": pairs, "seed": seed})


def _remove_leftovers(out: Path, missing: list[int]) -> None:
    """Remove the temporary files of a killed run, which lie beside the files that are missing."""
    for folder in {path.parent for index in missing for path in paths(out, index)}:
        if folder.is_dir():
            remove_temporary_files(folder)


def _make(out: Path, indices: list[int], seed: int, workers: int | None) -> Iterator[int]:
    """Bytes of each pair as it is finished."""
    workers = min(workers or cores(), len(indices))
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
    """Give this worker one OpenCV thread, and exit if the parent dies.

    There is a process for each core already, and ProcessPoolExecutor does not handle the death of
    its parent.
    """
    import cv2

    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def write_pair(out: Path, seed: int, index: int) -> int:
    """Draw pair ``index`` and write its two files; return their length in bytes."""
    import cv2

    from portrait_dist.data.source.drawing import draw_portrait

    image, alpha = draw_portrait(np.random.default_rng([seed, index]))
    image_path, matte_path = paths(out, index)
    matte = np.dstack([np.where(alpha[..., None] > 0, image, 0)[..., ::-1], alpha])
    png = cv2.imencode(".png", matte, [cv2.IMWRITE_PNG_COMPRESSION, 2])[1].tobytes()
    jpeg = encode_jpeg(image)
    for path, data in ((matte_path, png), (image_path, jpeg)):
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    return len(png) + len(jpeg)


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """Encode an RGB image [H, W, 3] as a JPEG of ``JPEG_BYTES``, as real photos have.

    The quality is found by bisection from 50 to 98, beginning with 90.
    """
    import cv2

    low, high, quality = 50, 98, 90
    while True:
        parameters = [cv2.IMWRITE_JPEG_QUALITY, quality]
        data: bytes = cv2.imencode(".jpg", image[..., ::-1], parameters)[1].tobytes()
        if len(data) > JPEG_BYTES[1]:
            high = quality - 1
        elif len(data) < JPEG_BYTES[0]:
            low = quality + 1
        else:
            return data
        if low > high:
            return data
        quality = (low + high) // 2
