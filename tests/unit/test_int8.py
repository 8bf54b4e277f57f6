"""In 8-bit integers the network keeps its masks, or it is not used."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from portrait_dist.errors import InputError
from portrait_dist.inference.placement import fit_photo, shrink
from portrait_dist.inference.segmenter import PortraitSegmenter
from portrait_dist.models import UNet, fused, int8
from portrait_dist.preprocessing import normalise
from tests import blobs

pytestmark = pytest.mark.skipif(
    not int8.is_supported(), reason="this CPU has no 8-bit dot products"
)


def network() -> UNet:
    """Return a random network: each kernel is heavy at its upper left, up-convolutions are biased.

    So sides cannot be mixed up unseen.
    """
    model = blobs.random_network(features=8)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.kernel_size != (1, 1):
            module.weight.data[..., 0, 0] *= 2
    for level in range(1, 5):
        nn.init.normal_(getattr(model, f"upconv{level}").bias, std=0.5)
    return model


@torch.no_grad()
def exact(model: UNet, x: Tensor) -> Tensor:
    return model(x)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (16, 16)])
def test_probabilities_stay_near_float32s_at_every_pixel_borders_included(
    size: tuple[int, int],
) -> None:
    model, x = network(), torch.randn(6, 3, *size)
    difference = (int8.quantise(model, x)(x) - exact(model, x)).abs()
    spread = exact(model, x).std()
    assert difference.max() < 0.35 * spread
    border = torch.cat(
        [difference[..., 0, :], difference[..., -1, :], difference[..., 0], difference[..., -1]],
        dim=-1,
    )
    assert border.mean() < 1.5 * difference[..., 1:-1, 1:-1].mean()


def test_one_network_takes_batches_and_sizes_it_was_not_calibrated_on() -> None:
    model = network()
    quantised = int8.quantise(model, torch.randn(8, 3, 64, 64))
    for count, *size in ((1, 64, 64), (3, 64, 64), (2, 32, 96), (3, 64, 64)):
        x = torch.randn(count, 3, *size)
        one, other = quantised(x), exact(model, x)
        assert (one - other).abs().mean() < 0.05 * other.std()


def test_a_channel_of_tiny_activations_is_as_fine_as_one_of_large_ones() -> None:
    model, x = network(), torch.randn(4, 3, 64, 64)
    scaled = copy.deepcopy(model)
    factors = torch.tensor(
        [10.0, 0.03] * 4
    )  # the same network: what one layer multiplies the next divides
    block = scaled.decoder1
    assert isinstance(block, nn.Sequential)
    first, second = block[1], block[3]
    assert isinstance(first, nn.BatchNorm2d)
    assert isinstance(second, nn.Conv2d)
    first.weight.data *= factors
    first.bias.data *= factors
    second.weight.data /= factors[:, None, None]
    torch.testing.assert_close(exact(scaled, x), exact(model, x), rtol=1e-4, atol=1e-5)
    truth = exact(model, x)
    plain, uneven = ((int8.quantise(one, x)(x) - truth).abs().mean() for one in (model, scaled))
    assert uneven < 1.1 * plain


def test_rounding_the_weights_does_not_shift_what_a_convolution_gives_on_average() -> None:
    torch.manual_seed(5)
    weight, bias, one = torch.randn(8, 16, 3, 3), torch.randn(8), torch.ones(16).double()
    x = torch.randint(
        80, 121, (2, 16, 32, 32), dtype=torch.uint8
    )  # far from zero, as ReLU leaves activations
    conv = int8.ByteConv(
        weight, bias, int8.InputRange(one, 100 * one), one[:8], dtype=torch.float32, relu=False
    )
    error = (conv(x) - nn.functional.conv2d(x.float(), weight, bias, padding=1))[..., 1:-1, 1:-1]
    assert error.mean(dim=(0, 2, 3)).abs().max() < 0.1 * error.std()


def test_quantising_leaves_the_model_as_it_was() -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    int8.quantise(model, torch.randn(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def trained() -> UNet:
    return blobs.train()


def photos(first: int, count: int) -> list[np.ndarray]:
    return [blobs.photo(96, 72, seed=seed)[0] for seed in range(first, first + count)]


def test_a_segmenter_that_keeps_its_masks_computes_in_bytes_after_calibration() -> None:
    sure = network()  # no pixel near the border between person and background
    segmenter = PortraitSegmenter(sure, blobs.SIZE, device="cpu", refine=False)
    plain = PortraitSegmenter(sure, blobs.SIZE, device="cpu", precision="fp32", refine=False)
    assert segmenter.calibrate(photos(0, 8)) >= fused.MIN_MASK_IOU
    assert isinstance(segmenter.network, int8.ByteUNet)
    for alpha, other in zip(
        segmenter.predict(photos(100, 4)), plain.predict(photos(100, 4)), strict=True
    ):
        np.testing.assert_allclose(alpha, other, atol=0.01)


def test_masks_of_a_trained_network_hardly_change_on_photos_that_did_not_calibrate_it(
    trained: UNet,
) -> None:
    segmenter = PortraitSegmenter(
        trained, blobs.SIZE, device="cpu", precision="fp32", mirror=False, refine=False
    )
    masks = [alpha > 0.5 for alpha in segmenter.predict(photos(100, 24))]
    shown = [
        shrink(photo, fit_photo(96, 72, blobs.SIZE, "letterbox", 0.75)) for photo in photos(0, 32)
    ]
    images = torch.from_numpy(np.stack(shown))
    segmenter.network = int8.quantise(trained, normalise(images, images[..., 0])[0])
    others = [alpha > 0.5 for alpha in segmenter.predict(photos(100, 24))]
    one, other = (torch.from_numpy(np.stack(masks)) for masks in (masks, others))
    assert fused.mask_iou(one, other) > 0.99


def test_a_segmenter_whose_masks_would_change_stays_as_it_was() -> None:
    undecided = network()  # noise, and half of the pixels on each side of the border
    assert undecided.conv.bias is not None
    undecided.conv.bias.data -= exact(undecided, torch.randn(4, 3, 64, 64)).logit().median()
    segmenter = PortraitSegmenter(undecided, blobs.SIZE, device="cpu")
    before, alpha = segmenter.network, segmenter.predict(photos(0, 1)[0])
    assert segmenter.calibrate(photos(0, 8)) < fused.MIN_MASK_IOU
    assert segmenter.network is before
    assert np.array_equal(segmenter.predict(photos(0, 1)[0]), alpha)


def test_what_cannot_be_calibrated_is_refused_with_the_reason(
    trained: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="1 photos are too few"):
        PortraitSegmenter(trained, blobs.SIZE, device="cpu").calibrate(photos(0, 1))
    with pytest.raises(InputError, match="group norms"):
        PortraitSegmenter(UNet(init_features=2, norm="group"), blobs.SIZE, device="cpu").calibrate(
            photos(0, 2)
        )
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: dict.fromkeys(("avx2", "avx512_f"), True)
    )
    with pytest.raises(InputError, match="VNNI"):
        PortraitSegmenter(trained, blobs.SIZE, device="cpu").calibrate(photos(0, 2))
