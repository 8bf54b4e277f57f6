"""What must be seen on a GPU. ``pytest tests/gpu --device cpu`` runs the same code on a CPU."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from portrait_dist import config
from portrait_dist.config import AugmentConfig
from portrait_dist.data import build_loader
from portrait_dist.data.augment import Augment
from portrait_dist.evaluation import evaluate
from portrait_dist.losses import SoftIoULoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import UNet
from portrait_dist.preprocessing import STD
from portrait_dist.training import LoopOptions, PortraitTrainer
from portrait_dist.training.device_batches import DeviceBatches
from portrait_dist.training.main import Prepare, train
from portrait_dist.training.sg_adapter import Callback, use_device
from tests import jobs

pytestmark = pytest.mark.gpu
FULL = AugmentConfig(scale=0.3, rotation=15.0, translation=0.1, background=0.5)
TINY = (
    "train.batch_size=8",
    "train.pictures=0",
    "train.threads=1",
    "train.average_best=false",
    "model.init_features=4",
    "model.norm=group",
)


def run(shards: Path, root: Path, device: torch.device, *settings: str) -> list[dict[str, Any]]:
    """Train in this process as the command does; return the run's epoch lines."""
    own = (f"data.shards={shards}", f"run.root={root}", "run.name=run")
    train(config.load(None, [*own, *TINY, f"train.device={device.type}", *settings]))
    return jobs.lines(root / "run", "epoch")


class ForbidWaiting(Callback):
    """Lets torch raise an error at each operation that waits for the GPU, within the steps."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.cuda, self.last = device.type == "cuda", steps - 1
        self.watched = 0

    def on_train_batch_start(self, context: Any) -> None:
        # The first steps choose kernels and fill caches.
        if context.batch_idx >= 2:
            self.watched += 1
            if self.cuda:
                torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, context: Any) -> None:
        if self.cuda and context.batch_idx == self.last:
            torch.cuda.set_sync_debug_mode("default")


def test_no_step_waits_for_the_device(
    device: torch.device, tiny_shards: Path, tmp_path: Path
) -> None:
    """Augmentation, bf16, EMA, clipping, metrics and the copies of the next batch included."""
    use_device(device)
    loader = build_loader(
        tiny_shards, "train", batch_size=8, size=(32, 32), pin_memory=device.type == "cuda"
    )
    forbid = ForbidWaiting(device, len(loader))
    trainer = PortraitTrainer(
        "run",
        str(tmp_path),
        options=LoopOptions(channels_last=True, log_every_steps=10_000),
        prepare=Prepare(config.load(None, ["augment.background=0.5", "augment.scale=0.2"]), 1),
    )
    params = {
        "max_epochs": 2,
        "initial_lr": 1e-3,
        "lr_mode": "CosineLRScheduler",
        "optimizer": torch.optim.AdamW,
        "optimizer_params": {"fused": True},
        "clip_grad_norm": 1.0,
        "mixed_precision": True,
        "ema": True,
        "ema_params": {"decay": 0.9, "decay_type": "threshold"},
        "loss": SoftIoULoss(),
        "train_metrics_list": [SoftIoU()],
        "valid_metrics_list": [SoftIoU()],
        "metric_to_watch": "SoftIoU",
        "average_best_models": False,
        "save_model": False,
        "phase_callbacks": [forbid],
        "log_installed_packages": False,
    }
    val = build_loader(tiny_shards, "val", batch_size=8, size=(32, 32))
    trainer.train(UNet(init_features=4), params, loader, val)
    assert forbid.watched == 2 * (len(loader) - 2) > 0


@pytest.mark.parametrize("settings", [AugmentConfig(), FULL], ids=["colours", "everything"])
def test_augmentation_is_that_of_the_cpu(device: torch.device, settings: AugmentConfig) -> None:
    """Within a level of 255; a CPU's OpenCV engine is within two of the batched one."""
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(16, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear")
    images = (smooth * 255).byte().permute(0, 2, 3, 1).contiguous()
    alphas = (images[..., 0] > 128).byte() * 255
    positions = np.arange(16)
    levels = []
    for engine, where in (("torch", torch.device("cpu")), ("auto", device)):
        augment = Augment(settings, seed=7, engine=engine)
        found, mattes = augment(images.to(where), alphas.to(where), epoch=3, positions=positions)
        scaled = found.float().cpu() * torch.tensor(STD).view(3, 1, 1) * 255
        levels.append((scaled, mattes.float().cpu() * 255))
    (expected, matte), (found, other) = levels
    allowed = 1.01 if device.type == "cuda" else 2.01
    assert float((found - expected).abs().max()) <= allowed
    assert float((other - matte).abs().max()) <= allowed


def test_training_follows_that_of_the_cpu(
    device: torch.device, tiny_shards: Path, tmp_path: Path
) -> None:
    common = ("train.max_epochs=2", "train.ema=true", "train.ema_decay=0.9")
    here = run(tiny_shards, tmp_path / "device", device, *common)
    there = run(tiny_shards, tmp_path / "cpu", torch.device("cpu"), *common)
    for name in ("loss", "val_loss", "iou", "val_iou"):
        values = [line[name] for line in here]
        assert values == pytest.approx([line[name] for line in there], abs=0.02), name
    for key in ("net", "ema_net"):
        one, other = (jobs.checkpoint(tmp_path / name / "run")[key] for name in ("device", "cpu"))
        assert jobs.largest_difference(one, other) < 0.05


@pytest.mark.parametrize(
    ("plain", "changed"),
    [
        ((), ("train.precision=bf16",)),
        ((), ("train.compile=true",)),
        (("train.batch_size=16",), ("train.batch_size=8", "train.accumulate=2")),
    ],
    ids=["bf16", "compile", "accumulate"],
)
def test_a_setting_changes_the_speed_and_not_the_training(
    device: torch.device,
    tiny_shards: Path,
    tmp_path: Path,
    plain: tuple[str, ...],
    changed: tuple[str, ...],
) -> None:
    one, other = (
        run(tiny_shards, tmp_path / name, device, "train.max_epochs=1", *settings)[0]
        for name, settings in (("plain", plain), ("changed", changed))
    )
    assert math.isfinite(other["val_loss"])
    assert other["val_loss"] == pytest.approx(one["val_loss"], abs=0.05)
    net = jobs.checkpoint(tmp_path / "changed" / "run")["net"]
    assert all(not name.startswith(("_orig_mod", "module.")) for name in net)


def test_a_resumed_training_continues_as_if_it_had_not_stopped(
    device: torch.device, tiny_shards: Path, tmp_path: Path
) -> None:
    whole = run(
        tiny_shards, tmp_path / "whole", device, "train.max_epochs=3", "train.lr_final_ratio=1"
    )
    for epochs in (1, 3):
        parts = run(
            tiny_shards,
            tmp_path / "parts",
            device,
            f"train.max_epochs={epochs}",
            "train.lr_final_ratio=1",
        )
    assert [line["epoch"] for line in parts] == [0, 1, 2]
    # On a GPU cuDNN may choose other kernels.
    tolerance = 0.02 if device.type == "cuda" else 0.0
    for name in ("loss", "val_loss", "val_iou"):
        values = [line[name] for line in parts]
        assert values == pytest.approx([line[name] for line in whole], abs=tolerance), name


def test_evaluation_gives_the_same_scores_on_both_devices(
    device: torch.device, tiny_shards: Path, tmp_path: Path
) -> None:
    run(tiny_shards, tmp_path, device, "train.max_epochs=2")
    path = tmp_path / "run" / "ckpt_latest.pth"
    found = [evaluate(path, str(tiny_shards), "test", device=one) for one in (device.type, "cpu")]
    here, there = (one.scores for one in found if one is not None)
    assert here.iou == pytest.approx(there.iou, abs=1e-3)
    assert here.mae == pytest.approx(there.mae, abs=1e-4)


def test_three_hundred_batches_arrive_whole_while_the_device_works(
    device: torch.device, tiny_shards: Path
) -> None:
    """Sums taken on the device equal those of the loader's own memory, whatever the timing."""
    loader = build_loader(
        tiny_shards, "train", batch_size=4, workers=3, pin_memory=device.type == "cuda"
    )
    random, work = np.random.default_rng(0), torch.randn(512, 512, device=device)
    on_device: list[torch.Tensor] = []
    expected: list[list[int]] = []
    for epoch in range(1000):
        loader.set_epoch(epoch)
        batches = DeviceBatches(loader, device, limit=300 - len(expected))
        for batch in batches:
            for _ in range(random.integers(4)):
                work = torch.tanh(work @ work)
            if random.random() < 0.1:
                time.sleep(0.002)  # a consumer that is late now and then is the point
            on_device.append(
                torch.stack([one.sum(dtype=torch.int64) for one in (batch.image, batch.alpha)])
            )
            arrays = (np.asarray(batch.source.image), np.asarray(batch.source.alpha))
            expected.append([int(one.sum(dtype=np.int64)) for one in arrays])
        batches.close()
        if len(expected) == 300:
            break
    assert torch.stack(on_device).tolist() == expected


def test_one_rank_of_torchrun_trains_and_resumes(
    device: torch.device, tiny_shards: Path, tmp_path: Path
) -> None:
    """NCCL with SyncBatchNorm, bf16 and DDP on a GPU; gloo on a CPU."""
    settings = [f"train.device={device.type}", "train.batch_size=8"]
    if device.type == "cuda":
        settings += ["train.sync_bn=true", "model.norm=batch", "train.precision=bf16"]
    for epochs in (1, 2):
        job = jobs.train(tmp_path, tiny_shards, *settings, f"train.max_epochs={epochs}")
        result = job.result()
    assert (result["epochs"], result["world_size"]) == (2, 1)
    assert "Grad strides do not match" not in job.text()
    assert [line["epoch"] for line in jobs.lines(tmp_path / "run", "epoch")] == [0, 1]
