"""A training loop of your own on the exact stream; SuperGradients is not even imported.

python examples/loop_without_supergradients.py SHARDS
"""

from __future__ import annotations

import sys

import torch

from portrait_dist.config import AugmentConfig
from portrait_dist.data import build_loader
from portrait_dist.losses import SoftIoULoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import UNet
from portrait_dist.training.device_batches import DeviceBatches
from portrait_dist.training.main import Prepare


def main(shards: str, epochs: int = 2, features: int = 8) -> float:
    """Train a small U-Net, and return its validation IoU."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, loss = UNet(init_features=features, norm="group").to(device), SoftIoULoss(0.5, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    prepare = Prepare(AugmentConfig(flip=0.5, rotation=10.0), seed=0)
    train = build_loader(shards, "train", batch_size=8)
    for epoch in range(epochs):
        train.set_epoch(epoch)
        for batch in DeviceBatches(train, device, limit=len(train)):
            images, mattes = prepare(batch, training=True, epoch=epoch)
            loss(model(images, return_logits=True), mattes).backward()
            optimizer.step()
            optimizer.zero_grad()

    iou = SoftIoU().to(device)
    valid = build_loader(shards, "val", batch_size=8)
    with torch.inference_mode():
        for batch in DeviceBatches(valid, device, limit=len(valid)):
            images, mattes = prepare(batch, training=False, epoch=None)
            iou.update(model(images), mattes)
    return float(iou.compute())


if __name__ == "__main__":
    print(f"validation IoU {main(sys.argv[1]):.3f}")
