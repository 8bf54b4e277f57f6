"""Find the pairs of image and matte in a raw AISegment tree, and check their headers.

    RAW/clip_img/<group>/clip_*/<stem>.jpg        the image
    RAW/matting/<group>/matting_*/<stem>.png      the same image with an alpha channel

An image and a matte belong together when their stems are equal; the stem is the sample key.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from portrait_dist.data.source.pictures import check_picture, exif_orientation
from portrait_dist.errors import InputError, PortraitDistError
from portrait_dist.files import open_regular
from portrait_dist.system.progress import track

IMAGES, MATTES = "clip_img", "matting"
IMAGE_SUFFIXES, MATTE_SUFFIXES = (".jpg", ".jpeg"), (".png",)
OTHER_SUFFIXES = (".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".avif")
"""Of pictures that may be meant as images, but are no JPEG."""
EXPECTED = f"{IMAGES}/<group>/clip_*/<name>.jpg and {MATTES}/<group>/matting_*/<name>.png"


@dataclass(frozen=True, order=True)
class Pair:
    """One portrait.

    Args:
        key: the stem of both files.
        image: its JPEG file.
        matte: its PNG file with an alpha channel.
        group: name of the folder that the image came in.
    """

    key: str
    image: Path
    matte: Path
    group: str


@dataclass
class PairReport:
    """What a raw tree holds.

    Args:
        pairs: sorted by key.
        images_without_matte: in sorted order.
        mattes_without_image: in sorted order.
        identical: (the file that is taken, another of the same stem and content).
        other_pictures: files among the images that are no JPEG by their name.
    """

    pairs: list[Pair]
    images_without_matte: list[Path]
    mattes_without_image: list[Path]
    identical: list[tuple[Path, Path]] = field(default_factory=list)
    other_pictures: list[Path] = field(default_factory=list)


def find_pairs(raw: Path) -> PairReport:
    """Pair all images and mattes by their stems.

    Hidden files (``._*``), files where folders are expected and files of other types are ignored.
    Of files with the same stem and the same content the first path in sorted order is taken.

    Raises:
        InputError: not an AISegment tree, no pair in it, one stem on different files, or something
            that cannot be read.
    """
    for folder in (IMAGES, MATTES):
        with _readable(raw / folder):
            there = (raw / folder).is_dir()
        if not there:
            raise InputError(_not_a_raw_tree(raw, folder))
    identical: list[tuple[Path, Path]] = []
    images = _by_stem(_files(raw / IMAGES, "clip_", IMAGE_SUFFIXES), identical)
    mattes = _by_stem(_files(raw / MATTES, "matting_", MATTE_SUFFIXES), identical)
    others = list(_files(raw / IMAGES, "clip_", OTHER_SUFFIXES))
    keys = sorted(images.keys() & mattes.keys())
    if not keys:
        raise InputError(_no_pairs(raw, len(images), len(mattes), others))
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
        other_pictures=others,
    )


def _not_a_raw_tree(raw: Path, missing: str) -> str:
    if not raw.exists():
        return (
            f"{raw}: there is no such folder; "
            f"give the folder that holds {IMAGES} and {MATTES} as --raw"
        )
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


def _no_pairs(raw: Path, images: int, mattes: int, others: list[Path]) -> str:
    if others and not images:
        return (
            f"{others[0]}: is no JPEG by its name, and neither is any other image in {raw}; "
            f"expected {EXPECTED}: convert the images to JPEG"
        )
    return (
        f"{raw}: {images} images and {mattes} mattes, but no two of the same name; "
        f"expected {EXPECTED}"
    )


def _files(top: Path, prefix: str, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files ``top/<group>/<prefix>*/<stem><suffix>`` in sorted order, without hidden ones."""
    for group in _folders(top, ""):
        for folder in _folders(group, prefix):
            for entry in _entries(folder):
                if entry.name.lower().endswith(suffixes) and _is_file(entry):
                    yield folder / entry.name


def _folders(parent: Path, prefix: str) -> list[Path]:
    return [
        parent / entry.name
        for entry in _entries(parent)
        if entry.name.startswith(prefix) and _is_folder(entry)
    ]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List what a folder holds, sorted by name, without hidden entries."""
    with _readable(folder), os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with _readable(entry.path):
        return entry.is_dir()


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file; a named pipe, socket or device of that name is refused."""
    with _readable(entry.path):
        if entry.is_file():
            return True
        if not entry.is_dir() and os.path.exists(entry.path):
            raise InputError(f"{entry.path}: is a named pipe, socket or device, no file; remove it")
    return False


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Name what cannot be read: a loop of symbolic links, a folder without permission."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); repair or remove it"
        ) from error


def _by_stem(files: Iterator[Path], identical: list[tuple[Path, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        first = found.setdefault(path.stem, path)
        if first is not path:
            with _readable(path):
                same = filecmp.cmp(first, path, shallow=False)
            if not same:
                raise InputError(
                    f"{path}: differs from {first}, which has the same name; "
                    "remove or rename one of them"
                )
            identical.append((first, path))
    return found


def _check_key(key: str, image: Path) -> None:
    """WebDataset cuts a member's name at its first dot: 'a.1' and 'a.2' would become one sample."""
    if "." in key or not key.isprintable():
        raise InputError(
            f"{image}: the name '{key}' cannot be a key in WebDataset shards; "
            "rename it, and its matte, without dots"
        )


def check_pairs(pairs: Sequence[Pair], threads: int = 4) -> None:
    """Check every pair by its headers and last bytes: type, alpha channel, equal sizes, whole.

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


def _turned(image: Path, size: tuple[int, int]) -> tuple[int, int] | None:
    """(width, height) of an image as it is shown, where its EXIF orientation swaps them."""
    with open(open_regular(image), "rb") as file:
        orientation = exif_orientation(file.read(65536))
    return size[::-1] if orientation >= 5 else None


def _problem(pair: Pair) -> PortraitDistError | None:
    try:
        image_size = check_picture(pair.image, ("JPEG", "MPO"), ("RGB", "L"))
        matte_size = check_picture(pair.matte, ("PNG",), ("RGBA", "LA"))
    except PortraitDistError as error:
        return error
    if image_size == matte_size or _turned(pair.image, image_size) == matte_size:
        return None
    return InputError(
        f"{pair.matte}: {matte_size[0]}x{matte_size[1]} pixels, "
        f"but its image {pair.image} has {image_size[0]}x{image_size[1]}; "
        "bring both to one size, or remove the pair"
    )
