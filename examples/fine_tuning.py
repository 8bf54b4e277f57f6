"""Train on many images first, then continue from those weights on a few of your own.

    python examples/fine_tuning.py MANY_SHARDS FEW_SHARDS

The second run is a run of its own: new optimiser, new schedule, a lower learning rate, its own
folder and its own best checkpoint. Only the weights come from the first. From the command line:

    portrait-dist train data.shards=MANY_SHARDS run.name=many
    portrait-dist train data.shards=FEW_SHARDS run.name=few model.weights=runs/many/ckpt_best.pth \
        train.lr=0.0003
"""

from __future__ import annotations

import argparse

from portrait_dist import config, recipes
from portrait_dist.training.main import train
from portrait_dist.training.results import TrainResult


def main(arguments: list[str] | None = None) -> tuple[TrainResult, TrainResult]:
    """Train twice; return what both runs gave."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("many", help="shards to begin with")
    parser.add_argument("few", help="shards of your own images")
    parser.add_argument("--root", default="runs")
    parser.add_argument("settings", nargs="*", help="key=value for both runs")
    options = parser.parse_intermixed_args(arguments)

    common = [f"run.root={options.root}", *options.settings]
    many = train(
        config.load(recipes.DEFAULT, [f"data.shards={options.many}", "run.name=many", *common])
    )
    assert many is not None, "only ranks other than 0 get nothing back"
    own = [f"data.shards={options.few}", "run.name=few", f"model.weights={many.checkpoint}"]
    few = train(config.load(recipes.DEFAULT, [*own, "train.lr=0.0003", *common]))
    assert few is not None
    print(f"before {many.best_iou}, after {few.best_iou}: {few.checkpoint}")
    return many, few


if __name__ == "__main__":
    main()
