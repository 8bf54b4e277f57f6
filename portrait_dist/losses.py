"""Losses for soft masks: binary cross-entropy plus an IoU term, as pure functions under thin modules.

Two losses: :class:`CustomSegLoss` is the SuperGradients tutorial's, whose IoU term has no gradient;
:class:`SoftIoULoss` has a differentiable IoU term that is right for soft targets and works from logits, in float32 also
inside autocast.

Sizes and averaging: cross-entropy is the mean over all pixels of the batch. ``SoftIoULoss`` averages one IoU per sample, so
its value and gradient over a global batch are the sample-weighted means over any split of that batch (ranks, accumulation).
The tutorial's IoU term pools the pixels of the batch and so depends on which samples share a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def binary_iou(preds: Tensor, target: Tensor, threshold: float = 0.5) -> Tensor:
    """Foreground IoU of two thresholded batches, pixels pooled over the batch, as in the tutorial. It has no gradient.

    Args:
        preds, target: same shape, values compared with their threshold.
        threshold: foreground is ``preds > threshold``; the target's is always 0.5.

    Returns:
        Scalar intersection / (union + 1e-5), so 0 where both are empty.
    """
    foreground, truth = preds > threshold, target > 0.5
    intersection = (foreground & truth).sum()
    return intersection / (foreground.sum() + truth.sum() - intersection + 1e-5)


def soft_iou(probabilities: Tensor, target: Tensor) -> Tensor:
    """Differentiable IoU of soft masks, one for each sample.

    sum(min(p, t)) / sum(max(p, t)) over the sample's pixels: for targets of 0 and 1 the usual soft Jaccard index
    sum(p·t) / sum(p + t - p·t), and for soft targets, unlike that one, largest at p = t.

    Args:
        probabilities, target: [B, ...], same shape, values in [0, 1].

    Returns:
        [B]; 1 where both are empty.

    Reference:
        Wang et al., "Jaccard Metric Losses: Optimizing the Jaccard Index with Soft Labels", NeurIPS 2023.
    """
    intersection = torch.minimum(probabilities, target).flatten(1).sum(1)
    union = torch.maximum(probabilities, target).flatten(1).sum(1)
    smallest = torch.finfo(union.dtype).eps
    return (intersection + smallest) / (union + smallest)


class _WeightedLoss(nn.Module):
    """``bce_weight`` × cross-entropy + ``iou_weight`` × (1 - IoU)."""

    term_names = ("bce", "iou")
    takes_logits = False
    """Does ``forward`` want the network's output before the sigmoid?"""

    def __init__(self, bce_weight: float = 1.0, iou_weight: float = 1.0) -> None:
        super().__init__()
        self.bce_weight, self.iou_weight = bce_weight, iou_weight

    def components(self, preds: Tensor, target: Tensor) -> Tensor:
        """Both terms, unweighted, in the order of ``term_names``: float32 [2]."""
        with torch.autocast(preds.device.type, enabled=False):
            return torch.stack(self._terms(preds.float(), target.float()))

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """The weighted sum, a float32 scalar.

        Args:
            preds: probabilities, or logits where ``takes_logits``; [B, 1, H, W] of any float dtype.
            target: soft masks in [0, 1], same shape.
        """
        bce, iou = self.components(preds, target).unbind()
        return self.bce_weight * bce + self.iou_weight * iou

    def _terms(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class CustomSegLoss(_WeightedLoss):
    """The tutorial's loss: cross-entropy plus 1 - IoU of the thresholded masks.

    The IoU term is computed on thresholded masks and has no gradient: it changes the value, never the weights.

    Args:
        bce_weight, iou_weight: weights of the two terms.
        from_logits: take logits instead of probabilities; the same value, stable in low precision.
    """

    def __init__(
        self, bce_weight: float = 1.0, iou_weight: float = 1.0, from_logits: bool = False
    ) -> None:
        super().__init__(bce_weight, iou_weight)
        self.takes_logits = from_logits

    def _terms(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.takes_logits:
            return F.binary_cross_entropy_with_logits(preds, target), 1 - binary_iou(
                preds, target, threshold=0.0
            )
        return F.binary_cross_entropy(preds, target), 1 - binary_iou(preds, target)


class SoftIoULoss(_WeightedLoss):
    """Cross-entropy plus 1 - soft IoU (mean over the samples), from logits."""

    takes_logits = True

    def _terms(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        bce = F.binary_cross_entropy_with_logits(preds, target)
        return bce, 1 - soft_iou(torch.sigmoid(preds), target).mean()
