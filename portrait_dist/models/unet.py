"""The U-Net of PyTorch Hub's ``mateuszbuda/brain-segmentation-pytorch``: names and forward.

Four levels down, a bottleneck, four levels up with skip connections; two 3×3 convolutions a level.
With 3 input channels, 1 output channel and 32 features it has 7,763,041 parameters and needs 24.1
GFLOP for a 256×256 image.

Reference:
    Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image
    Segmentation", MICCAI 2015. Buda, Saha and Mazurowski, "Association of genomic subtypes of
    lower-grade gliomas with shape features automatically extracted by a deep learning algorithm",
    Computers in Biology and Medicine 109, 2019 (the Hub model).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from portrait_dist.errors import InputError

LEVELS = 4
STRIDE = 2**LEVELS
"""Height and width of the input are multiples of this many pixels."""


def stored_settings(
    in_channels: int = 3, out_channels: int = 1, init_features: int = 32, norm: str = "batch"
) -> dict[str, int | str]:
    """Return the arguments of :class:`UNet` that a checkpoint stores, as plain values.

    The channels of input and output are stored only where they are not the default, so that the
    checkpoints of photos and masks keep the content they always had.
    """
    channels = {"in_channels": (in_channels, 3), "out_channels": (out_channels, 1)}
    other = {name: value for name, (value, default) in channels.items() if value != default}
    return {**other, "init_features": init_features, "norm": norm}


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    raise InputError(f"norm={kind}: it is batch or group")


def _block(name: str, in_channels: int, channels: int, norm: str) -> nn.Sequential:
    """Build twice 3×3 convolution, normalisation and ReLU.

    ``name`` stands before each layer's name in the state dict.
    """
    block = nn.Sequential()
    for i, fan_in in ((1, in_channels), (2, channels)):
        block.add_module(
            f"{name}conv{i}", nn.Conv2d(fan_in, channels, kernel_size=3, padding=1, bias=False)
        )
        block.add_module(f"{name}norm{i}", _norm(norm, channels))
        block.add_module(f"{name}relu{i}", nn.ReLU(inplace=True))
    return block


class UNet(nn.Module):
    """U-Net whose state dict is that of the PyTorch Hub model.

    Args:
        in_channels: channels of the image.
        out_channels: masks to predict.
        init_features: channels of the first level; each level down has twice as many.
        norm: ``batch`` (the Hub model's) or ``group`` (up to 8 groups; no statistics shared across
            samples or kept for inference; the names stay, the running statistics are absent).

    Shape:
        input [B, in_channels, H, W] with H and W multiples of 16, output [B, out_channels, H, W].

    Raises:
        InputError: an argument, or the input's height or width, is wrong.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        init_features: int = 32,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.init_features, self.norm = init_features, norm
        if min(in_channels, out_channels, init_features) < 1:
            raise InputError(f"{self.settings}: a network has at least 1 channel")
        channels = [init_features * 2**level for level in range(LEVELS + 1)]
        # Modules are made in the Hub model's order, so that a seed gives the same initial weights
        # there and here.
        for level, (fan_in, width) in enumerate(
            zip([in_channels, *channels], channels[:-1], strict=False), start=1
        ):
            self.add_module(f"encoder{level}", _block(f"enc{level}", fan_in, width, norm))
            self.add_module(f"pool{level}", nn.MaxPool2d(kernel_size=2, stride=2))
        self.bottleneck = _block("bottleneck", channels[-2], channels[-1], norm)
        for level in range(LEVELS, 0, -1):
            width = channels[level - 1]
            self.add_module(
                f"upconv{level}", nn.ConvTranspose2d(2 * width, width, kernel_size=2, stride=2)
            )
            self.add_module(f"decoder{level}", _block(f"dec{level}", 2 * width, width, norm))
        self.conv = nn.Conv2d(init_features, out_channels, kernel_size=1)

    @property
    def stride(self) -> int:
        """Height and width of the input are multiples of it."""
        return STRIDE

    def logits(self, x: Tensor) -> Tensor:
        """Return the output before the sigmoid, from which a loss is stable in low precision."""
        if x.shape[-2] % STRIDE or x.shape[-1] % STRIDE:
            raise InputError(
                f"height and width must be multiples of {STRIDE}, not {x.shape[-2]}×{x.shape[-1]}"
            )
        skips = []
        for level in range(1, LEVELS + 1):
            x = getattr(self, f"encoder{level}")(x)
            skips.append(x)
            x = getattr(self, f"pool{level}")(x)
        x = self.bottleneck(x)
        for level in range(LEVELS, 0, -1):
            x = getattr(self, f"upconv{level}")(x)
            x = getattr(self, f"decoder{level}")(torch.cat((x, skips.pop()), dim=1))
        logits: Tensor = self.conv(x)
        return logits

    def forward(self, x: Tensor, return_logits: bool = False) -> Tensor:
        """Return probabilities, as the Hub model does, or with ``return_logits`` the logits."""
        logits = self.logits(x)
        return logits if return_logits else torch.sigmoid(logits)

    @property
    def settings(self) -> dict[str, int | str]:
        """Arguments that build this network again, ``UNet(**settings)``; checkpoints store them."""
        return stored_settings(self.in_channels, self.out_channels, self.init_features, self.norm)
