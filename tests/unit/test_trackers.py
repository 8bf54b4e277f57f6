"""Curves and pictures reach Weights & Biases, MLflow and ClearML, and no run depends on them."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from portrait_dist.training import trackers
from tests.cli import Result, assert_one_line, call, call_process
from tests.jobs import PLAIN, TINY, checkpoint, lines

TAGS = {"loss/train", "loss/val", "iou/train", "iou/val"}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No tracker asks a server."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("CLEARML_OFFLINE_MODE", "1")
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "clearml"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path


def train_into(root: Path, shards: Path, *keys: str) -> Result:
    run = (f"data.shards={shards}", f"run.root={root}", "run.name=run", "train.batch_size=19")
    return call("train", "--json", "--recipe", PLAIN, *run, *TINY, *keys)


def wandb_history(run: Path) -> list[dict[str, object]]:
    """Read what wandb would send, from the files that it keeps."""
    pb2 = importlib.import_module("wandb.proto.wandb_internal_pb2")
    rows = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
    return rows


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: blocks of 32 KiB of parts with crc, length and kind."""
    at, record = 7, b""  # behind the file's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_gets_every_epoch_and_a_resumed_run_continues(
    offline: Path, tiny_shards: Path
) -> None:
    for epochs in (1, 2):
        done = train_into(
            offline,
            tiny_shards,
            "run.logger=wandb",
            f"train.max_epochs={epochs}",
            "train.pictures=2",
        )
        assert done.exit_code == 0, done.stderr
    history = wandb_history(offline / "run")
    for tag in TAGS:
        assert [row["epoch"] for row in history if tag in row] == [1, 2], tag
    epoch = lines(offline / "run", "epoch")[-1]
    last = [row["iou/val"] for row in history if "iou/val" in row][-1]
    assert last == pytest.approx(epoch["val_iou"])
    assert any("examples/validation/path" in row for row in history)
    ids = {path.name.rpartition("-")[2] for path in offline.glob("run/wandb/offline-run-*")}
    assert ids == {json.loads((offline / "run" / "tracker.json").read_text())["id"]}
    assert checkpoint(offline / "run", "ckpt_latest.pth")["epoch"] == 2


def test_mlflow_gets_every_epoch_and_the_settings_and_a_resumed_run_continues(
    offline: Path, tiny_shards: Path
) -> None:
    from mlflow import MlflowClient

    for epochs in (1, 2):
        keys = ("run.logger=mlflow", f"train.max_epochs={epochs}", "train.pictures=2")
        done = train_into(offline, tiny_shards, *keys)
        assert done.exit_code == 0, done.stderr
    client = MlflowClient()
    experiment = client.get_experiment_by_name("portrait_dist")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch_size"] == "19"
    for tag in TAGS:
        assert [one.step for one in client.get_metric_history(run.info.run_id, tag)] == [1, 2]
    assert client.list_artifacts(run.info.run_id, "examples")


def test_clearml_gets_every_epoch(offline: Path, tiny_shards: Path) -> None:
    # ClearML reads its variables when it is imported, which another test may have done here.
    run = (f"data.shards={tiny_shards}", f"run.root={offline}", "run.name=run")
    keys = (*run, *TINY, "train.batch_size=19", "run.logger=clearml", "train.max_epochs=2")
    done = call_process("train", "--recipe", PLAIN, *keys)
    assert done.exit_code == 0, done.stderr
    (archive,) = offline.rglob("offline-*.zip")
    with zipfile.ZipFile(archive) as file:
        (name,) = [one for one in file.namelist() if one.endswith("metrics.jsonl")]
        events = [event for line in file.read(name).splitlines() for event in json.loads(line)]
    for tag in TAGS:
        metric, variant = tag.split("/")
        found = [e for e in events if (e.get("metric"), e.get("variant")) == (metric, variant)]
        assert [event["iter"] for event in found] == [1, 2], tag


def test_clearml_forks_no_process_of_the_training(offline: Path) -> None:
    """A fork beside its other threads keeps what they hold at that time, now and then for ever."""
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "os.register_at_fork(before=lambda: print('forks'))\n"
        "from portrait_dist.training.trackers import ClearmlTracker\n"
        "ClearmlTracker(Path(sys.argv[1]), {}, '').close()\n"
        "print('closed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(offline)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert done.stdout.splitlines()[-1] == "closed"
    assert "forks" not in done.stdout.splitlines()


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing:
        def scalars(self, *_: object) -> None:
            raise ConnectionError("no server\nat https://me:secret@tracker.test/api?token=secret")

        def image(self, *_: object) -> None:
            raise AssertionError("not asked again")

        def close(self) -> None:
            raise AssertionError("nobody closes what has failed")

    tracker = trackers.GuardedTracker("wandb", lambda: Failing())
    for epoch in (1, 2):
        tracker.scalars({"loss/train": 1.0}, epoch)
        tracker.image("examples", np.zeros((4, 4, 3), np.uint8), epoch)
    tracker.close()
    (record,) = caplog.records
    assert (
        "run.logger=wandb: ConnectionError: no server at https://tracker.test/api"
        in record.getMessage()
    )
    assert "secret" not in record.getMessage()


def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    refused = train_into(tmp_path, tiny_shards, "run.logger=wandb")
    assert_one_line(refused, 2, "portrait-dist[wandb]", "run.logger=tensorboard")
    assert not (tmp_path / "run").exists()


BESIDE = """
import os, sys
from portrait_dist.training import PortraitTrainer, sg_adapter
others = {"wandb", "mlflow", "clearml", "dagshub"}
assert not others & set(sys.modules), "a logger's package was imported unasked"

import torch, wandb
from torch import nn
from super_gradients.common.sg_loggers import wandb_sg_logger
from super_gradients.training.utils.callbacks import Callback
mine = wandb.init(project="mine", dir=sys.argv[1])
assert wandb_sg_logger.wandb.run is mine
mine.finish()

class KeepsTheFirst(Callback):
    def on_train_loader_end(self, context):
        latest = os.path.join(context.sg_logger.local_dir(), "ckpt_latest.pth")
        if context.epoch == 1:
            os.link(latest, os.path.join(sys.argv[1], "first.pth"))

x = torch.randn(4, 3, 8, 8)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x > 0).float()), 2)
params = {"max_epochs": 2, "initial_lr": 0.1, "lr_mode": "CosineLRScheduler"}
params |= {"loss": nn.BCEWithLogitsLoss(), "metric_to_watch": "BCEWithLogitsLoss"}
params |= {"greater_metric_to_watch_is_better": False, "average_best_models": False}
params |= {"sg_logger": "wandb_sg_logger", "phase_callbacks": [KeepsTheFirst()]}
params |= {"sg_logger_params": {"project_name": "theirs", "storage_location": "local"}}
PortraitTrainer("run", sys.argv[1]).train(nn.Conv2d(3, 3, 1), params, loader, loader)
for name, epochs in (("first.pth", 1), ("run/ckpt_latest.pth", 2)):
    state = torch.load(os.path.join(sys.argv[1], name), weights_only=True)
    assert state["epoch"] == epochs, (name, state["epoch"])
"""


def test_supergradients_own_logger_is_imported_where_asked_for_and_saves_whole_checkpoints(
    offline: Path,
) -> None:
    # A hard link keeps the file of the first epoch: the second one must not be written into it.
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, str(offline)],
        capture_output=True,
        text=True,
        env={**os.environ, "WANDB_DIR": str(offline), "WANDB_SILENT": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    history = wandb_history(offline)
    assert [row["_step"] for row in history if "loss/val" in row] == [1, 2], history
