"""Batches on the device; on a GPU they are copied on a stream of their own, beside the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from portrait_dist import distributed

SECONDS_BETWEEN_LOOKS = 0.2
"""At a stop signal, while the loader keeps a rank waiting."""


@dataclass
class TensorBatch:
    """A batch of the stream on the device.

    Attributes:
        image: uint8 [B, H, W, 3].
        alpha: uint8 [B, H, W].
        keys: B sample keys.
        source: the loader's own batch.
    """

    image: torch.Tensor
    alpha: torch.Tensor
    keys: list[str]
    source: Any

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class Position:
    """Where a rank is in an epoch.

    Attributes:
        batches: batches of this rank that are done.
        loader: the loader's ``state_dict`` after them; empty where it has none.
    """

    batches: int
    loader: dict[str, Any]


class DeviceBatches:
    """Iterate a loader and yield its batches on ``device``.

    Batches of the stream come as :class:`TensorBatch`, others as the tuples they were. The next
    batch is fetched when the consumer asks for it, after it has launched its step: a loader that is
    late then delays nothing that could run already, and on a GPU the copy still overlaps with the
    step, because the host is ahead of the device.

    Args:
        loader: a ``StreamLoader``, or any iterable of (inputs, targets, …).
        device: where the batches go.
        limit: batches to yield at most.
        done: batches of the epoch that were yielded before, by an interrupted run.
        give_up: asked while the loader keeps this rank waiting; True ends the wait.
        agree: called before each batch with whether this rank gave up; where it returns True, on
            every rank or on none, no batch follows.

    Attributes:
        position: after the batch last yielded.
        samples: number of samples yielded.
        gave_up: whether it ended early because of ``agree``.
    """

    def __init__(
        self,
        loader: Any,
        device: torch.device,
        limit: int,
        done: int = 0,
        *,
        give_up: Callable[[], bool] = lambda: False,
        agree: Callable[[bool], bool] = lambda gave_up: gave_up,
    ) -> None:
        self.loader = loader
        self.device = device
        self.limit = limit
        self.gave_up = False
        self._give_up, self._agree = give_up, agree
        self.samples = 0
        self.wait_seconds = 0.0
        self.started = time.perf_counter()
        self.position = self._position(done)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._iterator: Any = None

    @property
    def wait_share(self) -> float:
        """Fraction of the time since the start in which the loop waited for the loader."""
        return self.wait_seconds / max(time.perf_counter() - self.started, 1e-9)

    @property
    def rate(self) -> float:
        """Images per second since the start, over all ranks."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return self.samples * distributed.world_size() / seconds

    def __iter__(self) -> Iterator[Any]:
        if self.limit <= 0:
            return
        last = self.position.batches + self.limit
        # A loader that knows where its epoch is cut short decodes the next one's batches there.
        cut = getattr(self.loader, "first_batches", None)
        self._iterator = iter(self.loader) if cut is None else cut(last)
        for done in range(self.position.batches + 1, last + 1):
            batch = self._fetch() if self._wait_for_loader() else None
            # After the wait, with or without a batch: every rank calls it equally often.
            self.gave_up = self._agree(self.gave_up)
            if batch is None or self.gave_up:
                return
            # Before the yield: what is saved during the step counts its batch as done.
            self.position = self._position(done)
            self.samples += samples_in(batch)
            yield batch

    def close(self) -> None:
        """Stop the loader's threads."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()

    def _wait_for_loader(self) -> bool:
        """Wait for the loader's next batch; False where this rank gave up."""
        ready = getattr(self.loader, "ready", None)
        begin = time.perf_counter()
        while ready is not None and not ready(SECONDS_BETWEEN_LOOKS):
            if self._give_up():
                self.gave_up = True
                break
        self.wait_seconds += time.perf_counter() - begin
        return not self.gave_up

    def _fetch(self) -> Any:
        """Return the next batch on the device, or None."""
        begin = time.perf_counter()
        batch = next(self._iterator, None)
        self.wait_seconds += time.perf_counter() - begin
        if batch is None or self._copies is None:
            return to_device(batch, self.device)
        # On a stream of its own the copy runs beside the computation of the step before.
        with torch.cuda.stream(self._copies):
            batch = to_device(batch, self.device)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)  # the device waits, the host does not
        for tensor in tensors_in(batch):  # else the allocator could reuse them while they are read
            tensor.record_stream(computing)
        return batch

    def _position(self, batches: int) -> Position:
        state = self.loader.state_dict() if hasattr(self.loader, "state_dict") else {}
        return Position(batches, state)


def to_device(batch: Any, device: torch.device) -> Any:
    """Copy a batch of any form; one of the stream becomes a :class:`TensorBatch`."""
    if hasattr(batch, "image") and hasattr(batch, "alpha"):
        image, alpha = (to_device(tensor, device) for tensor in (batch.image, batch.alpha))
        return TensorBatch(image, alpha, batch.keys, batch)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(to_device(value, device) for value in batch)
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


def tensors_in(batch: object) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch of any form, depth first."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, TensorBatch):
        yield from (batch.image, batch.alpha)
    elif isinstance(batch, (Mapping, list, tuple)):
        parts: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
        for part in parts:
            yield from tensors_in(part)


def samples_in(batch: object) -> int:
    """Return the number of samples of a batch: the length of its first tensor."""
    first = next((tensor for tensor in tensors_in(batch) if tensor.ndim), None)
    return 0 if first is None else len(first)
