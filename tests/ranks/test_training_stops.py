"""Stops by signal, kill, error or stall, and resuming with no sample lost and none seen twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.damage import damage_sample
from tests.jobs import Job, checkpoint, largest_difference, lines, train, wait_for

STEPS = 4
KEYS = ("train.max_epochs=40", "data.log_keys=true", "train.log_every_steps=1")


def keys_by_epoch(run: Path) -> dict[int, Counter[str]]:
    """Keys trained on, over all ranks and incarnations."""
    found: dict[int, Counter[str]] = {}
    for path in run.glob("keys-rank*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["epoch"], Counter()).update(record["keys"])
    return found


def assert_equal_to_the_bit(run: Path, reference: Path) -> None:
    """Weights, optimiser, best metric and every epoch's metrics."""
    names = ("step", "samples_seen", "loss", "iou", "val_loss", "val_iou", "lr")
    ended = {line["epoch"]: [line[name] for name in names] for line in lines(run, "epoch")}
    assert ended == {
        line["epoch"]: [line[name] for name in names] for line in lines(reference, "epoch")
    }
    ours, theirs = checkpoint(run), checkpoint(reference)
    assert largest_difference(ours["net"], theirs["net"]) == 0
    for name, state in theirs["optimizer_state_dict"]["state"].items():
        assert largest_difference(ours["optimizer_state_dict"]["state"][name], state) == 0
    assert ours["portrait_dist"]["best_metric"] == theirs["portrait_dist"]["best_metric"]


def steps_done(run: Path) -> int:
    return max((line["step"] for line in lines(run, "interval")), default=0)


def stop_after(job: Job, run: Path, step: int, number: signal.Signals, to: str) -> None:
    """Send a signal to torchrun or to the last rank when the run has passed a step.

    All must be gone within 20 s, the ranks of a torchrun that was killed as well.
    """
    wait_for(lambda: steps_done(run) >= step, f"step {step}", job)
    ranks = job.ranks()
    sent = time.monotonic()
    os.kill(job.process.pid if to == "torchrun" else ranks[-1].pid, number)
    assert job.wait(60) != 0
    wait_for(lambda: not any(rank.is_running() for rank in ranks), "the end of the ranks")
    assert time.monotonic() - sent < 20
    assert "stopped by" in job.text()
    assert lines(run)[-1]["kind"] == "stop"


def reached(run: Path, starts: int, step: int) -> bool:
    """Whether the n-th start has passed a step."""
    return len(lines(run, "start")) == starts and steps_done(run) >= step


@pytest.fixture(scope="module")
def uninterrupted(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, forty epochs of four steps, nothing happens."""
    root = tmp_path_factory.mktemp("uninterrupted")
    assert (
        train(root, tiny_shards, *KEYS, "train.batch_size=6", ranks=2).result()["steps"]
        == 40 * STEPS
    )
    return root / "run"


def test_interrupted_by_each_signal_and_resumed_equals_uninterrupted_to_the_bit(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """USR2 to one rank; INT, KILL and TERM to torchrun, at whatever step they hit; then to the end.

    torchrun cannot hand on SIGKILL: the kernel tells the ranks.
    """
    run = tmp_path / "run"
    for step, number, to in (
        (5, signal.SIGUSR2, "one rank"),
        (30, signal.SIGINT, "torchrun"),
        (50, signal.SIGKILL, "torchrun"),
        (70, signal.SIGTERM, "torchrun"),
    ):
        job = train(tmp_path, tiny_shards, *KEYS, "train.batch_size=6", ranks=2)
        stop_after(job, run, step, number, to)
    assert (
        train(tmp_path, tiny_shards, *KEYS, "train.batch_size=6", ranks=2).result()["epochs"] == 40
    )
    assert len(lines(run, "stop")) == 4
    assert_equal_to_the_bit(run, uninterrupted)
    for epoch, keys in keys_by_epoch(run).items():
        assert keys == keys_by_epoch(uninterrupted)[epoch]


def test_one_process_alone_exits_with_75_and_resumes(tiny_shards: Path, tmp_path: Path) -> None:
    job = train(
        tmp_path, tiny_shards, *KEYS, "train.batch_size=12", "train.max_epochs=400", ranks=0
    )
    run = tmp_path / "run"
    wait_for(lambda: steps_done(run) >= 3, "step 3", job)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert "Traceback" not in job.text()
    stopped = checkpoint(run)
    done = lines(run)[-1]
    assert done["kind"] == "stop"
    assert stopped["portrait_dist"]["samples_seen"] >= 36


def test_resumed_on_other_world_sizes_no_sample_is_seen_twice_and_none_is_skipped(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """Two ranks, stopped; three, stopped; one whose torchrun is killed; one process to the end.

    The global batch is always 12.
    """
    run = tmp_path / "run"
    stops = ((2, 6, signal.SIGTERM), (3, 22, signal.SIGTERM), (1, 38, signal.SIGKILL))
    for ranks, step, number in stops:
        job = train(tmp_path, tiny_shards, *KEYS, f"train.batch_size={12 // ranks}", ranks=ranks)
        stop_after(job, run, step, number, "torchrun")
    epochs = checkpoint(run)["epoch"] + 2
    job = train(
        tmp_path, tiny_shards, *KEYS, "train.batch_size=12", f"train.max_epochs={epochs}", ranks=0
    )
    assert job.result()["samples_seen"] == epochs * STEPS * 12
    seen = keys_by_epoch(run)
    assert sorted(seen) == list(range(epochs))
    for epoch, keys in seen.items():
        assert len(keys) == STEPS * 12, epoch
        assert set(keys.values()) == {1}, epoch


def test_killed_ranks_are_restarted_from_the_last_checkpoint_and_lose_nothing(
    uninterrupted: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """Kill -9 of rank 1, then of rank 0, which writes a checkpoint at every step."""
    rendezvous = ("--standalone", "--nproc-per-node=2", "--max-restarts=2")
    job = train(
        tmp_path,
        tiny_shards,
        *KEYS,
        "train.batch_size=6",
        "train.save_every_steps=1",
        launcher=rendezvous,
    )
    run = tmp_path / "run"
    for started, step, victim in ((1, 10, 1), (2, 60, 0)):
        wait_for(partial(reached, run, started, step), f"step {step}", job)
        job.ranks()[victim].kill()
    assert job.result()["epochs"] == 40
    assert len(lines(run, "start")) == 3
    assert_equal_to_the_bit(run, uninterrupted)
    assert not [path for path in run.iterdir() if "tmp" in path.name]


def test_a_damaged_sample_met_by_one_rank_stops_all_with_its_name(
    tiny_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    damage_sample(shards, "train-00002.tar", 0)
    job = train(tmp_path, shards, *KEYS, "train.batch_size=6", ranks=2)
    assert job.wait(60) != 0
    assert "train-00002.tar" in job.text()
    assert job.text().count("train-00002.tar") <= 2
    assert lines(tmp_path / "run")[-1]["kind"] == "error"


SABOTAGE = """
import builtins, os
if os.environ.get("RANK") == "1":
    def sabotaged(path, *args, _open=open, **options):
        if "keys-rank1" in str(path):
            raise LookupError("nobody foresaw this")
        return _open(path, *args, **options)
    builtins.open = sabotaged
"""


def test_a_rank_that_raises_stops_all_and_its_traceback_is_shown_once(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """Rank 1 meets an error that nobody foresaw when it writes its list of keys."""
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    prefix = ("env", f"PYTHONPATH={tmp_path}")
    job = train(tmp_path, tiny_shards, *KEYS, "train.batch_size=6", ranks=2, prefix=prefix)
    assert job.wait(90) != 0
    assert job.text().count("LookupError: nobody foresaw this") == 1
    assert "rank 0 ended because rank 1 failed" in job.text()
    assert "LookupError" in lines(tmp_path / "run")[-1]["message"]


def test_a_rank_that_stalls_is_ended_by_the_timeout(tiny_shards: Path, tmp_path: Path) -> None:
    job = train(
        tmp_path, tiny_shards, *KEYS, "train.batch_size=6", "train.timeout_seconds=5", ranks=2
    )
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, "step 2", job)
    ranks = job.ranks()
    ranks[1].suspend()
    assert job.wait(60) != 0
    assert not any(rank.is_running() for rank in ranks)
