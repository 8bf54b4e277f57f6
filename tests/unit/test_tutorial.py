"""The code of SuperGradients' tutorial "Training an external model", as the example has it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from portrait_dist.data import AISegmentDataset
from portrait_dist.training import PortraitTrainer
from portrait_dist.training.sg_adapter import Trainer, use_device

EXAMPLES = Path(__file__).parents[2] / "examples"


class StockTrainer(Trainer):
    """SuperGradients' own, without the average, whose snapshots today's torch.load refuses."""

    def train(self, model: nn.Module, params: dict[str, Any], *loaders: Any) -> None:
        super().train(model, params | {"average_best_models": False}, *loaders)


@pytest.mark.parametrize("trainer_class", [StockTrainer, PortraitTrainer], ids=["stock", "ours"])
def test_the_tutorials_training_code_runs_with_these_classes(
    trainer_class: type, split_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch of small images; otherwise as the tutorial, DataLoader workers included."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tutorial = importlib.import_module("tutorial")
    monkeypatch.setattr(tutorial, "PortraitTrainer", trainer_class)
    use_device(torch.device("cpu"))
    small = ("--epochs", "1", "--side", "64", "--features", "4", "--batch-size", "8")
    model = tutorial.main([str(split_dir), *small, "--checkpoints", str(tmp_path)])
    folder, ours = tmp_path / "aisegment_example", trainer_class is PortraitTrainer
    for name in ("ckpt_best.pth", "ckpt_latest.pth", *(["average_model.pth"] if ours else [])):
        (found,) = folder.rglob(name)
        assert found.stat().st_size > 0
        assert found.parent == folder or not ours  # as the tutorial shows
    assert not model.training
    image, _ = AISegmentDataset(str(split_dir), "val", input_height=64, input_width=64)[0]
    assert model(image.unsqueeze(0)).shape == (1, 1, 64, 64)
