"""Finds the pairs of image and matte in a raw AISegment tree, and checks their headers.

    RAW/clip_img/<group>/clip_*/<stem>.jpg        the picture
    RAW/matting/<group>/matting_*/<stem>.png      the same picture with an alpha channel

An image and a matte belong together when their stems are equal; the stem is the pair's key.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError
from portrait_dist.system.progress import track

IMAGES, MATTES = "clip_img", "matting"
IMAGE_SUFFIXES, MATTE_SUFFIXES = (".jpg", ".jpeg"), (".png",)


@dataclass(frozen=True, order=True)
class Pair:
    """One portrait: ``key`` is the stem of both files, ``group`` the folder the image came in."""

    key: str
    image: Path
    matte: Path
    group: str


@dataclass
class PairReport:
    """What a raw tree holds."""

    pairs: list[Pair]  # sorted by key
    images_without_matte: list[Path]
    mattes_without_image: list[Path]
    identical: list[
        tuple[Path, Path]
    ]  # (the file that is taken, another of the same stem and content)


def find_pairs(raw: Path) -> PairReport:
    """Pair all images and mattes by their stems.

    Hidden files (``._*``), files where folders are expected and files of other types are left aside. Of files with the same
    stem and the same content the first path in sorted order is taken.

    Raises:
        InputError: not an AISegment tree, no pair in it, or one stem on different files.
    """
    for folder in (IMAGES, MATTES):
        if not (raw / folder).is_dir():
            raise InputError(_not_a_raw_tree(raw, folder))
    identical: list[tuple[Path, Path]] = []
    images = _by_stem(_files(raw / IMAGES, "clip_", IMAGE_SUFFIXES), identical)
    mattes = _by_stem(_files(raw / MATTES, "matting_", MATTE_SUFFIXES), identical)
    keys = sorted(images.keys() & mattes.keys())
    if not keys:
        raise InputError(
            f"{raw}: {len(images)} images and {len(mattes)} mattes, but no two of the same name; "
            f"expected {IMAGES}/<group>/clip_*/<name>.jpg and {MATTES}/<group>/matting_*/<name>.png"
        )
    for key in keys:
        _check_key(key, images[key])
    return PairReport(
        pairs=[
            Pair(key, images[key], mattes[key], group=images[key].parent.parent.name)
            for key in keys
        ],
        images_without_matte=[images[key] for key in sorted(images.keys() - mattes.keys())],
        mattes_without_image=[mattes[key] for key in sorted(mattes.keys() - images.keys())],
        identical=identical,
    )


def _not_a_raw_tree(raw: Path, missing: str) -> str:
    if not raw.exists():
        return f"{raw}: there is no such folder; give the folder that holds {IMAGES} and {MATTES} as --raw"
    if not raw.is_dir():
        return f"{raw}: is a file; give the folder that holds {IMAGES} and {MATTES} as --raw"
    inside = sorted(
        path.parent for path in raw.glob(f"*/{IMAGES}") if (path.parent / MATTES).is_dir()
    )
    hint = (
        f" Did you mean '{inside[0]}'?"
        if inside
        else f" Give the folder that holds {IMAGES} and {MATTES} as --raw"
    )
    return f"{raw}: no AISegment tree, it has no folder '{missing}'.{hint}"


def _files(top: Path, prefix: str, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files ``top/<group>/<prefix>*/<stem><suffix>`` in sorted order, junk left aside."""
    for group in _folders(top, ""):
        for folder in _folders(group, prefix):
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if entry.is_file())
            for name in names:
                if not name.startswith(".") and name.lower().endswith(suffixes):
                    yield folder / name


def _folders(parent: Path, prefix: str) -> list[Path]:
    with os.scandir(parent) as entries:
        names = [
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        ]
    return [parent / name for name in sorted(names) if name.startswith(prefix)]


def _by_stem(files: Iterator[Path], identical: list[tuple[Path, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        first = found.setdefault(path.stem, path)
        if first is not path:
            if not filecmp.cmp(first, path, shallow=False):
                raise InputError(
                    f"{path}: differs from {first}, which has the same name; remove or rename one of them"
                )
            identical.append((first, path))
    return found


def _check_key(key: str, image: Path) -> None:
    """WebDataset cuts a member's name at its first dot, so 'a.1' and 'a.2' would become one sample."""
    if "." in key or not key.isprintable():
        raise InputError(
            f"{image}: the name '{key}' cannot be a key in WebDataset shards; rename it, and its matte, without dots"
        )


def check_pairs(pairs: Sequence[Pair], threads: int = 4) -> None:
    """Check every pair by its headers and last bytes: type, alpha channel, equal sizes, not cut off. Decodes nothing else.

    Raises:
        InputError: a pair cannot be used (no alpha channel, sizes that differ, a wrong type).
        DamagedDataError: a file is truncated or unreadable.
    """
    with ThreadPoolExecutor(threads) as pool:
        problems = [
            problem
            for problem in track(pool.map(_problem, pairs), total=len(pairs), what="pairs checked")
            if problem
        ]
    if not problems:
        return
    first = next((problem for problem in problems if isinstance(problem, InputError)), problems[0])
    more = f" (and {len(problems) - 1} more such pairs)" if len(problems) > 1 else ""
    raise type(first)(f"{first}{more}")


def _problem(pair: Pair) -> PortraitDistError | None:
    try:
        image_size, _ = _header(pair.image, ("JPEG", "MPO"), ("RGB", "L"))
        matte_size, _ = _header(pair.matte, ("PNG",), ("RGBA", "LA"))
    except PortraitDistError as error:
        return error
    if image_size == matte_size:
        return None
    return InputError(
        f"{pair.matte}: {matte_size[0]}x{matte_size[1]} pixels, but its image {pair.image} has {image_size[0]}x{image_size[1]}; "
        "bring both to one size, or remove the pair"
    )


def _header(
    path: Path, formats: tuple[str, ...], modes: tuple[str, ...]
) -> tuple[tuple[int, int], str]:
    """(width, height) and mode of a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            kind, mode, size = picture.format, picture.mode, picture.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DamagedDataError(
            f"{path}: {_reason(path, error)}; get the file again, or remove it and its partner"
        ) from error
    if kind not in formats:
        raise InputError(
            f"{path}: is a {kind} file under another name; convert it to {formats[0]}, or remove it and its partner"
        )
    if mode not in modes:
        what = "has no alpha channel" if formats == ("PNG",) else "is not an RGB picture"
        raise InputError(
            f"{path}: {what} (mode {mode}); convert it to {modes[0]}, or remove it and its partner"
        )
    if not _is_whole(path, kind):
        raise DamagedDataError(
            f"{path}: the file is cut off; get it again, or remove it and its partner"
        )
    return size, mode


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return (
        "the file is empty"
        if path.stat().st_size == 0
        else "the file is damaged, its header cannot be read"
    )


def _is_whole(path: Path, kind: str) -> bool:
    """Does the file have an end? Where its last bytes do not say so, decode it to see."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        tail = file.read()
    # The marker cannot stand inside a JPEG's coded data, and some programs write bytes behind it.
    if (b"IEND" in tail[-12:]) if kind == "PNG" else (b"\xff\xd9" in tail):
        return True
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True
