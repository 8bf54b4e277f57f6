"""Finish a mask: drop islands, and let alpha follow the photo's edges at full resolution.

The edge filter is a published closed-form one made of box blurs: no training, a cost that grows
with the pixels only. OpenCV has it in opencv-contrib only, which cannot be installed beside
opencv-python-headless; hence it is written out here.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from portrait_dist.preprocessing import Alpha, ImageArray

Array = NDArray[np.floating[Any]]
"""float32 [H, W] or [H, W, C]."""

WORKING_SIDE = 800
"""The filter's coefficients are computed with the shorter side at most this long; only their use is
at full resolution."""


def keep_largest(alpha: Alpha) -> Alpha:
    """Keep the largest connected person and set the islands around it to 0, with their soft edges.

    A person is a connected region above 0.5 (diagonal neighbours count). A pixel belongs to the
    region that is nearest.

    Args:
        alpha: float32 [H, W] in [0, 1].

    Returns:
        A new array; ``alpha`` itself where there are no islands.
    """
    core = (alpha > 0.5).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(core, connectivity=8)
    if count <= 2:  # label 0 is the background
        return alpha
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    main = labels == largest
    others = (core > 0) & ~main
    distances = [
        cv2.distanceTransform(1 - region.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        for region in (main, others)
    ]
    # By the nearest region, not by the region itself: soft edges belong to no region.
    return np.where(distances[0] <= distances[1], alpha, np.float32(0))


def refine_alpha(
    photo: ImageArray,
    alpha: Alpha,
    pixels: float,
    *,
    radius: float = 4.0,
    smoothness: float = 1e-4,
) -> Alpha:
    """Let alpha follow the edges of the photo: a fast guided filter with a colour guide.

    Around every pixel alpha is explained as a linear function of the colour, alpha ≈ a·I + b.

    Args:
        photo: RGB uint8 [H, W, 3].
        alpha: float32 [H, W] in [0, 1], enlarged from the network's resolution.
        pixels: how many pixels of the photo one pixel of the network spans.
        radius: of the filter, in pixels of the network. Both defaults are the best of
            ``benchmarks/predictions.py``.
        smoothness: the regularisation epsilon, in squared colour units of [0, 1]: what is flatter
            is averaged.

    Returns:
        float32 [H, W] in [0, 1].

    Reference:
        He, Sun and Tang, "Guided Image Filtering", TPAMI 2013; He and Sun, "Fast Guided Filter",
        arXiv:1505.00996.
    """
    guide = photo.astype(np.float32) / 255
    scale = min(1.0, WORKING_SIDE / min(alpha.shape))
    reach = max(1, round(radius * pixels * scale))
    a, b = _linear_model(
        _working_copy(guide, scale), _working_copy(alpha, scale), reach, smoothness
    )
    refined = (_full_size(_box(a, reach), guide.shape) * guide).sum(2) + _full_size(
        _box(b, reach), guide.shape
    )
    return np.clip(refined, 0, 1).astype(np.float32)


def _box(array: Array, radius: int) -> Array:
    """Average over a square of 2·radius + 1 pixels; at the border the image is mirrored."""
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


def _linear_model(
    guide: Array, alpha: Alpha, radius: int, smoothness: float
) -> tuple[Array, Array]:
    """Fit a [H, W, 3] and b [H, W] of alpha ≈ a·guide + b to the box around every pixel.

    The 3×3 systems of least squares are solved by LDLᵀ, written out: a third of the time of NumPy's
    solver, which calls LAPACK for every pixel.
    """
    mean, mean_alpha = _box(guide, radius), _box(alpha, radius)

    def covariance(i: int, j: int) -> Array:
        return _box(guide[..., i] * guide[..., j], radius) - mean[..., i] * mean[..., j]

    # Factor: the diagonal (red, green, blue) and the lower triangle (lower_1, lower_2, lower_3).
    red, green, blue = (covariance(i, i) + np.float32(smoothness) for i in range(3))
    red_green, red_blue, green_blue = covariance(0, 1), covariance(0, 2), covariance(1, 2)
    lower_1, lower_2 = red_green / red, red_blue / red
    green = green - lower_1 * red_green
    green_blue = green_blue - lower_1 * red_blue
    lower_3 = green_blue / green
    blue = blue - lower_2 * red_blue - lower_3 * green_blue

    # Solve: forwards, by the diagonal, backwards.
    r, g, b = np.moveaxis(
        _box(guide * alpha[..., None], radius) - mean * mean_alpha[..., None], 2, 0
    )
    g = g - lower_1 * r
    b = (b - lower_2 * r - lower_3 * g) / blue
    g = g / green - lower_3 * b
    r = r / red - lower_1 * g - lower_2 * b
    a = np.stack((r, g, b), axis=2)
    return a, mean_alpha - (a * mean).sum(2)
