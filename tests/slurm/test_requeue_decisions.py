"""When a job is requeued, when it gives up, and what it asks of SLURM and torchrun."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from portrait_dist.config import RunConfig, load
from portrait_dist.errors import InputError
from portrait_dist.runs.folder import Event, Events, RunFolder
from portrait_dist.slurm.allocation import Allocation
from portrait_dist.slurm.container import Container
from portrait_dist.slurm.job import (
    Attempt,
    SignalRelay,
    decide,
    first_failed_node,
    made_progress,
    nodes_to_exclude,
    read_attempts,
    record_attempt,
    srun_command,
    supervise,
)
from portrait_dist.slurm.node import launch_config
from portrait_dist.slurm.node_check import NodeReport
from portrait_dist.slurm.sweep import combinations, split_arguments, task_arguments
from tests.slurm.cluster import Cluster

JOB = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_JOB_NODELIST": "n[0-3]",
    "SLURM_CPUS_ON_NODE": "64",
}


def ended(
    exit_code: int = 1,
    signal_name: str = "",
    last: Event | None = None,
    cancelled: bool = False,
    progressed: bool = True,
) -> Attempt:
    """Return an attempt that ended so."""
    return Attempt(exit_code, signal_name, last, cancelled, progressed)


def error(message: str, exit_code: int | None = None, requeue: bool | None = None) -> Event:
    """Return a line of an error."""
    return Event(kind="error", time=0, message=message, exit_code=exit_code, requeue=requeue)


def stop(message: str = "stopped by SIGUSR2") -> Event:
    """Return a line of a stop."""
    return Event(kind="stop", time=0, message=message)


GONE = "failed with exit code 1 (rank 3: OSError: gone)"


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (ended(75, "SIGUSR2", stop()), "stopped by SIGUSR2"),
        (ended(75, "", stop("stopped by SIGTERM at epoch 3")), "stopped by SIGTERM at epoch 3"),
        (ended(140, "SIGUSR2"), "stopped by SIGUSR2"),  # before the ranks were ready to save
        (ended(137), "failed with exit code 137"),
        (ended(1, "", error("rank 3: OSError: gone")), GONE),
        (ended(1, "", error("rank 3: OSError: gone", exit_code=1)), GONE),
        (ended(1, "", error("rank 3: OSError: gone", exit_code=1, requeue=True)), GONE),
    ],
)
def test_a_stopped_or_failed_attempt_is_followed_by_another(attempt: Attempt, message: str) -> None:
    decision = decide(attempt, restarts=0, attempts_without_progress=0, run=RunConfig())
    assert (decision.requeue, decision.message) == (True, message)


SAME = "another attempt would fail in the same way"


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (ended(0), "finished"),
        (ended(75, "SIGTERM", stop(), cancelled=True), "cancelled"),
        (ended(2), SAME),
        (ended(3), SAME),
        (ended(1, "", error("rank 0: whatever it says", exit_code=2)), SAME),
        (ended(1, "", error("rank 0: whatever it says", exit_code=3)), SAME),
        (ended(1, "", error("the loss is not finite", exit_code=1, requeue=False)), SAME),
        (ended(1, "", error("rank 0: DamagedSampleError: x")), SAME),  # a line without a number
        (ended(1, "", error("rank 0: InputError: x")), SAME),
    ],
)
def test_a_finished_cancelled_or_refused_job_is_not_requeued(
    attempt: Attempt, message: str
) -> None:
    decision = decide(attempt, restarts=0, attempts_without_progress=0, run=RunConfig())
    assert not decision.requeue
    assert message in decision.message


def test_the_exit_code_comes_from_the_number_and_not_from_the_message() -> None:
    misleading = ended(1, "", error("rank 0: InputError: server away", exit_code=1))
    assert decide(misleading, 0, 0, RunConfig()).requeue


def test_failed_jobs_are_not_requeued_where_a_key_says_so() -> None:
    run = RunConfig(requeue_on_failure=False)
    failed = decide(ended(1), 0, 0, run)
    assert not failed.requeue
    assert failed.message == "failed with exit code 1, and run.requeue_on_failure=false"
    assert decide(ended(75, "SIGUSR2", stop()), 0, 0, run).requeue


def test_an_attempt_that_is_stopped_before_its_first_step_has_made_no_progress() -> None:
    start = Event(kind="start", time=0, epoch=1, step=20, batch=40)
    at = {step: Event(kind="stop", time=0, step=step // 2, batch=step) for step in (40, 41)}
    epoch = Event(kind="epoch", time=0, epoch=1, step=25)
    assert not made_progress(Events((start, at[40])))
    assert made_progress(Events((start, at[41])))
    assert made_progress(Events((start, epoch)))
    assert made_progress(Events((start, stop())))


def test_requeues_are_limited_by_a_key() -> None:
    stopped, run = ended(75, "SIGUSR2", stop()), RunConfig(max_requeues=3)
    assert decide(stopped, 2, 0, run).requeue
    last = decide(stopped, 3, 0, run)
    assert not last.requeue
    assert last.message == "stopped by SIGUSR2, and it was requeued 3 times (run.max_requeues=3)"
    assert not decide(stopped, 0, 0, RunConfig(max_requeues=0)).requeue


def test_a_job_that_saves_nothing_new_twice_gives_up_with_the_reason(tmp_path: Path) -> None:
    path, allocation = tmp_path / "attempts.jsonl", Allocation.from_environment(JOB)
    idle = ended(1, "", error("rank 1: ValueError: x"), progressed=False)
    assert [record_attempt(path, allocation, one) for one in (ended(), idle, idle)] == [0, 1, 2]
    assert decide(idle, 1, 1, RunConfig()).requeue
    decision = decide(idle, 2, 2, RunConfig())
    assert not decision.requeue
    assert "rank 1: ValueError: x" in decision.message
    assert "2 attempts in a row saved nothing new" in decision.message
    assert record_attempt(path, allocation, ended()) == 0


def test_a_node_is_excluded_when_it_is_sick_or_when_two_attempts_failed_there(
    tmp_path: Path,
) -> None:
    path, allocation = tmp_path / "attempts.jsonl", Allocation.from_environment(JOB)

    def after(attempt: Attempt) -> list[str]:
        record_attempt(path, allocation, attempt)
        return nodes_to_exclude(path)

    failed = {node: replace(ended(1), failed_node=node) for node in ("n1", "n2")}
    assert after(failed["n1"]) == []
    assert after(failed["n2"]) == []
    assert after(failed["n1"]) == ["n1"]
    sick = replace(ended(1, progressed=False), sick=(NodeReport("n3", ("no driver",)),))
    assert after(sick) == ["n3", "n1"]
    assert record_attempt(path, allocation, sick) == 0, "a job that leaves a sick node continues"
    decision = decide(sick, 4, 0, RunConfig())
    assert (decision.requeue, decision.message) == (True, "node n3: no driver")


def test_the_node_that_failed_is_the_one_that_hangs_else_the_first_to_fail(tmp_path: Path) -> None:
    path, allocation = tmp_path / "failures.jsonl", Allocation.from_environment(JOB)
    records = [(1, "n2", 30), (1, "n1", 20), (2, "n0", 10)]
    path.write_text(
        "".join(
            json.dumps({"attempt": attempt, "node": node, "time": moment}) + "\n"
            for attempt, node, moment in records
        )
        + "rubbish\n[]\n"
    )
    hang = Event(kind="error", time=0, message="rank 5 hangs", host="n3")
    assert first_failed_node(path, allocation, Events()) == "n1"
    assert first_failed_node(path, allocation, Events((hang,))) == "n3"
    assert first_failed_node(tmp_path / "none", allocation, Events()) == ""


def test_an_attempts_lines_are_its_own_whatever_the_clocks_of_the_nodes_say(
    tmp_path: Path,
) -> None:
    """The batch script runs on another node than the rank that writes."""
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"kind": "error", "time": 4e9, "message": "of the attempt before"}\n')
    line = '{"kind": "stop", "time": 5, "message": "of this one"}'
    code = f"open({str(run.metrics)!r}, 'a').write({line!r} + chr(10)); raise SystemExit(75)"
    before = {number: signal.getsignal(number) for number in SignalRelay.SIGNALS}
    try:
        relay, allocation = SignalRelay(), Allocation.from_environment(JOB)
        attempt = supervise([sys.executable, "-c", code], run, allocation, relay, tmp_path)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert attempt.exit_code == 75
    assert attempt.last is not None
    assert attempt.last.message == "of this one"


def test_a_damaged_line_of_the_attempts_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    path.write_bytes(b'{"attempt": 1}\n\xff\n[]\n')
    assert record_attempt(path, Allocation.from_environment(JOB), ended()) == 0
    assert len(read_attempts(path)) == 1


def test_jobs_on_one_node_have_different_ports_below_those_of_linux() -> None:
    ports = [
        Allocation.from_environment(JOB | {"SLURM_JOB_ID": str(job)}).port
        for job in range(1000, 3000)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) > 1024
    assert max(ports) < 32768


def test_ranks_follow_the_gpus_or_the_variable() -> None:
    gpus = {"SLURM_GPUS_ON_NODE": "8"}
    assert Allocation.from_environment(JOB).ranks_per_node == 1
    assert Allocation.from_environment(JOB | gpus).ranks_per_node == 8
    assert Allocation.from_environment(JOB | gpus | {"NPROC_PER_NODE": "4"}).ranks_per_node == 4


@pytest.mark.parametrize(
    "name",
    [
        "SLURM_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
        "SLURM_JOB_NUM_NODES",
        "SLURM_GPUS_ON_NODE",
        "SLURM_CPUS_PER_TASK",
        "SLURM_CPUS_ON_NODE",
        "NPROC_PER_NODE",
    ],
)
@pytest.mark.parametrize("text", ["all", "-1", "1.5", "²", "٣", "9" * 5000])
def test_a_variable_that_is_no_number_is_one_line_and_exit_code_2(name: str, text: str) -> None:
    with pytest.raises(InputError, match=f"{name}=.{{1,40}}: write a whole number"):
        Allocation.from_environment(JOB | {name: text})


def test_the_inside_of_a_job_reports_a_wrong_variable_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "portrait_dist.slurm", "job", "data.shards=none"]
    done = subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "two"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "SLURM_GPUS_ON_NODE=two: write a whole number" in done.stderr


def test_each_node_gets_one_task_and_the_first_hosts_the_rendezvous() -> None:
    allocation = Allocation.from_environment(JOB | {"SLURM_RESTART_COUNT": "2"})
    command = srun_command(allocation, "10.0.0.1", Path("logs"), ["train.lr=1"])
    assert {"--ntasks=4", "--nodes=4", "--ntasks-per-node=1", "--kill-on-bad-exit=0"} < set(command)
    assert command[-1] == "train.lr=1"
    inside = srun_command(
        allocation, "10.0.0.1", Path("logs"), ["train.lr=1"], Container("site/image", ("/shared",))
    )
    at = command.index(sys.executable)
    assert inside[:at] == command[:at], "srun's own options stay"
    assert inside[inside.index("python") + 1 :] == command[at + 1 :], "in the image's Python"
    assert "--container-image=site/image" in inside[at:]
    for node, host in ((0, True), (3, False)):
        launch = launch_config(allocation, node, "10.0.0.1")
        assert (launch.min_nodes, launch.max_nodes, launch.max_restarts) == (4, 4, 0)
        assert launch.rdzv_endpoint == f"10.0.0.1:{allocation.port}"
        assert launch.rdzv_configs["is_host"] is host
        assert launch.run_id == "123-attempt3"
        assert "SIGUSR2" in launch.signals_to_handle.split(",")


def test_only_the_first_usr2_reaches_srun_also_when_it_comes_before_srun(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Child(subprocess.Popen):
        sent: list[int]

        def __init__(self) -> None:
            self.sent = []
            super().__init__(["true"])

        def send_signal(self, sig: int) -> None:
            self.sent.append(sig)

    before = {number: signal.getsignal(number) for number in SignalRelay.SIGNALS}
    try:
        early, child = SignalRelay(), Child()
        signal.raise_signal(signal.SIGUSR2)
        assert child.sent == []
        early.attach(child)
        assert child.sent == [signal.SIGUSR2], "what came before srun is passed on"
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGTERM)
        assert child.sent == [signal.SIGUSR2]
        assert early.received == ["SIGUSR2", "SIGUSR2", "SIGTERM"]
        preempted, other = SignalRelay(), Child()
        preempted.attach(other)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR2)
        assert other.sent == [], "the ranks have SLURM's TERM already"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        child.wait()
        other.wait()
    assert "SLURM sent SIGTERM: saving" in capfd.readouterr().out


def test_a_sweep_trains_every_combination_in_a_run_of_its_own() -> None:
    assert combinations([]) == [[]]
    arguments = [
        "--sweep",
        "train.lr=1e-3,3e-4",
        "--recipe",
        "quickstart",
        "--sweep=train.seed=1,2",
        "run.name=try",
    ]
    tasks = [split_arguments(task_arguments(arguments, task)) for task in range(4)]
    assert {recipe for recipe, _ in tasks} == {"quickstart"}
    loaded = [load(recipe, overrides) for recipe, overrides in tasks]
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
            task_arguments(arguments, wrong)
    with pytest.raises(InputError, match="write key=value,value"):
        combinations(["train.lr"])


@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_the_task_that_has_the_arrays_own_number_requeues_itself_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    """SLURM's commands take a bare number for all tasks of the array."""
    command = f"{sys.executable} -m tests.array_job {tmp_path}"
    options = ("--array=0-1", "--ntasks=1", f"--output={tmp_path}/%a.log", "--requeue")
    array = cluster.sbatch(*options, "--wrap", command, cwd=Path(__file__).parents[2])
    ended = [cluster.wait(f"{array}_{task}") for task in (0, 1)]
    logs = [(tmp_path / f"{task}.log").read_text() for task in (0, 1)]
    assert [one["JobState"] for one in ended] == ["COMPLETED", "COMPLETED"], logs
    starts = sorted(path.name for path in tmp_path.glob("?-?"))
    alone = next(path for path in tmp_path.glob("?-1"))
    assert starts == sorted(["0-0", "1-0", alone.name]), logs
    before = tmp_path / alone.name.replace("-1", "-0")
    assert alone.read_text() != before.read_text(), "its first node is excluded"
    excluded = [one["ExcNodeList"] for one in ended if one["ArrayTaskId"] != alone.name[0]]
    assert excluded == ["(null)"], "of the other task nothing is changed"


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
