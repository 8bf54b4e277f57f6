"""Reject launches whose ranks do not match the allocation. Silent outside SLURM steps."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

from portrait_dist.errors import InputError
from portrait_dist.system.info import environment_number

REMEDY = (
    "use 'sbatch launch/slurm.sbatch …' or 'portrait-dist submit', "
    "which start one torchrun per node"
)


def check_launch(environment: Mapping[str, str] | None = None) -> None:
    """Reject a launch under SLURM that would train something else than asked for.

    Args:
        environment: variables of this process; its own when None.

    Raises:
        InputError: tasks without torchrun, several tasks per node, a world size that is not the
            allocation's, or a variable that should be a number is none.
    """
    variables = os.environ if environment is None else environment
    if "SLURM_PROCID" not in variables or "SLURM_STEP_NUM_TASKS" not in variables:
        return
    number = functools.partial(environment_number, environment=variables)
    tasks = number("SLURM_STEP_NUM_TASKS", 1)
    if "RANK" not in variables or "WORLD_SIZE" not in variables:
        if tasks > 1:
            raise InputError(
                f"srun started {tasks} tasks without torchrun: each would train alone into the "
                f"same run; {REMEDY}"
            )
        return
    nodes = number("SLURM_STEP_NUM_NODES", 1)
    if tasks > nodes:
        raise InputError(
            f"srun started {tasks} tasks on {nodes} node(s), each with a torchrun: one task per "
            "node, not per GPU, torchrun starts the ranks; set --ntasks-per-node=1, or "
            f"{REMEDY}"
        )
    _check_world_size(variables, nodes)


def _check_world_size(variables: Mapping[str, str], nodes: int) -> None:
    number = functools.partial(environment_number, environment=variables)
    world, here = number("WORLD_SIZE", 1), number("LOCAL_WORLD_SIZE", 1)
    joined, gpus = number("GROUP_WORLD_SIZE", 1), number("SLURM_GPUS_ON_NODE")
    if joined != nodes:
        raise InputError(
            f"torchrun joined {joined} node(s) of the {nodes} that SLURM gave "
            f"(world size {world}): set torchrun's --nnodes to $SLURM_JOB_NUM_NODES and one "
            "--rdzv-endpoint for all nodes"
        )
    if asked := number("NPROC_PER_NODE"):
        if here != asked:
            raise InputError(
                f"torchrun started {here} rank(s) on a node where NPROC_PER_NODE={asked} "
                f"(world size {world}): set --nproc-per-node {asked}, or unset the variable"
            )
    elif gpus and here != gpus:
        raise InputError(
            f"torchrun started {here} rank(s) on a node where SLURM gave {gpus} GPU(s) "
            f"(world size {world}): set --nproc-per-node {gpus} or NPROC_PER_NODE={here}, or ask "
            f"for {here} with --gpus-per-node={here}"
        )
