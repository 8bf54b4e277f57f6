"""Launches that would train something else than asked for end at once, with one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from portrait_dist.errors import InputError
from portrait_dist.slurm.launch_checks import check_launch
from tests.slurm.cluster import LAUNCH, Cluster

TRAIN = f"{sys.executable} -m portrait_dist train data.shards=none"
TORCHRUN = (
    f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 1 "
    "-m portrait_dist train data.shards=none"
)


def _script(folder: Path, *steps: str) -> str:
    path = folder / "job.sh"
    path.write_text("#!/bin/bash\n" + "".join(f"{step}\necho exit=$?\n" for step in steps))
    return str(path)


@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_srun_without_torchrun_tasks_per_gpu_and_split_worlds_are_refused(
    cluster: Cluster, tmp_path: Path
) -> None:
    steps = [
        f"srun --ntasks=2 --ntasks-per-node=1 {TRAIN}",
        f"srun --nodes=1 --ntasks=2 --ntasks-per-node=2 {TORCHRUN}",
        f"srun --ntasks=2 --ntasks-per-node=1 {TORCHRUN}",
    ]
    script = _script(tmp_path, *steps)
    job = cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=2", "--output", f"{tmp_path}/log", script, cwd=tmp_path
    )
    assert cluster.wait(job, 200)["JobState"] == "COMPLETED"
    first, second, third, _ = (tmp_path / "log").read_text().split("exit=")
    assert (
        "srun started 2 tasks without torchrun: each would train alone into the same run" in first
    )
    assert (
        "srun started 2 tasks on 1 node(s), each with a torchrun: one task per node, not per GPU"
        in second
    )
    assert "torchrun joined 1 node(s) of the 2 that SLURM gave (world size 1)" in third
    assert second.startswith("2\n")
    assert not second.count("Traceback (most recent call last)") > 2, (
        "torchrun's own at most, none of ours"
    )


@pytest.mark.slurm
def test_a_job_with_a_wrong_key_ends_at_once_and_is_not_requeued(
    cluster: Cluster, tmp_path: Path
) -> None:
    options = ["--nodes=2", f"--output={tmp_path}/log", str(LAUNCH / "slurm.sbatch")]
    job = cluster.wait(cluster.sbatch(*options, "train.lrr=1", cwd=tmp_path))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert (tmp_path / "log").read_text().count(
        "there is no key 'train.lrr'. Did you mean 'train.lr'?"
    ) == 1


@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_a_job_whose_ranks_find_wrong_input_ends_with_their_line_and_is_not_requeued(
    cluster: Cluster, tmp_path: Path
) -> None:
    options = ["--gpus-per-node=2", f"--output={tmp_path}/log", str(LAUNCH / "slurm.sbatch")]
    keys = ("data.shards=none", "train.device=cpu")  # the GPUs of this cluster are not there
    job = cluster.wait(cluster.sbatch(*options, *keys, cwd=tmp_path), 200)
    log = (tmp_path / "log").read_text()
    assert "1 node(s) n0, 2 rank(s), 2 per node, 2 GPU(s)" in log
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), log
    assert "none: there is no such folder; give one that 'portrait-dist pack' wrote" in log
    assert "not requeued: failed with exit code" in log
    assert "another attempt would fail in the same way" in log
    assert "Traceback" not in log


@pytest.mark.slurm
def test_what_sbatch_refuses_is_reported_in_one_line(
    cluster: Cluster, tiny_shards: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "portrait_dist", "submit", "--partition", "moon"]
    command += [f"data.shards={tiny_shards}", f"run.root={tmp_path}"]
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "invalid partition specified: moon" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert cluster.command("squeue", "-h") == ""


STEP = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
RANK = {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (STEP, "without torchrun"),
        (STEP | RANK | {"SLURM_STEP_NUM_TASKS": "16"}, "one task per node, not per GPU"),
        (
            STEP | RANK | {"GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "8"},
            "joined 1 node\\(s\\) of the 2",
        ),
        (
            STEP | RANK | {"SLURM_GPUS_ON_NODE": "4"},
            "started 8 rank\\(s\\) on a node where SLURM gave 4 GPU",
        ),
        (
            STEP | RANK | {"SLURM_GPUS_ON_NODE": "8", "NPROC_PER_NODE": "4"},
            "started 8 rank\\(s\\) on a node where NPROC_PER_NODE=4",
        ),
        (STEP | RANK | {"SLURM_STEP_NUM_NODES": "some"}, "SLURM_STEP_NUM_NODES=some: write a"),
    ],
)
def test_a_launch_that_does_not_match_the_allocation_is_refused(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_launch(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        RANK,
        {
            "SLURM_JOB_ID": "1",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "4",
        },  # a shell of salloc, or a batch script
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty
        STEP | RANK,
        STEP | RANK | {"SLURM_GPUS_ON_NODE": "8"},
        STEP | RANK | {"SLURM_GPUS_ON_NODE": "16", "NPROC_PER_NODE": "8"},
    ],
)
def test_launches_that_fit_are_let_through(environment: dict[str, str]) -> None:
    check_launch(environment)


SHARED = """
import sys, torch
from pathlib import Path
from portrait_dist import distributed, errors
distributed.start(torch.device("cpu"), 60)
here, answers = Path(sys.argv[1]), []
for folder in (here / "shared", here / f"of-rank{distributed.rank()}"):
    try:
        distributed.check_shared_folder(folder, seconds=0.5)
        answers.append("seen")
    except errors.InputError as error:
        answers.append(str(error))
(here / f"rank{distributed.rank()}").write_text("\\n".join(answers))
distributed.stop()
"""


def test_a_run_folder_that_another_node_does_not_see_is_named_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(SHARED)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    subprocess.run([*launch, str(tmp_path / "ask.py"), str(tmp_path)], check=True, timeout=200)
    for rank in (0, 1):
        shared, own = (tmp_path / f"rank{rank}").read_text().splitlines()
        assert shared == "seen"
        assert own.startswith(f"{tmp_path}/of-rank{rank}: rank 0 on ")
        assert own.endswith("does not see it; set run.root to a folder that all nodes share")
    assert list((tmp_path / "shared").iterdir()) == [], "nothing is left behind"
    assert list((tmp_path / "of-rank0").iterdir()) == []


def test_the_batch_script_outside_slurm_says_so(tmp_path: Path) -> None:
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "data.shards=none"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "SLURM_JOB_ID is not set" in done.stderr
    assert json.dumps(done.stdout) == '""'
