"""Settings that a device or a network cannot have are refused by name, the run folder untouched."""

from __future__ import annotations

import pytest
import torch

from portrait_dist import config
from portrait_dist.errors import InputError
from portrait_dist.models import UNet
from portrait_dist.training import refusals

CPU = torch.device("cpu")


def settings(*keys: str) -> config.Config:
    return config.load(None, ["data.shards=shards", *keys])


def test_sync_bn_is_refused_where_there_is_nothing_to_share() -> None:
    with pytest.raises(InputError, match=r"train\.sync_bn=true: torch has SyncBatchNorm for GPUs"):
        refusals.check_device(settings("train.sync_bn=true"), torch.device("cpu"))
    group = settings("train.sync_bn=true", "model.norm=group")
    with pytest.raises(InputError, match=r"and model\.norm=group has none"):
        refusals.check_network(group, UNet(init_features=2, norm="group"), CPU)
    named = settings("train.sync_bn=true", "model.name=torch.nn.Conv2d")
    with pytest.raises(InputError, match="and this network has none"):
        refusals.check_network(named, torch.nn.Conv2d(3, 1, 1), CPU)
    refusals.check_network(settings("train.sync_bn=true"), UNet(init_features=2), CPU)
    refusals.check_network(settings("model.norm=group"), UNet(init_features=2, norm="group"), CPU)


def test_ranks_on_cpus_refuse_a_network_with_syncbatchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.SyncBatchNorm(1))
    refusals.check_network(settings("model.name=nets.py:Net"), network, CPU)  # alone
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(InputError, match=r"model\.name=nets\.py:Net: has SyncBatchNorm"):
        refusals.check_network(settings("model.name=nets.py:Net"), network, CPU)
    refusals.check_network(settings("model.name=nets.py:Net"), network, torch.device("cuda"))


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_refused_on_a_gpu_that_only_emulates_it(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's answers are a V100's: there is no GPU here."""
    asked: list[bool] = []

    def is_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation or supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    half, gpu = settings("train.precision=bf16"), torch.device("cuda", 0)
    if supported:
        refusals.check_device(half, gpu)
    else:
        with pytest.raises(InputError, match=r"bf16: Tesla V100 \(compute capability 7.0\) only"):
            refusals.check_device(half, gpu)
    assert asked == [False]
    refusals.check_device(settings("train.precision=fp32"), gpu)
    refusals.check_device(half, torch.device("cpu"))
