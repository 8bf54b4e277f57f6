"""The loop in one process: equal to stock SuperGradients, no waiting, each key does its work."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from portrait_dist import checkpoints, config
from portrait_dist.errors import DivergedError, PortraitDistError
from portrait_dist.losses import CustomSegLoss, SoftIoULoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import UNet
from portrait_dist.training import LoopOptions, PortraitTrainer
from portrait_dist.training.device_batches import DeviceBatches, samples_in, tensors_in
from portrait_dist.training.loop import weights_are_finite
from portrait_dist.training.preemption import StopSignals, exchange_interval
from portrait_dist.training.sg_adapter import Callback, Trainer, use_device
from tests.jobs import largest_difference

torch.set_num_threads(1)


def test_weights_that_are_none_are_finite() -> None:
    net = torch.nn.Linear(2, 1)
    net.register_parameter("nothing", torch.nn.Parameter(torch.zeros(1, 0, 3)))
    assert weights_are_finite(net)
    torch.nn.init.constant_(net.weight, math.nan)
    assert not weights_are_finite(net)


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


class HostReads(TorchDispatchMode):
    """Records the operations that make the host wait for a device, had the tensors been on one.

    Tensors of a CPU never wait, so the operations themselves are looked for: a value or a number of
    elements, that the host learns from a tensor; and a copy to the CPU.
    """

    WAITING = (
        torch.ops.aten._local_scalar_dense,  # .item(), float(), bool(), .tolist() of a scalar
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.is_nonzero,
        torch.ops.aten.equal,
        torch.ops.aten.unique_consecutive,
        torch.ops.aten._unique2,
        torch.ops.aten.repeat_interleave,
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.operations += 1
        packet = function.overloadpacket
        masked = packet in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            tensor is not None and tensor.dtype in (torch.bool, torch.uint8) for tensor in args[1]
        )
        if packet in self.WAITING or masked:
            self.found.append(str(packet))
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> HostReads:
        """Also watch the methods that leave torch without an operation."""
        self.kept = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy")}
        for name, method in self.kept.items():
            setattr(torch.Tensor, name, self.recording(name, method))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self.kept.items():
            setattr(torch.Tensor, name, method)

    def recording(self, name: str, method: Any) -> Any:
        def recorded(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found.append(name)
            return method(tensor, *args, **kwargs)

        return recorded


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda loss: loss.sum().item(),
    "float": lambda loss: float(loss.sum()),
    "bool": lambda loss: bool(loss.sum() > 0),
    "tolist": lambda loss: loss.tolist(),
    "cpu": lambda loss: loss.cpu(),
    "numpy": lambda loss: loss.numpy(),
    "nonzero": lambda loss: loss.nonzero(),
    "mask": lambda loss: loss[loss > 0],
    "masked_select": lambda loss: loss.masked_select(loss > 0),
    "where": lambda loss: torch.where(loss > 0),
    "unique": lambda loss: loss.unique(),
}


class WaitInEachStep(Callback):
    def __init__(self, wait: Callable[[torch.Tensor], object]) -> None:
        self.wait = wait

    def on_train_batch_loss_end(self, context: Any) -> None:
        self.wait(context.loss_log_items.detach())


def host_reads(folder: Path, data: TensorDataset, callbacks: list[Callback]) -> list[list[str]]:
    """What the host reads in the training part of each epoch, for 6 steps an epoch and for 12."""
    reads = []
    for batch_size in (4, 2):
        options = LoopOptions(log_every_steps=1000)
        trainer = PortraitTrainer(f"reads-{batch_size}", str(folder), options=options)
        loop = trainer.run_training_epoch
        epochs: list[list[str]] = []

        def watched(
            context: Any, show: bool, loop: Any = loop, epochs: list[list[str]] = epochs
        ) -> dict[str, float]:
            with HostReads() as watch:
                values = loop(context, show)
            assert watch.operations > 1000, "the hook saw the steps"
            epochs.append(watch.found)
            return values

        trainer.run_training_epoch = watched  # type: ignore[method-assign]
        # SGD: Adam reads its own step counter, a number that never leaves the host.
        fit(
            trainer,
            data,
            batch_size=batch_size,
            optimizer="SGD",
            loss=SoftIoULoss(0.5, 0.5),
            save_model=False,
            phase_callbacks=callbacks,
        )
        assert len(epochs) == 2
        reads.append(epochs)
    assert len(reads) == 2
    return [[kind for epoch in epochs for kind in epoch] for epochs in reads]


def test_the_host_never_waits_for_the_device_within_a_step(
    batches: TensorDataset, tmp_path: Path
) -> None:
    """Twice the steps, the same reads: all of them belong to epochs, none to steps."""
    few, many = host_reads(tmp_path, batches, [])
    assert sorted(few) == sorted(many)


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_in_each_step_is_found_whatever_its_form(
    wait: str, batches: TensorDataset, tmp_path: Path
) -> None:
    few, many = host_reads(tmp_path, batches, [WaitInEachStep(WAITS[wait])])
    assert len(many) >= len(few) + 12, "one more for each further step"


def test_accumulated_batches_give_the_step_of_one_large_batch(
    batches: TensorDataset, tmp_path: Path
) -> None:
    alike: dict[str, Any] = {"loss": SoftIoULoss(0.5, 0.5), "norm": "group"}
    fit(PortraitTrainer("large", str(tmp_path)), batches, batch_size=12, **alike)
    small = PortraitTrainer("small", str(tmp_path))
    fit(small, batches, batch_size=4, batch_accumulate=3, **alike)
    assert difference(weights(tmp_path / "large"), weights(tmp_path / "small")) < 2e-4


SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "cosine after warm-up": {
        "warmup_mode": "LinearBatchLRWarmup",
        "lr_warmup_steps": 3,
        "warmup_initial_lr": 1e-3,
    },
    "polynomial": {"lr_mode": "PolyLRScheduler"},
    "exponential": {"lr_mode": "ExponentialLRScheduler", "lr_decay_factor": 0.5},
    "epochs cut short": {},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_and_the_averaged_weights_count_steps_not_batches(
    name: str, batches: TensorDataset, tmp_path: Path
) -> None:
    """A run that accumulates two batches has the rates and averages of one with batches of both."""
    alike: dict[str, Any] = {
        **SCHEDULES[name],
        "loss": SoftIoULoss(0.5, 0.5),
        "norm": "group",
        "optimizer": "SGD",  # Adam blows rounding up
        "ema": True,
        "ema_params": {"decay": 0.9, "decay_type": "exp", "beta": 15},
    }
    cut = (2, 4) if name == "epochs cut short" else (None, None)
    large, small = (PortraitTrainer(name, str(tmp_path)) for name in ("large", "small"))
    one = fit(large, batches, batch_size=8, max_train_batches=cut[0], **alike)
    two = fit(small, batches, batch_size=4, batch_accumulate=2, max_train_batches=cut[1], **alike)
    assert two.rates == pytest.approx([rate for rate in one.rates for _ in range(2)], rel=1e-12)
    assert len(set(one.rates)) >= 3, "it is no constant"
    for key in ("net", "ema_net"):
        found = difference(
            weights(tmp_path / "large", key=key), weights(tmp_path / "small", key=key)
        )
        assert found < 2e-6, key


def test_epochs_cut_short_do_not_restart_the_decoders(tiny_shards: Path) -> None:
    from portrait_dist.data import build_loader

    loader = build_loader(tiny_shards, "train", 4, workers=2)
    threads: list[set[threading.Thread]] = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        batches = DeviceBatches(loader, torch.device("cpu"), 5)
        whole = build_loader(tiny_shards, "train", 4, workers=-1)
        whole.set_epoch(epoch)
        assert [batch.keys for batch in batches] == [batch.keys for batch in whole][:5]
        batches.close()
        assert batches.position.loader == {**whole.state_dict(), "samples_seen": 20}
        threads.append({one for one in threading.enumerate() if one.name.startswith("decode-")})
    assert threads[1] == threads[2] == threads[3] != set()
    loader.close()


def test_the_schedule_ends_with_epochs_that_are_cut_short(
    batches: TensorDataset, tmp_path: Path
) -> None:
    cut = fit(PortraitTrainer("cut", str(tmp_path)), batches, max_train_batches=3)
    short = TensorDataset(*(one[:12] for one in batches.tensors))
    whole = fit(PortraitTrainer("whole", str(tmp_path)), short)
    assert cut.rates == whole.rates


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
    trainer = PortraitTrainer("compiled", str(tmp_path))
    compiled = fit(
        trainer,
        batches,
        loss=loss,
        max_epochs=1,
        torch_compile=True,
        ema=True,
        ema_params={"decay": 0.5, "decay_type": "constant"},
    )
    assert trainer.ema_model.ema._compiled_call_impl is not None, "validated compiled as well"
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


def model_of(*keys: str, new: bool = True) -> torch.nn.Module:
    from portrait_dist.training import components

    loaded = config.load(None, ["model.init_features=2", *keys])
    return components.make_network(loaded, (32, 32), 2, new=new).module


def test_a_new_run_starts_with_the_weights_it_is_given_and_a_resumed_one_does_not(
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


# Losses that are not finite ---


class PoisonedLoss(SoftIoULoss):
    """Gives a loss that is not a number in one step."""

    def __init__(self, at: int) -> None:
        super().__init__(0.5, 0.5)
        self.at, self.calls = at, 0

    def forward(self, preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = super().forward(preds, target)
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.at:
                return value * float("nan")
        return value


@pytest.mark.parametrize("log_every", [1, 4, 1000])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step_whenever_it_is_read(
    log_every: int, batches: TensorDataset, tmp_path: Path
) -> None:
    """Step 9 of the run is step 3 of the second epoch; the first epoch's checkpoint stays."""
    options = LoopOptions(log_every_steps=log_every)
    trainer = PortraitTrainer("run", str(tmp_path), options=options)
    with pytest.raises(DivergedError) as caught:
        fit(trainer, batches, loss=PoisonedLoss(9), max_epochs=3)
    error = caught.value
    assert "epoch 2, step 3 of 6" in str(error)
    assert "learning rate 0.0" in str(error)
    assert "ckpt_latest.pth stays as it was" in str(error)
    assert (error.epoch, error.step, error.exit_code, error.requeue) == (1, 9, 1, False)
    saved = checkpoints.read(tmp_path / "run" / "ckpt_latest.pth")
    assert saved["epoch"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in saved["net"].values())


def test_weights_that_are_not_finite_are_never_saved(
    batches: TensorDataset, tmp_path: Path
) -> None:
    """The last optimiser step of an epoch breaks the weights; no loss has seen it."""

    class BreakWeights(Callback):
        def on_train_batch_end(self, context: Any) -> None:
            if context.epoch == 1 and context.batch_idx == 5:
                with torch.no_grad():
                    next(context.net.parameters()).view(-1)[0] = float("inf")

    with pytest.raises(DivergedError, match="weights are not finite in epoch 2"):
        fit(PortraitTrainer("run", str(tmp_path)), batches, phase_callbacks=[BreakWeights()])
    assert checkpoints.read_info(tmp_path / "run" / "ckpt_latest.pth").epoch == 1


# Any network ---


class TwoHeads(torch.nn.Module):
    """Gives a tuple with a dict in it, as networks with auxiliary heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.heads = torch.nn.ModuleList(torch.nn.Conv2d(4, 1, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        features = self.body(x).relu()
        return self.heads[0](features), {"side": self.heads[1](features)}


class LossOfHeads(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def forward(self, outputs: Any, target: torch.Tensor) -> torch.Tensor:
        main, side = outputs[0], outputs[1]["side"]
        self.dtypes |= {main.dtype, side.dtype}
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        return entropy(main, target) + entropy(side, target)


def test_in_bf16_every_tensor_of_nested_outputs_reaches_the_loss_in_float32(
    batches: TensorDataset, tmp_path: Path
) -> None:
    use_device(torch.device("cpu"))
    loss = LossOfHeads()
    loader = DataLoader(batches, batch_size=4)
    trainer = PortraitTrainer("run", str(tmp_path))
    params = {
        "max_epochs": 1,
        "initial_lr": 1e-2,
        "optimizer": "SGD",
        "loss": loss,
        "train_metrics_list": [],
        "valid_metrics_list": [],
        "metric_to_watch": "LossOfHeads",
        "greater_metric_to_watch_is_better": False,
        "mixed_precision": True,
        "average_best_models": False,
        "log_installed_packages": False,
    }
    trainer.train(TwoHeads(), params, loader, loader)
    assert loss.dtypes == {torch.float32}
    info = checkpoints.read_info(tmp_path / "run" / "ckpt_latest.pth")
    assert info.samples_seen == 24, "samples, not the parts of a tuple"
    assert (info.size, info.aspect) == ((32, 32), 1.0), "from the first batch"
    assert info.network == f"{TwoHeads.__module__}.TwoHeads"
    assert info.model is None
    with pytest.raises(config.InputError, match=r"another model.*TwoHeads"):
        checkpoints.load_model(tmp_path / "run" / "ckpt_latest.pth")


def test_batches_of_any_nesting_move_to_the_device_and_are_counted() -> None:
    inputs, targets = torch.zeros(3, 1, 4, 6), {"mask": torch.ones(3, 4, 6), "id": [1, 2, 3]}
    found = next(iter(DeviceBatches([({"x": inputs}, targets)], torch.device("cpu"), limit=1)))
    assert [tensor.shape for tensor in tensors_in(found)] == [(3, 1, 4, 6), (3, 4, 6)]
    assert samples_in(found) == 3
    assert found[1]["id"] == (1, 2, 3)


# The files of an epoch ---


def test_best_is_a_hard_link_of_latest_where_both_are_the_same_state(
    batches: TensorDataset, tmp_path: Path
) -> None:
    trainer = PortraitTrainer("run", str(tmp_path))
    fit(trainer, batches, max_epochs=1, average_best_models=True)
    run = tmp_path / "run"
    assert (run / "ckpt_best.pth").samefile(run / "ckpt_latest.pth")
    mean, latest = weights(run, "average_model.pth"), weights(run)
    assert difference(mean, latest) == 0, "the mean of one"
    assert not (run / "averaging_snapshots").exists()


def test_the_average_is_the_mean_of_the_epochs_weights(
    batches: TensorDataset, tmp_path: Path
) -> None:
    """The network is one and changes in place; each epoch's weights are kept beside."""
    every: list[dict[str, torch.Tensor]] = []

    class KeepWeights(Callback):
        def on_validation_loader_end(self, context: Any) -> None:
            if context.epoch < 3:
                every.append(checkpoints.host_copy(context.net.state_dict()))

    fit(
        PortraitTrainer("run", str(tmp_path)),
        batches,
        max_epochs=3,
        average_best_models=True,
        phase_callbacks=[KeepWeights()],
    )
    mean = weights(tmp_path / "run", "average_model.pth")
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            total = every[0][name].double() + every[1][name] + every[2][name]
            assert torch.equal(tensor, (total / 3).float()), name


def test_a_file_holds_its_epochs_weights_though_training_continues_while_it_is_written(
    batches: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writing thread waits until the next epoch has taken three steps."""
    write, steps_taken = checkpoints.write, threading.Event()
    kept: dict[str, torch.Tensor] = {}

    def late(path: Path, state: dict[str, Any]) -> None:
        if state["epoch"] == 1:
            assert steps_taken.wait(60)
        write(path, state)

    class Watch(Callback):
        def on_validation_loader_end(self, context: Any) -> None:
            if context.epoch == 0:
                kept.update({name: one.clone() for name, one in context.net.state_dict().items()})

        def on_train_batch_end(self, context: Any) -> None:
            if context.epoch == 1 and context.batch_idx == 2:
                steps_taken.set()

    monkeypatch.setattr(checkpoints, "write", late)
    trainer = PortraitTrainer("run", str(tmp_path), options=LoopOptions(channels_last=True))
    fit(trainer, batches, save_ckpt_epoch_list=[1], phase_callbacks=[Watch()])
    saved = weights(tmp_path / "run", "ckpt_epoch_1.pth")
    assert difference(saved, kept) == 0
    assert difference(saved, weights(tmp_path / "run")) > 1e-3


def test_an_error_of_the_writing_thread_is_raised_at_the_next_step_and_the_old_file_stays(
    batches: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, steps = checkpoints.write, StepLosses()

    def full_disk(path: Path, state: dict[str, Any]) -> None:
        if state["epoch"] == 2:
            raise PortraitDistError(f"{path}: not written, the disk is full")
        write(path, state)

    monkeypatch.setattr(checkpoints, "write", full_disk)
    with pytest.raises(PortraitDistError, match="the disk is full"):
        fit(PortraitTrainer("run", str(tmp_path)), batches, max_epochs=9, phase_callbacks=[steps])
    assert 12 < len(steps.losses) <= 18, "within the epoch after the failed save"
    assert checkpoints.read_info(tmp_path / "run" / "ckpt_latest.pth").epoch == 1


# Stopping ---


def test_the_interval_of_exchanges_is_one_up_to_8_ranks_and_never_more_than_64_or_the_epoch() -> (
    None
):
    assert [exchange_interval(ranks, 1000) for ranks in (1, 2, 8, 15)] == [1, 1, 1, 1]
    assert [exchange_interval(ranks, 1000) for ranks in (16, 64, 512, 4096)] == [2, 8, 64, 64]
    assert exchange_interval(512, 5) == 5
    assert exchange_interval(512, 0) == 1


def test_a_run_is_validated_and_saved_every_so_many_epochs_and_at_its_end(
    batches: TensorDataset, tmp_path: Path
) -> None:
    validated: list[int] = []

    class KeepEpochs(Callback):
        def on_validation_loader_end(self, context: Any) -> None:
            validated.append(context.epoch + 1)

    fit(
        PortraitTrainer("run", str(tmp_path)),
        batches,
        max_epochs=5,
        run_validation_freq=2,
        phase_callbacks=[KeepEpochs()],
    )
    assert validated == [2, 4, 5]
    assert checkpoints.read_info(tmp_path / "run" / "ckpt_latest.pth").epoch == 5


def floats(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that are averaged; counters are not."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def test_the_average_of_weights_follows_the_network_in_every_step_and_after_loading(
    batches: TensorDataset, tmp_path: Path
) -> None:
    """With decay 0 the average is the network itself, in every step and after loading."""
    trainer = PortraitTrainer("run", str(tmp_path))
    ema: dict[str, Any] = {"ema": True, "ema_params": {"decay": 0.0, "decay_type": "constant"}}
    fit(trainer, batches, loss=SoftIoULoss(0.5, 0.5), max_epochs=2, **ema)
    saved = checkpoints.read(tmp_path / "run" / "ckpt_latest.pth")
    assert difference(floats(saved["ema_net"]), floats(saved["net"])) == 0
    again = PortraitTrainer("run", str(tmp_path))
    again.fixed_folder = True
    fit(again, batches, loss=SoftIoULoss(0.5, 0.5), max_epochs=3, resume=True, **ema)
    saved = checkpoints.read(tmp_path / "run" / "ckpt_latest.pth")
    assert saved["epoch"] == 3
    assert difference(floats(saved["ema_net"]), floats(saved["net"])) == 0


def test_a_rank_notices_that_its_torchrun_is_gone_without_a_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parent may die before the kernel was asked for a signal."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopSignals() as signals:
        assert signals.received == ""
        monkeypatch.setattr("os.getppid", lambda: 1)
        assert signals.received == "the end of its torchrun process"
