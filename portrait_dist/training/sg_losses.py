"""SuperGradients' IoU, Dice and BCE-Dice losses, for the targets that segmentation loaders give.

SuperGradients' own want integer targets without a channel, fail for an ignored class other than
the one after the last, and take logits where probabilities were asked for. The functions here
follow their definitions; :mod:`portrait_dist.training.sg_adapter` puts them in place of theirs.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def structure_loss(loss: Any, predict: Tensor, target: Tensor) -> Tensor:
    """Compute an IoU or Dice loss, in place of ``AbstarctSegmentationStructureLoss.forward``.

    Args:
        loss: the loss, which says numerator and denominator and how to reduce.
        predict: logits where the loss applies a softmax, else probabilities; float [B, C, H, W].
        target: masks, [B, C, H, W], soft or not; or classes, [B, H, W] or [B, 1, H, W], of any
            dtype. With one predicted channel the latter are masks, soft or not.

    Returns:
        A scalar; without reduction [C], or [B] with ``reduce_over_batches``.

    Raises:
        ValueError: the shapes do not fit, or the reduction is unknown.
    """
    if loss.apply_softmax:
        predict = torch.softmax(predict, dim=1)
    labels, counted = one_hot_labels(predict, target, loss.ignore_index)
    numerator, denominator = loss._calc_numerator_denominator(labels, predict)
    if counted is not None:
        numerator, denominator = numerator * counted, denominator * counted
    over = [1 if loss.reduce_over_batches else 0, *range(2, predict.ndim)]
    numerator, denominator = numerator.sum(over), denominator.sum(over)
    if loss.generalized_metric:
        scale = labels.sum(over).square().reciprocal()
        scale = torch.where(scale.isinf(), 0.0, scale)  # a class that is not there
        numerator, denominator = numerator * scale, denominator * scale
    values = loss._calc_loss(numerator, denominator)
    if loss.weight is not None:
        values = values * loss.weight.to(values)
    return _reduced(values, loss.reduction)


def one_hot_labels(
    predict: Tensor, target: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return targets in the shape of the predictions, and which of them count.

    Args:
        predict: [B, C, H, W].
        target: see :func:`structure_loss`.
        ignore_index: value of the pixels that do not count. Below C it is, as in SuperGradients, a
            class that the network does not predict: the C others keep their order.

    Returns:
        Labels, float [B, C, H, W]; and a mask that broadcasts with them, None where all count.
    """
    channels = predict.shape[1]
    target = _with_channels(predict, target)
    counted = None if ignore_index is None else target != ignore_index
    if target.shape[1] == channels:
        labels = target.to(predict.dtype)
        return labels if counted is None else labels * counted, counted
    classes = target[:, 0].round().long() if target.is_floating_point() else target[:, 0].long()
    if counted is None:
        labels = F.one_hot(classes, channels)
    else:
        ignored = channels
        if ignore_index is not None and 0 <= ignore_index < channels:
            ignored = ignore_index
        classes = torch.where(counted[:, 0], classes, ignored)
        kept = [channel for channel in range(channels + 1) if channel != ignored]
        labels = F.one_hot(classes, channels + 1)[..., kept]
    return labels.movedim(-1, 1).to(predict.dtype), counted


def _with_channels(predict: Tensor, target: Tensor) -> Tensor:
    """Return targets as [B, C, H, W] or [B, 1, H, W], checked against the predictions."""
    if target.shape == predict.shape:
        return target
    if target.ndim == predict.ndim - 1:
        target = target.unsqueeze(1)
    # One prediction for several targets is broadcast, as in SuperGradients.
    fits = target.shape[1:] == (1, *predict.shape[2:])
    if not fits or len(predict) not in (1, len(target)):
        raise ValueError(
            f"a target of shape {tuple(target.shape)} does not fit predictions of shape "
            f"{tuple(predict.shape)}: give classes [B, H, W] or [B, 1, H, W], or a mask for "
            "each predicted channel"
        )
    return target


def binary_cross_entropy(loss: Any, predict: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy of one-channel logits, in place of ``BCE.forward``.

    Args:
        loss: a ``BCEWithLogitsLoss``.
        predict: logits, [B, 1, ...].
        target: masks in [0, 1] of any dtype, [B, ...] or [B, 1, ...].
    """
    return nn.BCEWithLogitsLoss.forward(loss, *_without_channel(predict, target))


def bce_dice_loss(loss: Any, predict: Tensor, target: Tensor) -> Tensor:
    """Compute BCE-Dice, in place of ``BCEDiceLoss.forward``.

    Args:
        loss: the loss; its ``dice.apply_sigmoid`` says whether ``predict`` are logits.
        predict: logits or probabilities, [B, 1, H, W].
        target: masks in [0, 1] of any dtype, [B, H, W] or [B, 1, H, W].
    """
    bce_weight, dice_weight = loss.loss_weights
    if loss.dice.apply_sigmoid:
        bce = loss.bce(predict, target)
    else:
        bce = F.binary_cross_entropy(*_without_channel(predict, target))
    return bce_weight * bce + dice_weight * loss.dice(predict, target)


def _without_channel(predict: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    predict = predict.squeeze(1)
    target = target.squeeze(1) if target.ndim > predict.ndim else target
    return predict, target.to(predict.dtype)


def _reduced(values: Tensor, reduction: object) -> Tensor:
    """Reduce by a name or by SuperGradients' enumeration of the names."""
    name = reduction.value if isinstance(reduction, Enum) else reduction
    if name == "none":
        return values
    if name not in ("mean", "sum"):
        raise ValueError(f"reduction={name!r}: use 'mean', 'sum' or 'none'")
    return values.mean() if name == "mean" else values.sum()
