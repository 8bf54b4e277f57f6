"""Bases of SuperGradients' IoU, Dice and Accuracy metrics, as torchmetrics 0.8 had them.

Today's ``JaccardIndex`` and ``Accuracy`` want a ``task`` and give another class. These two have the
constructor, the attributes and the definitions that SuperGradients' subclasses were written for.
``update`` never waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import reduce


class _Base(Metric):
    """A base that a class can be given in place of its own one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Ignore the arguments, which a class whose bases were exchanged still hands on."""
        return super().__new__(cls)


class ConfusionMatrixMetric(_Base):
    """Jaccard index of classes from a confusion matrix, pixels pooled over all samples.

    Args:
        num_classes: number of classes, 2 for a binary mask.
        ignore_index: a class whose target pixels do not count, and whose score is left out. Pixels
            with this value do not count either where it is outside of [0, num_classes).
        absent_score: score of a class that is neither predicted nor there.
        threshold: a binary prediction is foreground from this probability on.
        reduction: ``elementwise_mean``, ``sum`` or ``none``, over the classes.
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    confmat: Tensor
    outside: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = None,
        absent_score: float = 0.0,
        threshold: float = 0.5,
        reduction: str = "elementwise_mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.absent_score, self.threshold, self.reduction = absent_score, threshold, reduction
        counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confmat", counts, dist_reduce_fx="sum")
        self.add_state("outside", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: classes, int [B, …]; probabilities of the classes, float [B, C, …]; or of the
                foreground, float [B, …] or [B, 1, …].
            target: classes, int [B, …] or [B, 1, …].
        """
        preds, target = self._classes(preds.detach()).flatten(), target.flatten()
        if preds.shape != target.shape:
            raise ValueError(
                f"{len(preds)} predicted pixels do not fit {len(target)} target pixels"
            )
        classes = self.num_classes
        inside = (target >= 0) & (target < classes) & (preds >= 0) & (preds < classes)
        if self.ignore_index is not None and not 0 <= self.ignore_index < classes:
            counted = target != self.ignore_index
        else:
            counted = torch.ones_like(inside)
        # One more bin takes what does not count. Not bincount: on a GPU that one waits for the
        # largest value.
        cell = torch.where(inside & counted, target.long() * classes + preds.long(), classes**2)
        bins = torch.zeros(classes**2 + 1, dtype=torch.int64, device=cell.device)
        bins.scatter_add_(0, cell, torch.ones_like(cell))
        self.confmat += bins[:-1].view(classes, classes)
        self.outside += (counted & ~inside).sum()

    def _classes(self, preds: Tensor) -> Tensor:
        if not preds.is_floating_point():
            return preds
        if self.num_classes > 2 or (preds.ndim > 1 and preds.shape[1] == self.num_classes == 2):
            return preds.argmax(1)
        return (preds >= self.threshold).long()

    def check_classes(self) -> None:
        """Raise ValueError where a pixel had a class that the metric does not have."""
        if outside := int(self.outside):
            raise ValueError(
                f"{type(self).__name__}: {outside} pixels have a class outside of 0 to "
                f"{self.num_classes - 1}; give num_classes, or the value of unlabelled pixels as "
                "ignore_index"
            )

    def compute(self) -> Any:
        """Reduce intersection / union of the classes."""
        self.check_classes()
        counts, ignored = self.confmat.clone(), self.ignore_index
        ignores = ignored is not None and 0 <= ignored < self.num_classes
        if ignores:
            counts[ignored] = 0
        intersection = counts.diag()
        union = counts.sum(0) + counts.sum(1) - intersection
        scores = intersection.float() / union.float()
        scores[union == 0] = self.absent_score
        if ignores:
            scores = scores[torch.arange(self.num_classes, device=scores.device) != ignored]
        return reduce(scores, reduction=self.reduction)  # type: ignore[arg-type]


class AccuracyMetric(_Base):
    """Fraction of right classes over all samples and positions; 0 before any."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch of classes: int, the same shape twice."""
        self.correct += (preds == target).sum()
        self.total += target.numel()

    def compute(self) -> Tensor:
        """Divide the right ones by all."""
        return self.correct.float() / self.total.clamp(min=1)
