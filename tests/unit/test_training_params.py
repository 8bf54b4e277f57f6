"""Every training parameter of SuperGradients does what it does there, is refused or is warned of.

Each is set once, for stock SuperGradients and for PortraitTrainer: the weights of the last epoch,
the learning rates and the names of the files must be equal, and must show that it was set.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from portrait_dist.errors import InputError
from portrait_dist.metrics import SoftIoU
from portrait_dist.training import PortraitTrainer, sg_parameters
from portrait_dist.training.sg_adapter import Callback, Trainer, use_device

import super_gradients  # isort: skip
from super_gradients.training.params import DEFAULT_TRAINING_PARAMS  # isort: skip

torch.set_num_threads(1)
RECIPES = Path(super_gradients.__file__).parent / "recipes" / "training_hyperparams"


class Net(nn.Module):
    """Probabilities [B, 1, H, W], with a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.head(self.norm(self.conv(x))))


class Rates(Callback):
    """Learning rate of each step, and the calls of evaluation."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.calls: list[str] = []

    def on_train_batch_loss_end(self, context: Any) -> None:
        self.rates.append(context.optimizer.param_groups[0]["lr"])

    def on_validation_batch_end(self, context: Any) -> None:
        self.calls.append("valid")

    def on_test_batch_end(self, context: Any) -> None:
        self.calls.append("test")


@dataclass
class Seen:
    """What a training leaves behind."""

    weights: list[torch.Tensor]
    averaged: list[torch.Tensor]
    names: list[str]
    rates: list[float]
    calls: list[str]
    files: list[str]
    watched: str
    text: str

    def same_result(self, other: Seen) -> bool:
        if len(self.averaged) != len(other.averaged):
            return False
        return (
            all(map(torch.equal, self.weights, other.weights))
            # Fused, the average of the weights is rounded in another way.
            and all(map(torch.allclose, self.averaged, other.averaged))
            and self.names == other.names
            and self.rates == other.rates
            and self.calls == other.calls
            and self.files == other.files
            and self.watched == other.watched
        )


def loader(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(12, 3, 8, 8, generator=generator)
    masks = (images.mean(1, keepdim=True) > 0).float()
    return DataLoader(TensorDataset(images, masks), batch_size=4)


def halve(inputs: torch.Tensor, targets: torch.Tensor, index: int) -> Any:
    return inputs / 2, targets


BASE: dict[str, Any] = {
    "max_epochs": 3,
    "initial_lr": 0.05,
    "lr_mode": "StepLRScheduler",
    "lr_updates": [1],
    "lr_decay_factor": 0.5,
    "loss": nn.BCELoss(),
    "optimizer": "SGD",
    "train_metrics_list": [SoftIoU()],
    "valid_metrics_list": [SoftIoU()],
    "metric_to_watch": "SoftIoU",
    "average_best_models": False,
    "log_installed_packages": False,
}

COSINE = {"lr_mode": "CosineLRScheduler"}
WARM = {"lr_warmup_epochs": 1}
BY_BATCH = {"warmup_mode": "LinearBatchLRWarmup", "lr_warmup_steps": 2}
ALIKE: dict[str, dict[str, Any]] = {
    "ckpt_best_name": {"ckpt_best_name": "other.pth"},
    "clip_grad_norm": {"clip_grad_norm": 0.01},
    "cosine_final_lr_ratio": {**COSINE, "cosine_final_lr_ratio": 0.5},
    "criterion_params": {"loss": "BinaryDiceLoss", "criterion_params": {"smooth": 3.0}},
    "ema": {"ema": True, "ema_params": {"decay": 0.5, "decay_type": "constant"}},
    "ema_params": {"ema": True, "ema_params": {"decay": 0.9, "decay_type": "threshold"}},
    "greater_metric_to_watch_is_better": {
        "metric_to_watch": "BCELoss",
        "greater_metric_to_watch_is_better": False,
    },
    "initial_lr": {"initial_lr": 0.2},
    "loss": {"loss": nn.L1Loss()},
    "lr_cooldown_epochs": {**COSINE, "lr_cooldown_epochs": 1},
    "lr_decay_factor": {"lr_decay_factor": 0.1},
    "lr_mode": {"lr_mode": {"StepLR": {"gamma": 0.3, "step_size": 1, "phase": "TRAIN_EPOCH_END"}}},
    "lr_schedule_function": {
        "lr_mode": "FunctionLRScheduler",
        "lr_schedule_function": lambda initial_lr, epoch, iter, max_epoch, iters_per_epoch, **_: (
            initial_lr / (1 + epoch + iter)
        ),
    },
    "lr_updates": {"lr_updates": [2]},
    "lr_warmup_epochs": WARM,
    "lr_warmup_steps": {**BY_BATCH, "warmup_initial_lr": 0.01},
    "max_epochs": {"max_epochs": 2},
    "max_train_batches": {"max_train_batches": 1},
    "max_valid_batches": {"max_valid_batches": 1},
    "metric_to_watch": {"metric_to_watch": "BCELoss"},
    "optimizer": {"optimizer": "Adam"},
    "optimizer_params": {"optimizer_params": {"momentum": 0.1}},
    "pre_prediction_callback": {"pre_prediction_callback": halve},
    "run_test_freq": {"run_test_freq": 2},
    "run_validation_freq": {"run_validation_freq": 2},
    "save_ckpt_epoch_list": {"save_ckpt_epoch_list": [2]},
    "save_model": {"save_model": False},
    "step_lr_update_freq": {"lr_updates": [], "step_lr_update_freq": 0.5},
    "train_metrics_list": {"train_metrics_list": []},
    "valid_metrics_list": {
        "valid_metrics_list": ["BinaryIOU"],
        "metric_to_watch": "mean_IOU",
    },
    "warmup_initial_lr": {**WARM, "warmup_initial_lr": 0.001},
    "warmup_mode": {**BY_BATCH, "warmup_initial_lr": 0.02},
    "zero_weight_decay_on_bias_and_bn": {"zero_weight_decay_on_bias_and_bn": True},
}
"""Parameter → what is set. The result is stock's, and another one than without it."""

NO_OTHER_RESULT: dict[str, dict[str, Any]] = {
    "kill_ddp_pgroup_on_end": {"kill_ddp_pgroup_on_end": False},
    "log_installed_packages": {"log_installed_packages": True},
    "seed": {"seed": 7},
    "sync_bn": {"sync_bn": True},
}
"""The same in one process and without random numbers, for stock too."""

ELSEWHERE = {
    "average_best_models": "test_training_loop: the average is the mean of the epochs' weights",
    "batch_accumulate": "test_training_loop: accumulated batches give the step of one large batch",
    "ckpt_name": "below",
    "dataset_statistics": "refused with the stream; detection only",
    "finetune": "below",
    "load_opt_params": "below",
    "mixed_precision": "test_training_loop: bf16",
    "multiply_head_lr": "read by SuperGradients' networks",
    "phase_callbacks": "every test here",
    "precise_bn": "below",
    "precise_bn_batch_size": "goes with precise_bn",
    "resume": "below",
    "resume_path": "below",
    "resume_strict_load": "test_drop_in",
    "run_id": "test_drop_in",
    "sg_logger": "below",
    "sg_logger_params": "test_drop_in: the system monitor",
    "silent_mode": "test_drop_in: a silent training says nothing",
    "torch_compile": "test_drop_in: compilation options reach the compiler",
    "torch_compile_loss": "below",
    "torch_compile_options": "test_drop_in",
}
"""Parameter → the test that shows that it is honoured."""


def train(kind: Any, folder: Path, *, model: nn.Module | None = None, **params: Any) -> Seen:
    """Train for three epochs and say what came of it."""
    use_device(torch.device("cpu"))
    torch.manual_seed(1)
    model = model or Net()
    rates, text = Rates(), io.StringIO()
    trainer = kind("run", ckpt_root_dir=str(folder))
    tests = {"some": loader(6)} if "run_test_freq" in params else None
    with redirect_stderr(text):
        trainer.train(
            model,
            BASE | {"phase_callbacks": [rates]} | params,
            loader(3),
            loader(5),
            test_loaders=tests,
        )
    files = sorted({path.name for path in folder.rglob("*.pth")})
    weights = list(trainer.net.state_dict().values())
    averaged = list(trainer.ema_model.ema.state_dict().values()) if trainer.ema else []
    names = [*trainer.train_monitored_values, *trainer.valid_monitored_values]
    watched = f"{trainer.metric_to_watch} {float(trainer.best_metric):.6f}"
    return Seen(weights, averaged, names, rates.rates, rates.calls, files, watched, text.getvalue())


def everything() -> set[str]:
    """All parameters that SuperGradients names, in code and in recipes."""
    recipes = [yaml.safe_load(path.read_text()) for path in RECIPES.glob("*.yaml")]
    names = {name for recipe in recipes for name in recipe} | set(DEFAULT_TRAINING_PARAMS)
    return names - {"defaults", "_convert_"}


def test_every_parameter_is_honoured_refused_or_warned_of_and_has_a_test() -> None:
    kinds = [sg_parameters.HONOURED, set(sg_parameters.REFUSED), set(sg_parameters.WARNED)]
    assert sum(map(len, kinds)) == len(set().union(*kinds)), "each in one of them"
    assert everything() - set().union(*kinds) == set()
    shown = [set(ALIKE), set(NO_OTHER_RESULT), set(ELSEWHERE)]
    assert sum(map(len, shown)) == len(set().union(*shown))
    assert set().union(*shown) == sg_parameters.HONOURED


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return train(PortraitTrainer, tmp_path_factory.mktemp("without"))


@pytest.mark.parametrize("name", sorted(ALIKE | NO_OTHER_RESULT))
def test_a_parameter_gives_stocks_result_and_not_the_one_without_it(
    name: str, without: Seen, tmp_path: Path
) -> None:
    params: dict[str, Any] = dict((ALIKE | NO_OTHER_RESULT)[name])
    ours = train(PortraitTrainer, tmp_path / "ours", **params)
    stock = train(Trainer, tmp_path / "stock", **params)
    assert ours.rates == stock.rates
    assert ours.calls == stock.calls
    assert ours.files == stock.files
    assert ours.names == stock.names
    assert ours.watched == stock.watched
    assert ours.same_result(stock), "the weights"
    assert ours.same_result(without) == (name in NO_OTHER_RESULT)
    assert "not read" not in ours.text
    assert "no training parameter" not in ours.text


def test_resuming_takes_over_optimiser_and_schedule_as_stock_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stock's own checkpoints hold what today's torch.load refuses.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    first: dict[str, Any] = {"max_epochs": 2, "optimizer": "Adam"}
    for how in ("resume", "resume_path", "ckpt_name", "load_opt_params"):
        results = []
        for kind in (PortraitTrainer, Trainer):
            folder = tmp_path / how / kind.__name__
            train(kind, folder, save_ckpt_epoch_list=[1], **first)
            (latest,) = folder.rglob("ckpt_latest.pth")
            more: dict[str, Any] = {"resume": True, "optimizer": "Adam"}
            if how == "resume_path":
                more = {"resume_path": str(latest), "optimizer": "Adam"}
            elif how == "ckpt_name":
                more["ckpt_name"] = "ckpt_epoch_1.pth"
            elif how == "load_opt_params":
                more["load_opt_params"] = False
            results.append(train(kind, folder, **more))
        assert results[0].rates == results[1].rates, how
        assert all(map(torch.equal, results[0].weights, results[1].weights)), how


def test_a_compiled_loss_and_a_logger_of_ones_own_are_used(tmp_path: Path) -> None:
    from super_gradients.common.registry.registry import register_sg_logger
    from super_gradients.common.sg_loggers.base_sg_logger import BaseSGLogger

    seen = []

    @register_sg_logger("logger_of_ones_own")
    class Own(BaseSGLogger):
        def add_scalars(self, tag_scalar_dict: Any, global_step: int | None = None) -> None:
            seen.append(sorted(tag_scalar_dict))

    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    options = {"backend": backend, "mode": None, "options": None}
    train(
        PortraitTrainer,
        tmp_path,
        torch_compile_loss=True,
        torch_compile_options=options,
        sg_logger="logger_of_ones_own",
    )
    assert graphs
    assert ["iou/val", "loss/val", "seconds/val"] in seen


def test_finetuning_freezes_what_the_network_says(tmp_path: Path) -> None:
    from super_gradients.training.models import SgModule

    class Tunable(SgModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: torch.Tensor) -> Any:
            return self.net(x)

        @staticmethod
        def get_finetune_lr_dict(lr: float) -> dict[str, float]:
            return {"net.head": lr, "default": 0}

    torch.manual_seed(1)
    model = Tunable()
    before = model.net.conv.weight.clone()
    train(PortraitTrainer, tmp_path, model=model, finetune=True)
    assert torch.equal(model.net.conv.weight, before)


@pytest.mark.parametrize("name", [*sg_parameters.REFUSED, "precise_bn"])
def test_what_is_not_supported_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    params: dict[str, Any] = {name: True}
    with pytest.raises(InputError, match=f"{name}=True: "):
        train(PortraitTrainer, tmp_path, **params)
    assert list(tmp_path.rglob("*.*")) == []


def test_what_nobody_reads_is_warned_of(tmp_path: Path) -> None:
    params: dict[str, Any] = dict.fromkeys(sg_parameters.WARNED, 1)
    params |= {"initial_learning_rate": 0.1, "max_epochs": 1}
    text = train(PortraitTrainer, tmp_path, **params).text
    for name, advice in sg_parameters.WARNED.items():
        assert f"warning: {name}=1: {advice}" in text
    assert "warning: initial_learning_rate: no training parameter of SuperGradients" in text
