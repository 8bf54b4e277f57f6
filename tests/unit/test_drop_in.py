"""PortraitTrainer in place of SuperGradients' Trainer: it works alike, and what it prints is true.

One process imports SuperGradients once for all of them.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from portrait_dist.errors import InputError
from portrait_dist.metrics import SoftIoU
from portrait_dist.training import LoopOptions, PortraitKDTrainer, PortraitTrainer
from portrait_dist.training.recorder import RunRecorder
from portrait_dist.training.sg_adapter import KDTrainer, Trainer, use_device

torch.set_num_threads(1)
BOTH = pytest.mark.parametrize("kind", [Trainer, PortraitTrainer], ids=["stock", "ours"])


def one_epoch(**more: Any) -> dict[str, Any]:
    return {
        "max_epochs": 1,
        "initial_lr": 0.1,
        "lr_mode": "CosineLRScheduler",
        "loss": nn.BCELoss(),
        "valid_metrics_list": [SoftIoU()],
        "metric_to_watch": "SoftIoU",
        **more,
    }


class Tiny(nn.Module):
    """A pixelwise classifier: probabilities [B, 1, H, W]."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.conv(x))


class L1(nn.L1Loss):
    """Another name in the log."""


def batches(count: int = 8, batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(
        TensorDataset(images, (images.mean(1, keepdim=True) > 0).float()), batch_size=batch_size
    )


def fit(trainer: Any, *, model: nn.Module | None = None, **params: Any) -> nn.Module:
    """Train the tiny network for two epochs."""
    use_device(torch.device("cpu"))
    torch.manual_seed(1)
    model = model or Tiny()
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "initial_lr": 1e-2,
        "lr_mode": "CosineLRScheduler",
        "optimizer": "Adam",
        "loss": nn.BCELoss(),
        "train_metrics_list": [SoftIoU()],
        "valid_metrics_list": [SoftIoU()],
        "metric_to_watch": "SoftIoU",
        "average_best_models": False,
        "log_installed_packages": False,
    }
    trainer.train(model, defaults | params, batches(), batches())
    return model


def said_by(trainer: Any, **params: Any) -> str:
    """What a training prints on stderr, SuperGradients' log included."""
    text = io.StringIO()
    handlers = [
        handler
        for handler in logging.getLogger("super_gradients").handlers
        if type(handler) is logging.StreamHandler
    ]
    streams = [handler.setStream(text) for handler in handlers]
    try:
        with redirect_stderr(text):
            fit(trainer, **params)
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
    return text.getvalue()


def checkpoint(folder: Path, name: str = "ckpt_best.pth") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return found


# test() -------------------------------------------------------------------------------------------


@BOTH
def test_a_network_is_tested_before_any_training(kind: Any, tmp_path: Path) -> None:
    use_device(torch.device("cpu"))
    trainer = kind("run", ckpt_root_dir=str(tmp_path))
    model, metric = Tiny(), SoftIoU()
    found = trainer.test(model=model, test_loader=batches(), test_metrics_list=[SoftIoU()])
    for images, masks in batches():
        metric.update(model(images), masks)
    assert found == {"SoftIoU": pytest.approx(float(metric.compute()))}


@BOTH
def test_a_network_is_tested_after_training_with_other_metrics(kind: Any, tmp_path: Path) -> None:
    trainer = kind("run", ckpt_root_dir=str(tmp_path))
    model = fit(trainer)
    metrics = [torchmetrics.classification.BinaryAccuracy()]
    found = trainer.test(model=model, test_loader=batches(), test_metrics_list=metrics)
    right = [(model(x) > 0.5) == (y > 0.5) for x, y in batches()]
    assert found["BinaryAccuracy"] == pytest.approx(float(torch.cat(right).float().mean()))
    assert found["BCELoss"] > 0


# Folders ------------------------------------------------------------------------------------------


def test_a_second_run_of_a_name_never_touches_the_first_ones_best(tmp_path: Path) -> None:
    fit(PortraitTrainer("run", str(tmp_path)), initial_lr=0.05, max_epochs=6)
    before = (tmp_path / "run" / "ckpt_best.pth").read_bytes()
    fit(PortraitTrainer("run", str(tmp_path)), initial_lr=1e-5, max_epochs=1)
    assert (tmp_path / "run" / "ckpt_best.pth").read_bytes() == before
    (second,) = (tmp_path / "run").glob("RUN_*")
    assert checkpoint(second, "ckpt_latest.pth")["epoch"] == 1


def test_resume_continues_the_latest_run_and_run_id_the_one_it_names(tmp_path: Path) -> None:
    fit(PortraitTrainer("run", str(tmp_path)), max_epochs=1)
    fit(PortraitTrainer("run", str(tmp_path)), max_epochs=2)
    fit(PortraitTrainer("run", str(tmp_path)), max_epochs=3)
    first, last = sorted((tmp_path / "run").glob("RUN_*"))
    fit(PortraitTrainer("run", str(tmp_path)), max_epochs=5, resume=True)
    fit(PortraitTrainer("run", str(tmp_path)), max_epochs=4, run_id=first.name)
    epochs = [
        checkpoint(path, "ckpt_latest.pth")["epoch"] for path in (tmp_path / "run", first, last)
    ]
    assert epochs == [1, 4, 5]
    assert len(list((tmp_path / "run").glob("RUN_*"))) == 2
    with pytest.raises(InputError, match=f"run_id=RUN_9: .*it has {first.name}"):
        fit(PortraitTrainer("run", str(tmp_path)), run_id="RUN_9")


def test_a_run_continues_a_checkpoint_of_another_folder_and_averages_its_own_models(
    tmp_path: Path,
) -> None:
    fit(PortraitTrainer("first", str(tmp_path)), max_epochs=1)
    path = str(tmp_path / "first" / "ckpt_latest.pth")
    trainer = PortraitTrainer("second", str(tmp_path))
    fit(trainer, resume_path=path, average_best_models=True)
    latest = checkpoint(tmp_path / "second", "ckpt_latest.pth")
    average = checkpoint(tmp_path / "second", "average_model.pth")
    assert latest["epoch"] == 2
    assert torch.equal(average["net"]["conv.weight"], latest["net"]["conv.weight"])


def test_the_root_folder_comes_from_the_environment_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_ROOT_DIR", str(tmp_path / "elsewhere"))
    fit(PortraitTrainer("run"), max_epochs=1)
    assert (tmp_path / "elsewhere" / "run" / "ckpt_latest.pth").is_file()


# Parameters ---------------------------------------------------------------------------------------


def test_resume_strict_load_is_honoured_and_a_remote_checkpoint_refused(tmp_path: Path) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(3, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(self.other(x))

    fit(PortraitTrainer("run", str(tmp_path)), max_epochs=1)
    path = str(tmp_path / "run" / "ckpt_latest.pth")
    with pytest.raises(InputError, match="holds another model"):
        fit(PortraitTrainer("strict", str(tmp_path)), model=Renamed(), resume_path=path)
    fit(
        PortraitTrainer("loose", str(tmp_path)),
        model=Renamed(),
        resume_path=path,
        resume_strict_load="no_key_matching",
        load_opt_params=False,
    )
    assert checkpoint(tmp_path / "loose", "ckpt_latest.pth")["epoch"] == 2
    with pytest.raises(InputError, match="resume_from_remote_sg_logger=True: not supported"):
        fit(PortraitTrainer("remote", str(tmp_path)), resume_from_remote_sg_logger=True)


def test_compilation_options_reach_the_compiler(tmp_path: Path) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    options = {"backend": backend, "mode": None, "options": None}
    fit(
        PortraitTrainer("run", str(tmp_path)),
        torch_compile=True,
        torch_compile_options=options,
        max_epochs=1,
    )
    assert graphs


def test_device_and_multi_gpu_are_refused_with_supergradients_advice() -> None:
    for given in ({"device": "cpu"}, {"multi_gpu": "DDP"}):
        with pytest.raises(KeyError, match="setup_device"):
            PortraitTrainer("run", **given)  # type: ignore[arg-type]


class Parts(nn.Module):
    """A loss that returns (loss, items) and names them."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.component_names = names

    def forward(
        self, preds: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = nn.functional.l1_loss(preds, target)
        return loss, torch.stack([loss] * len(self.component_names)).detach()


@BOTH
def test_the_items_of_a_loss_have_the_names_that_stock_gives_them(
    kind: Any, tmp_path: Path
) -> None:
    for names in (["only"], ["one", "two"]):
        trainer = kind("-".join(names), ckpt_root_dir=str(tmp_path))
        watched = f"Parts/{names[0]}"
        fit(
            trainer,
            loss=Parts(names),
            metric_to_watch=watched,
            greater_metric_to_watch_is_better=False,
            save_model=False,
        )
        assert trainer.loss_logging_items_names == [f"Parts/{name}" for name in names]
        assert trainer.metric_to_watch == watched


def test_the_weights_alone_are_saved_where_no_results_are_given(tmp_path: Path) -> None:
    trainer = PortraitTrainer("run", str(tmp_path))
    model = fit(trainer)
    trainer._save_checkpoint()
    saved = checkpoint(tmp_path / "run", "ckpt_latest_weights_only.pth")
    assert list(saved) == ["net"]
    assert torch.equal(saved["net"]["conv.weight"], model.state_dict()["conv.weight"])


def test_checkpoints_hold_the_preprocessing_of_networks_that_predict(tmp_path: Path) -> None:
    from super_gradients.module_interfaces import HasPredict, HasPreprocessingParams

    class Predicts(Tiny, HasPredict):
        def set_dataset_processing_params(self, **params: Any) -> None:
            self.params = params

        def get_input_channels(self) -> int:
            return 3

        def get_processing_params(self) -> Any:
            return self.params

        def predict(self, *_: Any, **__: Any) -> None: ...
        def predict_webcam(self, *_: Any, **__: Any) -> None: ...

    class Images(TensorDataset, HasPreprocessingParams):
        def get_dataset_preprocessing_params(self) -> dict[str, Any]:
            return {
                "class_names": ["portrait"],
                "image_processor": [{"Normalize": {"mean": [0.5]}}],
            }

    use_device(torch.device("cpu"))
    loader = DataLoader(Images(*batches().dataset.tensors), batch_size=4)  # type: ignore
    trainer = PortraitTrainer("run", str(tmp_path))
    trainer.train(Predicts(), one_epoch(), loader, loader)
    for name in ("ckpt_best.pth", "ckpt_latest.pth", "average_model.pth"):
        assert checkpoint(tmp_path / "run", name)["processing_params"]["class_names"] == [
            "portrait"
        ]


def test_recipes_of_supergradients_train_and_evaluate_with_this_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf
    from super_gradients.training.dataloaders import dataloaders

    monkeypatch.setitem(
        dataloaders.ALL_DATALOADERS,
        "tiny",
        lambda **_: dataloaders.classification_test_dataloader(
            batch_size=4, image_size=32, dataset_size=8
        ),
    )

    config = OmegaConf.create(
        {
            "experiment_name": "recipe",
            "ckpt_root_dir": str(tmp_path),
            "device": "cpu",
            "multi_gpu": "Off",
            "num_gpus": None,
            "architecture": "resnet18_cifar",
            "arch_params": {"num_classes": 5},
            "checkpoint_params": dict.fromkeys(
                ("pretrained_weights", "checkpoint_path", "load_backbone"), None
            )
            | {"strict_load": True},
            "train_dataloader": "tiny",
            "val_dataloader": "tiny",
            "dataset_params": {
                f"{part}_{kind}_params": {}
                for part in ("train", "val")
                for kind in ("dataset", "dataloader")
            },
            "training_hyperparams": {
                "max_epochs": 1,
                "initial_lr": 0.01,
                "lr_mode": "CosineLRScheduler",
                "loss": "CrossEntropyLoss",
                "train_metrics_list": ["Accuracy"],
                "valid_metrics_list": ["Accuracy"],
                "metric_to_watch": "Accuracy",
                "average_best_models": False,
                "max_train_batches": 1,
                "ckpt_name": "ckpt_latest.pth",
            },
        }
    )
    PortraitTrainer.train_from_config(config.copy())
    path = tmp_path / "recipe" / "ckpt_latest.pth"
    assert "portrait_dist" in checkpoint(path.parent, path.name), "a checkpoint of this trainer"
    config.checkpoint_params.checkpoint_path = str(path)
    _, found = PortraitTrainer.evaluate_from_config(config)
    assert 0 <= found["Accuracy"] <= 1


# Distillation and checks of the input -------------------------------------------------------------


def teacher_and_student() -> tuple[nn.Module, nn.Module]:
    from super_gradients.training.models import SgModule

    class Student(SgModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x)

    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)), Student()


def distil(trainer: Any, **params: Any) -> Any:
    """Train the student for two epochs."""
    from super_gradients.training.losses import KDLogitsLoss

    use_device(torch.device("cpu"))
    teacher, student = teacher_and_student()
    loss = KDLogitsLoss(
        nn.BCEWithLogitsLoss(), distillation_loss_fn=nn.MSELoss(), distillation_loss_coeff=0.3
    )
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "initial_lr": 0.1,
        "lr_mode": "CosineLRScheduler",
        "loss": loss,
        "valid_metrics_list": ["BinaryIOU"],
        "metric_to_watch": "target_IOU",
        "average_best_models": False,
    }
    trainer.train(
        training_params=defaults | params,
        student=student,
        teacher=teacher,
        run_teacher_on_eval=True,
        train_loader=batches(),
        valid_loader=batches(),
    )
    return trainer


@pytest.mark.parametrize("ema", [False, True])
def test_a_student_is_distilled_as_by_supergradients_own_trainer(ema: bool, tmp_path: Path) -> None:
    params: dict[str, Any] = {"ema": ema}
    if ema:
        params["ema_params"] = {"decay": 0.5, "decay_type": "constant"}
    stock = distil(KDTrainer("stock", ckpt_root_dir=str(tmp_path)), **params)
    ours = distil(PortraitKDTrainer("ours", str(tmp_path)), **params)
    for name, value in stock.net.state_dict().items():
        assert torch.equal(ours.net.state_dict()[name], value), name
    teacher, _ = teacher_and_student()
    untouched = teacher.state_dict()["0.weight"]
    assert torch.equal(ours.net.teacher.state_dict()["0.weight"], untouched)
    if ema:
        assert ours.ema_model.ema.teacher is ours.net.teacher
    # The best checkpoint is the student alone; the latest resumes both.
    student = ours.ema_model.ema.student if ema else ours.net.student
    best = checkpoint(tmp_path / "ours")
    assert "ema_net" not in best
    if best["epoch"] == 2:
        assert torch.equal(best["net"]["conv.weight"], student.state_dict()["conv.weight"])
    assert set(best["net"]) == set(student.state_dict())
    latest = checkpoint(tmp_path / "ours", "ckpt_latest.pth")
    assert set(latest["net"]) == set(ours.net.state_dict())
    resumed = distil(PortraitKDTrainer("ours", str(tmp_path)), **params, resume=True, max_epochs=3)
    assert resumed.start_epoch == 2


def test_networks_that_check_their_input_are_shown_what_they_will_get(
    tiny_shards: Path, tmp_path: Path
) -> None:
    from super_gradients.module_interfaces import SupportsInputShapeCheck

    from portrait_dist.config import Config
    from portrait_dist.data import build_loader
    from portrait_dist.training.main import Prepare

    class Checks(Tiny, SupportsInputShapeCheck):
        def __init__(self, multiple: int) -> None:
            super().__init__()
            self.multiple, self.shapes = multiple, list[tuple[int, ...]]()

        def validate_input_shape(self, input_shape: Any) -> None:
            self.shapes.append(tuple(input_shape))
            super().validate_input_shape(input_shape)

        def get_input_shape_steps(self) -> tuple[int, int]:
            return self.multiple, self.multiple

    use_device(torch.device("cpu"))
    params = one_epoch(max_train_batches=2)

    def train(model: nn.Module, name: str) -> list[str]:
        """Train two batches of the stream, and return the sample keys that were seen."""
        loaders = [
            build_loader(str(tiny_shards), split, batch_size=4, seed=0, rank=0, world_size=1)
            for split in ("train", "val")
        ]
        trainer = PortraitTrainer(
            name,
            str(tmp_path),
            options=LoopOptions(log_keys=True),
            prepare=Prepare(Config(), 0),
        )
        trainer.train(model, params, *loaders)
        return (tmp_path / name / "keys-rank0.jsonl").read_text().splitlines()

    fits = Checks(multiple=16)
    seen = train(fits, "fits")
    assert fits.shapes == [(4, 3, 32, 32)] * 2, "the network's input, not the stream's bytes"
    assert seen == train(Tiny(), "without"), "looking takes no sample from the training"
    with pytest.raises(ValueError, match="multiple of"):
        train(Checks(multiple=24), "wrong")
    tuples = Checks(multiple=8)
    fit(PortraitTrainer("tuples", str(tmp_path)), model=tuples)
    assert tuples.shapes == [(4, 3, 8, 8)] * 2


# Metrics ------------------------------------------------------------------------------------------


def segmentation() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two batches of scores [B, 3, H, W] with their classes, as one of each."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(6, 3, 9, 7, generator=generator)
    classes = torch.randint(0, 3, (6, 9, 7), generator=generator)
    logits = torch.randn(6, 1, 9, 7, generator=generator)
    masks = torch.randint(0, 2, (6, 1, 9, 7), generator=generator)
    return scores, classes, logits, masks


def of_class(kind: str, found: torch.Tensor, truth: torch.Tensor, number: int) -> float:
    """IoU or Dice of one class, by definition."""
    one, other = found == number, truth == number
    both = int((one & other).sum())
    if kind == "IoU":
        return both / int((one | other).sum())
    return 2 * both / (int(one.sum()) + int(other.sum()))


@pytest.mark.parametrize("kind", ["IoU", "Dice"])
def test_supergradients_iou_and_dice_follow_their_definitions(kind: str) -> None:
    from super_gradients.common.factories.metrics_factory import MetricsFactory

    scores, classes, logits, masks = segmentation()
    found = scores.argmax(1)

    def value(spec: Any, preds: torch.Tensor, target: torch.Tensor) -> Any:
        metric = MetricsFactory().get(spec)
        for some in (slice(0, 4), slice(4, 6)):
            metric.update(preds=preds[some], target=target[some])
        metric.compute()  # asking does not change the counts
        metric._computed = None
        return metric.compute()

    expected = [of_class(kind, found, classes, number) for number in range(3)]
    assert float(value({kind: {"num_classes": 3}}, scores, classes)) == pytest.approx(
        sum(expected) / 3
    )
    each = value({kind: {"num_classes": 3, "reduction": "none"}}, scores, classes)
    assert each.tolist() == pytest.approx(expected)
    # Pixels of the ignored class do not count, and it has no score.
    kept = classes != 1
    some = [of_class(kind, found[kept], classes[kept], number) for number in (0, 2)]
    ignoring = {"num_classes": 3, "ignore_index": 1}
    assert float(value({kind: ignoring}, scores, classes)) == pytest.approx(sum(some) / 2)
    unlabelled = torch.where(torch.arange(7) < 2, 255, classes)
    kept = unlabelled != 255
    some = [of_class(kind, found[kept], classes[kept], number) for number in range(3)]
    ignoring = {"num_classes": 3, "ignore_index": 255}
    assert float(value({kind: ignoring}, scores, unlabelled)) == pytest.approx(sum(some) / 3)
    with pytest.raises(ValueError, match="108 pixels have a class outside of 0 to 2"):
        value({kind: {"num_classes": 3}}, scores, unlabelled)

    short = "IOU" if kind == "IoU" else kind
    pair = [of_class(kind, torch.sigmoid(logits) >= 0.5, masks == 1, number) for number in (0, 1)]
    for target in (masks, masks[:, 0]):
        binary = value(f"Binary{short}", logits, target)
        assert float(binary[f"background_{short}"]) == pytest.approx(pair[0])
        assert float(binary[f"target_{short}"]) == pytest.approx(pair[1])
        assert float(binary[f"mean_{short}"]) == pytest.approx(sum(pair) / 2)


def test_supergradients_accuracy_follows_its_definition() -> None:
    from super_gradients.training.metrics import Accuracy

    scores, classes, _, _ = segmentation()
    metric = Accuracy()
    metric.update(scores, classes)
    assert float(metric.compute()) == pytest.approx(
        float((scores.argmax(1) == classes).float().mean())
    )
    one_hot = Accuracy()
    one_hot.update(scores[:, :, 0, 0], nn.functional.one_hot(classes[:, 0, 0], 3))
    hard = Accuracy()
    hard.update(scores[:, :, 0, 0], classes[:, 0, 0])
    assert one_hot.compute() == hard.compute()


@BOTH
def test_supergradients_metrics_train_by_their_names(kind: Any, tmp_path: Path) -> None:
    trainer = kind("run", ckpt_root_dir=str(tmp_path))
    fit(
        trainer,
        train_metrics_list=["BinaryIOU"],
        valid_metrics_list=["BinaryIOU", "BinaryDice"],
        metric_to_watch="target_IOU",
        save_model=False,
    )
    values = {name: one.current for name, one in trainer.valid_monitored_values.items()}
    assert values["target_Dice"] == pytest.approx(
        2 * values["target_IOU"] / (1 + values["target_IOU"])
    )


class BreaksInTheSecondEpoch(nn.Module):
    """A loss that is not a number from the fifth call on: two batches to train on, two to score."""

    calls = 0

    def forward(self, preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = nn.functional.l1_loss(preds, target)
        return loss * float("nan") if self.calls > 4 else loss


@BOTH
def test_early_stopping_that_watches_the_loss_ends_a_training_that_diverges(
    kind: Any, tmp_path: Path
) -> None:
    from super_gradients.training.utils.callbacks import Phase
    from super_gradients.training.utils.early_stopping import EarlyStop

    loss = BreaksInTheSecondEpoch()
    stop = EarlyStop(Phase.VALIDATION_EPOCH_END, monitor="BreaksInTheSecondEpoch", mode="min")
    fit(
        kind("run", ckpt_root_dir=str(tmp_path)),
        loss=loss,
        phase_callbacks=[stop],
        max_epochs=5,
        save_model=False,
    )
    assert loss.calls == 8


# What is said -------------------------------------------------------------------------------------


def test_what_is_printed_counts_epochs_from_one_and_names_the_best(tmp_path: Path) -> None:
    text = said_by(
        PortraitTrainer("run", str(tmp_path)),
        max_epochs=3,
        initial_lr=0.05,
        average_best_models=True,
        ema=True,
        ema_params={"decay": 0.5, "decay_type": "constant"},
    )
    lines = text.splitlines()
    for epoch in (1, 2, 3):
        (train,) = [line for line in lines if line.startswith(f"epoch {epoch}/3")]
        assert re.search(
            r"train  loss \d\.\d{4}  iou \d\.\d{4}  [\d.]+ images/s, \d+% waiting", train
        )
        assert ("left" in train) == (epoch < 3)
    assert "best iou so far, saved as ckpt_best.pth" in text
    best = checkpoint(tmp_path / "run")["acc"]
    assert re.search(r"averaged model: validation loss \d\.\d{4}  iou \d\.\d{4}", text)
    wrong = ("Best until now", "SUMMARY", "Full dataset size", "Number of GPUs", "CLEANUP", "0/2")
    assert [part for part in (*wrong, "Using EMA") if part in text] == []
    assert len(lines) <= 3 * 2 + 1, text
    assert f"{best:.4f}" in text


def test_a_silent_training_says_nothing(tmp_path: Path) -> None:
    options = LoopOptions(log_every_steps=1)
    for name in ("first", "first"):  # also where the folder has a run
        trainer = PortraitTrainer(name, str(tmp_path), options=options)
        assert said_by(trainer, silent_mode=True, average_best_models=True) == ""


def test_a_log_has_a_line_in_time_also_in_a_short_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from portrait_dist.training import console

    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    text = said_by(PortraitTrainer("run", str(tmp_path)), max_epochs=1)
    assert re.search(r"epoch 1/1  step 1/2  loss \d\.\d{4}  iou \d\.\d{4}  [\d.]+ images/s", text)
    assert re.search(r"validation of epoch 1  step 1/2", text)


def test_the_best_value_follows_a_metrics_own_direction(tmp_path: Path) -> None:
    trainer = PortraitTrainer("run", str(tmp_path))
    fit(
        trainer,
        max_epochs=3,
        valid_metrics_list=[SoftIoU(), torchmetrics.MeanAbsoluteError()],
    )
    better = {name: one.greater_is_better for name, one in trainer.valid_monitored_values.items()}
    assert better == {"BCELoss": False, "SoftIoU": True, "MeanAbsoluteError": False}


def test_tensorboard_has_the_fields_names_and_no_system_cards(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    started = time.monotonic()
    trainer = PortraitTrainer("run", str(tmp_path))
    fit(trainer, phase_callbacks=[RunRecorder(trainer, 0)], average_best_models=True)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "iou/train",
        "iou/val",
        "iou/val_averaged_model",
        "loss/train",
        "loss/val",
        "loss/val_averaged_model",
        "lr",
        "seconds/train",
        "seconds/val",
        "speed/data_wait_fraction",
        "speed/images_per_second",
    ]
    for tag in ("iou/val", "lr", "speed/images_per_second"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2]
    seconds = [
        event.value for part in ("train", "val") for event in events.Scalars(f"seconds/{part}")
    ]
    assert 0 < sum(seconds) < time.monotonic() - started, "seconds, as the tag says"


@BOTH
def test_the_system_monitor_has_ended_before_its_file_is_closed(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    trainer = kind("run", ckpt_root_dir=str(tmp_path))
    before = set(threading.enumerate())
    text = said_by(trainer, sg_logger_params={"monitor_system": True})
    assert "SystemMonitor" not in {one.name for one in set(threading.enumerate()) - before}
    assert errors == []
    assert "CLEANUP" not in text


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


FIRST = """
import sys
from portrait_dist.training.lean_import import lean_import
# As where every package that it names is installed: nothing of it is replaced.
unused = "boto3 botocore data_gradients imagesize matplotlib onnx onnxruntime onnxsim pandas"
lean_import("super_gradients", (*unused.split(), "pycocotools", "requests", "scipy"))
from super_gradients import Trainer
import torch
from portrait_dist.training import PortraitTrainer
from portrait_dist.metrics import SoftIoU
x = torch.randn(4, 3, 8, 8)
data = torch.utils.data.TensorDataset(x, (x[:, :1] > 0).float())
loader = torch.utils.data.DataLoader(data, 2)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid())
params = {"max_epochs": 1, "initial_lr": 0.1, "lr_mode": "CosineLRScheduler"}
params |= {"loss": torch.nn.BCELoss(), "valid_metrics_list": ["BinaryIOU", SoftIoU()]}
PortraitTrainer("run", sys.argv[1]).train(
    model, params | {"metric_to_watch": "SoftIoU"}, loader, loader
)
assert issubclass(PortraitTrainer, Trainer)
"""


def test_a_full_disk_under_tensorboard_is_the_trainings_error_and_shows_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    writer = SummaryWriter(str(tmp_path))
    worker: Any = writer._get_file_writer().event_writer._async_writer._worker

    def write(data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(worker._record_writer, "write", write)
    writer.add_scalar("loss", 1.0, 1)
    worker.join()
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    assert not shown


def test_a_supergradients_that_was_imported_first_is_adapted_too(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "CRASH_HANDLER": "FALSE"}
    command = [sys.executable, "-c", FIRST, str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "run" / "average_model.pth").is_file()
    assert "epoch 1/1" in done.stderr
    for wrong in ("Full dataset size", "SUMMARY", "CLEANUP"):
        assert wrong not in done.stderr + done.stdout
