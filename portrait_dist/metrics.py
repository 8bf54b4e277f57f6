"""Metrics of soft masks: pure functions of a batch, and thin torchmetrics classes that add them up.

Every state is a sum over samples or pixels, so a value over several ranks is that of one process
over all samples, whatever the batches: pixel counts are int64 and exact, sums of per-sample scores
are float64. ``update`` never waits for the GPU.

Predictions are probabilities (alpha) in [0, 1], targets soft mattes in [0, 1], both [B, 1, H, W] or
[B, H, W]. Where a score needs a binary mask, foreground is above 0.5.
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
"""Width of the boundary region as a fraction of the image's diagonal (Cheng et al. 2021)."""
GRADIENT_SIGMA = 1.4
"""Standard deviation in pixels of the Gaussian of the gradient error (Rhemann et al. 2009)."""


def _planes(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 [B, H, W]."""
    one_channel = preds.ndim == 3 or (preds.ndim == 4 and preds.shape[1] == 1)
    if preds.shape != target.shape or not one_channel:
        raise ValueError(
            f"predictions {tuple(preds.shape)} and targets {tuple(target.shape)} must both be "
            "[B, 1, H, W] or [B, H, W]"
        )
    # Detached and float32: scores must not depend on autocast, nor keep the graph alive.
    planes = (-1, *preds.shape[-2:])
    return preds.detach().float().reshape(planes), target.detach().float().reshape(planes)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """float64 part / whole, and 1 where the whole is 0: nothing was there and nothing was found."""
    return torch.where(whole > 0, part.double() / whole.clamp(min=1).double(), 1.0)


def intersection_and_union(foreground: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Count the pixels in both masks and in either, for each sample.

    Args:
        foreground: predicted mask, bool [B, H, W].
        truth: true mask, bool [B, H, W].

    Returns:
        int64 [B] each.
    """
    return (foreground & truth).sum((1, 2)), (foreground | truth).sum((1, 2))


def sample_iou(preds: Tensor, target: Tensor, threshold: float = 0.5) -> Tensor:
    """Compute the foreground IoU of each sample, float64 [B]; 1 where neither has foreground."""
    preds, target = _planes(preds, target)
    return _ratio(*intersection_and_union(preds > threshold, target > 0.5))


def mean_absolute_error(preds: Tensor, target: Tensor) -> Tensor:
    """Compute the mean over the pixels of |alpha - matte|, float64 [B]."""
    preds, target = _planes(preds, target)
    return (preds - target).abs().mean((1, 2), dtype=torch.float64)


def mean_squared_error(preds: Tensor, target: Tensor) -> Tensor:
    """Compute the mean over the pixels of (alpha - matte)², float64 [B]."""
    preds, target = _planes(preds, target)
    return (preds - target).square().mean((1, 2), dtype=torch.float64)


def boundary(mask: Tensor, width: int) -> Tensor:
    """Find the foreground pixels near the background; outside of the image is background.

    Args:
        mask: bool [B, H, W].
        width: in pixels of chessboard distance.

    Returns:
        bool [B, H, W].
    """
    background = F.pad((~mask).float().unsqueeze(1), (width,) * 4, value=1.0)
    # Dilation by a square, one axis at a time: 2 (2w + 1) comparisons a pixel instead of (2w + 1)².
    side = 2 * width + 1
    near = F.max_pool2d(F.max_pool2d(background, (side, 1), stride=1), (1, side), stride=1)
    return mask & (near.squeeze(1) > 0)


def boundary_iou(preds: Tensor, target: Tensor, ratio: float = BOUNDARY_RATIO) -> Tensor:
    """Compute the IoU of the masks' inner boundary regions, float64 [B]; 1 where neither has one.

    Args:
        preds: probabilities, [B, 1, H, W] or [B, H, W].
        target: mattes, likewise.
        ratio: width of the region as a fraction of the image's diagonal; at least one pixel wide.

    Reference:
        Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR
        2021.
    """
    preds, target = _planes(preds, target)
    width = max(1, round(ratio * math.hypot(*preds.shape[1:])))
    return _ratio(
        *intersection_and_union(boundary(preds > 0.5, width), boundary(target > 0.5, width))
    )


@cache
def gaussian_derivative(sigma: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute a Gaussian and its derivative; their outer product has an L2 norm of 1.

    Both are cut where the Gaussian falls below 1 %, as in Rhemann's code.
    """
    radius = math.ceil(sigma * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * sigma * 0.01)))
    smooth = [math.exp(-(x**2) / (2 * sigma**2)) for x in range(-radius, radius + 1)]
    slope = [-x * value for x, value in zip(range(-radius, radius + 1), smooth, strict=True)]
    return (
        tuple(v / math.hypot(*smooth) for v in smooth),
        tuple(v / math.hypot(*slope) for v in slope),
    )


def gradient_magnitude(alpha: Tensor, sigma: float = GRADIENT_SIGMA) -> Tensor:
    """Compute the length of alpha's gradient under Gaussian derivative filters; edges are repeated.

    Args:
        alpha: float32 [B, H, W].
        sigma: of the Gaussian, in pixels.
    """
    smooth, slope = (alpha.new_tensor(kernel) for kernel in gaussian_derivative(sigma))
    radius = len(smooth) // 2
    padded = F.pad(alpha.unsqueeze(1), (radius,) * 4, mode="replicate")

    def filtered(vertical: Tensor, horizontal: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(padded, vertical.view(1, 1, -1, 1)), horizontal.view(1, 1, 1, -1))

    return torch.hypot(filtered(smooth, slope), filtered(slope, smooth)).squeeze(1)


def gradient_error(preds: Tensor, target: Tensor) -> Tensor:
    """Sum the squared differences of the gradients' lengths over the pixels, in thousands.

    float64 [B]. There is no trimap here: the sum runs over the whole image, so it grows with the
    resolution. Matting tables print it in thousands too.

    Reference:
        Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting", CVPR 2009.
    """
    preds, target = _planes(preds, target)
    # Convolutions in bfloat16 would drown the differences that are measured.
    with torch.autocast(preds.device.type, enabled=False):
        difference = gradient_magnitude(preds) - gradient_magnitude(target)
    return difference.square().sum((1, 2), dtype=torch.float64) / 1000


SCORES = {
    "iou": sample_iou,
    "mae": mean_absolute_error,
    "mse": mean_squared_error,
    "boundary_iou": boundary_iou,
    "gradient_error": gradient_error,
}
"""Name → function of (preds, target) that gives one float64 value for each sample."""


def per_sample(preds: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Compute every score of every sample.

    Args:
        preds: probabilities in [0, 1], [B, 1, H, W] or [B, H, W].
        target: mattes in [0, 1], likewise.

    Returns:
        ``iou``, ``mae``, ``mse``, ``boundary_iou``, ``gradient_error``: float64 [B] each.
    """
    return {name: score(preds, target) for name, score in SCORES.items()}


class SoftIoU(Metric):
    """Foreground IoU over all pixels of all samples. The tutorial's metric, under its name.

    Despite the name it is a *hard* IoU: the soft prediction and the soft target are cut at 0.5. The
    differentiable one is :func:`portrait_dist.losses.soft_iou`.

    Args:
        num_classes: 2; there for the tutorial's call ``SoftIoU(num_classes=2)``.
        threshold: a pixel is foreground where its probability is above this.
        kwargs: of ``torchmetrics.Metric``.

    ``compute`` gives a float64 scalar, 1 where nothing was foreground in either.
    """

    is_differentiable = False
    higher_is_better = True
    greater_is_better = True  # SuperGradients' name for it
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
        """Add a batch."""
        preds, target = _planes(preds, target)
        intersection, union = intersection_and_union(preds > self.threshold, target > 0.5)
        self.intersection += intersection.sum()
        self.union += union.sum()

    def compute(self) -> Tensor:
        """Divide the two sums."""
        return _ratio(self.intersection, self.union)


class AlphaScores(Metric):
    """Means of per-sample scores; a trainer of SuperGradients can watch any of them by its name.

    Args:
        names: keys of ``SCORES``; all of them when not given.
        kwargs: of ``torchmetrics.Metric``.

    ``compute`` gives {name: float64 scalar}; NaN where no sample was seen.
    """

    is_differentiable = False
    full_state_update = False

    sums: Tensor
    samples: Tensor

    def __init__(self, names: tuple[str, ...] = tuple(SCORES), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The names by which SuperGradients knows metrics with several values.
        self.component_names = list(names)
        self.greater_component_is_better = {name: name.endswith("iou") for name in names}
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        values = torch.stack([SCORES[name](preds, target) for name in self.component_names])
        self.sums += values.sum(1)
        self.samples += values.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """Divide the sums by the number of samples."""
        means = self.sums / self.samples
        return dict(zip(self.component_names, means.unbind(), strict=True))


class PrecisionRecall(Metric):
    """Precision and recall of the foreground over thresholds, pixels pooled over all samples.

    Not torchmetrics' ``BinaryPrecisionRecallCurve(thresholds=101)``, which compares every pixel
    with every threshold: for 4 images of 256×256 it takes 58 ms of a core (51 to 73), this class 16
    (14 to 30).

    Args:
        thresholds: how many, evenly spaced over [0, 1], both ends included. A pixel is foreground
            above the threshold.
        kwargs: of ``torchmetrics.Metric``.

    ``compute`` gives ``thresholds``, ``precision``, ``recall`` and ``iou``, float64 [thresholds]
    each. Precision is 1 where nothing is predicted, recall 1 where nothing is there.
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
        # counts[t, i]: pixels of truth t (0 background, 1 foreground) above exactly i thresholds.
        self.add_state(
            "counts", torch.zeros(2, thresholds + 1, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        preds, target = _planes(preds, target)
        bins = self.counts.shape[1]
        cell = torch.bucketize(preds.contiguous(), self.edges) + bins * (target > 0.5)
        # Not bincount: on a GPU that one waits for the largest value.
        flat = cell.flatten()
        counts = torch.zeros(2 * bins, dtype=torch.int64, device=flat.device)
        # Integers: sums are exact, whatever the order of batches and ranks.
        self.counts += counts.scatter_add_(0, flat, torch.ones_like(flat)).view(2, bins)

    def compute(self) -> dict[str, Tensor]:
        """Turn the histograms into a curve."""
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
