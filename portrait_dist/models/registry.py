"""Networks by name.

:mod:`portrait_dist.recipes.parts` says what a name can be, and
:mod:`portrait_dist.models.contract` what a network has to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from portrait_dist.errors import InputError
from portrait_dist.models.unet import UNet
from portrait_dist.recipes import parts

BUILTIN: dict[str, parts.Factory] = {"unet": UNet}
UNET = "unet"
DOWNLOADS = {"segmentation_models_pytorch": {"encoder_weights": None}}
"""Arguments that fetch weights, and their values where a checkpoint brings the weights."""
DEFAULTS = {"segmentation_models_pytorch": {"classes": 1, "encoder_weights": None}}
"""Arguments of a library's networks where none are given: one mask, and no download."""


def build(
    name: str, args: Mapping[str, Any] | None = None, *, trust_code: bool = True
) -> nn.Module:
    """Build a network.

    Args:
        name: such as ``unet``, ``sg:pp_lite_t_seg``, ``segmentation_models_pytorch.Unet``,
            ``mypackage.models:MyNet`` or ``nets.py:MyNet``.
        args: its arguments.
        trust_code: import code that is none of a known library.

    Raises:
        InputError: there is no such network, or it refuses its arguments.
    """
    factory = parts.resolve(name, "model.name", BUILTIN, trusted=trust_code)
    found = parts.build(factory, {**_of(DEFAULTS, name), **(args or {})}, "model.name", name)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"model.name={name}: builds a {type(found).__name__}, not a torch.nn.Module"
        )
    own_memory_for_buffers(found)
    return found


def own_memory_for_buffers(network: nn.Module) -> None:
    """Copy buffers whose numbers share memory, as those of ``meshgrid``: none can be loaded."""
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or is_lazy(buffer) or buffer.layout != torch.strided:
                continue
            if 0 in buffer.stride() and buffer.numel() > 1:
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)


def args_to_rebuild(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that build a network again for the weights of a checkpoint."""
    return {**args, **_of(DOWNLOADS, name)}


def _of(by_library: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return by_library.get(name.partition(":")[0].partition(".")[0], {})
