"""``portrait-dist submit``: checks what would fail later, then queues ``launch/slurm.sbatch``."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from portrait_dist import config, files
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.runs.folder import RunFolder
from portrait_dist.slurm.container import container_of
from portrait_dist.slurm.sweep import combinations, task_overrides
from portrait_dist.training.plan import Plan, make_plan

# In a checkout the scripts stand beside the package, in an installed wheel inside it.
SCRIPTS = [parent / "launch" / "slurm.sbatch" for parent in Path(__file__).parents[1:3]]


@dataclass(frozen=True)
class Request:
    """What to ask SLURM for.

    Args:
        nodes: number of nodes.
        gpus_per_node: GPUs, and ranks, on each node; 0 trains on CPUs, one rank per node.
        cpus_per_node: 0 means 8 for each GPU, and the cluster's default without GPUs.
        time: sbatch's --time, such as 8:00:00; empty for the partition's default.
        partition: empty for the cluster's default.
        account: empty for the user's default.
        array: choices for an array job, such as ``train.lr=1e-3,3e-4``; several make a grid.
        extra: more options for sbatch, as they are.
        container: image in which the ranks run; empty for none.
        mounts: folders that it sees, besides the working directory and those of the arguments.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    array: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    container: str = ""
    mounts: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.nodes * max(self.gpus_per_node, 1)


@dataclass(frozen=True)
class Submission:
    """A queued job.

    Args:
        job_id: SLURM's number; None in a dry run.
        command: the sbatch command as a shell line.
        script: the batch script.
        run_dirs: folder of each run.
        world_size: number of ranks.
        global_batch: samples of an optimiser step, over all ranks.
        batches_per_epoch: batches of each rank in an epoch.
        steps_per_epoch: optimiser steps in an epoch.
        logs: the job's log.
        watch: command that shows where the run stands.
        stop: command that cancels the job.
        resume: command that queues the same run again.
    """

    job_id: int | None
    command: str
    script: str
    run_dirs: list[str]
    world_size: int
    global_batch: int
    batches_per_epoch: int
    steps_per_epoch: int
    logs: str
    watch: str
    stop: str
    resume: str


def submit(
    recipe: str, overrides: Sequence[str], request: Request, dry_run: bool = False
) -> Submission:
    """Check, then queue a training job.

    Args:
        recipe: name or file of the recipe.
        overrides: ``key=value`` settings.
        request: what to ask SLURM for.
        dry_run: queue nothing.

    Raises:
        InputError: what would make the job fail, or what sbatch says; nothing is queued then.
    """
    settings = config.load(recipe, overrides)
    # As the job's tasks have them: each with a run of its own.
    tasks = [
        config.load(recipe, task_overrides(overrides, settings, task))
        for task in combinations(request.array)
    ]
    plans = [check(one, request.ranks) for one in tasks]
    command = sbatch_command(recipe, overrides, request, settings)
    run_dirs = [str(one.run_dir) for one in tasks]
    job = None if dry_run else queue(command, log_folder(settings))
    shown = "JOB" if job is None else str(job)
    log = f"{shown}_*.log" if request.array else f"{shown}.log"
    return Submission(
        job_id=job,
        command=shlex.join(command),
        script=str(script()),
        run_dirs=run_dirs,
        world_size=request.ranks,
        global_batch=plans[0].global_batch,
        batches_per_epoch=plans[0].batches_per_epoch,
        steps_per_epoch=plans[0].steps_per_epoch,
        logs=str(log_folder(settings) / log),
        watch=f"portrait-dist status {shlex.quote(run_dirs[0])}",
        stop=f"scancel {shown}",
        resume=shlex.join(command),
    )


def script() -> Path:
    """Find launch/slurm.sbatch of this checkout or installation."""
    for path in SCRIPTS:
        if path.is_file():
            return path
    raise InputError(
        f"{SCRIPTS[0]}: the batch script is not there; install portrait-dist again, "
        "or submit from a checkout"
    )


def sbatch_command(
    recipe: str,
    overrides: Sequence[str],
    request: Request,
    settings: config.Config,
    after: Sequence[str] = (),
) -> list[str]:
    """Return sbatch with its options, the script, and the arguments of ``train``.

    Args:
        recipe: name or file of the recipe.
        overrides: ``key=value`` settings.
        request: what to ask SLURM for.
        settings: of the run, without what differs in an array.
        after: options that make it wait for another job.
    """
    tasks = len(combinations(request.array))
    sweeps = [argument for choice in request.array for argument in ("--sweep", choice)]
    return sbatch_line(
        request,
        name=settings.run_dir.name,
        log=f"{log_folder(settings)}/{'%A_%a' if request.array else '%j'}.log",
        arguments=[*sweeps, "--recipe", recipe, *overrides],
        array=f"0-{tasks - 1}" if request.array else "",
        after=after,
        named=[settings.run.root, settings.data.shards],  # a recipe may name them
    )


def sbatch_line(
    request: Request,
    *,
    name: str,
    log: str,
    arguments: Sequence[str],
    array: str = "",
    after: Sequence[str] = (),
    named: Sequence[str] = (),
) -> list[str]:
    """Return sbatch with its options, the script and the script's arguments.

    Args:
        request: what to ask SLURM for.
        name: of the job.
        log: its output file.
        arguments: of the script.
        array: sbatch's ``--array``.
        after: options that make it wait for another job.
        named: what a container has to see, besides what the arguments name.

    Raises:
        InputError: an image or a folder for it that is not there.
    """
    container = container_of(request.container, request.mounts, [*arguments, *named])
    arguments = [*(container.arguments() if container else []), *arguments]
    wanted = {
        "job-name": name,
        "nodes": request.nodes,
        "output": log,
        # the job runs this Python, whatever comes first on PATH
        "export": f"ALL,PYTHON={sys.executable}",
        "gpus-per-node": request.gpus_per_node,
        "cpus-per-task": request.cpus_per_node or 8 * request.gpus_per_node,
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "array": array,
    }
    options = [f"--{option}={value}" for option, value in wanted.items() if value]
    return ["sbatch", *options, *after, *request.extra, str(script()), *arguments]


def log_folder(settings: config.Config) -> Path:
    """Return the folder that the job uses for its ranks' logs, too."""
    return Path(settings.run.root).resolve() / "slurm"


def check(settings: config.Config, ranks: int) -> Plan:
    """Check what would fail later, before anything is queued.

    Args:
        settings: of the run.
        ranks: number of ranks.

    Raises:
        InputError: shards that cannot be read, have another size, or do not fill a global batch,
            or a run folder that cannot be written.
    """
    plan = make_plan(settings, _train_samples(settings.data), ranks)
    check_run_folder(settings)
    return plan


def _train_samples(data: config.DataConfig) -> int:
    """Count the training samples; local shards must be there, readable and of the right length."""
    if not data.shards:
        raise InputError(
            "data.shards is not given: add data.shards=DIR, the folder that 'portrait-dist pack' "
            "wrote"
        )
    from portrait_dist.data.shards.cache import Cache, DownloadOptions
    from portrait_dist.data.shards.sets import ShardSets, open_shards, shape_of_batches

    cache = Cache(downloads=DownloadOptions(wait_for_server_seconds=10.0))
    try:
        sets = [open_shards(data.shards, split, cache=cache) for split in ("train", "val")]
    except DamagedDataError as error:
        raise InputError(str(error)) from error
    for one in sets:
        shape_of_batches((one.size, one.fit), data.asked_shape, one.shown)
    single = [
        shards
        for one in sets
        for shards in ([part.shards for part in one.parts] if isinstance(one, ShardSets) else [one])
    ]
    for path, entry in [
        (one.folder / entry.name, entry) for one in single if not one.remote for entry in one.shards
    ]:
        if not os.access(path, os.R_OK):
            raise InputError(
                f"{path}: missing or not readable; pack or copy the shards again, "
                "or change its permissions"
            )
        if path.stat().st_size != entry.bytes:
            raise InputError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {entry.bytes}; "
                "pack or copy the shards again"
            )
    return sets[0].epoch_samples


def check_run_folder(settings: config.Config) -> None:
    """Check before anything is queued that the run can be written, and may be resumed.

    Raises:
        InputError: it cannot.
    """
    folder = settings.run_dir.resolve()
    if not settings.run.resume and RunFolder(folder).latest.exists():
        raise InputError(
            f"{folder}: the run exists and run.resume=false; choose another run.name, "
            "or leave run.resume out"
        )
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{folder}: {there} is not a folder you can write to; choose another run.root"
        )


def queue(command: Sequence[str], folder: Path) -> int:
    """Queue a job and return its number.

    Args:
        command: sbatch's.
        folder: for the job's log; made where it does not exist.

    Raises:
        InputError: sbatch is not here or refuses.
    """
    if shutil.which("sbatch") is None:
        raise InputError(
            "sbatch is not here: submit from a node where SLURM's commands are, "
            "or add --dry-run to see the command"
        )
    with files.explained(folder):  # SLURM does not make it, and would lose the log
        folder.mkdir(parents=True, exist_ok=True)
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
    number = done.stdout.strip().split(";")[0]
    if not number.isdecimal():  # a site's wrapper may print more
        raise InputError(f"sbatch printed '{number}' and no job number; see 'squeue'")
    return int(number)
