"""Packing, predicting and the whole way as jobs of a real two-node SLURM."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.data.shards.writer import pack
from portrait_dist.runs.steps import TaskState, read_events, steps_of
from portrait_dist.slurm.step_job import MOST_FAILURES, MOST_REQUEUES, Ended, decide
from tests.cli import assert_one_line, call
from tests.slurm.cluster import Cluster
from tests.trees import write_tree

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def run(cluster: Cluster, *arguments: str | Path, exit_code: int = 0, **variables: str) -> Any:
    """Run ``portrait-dist ARGUMENTS --json`` where SLURM's commands are; its JSON object."""
    command = [sys.executable, "-m", "portrait_dist", *map(str, arguments), "--json"]
    done = subprocess.run(
        command,
        env=cluster.environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == exit_code, done.stderr
    return json.loads(done.stdout)


def finished(cluster: Cluster, submitted: dict[str, Any]) -> dict[str, str]:
    """Wait for the last of the steps; what SLURM says of it."""
    return cluster.wait(submitted["steps"][-1]["job_id"], 240)


def steps(cluster: Cluster, folder: Path) -> dict[str, dict[str, Any]]:
    """What ``status`` says, the newest submission of each step."""
    return {step["name"]: step for step in run(cluster, "status", folder)["steps"]}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 train, 2 val and 2 test pairs of 24×16: 8 shards of two."""
    keys = {"train": [f"p-{i:02d}" for i in range(12)], "val": ["q-0", "q-1"], "test": ["r", "s"]}
    return write_tree(tmp_path_factory.mktemp("tree") / "data", keys)


@pytest.mark.parametrize(
    ("ended", "restarts", "failures", "state"),
    [
        (Ended(0), 3, 1, TaskState.FINISHED),
        (Ended(2, "wrong"), 0, 1, TaskState.FAILED),
        (Ended(3, "damaged"), 0, 1, TaskState.FAILED),
        (Ended(143, "", "SIGTERM", cancelled=True), 0, 1, TaskState.CANCELLED),
        (Ended(143, "", "SIGUSR2"), 7, 5, TaskState.REQUEUED),
        (Ended(75), 0, 5, TaskState.REQUEUED),
        (Ended(143, "", "SIGTERM"), MOST_REQUEUES, 1, TaskState.FAILED),
        (Ended(137), 0, MOST_FAILURES - 1, TaskState.REQUEUED),
        (Ended(1, "disk full"), 0, MOST_FAILURES, TaskState.FAILED),
    ],
)
def test_a_task_comes_back_after_a_signal_and_not_after_wrong_input(
    ended: Ended, restarts: int, failures: int, state: TaskState
) -> None:
    assert decide(ended, restarts, failures)[0] == state


def test_what_would_fail_later_is_refused_before_anything_is_queued(
    tree: Path, tmp_path: Path
) -> None:
    given = ("--data", tree, "--out", tmp_path / "out")
    pack_step = ("submit", "pack", "--dry-run", *given)
    assert_one_line(call(*pack_step, "--part", "0/2"), 2, "--part: the jobs give it themselves")
    assert_one_line(call(*pack_step, "--sizes", "16"), 2, "portrait-dist pack", "--sizes")
    assert_one_line(call(*pack_step, "--quality", "101"), 2, "--quality")
    assert_one_line(call(*pack_step, "--append"), 2, "--append: one process appends")
    pack(tree, tmp_path / "out", size=(16, 16), samples_per_shard=2)
    assert_one_line(call(*pack_step, "--size", "24"), 2, "was packed with --size 16x16, not 24x24")
    line = call(*pack_step, "--size", "16", "--samples-per-shard", "2", "--parts", "99").stdout
    assert "--array=0-7 " in line, "no more tasks than shards"
    whole = ("submit", "pipeline", "--dry-run", "--data", tree, f"run.root={tmp_path}/runs")
    assert_one_line(call(*whole), 2, "data.shards")
    assert_one_line(call(*whole, f"data.shards={tmp_path}/s", "train.lrr=1"), 2, "train.lr")
    assert_one_line(
        call(*whole, f"data.shards={tmp_path}/s", "--nodes", "9", "train.batch_size=2"),
        2,
        "12 training samples do not fill one batch of 18",
    )
    assert_one_line(
        call("submit", "evaluate", "--checkpoint", tmp_path / "no.pth", "--data", tree), 2, "no.pth"
    )
    masks = ("submit", "predict", "--dry-run", "--checkpoint", tmp_path / "no.pth")
    to_file = (*masks, "photo.jpg", "--out")
    assert_one_line(call(*to_file, "-"), 2, "--out -: jobs write files")
    assert_one_line(call(*to_file, "m", "--min-confidence", "1"), 2, "it goes with --out-shards")
    assert_one_line(call(*to_file, "m", "--from-shards", "s"), 2, "Give PATHs or --from-shards")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_pipeline_is_shown_by_its_run_which_knows_how_far_the_training_is(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count(1)

    def queued(command: object, folder: Path) -> int:
        folder.mkdir(exist_ok=True)
        return next(numbers)

    monkeypatch.setattr("portrait_dist.slurm.steps.queue", queued)
    line = ("submit", "pipeline", "--data", tree, f"data.shards={tmp_path}/shards")
    done = call(*line, f"run.root={tmp_path}", "run.name=first", "train.batch_size=4")
    assert done.exit_code == 0, done.stderr
    assert len(steps_of(tmp_path / "first")) == 5
    assert steps_of(tmp_path / "shards") == []


def submit_pack(cluster: Cluster, tree: Path, out: Path, *options: str) -> Any:
    arguments = ("--data", tree, "--out", out, "--size", "16", "--samples-per-shard", "2")
    return run(cluster, "submit", "pack", "--parts", "3", *options, *arguments, "--workers", "1")


def freeze(cluster: Cluster, job: int, task: str) -> str:
    """Stop the packing of an array's task while it starts; its node."""
    found: list[tuple[int, str]] = []

    def starting() -> bool:
        for pid, variables in cluster.processes():
            same = variables.get("SLURM_ARRAY_JOB_ID") == str(job)
            line = _arguments(pid)
            packs = {"portrait_dist", "pack"} <= set(line)  # the supervisor is portrait_dist.slurm
            if same and packs and variables.get("SLURM_ARRAY_TASK_ID") == task:
                found.append((pid, variables["SLURMD_NODENAME"]))
        return bool(found)

    cluster.until(starting, 60, f"task {task} packs")
    os.kill(found[0][0], signal.SIGSTOP)
    return found[0][1]


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def test_an_array_packs_the_bytes_of_one_process_also_when_a_node_is_lost(
    cluster: Cluster, tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    submitted = submit_pack(cluster, tree, out)
    job = submitted["steps"][0]["job_id"]
    cluster.lose_node(node := freeze(cluster, job, "0"))
    attempts = tmp_path / "slurm" / f"{job}_0"
    cluster.until(
        lambda: cluster.job(f"{job}_0")["Restarts"] == "1", 120, "SLURM requeued the lost task"
    )
    cluster.start_node(node)
    assert finished(cluster, submitted)["JobState"] == "COMPLETED"
    assert [event.attempt for event in read_events(attempts)] == [1, 2, 2]
    pack(tree, tmp_path / "whole", size=(16, 16), samples_per_shard=2)
    assert hashes(out) == hashes(tmp_path / "whole")
    shown = steps(cluster, out)
    assert shown["pack"]["tasks"] == {"finished": 3}
    assert shown["pack"]["attempts"] == 2
    assert shown["pack --finish"]["tasks"] == {"finished": 1}


def test_the_finishing_job_refuses_while_a_part_is_missing_and_names_it(
    cluster: Cluster, tree: Path, tmp_path: Path
) -> None:
    data = write_tree(tmp_path / "data", {"train": [f"p-{i}" for i in range(12)]})
    bad = data / "train" / "p-3.png"  # in shard 1, which is part 1's
    content = bad.read_bytes()
    bad.write_bytes(content[:-30])
    out = tmp_path / "shards"
    end = finished(cluster, submit_pack(cluster, data, out))
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "2:0")
    shown = steps(cluster, out)
    assert shown["pack"]["tasks"] == {"finished": 2, "failed": 1}
    assert str(bad) in shown["pack"]["message"]
    assert "train-00001.tar (part 1/3)" in shown["pack --finish"]["message"]
    assert not (out / "manifest.json").exists()
    bad.write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert finished(cluster, submit_pack(cluster, data, out))["JobState"] == "COMPLETED"
    assert (out / "manifest.json").exists()
    after = {path: path.stat().st_mtime_ns for path in before}
    assert (len(before), after) == (4, before), "what was packed is not packed again"


KEYS: tuple[str, ...] = (
    "model.init_features=2",
    "model.norm=group",
    "train.max_epochs=2",
    "train.batch_size=4",
)
KEYS += ("train.threads=1", "train.average_best=false", "train.pictures=0", "run.name=first")


def test_one_command_goes_from_a_folder_to_a_report_and_the_masks_of_an_array_are_one_processs(
    cluster: Cluster, raw_tree: Path, tmp_path: Path
) -> None:
    arguments: list[str | Path] = ["submit", "pipeline", "--data", raw_tree, "--parts", "2"]
    arguments += ["--size", "32", f"data.shards={tmp_path}/shards", f"run.root={tmp_path}/runs"]
    arguments += KEYS
    planned = run(cluster, *arguments, "--dry-run")
    assert not (tmp_path / "runs").exists()
    names = ["pack", "pack --finish", "train", "evaluate", "report"]
    assert [step["name"] for step in planned["steps"]] == names
    waits = [step["command"].partition("--dependency=")[2].split()[:1] for step in planned["steps"]]
    assert waits == [[], ["afterany:JOB"], ["afterok:JOB"], ["afterok:JOB"], ["afterok:JOB"]]
    submitted = run(cluster, *arguments, NPROC_PER_NODE="2")
    folder = tmp_path / "runs" / "first"
    end = finished(cluster, submitted)
    assert end["JobState"] == "COMPLETED", run(cluster, "status", folder)
    shown = steps(cluster, folder)
    assert list(shown) == names
    assert all(set(step["tasks"]) == {"finished"} for step in shown.values())
    scores = json.loads((folder / "scores-test.json").read_text())
    assert (scores["samples"], scores["world_size"]) == (7, 2)
    assert (folder / "report.html").is_file()

    photos = tmp_path / "photos"
    photos.mkdir()
    for image in sorted(raw_tree.rglob("*.jpg"))[:5]:
        (photos / image.name).hardlink_to(image)
    wanted: list[str | Path] = [
        "--checkpoint",
        folder / "ckpt_best.pth",
        photos,
        "--only",
        "mask",
        "--out",
    ]
    submitted = run(cluster, "submit", "predict", "--parts", "2", *wanted, tmp_path / "masks")
    run(cluster, "predict", *wanted, tmp_path / "whole")
    assert finished(cluster, submitted)["JobState"] == "COMPLETED"
    masks = {name: value for name, value in hashes(tmp_path / "masks").items() if name[0] != "."}
    assert len(masks) == 5
    assert masks == hashes(tmp_path / "whole")
    assert steps(cluster, tmp_path / "masks")["predict"]["tasks"] == {TaskState.FINISHED: 2}
    (tmp_path / "masks" / min(masks)).unlink()
    error = run(cluster, "predict", *wanted, tmp_path / "masks", "--finish", exit_code=2)["error"]
    assert "1 of 5 photos are not done" in error
    assert "(part 0/2)" in error
