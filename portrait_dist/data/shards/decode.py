"""Decode a stored image and its alpha into the rows of a batch.

The decoders (libjpeg-turbo through simplejpeg, igzip through isal, OpenCV, Pillow) and the resizing
release the interpreter lock, so threads decode beside each other. PNGs are ``png``'s.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from portrait_dist.data.shards.png import Pixels, decode_grey
from portrait_dist.data.source.masks import decode_mask
from portrait_dist.data.source.pictures import decode_picture, upright
from portrait_dist.preprocessing import Fit, fit_inner


class Turns(NamedTuple):
    """How files are brought upright: EXIF orientation of the image; whether its mask turns too."""

    image: int
    mask_too: bool

    @classmethod
    def of(cls, codec: str) -> Turns:
        """Read the end of a codec ``files-T-B``."""
        image, mask_too = map(int, codec.split("-")[1:])
        return cls(image, bool(mask_too))


def decode_pair(
    image: bytes | memoryview,
    alpha: bytes | memoryview,
    size: tuple[int, int] | None,
    out_image: Pixels,
    out_alpha: Pixels,
    *,
    exact: bool = True,
    codec: str = "jpeg",
    fit: Fit = "squash",
) -> None:
    """Decode one sample, at the size it is stored in or resized, into given arrays.

    Stored at that size, the JPEG is decoded in place. Stored larger, it is resized bilinearly with
    antialiasing, and the alpha to the nearest pixel, as the tutorial's SegResize does with PIL.

    Args:
        image: member of a sample, a JPEG, or a .npy for the raw codec.
        alpha: likewise, an 8-bit grey PNG or a .npy.
        size: (H, W) in pixels; None for that of ``out_alpha``.
        out_image: uint8 [H, W, 3], contiguous.
        out_alpha: uint8 [H, W].
        exact: False decodes a larger JPEG that is squashed at the smallest scale of the codec that
            is not below ``size``, and resizes the rest without antialiasing: faster, not the same.
        codec: ``jpeg`` or ``raw``, or ``files-T-B`` for members of any image type, whose image is
            turned as EXIF's T says, and its mask with it if B is 1.
        fit: how a sample of another size is brought to ``size``.

    Raises:
        ValueError: damaged, or not of the wanted size where it cannot be resized.
    """
    size = size or (out_alpha.shape[0], out_alpha.shape[1])
    if codec.startswith("files"):
        turns = Turns.of(codec)
        decode_files(image, alpha, size, out_image, out_alpha, exact=exact, turns=turns, fit=fit)
    elif codec == "raw":
        out_image[:] = _pixels(image, (*size, 3))
        out_alpha[:] = _pixels(alpha, size)
    else:
        stored = _decode_image(image, size, out_image, exact, fit)
        _decode_alpha(alpha, size, out_alpha, stored, fit)


def _decode_alpha(
    alpha: bytes | memoryview,
    size: tuple[int, int],
    out_alpha: Pixels,
    stored: tuple[int, int],
    fit: Fit,
) -> None:
    """Decode an alpha, which must have the size its image is stored in."""
    grey = decode_grey(alpha)
    _check_same_size(stored, grey.shape)
    out_alpha[:] = fitted(grey, size, fit, resize_alpha)


def decode_files(
    image: bytes | memoryview,
    alpha: bytes | memoryview,
    size: tuple[int, int] | None,
    out_image: Pixels,
    out_alpha: Pixels,
    *,
    exact: bool,
    turns: Turns,
    fit: Fit = "squash",
) -> None:
    """Decode an image and a mask of any type that ``pack`` takes; see :func:`decode_pair`.

    Args:
        image: content of a picture file.
        alpha: content of a mask's file.
        size: (H, W) in pixels; None for that of ``out_alpha``.
        out_image: uint8 [H, W, 3], contiguous.
        out_alpha: uint8 [H, W].
        exact: as in :func:`decode_pair`.
        turns: of the image and its mask.
        fit: as in :func:`decode_pair`.

    Raises:
        ValueError: damaged, no mask, or the two differ in size.
    """
    size = size or (out_alpha.shape[0], out_alpha.shape[1])
    grey = decode_mask(bytes(alpha))
    grey = upright(grey, turns.image if turns.mask_too else 1)
    if turns.image == 1 and _is_plain_jpeg(image):
        stored = _decode_image(image, size, out_image, exact, fit)
    else:
        pixels = upright(decode_picture(bytes(image)), turns.image)
        stored = (pixels.shape[0], pixels.shape[1])
        out_image[:] = fitted(pixels, size, fit, resize_pixels)
    _check_same_size(stored, grey.shape)
    out_alpha[:] = fitted(grey, size, fit, resize_alpha)


def fitted(
    pixels: Pixels,
    size: tuple[int, int],
    fit: Fit,
    resize: Callable[[Pixels, tuple[int, int]], Pixels],
) -> Pixels:
    """Bring an image, uint8 [h, w, 3], or a mask, [h, w], to a size.

    Args:
        pixels: what is brought there; returned as it is where it has that size.
        size: (H, W) in pixels.
        fit: how, where the shape is another; around a letterboxed one its edge pixels continue.
        resize: takes pixels and (H, W).
    """
    shape = (pixels.shape[0], pixels.shape[1])
    if shape == size:
        return pixels
    top, left, height, width = fit_inner(*shape, size, fit)
    if (height, width) != shape:
        pixels = resize(pixels, (height, width))
    if (height, width) == size:
        return pixels
    if fit == "cover":
        return np.ascontiguousarray(pixels[-top : size[0] - top, -left : size[1] - left])
    import cv2

    around = (top, size[0] - height - top, left, size[1] - width - left)
    return np.asarray(cv2.copyMakeBorder(pixels, *around, cv2.BORDER_REPLICATE), np.uint8)


def _is_plain_jpeg(image: bytes | memoryview) -> bool:
    """Whether a file is a JPEG in grey or colours, not one for print."""
    if bytes(image[:2]) != b"\xff\xd8":
        return False
    return simplejpeg.decode_jpeg_header(image)[2] in ("Gray", "YCbCr", "RGB")


def resize_pixels(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize uint8 [h, w, 3] bilinearly with antialiasing, as :func:`decode_resized`."""
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _decode_image(
    image: bytes | memoryview, size: tuple[int, int], out: Pixels, exact: bool, fit: Fit
) -> tuple[int, int]:
    """Decode a JPEG at a size; return the (H, W) it is stored in."""
    stored = jpeg_size(image)
    if stored == size:
        # In place: the codec writes into the rows of the batch, and no image is copied.
        simplejpeg.decode_jpeg(image, "RGB", buffer=out)
    elif fit != "squash":
        out[:] = fitted(simplejpeg.decode_jpeg(image, "RGB"), size, fit, resize_pixels)
    elif exact:
        out[:] = decode_resized(image, size)
    else:
        _decode_scaled(image, size, out)
    return stored


def decode_stored(
    image: bytes | memoryview, alpha: bytes | memoryview, codec: str
) -> tuple[Pixels, Pixels]:
    """Decode a sample at the size it is stored in: uint8 [H, W, 3] and [H, W].

    Raises:
        ValueError: damaged, or image and alpha differ in size.
    """
    if codec.startswith("files"):
        turned, both = map(int, codec.split("-")[1:])
        pixels = upright(decode_picture(bytes(image)), turned)
        mask = upright(decode_mask(bytes(alpha)), turned if both else 1)
    elif codec == "raw":
        pixels, mask = _parse_npy(image), _parse_npy(alpha)
        if pixels.shape != (*mask.shape[:2], 3):
            raise ValueError("the .npy are not uint8 [H, W, 3] and [H, W]")
    else:
        pixels, mask = simplejpeg.decode_jpeg(image, "RGB"), decode_grey(alpha)
    _check_same_size(pixels.shape, mask.shape)
    return pixels, mask


def _check_same_size(image: tuple[int, ...], alpha: tuple[int, ...]) -> None:
    if image[:2] != alpha:
        raise ValueError(
            f"image {image[0]}x{image[1]} and alpha {'x'.join(map(str, alpha))} differ in size"
        )


def decode_resized(jpeg: bytes | memoryview, size: tuple[int, int]) -> Pixels:
    """Decode a JPEG and resize it bilinearly with antialiasing to [H, W, 3], bit for bit as PIL."""
    # RGBX has four bytes a pixel, as Pillow keeps RGB in memory, so nothing is copied.
    padded = simplejpeg.decode_jpeg(jpeg, "RGBX")
    shape = (padded.shape[1], padded.shape[0])
    picture = Image.frombuffer("RGBX", shape, padded, "raw", "RGBX", 0, 1)
    resized = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(resized)[..., :3])


def resize_alpha(alpha: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize uint8 [h, w] to [H, W]; each pixel takes the value of the nearest one, as PIL does."""
    picture = Image.fromarray(alpha)
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.NEAREST))


def _decode_scaled(jpeg: bytes | memoryview, size: tuple[int, int], out: Pixels) -> None:
    import cv2

    scaled = simplejpeg.decode_jpeg(jpeg, "RGB", min_height=size[0], min_width=size[1])
    if scaled.shape[:2] == size:
        out[:] = scaled
    else:
        cv2.resize(scaled, (size[1], size[0]), dst=out, interpolation=cv2.INTER_LINEAR)


def jpeg_size(jpeg: bytes | memoryview) -> tuple[int, int]:
    """Read (H, W) from a JPEG's header.

    Raises:
        ValueError: damaged.
    """
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    return int(height), int(width)


# A .npy is read by comparing its header with the one it must have: 26 µs for 256×256×3 and 22 µs
# for 256×256, where np.load takes 143 µs and 88 µs.
@functools.lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """Make the first bytes of a .npy of uint8 of this shape."""
    buffer = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _pixels(npy: bytes | memoryview, shape: tuple[int, ...]) -> Pixels:
    header = npy_header(shape)
    if npy[: len(header)] != header or len(npy) != len(header) + np.prod(shape):
        raise ValueError(f"not a .npy of uint8 {list(shape)}")
    return np.frombuffer(npy, np.uint8, offset=len(header)).reshape(shape)


def _parse_npy(npy: bytes | memoryview) -> Pixels:
    """Parse a .npy of uint8; unlike np.load it allocates nothing that a header claims."""
    file = io.BytesIO(npy)
    np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or fortran_order:
        raise ValueError("a .npy is not uint8 in C order")
    return np.frombuffer(npy, np.uint8, offset=file.tell()).reshape(shape)
