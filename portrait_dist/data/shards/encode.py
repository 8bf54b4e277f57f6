"""Encode one pair of files as a shard stores it: JPEG and grey PNG, or pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg

from portrait_dist.data.shards.decode import fitted, npy_header, resize_alpha
from portrait_dist.data.shards.format import MAX_SIDE, SUFFIXES, StorageSettings, storage_settings
from portrait_dist.data.shards.png import Pixels, decode_grey, decode_matte, encode_grey
from portrait_dist.data.source.locations import Location, shown, suffix_of
from portrait_dist.data.source.masks import NotAMaskError, decode_mask
from portrait_dist.data.source.pairs import ALPHA, LEVELS, Pair
from portrait_dist.data.source.pictures import (
    REMEDY,
    check_pixels,
    decode_picture,
    exif_orientation,
    picture_orientation,
    picture_size,
    read_picture,
    upright,
)
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.preprocessing import FITS, Fit

SIDES = range(8, MAX_SIDE + 1)
"""Height and width of stored samples, in pixels."""


@dataclass(frozen=True)
class Settings:
    """Settings that determine the shards' bytes.

    Args:
        size: (H, W) in pixels, or None for the images' own size.
        codec: ``jpeg`` or ``raw``.
        quality: of the JPEGs, 1 to 100.
        samples_per_shard: at least 1.
        fit: how images of another shape are brought to ``size``.
    """

    size: tuple[int, int] | None
    codec: str
    quality: int
    samples_per_shard: int
    fit: Fit = "squash"

    def check(self) -> None:
        """Check every setting.

        Raises:
            InputError: a value that is out of range, or does not go with another.
        """
        if self.codec not in SUFFIXES:
            raise InputError(f"--codec {self.codec}: it is one of {', '.join(SUFFIXES)}")
        if self.codec == "raw" and self.size is None:
            raise InputError(
                "--codec raw: stores pixels, which needs one size for all; give --size HEIGHTxWIDTH"
            )
        if self.size is not None and not all(side in SIDES for side in self.size):
            raise InputError(
                f"--size {self.size[0]}x{self.size[1]}: "
                f"each side is from {SIDES[0]} to {SIDES[-1]} pixels"
            )
        if self.fit not in FITS:
            raise InputError(f"--fit {self.fit}: it is one of {', '.join(FITS)}")
        if self.fit != "squash" and self.size is None:
            raise InputError(
                f"--fit {self.fit}: needs a size to fit into; give --size HEIGHTxWIDTH, or keep "
                f"the images as they are and train with data.fit={self.fit}"
            )
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality}: it is from 1 to 100")
        if self.samples_per_shard < 1:
            raise InputError(f"--samples-per-shard {self.samples_per_shard}: it is at least 1")

    def to_dict(self) -> StorageSettings:
        """Return the settings as they stand in the manifest."""
        return storage_settings(
            self.size, self.codec, self.quality, self.samples_per_shard, self.fit
        )


@dataclass(frozen=True)
class EncodedPair:
    """One pair as it is stored."""

    key: str
    image: bytes
    alpha: bytes


class StoredPair(Pair):
    """A pair whose image is encoded already, such as a sample of other shards."""

    def encoded(self, settings: Settings) -> EncodedPair:
        """Return both members.

        Raises:
            DamagedDataError: a file does not decode.
        """
        raise NotImplementedError

    def sizes(self) -> tuple[int, int, int]:
        """Return bytes of image and mask, and the time in ns of the later change of both."""
        raise NotImplementedError


def encode_pair(pair: Pair, settings: Settings) -> EncodedPair:
    """Read a pair and encode it.

    At original size the bytes of the JPEG file are stored as they are, unless its EXIF orientation
    says that it is shown otherwise than it is stored; those images are brought upright and encoded
    again, because no decoder of shards looks at EXIF, and so are images of other types. The matte
    is as the image is shown, or, where only that fits its size, as it is stored.

    Args:
        pair: where the files are, and of which kind its mask is.
        settings: how it is stored.

    Raises:
        InputError: the pair cannot be used.
        DamagedDataError: a file does not decode.
        UnreachableError: an address does not answer.
    """
    if isinstance(pair, StoredPair):
        return pair.encoded(settings)
    file, alpha = _read_image(pair), _read_mask(pair)
    shape = file.size[::-1] if file.orientation >= 5 else file.size
    if alpha.shape == file.size != shape:  # the matte's maker did not look at EXIF
        alpha = upright(alpha, file.orientation)
    _check_same_size(pair, alpha, shape)
    # Decoded at original size too: a file that is damaged behind its header is found here.
    image = upright(_decoded(pair.image, file.decode), file.orientation)
    if settings.size is None and file.orientation == 1 and file.jpeg is not None:
        return EncodedPair(pair.key, file.jpeg, encode_grey(alpha))
    return EncodedPair(pair.key, *encode_pixels(image, alpha, settings.size or shape, settings))


def _check_same_size(pair: Pair, alpha: Pixels, shape: tuple[int, int]) -> None:
    if alpha.shape != shape:
        raise InputError(
            f"{shown(pair.matte)}: {alpha.shape[1]}x{alpha.shape[0]} pixels, "
            f"but its image {shown(pair.image)} has {shape[1]}x{shape[0]}; "
            "bring both to one size, or remove the pair"
        )


@dataclass(frozen=True)
class _ImageFile:
    """An image that is read, but not decoded yet.

    Args:
        size: (H, W) in pixels as it is stored.
        orientation: of EXIF.
        decode: gives uint8 [H, W, 3] as it is stored.
        jpeg: its bytes, where they can be stored as they are.
    """

    size: tuple[int, int]
    orientation: int
    decode: Callable[[], Pixels]
    jpeg: bytes | None


def _read_image(pair: Pair) -> _ImageFile:
    if pair.masks == ALPHA:
        data = read_picture(pair.image, "JPEG", b"\xff\xd8")
    else:
        data = read_picture(pair.image, "JPEG, PNG or WebP")
    if data.startswith(b"\xff\xd8"):
        height, width, colours, _ = _decoded(
            pair.image, lambda: simplejpeg.decode_jpeg_header(data)
        )
        if pair.masks == ALPHA or colours in ("Gray", "YCbCr", "RGB"):
            size = int(height), int(width)
            check_pixels(pair.image, *size)
            return _ImageFile(
                size,
                exif_orientation(data),
                lambda: simplejpeg.decode_jpeg(data, "RGB"),
                data,
            )
    width, height = _decoded(pair.image, lambda: picture_size(data))
    check_pixels(pair.image, height, width)
    return _ImageFile(
        (height, width), picture_orientation(data), lambda: decode_picture(data), None
    )


def _read_mask(pair: Pair) -> Pixels:
    """Read the mask of a pair: uint8 [H, W]."""
    if pair.masks == ALPHA:
        data = read_picture(pair.matte, "PNG", b"\x89PNG")
        if data[25:26] not in (b"\4", b"\6"):
            raise InputError(
                f"{shown(pair.matte)}: has no alpha channel; convert it to RGBA, or remove it and "
                "its partner"
            )
        return np.asarray(_decoded(pair.matte, lambda: decode_matte(data)))
    data = read_picture(pair.matte, "PNG")
    if pair.masks == LEVELS:
        return np.asarray(_decoded(pair.matte, lambda: decode_grey(data)))
    try:
        return decode_mask(data, suffix_of(pair.matte))
    except NotAMaskError as error:
        raise InputError(f"{shown(pair.matte)}: {error}, or remove it and its partner") from error
    except ValueError as error:
        raise DamagedDataError(
            f"{shown(pair.matte)}: does not decode ({error}); {REMEDY}"
        ) from error


def encode_pixels(
    image: Pixels, alpha: Pixels, size: tuple[int, int], settings: Settings
) -> tuple[bytes, bytes]:
    """Resize a decoded pair and encode both members.

    Args:
        image: uint8 [h, w, 3].
        alpha: uint8 [h, w].
        size: (H, W) in pixels.
        settings: codec, quality and fit.
    """
    if size != alpha.shape:
        image = fitted(image, size, settings.fit, resize_image)
        alpha = fitted(alpha, size, settings.fit, resize_alpha)
    if settings.codec == "raw":
        return (
            npy_header(image.shape) + image.tobytes(),
            npy_header(alpha.shape) + alpha.tobytes(),
        )
    jpeg = simplejpeg.encode_jpeg(
        image, quality=settings.quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    return jpeg, encode_grey(alpha)


def resize_image(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize uint8 [h, w, 3] to [H, W, 3], bilinearly with antialiasing.

    torch's kernel for 8-bit pictures (after Pillow-SIMD) takes 0.6 ms from 600×800 to 256×256,
    Pillow 3.5 ms. It differs from Pillow by at most one level, in some 0.3 % of the values: far
    below what the JPEG that follows changes. Processors without AVX2 take another kernel, which may
    round otherwise: see ``fingerprint``.
    """
    import torch

    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def _decoded(path: Location, decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except (ValueError, RuntimeError) as error:
        raise DamagedDataError(f"{shown(path)}: does not decode ({error}); {REMEDY}") from error
