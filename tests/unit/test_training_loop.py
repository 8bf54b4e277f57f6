"""The loop in one process: equal to stock SuperGradients, no host sync per step, every key does what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from portrait_dist import checkpoints, config
from portrait_dist.losses import CustomSegLoss, SoftIoULoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import UNet
from portrait_dist.training import LoopOptions, PortraitTrainer
from portrait_dist.training.sg_adapter import Callback, Trainer, use_device
from tests.jobs import largest_difference

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def batches() -> TensorDataset:
    """24 noise pictures whose mask follows from them, 32×32."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(24, 3, 32, 32, generator=generator)
    masks = (images.mean(1, keepdim=True) > 0).float()
    return TensorDataset(images, masks)


class StepLosses(Callback):
    """Keeps loss and learning rate of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_loss_end(self, context: Any) -> None:
        self.losses.append(float(context.loss_log_items[0]))
        self.rates.append(context.optimizer.param_groups[0]["lr"])


def fit(
    trainer: Any, data: TensorDataset, *, batch_size: int = 4, norm: str = "batch", **params: Any
) -> StepLosses:
    """Train a small U-Net for two epochs and return what each step gave."""
    use_device(torch.device("cpu"))
    torch.manual_seed(1)
    model = UNet(init_features=2, norm=norm)
    steps = StepLosses()
    defaults = {
        "max_epochs": 2,
        "initial_lr": 1e-2,
        "lr_mode": "CosineLRScheduler",
        "optimizer": "Adam",
        "loss": CustomSegLoss(0.5, 0.5),
        "train_metrics_list": [SoftIoU()],
        "valid_metrics_list": [SoftIoU()],
        "metric_to_watch": "SoftIoU",
        "average_best_models": False,
        "phase_callbacks": [steps],
        "log_installed_packages": False,
    }
    train_loader = DataLoader(data, batch_size=batch_size)
    trainer.train(model, defaults | params, train_loader, DataLoader(data, batch_size=5))
    return steps


def weights(
    folder: Path, name: str = "ckpt_latest.pth", key: str = "net"
) -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)[key]


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def test_one_process_gives_the_loss_curve_and_weights_of_stock_supergradients(
    batches: TensorDataset, tmp_path: Path
) -> None:
    stock = Trainer("stock", ckpt_root_dir=str(tmp_path))
    theirs = fit(stock, batches, save_model=False)
    ours = fit(PortraitTrainer("ours", str(tmp_path)), batches)
    assert len(ours.losses) == 12
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-6)
    assert ours.rates == pytest.approx(theirs.rates)
    assert difference(stock.net.state_dict(), weights(tmp_path / "ours")) < 1e-6


class CountHostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a value on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        return function(*args, **(kwargs or {}))


def test_the_host_never_waits_for_the_device_within_a_step(
    batches: TensorDataset, tmp_path: Path
) -> None:
    """Twice the steps, as many values read: all of them belong to epochs, none to steps."""
    reads = []
    for batch_size in (4, 2):
        trainer = PortraitTrainer(
            f"reads-{batch_size}", str(tmp_path), options=LoopOptions(log_every_steps=1000)
        )
        loop = trainer.run_training_epoch
        counts: list[int] = []

        def counted(
            context: Any, show: bool, loop: Any = loop, counts: list[int] = counts
        ) -> dict[str, float]:
            with CountHostReads() as counter:
                values = loop(context, show)
            counts.append(counter.reads)
            return values

        trainer.run_training_epoch = counted  # type: ignore[method-assign]
        # SGD: Adam reads its own step counter, a number that never leaves the host.
        fit(
            trainer,
            batches,
            batch_size=batch_size,
            optimizer="SGD",
            loss=SoftIoULoss(0.5, 0.5),
            save_model=False,
            phase_callbacks=[],
        )
        reads.append(counts)
    assert reads[0] == reads[1]


def test_accumulated_batches_give_the_step_of_one_large_batch(
    batches: TensorDataset, tmp_path: Path
) -> None:
    """The schedule counts batches, so the learning rate is held constant here."""
    constant = {"loss": SoftIoULoss(0.5, 0.5), "norm": "group", "cosine_final_lr_ratio": 1.0}
    fit(PortraitTrainer("large", str(tmp_path)), batches, batch_size=12, **constant)
    fit(
        PortraitTrainer("small", str(tmp_path)),
        batches,
        batch_size=4,
        batch_accumulate=3,
        **constant,
    )
    assert difference(weights(tmp_path / "large"), weights(tmp_path / "small")) < 2e-4


def test_bf16_channels_last_clipping_and_ema_work_by_a_key_each(
    batches: TensorDataset, tmp_path: Path
) -> None:
    loss = SoftIoULoss(0.5, 0.5)
    plain = fit(PortraitTrainer("plain", str(tmp_path)), batches, loss=loss)
    reference = weights(tmp_path / "plain")

    last = fit(
        PortraitTrainer("last", str(tmp_path), options=LoopOptions(channels_last=True)),
        batches,
        loss=loss,
    )
    assert last.losses == pytest.approx(plain.losses, abs=1e-4)

    half = fit(PortraitTrainer("bf16", str(tmp_path)), batches, loss=loss, mixed_precision=True)
    assert half.losses == pytest.approx(plain.losses, abs=0.05)
    assert half.losses != plain.losses
    assert weights(tmp_path / "bf16")["conv.weight"].dtype == torch.float32

    fit(
        PortraitTrainer("clip", str(tmp_path)),
        batches,
        loss=loss,
        clip_grad_norm=1e-3,
        optimizer="SGD",
        initial_lr=1.0,
    )
    fit(PortraitTrainer("free", str(tmp_path)), batches, loss=loss, optimizer="SGD", initial_lr=1.0)
    torch.manual_seed(1)
    start = UNet(init_features=2).state_dict()
    assert difference(weights(tmp_path / "clip"), weights(tmp_path / "free")) > 0.01
    moved = torch.stack(
        [(weights(tmp_path / "clip")[n] - start[n]).norm() for n in start if n.endswith("weight")]
    ).norm()
    assert moved < 0.2, (
        "twelve steps of norm 0.001 with momentum 0.9 and learning rate 1, and weight decay"
    )

    fit(
        PortraitTrainer("ema", str(tmp_path)),
        batches,
        loss=loss,
        ema=True,
        ema_params={"decay": 0.5, "decay_type": "constant"},
    )
    assert difference(weights(tmp_path / "ema"), reference) < 1e-6, (
        "the average does not change the training"
    )
    assert difference(weights(tmp_path / "ema", key="ema_net"), reference) > 1e-4


def test_a_compiled_model_trains_the_same_and_saves_plain_names(
    batches: TensorDataset, tmp_path: Path
) -> None:
    loss = SoftIoULoss(0.5, 0.5)
    plain = fit(PortraitTrainer("plain", str(tmp_path)), batches, loss=loss, max_epochs=1)
    compiled = fit(
        PortraitTrainer("compiled", str(tmp_path)),
        batches,
        loss=loss,
        max_epochs=1,
        torch_compile=True,
    )
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-3)
    assert list(weights(tmp_path / "compiled")) == list(weights(tmp_path / "plain"))


def test_the_best_checkpoint_is_never_replaced_by_a_worse_one_also_after_resuming(
    batches: TensorDataset, tmp_path: Path
) -> None:
    fit(PortraitTrainer("run", str(tmp_path)), batches, max_epochs=8, initial_lr=0.05)
    best = torch.load(tmp_path / "run" / "ckpt_best.pth", weights_only=True)["acc"]
    assert best > 0.6
    worse = TensorDataset(batches.tensors[0], batches.tensors[1].flip(-1))
    fit(PortraitTrainer("run", str(tmp_path)), worse, max_epochs=10, resume=True)
    after = torch.load(tmp_path / "run" / "ckpt_latest.pth", weights_only=True)
    assert torch.load(tmp_path / "run" / "ckpt_best.pth", weights_only=True)["acc"] == best
    assert after["epoch"] == 10
    assert after["acc"] < best
    assert after["portrait_dist"]["best_metric"] == best


def test_tensorboard_and_metrics_file_hold_the_same_curves(
    batches: TensorDataset, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from portrait_dist.training.recorder import RunRecorder

    trainer = PortraitTrainer("run", str(tmp_path))
    fit(trainer, batches, phase_callbacks=[RunRecorder(trainer, 2)])
    written = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    epochs = [line for line in written if line["kind"] == "epoch"]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    curves = {
        "loss/train": "loss",
        "iou/train": "iou",
        "loss/val": "val_loss",
        "iou/val": "val_iou",
    }
    curves |= {
        "speed/images_per_second": "images_per_second",
        "speed/data_wait_fraction": "data_wait_share",
    }
    for tag, name in curves.items():
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(
            [line[name] for line in epochs], rel=1e-5
        )
    assert "lr" in events.Tags()["scalars"]


def test_warm_up_climbs_to_the_learning_rate(batches: TensorDataset, tmp_path: Path) -> None:
    steps = fit(
        PortraitTrainer("run", str(tmp_path)),
        batches,
        lr_warmup_steps=4,
        warmup_mode="LinearBatchLRWarmup",
        warmup_initial_lr=1e-3,
        save_model=False,
    )
    assert steps.rates[:4] == pytest.approx([1e-3, 4e-3, 7e-3, 1e-2])
    assert max(steps.rates) == pytest.approx(1e-2)


def plan_of(shards: Path, *keys: str) -> Any:
    from portrait_dist.training import main

    loaded = config.load(None, [f"data.shards={shards}", *keys])
    cpu = torch.device("cpu")
    return main._plan(loaded, *main._loaders(loaded, cpu), cpu)


def test_derived_numbers_stand_in_one_table_before_training(tiny_shards: Path) -> None:
    plan = plan_of(
        tiny_shards,
        "train.batch_size=6",
        "train.accumulate=2",
        "train.lr=0.1",
        "train.lr_base_batch=4",
        "train.warmup_steps=100",
    )
    assert plan.global_batch == 12
    assert plan.lr == pytest.approx(0.3), "linear in the global batch"
    assert plan.warmup_steps == 9, "no longer than an epoch"
    assert (plan.train_samples, plan.val_samples, plan.left_out, plan.steps_per_epoch) == (
        57,
        7,
        3,
        5,
    )
    for word in (
        "world size",
        "global batch",
        "steps per epoch",
        "left out",
        "learning rate",
        "device, precision",
    ):
        assert word in plan.table()


def test_a_plan_that_cannot_work_is_refused_with_its_numbers(tiny_shards: Path) -> None:
    with pytest.raises(
        config.InputError, match=r"57 training samples do not fill one global batch of 64"
    ):
        plan_of(tiny_shards, "train.batch_size=64")
    with pytest.raises(config.InputError, match=r"sync_bn.*GPUs only"):
        plan_of(tiny_shards, "train.sync_bn=true", "train.batch_size=6")


def model_of(*keys: str, new: bool = True) -> torch.nn.Module:
    from portrait_dist.training import main

    return main._make_model(config.load(None, ["model.init_features=2", *keys]), new)


def test_a_new_run_begins_with_the_weights_it_is_given_and_one_that_goes_on_does_not(
    tmp_path: Path,
) -> None:
    given = model_of("train.seed=1")
    checkpoints.save_atomically(tmp_path / "given.pth", {"net": given.state_dict()})
    key = f"model.weights={tmp_path / 'given.pth'}"
    assert largest_difference(model_of("train.seed=2", key).state_dict(), given.state_dict()) == 0
    assert (
        largest_difference(
            model_of("train.seed=2", key, new=False).state_dict(), given.state_dict()
        )
        > 0.1
    )
    with pytest.raises(
        config.InputError, match=r"another form; give model\.init_features=2 model\.norm=batch"
    ):
        model_of(key, "model.norm=group")


def test_importing_the_trainer_leaves_the_programs_command_line_to_the_program() -> None:
    code = "import sys; from portrait_dist.training import PortraitTrainer; print(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help", "--local_rank=3"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "['--help', '--local_rank=3']"), (
        done.stderr
    )
