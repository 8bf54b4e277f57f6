"""Exact rewrites of the U-Net that make inference fast: same weights, same masks, fewer operations and less memory traffic.

    network = fast.prepare(model, device)             # normalised float32 [B, 3, H, W] → probabilities float32 [B, 1, H, W]

- :func:`fold_batch_norm`: in evaluation mode a batch norm is a scale and a shift, which go into the convolution before it.
- :func:`merge_up_convolutions`: nothing non-linear stands between ``upconv`` (transposed 2×2, stride 2) and the 3×3 convolution
  of the decoder, so both are one transposed 4×4 convolution, stride 2. The concatenation disappears: the decoder's convolution
  is split into the half that reads the skip connection and the half that reads the up-sampled one, and the two are added.
  7 % fewer multiplications, and neither the up-sampled map nor the concatenated one is ever written.
- :func:`prepare`: these, then channels-last, bfloat16 where the hardware has it, and torch.compile when asked.

In exact arithmetic the rewrites change nothing; float32 results differ by about 1e-6.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from portrait_dist.models.unet import LEVELS, UNet

Network = Callable[[Tensor], Tensor]

TOLERANCE = 0.999
"""Intersection over union with float32's masks that a faster form of the network must keep."""


def fold_batch_norm(model: UNet) -> UNet:
    """A copy in evaluation mode whose batch norms are part of the convolutions before them.

    The norms' places are taken by ``nn.Identity``; with ``norm="group"`` there is nothing to fold. The copy's state dict no
    longer has the Hub model's names: keep the original for checkpoints.
    """
    folded = copy.deepcopy(model).eval()
    for block in [module for module in folded.modules() if isinstance(module, nn.Sequential)]:
        names = [name for name, _ in block.named_children()]
        for conv_name, norm_name in pairwise(names):
            conv, norm = getattr(block, conv_name), getattr(block, norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(block, conv_name, torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
                setattr(block, norm_name, nn.Identity())
    return folded


class UpJoin(nn.Module):
    """``conv(cat(upconv(x), skip))`` without the concatenation and without the up-sampled map.

    Args:
        upconv: transposed 2×2 convolution, stride 2, 2C → C channels, with bias.
        conv: 3×3 convolution, padding 1, 2C → C' channels; its first C input channels read ``upconv``'s output.

    Shape:
        x [B, 2C, H, W], skip [B, C, 2H, 2W] → [B, C', 2H, 2W].
    """

    bias: Tensor

    def __init__(self, upconv: nn.ConvTranspose2d, conv: nn.Conv2d) -> None:
        super().__init__()
        middle = upconv.out_channels
        up_half, skip_half = (
            conv.weight.detach().double().split([middle, conv.in_channels - middle], dim=1)
        )
        self.up = nn.ConvTranspose2d(
            upconv.in_channels, conv.out_channels, 4, stride=2, padding=1, bias=False
        )
        self.skip = nn.Conv2d(
            conv.in_channels - middle, conv.out_channels, 3, padding=1, bias=False
        )
        self.up.weight.data = compose(upconv.weight.detach().double(), up_half).to(
            conv.weight.dtype
        )
        self.skip.weight.data = skip_half.to(conv.weight.dtype)
        self.register_buffer("bias", border_bias(upconv, up_half, conv).to(conv.weight.dtype))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.skip(skip) + (self.up(x) + self._bias_map(skip.shape[-2], skip.shape[-1]))

    def _bias_map(self, height: int, width: int) -> Tensor:
        """The bias at each pixel, [1, C', height, width], channels-last."""
        top, middle, bottom = self.bias.split(1, dim=1)
        rows = torch.cat((top, middle.expand(-1, height - 2, -1), bottom), dim=1)
        left, centre, right = rows.split(1, dim=2)
        full = torch.cat((left, centre.expand(-1, -1, width - 2), right), dim=2)
        return full[None].contiguous(memory_format=torch.channels_last)


def compose(up: Tensor, conv: Tensor) -> Tensor:
    """Weight [I, O, 4, 4] of the transposed convolution that does ``up`` [I, M, 2, 2], stride 2, and then ``conv`` [O, M, 3, 3].

    Input pixel i reaches up-sampled pixels 2i + a, and tap k of the 3×3 convolution carries up-sampled pixel u to output pixel
    u + 1 - k; with padding 1 that is index a + 2 - k of the 4×4 kernel.
    """
    weight = up.new_zeros(up.shape[0], conv.shape[0], 4, 4)
    for row in range(3):
        for column in range(3):
            reached = torch.einsum("imab,om->ioab", up, conv[:, :, row, column])
            weight[:, :, 2 - row : 4 - row, 2 - column : 4 - column] += reached
    return weight


def border_bias(upconv: nn.ConvTranspose2d, up_half: Tensor, conv: nn.Conv2d) -> Tensor:
    """Bias [O, 3, 3] at the first, an inner and the last row, by the first, an inner and the last column.

    ``upconv``'s bias is not there in the zero padding around the up-sampled map, so fewer taps see it at the border.
    """
    inside = torch.tensor(
        [[0, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=torch.float64, device=up_half.device
    )  # [place, tap]
    bias = torch.zeros(upconv.out_channels) if upconv.bias is None else upconv.bias.detach()
    seen = torch.einsum("omkl,m,yk,xl->oyx", up_half, bias.to(up_half), inside, inside)
    return seen if conv.bias is None else seen + conv.bias.detach().double()[:, None, None]


class MergedUNet(nn.Module):
    """A U-Net whose decoder levels begin with :class:`UpJoin`; otherwise the modules of the given one."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        source = copy.deepcopy(model).eval()
        self.encoders = nn.ModuleList(
            getattr(source, f"encoder{level}") for level in range(1, LEVELS + 1)
        )
        self.bottleneck = source.bottleneck
        self.joins, self.decoders = nn.ModuleList(), nn.ModuleList()
        for level in range(LEVELS, 0, -1):
            decoder = getattr(source, f"decoder{level}")
            self.joins.append(UpJoin(getattr(source, f"upconv{level}"), decoder[0]))
            self.decoders.append(decoder[1:])
        self.conv = source.conv
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, out_channels, H, W] of normalised pictures [B, in_channels, H, W]."""
        skips = []
        for encoder in self.encoders:
            skips.append(encoder(x))
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = self.bottleneck(x)
        for join, decoder in zip(self.joins, self.decoders, strict=True):
            x = decoder(join(x, skips.pop()))
        logits: Tensor = self.conv(x)
        return logits


def merge_up_convolutions(model: UNet) -> MergedUNet:
    """A copy in evaluation mode that returns logits, without up-sampled maps and concatenations. Fold batch norms first."""
    return MergedUNet(model)


def pick_precision(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Data type of weights and activations.

    Args:
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the hardware multiplies it (GPUs from compute capability 8.0, CPUs
            with AVX512-BF16 or AMX), else fp32.
    """
    if precision == "auto":
        if device.type == "cuda":
            return (
                torch.bfloat16
                if torch.cuda.get_device_capability(device) >= (8, 0)
                else torch.float32
            )
        return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def cpu_multiplies_bf16() -> bool:
    """Does this CPU have AVX512-BF16 or AMX? Without them bfloat16 is emulated, slower than float32."""
    capability: Callable[[], dict[str, bool]] | None = getattr(torch.cpu, "get_capabilities", None)
    if capability is not None:
        found = capability()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prepare(
    model: UNet,
    device: torch.device | str,
    precision: str = "auto",
    compile: bool | str = "auto",
    batch_shape: tuple[int, int, int, int] | None = None,
) -> Network:
    """The network as a fast function for inference; ``model`` itself is not changed.

    Args:
        precision: see :func:`pick_precision`. bf16 keeps masks equal to fp32 within ``TOLERANCE`` (tests/test_fast.py).
        compile: use torch.compile with frozen weights. It costs 20 to 60 seconds at the first batch and gains about a tenth on
            a CPU, so that it pays from several thousand pictures on; on a GPU (max-autotune, CUDA graphs) it pays sooner.
            ``auto`` means no, so that the first picture comes at once.
        batch_shape: (B, 3, H, W): compile for it now instead of at the first batch. Other shapes compile again.

    Returns:
        A function from normalised float32 [B, 3, H, W], H and W multiples of 16, on any device, to probabilities, float32
        [B, 1, H, W] on ``device``.
    """
    device = torch.device(device)
    dtype = pick_precision(device, precision)
    merged = merge_up_convolutions(fold_batch_norm(model)).to(
        device, dtype, memory_format=torch.channels_last
    )  # type: ignore[call-overload]
    logits: Network = merged
    if compile is True:
        logits = torch.compile(merged, options=_compile_options(device))

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        x = x.to(device, dtype, memory_format=torch.channels_last, non_blocking=True)
        return torch.sigmoid(logits(x).float())

    if batch_shape is not None:
        run(torch.zeros(batch_shape))
    return run


@torch.no_grad()
def masks_of(network: Network, pictures: Tensor, batch_size: int = 4) -> Tensor:
    """Where the probability is above 0.5: bool [N, 1, H, W] of normalised float32 [N, 3, H, W]."""
    return torch.cat([network(part) > 0.5 for part in pictures.split(batch_size)])


def agreement(masks: Tensor, others: Tensor) -> float:
    """Intersection over union of two sets of masks, over all pixels of all pictures; 1 where all are empty."""
    either = int((masks | others).sum())
    return int((masks & others).sum()) / either if either else 1.0


def _compile_options(device: torch.device) -> dict[str, Any]:
    options: dict[str, Any] = {"freezing": True}
    if device.type == "cuda":
        options |= {"max_autotune": True, "triton.cudagraphs": True}
    return options
