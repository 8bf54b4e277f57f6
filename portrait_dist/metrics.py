"""Metrics of soft masks: pure functions of a batch, and thin ``torchmetrics.Metric`` classes that add them up.

Every state is a sum over samples or pixels, so a value over several ranks is that of one process over all samples, whatever
the batches: pixel counts are int64 and exact, sums of per-sample figures are float64. ``update`` never waits for the GPU.

Predictions are probabilities (alpha) in [0, 1], targets soft mattes in [0, 1], both [B, 1, H, W] or [B, H, W]. Where a figure
needs a yes-or-no mask, foreground is above 0.5.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

BOUNDARY_RATIO = 0.02
"""Width of the boundary region as a share of the picture's diagonal (Cheng et al. 2021)."""
GRADIENT_SIGMA = 1.4
"""Standard deviation in pixels of the Gaussian whose derivatives make the gradient error (Rhemann et al. 2009)."""


def _planes(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 [B, H, W]."""
    if (
        preds.shape != target.shape
        or preds.ndim not in (3, 4)
        or (preds.ndim == 4 and preds.shape[1] != 1)
    ):
        raise ValueError(
            f"predictions {tuple(preds.shape)} and targets {tuple(target.shape)} must both be [B, 1, H, W] or [B, H, W]"
        )
    height, width = preds.shape[-2:]
    return preds.detach().float().reshape(-1, height, width), target.detach().float().reshape(
        -1, height, width
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """float64 part / whole, and 1 where the whole is 0: nothing was there and nothing was found."""
    return torch.where(whole > 0, part.double() / whole.clamp(min=1).double(), 1.0)


def intersection_and_union(foreground: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in both and pixels in either, for each sample.

    Args:
        foreground, truth: bool [B, H, W].

    Returns:
        int64 [B] each.
    """
    return (foreground & truth).sum((1, 2)), (foreground | truth).sum((1, 2))


def sample_iou(preds: Tensor, target: Tensor, threshold: float = 0.5) -> Tensor:
    """Foreground IoU of each sample, float64 [B]; 1 where neither has foreground."""
    preds, target = _planes(preds, target)
    return _ratio(*intersection_and_union(preds > threshold, target > 0.5))


def mean_absolute_error(preds: Tensor, target: Tensor) -> Tensor:
    """Mean over the pixels of |alpha - matte|, float64 [B]."""
    preds, target = _planes(preds, target)
    return (preds - target).abs().mean((1, 2), dtype=torch.float64)


def mean_squared_error(preds: Tensor, target: Tensor) -> Tensor:
    """Mean over the pixels of (alpha - matte)², float64 [B]."""
    preds, target = _planes(preds, target)
    return (preds - target).square().mean((1, 2), dtype=torch.float64)


def boundary(mask: Tensor, width: int) -> Tensor:
    """Foreground pixels within ``width`` pixels (chessboard distance) of the background; outside the picture is background.

    Args:
        mask: bool [B, H, W].
    """
    background = F.pad((~mask).float().unsqueeze(1), (width,) * 4, value=1.0)
    # Dilation by a square, one axis at a time.
    near = F.max_pool2d(
        F.max_pool2d(background, (2 * width + 1, 1), stride=1), (1, 2 * width + 1), stride=1
    )
    return mask & (near.squeeze(1) > 0)


def boundary_iou(preds: Tensor, target: Tensor, ratio: float = BOUNDARY_RATIO) -> Tensor:
    """IoU of the two masks' inner boundary regions, float64 [B]; 1 where neither has one.

    Args:
        ratio: width of the region as a share of the picture's diagonal; at least one pixel wide.

    Reference:
        Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021.
    """
    preds, target = _planes(preds, target)
    width = max(1, round(ratio * math.hypot(*preds.shape[1:])))
    return _ratio(
        *intersection_and_union(boundary(preds > 0.5, width), boundary(target > 0.5, width))
    )


@cache
def gaussian_derivative(sigma: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A Gaussian and its derivative, cut where the Gaussian falls below 1 %; their outer product has an L2 norm of 1."""
    radius = math.ceil(sigma * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * sigma * 0.01)))
    smooth = [math.exp(-(x**2) / (2 * sigma**2)) for x in range(-radius, radius + 1)]
    slope = [-x * value for x, value in zip(range(-radius, radius + 1), smooth, strict=True)]
    return tuple(v / math.hypot(*smooth) for v in smooth), tuple(
        v / math.hypot(*slope) for v in slope
    )


def gradient_magnitude(alpha: Tensor, sigma: float = GRADIENT_SIGMA) -> Tensor:
    """Length of the gradient of alpha under first-order Gaussian derivative filters, [B, H, W]; edges are repeated."""
    smooth, slope = (alpha.new_tensor(kernel) for kernel in gaussian_derivative(sigma))
    radius = len(smooth) // 2
    padded = F.pad(alpha.unsqueeze(1), (radius,) * 4, mode="replicate")

    def filtered(vertical: Tensor, horizontal: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(padded, vertical.view(1, 1, -1, 1)), horizontal.view(1, 1, 1, -1))

    return torch.hypot(filtered(smooth, slope), filtered(slope, smooth)).squeeze(1)


def gradient_error(preds: Tensor, target: Tensor) -> Tensor:
    """Sum over the pixels of the squared difference of the gradients' lengths, divided by 1000 as matting tables print it.

    float64 [B]. There is no trimap here: the sum runs over the whole picture, so it grows with the resolution.

    Reference:
        Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting", CVPR 2009.
    """
    preds, target = _planes(preds, target)
    with torch.autocast(preds.device.type, enabled=False):
        difference = gradient_magnitude(preds) - gradient_magnitude(target)
    return difference.square().sum((1, 2), dtype=torch.float64) / 1000


FIGURES = {
    "iou": sample_iou,
    "mae": mean_absolute_error,
    "mse": mean_squared_error,
    "boundary_iou": boundary_iou,
    "gradient_error": gradient_error,
}
"""Name → function of (preds, target) that gives one float64 value for each sample."""


def per_sample(preds: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Every figure of every sample.

    Args:
        preds, target: [B, 1, H, W] or [B, H, W], values in [0, 1].

    Returns:
        ``iou``, ``mae``, ``mse``, ``boundary_iou``, ``gradient_error``: float64 [B] each.
    """
    return {name: figure(preds, target) for name, figure in FIGURES.items()}


class SoftIoU(Metric):
    """Foreground IoU over all pixels of all samples; the soft target is cut at 0.5. The tutorial's metric.

    Args:
        num_classes: 2; there for the tutorial's call ``SoftIoU(num_classes=2)``.
        threshold: a pixel is foreground where its probability is above this.

    ``compute`` gives a float64 scalar, 1 where nothing was foreground in either.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    intersection: Tensor
    union: Tensor

    def __init__(self, num_classes: int = 2, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes != 2:
            raise ValueError(f"num_classes is 2, background and foreground, not {num_classes}")
        self.threshold = threshold
        self.add_state("intersection", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("union", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        preds, target = _planes(preds, target)
        intersection, union = intersection_and_union(preds > self.threshold, target > 0.5)
        self.intersection += intersection.sum()
        self.union += union.sum()

    def compute(self) -> Tensor:
        return _ratio(self.intersection, self.union)


class AlphaFigures(Metric):
    """Mean over the samples of per-sample figures.

    Args:
        names: keys of ``FIGURES``; all of them when not given.

    ``compute`` gives {name: float64 scalar}; NaN where no sample was seen. ``latest`` holds the figures of the samples of the
    last batch, float64 [B] each, so that a table of every sample costs nothing more.
    """

    is_differentiable = False
    full_state_update = False

    sums: Tensor
    samples: Tensor

    def __init__(self, names: tuple[str, ...] = tuple(FIGURES), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = names
        self.latest: dict[str, Tensor] = {}
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.latest = {name: FIGURES[name](preds, target) for name in self.names}
        values = torch.stack([self.latest[name] for name in self.names])
        self.sums += values.sum(1)
        self.samples += values.shape[1]

    def compute(self) -> dict[str, Tensor]:
        means = self.sums / self.samples
        return {name: means[i] for i, name in enumerate(self.names)}


class _SampleMean(AlphaFigures):
    """One figure, as a metric with a scalar value, for a trainer that watches it."""

    figure: str

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(names=(self.figure,), **kwargs)

    def compute(self) -> Tensor:  # type: ignore[override]
        return super().compute()[self.figure]


class MeanIoU(_SampleMean):
    """Foreground IoU of each sample, averaged over the samples."""

    figure = "iou"
    higher_is_better = True


class AlphaMAE(_SampleMean):
    """Mean absolute error of alpha."""

    figure = "mae"
    higher_is_better = False


class AlphaMSE(_SampleMean):
    """Mean squared error of alpha."""

    figure = "mse"
    higher_is_better = False


class BoundaryIoU(_SampleMean):
    """IoU of the masks' boundary regions, averaged over the samples; see :func:`boundary_iou`."""

    figure = "boundary_iou"
    higher_is_better = True


class GradientError(_SampleMean):
    """Gradient error of alpha, averaged over the samples; see :func:`gradient_error`."""

    figure = "gradient_error"
    higher_is_better = False


class PrecisionRecall(Metric):
    """Precision and recall of the foreground over a range of thresholds, pixels pooled over all samples.

    Args:
        thresholds: how many, evenly spaced over [0, 1], both ends included. A pixel is foreground above the threshold.

    ``compute`` gives ``thresholds``, ``precision``, ``recall`` and ``iou``, float64 [thresholds] each. Precision is 1 where
    nothing is predicted, recall 1 where nothing is there.
    """

    is_differentiable = False
    full_state_update = False

    edges: Tensor
    counts: Tensor

    def __init__(self, thresholds: int = 101, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer(
            "edges", torch.linspace(0, 1, thresholds, dtype=torch.float64).float(), persistent=False
        )
        # counts[t, i]: pixels of truth t (0 background, 1 foreground) that are above exactly i of the thresholds.
        self.add_state(
            "counts", torch.zeros(2, thresholds + 1, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, preds: Tensor, target: Tensor) -> None:
        preds, target = _planes(preds, target)
        bins = self.counts.shape[1]
        place = torch.bucketize(preds.contiguous(), self.edges) + bins * (target > 0.5)
        # Not bincount: on a GPU that one waits for the largest value.
        flat = place.flatten()
        self.counts += (
            torch.zeros(2 * bins, dtype=torch.int64, device=flat.device)
            .scatter_add_(0, flat, torch.ones_like(flat))
            .view(2, bins)
        )

    def compute(self) -> dict[str, Tensor]:
        # Pixels above threshold k are those above more than k thresholds.
        above = self.counts.flip(1).cumsum(1).flip(1)[:, 1:]
        false_positives, true_positives = above.unbind()
        positives = self.counts[1].sum()
        return {
            "thresholds": self.edges.double(),
            "precision": _ratio(true_positives, true_positives + false_positives),
            "recall": _ratio(true_positives, positives.expand_as(true_positives)),
            "iou": _ratio(true_positives, positives + false_positives),
        }
