"""The photos that ``predict`` is given: finding them, naming what is made of them, reading them."""

from __future__ import annotations

import functools
import glob
import io
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from portrait_dist.data.source.pictures import DepthError, orientation_of, rgb_of, upright
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError, one_line
from portrait_dist.preprocessing import ImageArray

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of the files that are taken from folders and patterns; a file given by name may have any."""
KINDS = ("mask", "cutout", "side-by-side")
"""For photo.jpg there are photo.mask.png, photo.cutout.png and photo.side-by-side.png."""
HEIC = (".heic", ".heif", ".hif")
"""What phones write; read where pillow-heif is installed."""
VIDEOS = (".3gp", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
STDIN = Path("/dev/stdin")
"""The photo ``-``: standard input, read to its end."""

PhotoSource = str | Path | Image.Image | ImageArray
"""A path, a PIL image, or an uint8 array: RGB [H, W, 3], RGBA [H, W, 4] or grey [H, W]."""


@dataclass(frozen=True)
class Photo:
    """A photo to predict.

    Attributes:
        path: of the file.
        name: of its outputs under ``--out``, without ``.mask.png``; with the subfolder in which it
            was found.
    """

    path: Path
    name: str

    def read(self) -> ImageArray:
        """Return the photo, upright; see :func:`read_photo`."""
        return read_photo(self.path)

    def identity(self) -> str:
        """Return size and time of the file, from which a changed photo is known."""
        try:
            found = self.path.stat()
        except OSError:
            return "gone"
        return f"{found.st_size}-{found.st_mtime_ns}"


@dataclass(frozen=True)
class FailedPhoto:
    """A photo that could not be done, and why in one line."""

    photo: str
    error: str


@dataclass
class Found:
    """What the paths of a command line hold.

    Attributes:
        photos: each once, in order; no two have one name.
        unusable: entries of a folder that have a photo's name but are none.
        skipped: number of files of other types in folders and patterns, by suffix.
    """

    photos: list[Photo] = field(default_factory=list)
    unusable: list[FailedPhoto] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def describe_skipped(self) -> str:
        """Say in one line which files were not taken; empty where there are none."""
        total = sum(self.skipped.values())
        if not total:
            return ""
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in sorted(self.skipped.items()))
        return f"{total} file{'s' * (total > 1)} of other types skipped: {kinds}"


def find_photos(paths: Sequence[str], out: Path, *, may_be_empty: bool = False) -> Found:
    """Find the photos that paths name, each once, in order.

    Folders are searched to the bottom. Hidden files, files of other types, and what ``predict``
    wrote before are left out.

    Args:
        paths: photos, folders and patterns.
        out: the output folder; where it lies within a folder it is not searched.
        may_be_empty: folders and patterns without photos are no error.

    Raises:
        InputError: an empty path, an address, a path that does not exist, a pattern or folder
            without photos.
    """
    found = Found()
    relative: dict[Path, Path] = {}
    for text in paths:
        for photo, name in _photos_of(text, out, found, may_be_empty):
            relative.setdefault(photo, name)
    # The same file by two paths is done once, under the name that was found first.
    real = {photo: os.path.realpath(photo) for photo in relative}
    # Reversed, so that of the paths to one file the first one stays in the dict.
    first = {real[photo]: photo for photo in reversed(relative)}
    chosen = {photo: name for photo, name in relative.items() if first[real[photo]] == photo}
    found.photos = name_outputs(chosen)
    return found


def _photos_of(
    text: str, out: Path, found: Found, may_be_empty: bool = False
) -> list[tuple[Path, Path]]:
    """Find the photos of one path, each with its path relative to the folder it was found in."""
    if not text.strip():
        raise InputError(
            "a PATH is empty; give a photo, a folder or a pattern (is a variable unset?)"
        )
    if ADDRESS.match(text):
        raise InputError(
            f"{text.partition('://')[0]}://…: an address; predict reads files, so download the "
            "photo first"
        )
    if text == "-":
        return [(STDIN, Path("stdin"))]
    path = Path(text)
    if path.is_dir():
        hits = [(photo, photo.relative_to(path)) for photo in _in_folder(path, out, found)]
        what = "no photo in this folder"
    elif os.path.lexists(path):
        return [(path, Path(path.name))]
    else:
        matches = map(Path, sorted(glob.glob(text, recursive=True)))
        hits = [(hit, Path(hit.name)) for hit in matches if _is_wanted(hit, found)]
        what = "no such file, and no photo matches it as a pattern"
    if not hits and not found.unusable and not may_be_empty:
        skipped = found.describe_skipped()
        raise InputError(
            f"{text}: {what}{f' ({skipped})' if skipped else ''}; give photos "
            f"({', '.join(readable_suffixes())}), folders or patterns in quotes"
        )
    return hits


def _in_folder(folder: Path, out: Path, found: Found) -> list[Path]:
    """Photos below a folder, sorted."""
    real_out = os.path.realpath(out)

    def refused(error: OSError) -> None:
        found.unusable.append(
            FailedPhoto(str(error.filename), f"{error.filename}: {error.strerror}; not searched")
        )

    photos: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refused):
        # In place: os.walk descends into what is left in its list.
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) != real_out
        ]
        photos += [path for name in names if _is_wanted(path := Path(parent, name), found)]
    return sorted(photos)


def _is_wanted(path: Path, found: Found) -> bool:
    """Decide whether a file is a photo; count other types, and note what is no file."""
    if path.name.startswith(".") or path.is_dir():
        return False
    # photo.mask.png of an earlier command is no photo.
    if path.stem.endswith(tuple(f".{kind}" for kind in KINDS)):
        return False
    if path.suffix.lower() not in readable_suffixes():
        found.skipped[path.suffix.lower() or "without suffix"] += 1
        return False
    try:
        _check_regular(path)
    except PortraitDistError as error:
        found.unusable.append(FailedPhoto(str(path), str(error)))
        return False
    return True


@functools.cache
def reads_heic() -> bool:
    """Let Pillow read HEIC where pillow-heif is installed; say whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def readable_suffixes() -> tuple[str, ...]:
    """List the suffixes of files that are taken from folders and patterns."""
    return (*SUFFIXES, *HEIC) if reads_heic() else SUFFIXES


def name_outputs(photos: dict[Path, Path]) -> list[Photo]:
    """Name what is made of each photo, such that no two names are equal.

    A photo keeps its name (and its subfolder). Where names clash, those photos keep their suffix
    too; where that is not enough, the folders in which they differ; at last they are numbered.

    Args:
        photos: photo → its path relative to the folder it was found in.
    """
    names = {photo: str(name.with_suffix("")) for photo, name in photos.items()}
    for photo in _clashing(names):
        names[photo] = str(photos[photo])
    if clashing := _clashing(names):
        folders = {photo: os.path.realpath(photo.parent) for photo in clashing}
        common = os.path.commonpath(list(folders.values()))
        for photo in clashing:
            names[photo] = os.path.relpath(os.path.join(folders[photo], photo.name), common)
    while clashing := _clashing(names):
        for number, photo in enumerate(clashing, start=1):
            names[photo] = f"{names[photo]}-{number}"
    return [Photo(path, name) for path, name in names.items()]


def _clashing(names: dict[Path, str]) -> list[Path]:
    """Photos whose name another photo has too; on some file systems Photo and photo are one."""
    count = Counter(name.lower() for name in names.values())
    return [photo for photo, name in names.items() if count[name.lower()] > 1]


def keep_part(photos: list[Photo], part: int, parts: int) -> list[Photo]:
    """Keep every ``parts``-th photo, from number ``part`` on."""
    return photos[part::parts]


def spread(photos: Sequence[Photo], count: int) -> Iterator[Photo]:
    """Yield at most ``count`` photos, evenly spread over all."""
    step = -(-len(photos) // count) or 1  # rounded up
    yield from photos[::step]


def read_photo(source: PhotoSource) -> ImageArray:
    """Read a photo, upright as its EXIF orientation says.

    Args:
        source: see :data:`PhotoSource`; the path /dev/stdin is read to its end.

    Returns:
        RGB uint8 [H, W, 3].

    Raises:
        InputError: no such file, no permission, not a file, too many pixels, or an array of another
            shape or type.
        DamagedDataError: the file is no photo, or damaged.
    """
    if isinstance(source, np.ndarray):
        return _rgb_array(source)
    if isinstance(source, Image.Image):
        return _upright(source)
    path = Path(source)
    if path == STDIN:
        return _decode(io.BytesIO(sys.stdin.buffer.read()), path)
    _check_regular(path)
    return _decode(path, path)


def read_photo_bytes(data: bytes, name: str, max_pixels: int | None = None) -> ImageArray:
    """Read a photo from memory, as :func:`read_photo` does from a file.

    Args:
        data: the photo's file.
        name: what errors call it.
        max_pixels: photos with more are refused before they are decoded; None for Pillow's limit.
    """
    return _decode(io.BytesIO(data), Path(name), max_pixels)


def _decode(file: Path | io.BytesIO, path: Path, max_pixels: int | None = None) -> ImageArray:
    reads_heic()
    try:
        with Image.open(file) as image:
            pixels = image.width * image.height
            if max_pixels is not None and pixels > max_pixels:
                raise Image.DecompressionBombError(f"{pixels:,}, at most {max_pixels:,} are taken")
            return _upright(image)
    except DepthError as error:
        raise InputError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise DamagedDataError(f"{path}: {_why_not_a_photo(path)}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too many pixels; make it smaller first ({error})") from error
    except PermissionError as error:
        raise InputError(f"{path}: may not be read ({error.strerror}); see its owner") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for this machine's memory; make it smaller") from error
    except Exception as error:  # Pillow's decoders meet damage with errors of many kinds
        raise DamagedDataError(
            f"{path}: the photo is damaged ({one_line(error)}); take another copy of it"
        ) from error


def _upright(image: Image.Image) -> ImageArray:
    pixels = rgb_of(image)
    return upright(pixels, orientation_of(image))


def _check_regular(path: Path) -> None:
    """Refuse what is not a file: opening a FIFO waits for ever, a device never ends.

    Raises:
        InputError: nothing there, or something else than a file.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        link = path.is_symlink()
        reason = "a link to nothing" if link else f"there is no such file ({error.strerror})"
        raise InputError(f"{path}: {reason}; give the path of a photo") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{str(path)!r}: no path ({error}); give the path of a photo") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise InputError(f"{path}: is {what}, not a file; give the path of a photo")


def _why_not_a_photo(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in VIDEOS:
        return "a video; portrait-dist video cuts people out of videos"
    if suffix in HEIC:
        if reads_heic():
            return "the HEIC photo is damaged; take another copy of it"
        return "HEIC needs pip install 'portrait-dist[heic]'; or convert it to JPEG or PNG"
    return "not a photo that Pillow can read; convert it to JPEG or PNG"


def _rgb_array(array: ImageArray) -> ImageArray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or channels not in (1, 3, 4)
        or 0 in array.shape
    ):
        raise InputError(
            f"an array of shape {array.shape} and type {array.dtype} is no photo; "
            "give uint8 [H, W, 3], RGB from 0 to 255"
        )
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return array[..., :3]
