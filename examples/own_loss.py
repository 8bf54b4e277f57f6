"""Train with a loss and a metric of your own.

    python examples/own_loss.py SHARDS RUNS

The command line does the same:

    portrait-dist train data.shards=SHARDS loss.name=examples/own_loss.py:Focal loss.args.gamma=3 \
        metrics.names=examples/own_loss.py:Foreground
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from portrait_dist import config
from portrait_dist.training.main import train
from portrait_dist.training.results import TrainResult


class Focal(nn.Module):
    """Focal loss of soft masks (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017).

    Args:
        gamma: how much pixels that are right already lose their weight.
    """

    takes_logits = True

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean over pixels; both are float32 [B, 1, H, W]."""
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return ((torch.sigmoid(logits) - target).abs() ** self.gamma * entropy).mean()


class Foreground(Metric):
    """Difference of predicted and true area, as a fraction of the image. Its states are sums."""

    higher_is_better = False
    full_state_update = False
    difference: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("difference", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: probabilities and soft mattes, [B, 1, H, W]."""
        self.difference += (preds - target).flatten(1).mean(1).abs().double().sum()
        self.samples += len(preds)

    def compute(self) -> Tensor:
        """Return the mean over the samples."""
        return self.difference / self.samples


def main(shards: str, runs: str, *more: str) -> TrainResult | None:
    """Train; the result is there on rank 0 only where there are several."""
    where = [f"data.shards={shards}", f"run.root={runs}", "run.name=focal"]
    loss = [f"loss.name={__file__}:Focal", "loss.args.gamma=3"]
    metrics = [f"metrics.names={__file__}:Foreground", "metrics.watch=Foreground"]
    return train(config.load("aisegment_unet", [*where, *loss, *metrics, *more]))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
