"""Measure how fast batches come: the tutorial's dataset, other libraries and this package.

All read the same pixels on the same cores.

    python benchmarks/loader.py --json loader.json                # generates portraits
    python benchmarks/loader.py --data RAW --json loader.json     # a raw AISegment tree
    python benchmarks/loader.py --data SHARDS --json loader.json  # without tutorial and pack rows

Rows, for ``size`` 256 and original: tutorial (AISegmentDataset in a DataLoader), the peers of
peers.py with Pillow (grain and lancedb also with our decoder, with ``--full-peers`` spdl and all),
portrait_dist-uint8, portrait_dist-5-batches (the same in epochs of five batches),
portrait_dist-float (augmented and normalised on the CPU), portrait_dist-raw (the raw codec),
ceiling (our decoder on bytes in memory, all cores, nothing else). All have as many worker processes
or threads as there are cores, and are past their first epoch when timed. Then pack against decoding
its mattes alone, the time to the first batch, memory, and how far the scaled JPEG decoding is from
the exact one. ``coverage.py`` shows what each peer loses.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import io
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import measure
import numpy as np
import peers
from peers import BATCH, PEERS, SIDE, Pixels, members

from portrait_dist.data.shards.decode import decode_pair
from portrait_dist.data.shards.reader import ShardSet, read_manifest
from portrait_dist.system.info import cores

Case = measure.Case


def read(start: Callable[[], Iterable[Any]], at_least: float) -> measure.Round:
    """Measure whole epochs that last some seconds.

    Args:
        start: gives an iterable of batches, each a tuple whose first item has a length.
        at_least: seconds.
    """

    def epochs() -> int:
        images, begin = 0, time.perf_counter()
        while images == 0 or time.perf_counter() - begin < at_least:
            for batch in start():
                images += len(batch[0])
        return images

    return measure.timed(epochs)


# The data, made once ------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Make what ``--data`` allows: the tree, shards of both sizes and of the raw codec."""
    from portrait_dist.data.shards import writer
    from portrait_dist.data.source import split, synthetic

    given = options.data
    if given is not None and (given / "manifest.json").is_file():
        return {str(SIDE) if read_manifest(given).size else "original": given}
    raw = given or work / "raw-tree"
    if given is None:
        synthetic.generate(raw, options.pairs, seed=1)
    split.prepare(raw, work / "tree")
    split.prepare(
        repeated(raw, work / "repeated", options.copies) if options.copies > 1 else raw,
        work / "long-tree",
    )
    folders = {
        "tree": work / "tree",
        "256": work / "s256",
        "original": work / "original",
        "raw": work / "raw-codec",
    }
    per_shard = max(1, options.pairs // 8)  # webdataset deals whole shards to its workers
    writer.pack(work / "long-tree", folders["256"], (SIDE, SIDE), per_shard)
    writer.pack(folders["tree"], folders["original"], None, per_shard)
    writer.pack(work / "long-tree", folders["raw"], (SIDE, SIDE), per_shard, codec="raw")
    return folders


def repeated(raw: Path, out: Path, copies: int) -> Path:
    """Make a raw tree of hard links in which each pair stands ``copies`` times.

    An epoch of a few hundred small images lasts a tenth of a second, and its start counts; real
    ones are far longer.
    """
    from portrait_dist.data.source.layouts import find_pairs
    from portrait_dist.data.source.split import link_or_copy

    for pair in find_pairs(raw).pairs:
        for path in (Path(pair.image), Path(pair.matte)):
            folder = out / path.relative_to(raw).parent
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                link_or_copy(path, folder / f"{path.stem}-{copy}{path.suffix}", "link")
    return out


def tutorial(tree: Path, workers: int, images: int) -> Callable[[], Iterable[Any]]:
    from torch.utils.data import DataLoader, Subset

    from portrait_dist.data import AISegmentDataset

    dataset = AISegmentDataset(tree, "train", SIDE, SIDE)
    some = Subset(dataset, range(min(images, len(dataset))))
    loader = DataLoader(
        some, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: loader


# Ours ---------------------------------------------------------------------------------------------


def uint8(shards: Path, workers: int, most: int | None = None) -> Callable[[], Iterable[Any]]:
    from portrait_dist.data import build_loader

    loader = build_loader(shards, "train", BATCH, workers=workers, drop_last=False)
    epochs = iter(range(1 << 30))

    def start() -> Iterable[Any]:
        loader.set_epoch(next(epochs))
        batches = loader.first_batches(most)
        return ((batch.image, batch.alpha, batch) for batch in batches)

    return start


def floats(shards: Path, workers: int) -> Callable[[], Iterable[Any]]:
    from portrait_dist.config import AugmentConfig
    from portrait_dist.data.augment import Augment

    augment, start = Augment(AugmentConfig()), uint8(shards, workers)
    return lambda: (
        augment(batch.image, batch.alpha, epoch=batch.epoch, positions=batch.positions)
        for _, _, batch in start()
    )


def ceiling(shards: Path, workers: int, at_least: float) -> Case:
    """Decode bytes in memory on all cores, into rows of a batch, and do nothing else."""
    encoded = members(shards)
    pool = ThreadPoolExecutor(workers)
    image, alpha = (
        np.empty((workers, SIDE, SIDE, 3), np.uint8),
        np.empty((workers, SIDE, SIDE), np.uint8),
    )

    def run(worker: int) -> int:
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < at_least:
            for jpeg, png in encoded[worker::workers]:
                decode_pair(jpeg, png, (SIDE, SIDE), image[worker], alpha[worker], exact=False)
                done += 1
        return done

    return lambda: measure.timed(lambda: sum(pool.map(run, range(workers))))


# The rounds ---------------------------------------------------------------------------------------


def cases_of(
    size: str, folders: dict[str, Path], work: Path, options: argparse.Namespace
) -> tuple[dict[str, Case], list[measure.Row]]:
    """Make the cases by row name, and rows of what cannot be run here."""
    shards, workers, missing = folders[size], options.workers, []
    starts: dict[str, Callable[[], Iterable[Any]]] = {}
    if "tree" in folders:
        starts["tutorial"] = tutorial(folders["tree"], workers, options.tutorial_images)
    for name, (module, build, decoder) in _peers(options.full_peers).items():
        try:
            importlib.import_module(module)
            starts[name] = build(shards, work, workers, decoder)
        except ImportError as error:
            missing.append(measure.absent(name, f"not installed ({error})", size=size))
        except Exception as error:  # another project's code, in versions we have not seen
            missing.append(measure.absent(name, f"does not run here ({error})"[:120], size=size))
    starts["portrait_dist-uint8"] = uint8(shards, workers)
    starts["portrait_dist-5-batches"] = uint8(shards, workers, most=5)
    starts["portrait_dist-float"] = floats(shards, workers)
    if size == str(SIDE) and "raw" in folders:
        starts["portrait_dist-raw"] = uint8(folders["raw"], workers)
    cases: dict[str, Case] = {
        name: functools.partial(read, start, options.seconds) for name, start in starts.items()
    }
    cases["ceiling"] = ceiling(shards, workers, options.seconds)
    return _those_that_run(cases, missing, size), missing


def _peers(full: bool) -> dict[str, tuple[str, Callable[..., peers.Start], peers.Decoder]]:
    """List peers by row name: module, how it is started, decoder."""
    found: dict[str, tuple[str, Callable[..., peers.Start], peers.Decoder]]
    found = {name: (*peer, peers.pillow) for name, peer in PEERS.items()}
    found |= {f"{name}-our-decoder": (*PEERS[name], peers.ours) for name in peers.THREADED}
    if full:
        found |= {name: (*peer, peers.pillow) for name, peer in peers.ONLY_FULL.items()}
        more = PEERS | peers.ONLY_FULL
        found |= {f"{name}-our-decoder": (*peer, peers.ours) for name, peer in more.items()}
    return found


def _those_that_run(
    cases: dict[str, Case], missing: list[measure.Row], size: str
) -> dict[str, Case]:
    """Run the first epoch of each, unmeasured; a peer that fails is named and dropped."""
    running = {}
    for name, case in cases.items():
        try:
            case()
            running[name] = case
        except Exception as error:
            if name.startswith("portrait_dist"):
                raise
            missing.append(measure.absent(name, f"does not run here ({error})"[:120], size=size))
    return running


def throughput(
    folders: dict[str, Path], work: Path, options: argparse.Namespace
) -> list[measure.Row]:
    rows: list[measure.Row] = []
    for size in (str(SIDE), "original"):
        if size not in folders:
            continue
        cases, missing = cases_of(size, folders, work, options)
        rounds = measure.alternate(cases, options.repeats, warm_up=False)
        rows += [measure.row(name, values, size=size) for name, values in rounds.items()] + missing
        del cases
        gc.collect()  # ends the peers' worker processes
    return rows


def packing_rows(
    folders: dict[str, Path], work: Path, options: argparse.Namespace
) -> list[measure.Row]:
    """Measure ``pack`` against nothing but decoding the RGBA mattes, by OpenCV and by Pillow."""
    from portrait_dist.data.shards import writer
    from portrait_dist.data.source.split import read_split

    split = read_split(folders["tree"])
    mattes = [Path(pair.matte).read_bytes() for pair in split.pairs("train")]
    pool = ThreadPoolExecutor(options.workers)

    def limit(decode: Callable[[bytes], Pixels]) -> measure.Round:
        return measure.timed(lambda: sum(len(one) > 0 for one in pool.map(decode, mattes)))

    def by_opencv(matte: bytes) -> Pixels:
        import cv2

        return np.asarray(cv2.imdecode(np.frombuffer(matte, np.uint8), cv2.IMREAD_UNCHANGED))

    def by_pillow(matte: bytes) -> Pixels:
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(matte)))

    def pack() -> measure.Round:
        shutil.rmtree(work / "packed", ignore_errors=True)
        packed = functools.partial(
            writer.pack, folders["tree"], work / "packed", (SIDE, SIDE), workers=options.workers
        )
        return measure.timed(lambda: packed().packed)

    cases = {
        "pack": pack,
        "pack-limit": lambda: limit(by_opencv),
        "pack-limit-pillow": lambda: limit(by_pillow),
    }
    repeats = min(3, options.repeats) if options.quick else options.repeats
    rounds = measure.alternate(cases, repeats)
    return [measure.row(name, values, size=str(SIDE)) for name, values in rounds.items()]


# Single numbers -----------------------------------------------------------------------------------

FIRST_BATCH = """
import sys, time, torch
from portrait_dist.data import build_loader
begin = time.perf_counter()
next(iter(build_loader(sys.argv[1], "train", 16, workers=int(sys.argv[2]), drop_last=False)))
print(time.perf_counter() - begin)
"""


def first_batch_seconds(shards: Path, workers: int, repeats: int) -> float:
    """Measure the median time from build_loader to the first batch, in fresh processes."""
    command = [sys.executable, "-c", FIRST_BATCH, str(shards), str(workers)]
    times = [
        float(
            subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=measure.REPOSITORY
            ).stdout
        )
        for _ in range(repeats)
    ]
    return round(statistics.median(times), 4)


def memory_megabytes(shards: Path, workers: int) -> dict[str, float]:
    """Measure by how much memory grows in two and in ten epochs: bounded, if no difference."""
    import psutil

    process, start = psutil.Process(), uint8(shards, workers)
    before = process.memory_info().rss
    grown = {}
    for epochs in (2, 10):
        for _ in range(epochs):
            for _ in start():
                pass
        grown[f"after_{epochs}_epochs"] = round((process.memory_info().rss - before) / 1e6, 1)
    return grown


def scaled_decoding_error(shards: Path) -> dict[str, float]:
    """Compare scaled JPEG decoding with the exact path: levels of 255, and decibels."""
    opened = ShardSet(shards, "train")
    absolute, squared = [], []
    for sample in range(min(64, len(opened))):
        encoded = opened.read(sample)
        images = []
        for exact in (True, False):
            pixels, mask = np.empty((SIDE, SIDE, 3), np.uint8), np.empty((SIDE, SIDE), np.uint8)
            decode_pair(encoded.image, encoded.alpha, (SIDE, SIDE), pixels, mask, exact=exact)
            images.append(pixels.astype(np.float64))
        difference = images[0] - images[1]
        absolute.append(np.abs(difference).mean())
        squared.append((difference**2).mean())
    return {
        "mean_absolute_error": round(float(np.mean(absolute)), 3),
        "psnr_db": round(float(10 * np.log10(255**2 / np.mean(squared))), 2),
    }


def aims(rows: list[measure.Row]) -> dict[str, str]:
    """List the ratios that the project aims at, with what was measured."""
    rate = {
        (line["name"], line.get("size")): line["images_per_second"]
        for line in rows
        if line.get("images_per_second")
    }
    found = {}

    def compare(what: str, one: tuple[str, str], other: float | None, aim: float) -> None:
        if rate.get(one) and other:
            found[what] = f"{rate[one] / other:.2f} (aim {aim:g})"

    uint8_256 = ("portrait_dist-uint8", "256")
    short = ("portrait_dist-5-batches", "256")
    compare("256: epochs of 5 batches / whole ones", short, rate.get(uint8_256), 0.95)
    best_peer = max((rate.get((name, "256"), 0.0) for name in PEERS), default=0.0)
    float_256 = ("portrait_dist-float", "256")
    compare("256: uint8 / tutorial", uint8_256, rate.get(("tutorial", "256")), 90)
    compare("256: uint8 / ceiling", uint8_256, rate.get(("ceiling", "256")), 0.9)
    compare("256: uint8 / best of the others", uint8_256, best_peer, 2)
    compare("256: float / tutorial", float_256, rate.get(("tutorial", "256")), 20)
    compare(
        "original: uint8 / tutorial",
        ("portrait_dist-uint8", "original"),
        rate.get(("tutorial", "original")),
        10,
    )
    compare(
        "256: raw codec / tutorial", ("portrait_dist-raw", "256"), rate.get(("tutorial", "256")), 90
    )
    compare(
        "pack / decoding its mattes with OpenCV",
        ("pack", "256"),
        rate.get(("pack-limit", "256")),
        0.85,
    )
    compare(
        "pack / decoding its mattes with Pillow",
        ("pack", "256"),
        rate.get(("pack-limit-pillow", "256")),
        0.85,
    )
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure batches, packing, the time to the first batch, and memory."""
    import torch

    options = _options(arguments)
    # The augmentation's operations are small: torch's threads would compete with the decoders.
    torch.set_num_threads(1)
    # The peers' processes may outlive a temporary folder's removal by a moment.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = options.work or Path(temporary)
        folders = prepare(options, work)
        rows = throughput(folders, work, options)
        if "tree" in folders:
            rows += packing_rows(folders, work, options)
        facts: dict[str, Any] = {
            "aims": aims(rows),
            "workers": options.workers,
            "batch_size": BATCH,
        }
        shards = folders.get("256") or folders["original"]
        facts["first_batch_seconds"] = first_batch_seconds(shards, options.workers, 3)
        facts["memory_growth_mb"] = memory_megabytes(shards, options.workers)
        if "original" in folders:
            facts["scaled_decoding"] = scaled_decoding_error(folders["original"])
        with suppress(KeyError):
            facts["bytes_per_sample"] = {
                name: _bytes_per_sample(folders[name]) for name in ("256", "original", "raw")
            }
    found = measure.result("loader", rows, **facts)
    measure.publish(found, options.json)
    for name in ("first_batch_seconds", "memory_growth_mb", "scaled_decoding", "bytes_per_sample"):
        print(f"  {name}: {found.get(name)}")
    return found


def _bytes_per_sample(shards: Path) -> int:
    train = read_manifest(shards).splits["train"]
    return sum(shard.bytes for shard in train.shards) // train.samples


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = measure.arguments(__doc__)
    parser.add_argument(
        "--data", type=Path, help="raw AISegment tree, or packed shards; generated when left out"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for what is packed from it; a temporary one when left out"
    )
    parser.add_argument(
        "--pairs", type=int, help="pairs to generate (default 640, with --quick 200)"
    )
    parser.add_argument(
        "--copies",
        type=int,
        help="times that each image stands in the 256-pixel shards (4, or 1 with --data)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=cores(),
        help="processes or threads (default: the cores)",
    )
    parser.add_argument(
        "--full-peers", action="store_true", help="also the other libraries with our decoder"
    )
    options = parser.parse_args(arguments)
    options.pairs = options.pairs or (200 if options.quick else 640)
    options.copies = options.copies or (1 if options.data else 4)
    options.repeats = options.repeats or (4 if options.quick else 5)
    options.seconds = 0.6 if options.quick else 2.0
    options.tutorial_images = 48 if options.quick else 128
    return options


if __name__ == "__main__":
    main()
