"""Sweeps: array jobs whose tasks train with different values of some keys."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from portrait_dist import config, recipes
from portrait_dist.errors import InputError


def combinations(choices: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each task: the product of the choices.

    Args:
        choices: such as ``["train.lr=1e-3,3e-4", "train.seed=1,2"]``, which make four tasks.

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
        if key == "run.name":
            raise InputError(
                f"--array '{choice}': the tasks' runs are named by the values of other keys"
            )
        if len(set(values.split(","))) < len(values.split(",")):
            raise InputError(f"--array '{choice}': gives a value twice; two tasks would be one run")
        columns.append([f"{key}={value}" for value in values.split(",")])
    return [list(row) for row in itertools.product(*columns)]


def task_arguments(arguments: Sequence[str], task: int | None) -> list[str]:
    """Replace ``--sweep CHOICE`` in a job's arguments by what one task of the array trains.

    Each task gets a run of its own: ``run.name`` with the task's values behind it.

    Args:
        arguments: those of ``portrait-dist train``, and ``--sweep``.
        task: number of the task, None outside an array job.

    Raises:
        InputError: --sweep outside an array job, or more array tasks than combinations.
    """
    rest, choices, remaining = [], [], iter(arguments)
    for argument in remaining:
        if argument == "--sweep":
            choices.append(next(remaining, ""))
        elif argument.startswith("--sweep="):
            choices.append(argument.removeprefix("--sweep="))
        else:
            rest.append(argument)
    if not choices:
        return rest
    rows = combinations(choices)
    if task is None or not 0 <= task < len(rows):
        raise InputError(
            f"--sweep has {len(rows)} combinations: queue it as an array job, "
            f"sbatch --array=0-{len(rows) - 1} …"
        )
    recipe, overrides = split_arguments(rest)
    return task_overrides(rest, config.load(recipe, overrides), rows[task])


def task_overrides(
    overrides: Sequence[str], settings: config.Config, task: Sequence[str]
) -> list[str]:
    """Return the overrides of one task of a sweep, whose run is ``first-train.lr=1e-3``.

    Args:
        overrides: of all tasks.
        settings: which these make.
        task: its own, of :func:`combinations`; empty where there is no sweep.
    """
    if not task:
        return list(overrides)
    name = f"{settings.run_dir.name}-{','.join(task).replace('/', '_')}"
    return [*overrides, *task, f"run.name={name}"]


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split the arguments of ``portrait-dist train`` into recipe and ``key=value`` overrides."""
    recipe, overrides, remaining = recipes.DEFAULT, [], iter(arguments)
    for argument in remaining:
        if argument == "--recipe":
            recipe = next(remaining, "")
        elif argument.startswith("--recipe="):
            recipe = argument.removeprefix("--recipe=")
        elif not argument.startswith("-"):
            overrides.append(argument)
    return recipe, overrides
