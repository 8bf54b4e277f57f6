"""The supervisor of a training job on SLURM: starts the ranks, relays signals, requeues, gives up.

``launch/slurm.sbatch`` ends in ``python -m portrait_dist.slurm job ARGUMENTS…`` (:func:`run_job`,
on the first node). That starts one torchrun per node with srun (:mod:`portrait_dist.slurm.node`).

When SLURM tells the job that its time is nearly over (USR2) or that it is preempted (TERM), the
ranks save at a step boundary and end; then the job asks for ``scontrol requeue``, and the next
attempt resumes. Signals take the way SLURM → job → srun → torchrun →
ranks. :func:`decide` says what follows from the end of an attempt.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import FrameType

from portrait_dist import config, files
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError, Stopped
from portrait_dist.runs.folder import Event, Events, RunFolder
from portrait_dist.slurm import container as containers
from portrait_dist.slurm.allocation import Allocation, first_address, job_state, scontrol
from portrait_dist.slurm.node_check import NodeReport, check_nodes, exclude, plan_exclusion
from portrait_dist.slurm.sweep import split_arguments, task_arguments

SECONDS_AFTER_FIRST_EXIT = 30
"""A node whose ranks are gone ends the others after so long."""
ATTEMPTS_WITHOUT_PROGRESS = 2
ATTEMPTS = "attempts.jsonl"
FAILURES_OF_A_NODE = 2
"""A node on which so many attempts failed first is excluded."""
MOST_EXCLUDED = 16
"""Nodes that one job excludes at most: more of them are no fault of nodes."""
MOST_BYTES = 64 << 20
FAILURES = "failures.jsonl"
"""On which node a rank failed, and when; each node of the job writes there."""
REQUEUED_BY_SLURM = ("PENDING", "REQUEUED", "COMPLETING", "NODE_FAIL")
"""States in which SLURM requeues a job itself: after a lost node, or preemption."""


class StopReason(Enum):
    """Why an attempt ended."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    STOPPED = "stopped by a signal after saving"
    REFUSED = "wrong input or damaged data, or an error that says that another attempt cannot help"
    FAILED = "any other failure"


@dataclass(frozen=True)
class Attempt:
    """How one attempt of a job ended.

    Args:
        exit_code: srun's.
        signal_name: the signal that SLURM sent to the batch script, or an empty string.
        last: the last line of metrics.jsonl that this attempt wrote, or None.
        cancelled: somebody cancelled the job.
        progressed: a checkpoint further on than this attempt's start was saved.
        failed_node: the node on which a rank failed first, or an empty string.
        sick: nodes that the check before the training found sick.
    """

    exit_code: int
    signal_name: str
    last: Event | None
    cancelled: bool
    progressed: bool
    failed_node: str = ""
    sick: tuple[NodeReport, ...] = ()

    @property
    def error(self) -> Event | None:
        """The line of the error that ended it."""
        return self.last if self.last and self.last.kind == "error" else None

    @property
    def reason(self) -> StopReason:
        """Why it ended."""
        if self.exit_code == 0:
            return StopReason.FINISHED
        if self.cancelled:
            return StopReason.CANCELLED
        # Before the exit codes: torchrun ends with another code where the nodes stop a moment
        # apart.
        if self.signal_name or (self.last and self.last.kind == "stop"):
            return StopReason.STOPPED
        # Both: srun gives the highest code of any node, and torchrun 1 for most failures.
        codes = {self.exit_code, exit_code_of(self.error)}
        refused = codes & {InputError.exit_code, DamagedDataError.exit_code}
        if refused or (self.error and self.error.requeue is False):
            return StopReason.REFUSED
        return StopReason.FAILED

    def describe(self) -> str:
        """Return why it ended, as it stands in the job's log."""
        message = (self.last.message if self.last else None) or ""
        match self.reason:
            case StopReason.FINISHED | StopReason.CANCELLED:
                return self.reason.value
            case StopReason.STOPPED:
                return (
                    f"stopped by {self.signal_name}" if self.signal_name else message or "stopped"
                )
        if self.sick:
            return "; ".join(report.describe() for report in self.sick)
        details = f" ({message})" if self.error and message else ""
        return f"failed with exit code {self.exit_code}{details}"


def exit_code_of(error: Event | None) -> int:
    """Return the exit code of the process that wrote an error, 1 where that is not known."""
    if error is None:
        return 1
    if error.exit_code is not None:
        return error.exit_code
    # Before 0.2 lines had no number: the class of the error stands behind the rank.
    name = (error.message or "").partition(": ")[2].partition(":")[0]
    if name.startswith("Damaged"):
        return DamagedDataError.exit_code
    return InputError.exit_code if name == "InputError" else 1


@dataclass(frozen=True)
class Decision:
    """What follows from the end of an attempt: ``requeue`` or not, and why."""

    requeue: bool
    message: str


def decide(
    attempt: Attempt, restarts: int, attempts_without_progress: int, run: config.RunConfig
) -> Decision:
    """Decide whether a job is requeued.

    Args:
        attempt: how the last one ended.
        restarts: how often the job was requeued before (SLURM_RESTART_COUNT).
        attempts_without_progress: consecutive attempts up to this one that saved nothing new.
        run: limits of the requeues.
    """
    message = attempt.describe()
    match attempt.reason:
        case StopReason.FINISHED:
            return Decision(False, message)
        case StopReason.CANCELLED:
            return Decision(
                False, f"{message}; the same sbatch line resumes from the last checkpoint"
            )
        case StopReason.REFUSED:
            return Decision(False, f"{message}; another attempt would fail in the same way")
        case StopReason.FAILED if not run.requeue_on_failure:
            return Decision(False, f"{message}, and run.requeue_on_failure=false")
    if restarts >= run.max_requeues:
        limit = f"run.max_requeues={run.max_requeues}"
        return Decision(False, f"{message}, and it was requeued {restarts} times ({limit})")
    if attempts_without_progress >= ATTEMPTS_WITHOUT_PROGRESS:
        return Decision(
            False,
            f"{message}, and {attempts_without_progress} attempts in a row saved nothing new: "
            "more of them would not help",
        )
    return Decision(True, message)


def run_job(arguments: Sequence[str], container: containers.Container | None = None) -> int:
    """Do the batch script's work: start the ranks, relay signals, decide about the next attempt.

    Args:
        arguments: those of ``portrait-dist train``, and ``--sweep`` in an array job.
        container: in which the ranks run.

    Returns:
        0 trained to the end, 75 requeued or may be queued again, else the ranks' failure.
    """
    allocation = Allocation.from_environment()
    arguments = task_arguments(arguments, allocation.array_task)
    settings = config.load(*split_arguments(arguments))
    logs = Path(settings.run.root) / "slurm" / allocation.label
    with files.explained(logs):
        logs.mkdir(parents=True, exist_ok=True)
    log(
        f"{allocation.describe()}; rendezvous port {allocation.port}; run {settings.run_dir}; "
        f"logs {logs}"
    )
    ranks = ["train", *arguments]
    command = srun_command(allocation, first_address(allocation), logs, ranks, container)
    # Before the check of the nodes: a signal during it must not be lost.
    folder, relay = RunFolder(settings.run_dir), SignalRelay()
    sick: Sequence[NodeReport] = ()
    if settings.run.check_nodes:
        sick = check_nodes(allocation, logs, settings.train.device, container)
    if sick or relay.received:
        attempt = attempt_without_training(sick, relay, allocation)
    else:
        attempt = supervise(command, folder, allocation, relay, logs)
    return act_on(attempt, allocation, settings, logs)


def act_on(attempt: Attempt, allocation: Allocation, settings: config.Config, logs: Path) -> int:
    """Write down how an attempt ended, requeue the job or report why not; return the exit code."""
    idle = record_attempt(logs / ATTEMPTS, allocation, attempt)
    decision = decide(attempt, allocation.restarts, idle, settings.run)
    if decision.requeue:
        number = f"requeue {allocation.restarts + 1} of at most {settings.run.max_requeues}"
        log(f"{decision.message}; {number}")
        return requeue(allocation, nodes_to_exclude(logs / ATTEMPTS))
    if attempt.exit_code == 0:
        log(decision.message)
        return 0
    log(f"not requeued: {decision.message}")
    if attempt.last or attempt.reason != StopReason.REFUSED:  # a refused command changes no run
        folder = RunFolder(settings.run_dir)
        report_to_status(folder, f"not requeued: {decision.message}", attempt.exit_code)
    return attempt.exit_code


def log(message: str) -> None:
    """Print one dated line into the job's log, also from a handler of signals."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S")
    line = f"{moment} portrait-dist: {' '.join(message.split())}\n"
    # print may not be interrupted by another print.
    os.write(1, line.encode(errors="backslashreplace"))


def srun_command(
    allocation: Allocation,
    address: str,
    logs: Path,
    arguments: Sequence[str],
    container: containers.Container | None = None,
) -> list[str]:
    """Return the srun command that starts one task per node, each of which is torchrun.

    ``--kill-on-bad-exit=0 --wait``: a task that ends does not take along another that still saves,
    but none outlives it for long.
    """
    options = ["--ntasks-per-node=1", f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}"]
    options += ["--kill-on-bad-exit=0", f"--wait={SECONDS_AFTER_FIRST_EXIT}"]
    if os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not take it from the job by itself
        options.append(f"--cpus-per-task={allocation.cpus}")
    python = containers.python(container, allocation.gpus)
    node = ["-m", "portrait_dist.slurm", "node", address, str(logs)]
    return ["srun", *options, *python, *node, *arguments]


class SignalRelay:
    """Notes the signals that SLURM sends to the batch script, and passes USR2 on to srun.

    TERM reaches the ranks from SLURM itself, and of several USR2 only the first is passed on: a
    second signal would end torchrun before the ranks have saved.
    """

    SIGNALS = (signal.SIGUSR2, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: list[str] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._passed_on = False
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def attach(self, child: subprocess.Popen[bytes]) -> None:
        """Name the process that gets USR2; one that came before is passed on now."""
        self._child = child
        self._pass_on()

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.received.append(name)
        log(f"SLURM sent {name}: saving")
        self._pass_on()

    def _pass_on(self) -> None:
        first_is_usr2 = self.received[:1] == ["SIGUSR2"]
        if self._child and first_is_usr2 and not self._passed_on:
            # Before sending: a second signal may interrupt this handler.
            self._passed_on = True
            self._child.send_signal(signal.SIGUSR2)


def attempt_without_training(
    sick: Sequence[NodeReport], relay: SignalRelay, allocation: Allocation
) -> Attempt:
    """Return the attempt of a job that a sick node or a signal ended before the ranks started."""
    for report in sick:
        log(f"sick {report.describe()}")
    received = relay.received[:1]
    cancelled = "SIGTERM" in relay.received and job_state(allocation.label).startswith("CANCELLED")
    return Attempt(
        exit_code=Stopped.exit_code if received else PortraitDistError.exit_code,
        signal_name=received[0] if received else "",
        last=None,
        cancelled=cancelled,
        progressed=False,
        sick=tuple(sick),
    )


def supervise(
    command: Sequence[str],
    folder: RunFolder,
    allocation: Allocation,
    relay: SignalRelay,
    logs: Path,
) -> Attempt:
    """Run srun to its end and say how the attempt ended.

    Args:
        command: see :func:`srun_command`.
        folder: of the run.
        allocation: what SLURM gave the job.
        relay: of SLURM's signals.
        logs: folder in which nodes write down which rank failed.
    """
    before, newest = len(folder.events()), folder.checkpoint_time()
    child = subprocess.Popen(command)
    relay.attach(child)
    exit_code = child.wait()
    found = folder.events()
    # By their number, not by their time: the clocks of two nodes differ.
    events = Events(tuple(found)[before:], found.skipped)
    return Attempt(
        # As a shell says it: a negative code is the signal that killed srun.
        exit_code=exit_code if exit_code >= 0 else 128 - exit_code,
        signal_name=relay.received[0] if relay.received else "",
        last=events[-1] if events else None,
        cancelled="SIGTERM" in relay.received
        and job_state(allocation.label).startswith("CANCELLED"),
        progressed=folder.checkpoint_time() != newest and made_progress(events),
        failed_node=first_failed_node(logs / FAILURES, allocation, events),
    )


def first_failed_node(path: Path, allocation: Allocation, events: Events) -> str:
    """Return the node that made an attempt fail, an empty string where that is not known.

    Where the ranks waited in vain for one that hangs, that is its node; else the node of the rank
    that failed first.
    """
    if events and events[-1].kind == "error" and events[-1].host:
        return events[-1].host
    found = []
    for line in files.json_objects(_content(path)):
        attempt, node, moment = (line.get(name) for name in ("attempt", "node", "time"))
        if attempt == allocation.restarts + 1 and isinstance(moment, int | float):
            found.append((moment, str(node)))
    # By the time of the failure: the nodes write in any order.
    return min(found)[1] if found else ""


def made_progress(events: Events) -> bool:
    """Say whether what an attempt saved is further on than where it started.

    Only a stop saves without having trained a step.
    """
    starts = events.of_kind("start")
    if not starts or events[-1].kind != "stop":
        return True
    before, after = starts[-1].batches_done, events[-1].batches_done
    return before is None or after is None or after > before


@dataclass(frozen=True)
class AttemptRecord:
    """A line of ``attempts.jsonl``: what the next attempts of the same job must know of one."""

    time: float
    attempt: int
    exit_code: int
    signal: str
    progressed: bool
    failed_node: str = ""
    sick_nodes: tuple[str, ...] = ()


def record_attempt(path: Path, allocation: Allocation, attempt: Attempt) -> int:
    """Append a line about this attempt; return how many attempts in a row saved nothing new.

    A requeue keeps the job's number, so that the file holds all attempts of one submission.
    """
    line = AttemptRecord(
        time=time.time(),
        attempt=allocation.restarts + 1,
        exit_code=attempt.exit_code,
        signal=attempt.signal_name,
        progressed=attempt.progressed,
        failed_node=attempt.failed_node,
        sick_nodes=tuple(report.node for report in attempt.sick),
    )
    with files.explained(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(line)) + "\n")
    records = read_attempts(path)
    # An attempt that found a sick node is followed by one without it: that is progress.
    idle = itertools.takewhile(
        lambda one: not one.progressed and not one.sick_nodes, reversed(records)
    )
    return sum(1 for _ in idle)


def read_attempts(path: Path) -> list[AttemptRecord]:
    """Read ``attempts.jsonl``; lines that are damaged are skipped."""
    records = []
    for line in files.json_objects(_content(path)):
        try:
            records.append(AttemptRecord(**line))
        except TypeError:
            continue
    return records


def _content(path: Path) -> bytes:
    """Read a file of JSON lines; one that is not there, or cannot be read, says nothing."""
    try:
        return files.read_regular(path, MOST_BYTES)
    except OSError:
        return b""


def nodes_to_exclude(path: Path) -> list[str]:
    """Return the nodes that were found sick, and those on which two attempts failed first."""
    records = read_attempts(path)
    failures = Counter(record.failed_node for record in records if record.failed_node)
    found = [str(node) for record in records for node in record.sick_nodes]
    found += [node for node, count in failures.items() if count >= FAILURES_OF_A_NODE]
    # Each once, in the order in which they were found: the oldest trouble first.
    return list(dict.fromkeys(found))[:MOST_EXCLUDED]


def report_to_status(folder: RunFolder, message: str, exit_code: int) -> None:
    """Write the reason where ``portrait-dist status`` finds it: all ranks are gone."""
    if folder.path.is_dir():
        try:
            folder.append("error", message=message, exit_code=exit_code)
        except PortraitDistError as error:
            log(str(error))


def requeue(allocation: Allocation, excluded: Sequence[str] = ()) -> int:
    """Put the job back into the queue.

    Args:
        allocation: what SLURM gave the job.
        excluded: nodes that the next attempt should not get.
    """
    # Planned before the requeue, after which SLURM ends this process's children.
    exclusion = plan_exclusion(allocation, excluded) if excluded else None
    asked = scontrol("requeue", allocation.label)
    if asked.returncode:
        state = job_state(allocation.label)
        # SLURM was faster (a lost node, preemption) and refuses a second requeue.
        if state in REQUEUED_BY_SLURM:
            log(f"SLURM requeues it ({state})")
        else:
            log(f"scontrol requeue failed ({asked.stderr.strip()}); queue the same line again")
            return Stopped.exit_code
    if exclusion:
        problem = exclusion.problem or exclude(allocation, exclusion)
        names = ", ".join(excluded)
        log(f"{names} not excluded: {problem}" if problem else f"{names} excluded from now on")
    return Stopped.exit_code
