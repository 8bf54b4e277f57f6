"""Losses for soft masks: cross-entropy plus an IoU term, as pure functions under thin modules.

:class:`CustomSegLoss` is the loss of SuperGradients' tutorial, whose IoU term has no gradient.
:class:`SoftIoULoss` has a differentiable IoU term that is right for soft targets, works from
logits, and stays in float32 inside autocast.

Cross-entropy is the mean over all pixels of the batch. ``SoftIoULoss`` averages one IoU per sample,
so its value and gradient over a global batch are the sample-weighted means over any split of that
batch (ranks, accumulation). The tutorial's IoU term pools the pixels of the batch, so it depends on
which samples share a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def binary_iou(preds: Tensor, target: Tensor, threshold: float = 0.5) -> Tensor:
    """Compute the foreground IoU of thresholded batches as the tutorial does, without a gradient.

    Args:
        preds: any shape; foreground is ``preds > threshold``.
        target: same shape; foreground is ``target > 0.5``.
        threshold: 0.5 for probabilities, 0 for logits.

    Returns:
        Scalar intersection / (union + 1e-5) of all pixels of the batch, so 0 where both are empty.
    """
    foreground, truth = preds > threshold, target > 0.5
    intersection = (foreground & truth).sum()
    return intersection / (foreground.sum() + truth.sum() - intersection + 1e-5)


def soft_iou(probabilities: Tensor, target: Tensor) -> Tensor:
    """Compute a differentiable IoU of soft masks, one for each sample.

    It is sum(min(p, t)) / sum(max(p, t)) over the sample's pixels. For targets of 0 and 1 that is
    the usual soft Jaccard index sum(p·t) / sum(p + t - p·t); for soft targets it is, unlike that
    one, largest at p = t.

    Args:
        probabilities: [B, ...], values in [0, 1].
        target: same shape, values in [0, 1].

    Returns:
        [B]; 1 where both are empty.

    Reference:
        Wang et al., "Jaccard Metric Losses: Optimizing the Jaccard Index with Soft Labels", NeurIPS
        2023.
    """
    intersection = torch.minimum(probabilities, target).flatten(1).sum(1)
    union = torch.maximum(probabilities, target).flatten(1).sum(1)
    smallest = torch.finfo(union.dtype).eps  # 1 where both are empty, and a finite gradient
    return (intersection + smallest) / (union + smallest)


class _WeightedLoss(nn.Module):
    """Base: ``bce_weight`` × cross-entropy + ``iou_weight`` × (1 - IoU)."""

    term_names = ("bce", "iou")
    takes_logits = False
    """Whether ``forward`` wants the network's output before the sigmoid."""

    def __init__(self, bce_weight: float = 1.0, iou_weight: float = 1.0) -> None:
        super().__init__()
        self.bce_weight, self.iou_weight = bce_weight, iou_weight

    def components(self, preds: Tensor, target: Tensor) -> Tensor:
        """Compute both terms, unweighted, in the order of ``term_names``: float32 [2]."""
        with torch.autocast(preds.device.type, enabled=False):
            return torch.stack(self._terms(preds.float(), target.float()))

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Compute the weighted sum, a float32 scalar.

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

    The IoU term is computed on thresholded masks and has no gradient: it changes the value, never
    the weights.

    Args:
        bce_weight: weight of the cross-entropy.
        iou_weight: weight of 1 - IoU.
        from_logits: take logits instead of probabilities; the same value, stable in low precision.
    """

    def __init__(
        self, bce_weight: float = 1.0, iou_weight: float = 1.0, from_logits: bool = False
    ) -> None:
        super().__init__(bce_weight, iou_weight)
        self.takes_logits = from_logits

    def _terms(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.takes_logits:
            bce = F.binary_cross_entropy_with_logits(preds, target)
            return bce, 1 - binary_iou(preds, target, threshold=0.0)
        return F.binary_cross_entropy(preds, target), 1 - binary_iou(preds, target)


class SoftIoULoss(_WeightedLoss):
    """Cross-entropy plus 1 - soft IoU (mean over the samples), from logits.

    Args:
        bce_weight: weight of the cross-entropy.
        iou_weight: weight of 1 - soft IoU.
    """

    takes_logits = True

    def _terms(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        bce = F.binary_cross_entropy_with_logits(preds, target)
        return bce, 1 - soft_iou(torch.sigmoid(preds), target).mean()
