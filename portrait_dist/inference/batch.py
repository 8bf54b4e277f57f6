"""``portrait-dist predict``: pictures for many photos, each written whole or not at all.

Reading, the network and writing overlap: photos are read ahead and pictures written behind by threads, while this thread runs
the network.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError
from portrait_dist.inference import compositing
from portrait_dist.inference.segmenter import Alpha, PortraitSegmenter, read_picture
from portrait_dist.models import fused
from portrait_dist.system.progress import track

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
KINDS = ("mask", "cutout", "side-by-side")
"""For photo.jpg there are photo.mask.png, photo.cutout.png and photo.side-by-side.png."""

CALIBRATION_PHOTOS = 64
"""Photos, spread over all, that show ``--precision int8`` the ranges of the network's numbers."""

Photo = NDArray[np.uint8]
R = TypeVar("R")


def predict_files(
    checkpoint: str | Path,
    paths: Sequence[str],
    out: str | Path,
    *,
    background: str = "transparent",
    force: bool = False,
    batch_size: int = 8,
    precision: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Write mask, cut-out and side-by-side picture of every photo.

    Args:
        checkpoint: a .pth file of a run.
        paths: photos, folders and patterns.
        out: folder for the pictures; made where it does not exist.
        background: see :func:`portrait_dist.inference.compositing.parse_background`.
        force: overwrite pictures that exist.
        batch_size: photos that go through the network together.
        precision: of :class:`portrait_dist.inference.segmenter.PortraitSegmenter`; or ``int8``, calibrated with up to 64 of the photos and
            used where the masks stay what they were.
        options: of the same class.

    Returns:
        ``files`` (written paths), ``failed`` (always empty here), ``photos`` (how many are done), ``photos_per_second``.

    Raises:
        InputError: nothing to do, an output exists, or the options are wrong; nothing was written.
        DamagedDataError: some photos could not be read. The others are done; its ``result`` is what is returned otherwise, with
            ``photo`` and ``error`` of each in ``failed``.
    """
    out = Path(out)
    names = name_outputs(find_photos(paths, out))
    _refuse_to_overwrite(names, out, force)
    scene = compositing.parse_background(background)
    segmenter = _segmenter(checkpoint, list(names), precision, options)
    work = _Work(segmenter, names, out, scene, batch_size)
    begin = time.perf_counter()
    written = list(track(work.run(), total=len(names), what="photos"))
    result = {
        "files": [file for files in written for file in files],
        "failed": work.failed,
        "photos": len(written),
        "photos_per_second": len(written) / (time.perf_counter() - begin),
    }
    if work.failed:
        listed = "; ".join(failure["error"] for failure in work.failed)
        raise DamagedDataError(
            f"{len(work.failed)} of {len(names)} photos were left out, the others are done: {listed}",
            result,
        )
    return result


def _segmenter(
    checkpoint: str | Path, photos: Sequence[Path], precision: str, options: dict[str, Any]
) -> PortraitSegmenter:
    integers = precision == "int8"
    segmenter = PortraitSegmenter.from_checkpoint(
        checkpoint, precision="auto" if integers else precision, **options
    )
    if integers:
        agreement = segmenter.calibrate(_readable(photos[:: -(-len(photos) // CALIBRATION_PHOTOS)]))
        verdict = (
            "8-bit integers" if agreement >= fused.TOLERANCE else "too little, so in floating point"
        )
        print(
            f"masks in 8-bit integers against fp32: IoU {agreement:.4f}; {verdict}", file=sys.stderr
        )
    return segmenter


def _readable(photos: Iterable[Path]) -> Iterator[Photo]:
    for photo in photos:
        with contextlib.suppress(PortraitDistError):  # it is named when its turn comes
            yield read_picture(photo)


def find_photos(paths: Sequence[str], out: Path) -> dict[Path, Path]:
    """Photo → its path relative to the folder it was found under, in order and without doubles.

    Folders are looked through to the bottom; hidden files, other files, and what this command wrote before are left out.

    Raises:
        InputError: a path that does not exist, a pattern or folder without photos.
    """
    found: dict[Path, Path] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            hits = {
                photo: photo.relative_to(path)
                for photo in sorted(path.rglob("*"))
                if _is_photo(photo, path, out)
            }
        elif path.exists():
            hits = {path: Path(path.name)}
        else:
            hits = {
                Path(hit): Path(Path(hit).name)
                for hit in sorted(glob.glob(text, recursive=True))
                if _is_photo(Path(hit))
            }
        if not hits:
            what = (
                "no photo in this folder"
                if path.is_dir()
                else "no such file, and no photo fits it as a pattern"
            )
            raise InputError(
                f"{text}: {what}; give photos ({', '.join(sorted(SUFFIXES))}), folders or patterns in quotes"
            )
        found |= {photo: name for photo, name in hits.items() if photo not in found}
    one_each = {photo.resolve(): photo for photo in reversed(found)}
    return {photo: name for photo, name in found.items() if one_each[photo.resolve()] == photo}


def _is_photo(path: Path, folder: Path | None = None, out: Path | None = None) -> bool:
    """Has it a picture's suffix, and is it neither hidden nor one of this command's outputs?"""
    inside = path.relative_to(folder).parts if folder else (path.name,)
    if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in inside):
        return False
    if path.stem.endswith(tuple(f".{kind}" for kind in KINDS)):
        return False
    under_out = out is not None and folder is not None and out.resolve() != folder.resolve()
    return path.is_file() and not (under_out and path.resolve().is_relative_to(out.resolve()))  # type: ignore[union-attr]


def name_outputs(photos: dict[Path, Path]) -> dict[Path, str]:
    """Photo → the name of its outputs under --out, without ``.mask.png``. No two are equal.

    A photo keeps its name (and its subfolder, found in a folder). Where names clash, those photos keep their suffix too, where
    that is not enough, the folders in which they differ, and at last they are numbered.
    """
    names = {photo: str(name.with_suffix("")) for photo, name in photos.items()}
    for photo in _clashing(names):
        names[photo] = str(photos[photo])
    clashing = _clashing(names)
    if clashing:
        common = Path(os.path.commonpath([photo.resolve().parent for photo in clashing]))
        for photo in clashing:
            names[photo] = str(photo.resolve().relative_to(common))
    while clashing := _clashing(names):
        for number, photo in enumerate(clashing, start=1):
            names[photo] = f"{names[photo]}-{number}"
    return names


def _clashing(names: dict[Path, str]) -> list[Path]:
    """Photos whose name another photo has too; on some file systems Photo and photo are one."""
    count: dict[str, int] = {}
    for name in names.values():
        count[name.lower()] = count.get(name.lower(), 0) + 1
    return [photo for photo, name in names.items() if count[name.lower()] > 1]


def _targets(out: Path, name: str) -> dict[str, Path]:
    return {kind: out / f"{name}.{kind}.png" for kind in KINDS}


def _refuse_to_overwrite(names: dict[Path, str], out: Path, force: bool) -> None:
    there = [
        path for name in names.values() for path in _targets(out, name).values() if path.exists()
    ]
    if there and not force:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise InputError(
            f"{there[0]}{others} exist; add --force to overwrite, or choose another --out"
        )


def _in_order(
    threads: ThreadPoolExecutor,
    function: Callable[..., R],
    calls: Iterable[tuple[Path, tuple[Any, ...]]],
    ahead: int,
) -> Iterator[tuple[Path, Future[R]]]:
    """Run calls on threads, at most ``ahead`` at a time; yield (photo, its future) in order."""
    waiting: deque[tuple[Path, Future[R]]] = deque()
    for photo, arguments in calls:
        waiting.append((photo, threads.submit(function, *arguments)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


class _Work:
    """The photos' way from file to pictures; ``failed`` fills on the way."""

    def __init__(
        self,
        segmenter: PortraitSegmenter,
        names: dict[Path, str],
        out: Path,
        scene: compositing.Background,
        batch_size: int,
    ) -> None:
        self.segmenter, self.names, self.out, self.scene, self.batch_size = (
            segmenter,
            names,
            out,
            scene,
            batch_size,
        )
        self.failed: list[dict[str, str]] = []
        self.cores = os.cpu_count() or 1

    def run(self) -> Iterator[list[str]]:
        """The written files of each photo that could be read, in order."""
        with ThreadPoolExecutor(self.cores) as readers, ThreadPoolExecutor(self.cores) as writers:
            calls = _in_order(
                readers,
                read_picture,
                ((photo, (photo,)) for photo in self.names),
                ahead=2 * self.batch_size,
            )
            for _, future in _in_order(writers, self._write, self._alphas(calls), ahead=self.cores):
                yield future.result()

    def _alphas(
        self, reads: Iterable[tuple[Path, Future[Photo]]]
    ) -> Iterator[tuple[Path, tuple[Any, ...]]]:
        readable: deque[Path] = deque()

        def pictures() -> Iterator[Photo]:
            for photo, future in reads:
                try:
                    picture = future.result()
                except PortraitDistError as error:
                    self.failed.append({"photo": str(photo), "error": str(error)})
                    continue
                readable.append(photo)
                yield picture

        for picture, alpha in self.segmenter.stream(pictures(), self.batch_size):
            photo = readable.popleft()
            yield photo, (photo, picture, alpha)

    def _write(self, photo: Path, picture: Photo, alpha: Alpha) -> list[str]:
        cut = compositing.cut_out(picture, alpha, self.scene)
        planes = {
            "mask": compositing.to_bytes(alpha),
            "cutout": cut,
            "side-by-side": compositing.side_by_side(picture, alpha, cut),
        }
        targets = _targets(self.out, self.names[photo])
        for kind, plane in planes.items():
            write_png(targets[kind], plane)
        return [str(path) for path in targets.values()]


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write grey [H, W], RGB [H, W, 3] or RGBA [H, W, 4] under a temporary name, then rename it.

    Raises:
        PortraitDistError: it cannot be written; the file that was there stays.
    """
    order = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    encoded = cv2.imencode(
        ".png", cv2.cvtColor(picture, order[picture.shape[2]]) if picture.ndim == 3 else picture
    )[1]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(encoded.data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PortraitDistError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --out"
        ) from error
