"""Exact rewrites of the U-Net for inference: same weights and masks, less arithmetic and traffic.

    network = fused.for_inference(model, device)
    probabilities = network(x)         # normalised float32 [B, 3, H, W] → float32 [B, 1, H, W]

- :func:`fold_batch_norm`: in evaluation mode a batch norm is a scale and a shift, which go into the
convolution before it. - :func:`merge_up_convolutions`: nothing non-linear stands between ``upconv``
(transposed 2×2, stride 2) and the 3×3 convolution
  of the decoder, so both are one transposed 4×4 convolution, stride 2. The concatenation
  disappears: the decoder's convolution is split into the half that reads the skip connection and
  the half that reads the up-sampled one, and the two are added. 7 % fewer multiplications, and
  neither the up-sampled map nor the concatenated one is ever written.
- :func:`for_inference`: these, then channels-last, bfloat16 where the hardware has it, and
torch.compile when asked.

In exact arithmetic the rewrites change nothing; float32 results differ by about 1e-6.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from portrait_dist.models.contract import MaskNetwork
from portrait_dist.models.unet import LEVELS, UNet

CompileOptions = dict[str, str | int | bool | Callable[..., Any]]
Network = Callable[[Tensor], Tensor]

MIN_MASK_IOU = 0.999
"""Intersection over union with float32's masks that a faster form of the network must keep."""


def fold_batch_norm(model: UNet) -> UNet:
    """Return a copy in evaluation mode whose batch norms are part of the convolutions before them.

    ``nn.Identity`` stands where a norm was; with ``norm="group"`` there is nothing to fold. The
    copy's state dict no longer has the Hub model's names: keep the original for checkpoints.
    """
    # A copy: the checkpoint keeps the names and weights of training.
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
        conv: 3×3 convolution, padding 1, 2C → C' channels; its first C input channels read
            ``upconv``'s output.

    Shape:
        x [B, 2C, H, W], skip [B, C, 2H, 2W] → [B, C', 2H, 2W].
    """

    bias: Tensor

    def __init__(self, upconv: nn.ConvTranspose2d, conv: nn.Conv2d) -> None:
        super().__init__()
        # Computed in float64, so that the merged weights are rounded once.
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
        self.up.weight.data = compose_kernels(upconv.weight.detach().double(), up_half).to(
            conv.weight.dtype
        )
        self.skip.weight.data = skip_half.to(conv.weight.dtype)
        self.register_buffer("bias", border_bias(upconv, up_half, conv).to(conv.weight.dtype))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.skip(skip) + (self.up(x) + self._bias_map(skip.shape[-2], skip.shape[-1]))

    def _bias_map(self, height: int, width: int) -> Tensor:
        """Return the bias at each pixel, [1, C', height, width], channels-last."""
        top, middle, bottom = self.bias.split(1, dim=1)
        rows = torch.cat((top, middle.expand(-1, height - 2, -1), bottom), dim=1)
        left, centre, right = rows.split(1, dim=2)
        full = torch.cat((left, centre.expand(-1, -1, width - 2), right), dim=2)
        return full[None].contiguous(memory_format=torch.channels_last)


def compose_kernels(up: Tensor, conv: Tensor) -> Tensor:
    """Return the kernel of the one transposed convolution that does two convolutions.

    Args:
        up: [I, M, 2, 2], transposed, stride 2.
        conv: [O, M, 3, 3], applied to what ``up`` gives.

    Returns:
        [I, O, 4, 4], transposed, stride 2.
    """
    # Input pixel i reaches up-sampled pixels 2i + a, and tap k of the 3×3 convolution carries
    # up-sampled pixel u to output pixel u + 1 - k; with padding 1 that is index a + 2 - k of the
    # 4×4 kernel.
    weight = up.new_zeros(up.shape[0], conv.shape[0], 4, 4)
    for row in range(3):
        for column in range(3):
            reached = torch.einsum("imab,om->ioab", up, conv[:, :, row, column])
            weight[:, :, 2 - row : 4 - row, 2 - column : 4 - column] += reached
    return weight


def border_bias(upconv: nn.ConvTranspose2d, up_half: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return the bias [O, 3, 3] at the first, an inner and the last row, by column likewise.

    The zero padding around the up-sampled map lacks ``upconv``'s bias, so fewer taps see it at the
    border.
    """
    inside = torch.tensor(
        [[0, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=torch.float64, device=up_half.device
    )  # [position, tap]
    bias = torch.zeros(upconv.out_channels) if upconv.bias is None else upconv.bias.detach()
    seen = torch.einsum("omkl,m,yk,xl->oyx", up_half, bias.to(up_half), inside, inside)
    return seen if conv.bias is None else seen + conv.bias.detach().double()[:, None, None]


class MergedUNet(nn.Module):
    """The modules of a U-Net, except that its decoder levels begin with :class:`UpJoin`."""

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
        """Return logits [B, out_channels, H, W] of normalised images [B, in_channels, H, W]."""
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
    """Return a copy for evaluation that gives logits; fold batch norms first."""
    return MergedUNet(model)


def pick_precision(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Choose the data type of weights and activations.

    Args:
        device: where the network runs.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the hardware multiplies it (GPUs from
            compute capability 8.0, CPUs with AVX512-BF16 or AMX), else fp32.
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
    """Return whether this CPU has AVX512-BF16 or AMX; else bf16 is emulated, slower than fp32."""
    capability: Callable[[], dict[str, bool]] | None = getattr(torch.cpu, "get_capabilities", None)
    if capability is not None:
        found = capability()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def for_inference(
    model: UNet | MaskNetwork,
    device: torch.device | str,
    precision: str = "auto",
    compile: bool | str = "auto",
    batch_shape: tuple[int, int, int, int] | None = None,
) -> Network:
    """Return the network as a fast function for inference; ``model`` itself is not changed.

    Args:
        model: in any mode. Of another network than the U-Net nothing is rewritten: it runs as it
            is, in fp32 where ``precision`` is ``auto``, because nobody has compared its masks.
        device: where it runs.
        precision: see :func:`pick_precision`. bf16 keeps the masks of fp32 within ``MIN_MASK_IOU``.
        compile: use torch.compile with frozen weights: 20 to 60 seconds at the first batch for
            about a tenth on a CPU, more on a GPU. ``auto`` means no: the first mask comes at once.
        batch_shape: (B, 3, H, W): compile for it now instead of at the first batch. Other shapes
            compile again.

    Returns:
        A function from normalised float32 [B, 3, H, W], H and W multiples of 16, on any device, to
        probabilities, float32 [B, 1, H, W] on ``device``.
    """
    device = torch.device(device)
    if isinstance(model, MaskNetwork):
        return _as_it_is(model, device, bf16=precision == "bf16", compile=compile is True)
    dtype = pick_precision(device, precision)
    logits = _rewritten(model, device, dtype, compile=compile is True)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        x = x.to(device, dtype, memory_format=torch.channels_last, non_blocking=True)
        # The sigmoid in float32: bfloat16 has 8 bits, and near 1 steps of 0.004.
        return torch.sigmoid(logits(x).float())

    if batch_shape is not None:
        run(torch.zeros(batch_shape))
    return run


def _rewritten(model: UNet, device: torch.device, dtype: torch.dtype, *, compile: bool) -> Network:
    """Return a function to logits: batch norms folded, up-convolutions merged, channels last."""
    merged = merge_up_convolutions(fold_batch_norm(model)).to(
        device, dtype, memory_format=torch.channels_last
    )  # type: ignore[call-overload]
    return torch.compile(merged, options=_compile_options(device)) if compile else merged


def _as_it_is(model: MaskNetwork, device: torch.device, *, bf16: bool, compile: bool) -> Network:
    own = copy.deepcopy(model).eval().to(device)
    if compile:
        own.compile()

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            # Autocast, not converted weights: a foreign network may compute in float32 on purpose.
            logits = own(x.to(device, non_blocking=True), return_logits=True)
        return torch.sigmoid(logits.float())

    return run


@torch.no_grad()
def binary_masks(network: Network, images: Tensor, batch_size: int = 4) -> Tensor:
    """Return where the probability is above 0.5.

    Args:
        network: of :func:`for_inference`, or a model.
        images: normalised float32 [N, 3, H, W].
        batch_size: images that are computed at a time.

    Returns:
        bool [N, 1, H, W].
    """
    return torch.cat([network(part) > 0.5 for part in images.split(batch_size)])


def mask_iou(masks: Tensor, others: Tensor) -> float:
    """Return the intersection over union of two sets of masks, pixels pooled; 1 if all empty."""
    either = int((masks | others).sum())
    return int((masks & others).sum()) / either if either else 1.0


def _compile_options(device: torch.device) -> CompileOptions:
    options: CompileOptions = {"freezing": True}
    if device.type == "cuda":
        options |= {"max_autotune": True, "triton.cudagraphs": True}
    return options
