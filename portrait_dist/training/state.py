"""What a checkpoint holds beyond SuperGradients' entries: metadata, random states, sums."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import nn
from torchmetrics import MetricCollection

from portrait_dist import distributed
from portrait_dist.preprocessing import DEFAULT_ASPECT
from portrait_dist.training.device_batches import TensorBatch, tensors_in
from portrait_dist.training.loop import LossMeter

FORMAT = 1


class NetworkMetadata(TypedDict):
    """Which network a checkpoint holds: its class, and the arguments that build it, if known."""

    network: str
    model: NotRequired[dict[str, Any]]


class ImageMetadata(TypedDict, total=False):
    """What the training images are: [H, W] in pixels, width / height of the photos, and their fit.

    The fit is there where it is not ``squash``.
    """

    size: list[int]
    aspect: float | None
    fit: str


class PythonRandomState(TypedDict):
    """State of Python's generator."""

    version: int
    words: torch.Tensor
    gauss: float | None


class NumpyRandomState(TypedDict):
    """State of numpy's global generator."""

    name: str
    keys: torch.Tensor
    position: int
    has_gauss: int
    cached: float


class Sums(TypedDict):
    """Sums of one rank over a part of an epoch: of the losses, and the metrics' states by name."""

    loss: torch.Tensor | None
    count: int
    metrics: dict[str, dict[str, Any]]


class RankState(TypedDict):
    """What a checkpoint holds of one rank."""

    python: PythonRandomState
    numpy: NumpyRandomState
    torch: torch.Tensor
    cuda: NotRequired[torch.Tensor]
    sums: NotRequired[Sums]


def describe_network(net: nn.Module) -> NetworkMetadata:
    """Say which network this is."""
    found: NetworkMetadata = {"network": f"{type(net).__module__}.{type(net).__qualname__}"}
    settings = getattr(net, "settings", None)
    if isinstance(settings, Mapping):
        found["model"] = dict(settings)
    return found


def describe_images(loader: object, batch: object) -> ImageMetadata:
    """Say what the training images are.

    Args:
        loader: ``loader.dataset.size`` and ``loader.dataset.aspect`` are taken where they exist.
        batch: the first batch on the device; it says what the loader does not.

    Returns:
        Both entries; an empty dict where the batch holds no images [B, C, H, W].
    """
    dataset = getattr(loader, "dataset", None)
    size, aspect = getattr(dataset, "size", None), getattr(dataset, "aspect", None)
    if isinstance(batch, TensorBatch):
        found = tuple(batch.image.shape[1:3])
        # The stream resizes photos to the size of training; shards of AISegment come from 600×800.
        natural = DEFAULT_ASPECT
    else:
        images = next((tensor for tensor in tensors_in(batch) if tensor.ndim == 4), None)
        if images is None:
            return {}
        found = tuple(images.shape[-2:])
        natural = found[1] / found[0]
    valid = isinstance(size, (tuple, list)) and len(size) == 2
    height, width = size if valid and size is not None else found
    fit = getattr(dataset, "fit", None)
    if fit in ("letterbox", "cover"):  # nothing was distorted
        shape = [int(height), int(width)]
        return {"size": shape, "aspect": int(width) / int(height), "fit": fit}
    aspect = float(aspect) if isinstance(aspect, (int, float)) and aspect > 0 else natural
    return {"size": [int(height), int(width)], "aspect": aspect}


def describe_data(*loaders: object) -> dict[str, str]:
    """Return the hash of each split's content, by split, for loaders of packed shards."""
    found: dict[str, str] = {}
    for loader in loaders:
        dataset = getattr(loader, "dataset", None)
        identity = getattr(getattr(dataset, "shards", None), "identity", None)
        if isinstance(identity, str):
            found[str(getattr(dataset, "split", len(found)))] = identity
    return found


def random_state() -> RankState:
    """Return the state of Python's, numpy's and torch's generators as numbers and tensors."""
    # Numbers and tensors only: a checkpoint is read with weights_only, which executes no code.
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: RankState = {
        "python": {
            "version": version,
            "words": torch.tensor(words, dtype=torch.int64),
            "gauss": gauss,
        },
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(ranks: list[Any]) -> None:
    """Set each rank's generators; on another number of ranks the seed's state stays.

    Args:
        ranks: :func:`random_state` of every rank.
    """
    if len(ranks) != distributed.world_size() or not ranks[distributed.rank()]:
        return
    state = ranks[distributed.rank()]
    if "python" not in state:
        return
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        (
            numpy["name"],
            numpy["keys"].numpy().astype(np.uint32),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached"],
        )
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def sums_so_far(meter: LossMeter, metrics: MetricCollection) -> Sums:
    """Return this rank's sums of a training epoch.

    Args:
        meter: of the losses.
        metrics: the training metrics.
    """
    states = {
        name: dict(metric.metric_state)
        for name, metric in metrics.items(keep_base=True, copy_state=False)
    }
    return {"loss": meter.sum, "count": meter.count, "metrics": states}


def restore_sums(
    ranks: list[Any], meter: LossMeter, metrics: MetricCollection, device: torch.device
) -> None:
    """Add the sums of an interrupted epoch: each rank's own, else all of them on rank 0.

    Args:
        ranks: what a checkpoint holds of every rank.
        meter: of the losses.
        metrics: of training; both are added to.
        device: of this rank.
    """
    sums = [rank["sums"] for rank in ranks if rank and "sums" in rank]
    if len(sums) == distributed.world_size():
        sums = [sums[distributed.rank()]]
    elif distributed.rank() != 0:
        return
    for one in sums:
        if one["loss"] is not None:
            loss = one["loss"].to(device)
            meter.sum = loss if meter.sum is None else meter.sum + loss
        meter.count += int(one["count"])
        _add_metrics(metrics, one["metrics"])


def _add_metrics(
    metrics: MetricCollection, saved: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    for name, metric in metrics.items(keep_base=True, copy_state=False):
        for key, value in saved.get(name, {}).items():
            setattr(metric, key, getattr(metric, key) + value.to(metric.device))
        metric._update_count = max(metric._update_count, 1)
        metric._computed = None


def lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's averages the channels-last layout of their parameters.

    A loaded checkpoint has them in NCHW; fused optimisers need one layout for both.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim == 4:
                state[name] = value.contiguous(memory_format=torch.channels_last)


def plain_state(schedule: Any) -> dict[str, Any]:
    """Return a schedule's ``state_dict`` without functions and objects, which no checkpoint holds.

    The schedule that loads it has its own.
    """
    found: dict[str, Any] = _plain(schedule.state_dict())
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):  # in it, too: of a schedule of schedules each has one
        return {name: _plain(one) for name, one in value.items() if _is_plain(one)}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    kinds = (int, float, str, dict, torch.Tensor, np.ndarray, np.generic)
    return value is None or isinstance(value, kinds)


@dataclass(frozen=True)
class ScheduleState:
    """What a schedule changes as it advances.

    Args:
        groups: options of each of the optimiser's groups of parameters.
        schedule: state of a schedule of torch; None without one.
    """

    groups: list[dict[str, Any]]
    schedule: dict[str, Any] | None

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, schedule: Any) -> ScheduleState:
        """Copy it as it is now."""
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        found = None if schedule is None else plain_state(schedule)
        return cls(copy.deepcopy(groups), copy.deepcopy(found))

    def put_into(self, entries: dict[str, Any]) -> None:
        """Put it in the place of a checkpoint's own."""
        groups = entries["optimizer_state_dict"]["param_groups"]
        for group, kept in zip(groups, self.groups, strict=True):
            group.update(kept)
        if self.schedule is not None:
            entries["torch_scheduler_state_dict"] = self.schedule
