"""``submit``: trainings, packing, predicting, evaluating and all of it as SLURM jobs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import click

from portrait_dist.commands import command, options

if TYPE_CHECKING:
    from portrait_dist.slurm.steps import Packed, StepJob, StepsSubmission
    from portrait_dist.slurm.submit import Request, Submission

Function = TypeVar("Function", bound=Callable[..., object])

EXAMPLES = """\b
Examples:
  portrait-dist submit --nodes 2 --gpus-per-node 8 --time 8:00:00 data.shards=/shared/shards
  portrait-dist submit --array train.lr=1e-3,3e-4 --gpus-per-node 1 data.shards=/shared/shards
  portrait-dist submit --dry-run data.shards=shards
  portrait-dist submit --container portrait-dist.sif --gpus-per-node 8 data.shards=/shared/shards

Other steps, each with its own --help: submit pack, submit predict, submit evaluate,
submit pipeline (pack, train, evaluate, report). 'submit train' is 'submit'.
"""
PACK_EXAMPLES = """\b
Examples:
  portrait-dist submit pack --parts 16 --data /shared/portraits --out /shared/shards
  portrait-dist submit pack --parts 16 --cpus-per-node 8 --time 2:00:00 \\
    --data /shared/data --out /shared/shards --size original
"""
PREDICT_EXAMPLES = """\b
Examples:
  portrait-dist submit predict --parts 8 --gpus-per-node 1 --checkpoint runs/first/ckpt_best.pth \\
    /shared/photos --out /shared/masks --only mask
"""
EVALUATE_EXAMPLES = """\b
Examples:
  portrait-dist submit evaluate --gpus-per-node 8 --checkpoint runs/first/ckpt_best.pth \\
    --data /shared/shards --split test
"""
PIPELINE_EXAMPLES = """\b
Examples:
  portrait-dist submit pipeline --data /shared/portraits --parts 16 --nodes 4 --gpus-per-node 8 \\
    data.shards=/shared/shards run.root=/shared/runs run.name=first
"""
SETTING = re.compile(r"[a-z_]+(\.[A-Za-z_0-9]+)+=")
"""What tells a setting of ``train`` from an option of ``pack``."""


class SlurmOptions(TypedDict):
    """Options of every job."""

    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    time: str
    partition: str
    account: str
    extra: tuple[str, ...]
    container: str
    mounts: tuple[str, ...]


class StepGroup(click.Group):
    """``submit`` and its steps; without the name of a step it is ``submit train``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``train`` where no step is named."""
        if not args or args[0] not in self.commands:
            args = ["train", *args]
        return super().parse_args(ctx, args)


def slurm_options(function: Function) -> Function:
    """Add what every job asks SLURM for."""
    for decorate in reversed(_SLURM_OPTIONS):
        function = decorate(function)
    return function


_SLURM_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--nodes", default=1, show_default=True, type=click.IntRange(1), help="Nodes of a job."
    ),
    click.option(
        "--gpus-per-node",
        default=0,
        show_default=True,
        type=click.IntRange(0),
        help="GPUs and ranks on each node.",
    ),
    click.option(
        "--cpus-per-node",
        default=0,
        type=click.IntRange(0),
        help="CPUs on each node.  [default: 8 for each GPU]",
    ),
    click.option(
        "--time",
        default="",
        help="Time limit of one attempt, such as 8:00:00; the job stops before it and requeues "
        "itself.",
    ),
    click.option("--partition", default="", help="Partition of the cluster."),
    click.option("--account", default="", help="Account to charge."),
    click.option(
        "--sbatch",
        "extra",
        multiple=True,
        metavar="OPTION",
        help="One more option for sbatch, such as --sbatch=--qos=long.",
    ),
    click.option(
        "--container",
        default="",
        metavar="IMAGE",
        help="Run in a container: an image for pyxis (docker://…, a .sqsh file), or a .sif file "
        "for Apptainer. It sees the working directory and the folders that are named here.",
    ),
    click.option(
        "--mount",
        "mounts",
        multiple=True,
        metavar="FOLDER",
        help="One more folder that the container sees, at the same path.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Check everything and print the sbatch command, but queue nothing.",
    ),
)
parts_option = click.option(
    "--parts",
    default=4,
    show_default=True,
    type=click.IntRange(1, 1_000_000),
    help="Tasks that share the work, each on one node.",
)


def _request(slurm: SlurmOptions, array: tuple[str, ...] = ()) -> Request:
    from portrait_dist.slurm.submit import Request

    return Request(array=array, **slurm)


def _summary(result: Submission) -> str:
    if result.job_id is None:
        return result.command
    batch = f"global batch {result.global_batch}, {result.steps_per_epoch} steps per epoch"
    return (
        f"job {result.job_id}: {result.world_size} rank(s), {batch}\n"
        f"  runs    {', '.join(result.run_dirs)}\n"
        f"  log     {result.logs}\n"
        f"  watch   {result.watch}\n"
        f"  stop    {result.stop}\n"
        f"  resume  {result.resume}"
    )


def _steps_summary(result: StepsSubmission) -> str:
    if result.steps[0].job_id is None:
        return "\n".join(step.command for step in result.steps)
    lines = []
    for step in result.steps:
        tasks = f", {step.tasks} task(s)" if step.tasks else ""
        lines.append(f"job {step.job_id}: {step.name}{tasks}; log {step.logs}")
    return "\n".join([*lines, f"  watch   {result.watch}", f"  stop    {result.stop}"])


@click.group("submit", cls=StepGroup, no_args_is_help=False)
def submit() -> None:
    """Queue jobs on SLURM, after a check of everything that would fail later."""


def _add(step: click.Command) -> click.Command:
    submit.add_command(step)
    return step


@_add
@command("train", summary=_summary, epilog=EXAMPLES)
@options.recipe("Recipe")
@slurm_options
@click.option(
    "--array",
    multiple=True,
    metavar="KEY=V1,V2",
    help="An array job with one run for each value; repeat for a grid.",
)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
def submit_train(
    recipe: str,
    array: tuple[str, ...],
    dry_run: bool,
    settings: tuple[str, ...],
    **slurm: Unpack[SlurmOptions],
) -> Submission:
    """Queue a training job on SLURM, after a check of everything that would fail later.

    The settings are those of 'portrait-dist train'. The same line again resumes a run.
    """
    from portrait_dist.slurm.submit import submit

    return submit(recipe, settings, _request(slurm, array), dry_run)


@_add
@command("pack", summary=_steps_summary, epilog=PACK_EXAMPLES, passes_on=True)
@slurm_options
@parts_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="OPTIONS OF PACK...")
def submit_pack(
    parts: int, dry_run: bool, arguments: tuple[str, ...], **slurm: Unpack[SlurmOptions]
) -> StepsSubmission:
    """Queue packing: an array job, each task a part, and a job that finishes the folder.

    The finishing job writes the manifest, or names the shards that are missing. Lost tasks come
    back; the same line again packs what is missing.
    """
    from portrait_dist.slurm import steps

    packing = _packing(arguments, _request(slurm), parts)
    return steps.submit_steps(packing.jobs, packing.out.absolute().parent, [packing.out], dry_run)


@_add
@command("predict", summary=_steps_summary, epilog=PREDICT_EXAMPLES, passes_on=True)
@slurm_options
@parts_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS OF PREDICT...")
def submit_predict(
    parts: int, dry_run: bool, arguments: tuple[str, ...], **slurm: Unpack[SlurmOptions]
) -> StepsSubmission:
    """Queue masks of many photos: an array job, each task a part, and a job that checks all.

    Photos that are done are not done again, by a task that comes back or by the same line.
    """
    from portrait_dist.commands.predict import check_options, labels_of, predict
    from portrait_dist.errors import InputError
    from portrait_dist.inference import batch
    from portrait_dist.slurm import steps

    given = _parsed(predict, "predict", arguments, ("part", "finish"))
    if slurm["gpus_per_node"] > 1:
        raise InputError("--gpus-per-node: a part uses one GPU; give 1 and more --parts")
    if given["out"] == "-":
        raise InputError("--out -: jobs write files; give a folder that all nodes see")
    labels = labels_of(given)
    check_options(given["paths"], labels, given["kinds"], given["image_format"])
    photos = batch.count_photos(given["checkpoint"], given["paths"], given["out"], labels)
    jobs = steps.in_parts("predict", arguments, _request(slurm), parts, photos)
    out = Path(given["out"])
    return steps.submit_steps(jobs, out.absolute().parent, [out], dry_run)


@_add
@command("evaluate", summary=_steps_summary, epilog=EVALUATE_EXAMPLES, passes_on=True)
@slurm_options
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="OPTIONS OF EVALUATE...")
def submit_evaluate(
    dry_run: bool, arguments: tuple[str, ...], **slurm: Unpack[SlurmOptions]
) -> StepsSubmission:
    """Queue the scores of a checkpoint, on every rank of all nodes.

    They are written to --out, by default scores-SPLIT.json beside the checkpoint.
    """
    from portrait_dist import evaluation
    from portrait_dist.commands.evaluate import evaluate
    from portrait_dist.runs.scores import scores_file
    from portrait_dist.slurm import steps

    given = _parsed(evaluate, "evaluate", arguments, ())
    run = Path(given["checkpoint"]).absolute().parent
    evaluation.check_inputs(given["checkpoint"], given["shards"], given["split"])
    out = () if given["out"] else (f"--out={scores_file(run, given['split'])}",)
    jobs = [steps.StepJob("evaluate", _request(slurm), ["evaluate", *arguments, *out])]
    return steps.submit_steps(jobs, run.parent, [run], dry_run)


@_add
@command("pipeline", summary=_steps_summary, epilog=PIPELINE_EXAMPLES, passes_on=True)
@options.recipe("Recipe of the training")
@slurm_options
@parts_option
@click.option("--data", required=True, help="What to pack: see 'portrait-dist pack --help'.")
@click.option(
    "--pack-cpus", default=0, type=click.IntRange(0), help="CPUs of each task that packs."
)
@click.option(
    "--evaluate-split",
    default="test",
    show_default=True,
    type=click.Choice(["train", "val", "test"]),
    help="Split that the best checkpoint is scored on.",
)
@click.argument(
    "arguments",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[OPTIONS OF PACK]... [KEY=VALUE]...",
)
def submit_pipeline(
    recipe: str,
    parts: int,
    data: str,
    pack_cpus: int,
    evaluate_split: str,
    dry_run: bool,
    arguments: tuple[str, ...],
    **slurm: Unpack[SlurmOptions],
) -> StepsSubmission:
    """Queue the whole way: pack, train, evaluate, report; each waits for the one before.

    data.shards names the folder that is packed and trained with. Settings are those of
    'portrait-dist train', options those of 'portrait-dist pack'. The same line again continues.
    """
    from portrait_dist.slurm import steps

    request = _request(slurm)
    settings = [argument for argument in arguments if SETTING.match(argument)]
    others = [argument for argument in arguments if not SETTING.match(argument)]
    shards = steps.shards_folder(recipe, settings)
    on_cpus = _request(slurm | {"gpus_per_node": 0, "cpus_per_node": pack_cpus})
    packing = _packing((f"--data={data}", f"--out={shards}", *others), on_cpus, parts)
    jobs, loaded = steps.pipeline(
        packing.jobs, recipe, settings, request, packing.packed, evaluate_split
    )
    run = loaded.run_dir
    # Not of the shards: only the run's folder says how far its training is.
    return steps.submit_steps(jobs, run.absolute().parent, [run], dry_run)


@dataclass(frozen=True)
class _Packing:
    """A packing that was checked: its jobs, where it goes, and what it will give."""

    jobs: list[StepJob]
    out: Path
    packed: Packed


def _packing(arguments: tuple[str, ...], request: Request, parts: int) -> _Packing:
    """Check a packing, and make its jobs."""
    from portrait_dist.commands.pack import pack
    from portrait_dist.data.shards import writer
    from portrait_dist.errors import InputError
    from portrait_dist.slurm import steps

    given = _parsed(pack, "pack", arguments, ("part", "finish"))
    if given["append"]:
        raise InputError("--append: one process appends; run 'portrait-dist pack --append' itself")
    names = ("data", "out", "size", "samples_per_shard", "codec", "quality", "fit")
    plan = writer.plan_pack(**{name: given[name] for name in names})
    jobs = steps.in_parts("pack", arguments, request, parts, plan.shards)
    packed = steps.Packed(plan.samples["train"], (given["size"], given["fit"]))
    return _Packing(jobs, given["out"], packed)


def _parsed(
    step: click.Command, name: str, arguments: tuple[str, ...], refused: tuple[str, ...]
) -> dict[str, Any]:
    """Parse the arguments of another command as that command would.

    Raises:
        InputError: one of ``refused`` is among them; the jobs give it themselves.
    """
    from portrait_dist.errors import InputError

    with step.make_context(f"portrait-dist {name}", list(arguments)) as context:
        given = dict(context.params)
    for option in refused:
        if given.get(option):
            raise InputError(f"--{option}: the jobs give it themselves; leave it out")
    return given
