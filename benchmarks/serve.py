r"""The service under load: requests/s beside the engine's own speed, latency, overload, memory.

    python benchmarks/serve.py --checkpoint runs/NAME/ckpt_best.pth --photos portraits/
    python benchmarks/serve.py --checkpoint … --photos … --minutes 10     # is its memory flat?

The engine is ``PortraitSegmenter.stream`` over the same files, with the masks encoded by threads:
what ``predict`` does without writing. The service is a process of its own, asked by ``--clients``
connections at a time; the clients' CPU time is not counted. Overload asks four times as many
connections as it takes requests.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from threading import Lock

import measure
import psutil

from portrait_dist.inference import compositing, photos
from portrait_dist.inference.outputs import encode
from portrait_dist.inference.segmenter import PortraitSegmenter
from portrait_dist.system.info import cores
from portrait_dist.system.threads import submit_in_order

MAX_REQUESTS = 32


@dataclass
class Load:
    """What clients saw: seconds of each answer, and how many came with which status."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Server:
    """A running service."""

    host: str
    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def ask(self, bodies: Sequence[bytes], count: int, clients: int) -> Load:
        """Send ``count`` photos over ``clients`` connections."""
        load, lock, waiting = Load(), Lock(), islice(cycle(bodies), count)

        def client() -> None:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
            while True:
                with lock:
                    body = next(waiting, None)
                if body is None:
                    return connection.close()
                began = time.perf_counter()
                connection.request("POST", "/segment?output=mask", body)
                answer = connection.getresponse()
                answer.read()
                with lock:
                    load.seconds.append(time.perf_counter() - began)
                    load.statuses[answer.status] += 1

        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(client) for _ in range(clients)]:
                done.result()
        return load


@contextmanager
def served(checkpoint: str) -> Iterator[Server]:
    """Start the service at a free port; end it at the end."""
    command = [sys.executable, "-m", "portrait_dist", "serve", "--checkpoint", checkpoint]
    options = ["--port", "0", "--max-requests", str(MAX_REQUESTS)]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = process.stderr.readline().split()[2].rstrip(",").removeprefix("http://")
        host, port = address.split(":")
        yield Server(host, int(port), psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)


def run_engine(segmenter: PortraitSegmenter, files: Sequence[Path], count: int) -> int:
    """Predict and encode ``count`` masks."""
    chosen = list(islice(cycle(files), count))
    with ThreadPoolExecutor(cores()) as encoders:
        alphas = (alpha for _, alpha in segmenter.stream(chosen))
        encoded = submit_in_order(
            encoders, lambda alpha: encode(compositing.to_bytes(alpha), "png"), alphas, 16
        )
        return sum(bool(done.result()) for _, done in encoded)


def memory_over(server: Server, bodies: Sequence[bytes], minutes: float, clients: int) -> list[int]:
    """Megabytes in use after each tenth of some minutes under load."""
    found = []
    for tenth in range(1, 11):
        end = time.monotonic() + 6 * minutes
        while time.monotonic() < end:
            server.ask(bodies, 4 * clients, clients)
        found.append(round(server.process.memory_info().rss / 1e6))
        print(f"  {tenth} of 10: {found[-1]} MB", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure and publish."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--photos", required=True, type=Path, help="folder")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=0.0, help="watch the memory so long")
    options = parser.parse_args()
    found = photos.find_photos([str(options.photos)], Path("none")).photos[:64]
    files = [photo.path for photo in found]
    bodies = [file.read_bytes() for file in files]
    count = 64 if options.quick else 256
    segmenter = PortraitSegmenter.from_checkpoint(options.checkpoint)
    loads: list[Load] = []
    with served(options.checkpoint) as server:

        def service() -> measure.Round:
            cpu, began = server.cpu_seconds(), time.perf_counter()
            loads.append(server.ask(bodies, count, options.clients))
            seconds = time.perf_counter() - began
            return measure.Round(count / seconds, (server.cpu_seconds() - cpu) / count)

        cases = {
            "engine": lambda: measure.timed(lambda: run_engine(segmenter, files, count)),
            "service": service,
        }
        rounds = measure.alternate(cases, options.repeats or (2 if options.quick else 5))
        overload = server.ask(bodies, 4 * count, 4 * MAX_REQUESTS)
        memory = (
            memory_over(server, bodies, options.minutes, options.clients) if options.minutes else []
        )
    seconds = sorted(second for load in loads[1:] for second in load.seconds)
    rows = [
        measure.row("engine", rounds["engine"]),
        measure.row(
            "service",
            rounds["service"],
            clients=options.clients,
            median_ms=round(1e3 * statistics.median(seconds)),
            p99_ms=round(1e3 * seconds[int(0.99 * len(seconds))]),
            answers=json.dumps(sum((load.statuses for load in loads), Counter[int]())),
        ),
    ]
    ratio = rows[1]["images_per_second"] / rows[0]["images_per_second"]
    aims = {
        "service / engine, at least 0.9": round(ratio, 3),
        f"answers to {4 * MAX_REQUESTS} connections": json.dumps(overload.statuses),
    }
    if memory:
        aims[f"MB in use after each tenth of {options.minutes:g} minutes"] = memory
    facts = {"photos": len(files), "size": "x".join(map(str, segmenter.size))}
    measure.publish(
        measure.result("the service under load", rows, aims=aims, **facts), options.json
    )


if __name__ == "__main__":
    main()
