"""Train a network of your own with everything that the package does, then use its checkpoint.

    python examples/own_network.py SHARDS RUNS

The command line does the same:

    portrait-dist train data.shards=SHARDS model.name=examples/own_network.py:Tiny
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from portrait_dist import config
from portrait_dist.inference import PortraitSegmenter
from portrait_dist.training.main import train


class Tiny(nn.Module):
    """Three convolutions.

    Args:
        width: channels.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits at half the size, [B, 1, H/2, W/2]; they are enlarged to the image's."""
        logits: Tensor = self.layers(x)
        return logits


def main(shards: str, runs: str, *more: str) -> PortraitSegmenter | None:
    """Train, and load the best checkpoint; on rank 0 only where there are several."""
    where = [f"data.shards={shards}", f"run.root={runs}", "run.name=tiny"]
    network = [f"model.name={__file__}:Tiny", "model.args.width=8"]
    result = train(config.load("aisegment_unet", [*where, *network, *more]))
    if result is None:
        return None
    return PortraitSegmenter.from_checkpoint(result.checkpoint, trust_code=True)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
