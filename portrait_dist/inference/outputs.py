"""The files that ``predict`` writes for a photo: all of them, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from portrait_dist import files
from portrait_dist.errors import InputError
from portrait_dist.inference import compositing
from portrait_dist.inference.photos import KINDS
from portrait_dist.preprocessing import Alpha, ImageArray

ImageFormat = Literal["png", "webp", "jpeg"]
SUFFIX_OF: dict[ImageFormat, str] = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
LARGEST_SIDE: dict[ImageFormat, int] = {"png": 1 << 20, "webp": 16383, "jpeg": 65500}
"""Pixels that the format (or its encoder) holds in one direction."""
QUALITY = 95
"""Of JPEG and WebP. Masks in WebP are lossless (OpenCV: a quality above 100), because every level
of alpha counts."""


@dataclass(frozen=True)
class OutputPlan:
    """What is written for each photo, and how; made by :func:`plan_outputs`."""

    folder: Path
    kinds: tuple[str, ...]
    image_format: ImageFormat
    scene: compositing.Background

    def targets(self, name: str) -> dict[str, Path]:
        """Name the file of each kind."""
        suffix = SUFFIX_OF[self.image_format]
        return {kind: self.folder / f"{name}.{kind}{suffix}" for kind in self.kinds}

    def render(self, photo: ImageArray, alpha: Alpha) -> dict[str, bytes]:
        """Encode each kind's image.

        Args:
            photo: RGB uint8 [H, W, 3].
            alpha: float32 [H, W] in [0, 1].

        Raises:
            InputError: the format cannot hold an image of this size.
        """
        planes: dict[str, ImageArray] = {}
        if "mask" in self.kinds:
            planes["mask"] = compositing.to_bytes(alpha)
        if "cutout" in self.kinds or "side-by-side" in self.kinds:
            cutout = compositing.cut_out(photo, alpha, self.scene)
            planes["cutout"] = cutout
            if "side-by-side" in self.kinds:
                planes["side-by-side"] = compositing.side_by_side(photo, alpha, cutout)
        return {kind: encode(planes[kind], self.image_format) for kind in self.kinds}

    def write(self, name: str, encoded: Mapping[str, bytes]) -> list[str]:
        """Write the files of one photo; where one fails, remove those that are new.

        Raises:
            InputError: the name is too long, or the folder may not be written.
            PortraitDistError: the disk is full or failed.
        """
        targets = self.targets(name)
        new = [path for path in targets.values() if not os.path.lexists(path)]
        try:
            for kind, path in targets.items():
                with files.explained(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                files.write_bytes(path, encoded[kind])
        except BaseException:
            for path in new:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise
        return [str(path) for path in targets.values()]

    def remove_leftovers(self, name: str) -> None:
        """Remove what a killed process left half-written beside a photo's outputs."""
        for folder in {path.parent for path in self.targets(name).values()}:
            if folder.is_dir():
                files.remove_abandoned_files(folder)


def plan_outputs(
    folder: Path,
    *,
    kinds: Sequence[str] = KINDS,
    image_format: ImageFormat = "png",
    background: str = "transparent",
) -> OutputPlan:
    """Check what is to be written for each photo.

    Args:
        folder: of the outputs.
        kinds: some of ``mask``, ``cutout`` and ``side-by-side``.
        image_format: PNG holds everything exactly; WebP holds transparency, its colours are
            slightly lossy; JPEG holds no transparency, and alpha and colours are slightly lossy.
        background: see :func:`portrait_dist.inference.compositing.parse_background`.

    Raises:
        InputError: an unknown kind or format, an unknown background, or a transparent cut-out as
            JPEG.
        DamagedDataError: the background's image cannot be read.
    """
    if not kinds or any(kind not in KINDS for kind in kinds):
        raise InputError(f"--only is one or several of {', '.join(KINDS)}, not '{','.join(kinds)}'")
    if image_format not in SUFFIX_OF:
        raise InputError(f"--format is one of {', '.join(SUFFIX_OF)}, not '{image_format}'")
    if background == "transparent" and "cutout" in kinds and image_format == "jpeg":
        raise InputError(
            "--format jpeg: JPEG holds no transparency; choose png or webp, or a --background"
        )
    chosen = tuple(kind for kind in KINDS if kind in kinds)
    return OutputPlan(folder, chosen, image_format, compositing.parse_background(background))


def encode(image: ImageArray, image_format: ImageFormat) -> bytes:
    """Encode a grey [H, W], RGB [H, W, 3] or RGBA [H, W, 4] image.

    Raises:
        InputError: the format cannot hold an image of this size.
    """
    limit = LARGEST_SIDE[image_format]
    if max(image.shape[:2]) > limit:
        raise InputError(
            f"{image.shape[1]}x{image.shape[0]} pixels: {image_format} holds at most {limit} "
            "a side; choose --format png"
        )
    order = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    pixels = cv2.cvtColor(image, order[image.shape[2]]) if image.ndim == 3 else image
    options: Sequence[int] = ()
    if image_format == "jpeg":
        options = (cv2.IMWRITE_JPEG_QUALITY, QUALITY)
    elif image_format == "webp":
        options = (cv2.IMWRITE_WEBP_QUALITY, 101 if image.ndim == 2 else QUALITY)
    done, data = cv2.imencode(SUFFIX_OF[image_format], pixels, options)
    if not done:
        raise InputError(f"{image.shape[1]}x{image.shape[0]} pixels: cannot be made {image_format}")
    return np.asarray(data).tobytes()
