"""Measure an epoch over remote shards with an empty cache: prefetched, not prefetched, local.

    python benchmarks/remote.py [--json OUT]

A server on loopback, in a process of its own, gives the shards as an object store does:
``--latency`` seconds until the first byte (S3: 0.1 to 0.2, by its performance guide), then
``--megabytes`` a second on each connection. Every round begins with an empty cache. Rows, for the
orders full and block: portrait_dist (prefetching), without-prefetching (a decoding thread fetches a
shard when it meets it), local. ``first_batch_seconds`` is the median time until then.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import loader as loader_benchmark
import measure

from portrait_dist.data import build_loader
from portrait_dist.data.shards import writer
from portrait_dist.data.shards.cache import Cache
from portrait_dist.data.source import split, synthetic
from portrait_dist.system.info import cores

BATCH = 16
PIECE = 1 << 18


class Store(http.server.SimpleHTTPRequestHandler):
    """Gives files with a delay before the first byte and a limited speed after it."""

    latency = 0.0
    speed = 0.0

    def copyfile(self, source: object, outputfile: object) -> None:
        time.sleep(self.latency)
        begin, sent = time.perf_counter(), 0
        while piece := source.read(PIECE):  # type: ignore[attr-defined]
            outputfile.write(piece)  # type: ignore[attr-defined]
            sent += len(piece)
            time.sleep(max(0.0, begin + sent / self.speed - time.perf_counter()))

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: str, latency: float, megabytes: float) -> None:
    """Serve a folder, and write the port to stdout."""
    Store.latency, Store.speed = latency, megabytes * 1e6
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Store, directory=folder)
    ) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def prepare(work: Path, options: argparse.Namespace) -> Path:
    """Pack shards of generated portraits, each many times over."""
    synthetic.generate(work / "raw", options.pairs, seed=1)
    copies = -(-options.samples_per_shard * options.shards // options.pairs)
    split.prepare(
        loader_benchmark.repeated(work / "raw", work / "repeated", copies),
        work / "tree",
        val_fraction=0.0,
        test_fraction=0.0,
    )
    writer.pack(work / "tree", work / "shards", (256, 256), options.samples_per_shard)
    return work / "shards"


def epoch(
    shards: str,
    work: Path,
    order: str,
    downloads: int,
    options: argparse.Namespace,
    firsts: list[float],
) -> measure.Round:
    """Read one epoch with an empty cache; the server's CPU time does not count."""
    shutil.rmtree(work / "cache", ignore_errors=True)
    given = {
        "order": order,
        "block_samples": options.block_shards * options.samples_per_shard,
        "cache": Cache(work / "cache", parallel_downloads=downloads),
    }

    def read() -> int:
        images, begin = 0, time.perf_counter()
        for batch in build_loader(shards, "train", BATCH, workers=options.workers, **given):
            if not images:
                firsts.append(time.perf_counter() - begin)
            images += len(batch)
        return images

    return measure.timed(read, children=False)


def rows_of(
    shards: Path, address: str, work: Path, options: argparse.Namespace
) -> list[measure.Row]:
    """Measure all ways in both orders."""
    kinds = {
        "portrait_dist": (address, Cache().parallel_downloads),
        "without-prefetching": (address, 0),
        "local": (str(shards), 0),
    }
    rows = []
    for order in ("full", "block"):
        firsts: dict[str, list[float]] = {name: [] for name in kinds}
        cases: dict[str, measure.Case] = {
            name: functools.partial(epoch, place, work, order, downloads, options, firsts[name])
            for name, (place, downloads) in kinds.items()
        }
        for name, rounds in measure.alternate(cases, options.repeats).items():
            rows.append(
                measure.row(
                    name,
                    rounds,
                    order=order,
                    first_batch_seconds=round(statistics.median(firsts[name]), 2),
                )
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Serve the shards, or measure them."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=128, help="generated pairs (default 128)")
    parser.add_argument("--shards", type=int, default=16, help="shards (default 16)")
    parser.add_argument("--samples-per-shard", type=int, default=1024, help="(default 1024)")
    parser.add_argument(
        "--block-shards",
        type=int,
        default=4,
        help="shards in a block of the block order (default 4)",
    )
    parser.add_argument(
        "--workers", type=int, default=cores(), help="decoding threads (default: the cores)"
    )
    parser.add_argument(
        "--latency", type=float, default=0.1, help="seconds to the first byte (default 0.1)"
    )
    parser.add_argument(
        "--megabytes", type=float, default=85.0, help="MB/s of each connection (default 85)"
    )
    parser.add_argument("--serve", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or 5
    if options.serve:
        serve(options.serve, options.latency, options.megabytes)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shards = prepare(work, options)
        network = ["--latency", str(options.latency), "--megabytes", str(options.megabytes)]
        command = [sys.executable, __file__, "--serve", str(shards), *network]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = f"http://127.0.0.1:{int(server.stdout.readline())}"
            rows = rows_of(shards, address, work, options)
        finally:
            server.terminate()
            server.wait()
    facts = {"latency_seconds": options.latency, "megabytes_per_second": options.megabytes}
    measure.publish(measure.result("remote", rows, **facts), options.json)


if __name__ == "__main__":
    main()
