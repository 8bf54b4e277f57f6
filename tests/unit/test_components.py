"""Losses, metrics, optimisers, schedules by name: torch, SuperGradients, smp, the user's."""

from __future__ import annotations

import functools
import http.server
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from portrait_dist import checkpoints, config, models
from portrait_dist.errors import InputError
from portrait_dist.metrics import SoftIoU
from portrait_dist.training import components
from tests import jobs
from tests.cli import call

torch.set_num_threads(1)
NETS = str(Path(__file__).parent.parent / "nets.py")
PLAIN = str(Path(__file__).parent.parent / "plain.yaml")


def masks() -> tuple[Tensor, Tensor]:
    """Logits and soft mattes, [3, 1, 16, 16]."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 1, 16, 16, generator=generator)
    return logits, torch.rand(3, 1, 16, 16, generator=generator)


def loss_of(*keys: str) -> Any:
    return components.make_loss(config.load(None, list(keys)), None)


def test_losses_by_name_get_what_they_take() -> None:
    logits, target = masks()
    probabilities = torch.sigmoid(logits)
    for name, expected in (
        ("torch.nn.BCEWithLogitsLoss", F.binary_cross_entropy_with_logits(logits, target)),
        ("torch.nn.BCELoss", F.binary_cross_entropy(probabilities, target)),
        ("torch.nn.L1Loss", (probabilities - target).abs().mean()),
    ):
        loss = loss_of(f"loss.name={name}")
        given = logits if loss.takes_logits else probabilities
        assert float(loss(given, target)) == pytest.approx(float(expected)), name
    function = loss_of(f"loss.name={NETS}:squared", "loss.input=probabilities")
    assert not function.takes_logits
    assert float(function(probabilities, target)) == pytest.approx(
        float((probabilities - target).square().mean())
    )


def test_supergradients_and_smp_losses_by_name_follow_their_definitions() -> None:
    logits, target = masks()
    probabilities = torch.sigmoid(logits)
    both, total = (probabilities * target).sum(), (probabilities + target).sum()
    dice = 1 - (2 * both + 1) / (total + 1 + 1e-5)
    bce = F.binary_cross_entropy_with_logits(logits, target)
    loss = loss_of("loss.name=sg:BCEDiceLoss", "loss.args.loss_weights=[0.25, 0.75]")
    assert loss.takes_logits
    assert float(loss(logits, target)) == pytest.approx(float(0.25 * bce + 0.75 * dice), abs=1e-6)
    loss = loss_of("loss.name=sg:BinaryDiceLoss", "loss.args.apply_sigmoid=false")
    assert not loss.takes_logits
    assert float(loss(probabilities, target)) == pytest.approx(float(dice), abs=1e-6)
    loss = loss_of(
        "loss.name=segmentation_models_pytorch.losses.DiceLoss",
        "loss.args.mode=binary",
    )
    assert loss.takes_logits
    # smp's intersection of soft masks is the sum of the smaller values.
    smp_dice = 1 - 2 * torch.minimum(probabilities, target).sum() / total
    assert float(loss(logits, target)) == pytest.approx(float(smp_dice), abs=1e-6)


def test_a_loss_that_cannot_train_is_refused_in_one_line() -> None:
    for name, message in (
        ("torch.nn.CrossEntropyLos", "Did you mean 'CrossEntropyLoss'"),
        ("torch.nn.TripletMarginLoss", "fails for masks"),
        (f"{NETS}:STOP_IN_STEP", "cannot be called"),
    ):
        with pytest.raises(InputError, match=message):
            loss_of(f"loss.name={name}")


def metrics_of(*keys: str) -> list[Any]:
    return components.make_metrics(config.load(None, list(keys)).metrics)


def test_metrics_by_name_score_the_same_masks() -> None:
    logits, target = masks()
    probabilities = torch.sigmoid(logits)
    names = (
        "torchmetrics.classification.BinaryJaccardIndex, torchmetrics.classification.BinaryF1Score,"
        f"sg:BinaryIOU, {NETS}:Foreground, {NETS}:Renamed, {NETS}:Seeing"
    )
    found = metrics_of(
        f"metrics.names={names}",
        "metrics.args.BinaryF1Score.threshold=0.3",
        "metrics.args.Foreground.scale=2.0",
    )
    for metric in found:
        # As a collection of them is updated: each gets what its update has a name for.
        images = torch.zeros(3, 3, 16, 16)
        given = metric._filter_kwargs(preds=probabilities, target=target, inputs=images, epoch=1)
        metric.update(**given)
    iou, jaccard, f1, binary, foreground, renamed, seeing = (metric.compute() for metric in found)
    assert isinstance(found[0], SoftIoU)
    assert float(jaccard) == pytest.approx(float(iou), abs=1e-6)
    assert float(binary["target_IOU"]) == pytest.approx(float(iou), abs=1e-6)
    predicted, truth = probabilities > 0.3, target > 0.5
    expected = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    assert float(f1) == pytest.approx(float(expected), abs=1e-6)
    assert float(foreground) == pytest.approx(float(2 * probabilities.mean()), abs=1e-6)
    assert float(renamed) == pytest.approx(float(probabilities.mean()), abs=1e-6)
    assert float(seeing) == float(renamed)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["metrics.names=torchmetrics.classification.BinaryAUROC"], "is no sum"),
        (["metrics.names=torch.nn.L1Loss"], "no torchmetrics.Metric"),
        (["metrics.args.Nothing.x=1"], "there is no such metric"),
        (["metrics.names=SoftIoU"], "is listed twice"),
        ([f"metrics.names={NETS}:Both"], "gives Tensor, not one number"),
        ([f"metrics.names={NETS}:Failing"], r"fails for masks and mattes .*nothing to compute"),
    ],
)
def test_a_metric_that_fails_or_would_depend_on_ranks_is_refused(
    keys: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        metrics_of(*keys)


def test_the_watched_value_knows_its_direction() -> None:
    loaded = config.load(
        None, [f"metrics.names=sg:BinaryIOU,{NETS}:Foreground", "metrics.watch=mean_IOU"]
    )
    found, loss = components.make_metrics(loaded.metrics), loss_of()
    assert components.watched(loaded.metrics, found, loss).greater_is_better
    loaded.metrics.watch = "Foreground"
    assert not components.watched(loaded.metrics, found, loss).greater_is_better
    loaded.metrics.watch_for = "max"
    assert components.watched(loaded.metrics, found, loss).greater_is_better
    loaded.metrics.watch = "IOU"
    with pytest.raises(InputError, match="there are loss, SoftIoU, target_IOU"):
        components.watched(loaded.metrics, found, loss)


def test_optimisers_and_schedules_by_name_get_their_arguments_and_wrong_ones_are_named() -> None:
    def params_of(*keys: str) -> dict[str, Any]:
        loaded = config.load(None, list(keys))
        metrics = components.make_metrics(loaded.metrics)
        schedule = components.schedule_params(loaded, metrics, components.make_loss(loaded, None))
        return components.optimizer_params(loaded) | schedule

    found = params_of(
        "optimizer.name=sg:Lion",
        "optimizer.args.betas=[0.8, 0.9]",
        "train.weight_decay=0.1",
        "schedule.name=torch.optim.lr_scheduler.StepLR",
        "schedule.args.step_size=2",
    )
    assert found["optimizer"].__name__ == "Lion"
    assert found["optimizer_params"] == {"betas": [0.8, 0.9], "weight_decay": 0.1}
    ((_, schedule),) = found["lr_mode"].items()
    assert schedule["step_size"] == 2
    for keys, message in (
        (["optimizer.name=torch.optim.SGD", "optimizer.args.speed=1"], r"optimizer\.args\.NAME"),
        (["optimizer.name=torch.optim.LBFGS", "train.weight_decay=0"], "parameter groups"),
        (["optimizer.name=torch.optim.SparseAdam", "train.weight_decay=0"], "dense gradients"),
        (["optimizer.name=torch.nn.Conv2d", "train.weight_decay=0"], r"optimizer\.name=torch"),
        (["schedule.name=torch.optim.lr_scheduler.StepLR"], "step_size"),
        (["schedule.name=sg:Cosine"], "none of this name"),
        (["schedule.name=sg:StepLRScheduler"], r"give schedule\.args\.lr_decay_factor"),
        (["schedule.name=torch.optim.lr_scheduler.ReduceLROnPlateau"], r"metric_name=loss\|"),
        ([f"optimizer.name={NETS}:make_adam"], "no class of torch.optim.Optimizer"),
        (["optimizer.args.nonsense=1"], r"train\.optimizer=adam: .*nonsense"),
        ([f"schedule.name={NETS}:Negative"], "gives a learning rate of -1"),
        ([f"schedule.name={NETS}:Stepless"], "takes no step"),
    ):
        with pytest.raises(InputError, match=message):
            params_of(*keys)


def test_pretrained_weights_come_from_where_they_went_and_execute_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from super_gradients.training.utils import checkpoint_utils

    from portrait_dist.training import sg_adapter

    served = tmp_path / "served"
    served.mkdir()
    given = torch.nn.Linear(2, 1)
    torch.save({"net": given.state_dict()}, served / "tiny_cityscapes.pth")
    torch.save({"net": given}, served / "evil_cityscapes.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("tiny_cityscapes", "evil_cityscapes", "gone_cityscapes"):
        address = f"{sg_adapter.OLD_WEIGHTS}{name}.pth"
        monkeypatch.setitem(checkpoint_utils.MODEL_URLS, name, address)
    assert checkpoint_utils.MODEL_URLS["ddrnet_23_cityscapes"].startswith(sg_adapter.OLD_WEIGHTS)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirror = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv(sg_adapter.WEIGHTS_VARIABLE, mirror)
        model = torch.nn.Linear(2, 1)
        checkpoint_utils.load_pretrained_weights(model, "tiny", "cityscapes")
        assert torch.equal(model.weight, given.weight)
        with pytest.raises(InputError, match=r"evil_cityscapes.pth: holds more than weights"):
            checkpoint_utils.load_pretrained_weights(model, "evil", "cityscapes")
        with pytest.raises(InputError, match=rf"{mirror}/gone_cityscapes.pth: .*404"):
            checkpoint_utils.load_pretrained_weights(model, "gone", "cityscapes")
        server.shutdown()


def test_supergradients_unet_is_built_by_its_name() -> None:
    network = models.build("sg:unet", {"dropout": 0.1})
    assert models.check(network, (64, 64)) == models.Contract("logits", 16)


def test_a_run_of_named_parts_logs_and_watches_them_and_follows_the_schedule(
    tiny_shards: Path, tmp_path: Path
) -> None:
    result = call(
        "train",
        "--json",
        "--recipe",
        PLAIN,
        f"data.shards={tiny_shards}",
        f"run.root={tmp_path}",
        "run.name=run",
        "model.init_features=2",
        "loss.name=sg:BCEDiceLoss",
        f"metrics.names=torchmetrics.classification.BinaryF1Score,sg:BinaryIOU,{NETS}:Foreground",
        "metrics.watch=target_IOU",
        "optimizer.name=torch.optim.RAdam",
        "schedule.name=torch.optim.lr_scheduler.StepLR",
        "schedule.args.step_size=1",
        "schedule.args.gamma=0.5",
        "train.lr=0.01",
        "train.batch_size=8",
        "train.max_batches=3",
        "train.max_epochs=3",
        "train.average_best=false",
        "train.threads=1",
    )
    assert result.exit_code == 0, result
    found = result.json
    epochs = jobs.lines(tmp_path / "run", "epoch")
    assert [line["lr"] for line in epochs] == pytest.approx([0.005, 0.0025, 0.00125])
    state = checkpoints.read(tmp_path / "run" / "ckpt_best.pth")
    assert (found["watched"], found["best"], found["best_iou"]) == (
        "target_IOU",
        state["acc"],
        None,
    )
    scores = [line["val_iou"] for line in epochs]
    assert found["best"] == pytest.approx(max(scores), abs=1e-6)
    values = state["metrics"]["valid"]
    assert {"BinaryF1Score", "target_IOU", "Foreground", "SoftIoU"} <= values.keys()
