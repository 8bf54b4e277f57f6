"""``portrait-dist submit``: checks what would fail later, then hands ``launch/slurm.sbatch`` to sbatch with the right options."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portrait_dist import config
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.slurm.job import sweep, task_name

# In a checkout the scripts stand beside the package, in an installed wheel inside it.
SCRIPTS = [parent / "launch" / "slurm.sbatch" for parent in Path(__file__).parents[1:3]]


@dataclass(frozen=True)
class Request:
    """What to ask SLURM for.

    Args:
        nodes: number of nodes.
        gpus_per_node: GPUs, and ranks, on each node; 0 trains on CPUs, one rank per node.
        cpus_per_node: 0 means 8 for each GPU, and the cluster's default without GPUs.
        time: sbatch's --time, such as 8:00:00; empty for the partition's default. So are partition and account.
        array: choices for an array job, such as ``train.lr=1e-3,3e-4``; several make a grid.
        extra: more options for sbatch, as they are.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    array: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.nodes * max(self.gpus_per_node, 1)


def submit(
    recipe: str, overrides: Sequence[str], request: Request, dry_run: bool = False
) -> dict[str, Any]:
    """Check, then queue a training job.

    Returns:
        ``command`` (as a shell line), ``script``, ``logs``, ``run_dirs``, ``job_id`` (None in a dry run), ``world_size``,
        ``global_batch``, ``steps_per_epoch``, ``watch``, ``stop`` and ``resume`` (commands).

    Raises:
        InputError: what would make the job fail, or what sbatch says; nothing is queued then.
    """
    tasks = sweep(request.array)
    settings = [config.load(recipe, [*overrides, *task]) for task in tasks]
    figures = [check(one, request.ranks) for one in settings]
    command = sbatch_command(recipe, overrides, request, settings[0])
    line = shlex.join(command)
    names = [
        task_name(one, task) if task else one.run_dir.name
        for one, task in zip(settings, tasks, strict=True)
    ]
    run_dirs = [str(one.run_dir.parent / name) for one, name in zip(settings, names, strict=True)]
    result = {
        "command": line,
        "script": str(script()),
        "run_dirs": run_dirs,
        "world_size": request.ranks,
        **figures[0],
    }
    job = None if dry_run else _queue(command, settings[0])
    shown = "JOB" if job is None else str(job)
    return {
        "job_id": job,
        **result,
        "logs": str(
            _log_folder(settings[0]) / (f"{shown}.log" if not request.array else f"{shown}_*.log")
        ),
        "watch": f"portrait-dist status {shlex.quote(run_dirs[0])}",
        "stop": f"scancel {shown}",
        "resume": line,
    }


def script() -> Path:
    """launch/slurm.sbatch of this checkout or installation."""
    for path in SCRIPTS:
        if path.is_file():
            return path
    raise InputError(
        f"{SCRIPTS[0]}: the batch script is not there; install portrait-dist again, or submit from a checkout"
    )


def sbatch_command(
    recipe: str, overrides: Sequence[str], request: Request, settings: config.Config
) -> list[str]:
    """sbatch with its options, the script, and the words for ``train``."""
    name = "%A_%a" if request.array else "%j"
    options = [
        f"--job-name={settings.run_dir.name}",
        f"--nodes={request.nodes}",
        f"--output={_log_folder(settings)}/{name}.log",
    ]
    options.append(
        f"--export=ALL,PYTHON={sys.executable}"
    )  # the job runs this Python, whatever comes first on PATH
    if request.gpus_per_node:
        options.append(f"--gpus-per-node={request.gpus_per_node}")
    if cpus := request.cpus_per_node or 8 * request.gpus_per_node:
        options.append(f"--cpus-per-task={cpus}")
    for option in ("time", "partition", "account"):
        if value := getattr(request, option):
            options.append(f"--{option}={value}")
    sweeps = []
    if request.array:
        options.append(f"--array=0-{len(sweep(request.array)) - 1}")
        sweeps = [word for choice in request.array for word in ("--sweep", choice)]
    return [
        "sbatch",
        *options,
        *request.extra,
        str(script()),
        *sweeps,
        "--recipe",
        recipe,
        *overrides,
    ]


def _log_folder(settings: config.Config) -> Path:
    """The same folder that the job uses for its ranks' logs."""
    return Path(settings.run.root).resolve() / "slurm"


def check(settings: config.Config, ranks: int) -> dict[str, int]:
    """What would fail later, before anything is queued.

    Returns:
        ``global_batch`` in samples, ``steps_per_epoch`` in optimiser steps.

    Raises:
        InputError: shards that cannot be read or do not fill a global batch, or a run folder that cannot be written.
    """
    samples = _train_samples(settings.data.shards)
    per_step = settings.train.batch_size * ranks
    if samples < per_step:
        raise InputError(
            f"{settings.data.shards}: {samples} training samples do not fill one global batch of {per_step} "
            f"({ranks} ranks × train.batch_size={settings.train.batch_size}); lower train.batch_size or ask for fewer nodes"
        )
    _check_run_folder(settings)
    batches = min(samples // per_step, settings.train.max_batches or samples // per_step)
    return {
        "global_batch": per_step * settings.train.accumulate,
        "steps_per_epoch": -(-batches // settings.train.accumulate),
    }


def _train_samples(location: str) -> int:
    """Samples of the train split by the manifest; local shards must be there, readable and of the right length."""
    if not location:
        raise InputError(
            "data.shards is not given: add data.shards=DIR, the folder that 'portrait-dist pack' wrote"
        )
    from portrait_dist.data.shards.reader import ShardSet

    try:
        sets = [ShardSet(location, split) for split in ("train", "val")]
    except DamagedDataError as error:
        raise InputError(str(error)) from error
    for entry in [entry for one in sets if not one.remote for entry in one.shards]:
        path = Path(location) / entry.name
        if not os.access(path, os.R_OK):
            raise InputError(
                f"{path}: missing or not readable; pack or copy the shards again, or mend its permissions"
            )
        if path.stat().st_size != entry.bytes:
            raise InputError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {entry.bytes}; pack or copy the shards again"
            )
    return sets[0].samples


def _check_run_folder(settings: config.Config) -> None:
    folder = settings.run_dir.resolve()
    if not settings.run.resume and (folder / "ckpt_latest.pth").exists():
        raise InputError(
            f"{folder}: the run exists and run.resume=false; choose another run.name, or leave run.resume out"
        )
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{folder}: {there} is not a folder you can write to; choose another run.root"
        )


def _queue(command: Sequence[str], settings: config.Config) -> int:
    if shutil.which("sbatch") is None:
        raise InputError(
            "sbatch is not here: submit from a node where SLURM's commands are, or add --dry-run to see the command"
        )
    _log_folder(settings).mkdir(
        parents=True, exist_ok=True
    )  # SLURM does not make it, and would lose the log
    done = subprocess.run(
        [command[0], "--parsable", *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise InputError(
            f"sbatch refused it: {done.stderr.strip() or done.stdout.strip()}; nothing was queued"
        )
    return int(done.stdout.strip().split(";")[0])
