"""``python -m portrait_dist.slurm job …`` and ``… node …``: the inside of a SLURM job."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from portrait_dist.errors import PortraitDistError


def main(arguments: Sequence[str]) -> int:
    """Run ``job [--container …] [--step LOGS] …``, ``check LOGS DEVICE`` or ``node ADDRESS …``."""
    try:
        if arguments[0] == "node":
            from portrait_dist.slurm.node import run_node

            return run_node(arguments[1], arguments[2], arguments[3:])
        if arguments[0] == "check":
            from portrait_dist.slurm.node_check import check_node

            return check_node(arguments[1], arguments[2])
        from portrait_dist.slurm.container import split_arguments

        container, rest = split_arguments(arguments[1:])
        if rest[:1] == ["--step"]:
            from portrait_dist.slurm.step_job import run_step

            return run_step(rest[1:], container)
        from portrait_dist.slurm.job import run_job

        return run_job(rest, container)
    except PortraitDistError as error:
        print(f"portrait-dist: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
