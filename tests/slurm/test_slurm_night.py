"""One job on a real two-node SLURM lives through all that a night can bring.

That is its time limit, preemption, a killed rank and a lost node. Beside it the same run goes
undisturbed, queued with ``portrait-dist submit``. Both must end with the same weights.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import checkpoint, largest_difference, lines
from tests.slurm.cluster import LAUNCH, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

KEYS: tuple[str, ...] = (
    "model.init_features=2",
    "model.norm=group",
    "train.max_epochs=30",
    "train.batch_size=4",
    "train.threads=1",
)
KEYS += ("train.average_best=false", "train.pictures=0")


@dataclass
class Night:
    """What is left in the morning."""

    cluster: Cluster
    submitted: dict[str, Any]
    undisturbed: dict[str, str]
    disturbed: dict[str, str]
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "job.log").read_text()

    @property
    def attempts(self) -> list[dict[str, Any]]:
        path = self.folder / "runs" / "slurm" / self.disturbed["JobId"] / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def night(cluster: Cluster, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Night:
    folder = tmp_path_factory.mktemp("night")
    arguments = [
        "--recipe",
        "aisegment_unet",
        f"data.shards={tiny_shards}",
        f"run.root={folder}/runs",
        *KEYS,
    ]
    command = [
        sys.executable,
        "-m",
        "portrait_dist",
        "submit",
        "--json",
        "--nodes",
        "2",
        *arguments,
        "run.name=undisturbed",
    ]
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    submitted = json.loads(done.stdout)
    options = ["--nodes=2", f"--output={folder}/job.log", str(LAUNCH / "slurm.sbatch")]
    job = cluster.sbatch(*options, *arguments, "run.name=disturbed", cwd=folder)
    undisturbed = _live_through(cluster, job, submitted["job_id"], folder)
    return Night(cluster, submitted, undisturbed, cluster.wait(job, 240), folder)


def _live_through(cluster: Cluster, job: int, other: int, folder: Path) -> dict[str, str]:
    log, run = folder / "job.log", folder / "runs" / "disturbed"

    _until_trained_in_attempt(cluster, 1, run, log)
    _freeze(cluster, job)
    cluster.command(
        "scontrol", "update", f"JobId={job}", "TimeLimit=2"
    )  # less than the 120 s of --signal are left
    cluster.until(
        lambda: "SLURM sent SIGUSR2" in log.read_text(), 90, "SLURM gives notice of the time limit"
    )
    _freeze(cluster, job, signal.SIGCONT)
    cluster.until(
        lambda: cluster.job(job)["Restarts"] == "1", 60, "the job was requeued at its time limit"
    )
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    undisturbed = cluster.wait(other, 180)

    _until_trained_in_attempt(cluster, 2, run, log)
    _freeze(cluster, job)  # preemption wakes it: SLURM sends CONT, then TERM
    cluster.sbatch(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"
    )
    cluster.until(
        lambda: cluster.job(job)["Restarts"] == "2", 90, "the job was requeued after preemption"
    )

    _until_trained_in_attempt(cluster, 3, run, log)
    os.kill(_ranks(cluster, job)[1], signal.SIGKILL)
    cluster.until(
        lambda: cluster.job(job)["Restarts"] == "3",
        90,
        "the job was requeued after a rank was killed",
    )

    _until_trained_in_attempt(cluster, 4, run, log)
    cluster.lose_node("n1")
    cluster.until(
        lambda: cluster.job(job)["Restarts"] == "4",
        120,
        "the job was requeued after a node was lost",
    )
    cluster.start_node("n1")
    return undisturbed


def _until_trained_in_attempt(cluster: Cluster, attempt: int, run: Path, log: Path) -> None:
    """An epoch was trained and saved in this attempt."""

    def trained() -> bool:
        found = lines(run)
        starts = [number for number, line in enumerate(found) if line["kind"] == "start"]
        epochs = (
            [line for line in found[starts[-1] :] if line["kind"] == "epoch"]
            if len(starts) == attempt
            else []
        )
        latest = run / "ckpt_latest.pth"
        return bool(epochs) and latest.exists() and latest.stat().st_mtime > epochs[0]["time"]

    try:
        cluster.until(trained, 150, f"attempt {attempt} has trained")
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{log.read_text()[-6000:]}") from None


def _ranks(cluster: Cluster, job: int) -> dict[int, int]:
    """Process of each rank of a job."""
    return {
        int(variables["RANK"]): pid
        for pid, variables in cluster.processes()
        if variables.get("SLURM_JOB_ID") == str(job) and "RANK" in variables
    }


def _freeze(cluster: Cluster, job: int, number: int = signal.SIGSTOP) -> None:
    for pid in _ranks(cluster, job).values():
        os.kill(pid, number)


def test_a_submitted_job_trains_on_all_nodes_and_says_how_to_watch_stop_and_resume_it(
    night: Night,
) -> None:
    assert night.undisturbed["JobState"] == "COMPLETED"
    assert night.undisturbed["Restarts"] == "0"
    assert night.submitted["world_size"] == 2
    assert night.submitted["steps_per_epoch"] == 57 // 8
    text = Path(night.submitted["logs"]).read_text()
    assert "2 node(s) n[0-1], 2 rank(s), 1 per node" in text
    assert checkpoint(night.folder / "runs" / "undisturbed")["epoch"] == 30
    assert night.submitted["watch"].endswith("runs/undisturbed")
    assert night.submitted["stop"] == f"scancel {night.submitted['job_id']}"
    assert "launch/slurm.sbatch" in night.submitted["resume"]


def test_a_job_that_was_stopped_preempted_killed_and_lost_a_node_ends_with_the_same_weights(
    night: Night,
) -> None:
    assert night.disturbed["JobState"] == "COMPLETED", night.log[-4000:]
    one, other = (checkpoint(night.folder / "runs" / name) for name in ("undisturbed", "disturbed"))
    assert one["epoch"] == other["epoch"] == 30
    assert one["portrait_dist"]["samples_seen"] == other["portrait_dist"]["samples_seen"]
    assert largest_difference(one["net"], other["net"]) == 0.0


def test_each_attempt_resumes_where_the_last_one_saved(night: Night) -> None:
    assert night.disturbed["Restarts"] == "4"
    events = lines(night.folder / "runs" / "disturbed")
    starts = [line["epoch"] for line in events if line["kind"] == "start"]
    assert len(starts) == 5
    assert starts == sorted(set(starts)), "every attempt starts further on than the one before"
    assert [attempt["progressed"] for attempt in night.attempts] == [True] * len(night.attempts)


def test_the_log_says_why_each_attempt_ended(night: Night) -> None:
    assert "stopped by SIGUSR2; requeue 1 of at most 20" in night.log
    assert re.search(r"stopped by SIGTERM.*; requeue 2 of at most 20", night.log)
    assert re.search(r"node n\d: rank 1 failed \(killed by SIGKILL\)", night.log)
    assert re.search(r"failed with exit code 1.*; requeue 3 of at most 20", night.log)
    assert re.search(r"portrait-dist: finished", night.log)


def test_each_rank_has_its_log_beside_the_others_in_the_jobs_folder(night: Night) -> None:
    names = {
        path.name for path in (night.folder / "runs" / "slurm" / night.disturbed["JobId"]).iterdir()
    }
    expected = {
        f"attempt{attempt}-rank{rank}.{kind}"
        for attempt in range(1, 6)
        for rank in (0, 1)
        for kind in ("out", "err")
    }
    assert names == expected | {"attempts.jsonl", "failures.jsonl"}


def test_status_reads_the_run_without_slurm(night: Night) -> None:
    from portrait_dist.runs.status import run_status

    result = run_status(night.folder / "runs" / "disturbed")
    assert (result.state, result.epoch, result.step, result.total_steps) == (
        "finished",
        30,
        210,
        210,
    )
    assert result.seconds_left == 0.0
    assert result.world_size == 2
