"""Batches on the device, one ahead: on a GPU the next batch is copied on a stream of its own while this one is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from portrait_dist import distributed


@dataclass
class TensorBatch:
    """A batch of the stream on the device.

    image: uint8 [B, H, W, 3]; alpha: uint8 [B, H, W]; keys: B names; source: the loader's own batch.
    """

    image: torch.Tensor
    alpha: torch.Tensor
    keys: list[str]
    source: Any

    def __len__(self) -> int:
        return len(self.image)


class DeviceBatches:
    """Iterates a loader and yields its batches on ``device``: :class:`TensorBatch`, or tuples of tensors as they came.

    Args:
        loader: a ``StreamLoader``, or any iterable of (inputs, targets, …).
        device: where the batches go.
        limit: batches to yield at most.
        done: batches of the epoch that were yielded before, by an interrupted run.

    ``position`` is the loader's place after the batch last yielded, not after the one copied ahead: ``{"batches", "loader"}``.
    ``samples`` counts what was yielded, ``wait_share`` is the share of time spent waiting for the loader.
    """

    def __init__(self, loader: Any, device: torch.device, limit: int, done: int = 0) -> None:
        self.loader = loader
        self.device = device
        self.limit = limit
        self.done = done
        self.samples = 0
        self.wait_seconds = 0.0
        self.started = time.perf_counter()
        self.position = self._place(done)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._iterator: Any = None

    @property
    def wait_share(self) -> float:
        """Share of the time since the start in which the loop waited for the loader."""
        return self.wait_seconds / max(time.perf_counter() - self.started, 1e-9)

    @property
    def rate(self) -> float:
        """Images per second since the start, over all ranks."""
        return (
            self.samples * distributed.world_size() / max(time.perf_counter() - self.started, 1e-9)
        )

    def __iter__(self) -> Iterator[Any]:
        if self.limit <= 0:
            return
        self._iterator = iter(self.loader)
        ahead = self._fetch(0)
        taken = 0
        while ahead is not None:
            batch, position = ahead
            taken += 1
            self.position = position
            if self.copies is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.copies)
                _mark_used(batch, torch.cuda.current_stream(self.device))
                ahead = self._fetch(taken) if taken < self.limit else None
            self.samples += _samples(batch)
            yield batch
            if self.copies is None:
                ahead = self._fetch(taken) if taken < self.limit else None

    def close(self) -> None:
        """Stop the loader's threads."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()

    def _fetch(self, taken: int) -> tuple[Any, dict[str, Any]] | None:
        begin = time.perf_counter()
        batch = next(self._iterator, None)
        self.wait_seconds += time.perf_counter() - begin
        if batch is None:
            return None
        position = self._place(self.done + taken + 1)
        if self.copies is None:
            return self._to_device(batch), position
        with torch.cuda.stream(self.copies):
            return self._to_device(batch), position

    def _place(self, batches: int) -> dict[str, Any]:
        state = self.loader.state_dict() if hasattr(self.loader, "state_dict") else {}
        return {"batches": batches, "loader": state}

    def _to_device(self, batch: Any) -> Any:
        if hasattr(batch, "image") and hasattr(batch, "alpha"):
            moved = TensorBatch(batch.image, batch.alpha, batch.keys, batch)
            return replace(moved, image=self._move(batch.image), alpha=self._move(batch.alpha))
        if isinstance(batch, dict):
            return {key: self._to_device(value) for key, value in batch.items()}
        if isinstance(batch, (list, tuple)):
            return tuple(self._to_device(value) for value in batch)
        return self._move(batch) if isinstance(batch, torch.Tensor) else batch

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)


def _samples(batch: Any) -> int:
    return len(batch) if isinstance(batch, TensorBatch) else len(batch[0])


def _mark_used(batch: Any, stream: Any) -> None:
    """Keep the allocator from reusing tensors of the copy stream while the compute stream reads them."""
    if isinstance(batch, torch.Tensor):
        batch.record_stream(stream)
    elif isinstance(batch, TensorBatch):
        batch.image.record_stream(stream)
        batch.alpha.record_stream(stream)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            _mark_used(item, stream)
