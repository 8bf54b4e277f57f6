"""Finishing a mask at the photo's own resolution: alpha along the picture's edges, and the person's own colours.

Both are published closed-form filters made of box blurs: no training, a cost that grows with the pixels only.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Alpha = NDArray[np.float32]
Array = NDArray[np.floating[Any]]

WORKING_SIDE = 800
"""The filters' coefficients are computed with the shorter side at most this long; only their use is at full resolution."""


def _box(array: Array, radius: int) -> Array:
    """Mean over a square of 2·radius + 1 pixels; at the border the picture is mirrored."""
    return np.asarray(cv2.blur(array, (2 * radius + 1, 2 * radius + 1)), np.float32)


def _working_copy(array: Array, scale: float) -> Array:
    if scale == 1:
        return array
    height, width = array.shape[:2]
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(array, small, interpolation=cv2.INTER_AREA), np.float32)


def _full_size(array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape[:2] == shape[:2]:
        return array
    return np.asarray(
        cv2.resize(array, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR), np.float32
    )


def _working_scale(shape: tuple[int, ...]) -> float:
    return min(1.0, WORKING_SIDE / min(shape[:2]))


def refine_alpha(
    picture: NDArray[np.uint8],
    alpha: Alpha,
    pixels: float,
    *,
    radius: float = 4.0,
    smoothness: float = 1e-4,
) -> Alpha:
    """Let alpha follow the edges of the picture: a fast guided filter with a colour guide.

    Around every pixel alpha is explained as a linear function of the colour, alpha ≈ a·I + b.

    Args:
        picture: RGB uint8 [H, W, 3].
        alpha: float32 [H, W] in [0, 1], enlarged from the network's resolution.
        pixels: how many pixels of the picture one pixel of the network spans.
        radius: of the filter, in pixels of the network. Both defaults are the best of ``benchmarks/predictions.py``.
        smoothness: the regularisation epsilon, in squared colour units of [0, 1]: flatter places are averaged.

    Returns:
        float32 [H, W] in [0, 1].

    Reference:
        He, Sun and Tang, "Guided Image Filtering", TPAMI 2013; He and Sun, "Fast Guided Filter", arXiv:1505.00996.
    """
    guide = picture.astype(np.float32) / 255
    scale = _working_scale(alpha.shape)
    reach = max(1, round(radius * pixels * scale))
    a, b = _linear_model(
        _working_copy(guide, scale), _working_copy(alpha, scale), reach, smoothness
    )
    refined = (_full_size(_box(a, reach), guide.shape) * guide).sum(2) + _full_size(
        _box(b, reach), guide.shape
    )
    return np.clip(refined, 0, 1).astype(np.float32)


def _linear_model(
    guide: Array, alpha: Alpha, radius: int, smoothness: float
) -> tuple[Array, Array]:
    """Per pixel, the least-squares a [H, W, 3] and b [H, W] of alpha ≈ a·guide + b within the box around it.

    The 3×3 systems are solved by LDLᵀ, written out: a third of the time of NumPy's solver, which calls LAPACK for every pixel.
    """
    mean, mean_alpha = _box(guide, radius), _box(alpha, radius)

    def covariance(i: int, j: int) -> Array:
        return _box(guide[..., i] * guide[..., j], radius) - mean[..., i] * mean[..., j]

    red, green, blue = (covariance(i, i) + np.float32(smoothness) for i in range(3))
    red_green, red_blue, green_blue = covariance(0, 1), covariance(0, 2), covariance(1, 2)
    lower_1, lower_2 = red_green / red, red_blue / red
    green = green - lower_1 * red_green
    green_blue = green_blue - lower_1 * red_blue
    lower_3 = green_blue / green
    blue = blue - lower_2 * red_blue - lower_3 * green_blue

    r, g, b = np.moveaxis(
        _box(guide * alpha[..., None], radius) - mean * mean_alpha[..., None], 2, 0
    )
    g = g - lower_1 * r
    b = (b - lower_2 * r - lower_3 * g) / blue
    g = g / green - lower_3 * b
    r = r / red - lower_1 * g - lower_2 * b
    a = np.stack((r, g, b), axis=2)
    return a, mean_alpha - (a * mean).sum(2)
