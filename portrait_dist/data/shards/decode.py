"""Decodes a stored image and its alpha into the rows of a batch.

The decoders (libjpeg-turbo through simplejpeg, igzip through isal, OpenCV, Pillow) and the resizing release the interpreter
lock, so threads decode beside each other.

A PNG's filters work on each channel for itself. So of an RGBA matte only the alpha bytes are unfiltered: they are put, filtered
as they are, into a grey PNG that is not compressed, and that is decoded. It gives the same alpha in a third of the time.
"""

from __future__ import annotations

import functools
import io
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from isal import isal_zlib
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def decode_pair(
    image: bytes | memoryview,
    alpha: bytes | memoryview,
    size: tuple[int, int] | None,
    out_image: Pixels,
    out_alpha: Pixels,
    *,
    exact: bool = True,
    codec: str = "jpeg",
) -> None:
    """Decode one sample, at the size it is stored in or resized, into given arrays.

    Stored at that size, the JPEG is decoded in place. Stored larger, the image is resized bilinearly with antialiasing and the
    alpha to the nearest pixel, as the tutorial's SegResize does with PIL.

    Args:
        image, alpha: members of a sample: JPEG and 8-bit grey PNG, or two .npy for the raw codec.
        size: (H, W) in pixels; None for that of ``out_alpha``.
        out_image: uint8 [H, W, 3], contiguous.
        out_alpha: uint8 [H, W].
        exact: False decodes a larger JPEG at 1/2, 1/4 or another scale that the codec can do, as long as it is not below
            ``size``, and resizes the rest bilinearly without antialiasing: faster, and slightly different.
        codec: ``jpeg`` or ``raw``.

    Raises:
        ValueError: damaged, or not of the wanted size where it cannot be resized.
    """
    size = size or (out_alpha.shape[0], out_alpha.shape[1])
    if codec == "raw":
        out_image[:] = _pixels(image, (*size, 3))
        out_alpha[:] = _pixels(alpha, size)
        return
    height, width = jpeg_size(image)
    if (height, width) == size:
        simplejpeg.decode_jpeg(image, "RGB", buffer=out_image)
    elif exact:
        out_image[:] = decode_resized(image, size)
    else:
        _decode_scaled(image, size, out_image)
    grey = decode_grey(alpha)
    if grey.shape != (height, width):
        raise ValueError(
            f"image {height}x{width} and alpha {grey.shape[0]}x{grey.shape[1]} differ in size"
        )
    out_alpha[:] = grey if grey.shape == size else resize_alpha(grey, size)


def decode_stored(
    image: bytes | memoryview, alpha: bytes | memoryview, codec: str
) -> tuple[Pixels, Pixels]:
    """A sample at the size it is stored in: uint8 [H, W, 3] and [H, W].

    Raises:
        ValueError: damaged, or image and alpha differ in size.
    """
    if codec == "raw":
        pixels, mask = (
            np.load(io.BytesIO(member), allow_pickle=False) for member in (image, alpha)
        )
        if (
            pixels.dtype != np.uint8
            or mask.dtype != np.uint8
            or pixels.shape != (*mask.shape[:2], 3)
        ):
            raise ValueError("the .npy are not uint8 [H, W, 3] and [H, W]")
    else:
        pixels, mask = simplejpeg.decode_jpeg(image, "RGB"), decode_grey(alpha)
    if pixels.shape[:2] != mask.shape:
        raise ValueError(
            f"image {pixels.shape[0]}x{pixels.shape[1]} and alpha {mask.shape[0]}x{mask.shape[1]} differ in size"
        )
    return pixels, mask


def decode_grey(png: bytes | memoryview) -> Pixels:
    """An 8-bit grey PNG as uint8 [H, W].

    Raises:
        ValueError: damaged, or another kind of PNG.
    """
    header, data = _parts(png)
    if (header.depth, header.colour) != (8, GREY):
        raise ValueError("the alpha is not an 8-bit grey PNG")
    if header.interlaced:
        return _by_pillow(png)
    rows = _inflated(data, header)
    return _unfiltered(rows) if rows[:, 0].any() else rows[:, 1:]  # our own have no row filters


def decode_matte(png: bytes | memoryview) -> Pixels:
    """Alpha channel of a PNG with colours and alpha, uint8 [H, W]; of 16 bits the upper 8.

    Raises:
        ValueError: damaged, or without an alpha channel.
    """
    header, data = _parts(png)
    if header.colour not in (GREY_ALPHA, RGB_ALPHA):
        raise ValueError("is not a PNG with an alpha channel")
    if header.interlaced or header.depth != 8:
        return _by_pillow(png)
    rows, channels = _inflated(data, header), header.bytes_per_pixel
    alpha = np.empty((header.height, 1 + header.width), np.uint8)
    alpha[:, 0] = rows[:, 0]
    alpha[:, 1:] = rows[:, channels::channels]
    return _unfiltered(alpha)


MAX_PIXELS = 1 << 28
"""Of a PNG; more than any camera gives. A header that claims more is damaged or hostile."""
GREY, GREY_ALPHA, RGB_ALPHA = 0, 4, 6
"""Colour types of the PNG specification (ISO/IEC 15948), 11.2.2."""
_CHANNELS = {GREY: 1, 2: 3, 3: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class _Header(NamedTuple):
    """What a PNG's IHDR says; sizes in pixels, depth in bits."""

    width: int
    height: int
    depth: int
    colour: int
    compression: int
    filters: int
    interlaced: int

    @property
    def bytes_per_pixel(self) -> int:
        return _CHANNELS[self.colour] * self.depth // 8


def _parts(png: bytes | memoryview) -> tuple[_Header, bytes | memoryview]:
    """Header and compressed pixels of a PNG whose every checksum is right.

    Raises:
        ValueError: cut off or damaged.
    """
    view, place, kind, header, pixels = memoryview(png), len(_SIGNATURE), b"", None, []
    if view[:place] != _SIGNATURE:
        raise ValueError("is not a PNG")
    while kind != b"IEND":
        if place + 12 > len(view):
            raise ValueError("the PNG is cut off")
        length, kind = struct.unpack_from(">I4s", view, place)
        end = place + 8 + length
        if end + 4 > len(view):
            raise ValueError("the PNG is cut off")
        if isal_zlib.crc32(view[place + 4 : end]) != struct.unpack_from(">I", view, end)[0]:
            raise ValueError("the PNG is damaged, a checksum is wrong")
        if kind == b"IHDR" and length == 13:
            header = _Header(*struct.unpack_from(">IIBBBBB", view, place + 8))
        elif kind == b"IDAT":
            pixels.append(view[place + 8 : end])
        place = end + 4
    if header is None or header.colour not in _CHANNELS or not pixels:
        raise ValueError("the PNG has no header or no pixels")
    if not 0 < header.width * header.height <= MAX_PIXELS:
        raise ValueError(f"the PNG says that it has {header.width}x{header.height} pixels")
    return header, pixels[0] if len(pixels) == 1 else b"".join(pixels)


def _inflated(data: bytes | memoryview, header: _Header) -> Pixels:
    """Rows of filtered pixels, uint8 [H, 1 + W·bytes per pixel], each behind the number of its filter."""
    stride = 1 + header.width * header.bytes_per_pixel
    try:
        raw = isal_zlib.decompress(data, bufsize=header.height * stride)
    except isal_zlib.IsalError as error:  # type: ignore[misc]  # its stub takes the class for an instance
        raise ValueError(str(error)) from error
    if len(raw) != header.height * stride:
        raise ValueError(f"the PNG holds {len(raw)} bytes of pixels, not {header.height * stride}")
    return np.frombuffer(raw, np.uint8).reshape(header.height, stride)


def _unfiltered(rows: Pixels) -> Pixels:
    """uint8 [H, 1 + W], filtered, to [H, W]."""
    import cv2

    if rows[:, 0].max() > 4:
        raise ValueError("the PNG has a row filter that does not exist")
    height, width = rows.shape[0], rows.shape[1] - 1
    plain: Pixels | None = cv2.imdecode(
        np.frombuffer(png_of(rows, _stored(rows)), np.uint8), cv2.IMREAD_UNCHANGED
    )
    if plain is None or plain.shape != (height, width):
        raise ValueError("the PNG does not decode")
    return plain


def png_of(rows: Pixels, compressed: bytes) -> bytes:
    """An 8-bit grey PNG of rows that each begin with their filter, uint8 [H, 1 + W], and of the zlib stream that holds them."""
    header = struct.pack(">IIBBBBB", rows.shape[1] - 1, rows.shape[0], 8, GREY, 0, 0, 0)
    parts = [_SIGNATURE]
    for kind, data in ((b"IHDR", header), (b"IDAT", compressed), (b"IEND", b"")):
        checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)]
    return b"".join(parts)


def _stored(rows: Pixels) -> bytes:
    """A zlib stream (RFC 1950) that holds the bytes in stored blocks (RFC 1951, 3.2.4), not compressed."""
    data, most = rows.reshape(-1).data, 0xFFFF
    parts: list[bytes | memoryview] = [b"\x78\x01"]
    for start in range(0, len(data), most):
        block = data[start : start + most]
        parts += [
            struct.pack("<BHH", start + most >= len(data), len(block), len(block) ^ most),
            block,
        ]
    return b"".join([*parts, struct.pack(">I", isal_zlib.adler32(data))])


def _by_pillow(png: bytes | memoryview) -> Pixels:
    """Last channel of a rare kind of PNG: interlaced, or of 16 bits."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png)) as opened:
            pixels = np.asarray(opened)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(str(error)) from error
    return np.ascontiguousarray(pixels if pixels.ndim == 2 else pixels[..., -1])


def decode_resized(jpeg: bytes | memoryview, size: tuple[int, int]) -> Pixels:
    """A JPEG at another size, uint8 [H, W, 3], resized bilinearly with antialiasing to the same pixels as PIL's."""
    from PIL import Image

    padded = simplejpeg.decode_jpeg(
        jpeg, "RGBX"
    )  # four bytes a pixel, as Pillow has them: nothing is copied
    picture = Image.frombuffer(
        "RGBX", (padded.shape[1], padded.shape[0]), padded, "raw", "RGBX", 0, 1
    )
    return np.ascontiguousarray(
        np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))[..., :3]
    )


def resize_alpha(alpha: Pixels, size: tuple[int, int]) -> Pixels:
    """uint8 [h, w] to [H, W], each pixel the value of the nearest one, the same as PIL takes."""
    rows, columns = (_nearest(old, new) for old, new in zip(alpha.shape, size, strict=True))
    return alpha[rows].take(columns, axis=1)


@functools.lru_cache(maxsize=64)
def _nearest(old: int, new: int) -> NDArray[np.intp]:
    """Index of the old pixel under the centre of each new one. PIL adds up the steps, so its rounding is in the sum too."""
    steps = np.full(new, old / new)
    steps[0] /= 2
    return np.add.accumulate(steps).astype(np.intp)


def _decode_scaled(jpeg: bytes | memoryview, size: tuple[int, int], out: Pixels) -> None:
    import cv2

    scaled = simplejpeg.decode_jpeg(jpeg, "RGB", min_height=size[0], min_width=size[1])
    if scaled.shape[:2] == size:
        out[:] = scaled
    else:
        cv2.resize(scaled, (size[1], size[0]), dst=out, interpolation=cv2.INTER_LINEAR)


def jpeg_size(jpeg: bytes | memoryview) -> tuple[int, int]:
    """(H, W) from the header."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    return int(height), int(width)


@functools.lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """First bytes of a .npy of uint8 of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def _pixels(npy: bytes | memoryview, shape: tuple[int, ...]) -> Pixels:
    header = npy_header(shape)
    if npy[: len(header)] != header or len(npy) != len(header) + np.prod(shape):
        raise ValueError(f"not a .npy of uint8 {list(shape)}")
    return np.frombuffer(npy, np.uint8, offset=len(header)).reshape(shape)
