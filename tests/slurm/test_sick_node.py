"""A sick node is named before anything is trained on it, and the requeued job leaves it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from portrait_dist.slurm import node_check
from portrait_dist.slurm.node_check import check_node, parse_reports
from tests.jobs import checkpoint
from tests.slurm.cluster import LAUNCH, Cluster

HEALTHY = "echo '0, 12, 81559, 0'; echo '1, 12, 81559, [N/A]'"
KEYS = (
    "model.init_features=2",
    "train.max_epochs=1",
    "train.batch_size=8",
    "train.threads=1",
    "train.average_best=false",
    "train.pictures=0",
)


def put_driver(folder: Path, *lines: str) -> str:
    """Write a driver's nvidia-smi that prints what is given, and return the PATH with it."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.slurm
@pytest.mark.timeout(400)
def test_a_job_on_a_sick_node_is_requeued_without_it_and_trains(
    cluster: Cluster, tiny_shards: Path, tmp_path: Path
) -> None:
    """The driver of whichever node comes first has lost a GPU."""
    sick = tmp_path / "sick"
    path = put_driver(
        tmp_path / "bin",
        f'[ -e {sick} ] || echo "$SLURMD_NODENAME" > {sick}',
        f'if [ "$SLURMD_NODENAME" = "$(cat {sick})" ]; then',
        '    echo "Unable to determine the device handle for GPU0000:01:00.0: GPU is lost"',
        "    exit 15",
        "fi",
        HEALTHY,
    )
    options = ["--nodes=1", "--gpus-per-node=2", f"--output={tmp_path}/log"]
    keys = (f"data.shards={tiny_shards}", f"run.root={tmp_path}/runs", "run.name=run", *KEYS)
    job = cluster.sbatch(
        *options, str(LAUNCH / "slurm.sbatch"), *keys, cwd=tmp_path, PATH=path, NPROC_PER_NODE="1"
    )
    ended = cluster.wait(job, 300)
    log = (tmp_path / "log").read_text()
    node = sick.read_text().strip()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log[-4000:]
    assert ended["ExcNodeList"] == node
    assert f"sick node {node}: nvidia-smi fails (Unable to determine the device handle" in log
    assert f"{node} excluded from now on" in log
    records = (tmp_path / "runs" / "slurm" / str(job) / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["sick_nodes"] for line in records] == [[node], []]
    assert checkpoint(tmp_path / "runs" / "run")["epoch"] == 1


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for logs, on a node of a job with two GPUs whose driver is fine."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "CUDA"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("PATH", put_driver(tmp_path / "bin", HEALTHY))
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def problems(logs: Path, capsys: pytest.CaptureFixture[str], device: str = "auto") -> list[str]:
    """Return what the check of this node finds."""
    assert check_node(str(logs), device) == 0
    report = parse_reports("srun: a line of its own\n" + capsys.readouterr().out)["n7"]
    assert list(logs.iterdir()) == [], "nothing is left behind"
    return list(report.problems)


def test_a_healthy_node_has_no_problem(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(node, capsys) == []


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("echo '0, 12, 81559, 0'", "SLURM gave 2 GPU(s), the driver shows 1"),
        (f"{HEALTHY}; exit 9", "nvidia-smi fails"),
        ("echo '0, 60000, 81559, 0'; echo '1, 1, 81559, 0'", "60,000 of 81,559 MiB of GPU 0"),
        ("echo '0, 1, 81559, 0'; echo '1, 1, 81559, 3'", "GPU 1 had 3 uncorrected memory errors"),
        ("echo '0'; echo rubbish", ""),
    ],
)
def test_what_is_wrong_with_a_gpu_is_found_unless_the_job_trains_on_cpus(
    node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, problem: str
) -> None:
    put_driver(tmp_path / "bin", output)
    found = problems(node, capsys)
    assert problem in "; ".join(found)
    assert bool(found) == bool(problem)
    assert problems(node, capsys, device="cpu") == []


def test_a_clock_that_is_wrong_and_a_folder_that_is_missing_are_found(
    node: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    assert "clock is 3,600 s off" in problems(node, capsys)[0]
    monkeypatch.setattr(time, "time", now)
    assert check_node(str(node / "none"), "cpu") == 0
    assert "the run's folder is not usable" in capsys.readouterr().out


def test_a_driver_that_hangs_and_a_full_scratch_disk_are_found(
    node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_driver(tmp_path / "bin", "exec tail -f /dev/null")
    monkeypatch.setattr(node_check, "SECONDS_FOR_A_DRIVER", 0.5)
    monkeypatch.setattr(node_check, "LEAST_SCRATCH", 1 << 60)
    scratch, driver = problems(node, capsys)
    assert "has only" in scratch
    assert "MB free" in scratch
    assert driver.startswith("the NVIDIA driver does not answer")
