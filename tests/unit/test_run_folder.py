"""A run's folder: what is appended can be read, and one process writes at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from portrait_dist.errors import InputError, PortraitDistError
from portrait_dist.runs import folder as run_folder
from portrait_dist.runs.folder import RunFolder, RunLock

HOLD = """
import sys
from pathlib import Path
from portrait_dist.runs.folder import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_what_is_appended_can_be_read_and_is_valid_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("start", epoch=0, step=0, machine={"cores": 2, "load": math.inf})
    folder.append("epoch", epoch=0, step=4, loss=math.nan, val_iou=0.5)
    start, epoch = folder.events()
    assert (start.kind, start.epoch, start.machine) == ("start", 0, {"cores": 2, "load": None})
    assert (epoch.step, epoch.loss, epoch.val_iou) == (4, None, 0.5)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_line_that_a_crash_cut_short_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(b'{"kind": "epoch", "time": 1')
    folder.append("stop", message="stopped by SIGTERM")
    events = folder.events()
    assert ([event.message for event in events], events.skipped) == (["stopped by SIGTERM"], 1)


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    code = (
        "import sys; from portrait_dist.runs.folder import RunFolder\n"
        "for n in range(200): RunFolder(sys.argv[1]).append('error', message='x' * 5000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    for process in [subprocess.Popen(command) for _ in range(3)]:
        assert process.wait(60) == 0
    events = RunFolder(tmp_path).events()
    assert (len(events), events.skipped) == (600, 0)


def test_a_folder_that_is_gone_or_full_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        RunFolder(tmp_path / "gone").append("end")
    full = RunFolder(tmp_path)
    full.metrics.symlink_to("/dev/full")
    with pytest.raises(PortraitDistError, match="disk is full"):
        full.append("end")


@pytest.fixture
def no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not inside a job of SLURM or torchrun."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of SLURM job 7 that holds the lock of the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"SLURM_JOB_ID": "7"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.usefixtures("no_restart")
def test_a_second_writer_is_refused_and_names_process_host_and_job_of_the_first(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(InputError, match=rf"process {holder.pid} on .*, SLURM job 7 is training"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    RunLock(tmp_path).release()


@pytest.mark.usefixtures("no_restart")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_and_the_run_continues(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING):
        RunLock(tmp_path).release()
    assert "this file system has no locks" in caplog.text


@pytest.mark.usefixtures("no_restart")
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_the_kernel_reports_as_held_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def held(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", held)
    with pytest.raises(InputError, match="another process is training"):
        RunLock(tmp_path)


@pytest.mark.usefixtures("no_restart")
def test_a_requeued_job_waits_for_the_lock_of_its_own_dead_attempt(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is released during the wait, as when the lease of a lost node ends on NFS."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    waited = threading.Event()

    def end_the_holder(seconds: float) -> None:
        waited.set()
        holder.kill()
        holder.wait()

    monkeypatch.setattr(time, "sleep", end_the_holder)
    RunLock(tmp_path).release()
    assert waited.is_set()


@pytest.mark.usefixtures("no_restart")
def test_a_requeued_job_does_not_wait_for_another_jobs_lock_and_not_for_ever(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    with pytest.raises(InputError, match="SLURM job 7 is training"):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(run_folder, "SECONDS_FOR_A_DEAD_NODE", 0.01)
    monkeypatch.setattr(time, "sleep", threading.Event().wait)
    with pytest.raises(InputError, match="SLURM job 7 is training"):
        RunLock(tmp_path)


def test_a_variable_of_slurm_that_is_no_number_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "many")
    with pytest.raises(InputError, match="SLURM_RESTART_COUNT=many: write a whole number"):
        RunLock(tmp_path)


def test_lines_of_old_runs_are_read_as_they_were_written(tmp_path: Path) -> None:
    old = {"kind": "epoch", "time": 1e9, "epoch": 1, "step": 8, "steps_per_epoch": 4, "new": [1]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    (event,) = RunFolder(tmp_path).events()
    assert (event.batches_done, event.batches_in_epoch, event.step) == (8, 4, 8)
