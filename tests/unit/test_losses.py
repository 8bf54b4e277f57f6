"""The tutorial's loss has its value; the soft IoU loss has a gradient and suits soft targets."""

from typing import Any

import pytest
import torch
from torch import Tensor

from portrait_dist.losses import CustomSegLoss, SoftIoULoss, soft_iou


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def target() -> Tensor:
    """Soft masks: a smooth blob with values from 0 to 1."""
    row = torch.linspace(-1, 1, 16)
    distance = torch.hypot(row[:, None], row[None, :])
    return torch.stack(
        [torch.sigmoid((radius - distance) * 8) for radius in (0.3, 0.5, 0.7, 0.9)]
    ).unsqueeze(1)


def tutorial_loss(preds: Tensor, target: Tensor, bce_weight: float, iou_weight: float) -> float:
    """The tutorial's definition, as arithmetic on single numbers."""
    bce = intersection = foreground = truth = 0.0
    for p, t in zip(preds.flatten().tolist(), target.flatten().tolist(), strict=True):
        bce -= t * torch.tensor(p).log().item() + (1 - t) * torch.tensor(1 - p).log().item()
        intersection += (p > 0.5) * (t > 0.5)
        foreground += p > 0.5
        truth += t > 0.5
    iou = intersection / (foreground + truth - intersection + 1e-5)
    return bce_weight * bce / preds.numel() + iou_weight * (1 - iou)


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 2)])
def test_the_tutorials_loss_has_the_tutorials_value(
    logits: Tensor, target: Tensor, weights: tuple[float, float]
) -> None:
    probabilities = torch.sigmoid(logits)
    expected = tutorial_loss(probabilities, target, *weights)
    assert CustomSegLoss(*weights)(probabilities, target).item() == pytest.approx(
        expected, rel=1e-5
    )
    bce, iou = weights
    from_logits = CustomSegLoss(bce, iou, from_logits=True)
    assert from_logits(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_the_tutorials_weights_are_the_defaults() -> None:
    loss = CustomSegLoss()
    assert (loss.bce_weight, loss.iou_weight) == (1, 1)


def test_only_the_soft_iou_term_has_a_gradient(logits: Tensor, target: Tensor) -> None:
    for loss, has_gradient in (
        (CustomSegLoss(0, 1, from_logits=True), False),
        (SoftIoULoss(0, 1), True),
    ):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target) + 0 * leaf.sum()
        value.backward()
        assert leaf.grad is not None
        assert bool(leaf.grad.abs().sum() > 0) == has_gradient


def test_soft_iou_is_the_jaccard_index_where_targets_are_yes_or_no(
    logits: Tensor, target: Tensor
) -> None:
    p, t = torch.sigmoid(logits), (target > 0.5).float()
    product = (p * t).flatten(1).sum(1) / (p + t - p * t).flatten(1).sum(1)
    torch.testing.assert_close(soft_iou(p, t), product)


def test_soft_iou_is_one_only_at_the_soft_target_itself(target: Tensor) -> None:
    assert (soft_iou(target, target) == 1).all()
    for other in (target * 0.9, (target > 0.5).float(), target.clamp(min=0.1)):
        assert (soft_iou(other, target) < 0.999).all()


def test_an_empty_mask_that_is_found_empty_costs_nothing() -> None:
    empty = torch.zeros(1, 1, 8, 8)
    assert SoftIoULoss()(empty - 200, empty).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_of_a_batch_is_the_mean_over_its_samples(logits: Tensor, target: Tensor) -> None:
    """So that ranks and accumulation steps may split a global batch as they like."""
    whole, loss = logits.clone().requires_grad_(), SoftIoULoss()
    loss(whole, target).backward()
    parts = logits.clone().requires_grad_()
    (loss(parts[:1], target[:1]) / 4 + loss(parts[1:], target[1:]) * 3 / 4).backward()
    torch.testing.assert_close(loss(parts, target), loss(whole, target))
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("loss", [SoftIoULoss(), CustomSegLoss(from_logits=True), CustomSegLoss()])
def test_losses_are_computed_in_float32_inside_autocast(
    loss: Any, logits: Tensor, target: Tensor
) -> None:
    preds = logits if loss.takes_logits else torch.sigmoid(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(preds, target)
    assert inside.dtype == torch.float32
    assert inside == loss(preds, target)


def test_sure_and_wrong_logits_in_bf16_give_a_finite_loss_with_a_gradient() -> None:
    logits = torch.full((1, 1, 4, 4), -300.0, dtype=torch.bfloat16, requires_grad=True)
    loss = SoftIoULoss()(logits, torch.ones(1, 1, 4, 4))
    loss.backward()
    assert loss.item() == pytest.approx(301, rel=1e-3)
    assert logits.grad is not None
    assert bool((logits.grad < 0).all())


def test_components_are_the_terms_of_the_loss(logits: Tensor, target: Tensor) -> None:
    loss = SoftIoULoss(0.3, 0.7)
    bce, iou = loss.components(logits, target)
    assert loss.term_names == ("bce", "iou")
    torch.testing.assert_close(loss(logits, target), 0.3 * bce + 0.7 * iou)
