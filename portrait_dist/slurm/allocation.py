"""What SLURM gave a job: variables of the environment, and what scontrol knows."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from portrait_dist.errors import InputError, PortraitDistError
from portrait_dist.system.info import environment_number

FIRST_PORT, PORTS = 12000, 20000
"""Ports of rendezvous lie below those that Linux hands out by itself (32768 and up)."""


@dataclass(frozen=True)
class Allocation:
    """What SLURM gave this job.

    Args:
        job: SLURM's number of the job. One task of an array has the number of the array, by which
            SLURM's commands mean all of its tasks.
        label: the job for SLURM's commands and in file names: ``123``, or ``120_3`` for task 3 of
            the array job 120.
        array_task: number of the task in an array job, else None.
        restarts: how often the job was requeued.
        nodes: number of nodes.
        node_list: their names in SLURM's notation, such as ``n[0-3]``.
        gpus: GPUs of one node.
        cpus: CPUs of one node.
        ranks_per_node: ranks that each node starts.
    """

    job: int
    label: str
    array_task: int | None
    restarts: int
    nodes: int
    node_list: str
    gpus: int
    cpus: int
    ranks_per_node: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Allocation:
        """Read SLURM's variables; ``NPROC_PER_NODE`` overrides one rank per GPU (one without GPUs).

        Args:
            environment: variables to read; this process's when None.

        Raises:
            InputError: not inside a SLURM job, or a variable that should be a number is none.
        """
        variables = os.environ if environment is None else environment

        def number(name: str, default: int = 0, minimum: int = 0) -> int:
            return environment_number(name, default, minimum=minimum, environment=variables)

        if not variables.get("SLURM_JOB_ID"):
            raise InputError(
                "SLURM_JOB_ID is not set: this is the inside of a SLURM job; "
                "queue it with 'portrait-dist submit'"
            )
        job, gpus = number("SLURM_JOB_ID"), number("SLURM_GPUS_ON_NODE")
        task = number("SLURM_ARRAY_TASK_ID") if variables.get("SLURM_ARRAY_TASK_ID") else None
        return cls(
            job=job,
            label=str(job) if task is None else f"{number('SLURM_ARRAY_JOB_ID', job)}_{task}",
            array_task=task,
            restarts=number("SLURM_RESTART_COUNT"),
            nodes=number("SLURM_JOB_NUM_NODES", 1, minimum=1),
            node_list=variables.get("SLURM_JOB_NODELIST", ""),
            gpus=gpus,
            cpus=number("SLURM_CPUS_PER_TASK") or number("SLURM_CPUS_ON_NODE", 1) or 1,
            ranks_per_node=number("NPROC_PER_NODE", max(gpus, 1), minimum=1),
        )

    @property
    def attempt(self) -> str:
        """``attempt1`` for the first start of the job, ``attempt2`` after its first requeue."""
        return f"attempt{self.restarts + 1}"

    @property
    def port(self) -> int:
        """Port of the rendezvous on the first node; another one for every job."""
        return FIRST_PORT + self.job % PORTS

    def describe(self) -> str:
        """Return one line for the job's log."""
        return (
            f"SLURM job {self.label}, attempt {self.restarts + 1}: "
            f"{self.nodes} node(s) {self.node_list}, {self.nodes * self.ranks_per_node} rank(s), "
            f"{self.ranks_per_node} per node, {self.gpus} GPU(s) and {self.cpus} CPU(s) per node"
        )


def first_address(allocation: Allocation) -> str:
    """Return the address of the first node as SLURM knows it; ``MASTER_ADDR`` overrides it.

    A node's name need not resolve; its NodeAddr is what slurmctld itself uses.

    Raises:
        PortraitDistError: scontrol does not name the nodes.
    """
    if override := os.environ.get("MASTER_ADDR"):
        return override
    first = host_names(allocation)[0]
    found = re.search(r"NodeAddr=(\S+)", scontrol("show", "node", first, "--oneliner").stdout)
    return found.group(1) if found else first


def host_names(allocation: Allocation) -> list[str]:
    """Return the names of the allocation's nodes.

    Raises:
        PortraitDistError: scontrol does not name the nodes.
    """
    hosts = scontrol("show", "hostnames", allocation.node_list)
    if hosts.returncode or not hosts.stdout.split():
        reason = hosts.stderr.strip() or "no answer"
        raise PortraitDistError(
            f"scontrol show hostnames {allocation.node_list}: {reason}; "
            "see that SLURM's commands work on the nodes"
        )
    return hosts.stdout.split()


def node_name() -> str:
    """Return this node's name as SLURM knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_state(label: str) -> str:
    """Return SLURM's state of a job, such as ``RUNNING``; empty where it does not answer."""
    state = re.search(r"JobState=(\S+)", scontrol("show", "job", label).stdout)
    return state.group(1) if state else ""


def scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run scontrol; its exit code is 127 where it is missing or does not answer in a minute."""
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
