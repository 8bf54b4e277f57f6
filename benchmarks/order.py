"""What planning costs: the order is arithmetic, so it takes no table and no time, at any scale.

    uv run python benchmarks/order.py [--json OUT]

For each number of samples and ranks, one fresh process plans the last rank's whole slice of an epoch (every position, and the
sample at it, batch by batch) and reports wall time and peak memory above the imports. ``table`` is what a permutation of the
split would take as an int64 array, as samplers that draw one do, on every rank.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SAMPLES = (10**6, 10**7, 10**8, 10**9)
RANKS = (1, 8, 64, 512, 4096)
MOST_PLANNED = 2_500_000
"""Samples planned in one measurement: an epoch of one rank at 10^9 samples and 512 ranks is 2 million."""
BATCH_SIZE = 16
BLOCK_SAMPLES = 16384
SAMPLES_PER_SHARD = 10_000


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", dest="out", metavar="OUT", help="write the rows as JSON")
    options.add_argument(
        "--measure", nargs=3, metavar=("KIND", "SAMPLES", "RANKS"), help=argparse.SUPPRESS
    )
    chosen = options.parse_args()
    if chosen.measure:
        kind, samples, ranks = chosen.measure
        print(json.dumps(measure(kind, int(samples), int(ranks))))
        return
    rows = []
    print(
        f"{'order':6} {'samples':>13} {'ranks':>6} {'planned':>10} {'seconds':>8} {'ns/sample':>10} {'MB':>6} {'table MB':>9}"
    )
    for kind in ("full", "block"):
        for samples in SAMPLES:
            for ranks in RANKS:
                if samples / ranks <= MOST_PLANNED:
                    rows.append(in_a_fresh_process(kind, samples, ranks))
                    show(rows[-1])
    if chosen.out:
        machine = {
            "platform": platform.platform(),
            "processor": platform.processor(),
            "python": platform.python_version(),
        }
        Path(chosen.out).write_text(json.dumps({"rows": rows, "machine": machine}, indent=1) + "\n")


def measure(kind: str, samples: int, ranks: int) -> dict[str, Any]:
    """Plan one rank's epoch in this process."""
    import numpy as np

    from portrait_dist.data.stream.order import BatchPlan, Order

    sizes = np.full(-(-samples // SAMPLES_PER_SHARD), SAMPLES_PER_SHARD)
    sizes[-1] -= sizes.sum() - samples
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    order = Order(
        samples,
        0,
        kind,
        block_samples=BLOCK_SAMPLES,
        shard_sizes=sizes if kind == "block" else None,
    )
    plan = BatchPlan(samples, BATCH_SIZE, ranks - 1, ranks)
    planned = check = 0
    at_once = 4096 // BATCH_SIZE  # batches, as the loader does
    for first in range(0, plan.batches, at_once):
        chosen = order.samples_at(0, np.concatenate(plan.positions(first, first + at_once)))
        planned += len(chosen)
        check ^= int(chosen[-1])
    seconds = time.perf_counter() - begin
    return {
        "name": f"{kind}-{samples}-{ranks}",
        "order": kind,
        "samples": samples,
        "ranks": ranks,
        "planned": planned,
        "seconds": seconds,
        "ns_per_sample": seconds / planned * 1e9,
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000,
        "table_megabytes": samples * 8 / 1e6,
    }


def in_a_fresh_process(kind: str, samples: int, ranks: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--measure", kind, str(samples), str(ranks)]
    row: dict[str, Any] = json.loads(
        subprocess.run(words, capture_output=True, text=True, check=True).stdout
    )
    return row


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['order']:6} {row['samples']:13,} {row['ranks']:6,} {row['planned']:10,} {row['seconds']:8.3f} "
        f"{row['ns_per_sample']:10.0f} {row['megabytes']:6.1f} {row['table_megabytes']:9,.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
