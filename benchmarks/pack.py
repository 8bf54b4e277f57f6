"""Measure packing: pairs a second and CPU seconds a pair, for one and two processes.

    uv run python benchmarks/pack.py [--json OUT] [--pairs 160]

Generated pairs of 600x800 (JPEG and RGBA PNG) are packed to 256x256 and at original size, by one
process with one thread and with two, and by two processes of one thread, each its part of the
shards. Beside it stands decoding alone: the JPEG and the alpha of the PNG, nothing else. Imports
and the encoder's fingerprint come before the clock. ``arithmetic`` says what follows for larger
sets on nodes of many cores, where reading is not what limits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

PAIRS, QUICK_PAIRS = 160, 12
SHARD = 8
CORES_PER_NODE = 64
SETS = {"AISegment": 34_427, "10^8 pairs": 10**8}
NODES = (1, 4, 16, 64)
SIZES: dict[str, tuple[int, int] | None] = {"256x256": (256, 256), "original": None}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Make the pairs, pack them in alternating rounds, and publish the rows."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="generated pairs")
    options = parser.parse_args(arguments)
    pairs = QUICK_PAIRS if options.quick else options.pairs
    repeats = options.repeats or (1 if options.quick else 5)
    with tempfile.TemporaryDirectory(prefix="pack-") as folder:
        data = prepared(Path(folder), pairs)
        cases: dict[str, measure.Case] = {"decoding alone": case(data, "decode", 1, 1)}
        for size in list(SIZES)[: 1 if options.quick else None]:
            cases[f"{size}, 1 process"] = case(data, size, 1, 1)
            if not options.quick:
                cases[f"{size}, 1 process, 2 threads"] = case(data, size, 1, 2)
            cases[f"{size}, 2 processes"] = case(data, size, 2, 1)
        rounds = measure.alternate(cases, repeats, warm_up=not options.quick)
    rows = []
    for name, taken in rounds.items():
        line = measure.row(name, taken, "pairs_per_second")
        line["cpu_seconds_per_pair"] = line.pop("cpu_seconds_per_image")
        rows.append(line)
    found = measure.result("pack", rows, pairs=pairs, arithmetic=arithmetic(rows))
    measure.publish(found, options.json)
    print(measure.table(found["arithmetic"]))
    return found


def prepared(folder: Path, pairs: int) -> Path:
    """Generate pairs and split them; the prepared folder."""
    from portrait_dist.data.source import split, synthetic

    synthetic.generate(folder / "raw", pairs, seed=1)
    split.prepare(folder / "raw", folder / "data")
    return folder / "data"


def case(data: Path, what: str, processes: int, threads: int) -> Callable[[], measure.Round]:
    """Return what packs all pairs once, or decodes them."""

    def run() -> measure.Round:
        with tempfile.TemporaryDirectory(prefix="pack-out-") as out:
            arguments = [sys.executable, __file__, "--work", str(data), f"{out}/shards", what]
            workers = [
                subprocess.Popen(
                    [*arguments, str(part), str(processes), str(threads)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for part in range(processes)
            ]
            for worker in workers:
                assert worker.stdout
                worker.stdout.readline()  # it has imported everything
            for worker in workers:
                assert worker.stdin
                worker.stdin.write("\n")
                worker.stdin.flush()
            found = [json.loads(worker.communicate()[0]) for worker in workers]
        done = sum(one["pairs"] for one in found)
        seconds = max(one["seconds"] for one in found)
        return measure.Round(done / seconds, sum(one["cpu_seconds"] for one in found) / done)

    return run


def work(data: str, out: str, what: str, part: int, parts: int, threads: int) -> None:
    """Pack a part when a line comes, and print what it took."""
    from portrait_dist.data.shards.encode import Settings
    from portrait_dist.data.shards.fingerprint import encoder_fingerprint
    from portrait_dist.data.shards.writer import pack

    size = SIZES.get(what)
    if what in SIZES:
        encoder_fingerprint(Settings(size, "jpeg", 95, SHARD))
    print("ready", flush=True)
    sys.stdin.readline()
    begin, cpu = time.perf_counter(), time.process_time()
    if what == "decode":
        pairs = decode(data)
    else:
        pairs = pack(data, out, size, SHARD, threads, part=(part, parts)).packed
    taken = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({"pairs": pairs, **taken}))


def decode(data: str) -> int:
    """Decode every image and alpha, one after another."""
    import simplejpeg

    from portrait_dist.data.shards.png import decode_matte
    from portrait_dist.data.source.split import read_split

    split = read_split(data)
    pairs = [pair for name in ("train", "val", "test") for pair in split.pairs(name)]
    for pair in pairs:
        simplejpeg.decode_jpeg(Path(pair.image).read_bytes(), "RGB")
        decode_matte(Path(pair.matte).read_bytes())
    return len(pairs)


def arithmetic(rows: list[measure.Row]) -> list[measure.Row]:
    """Work out the hours for larger sets from the CPU seconds a pair, every core busy."""
    spent = {row["name"]: row["cpu_seconds_per_pair"] for row in rows}
    return [
        {
            "name": f"{name}, {size}",
            "pairs": pairs,
            "nodes": nodes,
            "cores_per_node": CORES_PER_NODE,
            "cpu_hours": rounded(pairs * spent[f"{size}, 1 process"] / 3600),
            "minutes": rounded(pairs * spent[f"{size}, 1 process"] / (nodes * CORES_PER_NODE) / 60),
        }
        for name, pairs in SETS.items()
        for size in SIZES
        if f"{size}, 1 process" in spent
        for nodes in NODES
    ]


def rounded(value: float) -> float:
    """Round to three significant digits."""
    return float(f"{value:.3g}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        data, out, what, *numbers = sys.argv[2:]
        part, parts, threads = map(int, numbers)
        work(data, out, what, part, parts, threads)
    else:
        main()
