"""Steps whose nodes are lost half-way come back, on a real two-node SLURM."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from portrait_dist.runs.steps import read_events, steps_of
from portrait_dist.slurm.steps import StepJob, submit_steps
from portrait_dist.slurm.submit import Request
from tests.cli import call
from tests.jobs import train_into
from tests.slurm.cluster import NODES, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

PHOTOS = 8
PARTS = 2


@dataclass
class Barrier:
    """A file at which a task is caught: whoever opens it waits.

    Attributes:
        path: of the file; nobody may have it open.
        job: as SLURM names it, ``120`` or ``120_3``.
        descriptor: of the file while the barrier is up.
        stopped: the task is stopped at the file.
    """

    path: Path
    job: str
    descriptor: int = -1
    stopped: bool = False

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """Hold a lease on the file: the kernel lets another process that opens it wait."""
        self.descriptor = os.open(self.path, os.O_RDONLY)
        try:
            # SIGIO, which the kernel would send, ends a process that does not expect it.
            fcntl.fcntl(self.descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            yield
        finally:
            os.close(self.descriptor)

    def stop(self, cluster: Cluster) -> None:
        """Stop the task once it waits at the file; the kernel lets it go after 45 s."""
        if self.stopped or fcntl.fcntl(self.descriptor, fcntl.F_GETLEASE) == fcntl.F_WRLCK:
            return
        for pid, variables in cluster.processes():
            if _job(variables) == self.job and _is_command(pid):
                os.kill(pid, signal.SIGSTOP)
                self.stopped = True


def _job(variables: Mapping[str, str]) -> str:
    """Name the task that a process belongs to."""
    if array := variables.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{variables['SLURM_ARRAY_TASK_ID']}"
    return variables.get("SLURM_JOB_ID", "")


def _is_command(pid: int) -> bool:
    """Tell ``python -m portrait_dist`` from the supervisor, ``-m portrait_dist.slurm``."""
    try:
        return "portrait_dist" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False


@dataclass(frozen=True)
class Steps:
    """A run, photos, and what is done with them."""

    folder: Path
    shards: Path

    @property
    def run(self) -> Path:
        """The run that is scored and reported."""
        return self.folder / "runs" / "run"

    @property
    def masks(self) -> Path:
        """Where ``predict`` writes."""
        return self.folder / "masks"

    @property
    def photos(self) -> list[Path]:
        """What is predicted; of the sorted ones each part takes every second."""
        return sorted((self.folder / "photos").iterdir())

    @property
    def outputs(self) -> list[Path]:
        """What ``evaluate`` and ``report`` write."""
        return [self.run / "scores-test.json", self.run / "report.html"]

    @property
    def predict(self) -> list[str | Path]:
        """The arguments of ``predict``, but for its output."""
        network, photos = self.folder / "copy.pth", self.folder / "photos"
        return ["--checkpoint", network, photos, "--only", "mask", "--batch-size", "1"]

    @property
    def evaluate(self) -> list[str | Path]:
        """The arguments of ``evaluate``."""
        return ["--checkpoint", self.run / "copy.pth", "--data", self.shards]

    def prepare(self, raw_tree: Path) -> None:
        """Train a network; give every step a file of it that no other step opens."""
        done = train_into(self.run.parent, self.shards, "train.max_epochs=1")
        assert done.exit_code == 0, done.stderr
        for copy in (self.folder, self.run):
            shutil.copy(self.run / "ckpt_best.pth", copy / "copy.pth")
        (self.folder / "photos").mkdir()
        for image in sorted(raw_tree.rglob("*.jpg"))[:PHOTOS]:
            shutil.copy(image, self.folder / "photos")

    def submit(self) -> list[int]:
        """Queue all steps on hold; the numbers of predict, predict --finish, evaluate, report."""
        hold, parts = "--sbatch=--hold", ("--parts", str(PARTS))
        queued = call(
            "submit", "predict", hold, *parts, *self.predict, "--out", self.masks, "--json"
        ).json["steps"]
        queued += call("submit", "evaluate", hold, *self.evaluate, "--json").json["steps"]
        line = StepJob("report", Request(extra=("--hold",)), ["report", str(self.run)])
        report = submit_steps([line], self.run.parent, [self.run]).steps[0]
        assert report.job_id is not None
        return [*(step["job_id"] for step in queued), report.job_id]

    def done_photos(self, journals: str = ".*.jsonl") -> list[str]:
        """Names of the photos in the journals, once for each time that they were done."""
        lines = [
            line for path in self.masks.glob(journals) for line in path.read_text().splitlines()
        ]
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return sorted(entry["name"] for entry in entries if "done" in entry)

    def attempts(self, job: str) -> list[int]:
        """The attempts of a task at each of its starts and ends."""
        beside = self.masks if "_" in job else self.run
        return [event.attempt for event in read_events(beside.parent / "slurm" / job)]

    def files(self) -> list[Path]:
        """All masks, and what evaluate and report wrote."""
        return [*sorted(self.masks.glob("*.png")), *self.outputs]


def stop_half_way(cluster: Cluster, steps: Steps, barriers: list[Barrier]) -> bool:
    """Stop each task that has begun and is at its barrier; say whether all are stopped."""
    for number, barrier in enumerate(barriers):
        if number >= PARTS or steps.done_photos(f".predict-{number}-of-*"):
            barrier.stop(cluster)
    return all(barrier.stopped for barrier in barriers)


def lose_all_nodes(cluster: Cluster) -> None:
    """Cut the power of every node, let SLURM know, and start them again."""
    for node in NODES:
        cluster.lose_node(node)
    cluster.command("scontrol", "update", f"NodeName={','.join(NODES)}", "State=DOWN", "Reason=cut")
    for node in NODES:
        cluster.start_node(node)


def wait_for_attempt(cluster: Cluster, jobs: list[str], restarts: int) -> None:
    """Wait until SLURM has started every task again, and it is over."""

    def started_again() -> bool:
        return all(cluster.job(job)["Restarts"] == str(restarts) for job in jobs)

    cluster.until(started_again, 120, f"all tasks come back: {restarts}")
    for job in jobs:
        assert cluster.wait(job)["JobState"] == "COMPLETED", job


def identities(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    """Say which file each is, and when it was written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def assert_as_undisturbed(steps: Steps) -> None:
    """Compare what the jobs wrote with what this process writes; but for the report's minute."""
    whole, scores, report = (steps.folder / name for name in ("whole", "scores", "report.html"))
    assert call("predict", *steps.predict, "--out", whole).exit_code == 0
    assert call("evaluate", *steps.evaluate, "--out", scores).exit_code == 0
    assert call("report", steps.run, "--out", report).exit_code == 0
    masks = {path.name: path.read_bytes() for path in steps.masks.glob("*.png")}
    assert masks == {path.name: path.read_bytes() for path in whole.iterdir()}
    minute = r"[0-9-]{10} [0-9:]{5} UTC"
    for path, other in zip(steps.outputs, (scores, report), strict=True):
        assert re.sub(minute, "", path.read_text()) == re.sub(minute, "", other.read_text())


def test_masks_scores_and_report_come_back_after_a_lost_node_and_nothing_is_done_twice(
    cluster: Cluster,
    tiny_shards: Path,
    raw_tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    steps = Steps(tmp_path, tiny_shards)
    steps.prepare(raw_tree)
    array, finish, score, report = steps.submit()
    jobs = [f"{array}_{part}" for part in range(PARTS)] + [str(score), str(report)]
    places = [*steps.photos[-PARTS:], steps.run / "copy.pth", steps.run / "ckpt_best.pth"]
    barriers = [Barrier(*pair) for pair in zip(places, jobs, strict=True)]
    with contextlib.ExitStack() as stack:
        for barrier in barriers:
            stack.enter_context(barrier.up())
        cluster.command("scontrol", "release", f"{array},{finish},{score},{report}")
        cluster.until(lambda: stop_half_way(cluster, steps, barriers), 120, "all are half-way")
        done = identities([steps.masks / f"{name}.mask.png" for name in steps.done_photos()])
        lose_all_nodes(cluster)
    assert not any(path.exists() for path in steps.outputs)
    wait_for_attempt(cluster, jobs, 1)
    assert [steps.attempts(job) for job in jobs] == [[1, 2, 2]] * len(jobs)
    assert cluster.wait(finish)["JobState"] == "COMPLETED", "no photo is missing"
    once = [photo.stem for photo in steps.photos]
    assert PARTS <= len(done) < PHOTOS
    assert identities(list(done)) == done, "what was done before is not done again"
    assert steps.done_photos() == once
    assert_as_undisturbed(steps)

    finished = identities(steps.files())
    assert len(finished) == PHOTOS + 2
    cluster.command("scontrol", "requeue", ",".join(jobs))
    wait_for_attempt(cluster, jobs, 2)
    assert identities(steps.files()) == finished, "a finished step that comes back does nothing"
    assert steps.done_photos() == once
    assert [step.tasks for step in steps_of(steps.run)] == [{"finished": 1}] * 2
