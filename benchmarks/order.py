"""Measure what planning costs: the order is arithmetic, so it takes no table at any scale.

    uv run python benchmarks/order.py [--json OUT]

For each number of samples and ranks, a fresh process plans the last rank's whole slice of an epoch
(every position, and the sample at it, batch by batch). Rows: samples planned per second,
nanoseconds and CPU seconds a sample, and peak memory above the imports. ``table_megabytes`` is what
a permutation of the split would take as an int64 array, as samplers that draw one do, on every
rank.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from typing import Any

import measure

SAMPLES = (10**6, 10**7, 10**8, 10**9)
RANKS = (1, 8, 64, 512, 4096)
MOST_PLANNED = 2_500_000
"""Samples planned in one case: an epoch of one rank at 10^9 samples and 512 ranks is 2 million."""
BATCH_SIZE = 16
BLOCK_SAMPLES = 16384
SAMPLES_PER_SHARD = 10_000


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Plan all cases, or one of them in this process."""
    parser = measure.arguments(__doc__)
    parser.add_argument(
        "--plan", nargs=3, metavar=("KIND", "SAMPLES", "RANKS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args(arguments)
    if options.plan:
        kind, samples, ranks = options.plan
        print(json.dumps(plan(kind, int(samples), int(ranks))))
        return {}
    cases = [
        (kind, samples, ranks)
        for kind in ("full", "block")
        for samples in (SAMPLES[:1] if options.quick else SAMPLES)
        for ranks in RANKS
        if samples / ranks <= MOST_PLANNED
    ]
    rows = [row_of(*case, repeats=options.repeats or 1) for case in cases]
    found = measure.result("order", rows)
    measure.publish(found, options.json)
    return found


def plan(kind: str, samples: int, ranks: int) -> dict[str, Any]:
    """Plan one rank's epoch in this process, and say what it took."""
    import numpy as np

    from portrait_dist.data.stream.order import BatchPlan, Order

    sizes = np.full(-(-samples // SAMPLES_PER_SHARD), SAMPLES_PER_SHARD)
    sizes[-1] -= sizes.sum() - samples
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def plan_epoch() -> int:
        order = Order(
            samples,
            0,
            kind,
            block_samples=BLOCK_SAMPLES,
            shard_sizes=sizes if kind == "block" else None,
        )
        batches = BatchPlan(samples, BATCH_SIZE, ranks - 1, ranks)
        planned, at_once = 0, 4096 // BATCH_SIZE  # as many batches as the loader plans at a time
        for first in range(0, batches.batches, at_once):
            last = min(first + at_once, batches.batches)
            spans = [np.arange(*batches.span(batch)) for batch in range(first, last)]
            planned += len(order.samples_at(0, np.concatenate(spans)))
        return planned

    found = measure.timed(plan_epoch)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"rate": found.rate, "cpu_seconds": found.cpu_seconds, "megabytes": grown / 1000}


def row_of(kind: str, samples: int, ranks: int, repeats: int) -> measure.Row:
    """Measure one case, each round in a fresh process."""
    command = [sys.executable, __file__, "--plan", kind, str(samples), str(ranks)]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    rounds = [measure.Round(run["rate"], run["cpu_seconds"]) for run in runs]
    line = measure.row(f"{kind}-{samples}-{ranks}", rounds, "samples_per_second")
    line["cpu_seconds_per_sample"] = line.pop("cpu_seconds_per_image")
    return line | {
        "order": kind,
        "samples": samples,
        "ranks": ranks,
        "ns_per_sample": round(1e9 / line["samples_per_second"], 1),
        "megabytes": round(statistics.median(run["megabytes"] for run in runs), 1),
        "table_megabytes": samples * 8 / 1e6,
    }


if __name__ == "__main__":
    main()
