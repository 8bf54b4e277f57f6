"""When a job comes back, when it gives up, and what it asks SLURM and torchrun for."""

from __future__ import annotations

from pathlib import Path

import pytest

from portrait_dist.config import RunConfig, load
from portrait_dist.errors import InputError
from portrait_dist.slurm.job import (
    Allocation,
    Turn,
    _went_on,
    decide,
    note_turn,
    srun_command,
    sweep,
    task_words,
    torchrun_options,
)

JOB = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_JOB_NODELIST": "n[0-3]",
    "SLURM_CPUS_ON_NODE": "64",
}


def _turn(
    exit_code: int = 1,
    signal_name: str = "",
    kind: str = "",
    message: str = "",
    cancelled: bool = False,
) -> Turn:
    return Turn(
        exit_code,
        signal_name,
        {"kind": kind, "message": message} if kind else None,
        cancelled,
        progressed=True,
    )


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (_turn(75, "SIGUSR2", "stop", "stopped by SIGUSR2"), "stopped by SIGUSR2"),
        (_turn(75, "", "stop", "stopped by SIGTERM at epoch 3"), "stopped by SIGTERM at epoch 3"),
        (_turn(140, "SIGUSR2"), "stopped by SIGUSR2"),  # before the ranks were ready to save
        (_turn(137), "failed with exit code 137"),
        (
            _turn(1, "", "error", "rank 3: OSError: gone"),
            "failed with exit code 1 (rank 3: OSError: gone)",
        ),
    ],
)
def test_a_stopped_or_failed_turn_is_followed_by_another(turn: Turn, reason: str) -> None:
    assert decide(turn, restarts=0, turns_without_progress=0, run=RunConfig()) == (True, reason)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (_turn(0), "finished"),
        (_turn(75, "SIGTERM", "stop", cancelled=True), "cancelled"),
        (_turn(2), "another turn would fail in the same way"),
        (_turn(3), "another turn would fail in the same way"),
        (
            _turn(1, "", "error", "rank 0: DamagedSampleError: x"),
            "another turn would fail in the same way",
        ),
    ],
)
def test_a_finished_cancelled_or_hopeless_job_does_not_come_back(turn: Turn, reason: str) -> None:
    again, said = decide(turn, restarts=0, turns_without_progress=0, run=RunConfig())
    assert not again
    assert reason in said


def test_failed_jobs_stay_away_where_a_key_says_so() -> None:
    run = RunConfig(requeue_on_failure=False)
    assert decide(_turn(1), 0, 0, run) == (
        False,
        "failed with exit code 1, and run.requeue_on_failure=false",
    )
    assert decide(_turn(75, "SIGUSR2", "stop"), 0, 0, run)[0]


def test_a_turn_that_is_stopped_before_its_first_step_has_not_gone_on() -> None:
    start, stop = {"kind": "start", "step": 40}, {"kind": "stop", "step": 40}
    assert not _went_on([start, stop])
    assert _went_on([start, stop | {"step": 41}])
    assert _went_on([start, {"kind": "epoch", "step": 50}])


def test_requeues_are_limited_by_a_key() -> None:
    stopped, run = _turn(75, "SIGUSR2", "stop"), RunConfig(max_requeues=3)
    assert decide(stopped, 2, 0, run)[0]
    again, reason = decide(stopped, 3, 0, run)
    assert not again
    assert reason == "stopped by SIGUSR2, and it was requeued 3 times (run.max_requeues=3)"
    assert not decide(stopped, 0, 0, RunConfig(max_requeues=0))[0]


def test_a_job_that_saves_nothing_new_twice_gives_up_with_the_reason(tmp_path: Path) -> None:
    idle = Turn(
        1, "", {"kind": "error", "message": "rank 1: ValueError: x"}, False, progressed=False
    )
    counts = [
        note_turn(tmp_path / "turns.jsonl", Allocation.from_environment(JOB), turn)
        for turn in (_turn(), idle, idle)
    ]
    assert counts == [0, 1, 2]
    assert decide(idle, 1, 1, RunConfig())[0]
    again, reason = decide(idle, 2, 2, RunConfig())
    assert not again
    assert "rank 1: ValueError: x" in reason
    assert "2 turns in a row saved nothing new" in reason
    assert note_turn(tmp_path / "turns.jsonl", Allocation.from_environment(JOB), _turn()) == 0


def test_jobs_on_one_node_have_different_ports_below_those_of_linux() -> None:
    ports = [
        Allocation.from_environment(JOB | {"SLURM_JOB_ID": str(job)}).port
        for job in range(1000, 3000)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) > 1024
    assert max(ports) < 32768


def test_ranks_follow_the_gpus_or_the_variable() -> None:
    assert Allocation.from_environment(JOB).ranks_per_node == 1
    assert Allocation.from_environment(JOB | {"SLURM_GPUS_ON_NODE": "8"}).ranks_per_node == 8
    assert (
        Allocation.from_environment(
            JOB | {"SLURM_GPUS_ON_NODE": "8", "NPROC_PER_NODE": "4"}
        ).ranks_per_node
        == 4
    )
    with pytest.raises(InputError, match="NPROC_PER_NODE=all: write the number"):
        Allocation.from_environment(JOB | {"NPROC_PER_NODE": "all"})


def test_each_node_gets_one_task_and_the_first_hosts_the_rendezvous() -> None:
    allocation = Allocation.from_environment(JOB | {"SLURM_RESTART_COUNT": "2"})
    command = srun_command(allocation, "10.0.0.1", Path("logs"), ["train.lr=1"])
    assert {"--ntasks=4", "--nodes=4", "--ntasks-per-node=1", "--kill-on-bad-exit=0"} < set(command)
    assert command[-1] == "train.lr=1"
    for node, host in ((0, 1), (3, 0)):
        words = torchrun_options(allocation, node, "10.0.0.1")
        options = dict(zip(words[::2], words[1::2], strict=True))
        assert options["--nnodes"] == 4
        assert options["--rdzv-endpoint"] == f"10.0.0.1:{allocation.port}"
        assert options["--rdzv-conf"] == f"is_host={host}"
        assert options["--rdzv-id"] == "123-turn3"
        assert "SIGUSR2" in str(options["--signals-to-handle"]).split(",")


def test_a_sweep_trains_every_combination_in_a_run_of_its_own() -> None:
    assert sweep([]) == [[]]
    words = [
        "--sweep",
        "train.lr=1e-3,3e-4",
        "--recipe",
        "quickstart",
        "--sweep=train.seed=1,2",
        "run.name=try",
    ]
    tasks = [task_words(words, task) for task in range(4)]
    loaded = [load("quickstart", [word for word in task if "=" in word]) for task in tasks]
    assert [(one.train.lr, one.train.seed) for one in loaded] == [
        (1e-3, 1),
        (1e-3, 2),
        (3e-4, 1),
        (3e-4, 2),
    ]
    assert len({one.run_dir for one in loaded}) == 4
    assert loaded[0].run.name == "try-train.lr=1e-3,train.seed=1"
    for wrong in (None, 4):
        with pytest.raises(InputError, match="sbatch --array=0-3"):
            task_words(words, wrong)
    with pytest.raises(InputError, match="write key=value,value"):
        sweep(["train.lr"])


def test_tasks_of_an_array_have_labels_and_ports_of_their_own() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "120"}
    tasks = [
        Allocation.from_environment(
            JOB | array | {"SLURM_JOB_ID": f"{120 + i}", "SLURM_ARRAY_TASK_ID": f"{i}"}
        )
        for i in (0, 1)
    ]
    assert [task.label for task in tasks] == ["120_0", "120_1"]
    assert tasks[0].port != tasks[1].port
