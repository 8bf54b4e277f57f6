"""The U-Net mostly in 8-bit integers, for CPUs whose VNNI multiplies these twice as fast as bf16.

    network = int8.quantise(model, images)   # some of those to come, normalised [N, 3, H, W]
    probabilities = network(x)               # normalised float32 [B, 3, H, W] → [B, 1, H, W]

The two encoder levels most sensitive to quantisation stay in bfloat16. The rest, six sevenths of
the multiplications, is quantised after training: activations to unsigned bytes in the range that
they have on ``images``, weights to signed bytes with a step for each output channel. A channel of
small activations would use few of the 256 levels, so each has a step of its own; a positive factor
passes through ReLU and max pooling, so the steps can be part of the weights before and after and
cost nothing (cross-layer equalisation).

References:
    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018. Nagel et al., "Data-Free Quantization Through
    Weight Equalization and Bias Correction", ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from portrait_dist.errors import InputError
from portrait_dist.models.fused import Network, border_bias, compose_kernels, fold_batch_norm
from portrait_dist.models.unet import LEVELS, UNet

FLOAT_LEVELS = 2
"""Levels of the encoder that stay bfloat16."""
CLIPPED_FRACTION = 1e-4
"""Fraction of a channel's activations, the largest, that are clipped to its range. Of 1e-3 to 1e-6
it gave the masks nearest to float32."""
SMALLEST_RANGE = 1e-3
"""Smallest range of a channel as a fraction of the layer's largest: channels that are almost always
zero need none of their own."""
CALIBRATION_BATCH = 4
SUM_DTYPE = torch.bfloat16
"""Type of the sums of the two halves of a join before they become bytes."""


class InputRange(NamedTuple):
    """Which numbers the bytes of a convolution's input mean, by channel: float64 [I] each.

    Attributes:
        step: difference between two neighbouring bytes.
        mean: of the numbers on the calibration images.
    """

    step: Tensor
    mean: Tensor


def is_supported() -> bool:
    """Return whether CPU and PyTorch have what 8-bit convolutions need.

    That is 8-bit dot products (VNNI or AMX), without which oneDNN adds in 16 bits and can overflow,
    and oneDNN's 8-bit convolutions.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    dot_products = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return bool(dot_products and hasattr(torch.ops.onednn, "qconv2d_pointwise"))


class ByteConv:
    """A convolution of bytes, stride 1, with 32-bit sums.

    Args:
        weight: [O, I, k, k].
        bias: [O].
        inputs: what the input's bytes mean.
        output_step: what a difference of 1 in the output means, [O].
        padding: zeros at each border.
        dtype: of the output; uint8 is rounded and clipped to 0..255.
        relu: set negative sums to zero.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        inputs: InputRange,
        output_step: Tensor,
        padding: int = 1,
        dtype: torch.dtype = torch.uint8,
        relu: bool = True,
    ) -> None:
        exact = (
            weight.detach().double() * inputs.step[:, None, None] / output_step[:, None, None, None]
        )
        # For each output channel: one scale for all would leave the small ones a few steps.
        self.scales = (exact.abs().amax(dim=(1, 2, 3)).clamp_min(1e-30) / 127).float()
        scales = self.scales.double()[:, None, None, None]
        self.weight = (exact / scales).round().clamp(-127, 127).to(torch.int8)
        # Rounding the weights shifts the output by the rounding errors times the input's mean; the
        # bias takes that back: IoU with fp32's masks 0.998 to 0.9989 at 16 features.
        shift = (self.weight.double() * scales - exact).sum(dim=(2, 3)) @ (
            inputs.mean / inputs.step
        )
        self.bias = (bias.detach().double() / output_step - shift).float()
        self.zeros = torch.zeros(len(bias), dtype=torch.int8)
        self.padding, self.dtype, self.activation = (
            [padding, padding],
            dtype,
            "relu" if relu else "none",
        )
        self.packed, self.packed_for = self.weight, torch.Size()

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Convolve uint8 [B, I, H, W] to [B, O, H', W'].

        With ``add``, of the output's shape, the sum is computed in its memory and type.
        """
        strides = dilation = [1, 1]
        # oneDNN orders the weights for a shape; ordered for another it would do so in every call.
        if x.shape[2:] != self.packed_for:
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
    """Twice 3×3 convolution and ReLU: uint8 [B, I, H, W] → uint8 [B, O, H, W].

    Args:
        block: of the folded network.
        inputs: of its two convolutions each.
        output_step: steps of the output.
    """

    def __init__(
        self, block: nn.Sequential, inputs: Sequence[InputRange], output_step: Tensor
    ) -> None:
        self.first = ByteConv(*_weight_and_bias(block[0]), inputs[0], inputs[1].step)
        self.second = ByteConv(*_weight_and_bias(block[3]), inputs[1], output_step)

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class ByteJoin:
    """A decoder level's up-convolution and first convolution as one, and its second convolution.

    See :class:`portrait_dist.models.fused.UpJoin`. What an up-convolution gives has rare, very
    large numbers, for which bytes are too coarse; merged, they are never seen (0.987 to 0.9991 at
    32 features).

    Args:
        upconv: transposed 2×2 convolution, stride 2, 2C → C channels.
        block: of the folded network, 2C → C channels.
        inputs: of ``upconv`` and of the two convolutions.
        output_step: steps of the output; None: it is bfloat16, in its own units.

    Shape:
        x uint8 [B, 2C, H, W], skip uint8 [B, C, 2H, 2W] → uint8 or bfloat16 [B, C, 2H, 2W].
    """

    def __init__(
        self,
        upconv: nn.ConvTranspose2d,
        block: nn.Sequential,
        inputs: Sequence[InputRange],
        output_step: Tensor | None,
    ) -> None:
        channels = upconv.out_channels
        first, middle = block[0], inputs[2].step
        assert isinstance(first, nn.Conv2d)
        up_half, skip_half = first.weight.detach().double().split(channels, dim=1)
        kernel = compose_kernels(upconv.weight.detach().double(), up_half)
        self.up = _up_conv(kernel, inputs[0], middle)
        bias = border_bias(upconv, up_half, first)
        skip_inputs = InputRange(*(numbers[channels:] for numbers in inputs[1]))
        self.skip = ByteConv(skip_half, bias[:, 1, 1], skip_inputs, middle)
        # What the bias at the border lacks of that inside, in steps: [3, 3, C].
        lacking = (bias - bias[:, 1:2, 1:2]) / middle[:, None, None]
        self.border = lacking.permute(1, 2, 0).to(SUM_DTYPE)
        dtype = torch.bfloat16 if output_step is None else torch.uint8
        step = torch.ones_like(middle) if output_step is None else output_step
        self.second = ByteConv(*_weight_and_bias(block[3]), inputs[2], step, dtype=dtype)

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.second(_as_bytes(self.skip(skip, add=self._spread(self.up(x)))))

    def _spread(self, up: Tensor) -> Tensor:
        """Put the four outputs of [B, 4C, H + 1, W + 1] at their pixels, with the border's bias.

        Returns:
            [B, C, 2H, 2W].
        """
        pixels = up.unflatten(1, (2, 2, -1))
        height, width = up.shape[2] - 1, up.shape[3] - 1
        out = torch.empty((len(up), 2 * height, 2 * width, pixels.shape[3]), dtype=up.dtype)
        for row, column in product((0, 1), repeat=2):
            part = pixels[:, row, column, :, row : row + height, column : column + width]
            out[:, row::2, column::2] = part.permute(0, 2, 3, 1)
        parts = (slice(0, 1), slice(1, -1), slice(-1, None))
        for row, column in product(range(3), repeat=2):
            if (row, column) != (1, 1):
                out[:, parts[row], parts[column]] += self.border[row, column]
        return out.permute(0, 3, 1, 2)


def _up_conv(kernel: Tensor, inputs: InputRange, output_step: Tensor) -> ByteConv:
    """Return a transposed 4×4 convolution, stride 2, as a 2×2 one.

    It has four outputs for each channel, one for each of the pixels that a pixel becomes.

    Args:
        kernel: [2C, C, 4, 4].
        inputs: what its input's bytes mean.
        output_step: of the C channels.
    """
    kernel = kernel.transpose(0, 1)
    taps = (
        (3, 1),
        (2, 0),
    )  # of even and of odd pixels, for the first and second of two input pixels
    pixels = [kernel[:, :, rows][..., columns] for rows in taps for columns in taps]
    zero = torch.zeros(4 * len(output_step))
    return ByteConv(
        torch.cat(pixels), zero, inputs, output_step.repeat(4), dtype=SUM_DTYPE, relu=False
    )


class ByteUNet:
    """The network of :func:`quantise`.

    Args:
        folded: with batch norms folded; it is changed.
        inputs: block or up-convolution → what the inputs of its convolutions mean.
    """

    def __init__(self, folded: UNet, inputs: dict[str, tuple[InputRange, ...]]) -> None:
        names = [f"encoder{level}" for level in range(1, LEVELS + 1)] + ["bottleneck"]
        steps = _output_steps(inputs)
        _count_in_steps(folded, steps)
        self.encoders = [
            getattr(folded, name).to(torch.bfloat16, memory_format=torch.channels_last)
            for name in names[:FLOAT_LEVELS]
        ]
        self.byte_blocks = []
        for before, name in pairwise(names[FLOAT_LEVELS - 1 :]):
            first, second = inputs[name]
            both = (first._replace(step=steps[before]), second)
            self.byte_blocks.append(ByteBlock(getattr(folded, name), both, steps[name]))
        self.joins = []
        for level in range(LEVELS, 0, -1):
            upconv, block = f"upconv{level}", f"decoder{level}"
            three = (*inputs[upconv], *inputs[block])
            self.joins.append(
                ByteJoin(getattr(folded, upconv), getattr(folded, block), three, steps.get(block))
            )
        self.conv = folded.conv.to(torch.bfloat16)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return probabilities, float32 [B, 1, H, W].

        Args:
            x: normalised float32 [B, 3, H, W], H and W multiples of 16.
        """
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


def _output_steps(inputs: dict[str, tuple[InputRange, ...]]) -> dict[str, Tensor]:
    """Return block → steps of its output, which are those of the input of what reads it.

    An encoder's output is the second half of its decoder's input: up-sampled channels, then skip.
    """
    steps = {"bottleneck": inputs[f"upconv{LEVELS}"][0].step}
    for level in range(1, LEVELS + 1):
        joined = inputs[f"decoder{level}"][0].step
        steps[f"encoder{level}"] = joined[len(joined) // 2 :]
        if level > 1:
            steps[f"decoder{level}"] = inputs[f"upconv{level - 1}"][0].step
    return steps


def _as_bytes(x: Tensor) -> Tensor:
    """Return counts of steps, at least 0, as uint8; overwrites ``x``."""
    # Only above: what comes here is behind a ReLU.
    rounded = x.clamp_(max=255).round_()
    return rounded.to(torch.int16).to(torch.uint8)  # straight from bfloat16 it takes longer


def _pooled(x: Tensor) -> Tensor:
    """Return the maximum of each 2×2 pixels.

    torch's max pooling does not take bytes.
    """
    rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _count_in_steps(folded: UNet, steps: dict[str, Tensor]) -> None:
    """Scale the weights of the bfloat16 levels in place, so that their outputs count steps."""
    for level in range(1, FLOAT_LEVELS + 1):
        block = getattr(folded, f"encoder{level}")
        first, second = block[0], block[3]
        if level > 1:
            first.weight.data *= steps[f"encoder{level - 1}"].float()[:, None, None]
        own = steps[f"encoder{level}"].float()
        second.weight.data /= own[:, None, None, None]
        second.bias.data /= own


def quantise(model: UNet, images: Tensor) -> Network:
    """Return the network with six sevenths of its multiplications in bytes.

    Args:
        model: a trained network with batch norms; it is not changed.
        images: normalised float32 [N, 3, H, W], H and W multiples of 16, that show the ranges of
            the activations: 32 or more, as different as those to come. Larger activations are
            clipped.

    Raises:
        InputError: the network has group norms, which cannot be folded into the convolutions.
    """
    if model.norm != "batch":
        raise InputError(
            "only a network with batch norms can be quantised; this one has group norms"
        )
    folded = fold_batch_norm(model).cpu().float()
    return ByteUNet(folded, _observe(folded, images))


class _RangeObserver:
    """A hook that records the range and mean of a convolution's input."""

    def __init__(self) -> None:
        self.largest, self.sum, self.count = torch.zeros(()).double(), torch.zeros(()).double(), 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels = inputs[0].transpose(0, 1).flatten(1)
        above = max(1, round(CLIPPED_FRACTION * channels.shape[1]))
        # Over all calibration images: what one of them shows must fit.
        self.largest = torch.maximum(
            self.largest, channels.abs().topk(above, dim=1).values[:, -1].double()
        )
        self.sum = self.sum + channels.double().mean(dim=1) * len(inputs[0])
        self.count += len(inputs[0])

    def result(self) -> InputRange:
        largest = torch.maximum(self.largest, self.largest.max() * SMALLEST_RANGE).clamp_min(1e-30)
        return InputRange(largest / 255, self.sum / self.count)


def _observe(folded: UNet, images: Tensor) -> dict[str, tuple[InputRange, ...]]:
    """Run the float32 network over the images and record what each convolution reads.

    Returns:
        Block or up-convolution → the input range of each of its convolutions.
    """
    observers: dict[str, list[_RangeObserver]] = {}
    hooks = []
    for name, module in folded.named_children():
        convs = [
            part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))
        ]
        observers[name] = [_RangeObserver() for _ in convs]
        hooks += [
            conv.register_forward_pre_hook(observer)
            for conv, observer in zip(convs, observers[name], strict=True)
        ]
    with torch.no_grad():
        for part in images.split(CALIBRATION_BATCH):
            folded.logits(part)
    for hook in hooks:
        hook.remove()
    return {
        name: tuple(observer.result() for observer in found) for name, found in observers.items()
    }
