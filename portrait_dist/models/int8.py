"""The U-Net mostly in 8-bit integers, for CPUs whose VNNI instructions multiply these twice as fast as bfloat16.

    network = int8.quantise(model, pictures)           # pictures: normalised float32 [N, 3, H, W], some of those to come
    probabilities = network(x)                         # normalised float32 [B, 3, H, W] → float32 [B, 1, H, W]

The first two levels of the encoder, which mind 8 bits most, stay bfloat16; the rest, six sevenths of the multiplications, is
quantised after training: activations to unsigned bytes in the range that they have on ``pictures``, weights to signed bytes
with a step for each output channel. A channel of small activations would use few of the 256 levels, so each has a step of its
own; a positive factor passes through ReLU and max pooling, which is why the steps can be part of the weights before and after
and cost nothing (cross-layer equalisation).

References:
    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from portrait_dist.models.fused import Network, border_bias, compose, fold_batch_norm
from portrait_dist.models.unet import LEVELS, UNet

FLOAT_LEVELS = 2
"""Levels of the encoder that stay bfloat16."""
CLIPPED = 1e-4
"""Share of a channel's activations, the largest ones, that lie above its range and are cut to it. Of 1e-3 to 1e-6 it gave the
masks nearest to float32."""
SMALLEST = 1e-3
"""Smallest range of a channel, as a share of the layer's largest: channels that are almost always zero need none of their own."""
CALIBRATION_BATCH = 4
SUMS = torch.bfloat16
"""Type of the sums of the two halves of a join before they become bytes."""


class Reading(NamedTuple):
    """How a convolution reads the bytes of its input, each [I] for its channels, float64.

    Attributes:
        step: the difference between two neighbouring bytes.
        mean: of the numbers on the pictures of calibration.
    """

    step: Tensor
    mean: Tensor


def is_supported() -> bool:
    """Has this machine a CPU with 8-bit dot products (VNNI or AMX), and a PyTorch with oneDNN's 8-bit convolutions?

    Without the former oneDNN adds in 16 bits, which can overflow.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    dot_products = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return bool(dot_products and hasattr(torch.ops.onednn, "qconv2d_pointwise"))


class ByteConv:
    """A convolution of bytes, stride 1, with 32-bit sums.

    Rounding the weights would shift the output by the rounding errors times the input's mean; the bias takes that back.

    Args:
        weight: [O, I, k, k]; bias: [O].
        gives: steps in which the output is counted, [O].
        dtype: of the output; uint8 is rounded and cut to 0..255.
        relu: cut negative sums to zero.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        reads: Reading,
        gives: Tensor,
        padding: int = 1,
        dtype: torch.dtype = torch.uint8,
        relu: bool = True,
    ) -> None:
        exact = weight.detach().double() * reads.step[:, None, None] / gives[:, None, None, None]
        self.scales = (exact.abs().amax(dim=(1, 2, 3)).clamp_min(1e-30) / 127).float()
        scales = self.scales.double()[:, None, None, None]
        self.weight = (exact / scales).round().clamp(-127, 127).to(torch.int8)
        shift = (self.weight.double() * scales - exact).sum(dim=(2, 3)) @ (reads.mean / reads.step)
        self.bias = (bias.detach().double() / gives - shift).float()
        self.zeros = torch.zeros(len(bias), dtype=torch.int8)
        self.padding, self.dtype, self.activation = (
            [padding, padding],
            dtype,
            "relu" if relu else "none",
        )
        self.packed, self.packed_for = self.weight, torch.Size()

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """uint8 [B, I, H, W] → [B, O, H', W']; with ``add``, of the output's shape, the sum is in its place and type."""
        strides = dilation = [1, 1]
        if (
            x.shape[2:] != self.packed_for
        ):  # oneDNN orders weights for a shape; ordered otherwise it would do it at every call
            self.packed_for = x.shape[2:]
            self.packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.scales, 1.0, 0, strides, self.padding, dilation, 1, list(x.shape)
            )
        read = (x, 1.0, 0, self.packed, self.scales, self.zeros)
        window = (strides, self.padding, dilation, 1)
        if add is None:
            out = torch.ops.onednn.qconv2d_pointwise(
                *read, self.bias, *window, 1.0, 0, self.dtype, self.activation, [], ""
            )
        else:
            join = torch.ops.onednn.qconv2d_pointwise.binary
            out = join(
                *read,
                add,
                self.bias,
                *window,
                1.0,
                0,
                add.dtype,
                1.0,
                0,
                "sum",
                1.0,
                self.activation,
                [],
                "",
            )
        return cast("Tensor", out)


def _weight_and_bias(conv: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
    assert conv.bias is not None
    return conv.weight, conv.bias


class ByteBlock:
    """Twice: 3×3 convolution and ReLU. uint8 [B, I, H, W] → uint8 [B, O, H, W].

    Args:
        block: of the folded network.
        reads: of its two convolutions.
        gives: steps of the output.
    """

    def __init__(self, block: nn.Sequential, reads: Sequence[Reading], gives: Tensor) -> None:
        self.first = ByteConv(*_weight_and_bias(block[0]), reads[0], reads[1].step)
        self.second = ByteConv(*_weight_and_bias(block[3]), reads[1], gives)

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class ByteJoin:
    """A level of the decoder, up-convolution and first convolution as one: see :class:`portrait_dist.models.fused.UpJoin`.

    What an up-convolution gives has rare, very large numbers, for which bytes are too coarse; merged, they are never seen. The
    transposed 4×4 convolution, stride 2, is a 2×2 one with four outputs, one for each of the pixels that a pixel becomes.

    Args:
        upconv: transposed 2×2 convolution, stride 2, 2C → C channels.
        block: of the folded network, 2C → C channels.
        reads: of ``upconv`` and of the two convolutions.
        gives: steps of the output; None: it is bfloat16, in its own units.

    Shape:
        x uint8 [B, 2C, H, W], skip uint8 [B, C, 2H, 2W] → uint8 or bfloat16 [B, C, 2H, 2W].
    """

    def __init__(
        self,
        upconv: nn.ConvTranspose2d,
        block: nn.Sequential,
        reads: Sequence[Reading],
        gives: Tensor | None,
    ) -> None:
        channels = upconv.out_channels
        first, middle = block[0], reads[2].step
        assert isinstance(first, nn.Conv2d)
        up_half, skip_half = first.weight.detach().double().split(channels, dim=1)
        kernel = compose(upconv.weight.detach().double(), up_half).transpose(0, 1)  # [C, 2C, 4, 4]
        taps = (
            (3, 1),
            (2, 0),
        )  # of the even and of the odd pixels, from the first of two input pixels to the second
        pixels = [kernel[:, :, rows][..., columns] for rows in taps for columns in taps]
        zero = torch.zeros(4 * channels)
        self.up = ByteConv(
            torch.cat(pixels), zero, reads[0], middle.repeat(4), dtype=SUMS, relu=False
        )
        bias = border_bias(upconv, up_half, first)
        skip = Reading(*(numbers[channels:] for numbers in reads[1]))
        self.skip = ByteConv(skip_half, bias[:, 1, 1], skip, middle)
        self.border = ((bias - bias[:, 1:2, 1:2]) / middle[:, None, None]).permute(1, 2, 0).to(SUMS)
        unit, dtype = (
            (torch.ones_like(middle), torch.bfloat16) if gives is None else (gives, torch.uint8)
        )
        self.second = ByteConv(*_weight_and_bias(block[3]), reads[2], unit, dtype=dtype)

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.second(_as_bytes(self.skip(skip, add=self._spread(self.up(x)))))

    def _spread(self, up: Tensor) -> Tensor:
        """[B, 4C, H + 1, W + 1] → the pixels in their places, and what the border lacks in bias: [B, C, 2H, 2W]."""
        pixels = up.unflatten(1, (2, 2, -1))
        height, width = up.shape[2] - 1, up.shape[3] - 1
        out = torch.empty((len(up), 2 * height, 2 * width, pixels.shape[3]), dtype=up.dtype)
        for row, column in product((0, 1), repeat=2):
            part = pixels[:, row, column, :, row : row + height, column : column + width]
            out[:, row::2, column::2] = part.permute(0, 2, 3, 1)
        places = (slice(0, 1), slice(1, -1), slice(-1, None))
        for row, column in product(range(3), repeat=2):
            if (row, column) != (1, 1):
                out[:, places[row], places[column]] += self.border[row, column]
        return out.permute(0, 3, 1, 2)


class ByteUNet:
    """The network of :func:`quantise`.

    Args:
        folded: is changed.
        reads: block or up-convolution → how its convolutions read, see :func:`_readings`.
    """

    def __init__(self, folded: UNet, reads: dict[str, tuple[Reading, ...]]) -> None:
        joined = [
            reads[f"decoder{level}"][0].step for level in range(1, LEVELS + 1)
        ]  # of up-sampled and skip channels
        gives = {
            f"encoder{level}": step[len(step) // 2 :] for level, step in enumerate(joined, start=1)
        }
        gives |= {"bottleneck": reads[f"upconv{LEVELS}"][0].step}
        gives |= {
            f"decoder{level}": reads[f"upconv{level - 1}"][0].step for level in range(2, LEVELS + 1)
        }
        names = [f"encoder{level}" for level in range(1, LEVELS + 1)] + ["bottleneck"]
        _count_in_steps(folded, gives)
        self.encoders = [
            getattr(folded, name).to(torch.bfloat16, memory_format=torch.channels_last)
            for name in names[:FLOAT_LEVELS]
        ]
        self.byte_blocks = []
        for before, name in pairwise(names[FLOAT_LEVELS - 1 :]):
            first, second = reads[name]
            self.byte_blocks.append(
                ByteBlock(
                    getattr(folded, name), (first._replace(step=gives[before]), second), gives[name]
                )
            )
        self.joins = []
        for level in range(LEVELS, 0, -1):
            upconv, block = f"upconv{level}", f"decoder{level}"
            read = (*reads[upconv], *reads[block])
            self.joins.append(
                ByteJoin(getattr(folded, upconv), getattr(folded, block), read, gives.get(block))
            )
        self.conv = folded.conv.to(torch.bfloat16)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Normalised float32 [B, 3, H, W], H and W multiples of 16 → probabilities, float32 [B, 1, H, W]."""
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        skips = []
        for encoder in self.encoders:
            skip = encoder(x)
            x = _pooled(skip)
            skips.append(_as_bytes(skip))
        x = _as_bytes(x)
        for block in self.byte_blocks[:-1]:
            skips.append(block(x))
            x = _pooled(skips[-1])
        x = self.byte_blocks[-1](x)
        for join in self.joins:
            x = join(x, skips.pop())
        return torch.sigmoid(self.conv(x).float())


def _as_bytes(x: Tensor) -> Tensor:
    """Counts of steps, at least 0, as uint8; overwrites ``x``."""
    return (
        x.clamp_(max=255).round_().to(torch.int16).to(torch.uint8)
    )  # straight from bfloat16 it takes longer


def _pooled(x: Tensor) -> Tensor:
    """Max pooling of 2×2 pixels."""
    rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _count_in_steps(folded: UNet, gives: dict[str, Tensor]) -> None:
    """Change the weights of the bfloat16 levels in place so that what each gives is counted in its steps."""
    for level in range(1, FLOAT_LEVELS + 1):
        first, second = getattr(folded, f"encoder{level}")[0], getattr(folded, f"encoder{level}")[3]
        if level > 1:
            first.weight.data *= gives[f"encoder{level - 1}"].float()[:, None, None]
        own = gives[f"encoder{level}"].float()
        second.weight.data /= own[:, None, None, None]
        second.bias.data /= own


def quantise(model: UNet, pictures: Tensor) -> Network:
    """The network with six sevenths of its multiplications in bytes; ``model`` itself is not changed.

    Args:
        model: a trained network with batch norms.
        pictures: normalised float32 [N, 3, H, W], H and W multiples of 16, that show the ranges of the activations: 32 or more,
            as different as those to come. Larger numbers than theirs are cut.

    Raises:
        ValueError: the network has group norms, which cannot be folded into the convolutions.
    """
    if model.norm != "batch":
        raise ValueError(
            "only a network with batch norms can be quantised; this one has group norms"
        )
    folded = fold_batch_norm(model).cpu().float()
    return ByteUNet(folded, _readings(folded, pictures))


class _Watch:
    """A hook that looks at what a convolution reads."""

    def __init__(self) -> None:
        self.largest, self.sum, self.count = torch.zeros(()).double(), torch.zeros(()).double(), 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels = inputs[0].transpose(0, 1).flatten(1)
        above = max(1, round(CLIPPED * channels.shape[1]))
        self.largest = torch.maximum(
            self.largest, channels.abs().topk(above, dim=1).values[:, -1].double()
        )
        self.sum = self.sum + channels.double().mean(dim=1) * len(inputs[0])
        self.count += len(inputs[0])

    def reading(self) -> Reading:
        largest = torch.maximum(self.largest, self.largest.max() * SMALLEST).clamp_min(1e-30)
        return Reading(largest / 255, self.sum / self.count)


def _readings(folded: UNet, pictures: Tensor) -> dict[str, tuple[Reading, ...]]:
    """Block or up-convolution → how its convolutions read, found by running the float32 network over the pictures."""
    watched: dict[str, list[_Watch]] = {}
    hooks = []
    for name, module in folded.named_children():
        convs = [
            part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))
        ]
        watched[name] = [_Watch() for _ in convs]
        hooks += [
            conv.register_forward_pre_hook(watch)
            for conv, watch in zip(convs, watched[name], strict=True)
        ]
    with torch.no_grad():
        for part in pictures.split(CALIBRATION_BATCH):
            folded.logits(part)
    for hook in hooks:
        hook.remove()
    return {name: tuple(watch.reading() for watch in watches) for name, watches in watched.items()}
