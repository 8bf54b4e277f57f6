"""The code of SuperGradients' tutorial "Training an external model", with our classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from portrait_dist.data import AISegmentDataset
from portrait_dist.losses import CustomSegLoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import UNet
from portrait_dist.training import PortraitTrainer
from portrait_dist.training.sg_adapter import Trainer, use_device


@pytest.mark.parametrize("trainer_class", [Trainer, PortraitTrainer], ids=["stock", "ours"])
def test_the_tutorials_training_code_runs_with_these_classes(
    trainer_class: type, split_dir: Path, tmp_path: Path
) -> None:
    """Two batches and one epoch; otherwise as the tutorial, DataLoader workers included."""
    use_device(torch.device("cpu"))
    train_dataset = AISegmentDataset(
        data_path=str(split_dir), split="train", input_height=64, input_width=64
    )
    val_dataset = AISegmentDataset(
        data_path=str(split_dir), split="val", input_height=64, input_width=64
    )
    train_dataloader = DataLoader(
        Subset(train_dataset, range(8)), batch_size=4, shuffle=True, num_workers=2
    )
    val_dataloader = DataLoader(
        Subset(val_dataset, range(4)), batch_size=4, shuffle=False, num_workers=2
    )
    model = UNet(in_channels=3, out_channels=1, init_features=4)
    trainer = trainer_class(experiment_name="aisegment_example", ckpt_root_dir=str(tmp_path))
    ours = trainer_class is PortraitTrainer
    train_params = {
        "max_epochs": 1,
        "lr_mode": "cosine",
        "initial_lr": 0.001,
        "optimizer": "Adam",
        "loss": CustomSegLoss(),
        "metric_to_watch": "SoftIoU",
        "greater_metric_to_watch_is_better": True,
        "train_metrics_list": [SoftIoU(num_classes=2)],
        "valid_metrics_list": [SoftIoU(num_classes=2)],
        # Stock SuperGradients cannot read its own snapshots under today's torch.load.
        "average_best_models": ours,
    }
    trainer.train(
        model=model,
        training_params=train_params,
        train_loader=train_dataloader,
        valid_loader=val_dataloader,
    )
    folder = tmp_path / "aisegment_example"
    for name in ("ckpt_best.pth", "ckpt_latest.pth", *(["average_model.pth"] if ours else [])):
        (found,) = folder.rglob(name)
        assert found.stat().st_size > 0
    if ours:
        assert (folder / "ckpt_best.pth").is_file(), (
            "in the run's own folder, as the tutorial shows"
        )
    model.eval()
    image, _ = val_dataset[0]
    assert model(image.unsqueeze(0)).shape == (1, 1, 64, 64)
