"""SuperGradients' IoU, Dice and BCE-Dice losses follow their definitions on any usual target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from portrait_dist.training import sg_adapter

sg_adapter.import_super_gradients()

from super_gradients.common.factories.losses_factory import LossesFactory  # noqa: E402

CLASSES = 3
SMOOTH, EPS = 1.0, 1e-5


def make(spec: Any) -> nn.Module:
    loss: nn.Module = LossesFactory().get(spec)
    return loss


def batch(channels: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Logits [2, C, 5, 4] and classes [2, 5, 4]; masks where C is 1."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, channels, 5, 4, generator=generator)
    return logits, torch.randint(0, max(channels, 2), (2, 5, 4), generator=generator)


def score(kind: str, found: Tensor, truth: Tensor) -> float:
    """1 - IoU or 1 - Dice of the pixels of one class, with SuperGradients' smoothing."""
    both, areas = float((found * truth).sum()), float(found.sum() + truth.sum())
    if kind == "IoU":
        return 1 - (both + SMOOTH) / (areas - both + EPS + SMOOTH)
    return 1 - (2 * both + SMOOTH) / (areas + EPS + SMOOTH)


KINDS = pytest.mark.parametrize("kind", ["IoU", "Dice"])


@KINDS
def test_the_losses_of_classes_take_targets_of_any_dtype_with_or_without_a_channel(
    kind: str,
) -> None:
    logits, classes = batch()
    found = logits.softmax(1)
    expected = [score(kind, found[:, one], (classes == one).float()) for one in range(CLASSES)]
    one_hot = torch.stack([classes == one for one in range(CLASSES)], 1).float()
    targets = [classes, classes[:, None], classes.float(), classes.to(torch.uint8), one_hot]
    for target in targets:
        value = make(f"{kind}Loss")(logits, target)
        assert float(value) == pytest.approx(sum(expected) / CLASSES, rel=1e-5)
    assert make({f"{kind}Loss": {"reduction": "none"}})(logits, classes).tolist() == pytest.approx(
        expected, rel=1e-5
    )
    weight = torch.tensor([0.0, 2.0, 1.0])
    weighted = make({f"{kind}Loss": {"reduction": "sum", "weight": weight}})(logits, classes)
    assert float(weighted) == pytest.approx(2 * expected[1] + expected[2], rel=1e-5)
    for wrong in (classes[:, :4], one_hot[:, :2]):
        with pytest.raises(ValueError, match="does not fit predictions of shape"):
            make(f"{kind}Loss")(logits, wrong)


@KINDS
@pytest.mark.parametrize("ignored", [255, CLASSES, -100, -1])
def test_pixels_of_the_ignored_value_do_not_count(kind: str, ignored: int) -> None:
    logits, classes = batch()
    kept = torch.arange(4).expand_as(classes) > 0
    found = logits.softmax(1)
    expected = [
        score(kind, found[:, one][kept], (classes == one)[kept].float()) for one in range(CLASSES)
    ]
    target = torch.where(kept, classes, ignored)
    loss = make({f"{kind}Loss": {"ignore_index": ignored}})
    for one in (target, target[:, None], target.float()):
        assert float(loss(logits, one)) == pytest.approx(sum(expected) / CLASSES, rel=1e-5)


@KINDS
def test_an_ignored_class_among_the_others_has_no_channel(kind: str) -> None:
    logits, classes = batch()
    labels = torch.where(classes > 0, classes + 1, classes)  # 0, 2 and 3; 1 is ignored
    labels[0, 0] = 1
    kept, found = labels != 1, logits.softmax(1)
    expected = [
        score(kind, found[:, channel][kept], (labels == label)[kept].float())
        for channel, label in enumerate((0, 2, 3))
    ]
    value = make({f"{kind}Loss": {"ignore_index": 1}})(logits, labels)
    assert float(value) == pytest.approx(sum(expected) / CLASSES, rel=1e-5)


@KINDS
def test_the_binary_losses_take_soft_masks_with_or_without_a_channel(kind: str) -> None:
    logits, masks = batch(1)
    soft = masks * 0.7 + 0.1
    for truth in (masks, soft):
        expected = score(kind, logits.sigmoid()[:, 0], truth.float())
        for target in (truth, truth[:, None], truth[:, None].float()):
            assert float(make(f"Binary{kind}Loss")(logits, target)) == pytest.approx(
                expected, rel=1e-5
            )
        one = logits[:1]  # for all targets, as in SuperGradients
        value = make(f"Binary{kind}Loss")(one, truth)
        expected_of_one = score(kind, one.sigmoid()[:, 0].expand_as(truth), truth.float())
        assert float(value) == pytest.approx(expected_of_one, rel=1e-5)
        given = make({f"Binary{kind}Loss": {"apply_sigmoid": False}})
        assert float(given(logits.sigmoid(), truth[:, None])) == pytest.approx(expected, rel=1e-5)


@KINDS
def test_the_generalized_losses_weigh_each_class_by_its_inverse_squared_area(kind: str) -> None:
    logits, classes = batch()
    classes[classes == 2] = 1  # a class that is not there has no weight, so its loss is 1
    found = logits.softmax(1)
    expected = 1.0
    for one in (0, 1):
        truth = (classes == one).float()
        scale = 1 / float(truth.sum()) ** 2
        both = float((found[:, one] * truth).sum()) * scale
        areas = float(found[:, one].sum() + truth.sum()) * scale
        expected += 1 - (both / (areas - both) if kind == "IoU" else 2 * both / areas)
    value = make(f"Generalized{kind}Loss")(logits, classes[:, None].float())
    assert float(value) == pytest.approx(expected / CLASSES, rel=1e-5)


def test_bce_dice_is_the_weighted_sum_from_logits_and_from_probabilities() -> None:
    logits, masks = batch(1)
    truth, found = masks[:, None].float(), logits.sigmoid()
    bce = -(truth * found.log() + (1 - truth) * (1 - found).log()).mean()
    expected = 0.3 * float(bce) + 0.7 * score("Dice", found, truth)
    for target in (masks, masks[:, None], truth, masks.to(torch.uint8)):
        from_logits = make({"BCEDiceLoss": {"loss_weights": [0.3, 0.7]}})
        assert float(from_logits(logits, target)) == pytest.approx(expected, rel=1e-5)
        given = make({"BCEDiceLoss": {"loss_weights": [0.3, 0.7], "logits": False}})
        assert float(given(found, target)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError):
        make("BCEDiceLoss")(logits, masks[:, :4])


def test_the_reduction_is_also_given_as_supergradients_enumeration() -> None:
    from super_gradients.training.losses.loss_utils import LossReduction

    logits, classes = batch()
    for one in LossReduction:
        by_value = make({"IoULoss": {"reduction": one.value}})(logits, classes)
        assert torch.equal(make({"IoULoss": {"reduction": one}})(logits, classes), by_value)
    with pytest.raises(ValueError, match="use 'mean', 'sum' or 'none'"):
        make({"IoULoss": {"reduction": "median"}})(logits, classes)


@KINDS
def test_the_gradient_is_that_of_the_definition(kind: str) -> None:
    logits, masks = batch(1)
    logits = logits.double().requires_grad_()
    loss = make(f"Binary{kind}Loss")
    assert torch.autograd.gradcheck(lambda x: loss(x, masks[:, None].float()), logits)
