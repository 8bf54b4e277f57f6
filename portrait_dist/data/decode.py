"""Decodes a stored image and its alpha into the rows of a batch.

The decoders (libjpeg-turbo through simplejpeg, libspng through pyspng) and the resizing release the interpreter lock, so
threads decode beside each other.
"""

from __future__ import annotations

import functools
import io
import zlib

import numpy as np
import pyspng
import simplejpeg
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
            ``size``, and resizes the rest by area: faster, and slightly different.
        codec: ``jpeg`` or ``raw``.

    Raises:
        ValueError: damaged, or not of the wanted size where it cannot be resized.
    """
    size = size or (out_alpha.shape[0], out_alpha.shape[1])
    if codec == "raw":
        out_image[:] = _pixels(image, (*size, 3))
        out_alpha[:] = _pixels(alpha, size)
        return
    height, width = _jpeg_size(image)
    if (height, width) == size:
        simplejpeg.decode_jpeg(image, "RGB", buffer=out_image)
    elif exact:
        out_image[:] = resize_image(simplejpeg.decode_jpeg(image, "RGB"), size)
    else:
        _decode_scaled(image, size, out_image)
    grey = decode_grey(alpha)
    if grey.shape != (height, width):
        raise ValueError(f"image {height}x{width} and alpha {grey.shape[0]}x{grey.shape[1]} differ in size")
    out_alpha[:] = grey if grey.shape == size else resize_alpha(grey, size)


def decode_stored(image: bytes | memoryview, alpha: bytes | memoryview, codec: str) -> tuple[Pixels, Pixels]:
    """A sample at the size it is stored in: uint8 [H, W, 3] and [H, W].

    Raises:
        ValueError: damaged, or image and alpha differ in size.
    """
    if codec == "raw":
        pixels, mask = (np.load(io.BytesIO(member), allow_pickle=False) for member in (image, alpha))
        if pixels.dtype != np.uint8 or mask.dtype != np.uint8 or pixels.shape != (*mask.shape[:2], 3):
            raise ValueError("the .npy are not uint8 [H, W, 3] and [H, W]")
    else:
        pixels, mask = simplejpeg.decode_jpeg(image, "RGB"), decode_grey(alpha)
    if pixels.shape[:2] != mask.shape:
        raise ValueError(f"image {pixels.shape[0]}x{pixels.shape[1]} and alpha {mask.shape[0]}x{mask.shape[1]} differ in size")
    return pixels, mask


def decode_grey(png: bytes | memoryview) -> Pixels:
    """An 8-bit grey PNG as uint8 [H, W].

    Raises:
        ValueError: damaged, or another kind of PNG.
    """
    try:
        grey: Pixels = pyspng.load(bytes(png))
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if grey.ndim != 2 or grey.dtype != np.uint8:
        raise ValueError("the alpha is not an 8-bit grey PNG")
    return grey


def decode_matte(png: bytes | memoryview) -> Pixels:
    """Alpha channel of a PNG with colours and alpha, uint8 [H, W].

    Raises:
        ValueError: damaged, or without an alpha channel.
    """
    if bytes(png[12:16]) != b"IHDR" or png[25] not in (4, 6):  # byte 25 is the colour type: 4 grey and alpha, 6 RGB and alpha
        raise ValueError("is not a PNG with an alpha channel")
    _check_chunks(png)
    try:
        return np.ascontiguousarray(pyspng.load(bytes(png), "RGBA")[..., 3])
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _check_chunks(png: bytes | memoryview) -> None:
    """Check every chunk's CRC-32, which the decoder leaves out."""
    view, place, kind = memoryview(png), 8, b""
    while kind != b"IEND":
        if place + 12 > len(view):
            raise ValueError("the PNG is cut off")
        length = int.from_bytes(view[place : place + 4], "big")
        kind, end = bytes(view[place + 4 : place + 8]), place + 8 + length
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("the PNG is damaged, a checksum is wrong")
        place = end + 4


def resize_image(image: Pixels, size: tuple[int, int]) -> Pixels:
    """uint8 [h, w, 3] to [H, W, 3], bilinear with antialiasing."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


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
    scaled = simplejpeg.decode_jpeg(jpeg, "RGB", min_height=size[0], min_width=size[1])
    out[:] = scaled if scaled.shape[:2] == size else resize_image(scaled, size)


def _jpeg_size(jpeg: bytes | memoryview) -> tuple[int, int]:
    """(H, W) from the header."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    return int(height), int(width)


@functools.lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """First bytes of a .npy of uint8 of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _pixels(npy: bytes | memoryview, shape: tuple[int, ...]) -> Pixels:
    header = npy_header(shape)
    if npy[: len(header)] != header or len(npy) != len(header) + np.prod(shape):
        raise ValueError(f"not a .npy of uint8 {list(shape)}")
    return np.frombuffer(npy, np.uint8, offset=len(header)).reshape(shape)
