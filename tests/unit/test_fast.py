"""The rewrites for fast inference change no mask."""

from __future__ import annotations

import copy

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from portrait_dist.data.source.drawing import draw_portrait
from portrait_dist.losses import SoftIoULoss
from portrait_dist.models import UNet, fused
from tests import blobs


@torch.no_grad()
def logits(model: UNet, x: Tensor) -> Tensor:
    return model(x, return_logits=True)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (16, 16)])
def test_merged_network_gives_the_same_logits_at_every_pixel_borders_included(
    norm: str, size: tuple[int, int]
) -> None:
    model = blobs.random_network(norm).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        merged = fused.merge_up_convolutions(fused.fold_batch_norm(model))(x)
    torch.testing.assert_close(merged, logits(model, x), rtol=1e-10, atol=1e-10)


def test_folding_leaves_no_batch_norm_and_the_same_output() -> None:
    model = blobs.random_network()
    folded = fused.fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(logits(folded, x), logits(model, x), rtol=1e-4, atol=1e-5)


def test_optimising_leaves_the_model_as_it_was() -> None:
    model = blobs.random_network().train()
    before = copy.deepcopy(model.state_dict())
    fused.for_inference(model, "cpu", precision="bf16")(torch.randn(1, 3, 32, 32))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_network_for_inference_takes_and_gives_float32_whatever_it_computes_in() -> None:
    model, x = blobs.random_network(), torch.randn(2, 3, 32, 32)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.05)):
        probabilities = fused.for_inference(model, "cpu", precision=precision)(x)
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(
            probabilities, torch.sigmoid(logits(model, x)), rtol=0, atol=tolerance
        )


def test_compiled_network_gives_the_masks_of_the_plain_one() -> None:
    model = blobs.random_network()
    compiled = fused.for_inference(
        model, "cpu", precision="fp32", compile=True, batch_shape=(2, 3, 32, 32)
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled(x), torch.sigmoid(logits(model, x)), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def trained() -> tuple[UNet, Tensor, Tensor]:
    """Return a small network that finds people in 16 drawn portraits, with images and alphas."""
    drawn = [draw_portrait(np.random.default_rng([5, i])) for i in range(16)]
    images = torch.stack([_image(image) for image, _ in drawn])
    alphas = torch.stack(
        [torch.from_numpy(cv2.resize(alpha, (64, 64)))[None] / 255 for _, alpha in drawn]
    )
    torch.manual_seed(0)
    model, loss, steps = UNet(init_features=8), SoftIoULoss(), 300
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randperm(16)[:8]
        optimizer.zero_grad()
        loss(model(images[chosen], return_logits=True), alphas[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval(), images, alphas


def _image(image: np.ndarray) -> Tensor:
    small = torch.from_numpy(cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)).permute(
        2, 0, 1
    )
    return (small / 255 - 0.45) / 0.225


def test_bf16_masks_of_a_trained_network_equal_fp32_masks_within_iou_0999(
    trained: tuple[UNet, Tensor, Tensor],
) -> None:
    model, images, alphas = trained
    exact = fused.binary_masks(model, images)
    assert fused.mask_iou(exact, alphas > 0.5) > 0.9, (
        "the network must have learnt the task for this to say anything"
    )
    assert (
        fused.mask_iou(
            exact, fused.binary_masks(fused.for_inference(model, "cpu", precision="bf16"), images)
        )
        >= fused.MIN_MASK_IOU
    )
