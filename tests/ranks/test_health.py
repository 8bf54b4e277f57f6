"""Ranks that hang are named while the others wait; slow ranks are named with the reason."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from portrait_dist.runs.folder import RunFolder
from portrait_dist.runs.health import Stall, find_stall, read_heartbeats
from portrait_dist.runs.report import write_report
from portrait_dist.runs.status import run_status
from tests.jobs import lines, train
from tests.waiting import wait_for

HOST = socket.gethostname()


@contextlib.contextmanager
def job(folder: Path, sickness: str) -> Iterator[subprocess.Popen[str]]:
    """Start two ranks of tests.health_job; end them at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, "-m", "tests.health_job", str(folder), sickness],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        family = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        for one in [*family, process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.send_signal(signal.SIGKILL)
        process.communicate()


def explained(process: subprocess.Popen[str]) -> str:
    """Wait for the line in which a rank explains its error."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("EXPLAINED "):
            return line.removeprefix("EXPLAINED ").strip()
    raise AssertionError("".join(seen[-40:]))


@pytest.mark.parametrize(
    ("sickness", "doing"),
    [("asleep", "computes"), ("stopped", "its process does not run")],
)
def test_a_rank_that_sleeps_or_is_stopped_is_named_while_the_others_wait_and_when_they_give_up(
    tmp_path: Path, sickness: str, doing: str
) -> None:
    health = RunFolder(tmp_path).health
    with job(tmp_path, sickness) as process:

        def named() -> Stall | None:
            found = find_stall(health, least_seconds=2)
            return found if found and doing in found.message else None

        stall = wait_for(named, what=f"the missing rank is named: {doing}")
        assert stall
        assert [one.rank for one in stall.missing] == [1]
        assert f"rank 1 on {HOST} did not reach" in stall.message
        assert f"rank 1 on {HOST} did not reach all_reduce" in explained(process)
    beats = read_heartbeats(health)
    assert beats[1].collectives < beats[0].collectives


@pytest.mark.parametrize(
    ("sickness", "reason"), [("slow-data", "waits for data"), ("slow-compute", "computes slowly")]
)
def test_a_slow_rank_is_named_with_its_speed_and_the_reason(
    tmp_path: Path, sickness: str, reason: str
) -> None:
    with job(tmp_path, sickness) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    events = RunFolder(tmp_path).events().of_kind("straggler")
    assert events, output[-3000:]
    assert (events[0].rank, events[0].host) == (1, HOST)
    assert (events[0].relative_speed or 1) < 0.75
    assert f"rank 1 on {HOST} runs at" in output
    assert reason in (events[0].message or "")
    assert not RunFolder(tmp_path).health.exists(), "a run that ends well leaves no heartbeats"


def test_a_training_whose_rank_is_stopped_for_good_ends_and_status_names_the_rank(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """The timeout of a step ends the run (in validation the long one) and names the rank."""
    keys = ("train.max_epochs=400", "train.batch_size=1", "train.log_every_steps=1")
    timeouts = ("train.step_timeout_seconds=25", "train.timeout_seconds=60")
    started = train(tmp_path, tiny_shards, *keys, *timeouts, ranks=2)
    run = tmp_path / "run"
    try:
        wait_for(lambda: len(lines(run, "interval")) > 3, what="some steps are trained")
        started.ranks()[1].suspend()

        def stalled() -> str | None:
            return run_status(run).stall

        message = wait_for(stalled, what="status names the stopped rank")
        assert f"rank 1 on {HOST} did not reach" in (message or "")
        assert "The ranks wait" in report_of(run, tmp_path)
        assert started.wait(120) != 0
    finally:
        started.end()
    error = lines(run, "error")[-1]
    assert f"rank 1 on {HOST} did not reach" in error["message"]
    assert error["exit_code"] == 1
    assert run_status(run).last_error == error["message"]
    assert started.text().count("the ranks do not advance together") == 1
    assert "unbound_buffer" not in started.text(), "one line in place of gloo's traceback"


def report_of(run: Path, folder: Path) -> str:
    """Write a report without images and return it."""
    write_report(run, folder / "report.html", samples=0)
    return (folder / "report.html").read_text()
