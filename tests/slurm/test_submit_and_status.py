"""`submit` says before anything is queued what would fail later; `status` needs nothing but the run's folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.errors import InputError
from portrait_dist.runs.status import run_status, table
from portrait_dist.slurm.submit import Request, submit


def _dry(shards: Path, root: Path, *words: str, **request: Any) -> dict[str, Any]:
    return submit(
        "aisegment_unet",
        [f"data.shards={shards}", f"run.root={root}", *words],
        Request(**request),
        dry_run=True,
    )


def test_a_dry_run_shows_the_whole_sbatch_line_and_leaves_nothing(
    tiny_shards: Path, tmp_path: Path
) -> None:
    words = ("run.name=first", "train.batch_size=2")
    result = _dry(
        tiny_shards,
        tmp_path / "runs",
        *words,
        nodes=2,
        gpus_per_node=8,
        time="8:00:00",
        partition="gpu",
        account="lab",
    )
    options = result["command"].split(" ")
    assert options[0] == "sbatch"
    expected = {
        f"--export=ALL,PYTHON={sys.executable}",
        "--nodes=2",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--time=8:00:00",
        "--partition=gpu",
        "--account=lab",
    }
    assert expected | {"--job-name=first", f"--output={tmp_path}/runs/slurm/%j.log"} < set(options)
    assert options[-4:] == [f"data.shards={tiny_shards}", f"run.root={tmp_path}/runs", *words]
    assert (result["world_size"], result["global_batch"], result["steps_per_epoch"]) == (16, 32, 1)
    assert result["job_id"] is None
    assert not (tmp_path / "runs").exists()


def test_a_sweep_becomes_an_array_job(tiny_shards: Path, tmp_path: Path) -> None:
    result = _dry(
        tiny_shards, tmp_path, "run.name=s", array=("train.lr=1e-3,3e-4", "train.seed=1,2,3")
    )
    assert "--array=0-5 " in result["command"]
    assert "--sweep train.lr=1e-3,3e-4 --sweep train.seed=1,2,3" in result["command"]
    assert "/slurm/%A_%a.log" in result["command"]
    assert len(set(result["run_dirs"])) == 6
    with pytest.raises(InputError, match=r"train.lr is above 0, not -1"):
        _dry(tiny_shards, tmp_path, array=("train.lr=1e-3,-1",))


def test_unknown_keys_and_too_large_batches_are_said_before_queueing(
    tiny_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"there is no key 'train.lrr'. Did you mean 'train.lr'?"):
        _dry(tiny_shards, tmp_path, "train.lrr=1")
    with pytest.raises(
        InputError,
        match=r"57 training samples do not fill one global batch of 64 \(4 ranks × train.batch_size=16\)",
    ):
        _dry(tiny_shards, tmp_path, nodes=4)


def test_shards_that_are_missing_cut_or_not_there_are_named(
    tiny_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"data.shards is not given"):
        submit("aisegment_unet", [], Request(), dry_run=True)
    with pytest.raises(InputError, match="none: there is no such folder"):
        _dry(tmp_path / "none", tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_shards, copy)
    os.truncate(copy / "train-00001.tar", 5120)
    with pytest.raises(InputError, match=r"train-00001.tar: 5120 bytes, the manifest says \d+"):
        _dry(copy, tmp_path)
    (copy / "train-00001.tar").unlink()
    with pytest.raises(InputError, match=r"train-00001.tar: missing or not readable"):
        _dry(copy, tmp_path)


def test_a_run_folder_that_cannot_be_used_is_said_before_queueing(
    tiny_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"file is not a folder you can write to; choose another run.root"
    ):
        _dry(tiny_shards, tmp_path / "file" / "runs")
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "ckpt_latest.pth").touch()
    with pytest.raises(InputError, match=r"the run exists and run.resume=false"):
        _dry(tiny_shards, tmp_path / "runs", "run.name=old", "run.resume=false")


def test_without_slurm_submit_says_where_to_go(tiny_shards: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "portrait_dist",
        "submit",
        f"data.shards={tiny_shards}",
        f"run.root={tmp_path}/runs",
    ]
    done = subprocess.run(
        command, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "sbatch is not here" in done.stderr
    assert not (tmp_path / "runs").exists()


def _line(kind: str, time: float, **values: Any) -> str:
    return json.dumps({"kind": kind, "time": time, **values}) + "\n"


def _run(folder: Path, *more: str) -> Path:
    folder.mkdir()
    place = {"steps_per_epoch": 10, "max_epochs": 5, "world_size": 2}
    lines = [
        _line("start", 1000, epoch=0, step=0, **place),
        _line("interval", 1050, epoch=0, step=5, loss=0.9, images_per_second=40.0, **place),
        _line(
            "epoch",
            1100,
            epoch=0,
            step=10,
            val_iou=0.8,
            samples_seen=80,
            loss=0.5,
            images_per_second=41.0,
            **place,
        ),
        _line(
            "epoch",
            1200,
            epoch=1,
            step=20,
            val_iou=0.7,
            samples_seen=160,
            loss=0.4,
            images_per_second=42.0,
            **place,
        ),
    ]
    (folder / "metrics.jsonl").write_text("".join([*lines, *more]))
    return folder


def test_status_of_a_running_run_gives_place_score_speed_time_left_and_checkpoint_age(
    tmp_path: Path,
) -> None:
    run = _run(tmp_path / "run")
    (run / "ckpt_latest.pth").touch()
    os.utime(run / "ckpt_latest.pth", (1190, 1190))
    result = run_status(run, now=1210)
    assert result["state"] == "running"
    assert (result["epoch"], result["max_epochs"], result["step"], result["total_steps"]) == (
        2,
        5,
        20,
        50,
    )
    assert (result["iou"], result["best_iou"], result["loss"]) == (0.7, 0.8, 0.4)
    assert (result["images_per_second"], result["samples_seen"], result["world_size"]) == (
        42.0,
        160,
        2,
    )
    assert result["seconds_left"] == 300.0  # 30 steps at 10 s each
    assert (result["checkpoint_age_seconds"], result["seconds_since_last_line"]) == (20.0, 10.0)
    assert result["last_error"] is None
    assert "5 min 00 s" in table(result)


def test_status_tells_failed_stopped_silent_and_finished_runs_apart(tmp_path: Path) -> None:
    error = _line("error", 1300, message="rank 1: ValueError: x")
    again = _line("start", 1400, epoch=2, step=20, steps_per_epoch=10, max_epochs=5)
    last = _line("epoch", 1500, epoch=4, step=50, val_iou=0.9, steps_per_epoch=10, max_epochs=5)
    failed = run_status(_run(tmp_path / "failed", error), now=1310)
    assert (failed["state"], failed["last_error"], failed["last_error_age_seconds"]) == (
        "failed",
        "rank 1: ValueError: x",
        10.0,
    )
    assert (
        run_status(
            _run(tmp_path / "stopped", _line("stop", 1300, message="stopped by SIGUSR2")), now=1310
        )["state"]
        == "stopped"
    )
    assert run_status(_run(tmp_path / "silent"), now=1200 + 3600)["state"] == "silent"
    resumed = run_status(_run(tmp_path / "resumed", error, again), now=1410)
    assert (resumed["state"], resumed["last_error"]) == ("running", "rank 1: ValueError: x")
    finished = run_status(_run(tmp_path / "finished", error, again, last), now=9999)
    assert (finished["state"], finished["seconds_left"], finished["epoch"]) == ("finished", 0.0, 5)


def test_status_reads_past_a_line_cut_short_by_a_crash(tmp_path: Path) -> None:
    assert run_status(_run(tmp_path / "run", '{"kind": "epoch", "ti'), now=1210)["epoch"] == 2


def test_status_of_something_else_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such run folder"):
        run_status(tmp_path / "none")
    with pytest.raises(InputError, match="not a run folder"):
        run_status(tmp_path)


def test_status_starts_without_torch(tmp_path: Path) -> None:
    code = "import sys; from portrait_dist import cli; code = cli.run(sys.argv[1:]); print('torch' in sys.modules, code)"
    words = ["status", str(_run(tmp_path / "run")), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert json.loads(first)["epoch"] == 2
    assert second == "False 0"
