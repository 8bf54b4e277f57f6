"""``submit``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command, options

if TYPE_CHECKING:
    from portrait_dist.slurm.submit import Submission

EXAMPLES = """\b
Examples:
  portrait-dist submit --nodes 2 --gpus-per-node 8 --time 8:00:00 data.shards=/shared/shards
  portrait-dist submit --array train.lr=1e-3,3e-4 --gpus-per-node 1 data.shards=/shared/shards
  portrait-dist submit --dry-run data.shards=shards
"""


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


@command("submit", summary=_summary, epilog=EXAMPLES)
@options.recipe("Recipe")
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1), help="Nodes.")
@click.option(
    "--gpus-per-node",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="GPUs and ranks on each node.",
)
@click.option(
    "--cpus-per-node",
    default=0,
    type=click.IntRange(0),
    help="CPUs on each node.  [default: 8 for each GPU]",
)
@click.option(
    "--time",
    default="",
    help="Time limit of one attempt, such as 8:00:00; the job saves before it and requeues itself.",
)
@click.option("--partition", default="", help="Partition of the cluster.")
@click.option("--account", default="", help="Account to charge.")
@click.option(
    "--array",
    multiple=True,
    metavar="KEY=V1,V2",
    help="An array job with one run for each value; repeat for a grid.",
)
@click.option(
    "--sbatch",
    "extra",
    multiple=True,
    metavar="OPTION",
    help="One more option for sbatch, such as --sbatch=--qos=long.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and print the sbatch command, but queue nothing.",
)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
def submit(
    recipe: str,
    nodes: int,
    gpus_per_node: int,
    cpus_per_node: int,
    time: str,
    partition: str,
    account: str,
    array: tuple[str, ...],
    extra: tuple[str, ...],
    dry_run: bool,
    settings: tuple[str, ...],
) -> Submission:
    """Queue a training job on SLURM, after a check of everything that would fail later.

    The settings are those of 'portrait-dist train'. The same line again resumes a run.
    """
    from portrait_dist.slurm.submit import Request, submit

    request = Request(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        time=time,
        partition=partition,
        account=account,
        array=array,
        extra=extra,
    )
    return submit(recipe, settings, request, dry_run)
