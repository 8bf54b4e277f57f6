"""``portrait-dist submit pack|predict|evaluate|pipeline``: SLURM jobs in a chain.

Packing and predicting are an array job, one part a task, and a finishing job that checks that no
part is missing. Every job is ``launch/slurm.sbatch --step LOGS COMMAND ARGUMENTS…``.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from portrait_dist import config
from portrait_dist.data.shards.sets import shape_of_batches
from portrait_dist.errors import InputError
from portrait_dist.preprocessing import Fit
from portrait_dist.runs.folder import BEST
from portrait_dist.runs.scores import scores_file
from portrait_dist.runs.steps import QueuedStep, write_record
from portrait_dist.slurm.submit import (
    Request,
    check_run_folder,
    queue,
    sbatch_command,
    sbatch_line,
)
from portrait_dist.system.address import is_one_folder
from portrait_dist.training.plan import make_plan

ALWAYS, SUCCESS = "afterany", "afterok"
"""A finishing job runs in any case, and names what is missing; what follows needs its success."""


@dataclass(frozen=True)
class StepsSubmission:
    """Queued steps.

    Args:
        steps: in order; each waits for the one before.
        parts: tasks of the array job; 0 without one.
        watch: command that shows where they stand.
        stop: command that cancels them.
    """

    steps: list[QueuedStep]
    parts: int
    watch: str
    stop: str


@dataclass(frozen=True)
class StepJob:
    """A job to queue.

    Args:
        name: of the step.
        request: what to ask SLURM for.
        arguments: of ``portrait-dist``, the command first.
        tasks: of an array job; 0 for a plain one.
        after: how it waits for the job before: ``afterok`` or ``afterany``.
        settings: of a training, which has a line of its own.
    """

    name: str
    request: Request
    arguments: Sequence[str]
    tasks: int = 0
    after: str = SUCCESS
    settings: config.Config | None = None


@dataclass(frozen=True)
class Packed:
    """What a packing will give.

    Args:
        train_samples: number of training pairs.
        stored: size in pixels (H, W), None for the original one, and fit of the images.
    """

    train_samples: int
    stored: tuple[tuple[int, int] | None, Fit]


def in_parts(
    command: str, arguments: Sequence[str], request: Request, parts: int, units: int
) -> list[StepJob]:
    """Return an array job and its finishing job.

    Args:
        command: ``pack`` or ``predict``.
        arguments: of it, without ``--part``.
        request: for each task.
        parts: tasks that were asked for.
        units: what is divided; more tasks than that would be idle.
    """
    tasks = max(1, min(parts, units))
    single = replace(request, nodes=1)
    return [
        StepJob(command, single, [command, *arguments, "--part", "auto"], tasks),
        StepJob(f"{command} --finish", single, [command, *arguments, "--finish"], after=ALWAYS),
    ]


def shards_folder(recipe: str, overrides: Sequence[str]) -> str:
    """Return the folder that a pipeline packs and trains with: ``data.shards``.

    Raises:
        InputError: it is not given, or an address.
    """
    shards = config.load(recipe, overrides).data.shards
    if not shards or not is_one_folder(shards):
        raise InputError(
            f"data.shards='{shards}': pack writes a folder; give one that all nodes see, such as "
            "data.shards=/shared/shards"
        )
    return shards


def pipeline(
    packing: Sequence[StepJob],
    recipe: str,
    overrides: Sequence[str],
    request: Request,
    packed: Packed,
    split: str,
) -> tuple[list[StepJob], config.Config]:
    """Return pack → train → evaluate → report.

    Args:
        packing: its jobs, which write ``data.shards``.
        recipe: name or file of the recipe.
        overrides: ``key=value`` settings of the training.
        request: for the training; the jobs after it take one node of that kind.
        packed: what the training gets.
        split: what is evaluated.

    Raises:
        InputError: what would make the training fail.
    """
    settings = config.load(recipe, overrides)
    shape_of_batches(packed.stored, settings.data.asked_shape, settings.data.shards)
    make_plan(settings, packed.train_samples, request.ranks)
    check_run_folder(settings)
    run, one = settings.run_dir, replace(request, nodes=1)
    scored = [f"--checkpoint={run / BEST}", f"--data={settings.data.shards}", f"--split={split}"]
    return [
        *packing,
        StepJob("train", request, ["--recipe", recipe, *overrides], settings=settings),
        StepJob("evaluate", one, ["evaluate", *scored, f"--out={scores_file(run, split)}"]),
        StepJob("report", one, ["report", str(run)]),
    ], settings


def submit_steps(
    jobs: Sequence[StepJob], folder: Path, targets: Sequence[Path], dry_run: bool = False
) -> StepsSubmission:
    """Queue jobs, each of which waits for the one before.

    Args:
        jobs: in order.
        folder: that holds the outputs; logs go to ``slurm`` in it.
        targets: what is written, for ``portrait-dist status``.
        dry_run: queue nothing.

    Raises:
        InputError: what sbatch says; nothing stays queued then.
    """
    logs = folder.resolve() / "slurm"
    steps: list[QueuedStep] = []
    try:
        for job in jobs:
            before = steps[-1] if steps else None
            line = _line(job, logs, _after(job, before))
            number = None if dry_run else queue(line, logs)
            log = f"{logs}/{'%A_%a' if job.tasks else '%j'}.log"
            steps.append(QueuedStep(job.name, number, job.tasks, shlex.join(line), log))
        if not dry_run:
            write_record(logs, list(targets), steps)
    except BaseException:
        _cancel(steps)
        raise
    return StepsSubmission(
        steps=steps,
        parts=jobs[0].tasks,
        watch=f"portrait-dist status {shlex.quote(str(targets[0]))}",
        stop=f"scancel {' '.join(str(step.job_id or 'JOB') for step in steps)}",
    )


def _line(job: StepJob, logs: Path, after: Sequence[str]) -> list[str]:
    if job.settings is not None:
        recipe, overrides = job.arguments[1], job.arguments[2:]
        return sbatch_command(recipe, overrides, job.request, job.settings, after)
    return sbatch_line(
        job.request,
        name=job.name.replace(" --", "-"),
        log=f"{logs}/{'%A_%a' if job.tasks else '%j'}.log",
        arguments=["--step", str(logs), *job.arguments],
        array=f"0-{job.tasks - 1}" if job.tasks else "",
        after=after,
    )


def _after(job: StepJob, before: QueuedStep | None) -> list[str]:
    """Return the dependency; a job whose condition can no longer come true leaves the queue."""
    if before is None:
        return []
    number = "JOB" if before.job_id is None else before.job_id
    return [f"--dependency={job.after}:{number}", "--kill-on-invalid-dep=yes"]


def _cancel(steps: Sequence[QueuedStep]) -> None:
    numbers = [str(step.job_id) for step in steps if step.job_id is not None]
    if numbers:
        subprocess.run(["scancel", *numbers], check=False, capture_output=True)
