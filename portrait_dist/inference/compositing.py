"""Images out of a photo and its alpha: the person cut out, and put before another background.

The cut-out carries the person's own colours: where alpha is between 0 and 1 the photo shows a
mixture with the old background, which would stay as a fringe before a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

from portrait_dist.errors import InputError, nearest
from portrait_dist.inference.photos import read_photo
from portrait_dist.preprocessing import Alpha, ImageArray
from portrait_dist.visualize import checkerboard

Array = NDArray[np.floating[Any]]
"""float32 RGB [H, W, 3] in [0, 1]."""
Background = Callable[[ImageArray, Alpha], Array | None]
"""Function of (photo, alpha) that gives the new background, None for a transparent one."""

WORKING_SIDE = 800
"""Local mean colours are smooth: they are computed with the photo's shorter side at most this long.
"""
REACH = (1 / 24, 1 / 72)
"""Radius of the two passes' neighbourhoods, as fractions of the photo's shorter side."""
BLUR = 1 / 40
"""Standard deviation of the blurred background, as a fraction of the photo's shorter side."""
PANEL_HEIGHT = 800
"""Largest height of a side-by-side image, pixels."""


def foreground_colours(photo: ImageArray, alpha: Alpha) -> Array:
    """Estimate the person's own colours.

    Two passes of blur fusion: local mean colours of foreground F and background B, weighted by
    alpha, then the part of each pixel that the mixture I = αF + (1-α)B leaves unexplained.

    Args:
        photo: RGB uint8 [H, W, 3].
        alpha: float32 [H, W] in [0, 1].

    Returns:
        float32 RGB [H, W, 3] in [0, 1].

    Reference:
        Forte, "Approximate Fast Foreground Colour Estimation", ICIP 2021.
    """
    image = photo.astype(np.float32) / 255
    height, width = alpha.shape
    scale = min(1.0, WORKING_SIDE / min(height, width))
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    tiny_image, tiny_alpha = (
        cv2.resize(plane, small, interpolation=cv2.INTER_AREA) for plane in (image, alpha)
    )
    first, second = (max(1, round(fraction * min(small))) for fraction in REACH)
    foreground, background = _local_means(tiny_image, tiny_image, tiny_alpha, first)
    foreground, background = _local_means(
        _unmix(tiny_image, tiny_alpha, foreground, background), background, tiny_alpha, second
    )
    means = (
        cv2.resize(mean, (width, height), interpolation=cv2.INTER_LINEAR)
        for mean in (foreground, background)
    )
    return _unmix(image, alpha, *means)


def _local_means(
    foreground: Array, background: Array, alpha: Alpha, radius: int
) -> tuple[Array, Array]:
    """Average both colours over a box, weighted by alpha² and (1 - alpha)².

    Squares instead of the paper's plain weights: mixed pixels count less, which halves the fringe
    of wide soft edges.
    """
    box = (2 * radius + 1, 2 * radius + 1)
    smallest = 1e-5

    def mean(colours: Array, weight: Array) -> Array:
        return cv2.blur(colours * weight[..., None], box) / (
            cv2.blur(weight, box)[..., None] + smallest
        )

    return mean(foreground, alpha**2), mean(background, (1 - alpha) ** 2)


def _unmix(image: Array, alpha: Alpha, foreground: Array, background: Array) -> Array:
    """Correct the foreground's mean by its part of what mixing both means does not explain."""
    weight = alpha[..., None]
    return np.clip(
        foreground + weight * (image - weight * foreground - (1 - weight) * background), 0, 1
    )


def parse_background(text: str) -> Background:
    """Make the function that draws what stands behind the person.

    Args:
        text: ``transparent``, a colour (``white``, ``#1e90ff``), ``blur`` (the photo itself, out of
            focus), or the path of an image, which is scaled to cover the photo and cropped around
            its middle.

    Raises:
        InputError: neither a colour nor an image file.
        DamagedDataError: the image cannot be read.
    """
    if text == "transparent":
        return lambda photo, alpha: None
    if text == "blur":
        return blurred
    colour = _parse_colour(text)
    if colour is None:
        if not Path(text).is_file():
            known = ["transparent", "blur", *ImageColor.colormap]
            raise InputError(
                f"--background '{text}': neither a colour nor an image.{nearest(text, known)} "
                "Give transparent, blur, a colour such as white or #1e90ff, or the path of an image"
            )
        scene = read_photo(text)
        return lambda photo, alpha: _covering(scene, *alpha.shape)
    return lambda photo, alpha: np.broadcast_to(colour, photo.shape)


def needs_no_file(text: str) -> bool:
    """Say whether :func:`parse_background` takes this text without opening a file."""
    return text in ("transparent", "blur") or _parse_colour(text) is not None


def _parse_colour(text: str) -> Array | None:
    """Parse a colour as float32 RGB [3] in [0, 1]; None for any other text."""
    try:
        levels = ImageColor.getrgb(text)[:3]
    except ValueError:
        return None
    if not all(level in range(256) for level in levels):  # such as rgb(300,0,0)
        return None
    return np.asarray(levels, np.float32) / 255


def blurred(photo: ImageArray, alpha: Alpha) -> Array:
    """Blur the photo's background; the person's colours do not bleed into it."""
    height, width = alpha.shape
    scale = min(1.0, WORKING_SIDE / 2 / min(height, width))
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = cv2.resize(photo, small, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    # The fourth power: at soft edges the photo shows a mixture with the person, which hardly counts
    # as background.
    behind = (1 - cv2.resize(alpha, small, interpolation=cv2.INTER_AREA)[..., None]) ** 4
    sigma = BLUR * min(small)
    # Where the person hides the background for far around, what little is seen of it is spread by
    # the widest blur.
    weight = np.full_like(behind, 1e-6)
    colour = weight * image.mean((0, 1))
    for spread, trust in ((sigma, 1.0), (4 * sigma, 1e-2), (16 * sigma, 1e-4)):
        weight = weight + trust * cv2.GaussianBlur(behind, (0, 0), spread)[..., None]
        colour = colour + trust * cv2.GaussianBlur(image * behind, (0, 0), spread)
    return np.asarray(
        cv2.resize(
            (colour / weight).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR
        )
    )


def _covering(scene: ImageArray, height: int, width: int) -> Array:
    scale = max(height / scene.shape[0], width / scene.shape[1])
    size = (max(width, round(scene.shape[1] * scale)), max(height, round(scene.shape[0] * scale)))
    resized = cv2.resize(
        scene, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return resized[top : top + height, left : left + width].astype(np.float32) / 255


def to_bytes(array: Array | Alpha) -> ImageArray:
    """Convert float in [0, 1] to uint8, rounded."""
    return (array * 255 + 0.5).astype(np.uint8)


def cut_out(photo: ImageArray, alpha: Alpha, background: Background | None = None) -> ImageArray:
    """Cut the person out at the photo's own resolution.

    Args:
        photo: RGB uint8 [H, W, 3].
        alpha: float32 [H, W] in [0, 1].
        background: from :func:`parse_background`; transparent when not given.

    Returns:
        uint8: RGBA [H, W, 4] with a transparent background (colours not multiplied by alpha), else
            RGB [H, W, 3].
    """
    foreground = foreground_colours(photo, alpha)
    scene = background(photo, alpha) if background else None
    if scene is None:
        # Not multiplied by alpha: PNG and WebP store straight colours.
        return np.dstack([to_bytes(foreground), to_bytes(alpha)])
    return to_bytes(scene + alpha[..., None] * (foreground - scene))


def side_by_side(photo: ImageArray, alpha: Alpha, cutout: ImageArray) -> ImageArray:
    """Put photo, mask and cut-out into one RGB image, at most 800 pixels high.

    A checkerboard shows where the cut-out is transparent.

    Args:
        photo: RGB uint8 [H, W, 3].
        alpha: float32 [H, W] in [0, 1].
        cutout: from :func:`cut_out`, RGBA or RGB.
    """
    height, width = alpha.shape
    scale = min(1.0, PANEL_HEIGHT / height)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    panels = [
        cv2.resize(panel, small, interpolation=cv2.INTER_AREA)
        for panel in (photo, to_bytes(alpha), cutout[..., :3])
    ]
    if cutout.shape[2] == 4:
        opacity = cv2.resize(alpha, small, interpolation=cv2.INTER_AREA)[..., None]
        panels[2] = (
            opacity * panels[2]
            + (1 - opacity) * checkerboard(opacity.shape[0], opacity.shape[1], square=16)
        ).astype(np.uint8)
    panels[1] = np.repeat(panels[1][..., None], 3, axis=2)
    return np.concatenate(panels, axis=1)
