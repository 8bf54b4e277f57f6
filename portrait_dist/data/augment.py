"""Augmentation of whole batches on their device.

The parameters are a pure function of (seed, epoch, position). The colour part is the tutorial's:
horizontal flip, then brightness, contrast and saturation in random order with factors drawn per
sample, as torchvision's ``ColorJitter`` does on 8-bit images. Every step ends in whole levels of
0..255 there, and so it does here. Normalisation by ImageNet's mean and standard deviation follows.

Added to it, and off by default: zoom, rotation and shift (the edge pixels are continued, for a
person who is cut by the lower edge stays cut by it), and a new background. That comes from the
previous image of the rank's batch, whose own person is painted over with what surrounds them; the
person's colours at soft edges keep some of the old background.

There are three ways to compute it (``engine``), equal within one level: ``opencv`` image by image
on a CPU, ``torch`` by batched operations, and ``compiled``, the batched operations fused into a few
kernels for a GPU. Nothing waits for the device: parameters are drawn on the host and travel with
the batch.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from portrait_dist.data.stream.order import MAX_INT, Ints, hash64, hash64_each, mix, whole_number
from portrait_dist.errors import InputError, one_line
from portrait_dist.preprocessing import OFFSET, SCALE, normalise_levels

if TYPE_CHECKING:
    from portrait_dist.config import AugmentConfig

log = logging.getLogger("portrait_dist.data")

# ITU-R 601-2 luma in 1/65536, as Pillow's "L": whole numbers below 2^24, so float32 holds the sums
# exactly.
LUMA = (19595.0, 38470.0, 7471.0)
LUMA_ROUNDED = np.array([[*LUMA, 32768.0]], dtype=np.float32) / 65536
"""float32 [1, 4]: a pixel's levels (r, g, b, 1) to its luma plus one half, exact."""
NORMALISER = np.column_stack([np.diag(SCALE), OFFSET])
"""float32 [3, 4]: a pixel's levels (r, g, b, 1) to its normalised values."""
NORMALISER_ROWS = (SCALE.tolist(), OFFSET.tolist())

BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2
ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
ENGINES = ("auto", "opencv", "torch", "compiled")
DRAWS = 10
_SALT = 0x6175676D656E74  # keeps these draws apart from those of the order, which has the same seed


@dataclass
class Parameters:
    """What happens to each sample of a batch: numpy arrays of length B.

    Attributes:
        flip: bool, mirror left and right.
        order: int64 [B, 3], operations (0 brightness, 1 contrast, 2 saturation) as they are
            applied.
        factors: float64 [B, 3], factor of brightness, contrast and saturation.
        zoom: float64, above 1 enlarges.
        angle: float64, degrees counter-clockwise.
        shift_x: float64, as a fraction of the width.
        shift_y: float64, as a fraction of the height.
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


@dataclass(frozen=True)
class DeviceParameters:
    """The same on the device, one row a sample: all of it in one copy.

    Attributes:
        flip: bool [B].
        kinds: float32 [B, 3], the operations as they are applied.
        factors: float32 [B, 3], of the operations as they are applied.
        theta: float32 [B, 2, 3], for ``affine_grid``.
        background: bool [B].
    """

    flip: torch.Tensor
    kinds: torch.Tensor
    factors: torch.Tensor
    theta: torch.Tensor
    background: torch.Tensor


def uniform(seed: int, epoch: int, positions: Ints, draws: int) -> NDArray[np.float64]:
    """Draw float64 [B, draws] from [0, 1).

    The draws are counter-based: a sample's numbers depend on nothing but its position and epoch.
    """
    secrets = hash64_each(hash64(seed, epoch, _SALT), positions)
    counters = (np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))[None]
    # The upper 53 bits: all that a float64 in [0, 1) holds.
    return (mix(secrets[:, None] + counters) >> np.uint64(11)).astype(np.float64) / 2.0**53


class Augment:
    """Random flip, colours, and where configured geometry and background; then normalisation.

    Args:
        config: probabilities and ranges, see :class:`portrait_dist.config.AugmentConfig`.
        seed: of the draws.
        engine: ``opencv``, ``torch`` or ``compiled``; ``auto`` takes ``compiled`` on a GPU, and on
            a CPU ``opencv`` where it is installed.

    Raises:
        InputError: a range is negative or not finite, or an argument is wrong.
    """

    def __init__(self, config: AugmentConfig, seed: int = 0, engine: str = "auto") -> None:
        ranges = (config.flip, config.brightness, config.contrast, config.saturation, config.scale)
        for value in (*ranges, config.rotation, config.translation, config.background):
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"augment: {value} in {config}; all numbers are finite, 0 or more")
        if engine not in ENGINES:
            raise InputError(f"engine={engine}: it is one of {', '.join(ENGINES)}")
        if engine == "opencv" and _opencv() is None:
            raise InputError("engine=opencv: it is not installed; use engine=torch")
        self.config = config
        self.seed = whole_number("seed", seed, -MAX_INT - 1)
        self.engine = engine
        self.geometry = bool(config.scale or config.rotation or config.translation)
        self.background = bool(config.background)

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
            Normalised images, float32 [B, 3, H, W] in channels-last memory, and alphas, float32
            [B, 1, H, W] in [0, 1].
        """
        return self.apply(images, alphas, self.parameters(epoch, positions))

    def parameters(self, epoch: int, positions: Ints) -> Parameters:
        """Draw the parameters of the samples at these positions of the epoch."""
        config = self.config
        draws = uniform(self.seed, epoch, np.asarray(positions, dtype=np.int64), DRAWS).T
        spreads = (config.brightness, config.contrast, config.saturation)
        factors = []
        for spread, draw in zip(spreads, draws[2:5], strict=True):
            low, high = max(0.0, 1 - spread), 1 + spread
            factors.append(low + (high - low) * draw)
        return Parameters(
            flip=draws[0] < config.flip,
            order=ORDERS[(draws[1] * len(ORDERS)).astype(np.int64)],
            factors=np.stack(factors, 1),
            # Even in the logarithm: enlarging twice and halving are equally likely.
            zoom=np.exp((2 * draws[5] - 1) * math.log1p(config.scale)),
            angle=(2 * draws[6] - 1) * config.rotation,
            shift_x=(2 * draws[7] - 1) * config.translation,
            shift_y=(2 * draws[8] - 1) * config.translation,
            background=draws[9] < config.background,
        )

    def apply(
        self, images: torch.Tensor, alphas: torch.Tensor, parameters: Parameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment with given parameters; shapes as in ``__call__``."""
        engine = self._engine_for(images.device)
        if engine == "opencv":
            return self._by_opencv(images, alphas, parameters)
        height, width = images.shape[1:3]
        moved = to_device(parameters, images.device, height / width)
        compute = _compiled() if engine == "compiled" else batched
        return compute(images, alphas, moved, self.geometry, self.background)

    def _engine_for(self, device: torch.device) -> str:
        if self.engine != "auto":
            return self.engine
        if device.type == "cuda":
            return "compiled"
        return "torch" if device.type != "cpu" or _opencv() is None else "opencv"

    def _by_opencv(
        self, images: torch.Tensor, alphas: torch.Tensor, parameters: Parameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flip, colours and normalisation in one pass per image; geometry, where asked, batched."""
        more = self.geometry or self.background
        levels, mattes = flip_and_colours_by_opencv(images, alphas, parameters, normalised=not more)
        if not more:
            return levels.permute(0, 3, 1, 2), mattes[:, None]
        height, width = images.shape[1:3]
        moved = to_device(parameters, images.device, height / width)
        return geometry_and_background(levels, mattes, moved, self.geometry, self.background)


def to_device(parameters: Parameters, device: torch.device, ratio: float) -> DeviceParameters:
    """Bring parameters to the device by one copy.

    Args:
        parameters: of B samples.
        device: where the images are.
        ratio: height / width of the images.
    """
    # Factors in the order of their operations: the device then needs no gather.
    rows = np.arange(len(parameters.flip))[:, None]
    table = np.column_stack(
        [
            parameters.flip,
            parameters.background,
            parameters.order,
            parameters.factors[rows, parameters.order],
            affine(parameters, ratio).reshape(-1, 6),
        ]
    ).astype(np.float32)
    moved = torch.from_numpy(table)
    if device.type == "cuda":  # from page-locked memory, so that the copy waits for nothing
        moved = moved.pin_memory().to(device, non_blocking=True)
    else:
        moved = moved.to(device)
    return DeviceParameters(
        flip=moved[:, 0] > 0,
        kinds=moved[:, 2:5],
        factors=moved[:, 5:8],
        theta=moved[:, 8:].view(-1, 2, 3),
        background=moved[:, 1] > 0,
    )


def affine(parameters: Parameters, ratio: float) -> NDArray[np.float64]:
    """Compute the matrices [B, 2, 3] of ``affine_grid``: from output to input, both in -1..1.

    Args:
        parameters: zoom, angle and shifts are used.
        ratio: height / width; the grid is as wide as high, and turning needs square pixels.
    """
    cosine, sine = np.cos(np.radians(parameters.angle)), np.sin(np.radians(parameters.angle))
    inverse = np.array([[cosine, sine * -ratio], [sine / ratio, cosine]]) / parameters.zoom
    shift = np.array([2 * parameters.shift_x, 2 * parameters.shift_y])
    offset = -np.einsum("ijb,jb->ib", inverse, shift)
    return np.concatenate([inverse, offset[:, None]], axis=1).transpose(2, 0, 1)


def batched(
    images: torch.Tensor,
    alphas: torch.Tensor,
    parameters: DeviceParameters,
    geometry: bool,
    background: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment and normalise by operations on the whole batch; shapes as in ``Augment``."""
    levels, mattes = colours(*flip(images, alphas, parameters.flip), parameters)
    if not (geometry or background):
        return _normalised(levels), (mattes / 255)[:, None]
    return geometry_and_background(levels, mattes / 255, parameters, geometry, background)


def geometry_and_background(
    levels: torch.Tensor,
    mattes: torch.Tensor,
    parameters: DeviceParameters,
    geometry: bool,
    background: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Warp, replace backgrounds, normalise.

    Args:
        levels: float32 [B, H, W, 3] in 0..255.
        mattes: float32 [B, H, W] in [0, 1].
        parameters: of the samples.
        geometry: zoom, rotate and shift.
        background: take new backgrounds.

    Returns:
        As ``Augment``.
    """
    levels, mattes = levels.permute(0, 3, 1, 2), mattes[:, None]
    if geometry:
        levels, mattes = warp(levels, mattes, parameters.theta)
    if background:
        levels = new_background(levels, mattes, parameters.background)
    return _normalised(levels.permute(0, 2, 3, 1)), mattes


def _normalised(levels: torch.Tensor) -> torch.Tensor:
    """Normalise float32 [B, H, W, 3]; the result is [B, 3, H, W] in channels-last memory.

    Eagerly a row is one long vector, in place; a compiler does better with the plain formula.
    """
    if torch.compiler.is_compiling():
        scale, offset = (torch.tensor(row, device=levels.device) for row in NORMALISER_ROWS)
        normalised = (levels * scale + offset).permute(0, 3, 1, 2)
        return normalised.contiguous(memory_format=torch.channels_last)
    return normalise_levels(levels).permute(0, 3, 1, 2)


@functools.cache
def _compiled() -> Any:
    """Return ``batched`` compiled: 13 loops in place of 67 operations; 18 of 73 with geometry.

    On a GPU each operation is a kernel that reads and writes the whole batch, in all 6 to 10 % of a
    training step. Where it cannot be compiled (no Triton, no C++ compiler), it runs uncompiled.
    """
    compiled = torch.compile(batched, fullgraph=True)
    usable = True

    def run(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal usable
        if usable:
            try:
                result: tuple[torch.Tensor, torch.Tensor] = compiled(*arguments)
                return result
            # Found out by trying: a compiler may be there, and its headers not.
            except torch._dynamo.exc.TorchDynamoException as error:
                usable = False
                log.warning(
                    "augmentation cannot be compiled here (%s); it runs uncompiled", one_line(error)
                )
        return batched(*arguments)

    return run


def flip(
    images: torch.Tensor, alphas: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror the chosen samples of uint8 [B, H, W, 3] and [B, H, W]; ``chosen`` is bool [B]."""
    return (
        torch.where(chosen[:, None, None, None], images.flip(2), images),
        torch.where(chosen[:, None, None], alphas.flip(2), alphas),
    )


def colours(
    images: torch.Tensor, alphas: torch.Tensor, parameters: DeviceParameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change brightness, contrast and saturation of each sample, in its own order.

    Each is a blend of the image with black, with its mean grey or with its grey version, clipped to
    0..255 and rounded down to whole levels, as Pillow's ``ImageEnhance`` and torchvision's uint8
    operations do.

    Args:
        images: uint8 [B, H, W, 3].
        alphas: uint8 [B, H, W], passed through.
        parameters: ``kinds`` and ``factors`` are used.

    Returns:
        float32 [B, H, W, 3] of whole numbers in 0..255, and float32 [B, H, W].
    """
    levels = images.float()
    for step in range(3):
        kind = parameters.kinds[:, step, None, None, None]
        factor = parameters.factors[:, step, None, None, None]
        grey = _grey(levels)
        # Up to 256×256 pixels the sum is below 2^24, so float32 holds it exactly.
        mean = (grey.mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
        # Without a branch: samples of one batch have their operations in different orders.
        base = torch.where(kind == SATURATION, grey, mean) * (kind != BRIGHTNESS)
        levels = torch.addcmul(base, levels - base, factor).clamp_(0, 255).floor_()
    return levels, alphas.float()


def warp(
    levels: torch.Tensor, mattes: torch.Tensor, theta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zoom, rotate and shift about the centre, bilinear, with the edge continued outside.

    Args:
        levels: float32 [B, 3, H, W].
        mattes: float32 [B, 1, H, W], moved by the same grid.
        theta: float32 [B, 2, 3], of :func:`affine`.
    """
    grid = F.affine_grid(theta, list(levels.shape), align_corners=False)
    # One grid for both: image and matte must not move apart by a rounding.
    both = torch.cat([levels, mattes], dim=1)
    moved = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved[:, :3], moved[:, 3:].clamp(0, 1)


def new_background(
    levels: torch.Tensor, mattes: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Composite the chosen people onto the previous image, its own person painted over.

    The first image's background comes from the last one.

    Args:
        levels: float32 [B, 3, H, W].
        mattes: float32 [B, 1, H, W] in [0, 1].
        chosen: bool [B].
    """
    # The neighbour in the batch: no image has to be read for a background.
    behind = without_person(levels, mattes).roll(1, dims=0)
    opacity = torch.where(chosen[:, None, None, None], mattes, torch.ones_like(mattes))
    return levels * opacity + behind * (1 - opacity)


def without_person(levels: torch.Tensor, mattes: torch.Tensor) -> torch.Tensor:
    """Paint over the person with the background's mean colour around it, from coarse to fine.

    Args:
        levels: float32 [B, 3, H, W].
        mattes: float32 [B, 1, H, W] in [0, 1].
    """
    free = (1 - mattes).clamp(0, 1)
    # Soft edges carry the person's colours.
    free = torch.where(free > 0.98, free, torch.zeros_like(free))
    visible = levels * free
    fill = _weighted_mean(visible, free, (1, 1), levels.mean(dim=(2, 3), keepdim=True))
    for cells in (4, 16):
        if min(levels.shape[-2:]) >= cells:
            fill = F.interpolate(fill, (cells, cells), mode="bilinear", align_corners=False)
            fill = _weighted_mean(visible, free, (cells, cells), fill)
    fill = F.interpolate(fill, levels.shape[-2:], mode="bilinear", align_corners=False)
    return visible + fill * (1 - free)


def _weighted_mean(
    visible: torch.Tensor, free: torch.Tensor, cells: tuple[int, int], coarser: torch.Tensor
) -> torch.Tensor:
    """Average the visible pixels of each cell, leaning on the coarser level where there are few."""
    weight = F.adaptive_avg_pool2d(free, cells)
    return (F.adaptive_avg_pool2d(visible, cells) + 0.02 * coarser) / (weight + 0.02)


def _grey(levels: torch.Tensor) -> torch.Tensor:
    """Return Pillow's luma of whole levels, float32 [B, H, W, 1], rounded to whole levels."""
    red, green, blue = levels.unbind(-1)
    luma = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    return ((luma + 32768) / 65536).floor()[..., None]


@functools.cache
def _opencv() -> Any:
    """Return OpenCV, or None where it is not installed."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def flip_and_colours_by_opencv(
    images: torch.Tensor, alphas: torch.Tensor, parameters: Parameters, normalised: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip, change colours, and normalise if asked, image after image on the calling thread.

    OpenCV's 8-bit operations are some ten times as fast as torch's on a CPU. They run on one
    thread: steps of 10 to 60 µs on several threads wait for each other longer than they run, and
    the loader's decoders keep the other cores busy meanwhile (1,260 images/s with threads, 1,700 to
    2,300 without).

    Args:
        images: uint8 [B, H, W, 3].
        alphas: uint8 [B, H, W].
        parameters: of the samples.
        normalised: normalise too.

    Returns:
        float32 [B, H, W, 3], levels of 0..255 unless normalised, and float32 [B, H, W] in [0, 1].
    """
    cv2 = _opencv()
    count, height, width, _ = images.shape
    levels = torch.empty((count, height, width, 3), dtype=torch.float32)
    mattes = torch.empty((count, height, width), dtype=torch.float32)
    # zip over arrays yields views: each image is written straight into its row of the batch.
    given = zip(images.numpy(), alphas.numpy(), strict=True)
    for row, ((image, alpha), finished, matte) in enumerate(
        zip(given, levels.numpy(), mattes.numpy(), strict=True)
    ):
        if parameters.flip[row]:
            image, alpha = cv2.flip(image, 1), cv2.flip(alpha, 1)
        order, factors = parameters.order[row], parameters.factors[row]
        np.copyto(finished, colours_of_one(image, order, factors, scratch=finished))
        if normalised:
            cv2.transform(finished, NORMALISER, dst=finished)
        np.multiply(alpha, np.float32(1 / 255), out=matte)
    return levels, mattes


def colours_of_one(
    image: NDArray[np.uint8],
    order: NDArray[np.int64],
    factors: NDArray[np.float64],
    scratch: NDArray[np.float32],
) -> NDArray[np.uint8]:
    """Change the colours of one image by OpenCV, within one level of Pillow's.

    All steps but the last give Pillow's levels exactly, for the next step would enlarge a
    difference.

    Args:
        image: uint8 [H, W, 3]; it is left alone.
        order: [3], the operations as they are applied.
        factors: [3], of brightness, contrast and saturation.
        scratch: float32 [H, W, 3], overwritten.
    """
    cv2 = _opencv()
    for step, kind in enumerate(order):
        factor = float(factors[kind])
        # OpenCV's grey of bytes is one level off at 0.1 % of the pixels. In the last step that is
        # one level at most, unless the step strengthens the difference.
        exact = step < 2 or abs(1 - factor) > 1
        if kind == BRIGHTNESS:
            image = _blended(image, 0.0, factor)
        elif kind == CONTRAST:
            grey = _exact_grey(image, scratch) if exact else _grey_of_bytes(image)
            image = _blended(image, math.floor(cv2.mean(grey)[0] + 0.5), factor)
        else:
            image = _saturated(image, factor, exact, scratch)
    return image


DOWN = -0.4999
"""OpenCV rounds to the nearest level, Pillow down. A fraction above 0.9999 is rounded up all the
same, and the error of float32 grows with the factor. So where a level, or a difference of levels,
comes near that (in 1 of 20 images), or the factor is above 2, a slower and exact way is taken."""
RISKY = 0.9998
LEVELS = np.arange(256, dtype=np.float32)
DIFFERENCES = np.arange(-255, 256, dtype=np.float32)


def _risky(levels: NDArray[np.float32]) -> bool:
    return bool((levels - np.floor(levels)).max() > RISKY)


def _blended(image: NDArray[np.uint8], base: float, factor: float) -> NDArray[np.uint8]:
    """Blend with one grey level: base + factor · (level - base), clipped, rounded down."""
    cv2, strength = _opencv(), np.float32(factor)
    table = np.float32(base) + strength * (LEVELS - np.float32(base))
    if factor > 2 or _risky(table):
        blended: NDArray[np.uint8] = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))
        return blended
    # addWeighted clips at 0, convertScaleAbs would mirror negative levels; brightness has none.
    return np.asarray(
        cv2.convertScaleAbs(image, alpha=factor, beta=DOWN)
        if base == 0
        else cv2.addWeighted(image, factor, image, 0, (1 - factor) * base + DOWN)
    )


def _saturated(
    image: NDArray[np.uint8], factor: float, exact: bool, scratch: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Blend with the grey version: grey + factor · (level - grey), clipped, rounded down.

    Args:
        image: uint8 [H, W, 3].
        factor: 0 gives grey, 1 the image.
        exact: use Pillow's grey, not OpenCV's of bytes.
        scratch: float32 [H, W, 3], overwritten.
    """
    cv2, strength = _opencv(), np.float32(factor)
    if not exact:
        grey = cv2.cvtColor(_grey_of_bytes(image), cv2.COLOR_GRAY2RGB)
        return np.asarray(cv2.addWeighted(image, factor, grey, 1 - factor, DOWN))
    grey = _exact_grey(image, scratch)
    if factor <= 2 and not _risky(strength * DIFFERENCES):
        grey = cv2.cvtColor(grey.astype(np.uint8), cv2.COLOR_GRAY2RGB)
        return np.asarray(cv2.addWeighted(image, factor, grey, 1 - factor, DOWN))
    grey = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    levels = np.subtract(scratch, grey, out=scratch)  # scratch holds the image
    levels *= strength  # two operations: a fused one would round otherwise than Pillow
    levels += grey
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


def _grey_of_bytes(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cv2 = _opencv()
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def _exact_grey(image: NDArray[np.uint8], scratch: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return Pillow's luma, float32 [H, W] of whole levels; ``scratch`` holds the image then.

    In float32, for which OpenCV is three times as fast as for bytes.
    """
    np.copyto(scratch, image)
    grey: NDArray[np.float32] = _opencv().transform(scratch, LUMA_ROUNDED)
    return np.floor(grey, out=grey)
