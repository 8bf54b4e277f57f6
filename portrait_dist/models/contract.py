"""What a network must be, whoever wrote it, and the check for it.

1. It is a ``torch.nn.Module``. Its input is one tensor, float32 [B, 3, H, W]: RGB, normalised with
   :data:`portrait_dist.preprocessing.MEAN` and ``STD``.
2. Its output is one mask, float [B, 1, h, w] (or [B, h, w]): *logits*, or *probabilities* from 0 to
   1. Which of them is measured where ``model.output=auto``, and printed before training. A mask
   smaller than the image is enlarged to it, bilinearly.
3. In place of the tensor it may return a tuple or list whose first entry is that mask, or a dict
   with it under ``out``, ``logits``, ``mask`` or ``pred`` (else its first entry). The other masks
   are *auxiliary outputs*: in training the loss of each is added with ``loss.aux_weight``;
   otherwise they are ignored.
4. It takes images of the size of training in batches of any number, in training and in evaluation.
   What other sizes it takes is measured: multiples of 16, of 32, or none; and whether it takes
   images in channels-last memory, which ``view`` in a ``forward`` may refuse. One that does not
   gets none.
5. It learns: the mask in training depends on weights that have gradients, none of them sparse, and
   has gradients itself. It can be copied, and its parameters have their shapes from the beginning.
6. Its initial weights follow from torch's global seed, and evaluation is a function of the image.
   Only a network without batch statistics gives the same training on any number of ranks.

A network whose ``forward`` has ``return_logits``, as :class:`portrait_dist.models.UNet`, is asked
for the form that is wanted, without a conversion.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portrait_dist.errors import InputError, kind_and_message

Output = Literal["logits", "probabilities"]
MAIN_NAMES = ("out", "logits", "mask", "pred")
STRIDES = (16, 32)
"""Strides that the check tries; 0 stands for a network that takes one size only."""
CHECKED_IMAGES = 2
"""Images of the check's training batch at most: enough for batch statistics, and cheap."""
SMALLEST_PROBABILITY = 1e-6
"""Probabilities are kept so far from 0 and 1 where a loss wants logits."""
STRONG = 100.0
"""Factor of the check's second input: what is a probability stays within 0 and 1 for it too."""


@dataclass(frozen=True)
class Masks:
    """A network's output.

    Attributes:
        main: float [B, 1, H, W].
        auxiliary: the same each; empty outside of training.
    """

    main: Tensor
    auxiliary: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Contract:
    """What is known of a network.

    Attributes:
        output: what it gives.
        stride: height and width are multiples of it; 0: only the size of training.
        channels_last: whether it takes images and weights in channels-last memory.
    """

    output: Output = "logits"
    stride: int = 0
    channels_last: bool = True

    def laid_out(self, images: Tensor) -> Tensor:
        """Return images [B, 3, H, W] in a memory format that the network takes."""
        return images if self.channels_last else images.contiguous()

    def read(self, raw: object, size: tuple[int, int], *, logits: bool, training: bool) -> Masks:
        """Read what a network returned.

        Args:
            raw: its return value.
            size: (H, W) of its input.
            logits: give logits, else probabilities.
            training: keep auxiliary outputs.

        Raises:
            InputError: it is no mask.
        """
        main, *others = masks_in(raw)
        read = [self._as_wanted(_enlarged(main, size), logits)]
        if training:
            read += [self._as_wanted(_enlarged(one, size), logits) for one in others]
        return Masks(read[0], tuple(read[1:]))

    def _as_wanted(self, mask: Tensor, logits: bool) -> Tensor:
        if logits == (self.output == "logits"):
            return mask
        return mask.logit(eps=SMALLEST_PROBABILITY) if logits else torch.sigmoid(mask)


def masks_in(raw: object) -> list[Tensor]:
    """Return all masks of a network's output as [B, 1, h, w], the main one first.

    Raises:
        InputError: there is none, or one of another shape.
    """
    if isinstance(raw, Mapping):
        names = sorted(raw, key=lambda name: name not in MAIN_NAMES)  # stable: the rest as it is
        raw = [raw[name] for name in names]
    if isinstance(raw, Tensor):
        raw = [raw]
    if not isinstance(raw, (tuple, list)) or not raw:
        raise InputError(f"it returns {type(raw).__name__}, not a mask [B, 1, H, W]")
    return [_as_mask(one) for one in raw if one is not None]


def _as_mask(one: object) -> Tensor:
    if isinstance(one, Tensor) and one.ndim == 3:
        one = one.unsqueeze(1)
    if not isinstance(one, Tensor) or one.ndim != 4 or one.shape[1] != 1:
        found = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
        raise InputError(f"it returns {found}, not a mask with one channel, [B, 1, H, W]")
    if not one.is_floating_point():
        raise InputError(f"it returns {one.dtype}, not logits or probabilities of floating point")
    return one


def _enlarged(mask: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(mask.shape[-2:]) == size:
        return mask
    return F.interpolate(mask, size, mode="bilinear", align_corners=False)


def speaks_logits(network: nn.Module) -> bool:
    """Whether a network's ``forward`` has ``return_logits``, and gives probabilities otherwise."""
    return "return_logits" in inspect.signature(network.forward).parameters


class MaskNetwork(nn.Module):
    """Any network behind the U-Net's interface, for everything that comes after training.

    Args:
        network: of any class.
        contract: what is known of it.
    """

    def __init__(self, network: nn.Module, contract: Contract) -> None:
        super().__init__()
        self.network, self.contract = network, contract

    @property
    def stride(self) -> int:
        """Height and width are multiples of it; 0: only the size of training."""
        return self.contract.stride

    def forward(self, x: Tensor, return_logits: bool = False) -> Tensor:
        """Return probabilities or logits, [B, 1, H, W], of images [B, 3, H, W]."""
        size = (x.shape[-2], x.shape[-1])
        raw = self.network(self.contract.laid_out(x))
        return self.contract.read(raw, size, logits=return_logits, training=False).main


def check(
    network: nn.Module,
    size: tuple[int, int],
    batch_size: int = CHECKED_IMAGES,
    *,
    name: str = "",
    output: str = "auto",
) -> Contract:
    """Pass noise of the real size through a copy of a network, and see what comes out.

    In training gradients come back too, for some networks break there only. The network itself, its
    statistics and torch's random state stay as they were.

    Args:
        network: to check.
        size: (H, W) of the training images.
        batch_size: samples of a training batch; at most 2 are tried.
        name: of the network, for messages.
        output: ``logits``, ``probabilities``, or ``auto``: measured.

    Raises:
        InputError: it breaks the contract; one line says where.
    """
    where = f"model.name={name or type(network).__name__}"
    if not isinstance(network, nn.Module):
        raise InputError(f"{where}: it is no torch.nn.Module")
    with torch.random.fork_rng(devices=[]):
        images = torch.randn(
            min(batch_size, CHECKED_IMAGES), 3, *size, generator=torch.Generator().manual_seed(0)
        )
        tried = _copied(network, where)
        before = _shapes(tried, where)
        _learn(tried.train(), images, f"{where}, in training")
        if changed := sorted(dict(_shapes(tried, where).items() - before.items())):
            raise InputError(
                f"{where}: '{changed[0]}' has another shape after a step, which checkpoints and "
                "the average of the weights cannot follow"
            )
        with torch.no_grad():
            masks = [_try(tried.eval(), images[:1] * by, where)[0] for by in (1.0, STRONG)]
            found = _output_of(masks, where, output)
            stride = _stride_of(tried, size)
            return Contract(found, stride, _takes_channels_last(tried.train(), images))


def _copied(network: nn.Module, where: str) -> nn.Module:
    """Return a copy on the CPU."""
    weights = [*network.parameters(), *network.buffers()]
    if any(nn.parameter.is_lazy(one) for one in weights):
        raise InputError(
            f"{where}: has lazy layers, whose weights have no shape before the first image; give "
            "their numbers of channels"
        )
    try:
        own = copy.deepcopy(network).cpu()
        own.requires_grad_(requires_grad=False)  # as that of the average
        for one, original in zip(own.parameters(), network.parameters(), strict=True):
            one.requires_grad_(original.requires_grad)
    except Exception as error:  # anybody's code
        raise InputError(
            f"{where}: cannot be copied ({kind_and_message(error)}), as the "
            "average of its weights is"
        ) from error
    for module in own.modules():
        if isinstance(module, nn.SyncBatchNorm):  # of a GPU's ranks, and this is one CPU
            module.__class__ = _BatchNorm  # type: ignore[assignment]
    return own


def _shapes(network: nn.Module, where: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all that a checkpoint holds of a network."""
    try:
        state = network.state_dict()
    except Exception as error:  # anybody's code
        raise InputError(f"{where}: has no state_dict ({kind_and_message(error)})") from error
    if other := next((name for name, one in state.items() if not isinstance(one, Tensor)), None):
        raise InputError(
            f"{where}: '{other}' of its state_dict is no tensor (get_extra_state); keep it in a "
            "buffer"
        )
    return {name: tuple(one.shape) for name, one in state.items()}


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of any number of dimensions, as SyncBatchNorm is."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _learn(network: nn.Module, images: Tensor, where: str) -> None:
    """Pass images forth and gradients back."""
    with torch.enable_grad():
        masks = _try(network, images, where)
        if not masks[0].requires_grad:
            raise InputError(
                f"{where}: its mask depends on no weight that learns; are all of them frozen, or "
                "is the mask detached?"
            )
        try:
            sums = [mask.float().sum() for mask in masks if mask.requires_grad]
            torch.stack(sums).sum().backward()
        except Exception as error:  # anybody's code
            raise InputError(f"{where}: has no gradient ({kind_and_message(error)})") from error
    gradients = (weight.grad for weight in network.parameters() if weight.grad is not None)
    if any(gradient.layout != torch.strided for gradient in gradients):
        raise InputError(f"{where}: gives sparse gradients; build its embeddings with sparse=False")
    network.zero_grad()


def _try(network: nn.Module, images: Tensor, where: str) -> list[Tensor]:
    """Return all masks, [B, 1, h, w] each, the main one first."""
    shape = "×".join(map(str, images.shape))
    try:
        masks = masks_in(network(images))
    except InputError as error:
        raise InputError(f"{where}: {error}; see docs/networks.md") from error
    except Exception as error:  # anybody's code
        raise InputError(
            f"{where}: fails for images {shape} ({kind_and_message(error)}); "
            "see docs/networks.md, or pack another --size"
        ) from error
    main = masks[0]
    if len(main) != len(images):
        raise InputError(f"{where}: {len(main)} masks for {len(images)} images")
    if not main.numel():
        raise InputError(f"{where}: its mask has no pixels, {tuple(main.shape)}")
    if main.device != images.device:
        raise InputError(f"{where}: its mask is on {main.device}, the images are not")
    return masks


def _output_of(masks: list[Tensor], where: str, wanted: str) -> Output:
    if not masks[0].isfinite().all():
        raise InputError(f"{where}: its mask is not finite for an image of noise")
    outside = any(bool((mask < 0).any() or (mask > 1).any()) for mask in masks)
    if wanted == "probabilities" and outside:
        raise InputError(
            f"{where}: model.output=probabilities, but it gives values outside of 0 to 1"
        )
    if wanted == "auto":
        return "logits" if outside else "probabilities"
    return "logits" if wanted == "logits" else "probabilities"


def _stride_of(network: nn.Module, size: tuple[int, int]) -> int:
    for stride in STRIDES:
        if any(side % stride for side in size):
            continue
        try:
            for more in ((stride, 0), (0, stride)):
                masks_in(network(torch.zeros(1, 3, size[0] + more[0], size[1] + more[1])))
        except Exception:  # anybody's code: it does not take this size
            continue
        return stride
    return 0


def _takes_channels_last(network: nn.Module, images: Tensor) -> bool:
    """Whether it does; the network is left with such weights."""
    try:
        masks_in(
            network.to(memory_format=torch.channels_last)(
                images.contiguous(memory_format=torch.channels_last)
            )
        )
    except Exception:  # anybody's code, and it has taken these images otherwise
        return False
    return True
