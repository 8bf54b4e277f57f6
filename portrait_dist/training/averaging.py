"""The mean of the best models of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from portrait_dist.checkpoints import host_copy, save_atomically


class AverageOfBest:
    """Mean of the best models of a run, kept in ``averaging_snapshots.pkl`` beside the checkpoints.

    Args:
        folder: the run's folder.
        metric: name of the watched metric.
        greater_is_better: whether more of it is better.
        number: how many models are averaged (10, as SuperGradients does).
    """

    def __init__(
        self, folder: str | Path, metric: str, greater_is_better: bool, number: int = 10
    ) -> None:
        self.path = Path(folder) / "averaging_snapshots.pkl"
        self.metric = metric
        self.sign = 1.0 if greater_is_better else -1.0
        self.number = number
        self.snapshots: list[dict[str, Any]] = []
        if self.path.is_file():
            self.snapshots = torch.load(self.path, map_location="cpu", weights_only=True)[
                "snapshots"
            ]

    def get_average_model(
        self, net: nn.Module, validation_results_dict: dict[str, float]
    ) -> dict[str, torch.Tensor]:
        """Take the model in if it is among the best, and return the mean state dict."""
        value = float(validation_results_dict[self.metric])
        ranked = sorted(self.snapshots, key=lambda snapshot: self.sign * snapshot["value"])
        if len(self.snapshots) < self.number or self.sign * value > self.sign * ranked[0]["value"]:
            kept = ranked[1:] if len(ranked) >= self.number else ranked
            self.snapshots = [*kept, {"value": value, "net": host_copy(net.state_dict())}]
            save_atomically(self.path, {"snapshots": self.snapshots})
        return mean_state([snapshot["net"] for snapshot in self.snapshots])

    def cleanup(self) -> None:
        """Remove the snapshots; the average model stays."""
        self.path.unlink(missing_ok=True)


def mean_state(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Mean of each floating-point tensor over state dicts; other tensors are the last one's."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[-1].items()
    }
