"""One task of an array job; the task that has the array's own number requeues itself once.

    python -m tests.array_job FOLDER

Every attempt of a task leaves a file ``<task>-<restarts>``, which names its node. The other task
waits for the second attempt, so that it runs when SLURM is asked for the requeue.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from portrait_dist.slurm.allocation import Allocation, job_state, node_name
from portrait_dist.slurm.job import requeue
from tests.waiting import wait_for


def main() -> None:
    folder, allocation = Path(sys.argv[1]), Allocation.from_environment()
    first = allocation.label.partition("_")[0] == str(allocation.job)
    (folder / f"{allocation.array_task}-{allocation.restarts}").write_text(node_name())
    if not first:
        wait_for(lambda: list(folder.glob("*-1")), 90, "the first task is back")
    elif allocation.restarts == 0:
        wait_for(lambda: len(list(folder.glob("*-0"))) == 2, 60, "the other task runs")
        assert job_state(allocation.label) == "RUNNING"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which comes with the requeue, as in a job
        requeue(allocation, [node_name()])
        while True:
            signal.pause()  # until SLURM kills this attempt


if __name__ == "__main__":
    main()
