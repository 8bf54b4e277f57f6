"""Show which samples of an epoch each loader gives to four ranks: lost, repeated, uneven.

    python benchmarks/coverage.py --json coverage.json

Real processes in a gloo group, one for each rank, with batches of one sample; a few seconds each.
``repeated`` are samples that more than one rank has, ``lost`` those that no rank has, ``uneven``
whether some rank has another number of batches, where a collective in each step would hang. What
training needs is even, what evaluation needs is that nothing is lost and nothing repeated: the rows
of torch and portrait_dist have one for each.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import measure

RANKS = 4
SAMPLES = (57, 103)
SECONDS = 120
Samples = Callable[[int, int, Path], Iterable[Any]]
"""(number of samples, rank, folder of all ranks) → numbers of this rank's samples."""


# What each rank runs ------------------------------------------------------------------------------


def torch_sampler(samples: int, rank: int, folder: Path, *, drop_last: bool) -> Iterable[Any]:
    from torch.utils.data import DistributedSampler

    return DistributedSampler(list(range(samples)), RANKS, rank, drop_last=drop_last)  # type: ignore[arg-type]


def webdataset(samples: int, rank: int, folder: Path) -> Iterable[Any]:
    """Eight shards, split over the ranks by webdataset."""
    import webdataset as wds

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    stream = wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node)
    return (int(sample["__key__"]) for sample in stream)


def write_tars(samples: int, folder: Path) -> None:
    import io
    import tarfile

    for shard in range(8):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard, samples, 8):
                entry = tarfile.TarInfo(f"{number:06d}.txt")
                entry.size = 1
                tar.addfile(entry, io.BytesIO(b"x"))


def litdata(samples: int, rank: int, folder: Path) -> Iterable[Any]:
    import litdata as lit

    dataset = lit.StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=False)
    return (int(one) for one in dataset)


def write_litdata(samples: int, folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder / "litdata"), chunk_size=8)
    for number in range(samples):
        cache[number] = number
    cache.done()
    cache.merge()


def mosaicml(samples: int, rank: int, folder: Path) -> Iterable[Any]:
    import streaming

    dataset = streaming.StreamingDataset(
        local=str(folder / "mosaicml"), shuffle=True, batch_size=1, num_canonical_nodes=1
    )
    return (int(one["number"]) for one in dataset)


def write_mosaicml(samples: int, folder: Path) -> None:
    import streaming

    with streaming.MDSWriter(out=str(folder / "mosaicml"), columns={"number": "int"}) as writer:
        for number in range(samples):
            writer.write({"number": number})


def grain(samples: int, rank: int, folder: Path) -> Iterable[Any]:
    import grain as gr
    from grain import samplers, sharding

    shard = sharding.ShardOptions(rank, RANKS, drop_remainder=False)
    sampler = samplers.IndexSampler(samples, shard, shuffle=True, num_epochs=1, seed=1)
    return gr.DataLoader(data_source=range(samples), sampler=sampler, worker_count=0)


def lancedb(samples: int, rank: int, folder: Path) -> Iterable[Any]:
    import lancedb as lance
    from lancedb.streaming import StreamingDataset

    table = lance.connect(str(folder / "lancedb")).open_table("numbers")
    dataset = StreamingDataset(table, rank=rank, world_size=RANKS)
    return (int(row["number"]) for row in dataset)


def write_lancedb(samples: int, folder: Path) -> None:
    import lancedb as lance

    rows = [{"number": number} for number in range(samples)]
    lance.connect(str(folder / "lancedb")).create_table("numbers", rows)


def portrait_dist(samples: int, rank: int, folder: Path, *, drop_last: bool) -> Iterable[Any]:
    """One split of so many samples; a sample's number is its key's place among all keys."""
    from portrait_dist.data import build_loader

    shards = folder / "shards"
    loader = build_loader(shards, "train", 1, rank=rank, world_size=RANKS, drop_last=drop_last)
    return (key for batch in loader for key in batch.keys)


def write_portrait_dist(samples: int, folder: Path) -> None:
    from portrait_dist.data.shards import writer
    from portrait_dist.data.source import split, synthetic

    synthetic.generate(folder / "raw", samples, seed=1)
    split.prepare(folder / "raw", folder / "tree", val_fraction=0.0, test_fraction=0.0)
    writer.pack(folder / "tree", folder / "shards", (32, 32), 16)


def _nothing(samples: int, folder: Path) -> None: ...


LOADERS: dict[str, tuple[str, Callable[[int, Path], None], Samples]] = {
    "torch DistributedSampler": (
        "torch",
        _nothing,
        lambda *where: torch_sampler(*where, drop_last=False),
    ),
    "torch DistributedSampler, drop_last": (
        "torch",
        _nothing,
        lambda *where: torch_sampler(*where, drop_last=True),
    ),
    "webdataset": ("webdataset", write_tars, webdataset),
    "litdata": ("litdata", write_litdata, litdata),
    "mosaicml-streaming": ("streaming", write_mosaicml, mosaicml),
    "grain DataLoader": ("grain", _nothing, grain),
    "lancedb": ("lancedb", write_lancedb, lancedb),
    "portrait_dist, training": (
        "portrait_dist",
        write_portrait_dist,
        lambda *where: portrait_dist(*where, drop_last=True),
    ),
    "portrait_dist, evaluation": (
        "portrait_dist",
        write_portrait_dist,
        lambda *where: portrait_dist(*where, drop_last=False),
    ),
}


def one_rank(name: str, samples: int, rank: int, folder: Path) -> None:
    """Read an epoch on one rank and write what it had."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    seen = list(LOADERS[name][2](samples, rank, folder))
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


# The table ----------------------------------------------------------------------------------------


def measured(name: str, samples: int, folder: Path) -> measure.Row:
    """Run the ranks of one loader and count what they had."""
    LOADERS[name][1](samples, folder)
    port = _free_port()
    ranks = []
    for rank in range(RANKS):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        environment = {key: str(value) for key, value in numbers.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--rank", name, str(samples), str(rank), str(folder)]
        with open(folder / f"rank-{rank}.log", "w") as log:
            ranks.append(
                subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
            )
    try:
        codes = [process.wait(SECONDS) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        odd = next(rank for rank, code in enumerate(codes) if code)
        raise RuntimeError((folder / f"rank-{odd}.log").read_text().strip().splitlines()[-1])
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    times = collections.Counter(sample for one in seen for sample in one)
    return {
        "name": name,
        "samples": samples,
        "by_rank": "+".join(str(len(one)) for one in seen),
        "lost": samples - len(times),
        "repeated": sum(count - 1 for count in times.values()),
        "uneven": len({len(one) for one in seen}) > 1,
    }


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main(arguments: list[str] | None = None) -> None:
    """Measure all loaders with both numbers of samples."""
    parser = measure.arguments(__doc__, rounds=False)
    parser.add_argument("--only", nargs="+", choices=sorted(LOADERS), help="these loaders")
    options = parser.parse_args(arguments)
    rows = []
    for samples in SAMPLES:
        for name in options.only or LOADERS:
            try:
                importlib.import_module(LOADERS[name][0])
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                    rows.append(measured(name, samples, Path(folder)))
            except ImportError as error:
                rows.append({"name": name, "samples": samples, "note": f"not installed ({error})"})
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                note = f"does not run here ({error})"[:120]
                rows.append({"name": name, "samples": samples, "note": note})
            print(f"  {name}, {samples} samples: done", file=sys.stderr, flush=True)
    measure.publish(measure.result("coverage", rows, ranks=RANKS), options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        one_rank(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        main()
