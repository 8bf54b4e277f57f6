"""Turns one pair of files into what a shard stores: a JPEG and a grey PNG, or pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from isal import isal_zlib

from portrait_dist.data.shards.decode import (
    Pixels,
    decode_matte,
    jpeg_size,
    npy_header,
    png_of,
    resize_alpha,
)
from portrait_dist.data.shards.format import SUFFIXES
from portrait_dist.errors import DamagedDataError, InputError

ALPHA_COMPRESSION = 2
"""igzip's level of the alpha PNGs, without row filters. A 256x256 mask takes 0.04 ms and 3.5 kB, with zlib's level 3 0.16 ms and
3.6 kB. Without filters it decodes in 0.03 ms, against 0.18 ms with those that Pillow chooses."""


@dataclass(frozen=True)
class Settings:
    """What decides over the bytes: (H, W) or None for the pictures' own size, codec, JPEG quality, samples per shard."""

    size: tuple[int, int] | None
    codec: str
    quality: int
    samples_per_shard: int

    def check(self) -> None:
        """
        Raises:
            InputError: a value that is out of range, or does not go with another.
        """
        if self.codec not in SUFFIXES:
            raise InputError(f"--codec {self.codec}: it is one of {', '.join(SUFFIXES)}")
        if self.codec == "raw" and self.size is None:
            raise InputError(
                "--codec raw: stores pixels, which needs one size for all; give --size HEIGHTxWIDTH"
            )
        if self.size is not None and not all(8 <= side <= 16384 for side in self.size):
            raise InputError(
                f"--size {self.size[0]}x{self.size[1]}: each side is from 8 to 16384 pixels"
            )
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality}: it is from 1 to 100")
        if self.samples_per_shard < 1:
            raise InputError(f"--samples-per-shard {self.samples_per_shard}: it is at least 1")

    def to_dict(self) -> dict[str, Any]:
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
    """Read a pair (key, image, matte) and bring it into the form in which it is stored.

    Raises:
        InputError: the pair cannot be used. DamagedDataError: a file does not decode.
    """
    (key, image_path, matte_path), size = source, settings.size
    jpeg, png = _read(image_path, "JPEG", b"\xff\xd8"), _read(matte_path, "PNG", b"\x89PNG")
    if png[25:26] not in (b"\4", b"\6"):
        raise InputError(
            f"{matte_path}: has no alpha channel; convert it to RGBA, or remove it and its partner"
        )
    stored = _decoded(image_path, lambda: jpeg_size(jpeg))
    alpha = _decoded(matte_path, lambda: decode_matte(png))
    if stored != alpha.shape:
        raise InputError(
            f"{matte_path}: {alpha.shape[1]}x{alpha.shape[0]} pixels, but its image {image_path} has "
            f"{stored[1]}x{stored[0]}; bring both to one size, or remove the pair"
        )
    image = _decoded(image_path, lambda: simplejpeg.decode_jpeg(jpeg, "RGB"))
    if size is None:
        return EncodedPair(key, jpeg, grey_png(alpha))
    if size != stored:
        image, alpha = resize_image(image, size), resize_alpha(alpha, size)
    if settings.codec == "raw":
        return EncodedPair(
            key,
            npy_header(image.shape) + image.tobytes(),
            npy_header(alpha.shape) + alpha.tobytes(),
        )
    jpeg = simplejpeg.encode_jpeg(
        image, quality=settings.quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    return EncodedPair(key, jpeg, grey_png(alpha))


def resize_image(image: Pixels, size: tuple[int, int]) -> Pixels:
    """uint8 [h, w, 3] to [H, W, 3], bilinear with antialiasing.

    torch's kernel for 8-bit pictures (after Pillow-SIMD) takes a fifth of Pillow's time and differs from it by at most one
    level, in some 0.3 % of the values: far below what the JPEG that follows changes. Processors without AVX2 take another
    way, which may round otherwise.
    """
    import torch

    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def _read(path: Path, kind: str, magic: bytes) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedDataError(
            f"{path}: cannot be read ({error.strerror}); run 'portrait-dist prepare' again"
        ) from error
    if not data:
        raise DamagedDataError(
            f"{path}: the file is empty; get it again, or remove it and its partner"
        )
    if not data.startswith(magic):
        raise InputError(f"{path}: is not a {kind} file; convert it, or remove it and its partner")
    return data


def _decoded(path: Path, decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except (ValueError, RuntimeError) as error:
        raise DamagedDataError(
            f"{path}: does not decode ({error}); get the file again, or remove it and its partner"
        ) from error


def grey_png(alpha: Pixels) -> bytes:
    """uint8 [H, W] as an 8-bit grey PNG that decodes fast."""
    rows = np.zeros(
        (alpha.shape[0], 1 + alpha.shape[1]), np.uint8
    )  # each row begins with its filter, 0 for none
    rows[:, 1:] = alpha
    return png_of(rows, isal_zlib.compress(rows.data, ALPHA_COMPRESSION))
