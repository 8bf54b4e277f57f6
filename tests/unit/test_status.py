"""``status`` needs nothing but the run's folder and reads past any line of metrics.jsonl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.errors import InputError
from portrait_dist.files import write_text
from portrait_dist.runs.status import State, run_status
from portrait_dist.runs.steps import QueuedStep, TaskEvent, steps_of
from tests.cli import assert_one_line, call

POSITION = {"steps_per_epoch": 10, "max_epochs": 5, "world_size": 2}


def line(kind: str, time: float, **values: Any) -> str:
    """One line of metrics.jsonl."""
    return json.dumps({"kind": kind, "time": time, **values}) + "\n"


def write_run(folder: Path, *more: str) -> Path:
    """Write a run of two epochs of ten steps each, and more lines behind them."""
    folder.mkdir()
    lines = [
        line("start", 1000, epoch=0, step=0, **POSITION),
        line("interval", 1050, epoch=0, step=5, loss=0.9, images_per_second=40.0, **POSITION),
        line("epoch", 1100, epoch=0, step=10, val_iou=0.8, samples_seen=80, loss=0.5, **POSITION),
        line(
            "epoch",
            1200,
            epoch=1,
            step=20,
            val_iou=0.7,
            samples_seen=160,
            loss=0.4,
            images_per_second=42.0,
            **POSITION,
        ),
    ]
    (folder / "metrics.jsonl").write_text("".join([*lines, *more]))
    return folder


def test_status_of_a_running_run_gives_position_score_speed_time_left_and_checkpoint_age(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run")
    (run / "ckpt_latest.pth").touch()
    os.utime(run / "ckpt_latest.pth", (1190, 1190))
    status = run_status(run, now=1210)
    assert status.state == State.RUNNING
    assert (status.epoch, status.max_epochs, status.step, status.total_steps) == (2, 5, 20, 50)
    assert (status.iou, status.best_iou, status.loss) == (0.7, 0.8, 0.4)
    assert (status.images_per_second, status.samples_seen, status.world_size) == (42.0, 160, 2)
    assert status.seconds_left == 300.0  # 30 steps at 10 s each
    assert (status.checkpoint_age_seconds, status.seconds_since_last_line) == (20.0, 10.0)
    assert status.last_error is None
    assert "5 min 00 s" in status.table()


def test_a_clock_behind_the_one_that_wrote_gives_no_negative_ages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "ckpt_latest.pth").touch()
    status = run_status(run, now=5)
    assert (status.seconds_since_last_line, status.checkpoint_age_seconds) == (0.0, 0.0)
    assert "-" not in status.table().replace(str(run), "").replace("0.", "")


def test_batches_and_optimiser_steps_are_two_numbers_with_two_names(tmp_path: Path) -> None:
    """Ten batches make four steps of three; old lines count batches as steps."""
    position = {"batches_per_epoch": 10, "steps_per_epoch": 4, "max_epochs": 5}
    run = write_run(tmp_path / "run", line("epoch", 1300, epoch=2, batch=30, step=12, **position))
    status = run_status(run, now=1310)
    assert (status.batch, status.total_batches) == (30, 50)
    assert (status.step, status.total_steps) == (12, 20)
    assert "12 of 20 (30 of 50 batches)" in status.table()
    old = run_status(write_run(tmp_path / "old"), now=1210)
    assert (old.batch, old.total_batches, old.step) == (20, 50, 20)


def test_status_tells_failed_stopped_silent_and_finished_runs_apart(tmp_path: Path) -> None:
    error = line("error", 1300, message="rank 1: ValueError: x")
    again = line("start", 1400, epoch=2, step=20, **POSITION)
    last = line("epoch", 1500, epoch=4, step=50, val_iou=0.9, **POSITION)
    stop = line("stop", 1300, message="stopped by SIGUSR2")
    failed = run_status(write_run(tmp_path / "failed", error), now=1310)
    assert failed.state == State.FAILED
    assert (failed.last_error, failed.last_error_age_seconds) == ("rank 1: ValueError: x", 10.0)
    assert run_status(write_run(tmp_path / "stopped", stop), now=1310).state == State.STOPPED
    assert run_status(write_run(tmp_path / "silent"), now=1200 + 3600).state == State.SILENT
    resumed = run_status(write_run(tmp_path / "resumed", error, again), now=1410)
    assert (resumed.state, resumed.last_error) == (State.RUNNING, "rank 1: ValueError: x")
    finished = run_status(write_run(tmp_path / "finished", error, again, last), now=9999)
    assert (finished.state, finished.seconds_left, finished.epoch) == (State.FINISHED, 0.0, 5)


def test_the_last_report_of_a_slow_rank_in_this_attempt_is_shown(tmp_path: Path) -> None:
    message = "rank 5 on node7 runs at 0.6 of the median: waits for data"
    slow = line("straggler", 1210, rank=5, host="node7", relative_speed=0.6, message=message)
    status = run_status(write_run(tmp_path / "slow", slow), now=1250)
    assert (status.straggler, status.straggler_age_seconds) == (message, 40.0)
    assert f"40 s ago: {message}" in status.table()
    again = line("start", 1220, epoch=2, step=20, **POSITION)
    assert run_status(write_run(tmp_path / "again", slow, again), now=1250).straggler is None


@pytest.mark.parametrize(
    "rubbish",
    [
        b'{"kind": "epoch", "ti',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b"[" * 100_000,
        b'{"kind": "epoch", "time": 1300, "step": 30}',
        b'{"kind": "epoch", "epoch": 2, "step": 30}',
        b'{"kind": "interval", "time": 1300, "epoch": 2}',
        b'{"kind": "epoch", "time": "1300", "epoch": 2, "step": 30}',
        b'{"kind": "epoch", "time": NaN, "epoch": 2, "step": 30}',
        b'{"kind": "epoch", "time": 1e400, "epoch": 2, "step": 30}',
        b'{"kind": "epoch", "time": 1e30, "epoch": 2, "step": 30}',
        b'{"kind": "epoch", "time": 1300, "epoch": 2.5, "step": 30}',
        b'{"kind": "epoch", "time": 1300, "epoch": true, "step": 30}',
        b'{"kind": "epoch", "time": 1300, "epoch": 2, "step": -1}',
        b'{"kind": "epoch", "time": 1300, "epoch": 2, "step": 30, "val_iou": "good"}',
        b'{"kind": "epoch", "time": 1300, "epoch": 2, "step": 30, "loss": %s}' % (b"9" * 400),
        b'{"kind": "error", "time": 1300, "message": {"a": 1}}',
        b'{"kind": 5, "time": 1300}',
        b'{"kind": "error", "time": %s}' % (b"9" * 5000),
    ],
)
def test_a_line_that_is_not_what_it_should_be_is_skipped_and_counted(
    tmp_path: Path, rubbish: bytes
) -> None:
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(rubbish + b"\n")
    status = run_status(run, now=1210)
    assert (status.epoch, status.state, status.skipped_lines) == (2, State.RUNNING, 1)
    assert "1 line(s) of metrics.jsonl" in status.table()
    result = call("status", run, "--json")
    assert (result.exit_code, result.json["skipped_lines"]) == (0, 1)


def test_the_json_of_a_diverged_run_is_valid_json(tmp_path: Path) -> None:
    values = '"loss": NaN, "images_per_second": Infinity, "lr": 1e999'
    diverged = f'{{"kind": "epoch", "time": 1300, "epoch": 2, "step": 30, {values}}}\n'
    result = call("status", write_run(tmp_path / "run", diverged), "--json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    status = json.loads(result.stdout, parse_constant=refuse)
    assert (status["epoch"], status["loss"], status["skipped_lines"]) == (3, 0.4, 0)


def test_status_of_something_else_is_one_line(tmp_path: Path) -> None:
    assert_one_line(call("status", tmp_path / "none"), 2, "there is no such run folder")
    assert_one_line(call("status", tmp_path), 2, "not a run folder")
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert_one_line(call("status", tmp_path), 2, "is not a regular file")
    with pytest.raises(InputError, match=r"metrics.jsonl.*not a regular file"):
        run_status(tmp_path)


def test_status_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from portrait_dist import cli; code = cli.run(sys.argv[1:]); "
        "print('torch' in sys.modules, code)"
    )
    arguments = ["status", str(write_run(tmp_path / "run")), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert json.loads(first)["epoch"] == 2
    assert second == "False 0"


def test_damaged_records_of_jobs_are_passed_over(tmp_path: Path) -> None:
    logs, target = tmp_path / "slurm", str(tmp_path / "shards")
    good = asdict(QueuedStep("pack", 7, 2, "sbatch …", "7.log"))
    (logs / "7_0").mkdir(parents=True)
    wrongs: list[dict[str, Any]] = [{}, {"tasks": "9"}, {"tasks": 10**15}]
    wrongs += [{"name": 3}, {"job_id": "7"}, {"more": 1}]
    for number, wrong in enumerate(wrongs):
        record = {"time": 1.0, "targets": [target], "steps": [{**good, **wrong}]}
        write_text(logs / f"{number}.steps.json", json.dumps(record))
    done = asdict(TaskEvent(5.0, 1, "finished", "n0"))
    wrong_lines = [{**done, "state": ["failed"]}, {**done, "message": 7}, {**done, "time": "now"}]
    text = "".join(json.dumps(one) + "\n" for one in [done, *wrong_lines])
    write_text(logs / "7_0" / "step.jsonl", text + "[" * 100_000)
    (step,) = steps_of(tmp_path / "shards")
    assert step.tasks == {"finished": 1, "waiting": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        '{"samples": 7}',
        '{"samples": 7, "iou": NaN, "mean_iou": 1, "mae": 0, "sets": null}',
        '{"samples": 7, "iou": 1, "mean_iou": 1, "mae": 0, "sets": [1]}',
    ],
)
def test_a_file_of_scores_that_is_none_is_passed_by(text: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "scores-val.json").write_text(text)
    (run / "scores-test.json").write_text(
        '{"samples": 7, "iou": 0.5, "mean_iou": 0.25, "mae": 0.125, "sets": null, "more": 1}'
    )
    scores = call("status", run, "--json").json["scores"]
    numbers = {"samples": 7, "iou": 0.5, "mean_iou": 0.25, "mae": 0.125, "sets": {}}
    assert scores == {"test": numbers}
