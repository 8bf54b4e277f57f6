"""Train with transforms of your own: torchvision's here, on image and mask together.

    python examples/own_transform.py SHARDS RUNS

The command line does the same:

    portrait-dist train data.shards=SHARDS augment.transforms=examples/own_transform.py:build \
        augment.args.degrees=15

``build`` may return a transform of torchvision.transforms.v2, one of albumentations, or any
function ``(image, mask, generator) -> (image, mask)``.
"""

from __future__ import annotations

import sys

from torchvision.transforms import v2

from portrait_dist import config
from portrait_dist.training.main import train
from portrait_dist.training.results import TrainResult


def build(degrees: float = 10.0) -> v2.Compose:
    """Return what the decoding threads do to each training sample.

    Args:
        degrees: largest rotation either way.
    """
    return v2.Compose([v2.RandomRotation(degrees), v2.RandomPerspective(0.2), v2.RandomGrayscale()])


def main(shards: str, runs: str, *more: str) -> TrainResult | None:
    """Train; the result is there on rank 0 only where there are several."""
    where = [f"data.shards={shards}", f"run.root={runs}", "run.name=transformed"]
    mine = [f"augment.transforms={__file__}:build", "augment.args.degrees=15"]
    return train(config.load("aisegment_unet", [*where, *mine, *more]))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
