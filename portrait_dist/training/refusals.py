"""Settings that this device or this network cannot have, refused by name before anything starts."""

from __future__ import annotations

import torch
from torch import nn

from portrait_dist import distributed
from portrait_dist.config import Config
from portrait_dist.errors import InputError


def check_device(config: Config, device: torch.device) -> None:
    """Compare the settings with what this rank's device can do.

    Raises:
        InputError: SyncBatchNorm on a CPU, or bf16 on a GPU that only emulates it.
    """
    if config.train.sync_bn and device.type == "cpu":
        raise InputError(
            "train.sync_bn=true: torch has SyncBatchNorm for GPUs only; on CPUs use "
            "model.norm=group"
        )
    if config.train.precision != "bf16" or device.type != "cuda":
        return
    if torch.cuda.is_bf16_supported(including_emulation=False):  # of the current device: this one
        return
    major, minor = torch.cuda.get_device_capability(device)
    raise InputError(
        f"train.precision=bf16: {torch.cuda.get_device_name(device)} (compute capability "
        f"{major}.{minor}) only emulates bf16, slower than fp32; use train.precision=fp32"
    )


def check_network(config: Config, network: nn.Module, device: torch.device) -> None:
    """Compare the settings and this rank's device with the layers of a network.

    Raises:
        InputError: SyncBatchNorm for a network without batch normalisation, or in one that ranks
            train on CPUs.
    """
    if (
        device.type == "cpu"
        and distributed.is_initialized()
        and any(isinstance(one, nn.SyncBatchNorm) for one in network.modules())
    ):
        raise InputError(
            f"model.name={config.model.name}: has SyncBatchNorm, which torch computes on GPUs "
            "only; train it there, in one process, or with other layers"
        )
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    if config.train.sync_bn and not any(isinstance(one, norms) for one in network.modules()):
        kind = f"model.norm={config.model.norm}" if config.model.name == "unet" else "this network"
        raise InputError(
            f"train.sync_bn=true shares batch statistics over the ranks, and {kind} has none; "
            "leave train.sync_bn out"
        )
