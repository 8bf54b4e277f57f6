"""What every network input has in common: types, default size, normalisation.

Training, evaluation, prediction and export read these facts here, so that a photo reaches the
network as the training images did.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

ImageArray = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB; grey ones and mattes are uint8 [H, W]."""
Alpha = NDArray[np.float32]
"""float32 [H, W] from 0 (background) to 1 (person)."""

DEFAULT_SIZE = (256, 256)
"""(H, W) in pixels of the network's input, as in the SuperGradients tutorial."""

DEFAULT_ASPECT = 600 / 800
"""Width / height of AISegment's images before they are resized, for checkpoints that do not say it.
"""

Fit = Literal["letterbox", "cover", "squash"]
"""How an image of another shape reaches the size of training.

``squash`` resizes it, whatever its shape. ``letterbox`` keeps its aspect ratio, lets its longer
side fill the size and continues its edge pixels over the rest. ``cover`` keeps it too, lets its
shorter side fill the size and cuts the longer one at both ends; ``predict`` cuts nothing.
"""
FITS: tuple[Fit, ...] = ("letterbox", "cover", "squash")

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's training images, RGB in [0, 1] (torchvision's
pretrained models use them)."""

SCALE = (1 / (255 * np.array(STD))).astype(np.float32)
OFFSET = (-np.array(MEAN) / STD).astype(np.float32)
"""float32 [3]: level * SCALE + OFFSET is (level / 255 - MEAN) / STD."""


def fit_inner(
    height: int, width: int, size: tuple[int, int], fit: Fit, aspect: float | None = None
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a resized image within ``size``.

    With ``cover`` it sticks out: top or left is negative then, or 0.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        size: (H, W) to be filled.
        fit: how.
        aspect: width / height of images that ``squash`` would bring to ``size`` undistorted; that
            of ``size`` by default.
    """
    if fit == "squash":
        return (0, 0, *size)
    # The image's width at the height of training, resized as the training images were.
    wide = size[0] * (width / height) * (size[1] / size[0]) / (aspect or size[1] / size[0])
    if fit == "letterbox":
        scale = min(1.0, size[1] / wide)
        inner = (max(1, round(size[0] * scale)), max(1, round(wide * scale)))
    else:
        scale = max(1.0, size[1] / wide)
        inner = (max(size[0], round(size[0] * scale)), max(size[1], round(wide * scale)))
    return ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2, *inner)


def normalise(images: torch.Tensor, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise a batch as the loader delivers it.

    Args:
        images: uint8 [B, H, W, 3].
        alphas: uint8 [B, H, W].

    Returns:
        Images, float32 [B, 3, H, W] in channels-last memory, and alphas, float32 [B, 1, H, W] in
        [0, 1].
    """
    return normalise_levels(images.float()).permute(0, 3, 1, 2), alphas[:, None].float().div_(255)


def normalise_levels(images: torch.Tensor) -> torch.Tensor:
    """Compute (x / 255 - mean) / std of levels 0 to 255, in place where the memory allows.

    Args:
        images: float32 [B, H, W, 3].
    """
    import torch

    width = images.shape[2]
    scale, offset = _normaliser(width, str(images.device))
    rows = images.reshape(-1, width * 3)  # long rows vectorise, rows of three channels do not
    return torch.addcmul(offset, rows, scale, out=rows).view(images.shape)


@functools.lru_cache(maxsize=16)
def _normaliser(width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of a row of ``width`` RGB pixels."""
    import torch

    scale, offset = (torch.from_numpy(np.tile(row, width)).to(device) for row in (SCALE, OFFSET))
    return scale, offset
