"""Encode one pair of files as a shard stores it: JPEG and grey PNG, or pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simplejpeg

from portrait_dist.data.shards.decode import jpeg_size, npy_header, resize_alpha
from portrait_dist.data.shards.format import MAX_SIDE, SUFFIXES
from portrait_dist.data.shards.png import Pixels, decode_matte, encode_grey
from portrait_dist.data.source.pictures import (
    REMEDY,
    check_pixels,
    exif_orientation,
    read_picture,
    upright,
)
from portrait_dist.errors import DamagedDataError, InputError

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
    """

    size: tuple[int, int] | None
    codec: str
    quality: int
    samples_per_shard: int

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
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality}: it is from 1 to 100")
        if self.samples_per_shard < 1:
            raise InputError(f"--samples-per-shard {self.samples_per_shard}: it is at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they stand in the manifest."""
        return {
            "size": list(self.size) if self.size else None,
            "codec": self.codec,
            "quality": self.quality,
            "samples_per_shard": self.samples_per_shard,
        }


@dataclass(frozen=True)
class EncodedPair:
    """One pair as it is stored."""

    key: str
    image: bytes
    alpha: bytes


def encode_pair(source: tuple[str, Path, Path], settings: Settings) -> EncodedPair:
    """Read a pair and encode it.

    At original size the bytes of the JPEG file are stored as they are, unless its EXIF orientation
    says that it is shown otherwise than it is stored; those images are brought upright and encoded
    again, because no decoder of shards looks at EXIF. The matte is as the image is shown, or, where
    only that fits its size, as it is stored.

    Args:
        source: key, image file and matte file.
        settings: how it is stored.

    Raises:
        InputError: the pair cannot be used.
        DamagedDataError: a file does not decode.
    """
    key, image_path, matte_path = source
    jpeg = read_picture(image_path, "JPEG", b"\xff\xd8")
    png = read_picture(matte_path, "PNG", b"\x89PNG")
    # The byte of the header that says the colour type: grey or RGB, both with alpha.
    if png[25:26] not in (b"\4", b"\6"):
        raise InputError(
            f"{matte_path}: has no alpha channel; convert it to RGBA, or remove it and its partner"
        )
    stored = _decoded(image_path, lambda: jpeg_size(jpeg))
    check_pixels(image_path, *stored)
    alpha = _decoded(matte_path, lambda: decode_matte(png))
    orientation = exif_orientation(jpeg)
    shown = stored[::-1] if orientation >= 5 else stored
    if alpha.shape == stored != shown:  # the matte's maker did not look at EXIF
        alpha = upright(alpha, orientation)
    _check_same_size(matte_path, alpha, image_path, shown)
    # Decoded at original size too: a file that is damaged behind its header is found here.
    image = upright(_decoded(image_path, lambda: simplejpeg.decode_jpeg(jpeg, "RGB")), orientation)
    if settings.size is None and orientation == 1:
        return EncodedPair(key, jpeg, encode_grey(alpha))
    return EncodedPair(key, *encode_pixels(image, alpha, settings.size or shown, settings))


def _check_same_size(
    matte_path: Path, alpha: Pixels, image_path: Path, shown: tuple[int, int]
) -> None:
    if alpha.shape != shown:
        raise InputError(
            f"{matte_path}: {alpha.shape[1]}x{alpha.shape[0]} pixels, "
            f"but its image {image_path} has {shown[1]}x{shown[0]}; "
            "bring both to one size, or remove the pair"
        )


def encode_pixels(
    image: Pixels, alpha: Pixels, size: tuple[int, int], settings: Settings
) -> tuple[bytes, bytes]:
    """Resize a decoded pair and encode both members.

    Args:
        image: uint8 [h, w, 3].
        alpha: uint8 [h, w].
        size: (H, W) in pixels.
        settings: codec and quality.
    """
    if size != alpha.shape:
        image, alpha = resize_image(image, size), resize_alpha(alpha, size)
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


def _decoded(path: Path, decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except (ValueError, RuntimeError) as error:
        raise DamagedDataError(f"{path}: does not decode ({error}); {REMEDY}") from error
