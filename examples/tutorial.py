"""SuperGradients' tutorial "Training an external model", with this package's classes.

    portrait-dist synth --out raw --pairs 60 && portrait-dist prepare --raw raw --out data
    python examples/tutorial.py data

The code is the tutorial's; only the imports differ. ``data`` is an arranged tree, as
``portrait-dist prepare`` writes it: ``train``, ``val`` and ``test``, each with JPEG images and RGBA
mattes of the same names.
"""

from __future__ import annotations

import argparse

from torch.utils.data import DataLoader

from portrait_dist.data import AISegmentDataset
from portrait_dist.losses import CustomSegLoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import UNet
from portrait_dist.training import PortraitTrainer


def main(arguments: list[str] | None = None) -> UNet:
    """Train and return the network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", help="arranged tree of 'portrait-dist prepare'")
    parser.add_argument("--checkpoints", default="checkpoints")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--side", type=int, default=256, help="height and width of the images")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)

    size = {"input_height": options.side, "input_width": options.side}
    train_set = AISegmentDataset(data_path=options.data, split="train", **size)
    val_set = AISegmentDataset(data_path=options.data, split="val", **size)
    train_loader = DataLoader(train_set, batch_size=options.batch_size, shuffle=True, num_workers=2)
    val_loader = DataLoader(val_set, batch_size=options.batch_size, num_workers=2)

    model = UNet(in_channels=3, out_channels=1, init_features=options.features)
    trainer = PortraitTrainer("aisegment_example", ckpt_root_dir=options.checkpoints)
    training_params = {
        "max_epochs": options.epochs,
        "lr_mode": "cosine",
        "initial_lr": 0.001,
        "optimizer": "Adam",
        "loss": CustomSegLoss(),
        "metric_to_watch": "SoftIoU",
        "greater_metric_to_watch_is_better": True,
        "train_metrics_list": [SoftIoU(num_classes=2)],
        "valid_metrics_list": [SoftIoU(num_classes=2)],
    }
    trainer.train(model, training_params, train_loader, val_loader)
    return model.eval()


if __name__ == "__main__":
    main()
