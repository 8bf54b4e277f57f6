"""From raw images to batches: pairs, split, shards, the exact stream, augmentation.

Nothing here knows SuperGradients.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portrait_dist.data.map_dataset import AISegmentDataset
    from portrait_dist.data.stream.dataset import AISegmentIterableDataset
    from portrait_dist.data.stream.loader import Batch, StreamLoader, build_loader

__all__ = ["AISegmentDataset", "AISegmentIterableDataset", "Batch", "StreamLoader", "build_loader"]

_HOMES = {
    "AISegmentDataset": "map_dataset",
    "AISegmentIterableDataset": "stream.dataset",
    "Batch": "stream.loader",
    "StreamLoader": "stream.loader",
    "build_loader": "stream.loader",
}


def __getattr__(name: str) -> Any:
    """Import on first use: preparing and packing do without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
