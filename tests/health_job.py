"""A small training of several ranks that watches their health; one rank can be made sick.

torchrun --nproc-per-node 2 -m tests.health_job FOLDER SICKNESS

SICKNESS is ``none``, ``asleep`` (rank 1 sleeps in a forward), ``slow-data`` or ``slow-compute``
(rank 1 takes longer), or ``stopped`` (rank 1 stops itself as by SIGSTOP).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from portrait_dist import distributed
from portrait_dist.runs.folder import RunFolder
from portrait_dist.runs.health import Activity
from portrait_dist.training.health import Health, explain, record_collectives

SICK_BATCH = 8
SECONDS = 0.04


def batches(sickness: str) -> Iterator[int]:
    """Count batches; those of a rank with slow data come late."""
    for number in range(160 if sickness.startswith("slow") else 20):
        if sickness == "slow-data" and distributed.rank() == 1:
            time.sleep(SECONDS)  # the fault itself
        yield number


def compute(net: torch.nn.Module, sickness: str, number: int) -> torch.Tensor:
    """Forward a batch, with what the sickness does to it."""
    if distributed.rank() == 1 and number == SICK_BATCH:
        if sickness == "asleep":
            threading.Event().wait()
        if sickness == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
    if sickness == "slow-compute" and distributed.rank() == 1:
        time.sleep(SECONDS)  # likewise
    time.sleep(0.01)  # each rank's own work; backward takes another
    return net(torch.ones(4, 8)).sum()


def train(health: Health, net: torch.nn.Module, sickness: str) -> None:
    """Train as the training loop does."""
    with health.training():
        for number in batches(sickness):
            health.begin_batch()
            loss = compute(net, sickness, number)
            health.enter(Activity.EXCHANGE)
            loss.backward()
            health.enter(Activity.OTHER)
            health.end_batch()
            if number % 5 == 4:
                health.exchange()
            health.enter(Activity.DATA)


def main() -> int:
    """Train; on an error print which rank it is about."""
    folder, sickness = RunFolder(Path(sys.argv[1])), sys.argv[2]
    record_collectives(folder.path)
    distributed.start(torch.device("cpu"), 60)
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    health = Health.start(folder, timeout_seconds=60, step_timeout_seconds=10)
    try:
        train(health, net, sickness)
    except RuntimeError as error:
        stall = explain(error, folder)
        print(f"EXPLAINED {stall.message if stall else error}", flush=True)
        os._exit(1)
    health.close()
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
