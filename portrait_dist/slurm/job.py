"""A training job on SLURM: starts torchrun on every node, saves before the time limit, requeues itself, knows when to give up.

``launch/slurm.sbatch`` ends in ``python -m portrait_dist.slurm job WORDS…`` (:func:`run_job`, on the first node). That starts
with ``srun``, once per node, ``python -m portrait_dist.slurm node …`` (:func:`run_node`), which is torchrun and starts the ranks
with ``portrait-dist train WORDS…``. Counts, ports and addresses come from SLURM's variables (:class:`Allocation`).

When SLURM tells the job that its time is nearly over (USR2) or that it is preempted (TERM), the ranks save at a step boundary
and end; ``run_job`` then asks for ``scontrol requeue``, and the next turn resumes. Signals go this way: SLURM → run_job → srun
→ torchrun → ranks. :func:`decide` says what follows from the end of a turn.

``check_launch`` is for the ranks: it rejects launches that would train something else.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from portrait_dist import config
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError, Stopped
from portrait_dist.runs.folder import RunFolder

FIRST_PORT, PORTS = 12000, 20000  # below the ports that Linux hands out by itself (32768 and up)
SECONDS_AFTER_FIRST_EXIT = 30  # a node whose ranks are gone ends the others after so long
SECONDS_TO_SAVE = 100  # between the signal and the kill; SLURM gives 120 by launch/slurm.sbatch
TURNS_WITHOUT_PROGRESS = 2
HOPELESS = re.compile(
    r"rank \d+: (InputError|Damaged\w+Error):"
)  # metrics.jsonl's words for exit codes 2 and 3


@dataclass(frozen=True)
class Allocation:
    """What SLURM gave this job.

    ``label`` names the job in file names: ``123``, or ``120_3`` for task 3 of the array job 120. ``gpus`` and ``cpus`` are one
    node's.
    """

    job: int
    label: str
    restarts: int
    nodes: int
    node_list: str
    gpus: int
    cpus: int
    ranks_per_node: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Allocation:
        """Read SLURM's variables; ``NPROC_PER_NODE`` overrides one rank per GPU (one per node without GPUs).

        Raises:
            InputError: not inside a SLURM job, or NPROC_PER_NODE is not a number.
        """
        if "SLURM_JOB_ID" not in environment:
            raise InputError(
                "SLURM_JOB_ID is not set: this is the inside of a SLURM job; queue it with 'portrait-dist submit'"
            )
        task = environment.get("SLURM_ARRAY_TASK_ID", "")
        gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
        ranks = environment.get("NPROC_PER_NODE") or str(max(gpus, 1))
        if not ranks.isdigit() or int(ranks) < 1:
            raise InputError(
                f"NPROC_PER_NODE={ranks}: write the number of ranks on each node, or leave it out"
            )
        return cls(
            job=int(environment["SLURM_JOB_ID"]),
            label=f"{environment.get('SLURM_ARRAY_JOB_ID')}_{task}"
            if task
            else environment["SLURM_JOB_ID"],
            restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            nodes=int(environment.get("SLURM_JOB_NUM_NODES") or 1),
            node_list=environment.get("SLURM_JOB_NODELIST", ""),
            gpus=gpus,
            cpus=int(
                environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or 1
            ),
            ranks_per_node=int(ranks),
        )

    @property
    def turn(self) -> str:
        """``turn1`` for the first start of the job, ``turn2`` after its first requeue, …"""
        return f"turn{self.restarts + 1}"

    @property
    def port(self) -> int:
        """Port of the rendezvous on the first node: another one for every job, so that jobs on one node do not clash."""
        return FIRST_PORT + self.job % PORTS

    def describe(self) -> str:
        """One line for the job's log."""
        ranks = f"{self.nodes * self.ranks_per_node} rank(s), {self.ranks_per_node} per node"
        hardware = f"{self.gpus} GPU(s) and {self.cpus} CPU(s) per node"
        return f"SLURM job {self.label}, turn {self.restarts + 1}: {self.nodes} node(s) {self.node_list}, {ranks}, {hardware}"


def first_address(allocation: Allocation) -> str:
    """Address of the allocation's first node as SLURM knows it (its NodeAddr); ``MASTER_ADDR`` overrides it.

    A node's name need not resolve; its NodeAddr is what slurmctld itself uses.
    """
    if override := os.environ.get("MASTER_ADDR"):
        return override
    first = _output("scontrol", "show", "hostnames", allocation.node_list).split()[0]
    found = re.search(r"NodeAddr=(\S+)", _output("scontrol", "show", "node", first, "--oneliner"))
    return found.group(1) if found else first


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def srun_command(
    allocation: Allocation, address: str, logs: Path, words: Sequence[str]
) -> list[str]:
    """srun, one task per node, each of which is torchrun.

    ``--kill-on-bad-exit=0 --wait``: a task that ends does not take along another that still saves, but none outlives it for
    long.
    """
    options = ["--ntasks-per-node=1", f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}"]
    options += ["--kill-on-bad-exit=0", f"--wait={SECONDS_AFTER_FIRST_EXIT}"]
    if os.environ.get("SLURM_CPUS_PER_TASK"):  # srun takes it from the job only when told
        options.append(f"--cpus-per-task={allocation.cpus}")
    return [
        "srun",
        *options,
        sys.executable,
        "-m",
        "portrait_dist.slurm",
        "node",
        address,
        str(logs),
        *words,
    ]


def torchrun_options(allocation: Allocation, node: int, address: str) -> list[object]:
    """torchrun's options for one node: c10d rendezvous on the first node.

    Args:
        node: this node's number in the step; node 0 hosts the rendezvous.
        address: the first node's.
    """
    options = {
        "--nnodes": allocation.nodes,
        "--nproc-per-node": allocation.ranks_per_node,
        "--max-restarts": os.environ.get("MAX_RESTARTS", "0"),
        "--rdzv-backend": "c10d",
        "--rdzv-id": f"{allocation.job}-{allocation.turn}",
        "--rdzv-endpoint": f"{address}:{allocation.port}",
        "--rdzv-conf": f"is_host={int(node == 0)}",
        "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
        "--log-line-prefix-template": "[rank ${rank}] ",
    }
    return [word for pair in options.items() for word in pair]


def run_node(arguments: Sequence[str]) -> int:
    """One task per node: torchrun. ``arguments``: address of the first node, folder for logs, words for ``train``."""
    address, logs, *words = arguments
    allocation = Allocation.from_environment(os.environ)
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, allocation.cpus // allocation.ranks_per_node))
    )
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    from portrait_dist.slurm.node import run_torchrun

    options = torchrun_options(allocation, int(os.environ.get("SLURM_NODEID", "0")), address)
    return run_torchrun(options, Path(logs), allocation.turn, words)


def sweep(choices: Sequence[str]) -> list[list[str]]:
    """The tasks of an array job, each as ``key=value`` words: the product of ``["train.lr=1e-3,3e-4", "train.seed=1,2"]``.

    Raises:
        InputError: a choice without a key or values.
    """
    columns = []
    for choice in choices:
        key, equals, values = choice.partition("=")
        if not equals or not all(values.split(",")):
            raise InputError(
                f"--array '{choice}': write key=value,value, for example train.lr=1e-3,3e-4"
            )
        columns.append([f"{key}={value}" for value in values.split(",")])
    return [list(row) for row in itertools.product(*columns)]


def task_words(words: Sequence[str], task: int | None) -> list[str]:
    """Take ``--sweep CHOICE`` out of a job's words and put in what task number ``task`` of the array trains.

    Each task gets a run of its own: ``run.name`` with the task's values behind it.

    Raises:
        InputError: --sweep outside an array job, or more array tasks than combinations.
    """
    rest, choices, remaining = [], [], iter(words)
    for word in remaining:
        if word == "--sweep":
            choices.append(next(remaining, ""))
        elif word.startswith("--sweep="):
            choices.append(word.removeprefix("--sweep="))
        else:
            rest.append(word)
    if not choices:
        return rest
    rows = sweep(choices)
    if task is None or not 0 <= task < len(rows):
        raise InputError(
            f"--sweep has {len(rows)} combinations: queue it as an array job, sbatch --array=0-{len(rows) - 1} …"
        )
    recipe, overrides = split_words(rest)
    return [*rest, *rows[task], f"run.name={task_name(config.load(recipe, overrides), rows[task])}"]


def task_name(settings: config.Config, row: Sequence[str]) -> str:
    """Name of the run of one task of a sweep: ``first-train.lr=1e-3``."""
    return f"{settings.run_dir.name}-{','.join(row).replace('/', '_')}"


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """(recipe, ``key=value`` words) of what follows ``portrait-dist train``; the recipe defaults to that command's."""
    recipe, overrides, remaining = "aisegment_unet", [], iter(words)
    for word in remaining:
        if word == "--recipe":
            recipe = next(remaining, "")
        elif word.startswith("--recipe="):
            recipe = word.removeprefix("--recipe=")
        elif not word.startswith("-"):
            overrides.append(word)
    return recipe, overrides


@dataclass(frozen=True)
class Turn:
    """How one turn of a job ended.

    Args:
        exit_code: srun's.
        signal_name: the signal that SLURM sent to the batch script, or an empty string.
        last: the last line of metrics.jsonl that this turn wrote, or None.
        cancelled: somebody cancelled the job.
        progressed: a checkpoint further on than this turn's start was saved.
    """

    exit_code: int
    signal_name: str
    last: Mapping[str, object] | None
    cancelled: bool
    progressed: bool


def decide(
    turn: Turn, restarts: int, turns_without_progress: int, run: config.RunConfig
) -> tuple[bool, str]:
    """Requeue after this turn? And why, or why not.

    Args:
        restarts: how often the job was requeued before (SLURM_RESTART_COUNT).
        turns_without_progress: consecutive turns up to this one that saved nothing new.
        run: limits of the requeues.
    """
    kind = str((turn.last or {}).get("kind", ""))
    message = str((turn.last or {}).get("message", ""))
    if turn.exit_code == 0:
        return False, "finished"
    if turn.cancelled:
        return False, "cancelled; the same sbatch line goes on from the last checkpoint"
    if kind == "stop" or turn.signal_name:
        reason = f"stopped by {turn.signal_name}" if turn.signal_name else message or "stopped"
    else:
        reason = f"failed with exit code {turn.exit_code}" + (
            f" ({message})" if kind == "error" else ""
        )
        if turn.exit_code in (InputError.exit_code, DamagedDataError.exit_code) or (
            kind == "error" and HOPELESS.match(message)
        ):
            return False, f"{reason}; another turn would fail in the same way"
        if not run.requeue_on_failure:
            return False, f"{reason}, and run.requeue_on_failure=false"
    if restarts >= run.max_requeues:
        return (
            False,
            f"{reason}, and it was requeued {restarts} times (run.max_requeues={run.max_requeues})",
        )
    if turns_without_progress >= TURNS_WITHOUT_PROGRESS:
        return (
            False,
            f"{reason}, and {turns_without_progress} turns in a row saved nothing new: more of them would not help",
        )
    return True, reason


def run_job(arguments: Sequence[str]) -> int:
    """The batch script's work: start the ranks, hand on signals, decide about the next turn.

    Args:
        arguments: words for ``portrait-dist train``, and ``--sweep`` in an array job.

    Returns:
        0 trained to the end, 75 requeued or may be queued again, else the ranks' failure.
    """
    allocation = Allocation.from_environment(os.environ)
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    words = task_words(arguments, int(task) if task else None)
    settings = config.load(*split_words(words))
    logs = Path(settings.run.root) / "slurm" / allocation.label
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{logs}: cannot make the folder for logs ({error.strerror}); choose another run.root"
        ) from error
    say(
        f"{allocation.describe()}; rendezvous port {allocation.port}; run {settings.run_dir}; logs {logs}"
    )
    turn = _take_turn(
        srun_command(allocation, first_address(allocation), logs, words),
        settings.run_dir,
        allocation,
    )
    idle_turns = note_turn(logs / "turns.jsonl", allocation, turn)
    again, reason = decide(turn, allocation.restarts, idle_turns, settings.run)
    if not again:
        say(reason if turn.exit_code == 0 else f"not requeued: {reason}")
        if turn.exit_code:
            _tell_status(settings.run_dir, f"not requeued: {reason}")
        return turn.exit_code
    say(f"{reason}; requeue {allocation.restarts + 1} of at most {settings.run.max_requeues}")
    return _requeue(allocation)


def say(message: str) -> None:
    """One dated line in the job's log."""
    print(
        f"{time.strftime('%Y-%m-%d %H:%M:%S')} portrait-dist: {' '.join(message.split())}",
        flush=True,
    )


def _take_turn(command: list[str], run_dir: Path, allocation: Allocation) -> Turn:
    folder = RunFolder(run_dir)
    begin, newest = time.time(), folder.checkpoint_time()
    received: list[str] = []
    steps: list[subprocess.Popen[bytes]] = []

    def note(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        say(f"SLURM sent {name}: saving")
        # TERM reaches the ranks from SLURM itself; a second signal would end torchrun before the ranks have saved.
        if number == signal.SIGUSR2 and not received:
            for step in steps:
                step.send_signal(signal.SIGUSR2)
        received.append(name)

    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, note)
    steps.append(subprocess.Popen(command))
    exit_code = steps[0].wait()
    events = [dataclasses.asdict(event) for event in folder.events() if event.time >= begin]
    return Turn(
        exit_code=exit_code if exit_code >= 0 else 128 - exit_code,
        signal_name=received[0] if received else "",
        last=events[-1] if events else None,
        cancelled="SIGTERM" in received and _job_state(allocation).startswith("CANCELLED"),
        progressed=folder.checkpoint_time() != newest and _went_on(events),
    )


def _went_on(events: Sequence[Mapping[str, object]]) -> bool:
    """Is what a turn saved further on than where it started? Only a stop saves without having trained a step."""
    start = next((event for event in reversed(events) if event.get("kind") == "start"), None)
    stop = events[-1] if events and events[-1].get("kind") == "stop" else None
    if start is None or stop is None or start.get("step") is None or stop.get("step") is None:
        return True
    return float(str(stop["step"])) > float(str(start["step"]))


def _job_state(allocation: Allocation) -> str:
    found = subprocess.run(
        ["scontrol", "show", "job", str(allocation.job)],
        capture_output=True,
        text=True,
        check=False,
    )
    state = re.search(r"JobState=(\S+)", found.stdout)
    return state.group(1) if state else ""


def note_turn(path: Path, allocation: Allocation, turn: Turn) -> int:
    """Add a line about this turn to the job's ``turns.jsonl``; returns how many turns in a row saved nothing new.

    A requeue keeps the job's number, so that the file holds all turns of one submission.
    """
    line = {
        "time": time.time(),
        "turn": allocation.restarts + 1,
        "exit_code": turn.exit_code,
        "signal": turn.signal_name,
    }
    line["progressed"] = turn.progressed
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    turns = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return sum(1 for _ in itertools.takewhile(lambda one: not one["progressed"], reversed(turns)))


def _tell_status(run_dir: Path, message: str) -> None:
    """The reason, where ``portrait-dist status`` finds it: all ranks are gone, so nobody else writes."""
    if run_dir.is_dir():
        RunFolder(run_dir).append("error", message=message)


def _requeue(allocation: Allocation) -> int:
    asked = subprocess.run(
        ["scontrol", "requeue", str(allocation.job)], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        state = _job_state(allocation)
        done = state in (
            "PENDING",
            "REQUEUED",
            "COMPLETING",
            "NODE_FAIL",
        )  # SLURM was faster: a lost node, or preemption
        say(
            f"SLURM requeues it ({state})"
            if done
            else f"scontrol requeue failed ({asked.stderr}); queue the same line again"
        )
    return Stopped.exit_code


def check_launch(environment: Mapping[str, str] | None = None) -> None:
    """Refuse launches under SLURM that train something else than asked for. Silent outside SLURM steps.

    Args:
        environment: variables of this process; ``os.environ`` when None.

    Raises:
        InputError: tasks without torchrun, several tasks per node, or a world size that is not the allocation's.
    """
    environment = os.environ if environment is None else environment
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    remedy = "use 'sbatch launch/slurm.sbatch …' or 'portrait-dist submit', which start one torchrun per node"
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        if tasks > 1:
            raise InputError(
                f"srun started {tasks} tasks without torchrun: each would train alone into the same run; {remedy}"
            )
        return
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if tasks > nodes:
        raise InputError(
            f"srun started {tasks} tasks on {nodes} node(s), each with a torchrun: one task per node, not per GPU, "
            f"torchrun starts the ranks; set --ntasks-per-node=1, or {remedy}"
        )
    _check_world_size(environment, nodes)


def _check_world_size(environment: Mapping[str, str], nodes: int) -> None:
    world, here = int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    joined = int(environment.get("GROUP_WORLD_SIZE", "1"))
    if joined != nodes:
        raise InputError(
            f"torchrun joined {joined} node(s) of the {nodes} that SLURM gave (world size {world}): "
            "set torchrun's --nnodes to $SLURM_JOB_NUM_NODES and one --rdzv-endpoint for all nodes"
        )
    gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if gpus and here != gpus:
        raise InputError(
            f"torchrun started {here} rank(s) on a node where SLURM gave {gpus} GPU(s) (world size {world}): "
            f"set --nproc-per-node {gpus}, or ask for {here} with --gpus-per-node={here}"
        )


def main(arguments: Sequence[str]) -> int:
    """``job WORDS…`` or ``node ADDRESS LOGS WORDS…``; returns the exit code."""
    try:
        return (run_node if arguments[0] == "node" else run_job)(arguments[1:])
    except PortraitDistError as error:
        print(f"portrait-dist: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_code
