"""Find sick nodes before the rendezvous, and keep a job off them.

``… check LOGS DEVICE`` runs on every node for some seconds (:func:`check_node`). A node with a
problem is named, and the requeued job excludes it. So is a node on which two attempts failed first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from portrait_dist import files
from portrait_dist.errors import PortraitDistError
from portrait_dist.slurm import container as containers
from portrait_dist.slurm.allocation import Allocation, host_names, scontrol

SECONDS_FOR_ALL = 120.0
"""A node that has not answered until then is sick."""
SECONDS_FOR_A_DRIVER = 30.0
TAKEN_MEMORY = 0.5
"""Fraction of a GPU's memory; more in use before the job starts is somebody else's process."""
LARGEST_SKEW = 60.0
"""Seconds that a node's clock may differ from the file server's."""
TRIES, SECONDS_BETWEEN_TRIES = 10, 0.3
"""SLURM gives a requeued job's processes KillWait (30 s by default) to end."""
LEAST_SCRATCH = 256 << 20
"""Bytes in the node's temporary folder; torchrun and compilers write there."""


@dataclass(frozen=True)
class NodeReport:
    """What one node says of itself.

    Args:
        node: its name in SLURM.
        problems: what makes it useless for the job; empty where it is fine.
    """

    node: str
    problems: tuple[str, ...]

    def describe(self) -> str:
        """Return one line."""
        return f"node {self.node}: {'; '.join(self.problems)}"


def check_nodes(
    allocation: Allocation,
    logs: Path,
    device: str,
    container: containers.Container | None = None,
) -> list[NodeReport]:
    """Check every node of the allocation at once; return those with a problem.

    Args:
        allocation: what SLURM gave the job.
        logs: folder for logs; every node must be able to write there.
        device: ``train.device``; with ``cpu`` GPUs are not looked at.
        container: in which the ranks will run; the nodes are looked at from there.
    """
    options = [f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}"]
    options += ["--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    python = containers.python(container, allocation.gpus)
    check = [*python, "-m", "portrait_dist.slurm", "check", str(logs), device]
    child = subprocess.Popen(["srun", *options, *check], stdout=subprocess.PIPE, text=True)
    try:
        output, _ = child.communicate(timeout=SECONDS_FOR_ALL)
    except subprocess.TimeoutExpired:
        child.kill()  # srun ends its tasks with it
        output, _ = child.communicate()
    reports = parse_reports(output)
    silent = [node for node in host_names(allocation) if node not in reports]
    if len(silent) == allocation.nodes:
        return []  # srun itself does not work here: the ranks will say why
    for node in silent:
        reports[node] = NodeReport(node, (f"did not answer within {SECONDS_FOR_ALL:.0f} s",))
    return [report for report in reports.values() if report.problems]


def parse_reports(output: str) -> dict[str, NodeReport]:
    """Read the nodes' lines of JSON; other lines are skipped."""
    found = {}
    for line in output.splitlines():
        try:
            values = json.loads(line)
            report = NodeReport(str(values["node"]), tuple(map(str, values["problems"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        found[report.node] = report
    return found


def check_node(logs: str, device: str) -> int:
    """Check this node and print a line of JSON.

    Args:
        logs: folder for logs.
        device: ``train.device``.
    """
    allocation = Allocation.from_environment()
    problems = [*_folder_problems(Path(logs)), *_scratch_problems()]
    if allocation.gpus and device != "cpu":
        problems += _gpu_problems(allocation.gpus)
    name = os.environ.get("SLURMD_NODENAME", "")
    print(json.dumps(asdict(NodeReport(name, tuple(problems)))), flush=True)
    return 0


def _folder_problems(logs: Path) -> Iterator[str]:
    """Write into the shared folder, and compare its clock with this node's."""
    # A name of its own: all nodes write into this folder at once.
    path = files.temporary_path(logs / "check")
    try:
        with files.explained(path):
            path.write_bytes(b"x")
            skew = abs(time.time() - path.stat().st_mtime)
            path.unlink()
    except PortraitDistError as error:
        yield f"the run's folder is not usable ({error})"
        return
    if skew > LARGEST_SKEW:
        yield f"its clock is {skew:,.0f} s off the file server's"


def _scratch_problems() -> Iterator[str]:
    folder = tempfile.gettempdir()
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile():
            pass
    except OSError as error:
        yield f"{folder} is not usable ({error.strerror})"
        return
    if free < LEAST_SCRATCH:
        yield f"{folder} has only {free >> 20} MB free"


def _gpu_problems(gpus: int) -> Iterator[str]:
    """Ask the driver, or torch where there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        import torch

        if torch.cuda.device_count() < gpus:
            yield f"SLURM gave {gpus} GPU(s), torch sees {torch.cuda.device_count()}"
        return
    fields = "index,memory.used,memory.total,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # the others may be other jobs'
        command.append(f"--id={visible}")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS_FOR_A_DRIVER, check=False
        )
    except subprocess.TimeoutExpired:
        yield f"the NVIDIA driver does not answer within {SECONDS_FOR_A_DRIVER:.0f} s"
        return
    if done.returncode:
        reason = " ".join((done.stdout + done.stderr).split())[:200]
        yield f"nvidia-smi fails ({reason})"
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line]
    if len(rows) < gpus:
        yield f"SLURM gave {gpus} GPU(s), the driver shows {len(rows)}"
    for row in rows:
        yield from _row_problems(row)


def _row_problems(row: Sequence[str]) -> Iterator[str]:
    """Look at a GPU's memory in MiB and its count of uncorrected memory errors."""
    numbers = [int(cell) if cell.isdecimal() else None for cell in row]
    # A GPU without such a counter says "[N/A]", which became None above.
    used, total, errors = (*numbers, None, None, None, None)[1:4]
    if used is not None and total and used > TAKEN_MEMORY * total:
        yield f"{used:,} of {total:,} MiB of GPU {row[0]} are in use by another process"
    if errors:
        yield f"GPU {row[0]} had {errors} uncorrected memory errors"


@dataclass(frozen=True)
class Exclusion:
    """Nodes that a job is kept off.

    Args:
        nodes: all of them, also those that were excluded before; empty where there is a problem.
        problem: why the nodes cannot be excluded, or an empty string.
    """

    nodes: tuple[str, ...]
    problem: str = ""


def plan_exclusion(allocation: Allocation, nodes: Sequence[str]) -> Exclusion:
    """Find out whether a job can do without some nodes.

    Args:
        allocation: what SLURM gave the job.
        nodes: names of the nodes.
    """
    shown = scontrol("show", "job", allocation.label, "--oneliner").stdout
    before = _node_names(_field(shown, "ExcNodeList"))
    excluded = [*before, *(node for node in nodes if node not in before)]
    if set(nodes) & set(_node_names(_field(shown, "ReqNodeList"))):
        return Exclusion((), "the job asked for them by name")
    left = [node for node in _nodes_of_partition(shown) if node not in excluded]
    if len(left) < allocation.nodes:
        return Exclusion((), f"only {len(left)} other node(s) are left in the partition")
    return Exclusion(tuple(excluded))


def exclude(allocation: Allocation, exclusion: Exclusion) -> str:
    """Keep a job off some nodes; only a job that is queued can be changed, so requeue it first.

    SLURM ends the processes of a job that is requeued, first this process's children: a scontrol
    that got its signal is started again.

    Returns:
        Why the nodes are not excluded; an empty string where they are.
    """
    nodes = f"ExcNodeList={','.join(exclusion.nodes)}"
    problem = ""
    for _ in range(TRIES):
        asked = scontrol("update", f"JobId={allocation.label}", nodes)
        if asked.returncode == 0:
            return ""
        problem = " ".join(asked.stderr.split()) or "scontrol update failed"
        time.sleep(SECONDS_BETWEEN_TRIES)
    return problem


def _field(shown: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", shown)
    return found.group(1) if found and found.group(1) != "(null)" else ""


def _node_names(text: str) -> list[str]:
    return scontrol("show", "hostnames", text).stdout.split() if text else []


def _nodes_of_partition(shown: str) -> list[str]:
    partition = _field(shown, "Partition")
    found = scontrol("show", "partition", partition.partition(",")[0], "--oneliner").stdout
    return _node_names(_field(found, "Nodes"))
