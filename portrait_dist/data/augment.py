"""Augmentation of whole batches on their device, with parameters that are a pure function of (seed, epoch, position).

The colour part is the tutorial's: horizontal flip, then brightness, contrast and saturation in random order with factors drawn
per sample, as torchvision's ``ColorJitter`` does on 8-bit pictures. Every step ends in whole levels of 0..255 there, and so it
does here. ``normalise`` then subtracts ImageNet's mean and divides by its standard deviation.

Added to it, and off by default: zoom, rotation and shift (the edge pixels are continued, for a figure that is cut by the lower
edge stays cut by it), and a new background. That comes from the next picture of the rank's batch, whose own figure is painted
over with what surrounds it; the figure's colours at soft edges keep some of the old background.

Nothing here waits for the device: parameters are drawn on the host and travel with the batch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from portrait_dist.data.stream.order import Ints, hash64, hash64_each, mix
from portrait_dist.preprocessing import OFFSET, SCALE, normalise_levels

if TYPE_CHECKING:
    from portrait_dist.config import AugmentConfig

# ITU-R 601-2 luma in 1/65536, as Pillow's "L": whole numbers below 2^24, so float32 holds the sums exactly
LUMA = (19595.0, 38470.0, 7471.0)
LUMA_ROW = np.array([LUMA], dtype=np.float32) / 65536
NORMALISER = np.column_stack([np.diag(SCALE), OFFSET])
"""float32 [3, 4]: a pixel's levels (r, g, b, 1) to its normalised values."""

BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2
ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
DRAWS = 10
_SALT = 0x6175676D656E74  # keeps these draws apart from those of the order, which has the same seed


@dataclass
class Parameters:
    """What happens to each sample of a batch: numpy arrays of length B.

    Attributes:
        flip: bool, mirror left and right.
        order: int64 [B, 3], operations (0 brightness, 1 contrast, 2 saturation) in the order they are applied.
        factors: float64 [B, 3], factor of brightness, contrast and saturation.
        zoom, angle, shift_x, shift_y: float64; angle in degrees counter-clockwise, shifts in shares of the side.
        background: bool, take a new background.
    """

    flip: NDArray[np.bool_]
    order: NDArray[np.int64]
    factors: NDArray[np.float64]
    zoom: NDArray[np.float64]
    angle: NDArray[np.float64]
    shift_x: NDArray[np.float64]
    shift_y: NDArray[np.float64]
    background: NDArray[np.bool_]


def uniform(seed: int, epoch: int, positions: Ints, draws: int) -> NDArray[np.float64]:
    """float64 [B, draws] in [0, 1): counter-based, so a sample's numbers depend on nothing but its position and epoch."""
    secrets = hash64_each(hash64(seed, epoch, _SALT), positions)
    steps = (np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))[None]
    return (mix(secrets[:, None] + steps) >> np.uint64(11)).astype(np.float64) / 2.0**53


class Augment:
    """Random flip, colours, and where configured geometry and background; then normalisation.

    Args:
        config: probabilities and ranges, see :class:`portrait_dist.config.AugmentConfig`.
        seed: of the draws.
    """

    def __init__(self, config: AugmentConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed

    def __call__(
        self, images: torch.Tensor, alphas: torch.Tensor, *, epoch: int, positions: Ints
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment and normalise a batch.

        Args:
            images: uint8 [B, H, W, 3].
            alphas: uint8 [B, H, W].
            epoch: number of the epoch.
            positions: int64 [B], the samples' positions in the epoch, as in ``Batch.positions``.

        Returns:
            Normalised images, float32 [B, 3, H, W] in channels-last memory, and alphas, float32 [B, 1, H, W] in [0, 1].
        """
        return self.apply(images, alphas, self.parameters(epoch, positions))

    def parameters(self, epoch: int, positions: Ints) -> Parameters:
        """Draw the parameters of the samples at these positions of the epoch."""
        config = self.config
        draws = uniform(self.seed, epoch, np.asarray(positions, dtype=np.int64), DRAWS).T
        spreads = (config.brightness, config.contrast, config.saturation)
        lows, highs = (
            [max(0.0, 1 - spread) for spread in spreads],
            [1 + spread for spread in spreads],
        )
        log_zoom = math.log1p(config.scale)
        return Parameters(
            flip=draws[0] < config.flip,
            order=ORDERS[(draws[1] * len(ORDERS)).astype(np.int64)],
            factors=np.stack(
                [
                    low + (high - low) * draw
                    for low, high, draw in zip(lows, highs, draws[2:5], strict=True)
                ],
                1,
            ),
            zoom=np.exp((2 * draws[5] - 1) * log_zoom),
            angle=(2 * draws[6] - 1) * config.rotation,
            shift_x=(2 * draws[7] - 1) * config.translation,
            shift_y=(2 * draws[8] - 1) * config.translation,
            background=draws[9] < config.background,
        )

    def apply(
        self, images: torch.Tensor, alphas: torch.Tensor, parameters: Parameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment with given parameters; shapes as in ``__call__``."""
        config = self.config
        if not (config.scale or config.rotation or config.translation or config.background):
            pictures, mattes = _flip_and_colours(images, alphas, parameters, normalised=True)
            return pictures.permute(0, 3, 1, 2), mattes[:, None]
        pictures, mattes = _flip_and_colours(images, alphas, parameters)
        pictures, mattes = pictures.permute(0, 3, 1, 2), mattes[:, None]
        if config.scale or config.rotation or config.translation:
            pictures, mattes = move(pictures, mattes, parameters)
        if config.background:
            pictures = new_background(pictures, mattes, parameters.background)
        return normalise_levels(pictures.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), mattes


def flip(
    images: torch.Tensor, alphas: torch.Tensor, chosen: NDArray[np.bool_]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror the chosen samples of uint8 [B, H, W, 3] and [B, H, W]."""
    mask = _to(chosen, images.device)
    return (
        torch.where(mask[:, None, None, None], images.flip(2), images),
        torch.where(mask[:, None, None], alphas.flip(2), alphas),
    )


def colours(
    images: torch.Tensor, alphas: torch.Tensor, parameters: Parameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Brightness, contrast and saturation of each sample, in its own order.

    Each is a blend of the picture with black, with its mean grey or with its grey version, cut to 0..255 and rounded down to
    whole levels, as Pillow's ``ImageEnhance`` and torchvision's uint8 operations do.

    Args:
        images: uint8 [B, H, W, 3].
        alphas: uint8 [B, H, W], passed through.
        parameters: ``order`` and ``factors`` are used.

    Returns:
        float32 [B, H, W, 3] of whole numbers in 0..255, and float32 [B, H, W].
    """
    pictures = images.float()
    rows = np.arange(len(images))[:, None]
    steps = _to(
        np.stack([parameters.order, parameters.factors[rows, parameters.order]]).astype(np.float32),
        images.device,
    )
    for turn in range(3):
        kind, factor = (steps[index, :, turn, None, None, None] for index in (0, 1))
        grey = _grey(pictures)
        mean = (grey.mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
        base = torch.where(kind == SATURATION, grey, mean) * (kind != BRIGHTNESS)
        pictures = torch.addcmul(base, pictures - base, factor).clamp_(0, 255).floor_()
    return pictures, alphas.float()


def move(
    pictures: torch.Tensor, mattes: torch.Tensor, parameters: Parameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zoom, turn and shift about the centre, bilinear, with the edge continued outside.

    Args:
        pictures: float32 [B, 3, H, W].
        mattes: float32 [B, 1, H, W], moved by the same grid.
        parameters: ``zoom``, ``angle``, ``shift_x``, ``shift_y`` are used.
    """
    height, width = pictures.shape[-2:]
    cosine, sine = np.cos(np.radians(parameters.angle)), np.sin(np.radians(parameters.angle))
    ratio = height / width  # the grid runs from -1 to 1 on both sides: turning needs square pixels
    inverse = np.array([[cosine, sine * -ratio], [sine / ratio, cosine]]) / parameters.zoom
    shift = np.array([2 * parameters.shift_x, 2 * parameters.shift_y])
    offset = -np.einsum("ijb,jb->ib", inverse, shift)
    theta = np.concatenate([inverse, offset[:, None]], axis=1).transpose(2, 0, 1)
    grid = F.affine_grid(
        _to(theta.astype(np.float32), pictures.device), list(pictures.shape), align_corners=False
    )
    both = torch.cat([pictures, mattes], dim=1)
    moved = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved[:, :3], moved[:, 3:].clamp(0, 1)


def new_background(
    pictures: torch.Tensor, mattes: torch.Tensor, chosen: NDArray[np.bool_]
) -> torch.Tensor:
    """Put the chosen figures before the next picture of the batch, from which its figure is removed.

    Args:
        pictures: float32 [B, 3, H, W].
        mattes: float32 [B, 1, H, W] in [0, 1].
        chosen: bool [B].
    """
    behind = without_figure(pictures, mattes).roll(1, dims=0)
    share = torch.where(
        _to(chosen, pictures.device)[:, None, None, None], mattes, torch.ones_like(mattes)
    )
    return pictures * share + behind * (1 - share)


def without_figure(pictures: torch.Tensor, mattes: torch.Tensor) -> torch.Tensor:
    """The pictures with the figure painted over by the background's mean colour around it, from coarse to fine.

    Args:
        pictures: float32 [B, 3, H, W].
        mattes: float32 [B, 1, H, W] in [0, 1].
    """
    free = (1 - mattes).clamp(0, 1)
    free = torch.where(
        free > 0.98, free, torch.zeros_like(free)
    )  # soft edges carry the figure's colours
    visible = pictures * free
    fill = _weighted_mean(visible, free, (1, 1), pictures.mean(dim=(2, 3), keepdim=True))
    for cells in (4, 16):
        if min(pictures.shape[-2:]) >= cells:
            fill = F.interpolate(fill, (cells, cells), mode="bilinear", align_corners=False)
            fill = _weighted_mean(visible, free, (cells, cells), fill)
    fill = F.interpolate(fill, pictures.shape[-2:], mode="bilinear", align_corners=False)
    return visible + fill * (1 - free)


def _weighted_mean(
    visible: torch.Tensor, free: torch.Tensor, cells: tuple[int, int], coarser: torch.Tensor
) -> torch.Tensor:
    """Mean colour of the visible pixels of each cell, leaning on the coarser level where there are few."""
    weight = F.adaptive_avg_pool2d(free, cells)
    return (F.adaptive_avg_pool2d(visible, cells) + 0.02 * coarser) / (weight + 0.02)


def _grey(pictures: torch.Tensor) -> torch.Tensor:
    """Pillow's luma of whole levels, float32 [B, H, W, 1], rounded to whole levels."""
    red, green, blue = pictures.unbind(-1)
    luma = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    return ((luma + 32768) / 65536).floor()[..., None]


def _to(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A small array on the device; from page-locked memory, so that the copy waits for nothing."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def _flip_and_colours(
    images: torch.Tensor, alphas: torch.Tensor, parameters: Parameters, normalised: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip and colours, and normalisation if asked: sample by sample in the caches of a CPU, else as whole batches on the device.

    Returns:
        float32 [B, H, W, 3], levels of 0..255 unless normalised, and float32 [B, H, W] in [0, 1].
    """
    if images.device.type == "cpu" and _opencv() is not None:
        return _on_cpu(images, alphas, parameters, normalised)
    pictures, mattes = colours(*flip(images, alphas, parameters.flip), parameters)
    return normalise_levels(pictures) if normalised else pictures, mattes / 255


@functools.cache
def _opencv() -> Any:
    """OpenCV, whose 8-bit operations are some ten times as fast as torch's on a CPU; None where it is not installed."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def _on_cpu(
    images: torch.Tensor, alphas: torch.Tensor, parameters: Parameters, normalised: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as the batched way, up to one level where OpenCV rounds otherwise.

    Picture after picture on the calling thread, by operations without threads of their own. Steps of 10 to 60 µs on several
    threads wait for each other longer than they run, and the loader's decoders keep the other cores busy meanwhile.
    """
    cv2 = _opencv()
    count, height, width, _ = images.shape
    pictures = torch.empty((count, height, width, 3), dtype=torch.float32)
    mattes = torch.empty((count, height, width), dtype=torch.float32)
    given = zip(images.numpy(), alphas.numpy(), strict=True)
    for row, ((picture, matte), finished, share) in enumerate(
        zip(given, pictures.numpy(), mattes.numpy(), strict=True)
    ):
        if parameters.flip[row]:
            picture, matte = cv2.flip(picture, 1), cv2.flip(matte, 1)
        np.copyto(finished, _colours_of_one(picture, parameters, row))
        if normalised:
            cv2.transform(finished, NORMALISER, dst=finished)
        np.multiply(matte, np.float32(1 / 255), out=share)
    return pictures, mattes


def _colours_of_one(
    picture: NDArray[np.uint8], parameters: Parameters, row: int
) -> NDArray[np.uint8]:
    """Colours of one uint8 [H, W, 3] picture; the original is left alone."""
    cv2 = _opencv()
    down = -0.4999  # OpenCV rounds to the nearest level, Pillow down
    for turn, kind in enumerate(parameters.order[row]):
        factor = float(parameters.factors[row, kind])
        if kind == BRIGHTNESS:
            picture = cv2.convertScaleAbs(picture, alpha=factor, beta=down)
        elif kind == CONTRAST:
            mean = math.floor(cv2.mean(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))[0] + 0.5)
            picture = cv2.addWeighted(picture, factor, picture, 0, (1 - factor) * mean + down)
        else:
            # the fast way is one level off at 0.1 % of the pixels: no matter at the end, but the next steps would enlarge it
            grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if turn == 2 else _exact_grey(picture)
            picture = cv2.addWeighted(
                picture, factor, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 1 - factor, down
            )
    return picture


def _exact_grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma of one picture, uint8 [H, W]; in float32, for which OpenCV is three times as fast as for bytes."""
    grey = _opencv().transform(picture.astype(np.float32), LUMA_ROW)
    return np.rint(grey, out=grey).astype(np.uint8)
