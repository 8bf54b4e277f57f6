"""Check a picture file that somebody else made: its type, its size, and that it is whole.

``prepare`` looks at headers and last bytes only; ``pack`` reads whole files through here and
decodes them. Every refusal is one line that names the file.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from portrait_dist.data.source.locations import Location, open_binary, read_bytes, shown, size_of
from portrait_dist.errors import DamagedDataError, InputError, one_line

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970
"""The most that Pillow decodes (twice its ``MAX_IMAGE_PIXELS``): more is taken for an attack."""
MOST_BYTES = 1 << 30
"""Of a picture file; ``MAX_PIXELS`` of RGBA do not compress to more than 0.7 GiB."""
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error,
    zlib.error,
)  # fmt: skip
"""What Pillow's plugins raise on damaged bytes; UnidentifiedImageError is an OSError."""
REMEDY = "get the file again, or remove it and its partner"


def read_picture(path: Location, kind: str, magic: bytes = b"") -> bytes:
    """Read a whole picture file.

    Args:
        path: the file, or its address.
        kind: its format, for the message.
        magic: its first bytes; any by default.

    Raises:
        InputError: no file, too large, or a file of another kind.
        DamagedDataError: missing, empty or unreadable.
        UnreachableError: the address does not answer.
    """
    try:
        data = read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise DamagedDataError(
            f"{shown(path)}: cannot be read ({error.strerror}); run 'portrait-dist prepare' again"
        ) from error
    if not data:
        raise DamagedDataError(f"{shown(path)}: the file is empty; {REMEDY}")
    if not data.startswith(magic):
        raise InputError(
            f"{shown(path)}: is not a {kind} file; convert it, or remove it and its partner"
        )
    return data


def exif_orientation(jpeg: bytes) -> int:
    """Return how a JPEG is to be shown, 1 to 8 as EXIF 2.3 has it; 1 is as it is stored."""
    if b"Exif\0\0" not in jpeg[:65536]:  # 1 µs, where Pillow takes 60 µs
        return 1
    from PIL import Image

    try:
        return orientation_of(Image.open(io.BytesIO(jpeg)))
    except DAMAGED:
        return 1


def orientation_of(picture: Image.Image) -> int:
    """Return how an opened picture is to be shown, 1 to 8; 1 where EXIF does not say."""
    from PIL import ExifTags

    found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn an image, uint8 [h, w, 3], or an alpha, [h, w], as its EXIF orientation says."""
    if orientation == 1:
        return pixels
    from PIL import Image

    method = Image.Transpose(_TRANSPOSITIONS[orientation])
    return np.array(Image.fromarray(pixels).transpose(method))


_TRANSPOSITIONS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF orientation to Pillow's ``Image.Transpose`` that undoes it."""


def picture_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of a picture of any type that Pillow opens, as :func:`rgb_of` does.

    Raises:
        ValueError: damaged, or no picture.
    """
    from PIL import Image

    # The limit is an error of its own below; a warning for each large photo helps nobody.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        return _opened(data).size
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(reason(error)) from error


def reason(error: Exception) -> str:
    """Return in one line what is wrong with a picture that Pillow refused."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its own text shows a Python object
        return "it is no picture of a known kind"
    return one_line(error)


def picture_orientation(data: bytes) -> int:
    """Return how a picture of any type is to be shown, as :func:`exif_orientation` does.

    Of what :func:`rgb_of` gives: 1 for a TIFF.
    """
    try:
        return orientation_of(_opened(data))
    except DAMAGED:
        return 1


def _opened(data: bytes) -> Image.Image:
    """Open a picture by its header; a TIFF that is to be turned is decoded, which turns it."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data))
    if picture.format == "TIFF" and orientation_of(picture) != 1:
        picture.load()
    return picture


class DepthError(ValueError):
    """A picture has pixels of more than 16 bits."""


def rgb_of(picture: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an opened picture, uint8 [H, W, 3], as they are stored.

    Those of a TIFF are as they are shown: Pillow turns them, and then forgets the orientation.
    Transparency is ignored: the colours behind it are the image.

    Raises:
        DepthError: more than 16 bits a pixel and channel, and levels beyond 0 to 255.
    """
    picture.load()
    of_16_bits = picture.mode == "I" and picture.format in ("PNG", "PPM")
    if picture.mode.startswith("I;16") or of_16_bits:
        levels = np.asarray(picture).astype(np.uint32)
        grey = ((levels + 128) // 257).astype(np.uint8)  # Pillow would cut them off at 255
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in ("I", "F") and not _are_bytes(np.asarray(picture)):
        raise DepthError("has 32 bits a pixel; save it with 8 or 16")
    return np.array(picture.convert("RGB"))  # a copy: torch warns of read-only arrays


def _are_bytes(levels: NDArray[Any]) -> bool:
    """Whether levels of 32 bits are 0 to 255; those of 0 to 1 would come out black."""
    return bool(levels.size and 1 < levels.max() <= 255 and levels.min() >= 0)


def decode_picture(data: bytes) -> NDArray[np.uint8]:
    """Decode a picture of any type that Pillow opens to uint8 [H, W, 3]; see :func:`rgb_of`.

    Raises:
        ValueError: damaged.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return rgb_of(picture)
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(reason(error)) from error


def check_pixels(path: Location, height: int, width: int) -> None:
    """Check that a picture is not larger than what is decoded.

    Raises:
        InputError: it has more than ``MAX_PIXELS``.
    """
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{shown(path)}: {width}x{height} pixels are more than the {MAX_PIXELS:,} that are "
            "accepted; make it smaller, or remove it and its partner"
        )


def check_picture(path: Location, formats: Sequence[str], modes: Sequence[str]) -> tuple[int, int]:
    """Check type, colour mode, size and end of a picture by its header and its last bytes.

    Args:
        path: the file.
        formats: names of formats in Pillow; the first is the one to convert to.
        modes: colour modes in Pillow, likewise.

    Returns:
        (width, height) in pixels.

    Raises:
        InputError: a wrong type, colour mode or size.
        DamagedDataError: truncated or unreadable.
    """
    from PIL import Image

    where = shown(path)
    # Pillow warns from half of MAX_PIXELS; the whole limit is an error here.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        with open_binary(path) as file:
            # Not in a ``with`` block of its own, which would close the file.
            picture = Image.open(file)
            kind, mode, size = picture.format or "", picture.mode, picture.size
            whole = kind not in formats or _is_whole(file, kind)
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{where}: says that it has more than the {MAX_PIXELS:,} pixels that are accepted; "
            "make it smaller, or remove it and its partner"
        ) from error
    except DAMAGED as error:
        raise DamagedDataError(f"{where}: {_reason(path, error)}; {REMEDY}") from error
    _check_kind(where, kind, formats)
    _check_mode(where, mode, modes)
    if not whole:
        raise DamagedDataError(f"{where}: the file is cut off; {REMEDY}")
    return size


def _check_kind(where: str, kind: str, formats: Sequence[str]) -> None:
    if kind not in formats:
        raise InputError(
            f"{where}: is a {kind} file, {formats[0]} is expected; "
            f"convert it to {formats[0]}, or remove it and its partner"
        )


def _check_mode(where: str, mode: str, modes: Sequence[str]) -> None:
    if mode not in modes:
        lacking = "RGBA" in modes and "L" not in modes
        what = "has no alpha channel" if lacking else "is not an RGB picture"
        raise InputError(
            f"{where}: {what} (mode {mode}); convert it to {modes[0]}, or remove it and its partner"
        )


def _reason(path: Location, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return (
        "the file is empty"
        if size_of(path)[0] == 0
        else "the file is damaged, its header cannot be read"
    )


def _is_whole(file: IO[bytes], kind: str) -> bool:
    """Whether a picture file has an end; where its last bytes do not say so, decode it to see."""
    length = file.seek(0, os.SEEK_END)
    if kind == "WEBP":  # RIFF says its length; decoding would take milliseconds
        file.seek(0)
        return struct.unpack("<4sI", file.read(8))[1] + 8 <= length
    file.seek(max(0, length - 4096))
    tail = file.read()
    # The marker cannot stand inside a JPEG's coded data, and some programs write bytes behind it.
    if (b"IEND" in tail[-12:]) if kind == "PNG" else (b"\xff\xd9" in tail):
        return True
    from PIL import Image

    file.seek(0)
    try:
        Image.open(file).load()
    except (*DAMAGED, Image.DecompressionBombError):
        return False
    return True
