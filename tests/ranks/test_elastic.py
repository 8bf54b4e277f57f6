"""A fixed global batch: a run continues on any number of ranks, and without a node that died."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from portrait_dist import config
from portrait_dist.training.plan import make_plan
from tests.global_batches import (
    GLOBAL_BATCH,
    KEYS,
    SAMPLES,
    STEPS,
    Steps,
    planned_steps,
    trained_steps,
)
from tests.jobs import PLAIN, TINY, checkpoint, largest_difference, lines, train
from tests.slurm.cluster import LAUNCH
from tests.waiting import wait_for


def steps_of(run: Path) -> int:
    return max((line["step"] for line in lines(run, "interval")), default=0)


def test_a_run_stopped_within_an_epoch_continues_on_other_ranks_with_the_same_global_batches(
    tiny_shards: Path, tmp_path: Path
) -> None:
    run, seen, trained = tmp_path / "run", dict[Path, int](), Steps()
    stops: list[int] = []
    for ranks in (2, 1, 3, 4):
        settings = config.load(PLAIN, [f"data.shards={tiny_shards}", *KEYS])
        plan = make_plan(settings, SAMPLES, ranks)
        assert (plan.global_batch, plan.steps_per_epoch) == (GLOBAL_BATCH, STEPS)
        last = ranks == 4
        epochs = stops[-1] // STEPS + 2 if last else 500
        job = train(tmp_path, tiny_shards, *KEYS, f"train.max_epochs={epochs}", nproc=ranks)
        if not last:
            before = stops[-1] if stops else 0

            def in_the_middle(before: int = before) -> bool:
                step = steps_of(run)
                return step > before + 2 and step % STEPS == 1

            wait_for(in_the_middle, 240, f"a step within an epoch on {ranks} ranks")
            job.process.send_signal(signal.SIGUSR2)
            assert job.wait(120) == 75, job.text()
            stops.append(lines(run)[-1]["step"])
        else:
            result = job.result()
        new = trained_steps(run, seen, plan.accumulate)
        assert not set(new) & set(trained), "no step twice"
        trained |= new
    assert any(stop % STEPS for stop in stops), stops
    assert trained == planned_steps(tiny_shards, epochs), "the same batches, none skipped"
    assert (result["world_size"], result["steps"]) == (4, epochs * STEPS)
    assert result["samples_seen"] == epochs * STEPS * GLOBAL_BATCH


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def agents(log: Path, *keys: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two torchrun agents that need one at least, as launch/torchrun.sh starts them."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "NNODES": "1:2",
        "NPROC_PER_NODE": "1",
        "MAX_RESTARTS": "3",
        "MASTER_PORT": str(free_port()),
    }
    started = []
    with log.open("wb") as file:
        for node in ("0", "1"):
            command = [str(LAUNCH / "torchrun.sh"), "--recipe", PLAIN, *keys]
            variables = environment | {"NODE_RANK": node}
            started.append(subprocess.Popen(command, env=variables, stdout=file, stderr=file))
    try:
        yield started
    finally:
        for agent in started:
            kill_all(agent)


def kill_all(agent: subprocess.Popen[bytes]) -> None:
    """Kill an agent and its ranks, as a node does that loses power."""
    if agent.poll() is None:
        family = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
        for process in family:
            process.suspend()
        for process in family:
            process.kill()
        agent.wait()


@pytest.mark.timeout(600)
def test_a_node_that_dies_for_good_is_done_without_and_the_global_batches_stay_the_same(
    tiny_shards: Path, tmp_path: Path
) -> None:
    run, epochs = tmp_path / "run", 12
    whole = (*KEYS, f"train.batch_size={GLOBAL_BATCH}")  # one batch for a step on any ranks
    keys = (f"data.shards={tiny_shards}", f"run.root={tmp_path}", "run.name=run", *TINY, *whole)
    saving = ("train.save_every_steps=1", f"train.max_epochs={epochs}")
    with agents(tmp_path / "log", *keys, *saving) as (survivor, lost):

        def trained_on_two() -> bool:
            log = (tmp_path / "log").read_text(errors="replace")
            assert survivor.poll() is None, log[-3000:]
            found = lines(run, "interval")
            return bool(found) and found[-1]["step"] > 5 and found[-1]["world_size"] == 2

        wait_for(trained_on_two, 240, "steps on two nodes")
        kill_all(lost)
        code = survivor.wait(300)
    log = (tmp_path / "log").read_text(errors="replace")
    assert code == 0, log[-6000:]
    assert lines(run, "epoch")[-1]["epoch"] == epochs - 1
    assert lines(run, "start")[-1]["world_size"] == 1
    state = checkpoint(run)
    assert state["portrait_dist"]["samples_seen"] == epochs * STEPS * GLOBAL_BATCH
    # What was trained after the last save is trained again, as the same batches.
    trained = {at: sorted(set(one)) for at, one in trained_steps(run, {}, 1).items()}
    assert trained == planned_steps(tiny_shards, epochs)
    alone = train(
        tmp_path, tiny_shards, *whole, f"train.max_epochs={epochs}", name="alone", ranks=0
    )
    assert alone.result()["steps"] == epochs * STEPS
    # Sums over ranks round in another order, and Adam divides by small numbers: seen 0.007.
    assert largest_difference(state["net"], checkpoint(tmp_path / "alone")["net"]) < 0.02
