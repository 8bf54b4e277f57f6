"""Training with SuperGradients.

Importing this package does not import SuperGradients; asking for its classes does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portrait_dist.training.trainer import LoopOptions, PortraitKDTrainer, PortraitTrainer

__all__ = ["LoopOptions", "PortraitKDTrainer", "PortraitTrainer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from portrait_dist.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
