"""A run folder admits the run it belongs to: everything else is refused and leaves it as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from portrait_dist.data.shards import writer
from tests import damage
from tests.cli import Result, assert_one_line, call
from tests.jobs import PLAIN, checkpoint, lines, state_of, train_into

Train = Callable[..., Result]


@pytest.fixture(scope="module")
def other_shards(split_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photos packed with another quality: other bytes under the same names."""
    folder = tmp_path_factory.mktemp("other") / "shards"
    writer.pack(split_dir, folder, size=(32, 32), samples_per_shard=10, quality=60)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run of one epoch."""
    root = tmp_path_factory.mktemp("finished")
    assert train_into(root, tiny_shards, "train.max_epochs=1").exit_code == 0
    return root


@pytest.mark.parametrize("epochs", [1, 2])
def test_other_shards_are_refused_and_the_run_is_as_before(
    finished: Path, other_shards: Path, epochs: int
) -> None:
    """Also where the run has all its epochs: finished already is said of its own shards only."""
    before = state_of(finished / "run")
    result = train_into(finished, other_shards, f"train.max_epochs={epochs}")
    assert_one_line(result, 2, "train split", str(other_shards), "model.weights=", "run.name")
    assert result.json["exit_code"] == 2
    assert state_of(finished / "run") == before
    assert call("status", finished / "run", "--json").json["state"] == "finished"


def test_other_shards_are_refused_in_the_middle_of_an_epoch_too(
    finished: Path, tiny_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    import torch

    shutil.copytree(finished / "run", tmp_path / "run")
    state = checkpoint(tmp_path / "run")
    position = {"batches": 1, "loader": {"epoch": 0, "samples_seen": 19}}
    state["epoch"], state["portrait_dist"]["position"] = 0, position
    torch.save(state, tmp_path / "run" / "ckpt_latest.pth")
    before = state_of(tmp_path / "run")
    for keys in ([], ["run.accept_changes=true"]):
        refused = train_into(tmp_path, other_shards, "train.max_epochs=1", *keys)
        assert_one_line(refused, 2, "train split", str(other_shards))
    refused = train_into(tmp_path, tiny_shards, "train.max_epochs=1", "train.accumulate=2")
    assert_one_line(refused, 2, "global batch of 19, now it is 38", "train.global_batch=19")
    assert state_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["model.init_features=3"], ["model.init_features was 2, now it is 3"]),
        (["model.norm=batch"], ["model.norm was group, now it is batch"]),
        (["train.optimizer=sgd"], ["train.optimizer was adam, now it is sgd"]),
        (["model.init_features=3", "run.accept_changes=true"], ["model.init_features"]),
        (
            ["loss.bce_weight=1", "augment.flip=0"],
            ["loss.bce_weight was 0.5, now it is 1.0", "augment.flip", "run.accept_changes=true"],
        ),
        (["train.seed=7"], ["train.seed was 42, now it is 7", "run.accept_changes=true"]),
        (["run.resume=false"], ["run.resume=false"]),
        (["train.batch_size=60"], ["57 training samples do not fill"]),
        (["data.shards=/nowhere"], ["/nowhere"]),
    ],
)
def test_a_refused_command_changes_nothing_in_the_run_folder(
    finished: Path, tiny_shards: Path, keys: list[str], parts: list[str]
) -> None:
    before = state_of(finished / "run")
    result = train_into(finished, tiny_shards, "train.max_epochs=2", *keys)
    assert_one_line(result, 2, *parts)
    assert state_of(finished / "run") == before


@pytest.mark.parametrize("name", ["ckpt_latest.pth", "ckpt_best.pth"])
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(
    name: str, finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """To its last byte: a flipped bit, a file that a full disk left empty, another network."""
    import torch

    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    whole = path.read_bytes()
    damage.flip_bit(path, len(whole) // 2)
    before = state_of(tmp_path / "run")
    keys = ("train.max_epochs=2", "train.lr=0.002")
    assert_one_line(train_into(tmp_path, tiny_shards, *keys), 3, name, "damaged")
    assert state_of(tmp_path / "run") == before
    path.write_bytes(b"")
    before = state_of(tmp_path / "run")
    assert_one_line(train_into(tmp_path, tiny_shards, *keys), 3, name)
    assert state_of(tmp_path / "run") == before
    if name == "ckpt_latest.pth":
        path.write_bytes(whole)
        state = checkpoint(tmp_path / "run", name)
        weight = next(iter(state["net"]))
        state["net"][weight] = state["net"][weight][:1]
        torch.save(state, path)
        before = state_of(tmp_path / "run")
        refused = train_into(tmp_path, tiny_shards, *keys)
        assert_one_line(refused, 2, name, "another model", f"1 of another shape: {weight}")
        assert state_of(tmp_path / "run") == before
        path.write_bytes(whole)
        state = checkpoint(tmp_path / "run", name)
        state["ema_net"] = {one: value for one, value in state["net"].items() if one != weight}
        torch.save(state, path)
        before = state_of(tmp_path / "run")
        refused = train_into(tmp_path, tiny_shards, *keys)
        assert_one_line(refused, 3, name, "moving average", weight)
        assert state_of(tmp_path / "run") == before
        for place, option in (("group", "name"), ("group", "betas"), ("state", "exp_avg")):
            path.write_bytes(whole)
            state = checkpoint(tmp_path / "run", name)
            optimizer = state["optimizer_state_dict"]
            del (optimizer["param_groups"] if place == "group" else optimizer["state"])[0][option]
            torch.save(state, path)
            before = state_of(tmp_path / "run")
            refused = train_into(tmp_path, tiny_shards, *keys)
            assert_one_line(refused, 3, name, "damaged (", option, "of the optimizer)")
            assert state_of(tmp_path / "run") == before
    else:
        path.unlink()
        assert train_into(tmp_path, tiny_shards, *keys).exit_code == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "average_model.pth", "averaging_snapshots"])
def test_what_cannot_be_written_on_is_refused_before_anything_is_written(
    name: str, finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """A pipe in place of a file, a folder in place of a file, a file in place of a folder."""
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    if name == "metrics.jsonl":
        os.mkfifo(path)
    elif name == "average_model.pth":
        path.mkdir()
    else:
        path.touch()
    before = state_of(tmp_path / "run")
    refused = train_into(tmp_path, tiny_shards, "train.max_epochs=2", "train.lr=0.002")
    assert_one_line(refused, 2, name)
    assert state_of(tmp_path / "run") == before


def test_a_damaged_model_of_the_average_is_refused_and_one_that_is_missing_done_without(
    tiny_shards: Path, tmp_path: Path
) -> None:
    average = "train.average_best=true"
    stopped = train_into(tmp_path, tiny_shards, "train.max_epochs=2", average)
    assert stopped.exit_code == 0
    run = tmp_path / "run"
    part = run / "averaging_snapshots" / "epoch-1.pth"
    part.parent.mkdir()
    shutil.copy(run / "average_model.pth", part)
    damage.flip_bit(part, part.stat().st_size // 2)
    before = state_of(run)
    more = ("train.max_epochs=3", average)
    assert_one_line(train_into(tmp_path, tiny_shards, *more), 3, str(part), "remove it")
    assert state_of(run) == before
    part.unlink()
    resumed = train_into(tmp_path, tiny_shards, *more)
    assert resumed.exit_code == 0
    assert f"{part}: missing; the average continues without it" in resumed.stderr


def test_what_a_resumed_run_may_change_is_said_and_taken(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    moved = shutil.copytree(tiny_shards, tmp_path / "moved")
    result = train_into(
        tmp_path,
        moved,
        "train.max_epochs=2",
        "train.lr=0.002",
        "loss.bce_weight=1",
        "run.accept_changes=true",
    )
    assert result.exit_code == 0, result.stderr
    assert result.json["epochs"] == 2
    for part in (
        "resuming at the start of epoch 2",
        "train.lr was 0.001, now it is 0.002",
        "train.max_epochs was 1, now it is 2",
        "loss.bce_weight was 0.5, now it is 1.0",
    ):
        assert part in result.stderr
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (kept["train"]["lr"], kept["data"]["shards"]) == (0.002, str(moved))
    again = train_into(tmp_path, moved, "train.max_epochs=2", "loss.bce_weight=1")
    assert again.exit_code == 0
    assert "finished already (2 epochs)" in again.stderr
    assert again.json["steps"] == 6


def test_a_run_of_an_older_version_resumes(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """Without the identity of its data, and without the settings that did not exist."""
    import torch

    shutil.copytree(finished / "run", tmp_path / "run")
    state = checkpoint(tmp_path / "run")
    state["portrait_dist"].pop("data", None)
    del state["portrait_dist"]["config"]["train"]["global_batch"]
    del state["portrait_dist"]["config"]["run"]["accept_changes"]
    torch.save(state, tmp_path / "run" / "ckpt_latest.pth")
    result = train_into(tmp_path, tiny_shards, "train.max_epochs=2")
    assert result.exit_code == 0, result.stderr
    assert result.json["epochs"] == 2


def test_a_small_folder_trains_without_a_setting(tmp_path: Path) -> None:
    """Five photos on a laptop: the batch is fitted, one line says so."""
    tree = tmp_path / "raw"
    from portrait_dist.data.source import split, synthetic

    synthetic.generate(tree, 6, seed=3)
    split.prepare(tree, tmp_path / "data")
    writer.pack(tmp_path / "data", tmp_path / "shards", size=(32, 32))
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    samples = manifest["splits"]["train"]["samples"]
    result = call(
        "train",
        "--json",
        f"data.shards={tmp_path / 'shards'}",
        f"run.root={tmp_path}",
        "run.name=run",
        "model.init_features=2",
        "train.max_epochs=1",
        "train.threads=1",
    )
    assert result.exit_code == 0, result.stderr
    assert result.json["global_batch"] == samples < 16
    assert f"train.batch_size is {samples} instead of 16" in result.stderr


def test_numbers_are_the_same_in_result_events_and_submit(
    finished: Path, tiny_shards: Path
) -> None:
    before = state_of(finished / "run")
    again = train_into(finished, tiny_shards, "train.max_epochs=1", "train.lr=0.5")
    assert state_of(finished / "run") == before, "there was nothing to do, so nothing was written"
    last = lines(finished / "run", "epoch")[-1]
    result = again.json
    assert result["steps"] == result["steps_per_epoch"] == last["step"] == 3
    assert last["steps_per_epoch"] == result["steps_per_epoch"]
    assert last["batches_per_epoch"] == result["batches_per_epoch"]
    queued = call(
        "submit",
        "--dry-run",
        "--json",
        "--recipe",
        PLAIN,
        f"data.shards={tiny_shards}",
        f"run.root={finished}",
        "train.batch_size=19",
    ).json
    for name in ("global_batch", "batches_per_epoch", "steps_per_epoch"):
        assert queued[name] == result[name]
