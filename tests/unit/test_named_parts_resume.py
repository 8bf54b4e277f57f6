"""Runs with named parts and changed settings go on exactly as they would have, or as was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import nets
from tests.cli import Result, call
from tests.jobs import PLAIN, checkpoint

NETS = str(Path(nets.__file__))
TINY = (
    "train.batch_size=8",
    "train.max_batches=2",
    "train.max_val_batches=1",
    "train.threads=1",
    "train.pictures=0",
)
STOPPING = f"loss.name={NETS}:Stopping"


def train(root: Path, shards: Path, name: str, epochs: int, *keys: str) -> Result:
    own: tuple[str, ...] = (f"data.shards={shards}", f"run.root={root}", f"run.name={name}")
    if not any(key.startswith("model.name=") for key in keys):
        own = (*own, "model.init_features=2")
    return call("train", "--recipe", PLAIN, *own, *TINY, f"train.max_epochs={epochs}", *keys)


def interrupted(
    root: Path,
    shards: Path,
    epochs: int,
    *keys: str,
    monkeypatch: pytest.MonkeyPatch,
    validation: int,
) -> dict[str, Any]:
    """Stop a run in a batch of validation, and go on; returns what its checkpoint held then."""
    with monkeypatch.context() as patch:
        patch.setenv(nets.STOP_IN_VALIDATION, str(validation))
        stopped = train(root, shards, "stopped", epochs, STOPPING, *keys)
    assert stopped.exit_code == 75, stopped.stderr
    held = checkpoint(root / "stopped")
    resumed = train(root, shards, "stopped", epochs, STOPPING, *keys)
    assert resumed.exit_code == 0, resumed.stderr
    return held


def assert_same(root: Path, *names: str) -> None:
    one, other = (checkpoint(root / name) for name in names)
    for key, value in one["net"].items():
        assert torch.equal(value, other["net"][key]), key
    assert (
        one["optimizer_state_dict"]["param_groups"] == other["optimizer_state_dict"]["param_groups"]
    )
    for name in ("samples_seen", "best_metric"):
        assert one["portrait_dist"][name] == other["portrait_dist"][name]


def test_a_stop_while_the_averaged_model_is_validated_keeps_the_last_weights(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tmp_path, tiny_shards, "whole", 2, STOPPING).exit_code == 0
    held = interrupted(tmp_path, tiny_shards, 2, monkeypatch=monkeypatch, validation=3)
    assert (held["epoch"], held["portrait_dist"]["position"]) == (2, None)
    assert_same(tmp_path, "whole", "stopped")
    assert (tmp_path / "stopped" / "average_model.pth").is_file()
    for name in ("whole", "stopped"):  # what comes after it, too
        assert train(tmp_path, tiny_shards, name, 3, STOPPING).exit_code == 0
    assert_same(tmp_path, "whole", "stopped")


@pytest.mark.parametrize(
    "schedule",
    [
        ("schedule.name=torch.optim.lr_scheduler.StepLR", "schedule.args.step_size=2"),
        (f"schedule.name={NETS}:Ruled",),
    ],
)
def test_a_stop_in_validation_lets_a_schedule_advance_once(
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: tuple[str, ...],
) -> None:
    keys = (*schedule, "train.average_best=false")
    assert train(tmp_path, tiny_shards, "whole", 3, STOPPING, *keys).exit_code == 0
    interrupted(tmp_path, tiny_shards, 3, *keys, monkeypatch=monkeypatch, validation=1)
    assert_same(tmp_path, "whole", "stopped")
    states = [checkpoint(tmp_path / name) for name in ("whole", "stopped")]
    assert [one["torch_scheduler_state_dict"]["last_epoch"] for one in states] == [3, 3]


def groups(run: Path, name: str) -> set[Any]:
    return {group[name] for group in checkpoint(run)["optimizer_state_dict"]["param_groups"]}


def test_settings_that_a_run_changes_on_purpose_are_taken(
    tiny_shards: Path, tmp_path: Path
) -> None:
    step = "schedule.name=torch.optim.lr_scheduler.StepLR"
    keys = ("train.average_best=false", "train.optimizer=adamw", step, "train.lr=0.004")
    run = tmp_path / "run"
    first = train(tmp_path, tiny_shards, "run", 1, *keys, "schedule.args.step_size=30")
    assert first.exit_code == 0
    changed = (
        "run.accept_changes=true",
        "schedule.args.step_size=1",
        "train.weight_decay=0.5",
        "optimizer.args.betas=[0.5, 0.9]",
        "train.lr=0.002",
    )
    again = train(tmp_path, tiny_shards, "run", 2, *keys, *changed)
    assert again.exit_code == 0, again.stderr
    assert groups(run, "weight_decay") == {0.5, 0.0}, "the norms have none"
    assert [list(one) for one in groups(run, "betas")] == [[0.5, 0.9]]
    assert groups(run, "initial_lr") == {0.002}
    assert groups(run, "lr") == {0.0002}, "it has advanced once with the new step"
    assert checkpoint(run)["torch_scheduler_state_dict"]["step_size"] == 1
    # What does not change goes on as the checkpoint has it.
    same = train(tmp_path, tiny_shards, "run", 3, *keys, *changed)
    assert same.exit_code == 0, same.stderr
    assert sorted(groups(run, "lr")) == pytest.approx([0.00002])


CYCLE = ("schedule.name=torch.optim.lr_scheduler.CyclicLR", "schedule.args.cycle_momentum=false")
ONE_CYCLE = ("schedule.name=torch.optim.lr_scheduler.OneCycleLR", "schedule.args.total_steps=8")


@pytest.mark.parametrize(
    ("keys", "before", "changed"),
    [
        # What a run with the new settings from its start would have now.
        ((f"schedule.name={NETS}:in_turn",), (), ("train.lr=0.002",)),
        (CYCLE, ("schedule.args.base_lr=0.1", "schedule.args.max_lr=1"), ("train.lr=0.002",)),
        (
            CYCLE,
            ("schedule.args.base_lr=0.1", "schedule.args.max_lr=1"),
            ("schedule.args.base_lr=0.2", "schedule.args.max_lr=2"),
        ),
        (ONE_CYCLE, ("schedule.args.max_lr=0.1",), ("schedule.args.max_lr=0.2",)),
    ],
)
def test_schedules_of_every_form_take_what_changes_and_keep_how_far_they_are(
    tiny_shards: Path,
    tmp_path: Path,
    keys: tuple[str, ...],
    before: tuple[str, ...],
    changed: tuple[str, ...],
) -> None:
    keys = ("train.average_best=false", "train.lr=0.004", "run.accept_changes=true", *keys)
    steps = (("run", 3, before), ("run", 4, (*before, *changed)), ("new", 4, (*before, *changed)))
    for name, epochs, settings in steps:
        done = train(tmp_path, tiny_shards, name, epochs, *keys, *settings)
        assert done.exit_code == 0, done.stderr
    for option in ("lr", "initial_lr"):
        one, other = (sorted(groups(tmp_path / name, option)) for name in ("run", "new"))
        assert one == pytest.approx(other), option


def test_metrics_that_are_equal_after_the_first_batch_stay_two(
    tiny_shards: Path, tmp_path: Path
) -> None:
    names = f"metrics.names={NETS}:Batches,{NETS}:LaterBatches"
    keys = (names, "metrics.watch=loss", "train.average_best=false", "train.batch_size=4")
    assert train(tmp_path, tiny_shards, "run", 1, *keys, "train.max_batches=4").exit_code == 0
    found = checkpoint(tmp_path / "run")["metrics"]["train"]
    assert (found["Batches"], found["LaterBatches"]) == (0.0, 0.75)


def test_a_network_with_buffers_that_share_memory_trains_and_is_loaded_again(
    tiny_shards: Path, tmp_path: Path
) -> None:
    keys = (f"model.name={NETS}:Coordinates", "train.ema=true")
    for epochs in (1, 2):
        done = train(tmp_path, tiny_shards, "run", epochs, *keys)
        assert done.exit_code == 0, done.stderr
    best = ("--checkpoint", tmp_path / "run" / "ckpt_best.pth", "--trust-code")
    scored = call("evaluate", *best, "--data", tiny_shards, "--json")
    assert scored.exit_code == 0, scored.stderr


@pytest.mark.parametrize(
    "optimizer",
    [
        (f"optimizer.name={NETS}:NeedsRate",),
        ("optimizer.name=torch.optim.NAdam", "optimizer.args.betas=[0, 0.99]"),
        ("optimizer.name=torch.optim.SGD",),
        ("optimizer.args.foreach=true",),
    ],
)
def test_an_optimiser_that_torch_takes_trains_and_resumes(
    tiny_shards: Path, tmp_path: Path, optimizer: tuple[str, ...]
) -> None:
    keys = ("train.average_best=false", "train.lr=0.001", *optimizer)
    for epochs in (1, 2):
        done = train(tmp_path, tiny_shards, "run", epochs, *keys)
        assert done.exit_code == 0, done.stderr
    if optimizer[0].endswith("SGD"):
        assert groups(tmp_path / "run", "momentum") == {0}, "torch's own default"


def test_a_plateau_schedule_follows_a_value_of_the_training(
    tiny_shards: Path, tmp_path: Path
) -> None:
    plateau = "schedule.name=torch.optim.lr_scheduler.ReduceLROnPlateau"
    for value in ("loss", "SoftIoU"):
        keys = (plateau, f"schedule.args.metric_name={value}", "train.average_best=false")
        done = train(tmp_path, tiny_shards, f"run-{value}", 2, *keys)
        assert done.exit_code == 0, done.stderr
