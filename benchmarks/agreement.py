"""What the ranks' agreement on a stop costs per step, on gloo processes of this machine.

    python benchmarks/agreement.py --json agreement.json          # 2 to 64 processes
    python benchmarks/agreement.py --quick                        # 2 and 4 processes

Each process runs steps that only sleep, and exchanges its request after each one, as the trainer
does. Rows: ``every-step`` exchanges in each step and reads in the next one (the trainer before the
interval grew with the number of ranks); ``interval`` is the trainer's. The cost of a row is what
the process spends in the exchange: waiting, and CPU time of all its threads. The processes share
the cores of one machine, so that waits of many of them are upper bounds: ``hop_microseconds`` is
what one of the 2 (N - 1) messages of a ring takes, measured without other work, and with it the
rows for 512 and 4,096 ranks are computed (``extrapolated``): the exchange's duration, and how long
a step would wait for it.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import measure

from portrait_dist.system.info import cores
from portrait_dist.training.preemption import NOTHING, Agreement, exchange_interval

SIZES = (2, 4, 8, 16, 32, 64)
EXTRAPOLATED = (512, 4096)
STEP_SECONDS = 0.010
"""A step of the U-Net with 16 images on an H100 takes about as long."""


@dataclass
class Row:
    """One number of ranks.

    Attributes:
        name: ``every-step`` or ``interval``, and the number of ranks.
        ranks: number of processes.
        interval: steps between two exchanges.
        wait_ms: mean over the ranks of the time a step waits in the exchange, milliseconds.
        cpu_ms: CPU time of a step's exchange, all threads of a process, milliseconds.
        hop_microseconds: duration of an exchange without other work / 2 (N - 1).
        extrapolated: whether the row is computed from the hop instead of measured.
    """

    name: str
    ranks: int
    interval: int
    wait_ms: float
    cpu_ms: float
    hop_microseconds: float
    extrapolated: bool = False


def rank_process(rank: int, ranks: int, interval: int, steps: int, folder: str) -> None:
    """Run the steps of one rank and write what its exchanges cost."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=300),
    )
    agreement = Agreement(300)
    agreement.interval = interval
    alone = _seconds_of_an_exchange(agreement, steps)
    idle = _run(steps, None)
    busy = _run(steps, agreement)
    agreement.finish()
    dist.barrier()
    found = {
        "wait": busy["wait"] / steps,
        "cpu": max(busy["cpu"] - idle["cpu"], 0.0) / steps,
        "alone": alone,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def _seconds_of_an_exchange(agreement: Agreement, count: int) -> float:
    """Return the fastest of many exchanges with nothing between submission and result."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        agreement.submit()
        agreement.finish()
        times.append(time.perf_counter() - begin)
    return min(times)


def _run(steps: int, agreement: Agreement | None) -> dict[str, float]:
    wait, cpu = 0.0, time.process_time()
    for _ in range(steps):
        time.sleep(STEP_SECONDS)
        begin = time.perf_counter()
        if agreement is not None:
            agreement.exchange(NOTHING)
        wait += time.perf_counter() - begin
    return {"wait": wait, "cpu": time.process_time() - cpu}


def run_ranks(ranks: int, interval: int, steps: int, name: str) -> Row:
    """Start the processes of one row."""
    # Forked: torch is imported once, by the parent, and has run nothing yet.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=rank_process, args=(rank, ranks, interval, steps, folder))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise SystemExit(f"a rank of {ranks} ended with {process.exitcode}")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return Row(
        f"{name} {ranks}",
        ranks,
        interval,
        wait_ms=1e3 * sum(one["wait"] for one in found) / ranks,
        cpu_ms=1e3 * sum(one["cpu"] for one in found) / ranks,
        hop_microseconds=1e6 * min(one["alone"] for one in found) / (2 * (ranks - 1)),
    )


def extrapolate(ranks: int, interval: int, hop_microseconds: float, name: str) -> Row:
    """Compute what a step waits: the part of a ring's duration that the interval does not cover."""
    duration = 2 * (ranks - 1) * hop_microseconds * 1e-6
    wait = max(0.0, duration - interval * STEP_SECONDS) / interval
    return Row(f"{name} {ranks}", ranks, interval, 1e3 * wait, 0.0, hop_microseconds, True)


def main(arguments: list[str] | None = None) -> None:
    """Measure, extrapolate, print and write the rows."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--most", type=int, default=64, help="processes of the largest row")
    options = parser.parse_args(arguments)
    sizes = (2, 4) if options.quick else tuple(n for n in SIZES if n <= options.most)
    steps = 30 if options.quick else 200
    rows = []
    for ranks in sizes:
        rows.append(run_ranks(ranks, 1, steps, "every-step"))
        rows.append(run_ranks(ranks, exchange_interval(ranks, 10**6), steps, "interval"))
        print(f"  {ranks} processes done", file=sys.stderr, flush=True)
    # Of the rows whose processes have a core each or two share one: more of them measure the queue.
    hop = max(row.hop_microseconds for row in rows if row.ranks <= 2 * cores())
    for ranks in EXTRAPOLATED:
        rows.append(extrapolate(ranks, 1, hop, "every-step"))
        rows.append(extrapolate(ranks, exchange_interval(ranks, 10**6), hop, "interval"))
    found = measure.result("agreement", [asdict(row) for row in rows], step_seconds=STEP_SECONDS)
    measure.publish(found, options.json)


if __name__ == "__main__":
    main()
