"""Other libraries that read the same encoded bytes: how each is started, and with which decoder.

webdataset, litdata and mosaicml-streaming decode in the worker processes of a DataLoader; grain,
lancedb and spdl in threads. They belong to the dependency group ``bench``:
``uv sync --group bench``.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portrait_dist.data.shards.decode import decode_pair
from portrait_dist.data.shards.reader import ShardSet

BATCH = 16
SIDE = 256
Pixels = NDArray[np.uint8]
Decoder = Callable[[bytes, bytes], tuple[Pixels, Pixels]]
Start = Callable[[], Iterable[Any]]
"""Gives an iterable of batches, each a tuple whose first item has a length."""


def pillow(image: bytes, alpha: bytes) -> tuple[Pixels, Pixels]:
    """Decode and, where larger, resize as the tutorial does."""
    from PIL import Image

    pixels: Image.Image = Image.open(io.BytesIO(image)).convert("RGB")
    mask: Image.Image = Image.open(io.BytesIO(alpha))
    if pixels.size != (SIDE, SIDE):
        pixels = pixels.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        mask = mask.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return np.array(pixels), np.array(mask)


def ours(image: bytes, alpha: bytes) -> tuple[Pixels, Pixels]:
    """Decode with this project's decoder."""
    pixels, mask = np.empty((SIDE, SIDE, 3), np.uint8), np.empty((SIDE, SIDE), np.uint8)
    decode_pair(image, alpha, None, pixels, mask, exact=False)
    return pixels, mask


class _Decoded:
    """A peer's dataset whose samples are decoded; picklable."""

    def __init__(self, decode: Decoder) -> None:
        self.decode = decode

    def __call__(self, sample: dict[str, bytes]) -> tuple[Pixels, Pixels]:
        return self.decode(sample["jpg"], sample["png"])


def webdataset(shards: Path, work: Path, workers: int, decode: Decoder) -> Start:
    import webdataset as wds
    from torch.utils.data import DataLoader

    urls = sorted(str(path) for path in shards.glob("train-*.tar"))
    stream = (
        wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False, seed=1)
        .shuffle(128)
        .map(_Decoded(decode))
    )
    loader = DataLoader(
        stream.batched(BATCH), batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: loader


def litdata(shards: Path, work: Path, workers: int, decode: Decoder) -> Start:
    import litdata as lit

    folder = work / f"litdata-{shards.name}"
    if not folder.exists():
        _write_litdata(shards, folder)

    class Decoding(lit.StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[Pixels, Pixels]:
            return decode(*super().__getitem__(index))

    dataset = Decoding(str(folder), shuffle=True, seed=1)
    loader = lit.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: loader


def _write_litdata(shards: Path, folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes="64MB")
    for index, (image, alpha) in enumerate(members(shards)):
        cache[index] = (image, alpha)
    cache.done()
    cache.merge()


def mosaicml(shards: Path, work: Path, workers: int, decode: Decoder) -> Start:
    import streaming
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    folder = work / f"mosaicml-{shards.name}"
    if not folder.exists():
        with streaming.MDSWriter(
            out=str(folder), columns={"jpg": "bytes", "png": "bytes"}
        ) as writer:
            for image, alpha in members(shards):
                writer.write({"jpg": image, "png": alpha})
    clean_stale_shared_memory()

    class Decoding(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[Pixels, Pixels]:
            sample = super().__getitem__(index)
            return decode(sample["jpg"], sample["png"])

    dataset = Decoding(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    loader: DataLoader[Any] = DataLoader(
        dataset, BATCH, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: loader


def grain(shards: Path, work: Path, workers: int, decode: Decoder) -> Start:
    import grain as gr

    dataset = gr.MapDataset.source(members(shards)).shuffle(seed=1).map(lambda one: decode(*one))
    options = gr.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * BATCH)
    loader = dataset.to_iter_dataset(options).batch(BATCH)
    return lambda: loader


def lancedb(shards: Path, work: Path, workers: int, decode: Decoder) -> Start:
    import lancedb as lance
    from lancedb.streaming import StreamingDataset
    from torch.utils.data import DataLoader

    folder = str(work / f"lancedb-{shards.name}")
    connection = lance.connect(folder)
    if "pairs" not in connection.table_names():
        rows = [{"jpg": image, "png": alpha} for image, alpha in members(shards)]
        connection.create_table("pairs", rows)
    table, epochs = connection.open_table("pairs"), itertools.count()

    def decoded(batch: Any) -> list[tuple[Pixels, Pixels]]:
        pairs = zip(batch["jpg"], batch["png"], strict=True)
        return [decode(image.as_py(), alpha.as_py()) for image, alpha in pairs]

    def start() -> Iterable[Any]:
        dataset = StreamingDataset(
            table, epoch=next(epochs), transform=decoded, transform_parallelism=workers
        )
        return DataLoader(dataset, BATCH)

    return start


def spdl(shards: Path, work: Path, workers: int, decode: Decoder) -> Start:
    """Decode a batch in each task, as its documentation advises; a sample in each costs more."""
    from spdl.pipeline import PipelineBuilder

    encoded, random = members(shards), np.random.default_rng(1)

    def batches() -> Iterator[list[tuple[bytes, bytes]]]:
        order = random.permutation(len(encoded))
        for first in range(0, len(order), BATCH):
            yield [encoded[one] for one in order[first : first + BATCH]]

    def decoded(batch: list[tuple[bytes, bytes]]) -> tuple[Pixels, Pixels]:
        images, masks = zip(*(decode(*one) for one in batch), strict=True)
        return np.stack(images), np.stack(masks)

    def start() -> Iterator[Any]:
        builder = PipelineBuilder().add_source(batches())
        builder = builder.pipe(decoded, concurrency=workers, output_order="input").add_sink(4)
        pipeline = builder.build(num_threads=workers)
        with pipeline.auto_stop():
            yield from pipeline

    return start


PEERS: dict[str, tuple[str, Callable[..., Start]]] = {
    "webdataset": ("webdataset", webdataset),
    "litdata": ("litdata", litdata),
    "mosaicml-streaming": ("streaming", mosaicml),
    "grain": ("grain", grain),
    "lancedb": ("lancedb", lancedb),
}
THREADED = ("grain", "lancedb")
ONLY_FULL: dict[str, tuple[str, Callable[..., Start]]] = {"spdl": ("spdl", spdl)}
"""Peers of ``--full-peers``."""


def members(shards: Path) -> list[tuple[bytes, bytes]]:
    """List encoded image and alpha of every training sample."""
    opened = ShardSet(shards, "train")
    encoded = (opened.read(sample) for sample in range(len(opened)))
    return [(bytes(sample.image), bytes(sample.alpha)) for sample in encoded]
