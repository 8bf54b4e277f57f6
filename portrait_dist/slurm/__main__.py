"""``python -m portrait_dist.slurm job …`` and ``… node …``: the inside of a SLURM job."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from portrait_dist.errors import PortraitDistError


def main(arguments: Sequence[str]) -> int:
    """Run ``job [--step LOGS] ARGUMENTS…``, ``check LOGS DEVICE`` or ``node ADDRESS LOGS …``."""
    try:
        if arguments[0] == "node":
            from portrait_dist.slurm.node import run_node

            return run_node(arguments[1], arguments[2], arguments[3:])
        if arguments[0] == "check":
            from portrait_dist.slurm.node_check import check_node

            return check_node(arguments[1], arguments[2])
        if arguments[1:2] == ["--step"]:
            from portrait_dist.slurm.step_job import run_step

            return run_step(arguments[2:])
        from portrait_dist.slurm.job import run_job

        return run_job(arguments[1:])
    except PortraitDistError as error:
        print(f"portrait-dist: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
