"""``train --nproc``: every signal saves at one step, one JSON object, the rank's exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from portrait_dist.errors import InputError
from portrait_dist.training import launch
from tests.jobs import Job, lines, train, wait_for

SIGNALS = (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)


def ended(job: Job) -> tuple[int, Any]:
    """Exit code and the one JSON object on stdout."""
    code = job.wait(120)
    assert job.process.stdout is not None
    return code, json.loads(job.process.stdout.read())


def steps_of(run: Path) -> int:
    return max((line["step"] for line in lines(run, "interval")), default=0)


def stepped(run: Path, step: int) -> bool:
    return steps_of(run) > step


def test_a_signal_to_the_launcher_saves_all_ranks_at_one_step_and_the_same_command_resumes(
    tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    keys = ("train.batch_size=6", "data.log_keys=true", "train.log_every_steps=1")
    reached = 0
    for number in SIGNALS:
        job = train(tmp_path, tiny_shards, *keys, "train.max_epochs=500", nproc=2)
        wait_for(partial(stepped, run, reached + 5), "a few steps", job)
        ranks = job.ranks()
        assert len(ranks) == 2
        job.process.send_signal(number)
        code, result = ended(job)
        assert code == result["exit_code"] == 75, job.text()
        assert f"stopped by {number.name}" in result["error"]
        assert "[rank 0] portrait-dist: stopped by" in job.text()
        assert not any(rank.is_running() for rank in ranks)
        stop = lines(run)[-1]
        assert (stop["kind"], stop["exit_code"], stop["requeue"]) == ("stop", 75, True)
        assert stop["step"] > reached
        reached = stop["step"]
    epochs = reached // 4 + 1
    job = train(tmp_path, tiny_shards, *keys, f"train.max_epochs={epochs}", nproc=2)
    code, result = ended(job)
    assert (code, result["world_size"], result["epochs"]) == (0, 2, epochs)
    seen: dict[int, Counter[str]] = {}
    for path in run.glob("keys-rank*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            seen.setdefault(record["epoch"], Counter()).update(record["keys"])
    assert [sum(seen[epoch].values()) for epoch in range(epochs)] == [48] * epochs
    assert {count for epoch in seen.values() for count in epoch.values()} == {1}


def test_a_killed_rank_and_a_refused_one_end_the_launcher_with_their_reason(
    tiny_shards: Path, tmp_path: Path
) -> None:
    keys = ("train.batch_size=6", "train.max_epochs=500")
    job = train(tmp_path, tiny_shards, *keys, nproc=2)
    wait_for(lambda: lines(tmp_path / "run", "epoch"), "an epoch", job)
    job.ranks()[1].kill()
    code, result = ended(job)
    assert code == result["exit_code"] == 1
    job = train(tmp_path, tiny_shards, *keys, "model.init_features=3", nproc=2)
    code, result = ended(job)
    assert code == result["exit_code"] == 2
    assert "model.init_features was 2, now it is 3" in result["error"]
    assert job.text().count("model.init_features was 2") == 1, "said once, by rank 0"


def test_ranks_whose_torchrun_is_killed_while_they_start_end_at_once(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """They would look for its key-value store for ten minutes and more."""
    job = train(tmp_path, tiny_shards, ranks=2)
    ranks = wait_for(lambda: len(job.ranks()) == 2 and job.ranks(), "the start of two ranks", job)
    job.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert not alive
    assert "torchrun process has ended, so this" in job.text()


def test_the_number_of_ranks_is_a_number_auto_or_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch.ranks_here("3") == 3
    assert launch.ranks_here("auto") == min(2, len(os.sched_getaffinity(0)))
    for wrong in ("0", "-1", "x", "", "４", "9" * 5000):
        with pytest.raises(InputError, match="give a number of ranks"):
            launch.ranks_here(wrong)
    with pytest.raises(InputError, match="no GPU here"):
        launch.ranks_here("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch.ranks_here("gpu") == launch.ranks_here("auto") == 4


def test_a_typing_error_costs_no_start_of_ranks() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "portrait_dist", "train", "--nproc", "2"]
    done = subprocess.run([*command, "train.lrr=1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'train.lr'" in done.stderr
    assert "torch.distributed" not in done.stderr
