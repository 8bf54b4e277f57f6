"""Where a photo lies in the network's input, and the ways there and back.

The network was trained on upright images of one aspect ratio (600×800 in the AISegment set),
resized to its input size. ``benchmarks/predictions.py`` measures the choices (``fit``) on photos of
other shapes:

- ``letterbox`` (the default of checkpoints that were trained on squashed images; others take what
  they were trained with): the photo keeps its aspect ratio under the resizing of training; its
  longer side fills the input and the rest continues its edge pixels, as the augmentation of
  training does.
- ``cover``: as above, but its shorter side fills the input and the longer one sticks out. The
  network is fully convolutional and takes that larger image whole.
- ``squash``: the whole photo is resized to the input, whatever its shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from portrait_dist.models.unet import STRIDE
from portrait_dist.preprocessing import FITS, Alpha, Fit, ImageArray, fit_inner

__all__ = ["FITS", "Fit", "Placement", "enlarge", "fit_photo", "shrink"]

LARGEST_STRETCH = 4
"""With ``cover``, the network's input is at most this many times the training size; longer
panoramas are squeezed."""


@dataclass(frozen=True)
class Placement:
    """Where a photo lies in the network's input.

    Attributes:
        height, width: of the network's input, multiples of its stride.
        inner: (top, left, height, width) of the photo within it.
    """

    height: int
    width: int
    inner: tuple[int, int, int, int]


def fit_photo(
    height: int, width: int, size: tuple[int, int], fit: Fit, aspect: float, stride: int = STRIDE
) -> Placement:
    """Lay a photo of ``height`` × ``width`` pixels into the network's input.

    Args:
        height: of the photo.
        width: of the photo.
        size: (H, W) of the training images.
        fit: see this module's docstring.
        aspect: width / height of the training images before they were resized to ``size``.
        stride: the network's; height and width of its input are multiples of it.
    """
    if fit != "cover":
        return Placement(*size, fit_inner(height, width, size, fit, aspect))
    # The photo's width at the height of training, resized as the training images were.
    wide = size[0] * (width / height) * (size[1] / size[0]) / aspect
    scale = max(1.0, size[1] / wide)
    limit = (LARGEST_STRETCH * size[0], LARGEST_STRETCH * size[1])
    inner = (
        min(limit[0], _rounded(size[0] * scale, stride)),
        min(limit[1], _rounded(wide * scale, stride)),
    )
    return Placement(*inner, (0, 0, *inner))


def _rounded(side: float, stride: int) -> int:
    return max(stride, round(side / stride) * stride)


def shrink(photo: ImageArray, placement: Placement) -> ImageArray:
    """Make the network's input, uint8 [H, W, 3].

    Antialiased bilinear, as in training; around the photo its edge pixels are continued.
    """
    top, left, height, width = placement.inner
    small = np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR))
    bottom, right = placement.height - top - height, placement.width - left - width
    return np.asarray(
        cv2.copyMakeBorder(small, top, bottom, left, right, cv2.BORDER_REPLICATE), np.uint8
    )


def enlarge(alpha: Alpha, placement: Placement, height: int, width: int) -> Alpha:
    """Bring the network's alpha back to the photo's own ``height`` × ``width``."""
    top, left, inner_height, inner_width = placement.inner
    inner = np.ascontiguousarray(alpha[top : top + inner_height, left : left + inner_width])
    return np.asarray(
        cv2.resize(inner, (width, height), interpolation=cv2.INTER_LINEAR), np.float32
    )
