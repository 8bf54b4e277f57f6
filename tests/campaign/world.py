"""What the attacks start from: a raw tree, its split and shards, and two runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import wait_for

PAIRS = 24
SIDE = 32
SETTINGS = (
    "model.init_features=2",
    "train.max_epochs=6",
    "train.batch_size=4",
    "train.threads=1",
)
"""Of all runs here: equal ones end with the same weights."""
STOP_AFTER = 2
"""Epochs after which one of the runs is stopped."""


@dataclass(frozen=True)
class World:
    """Folders of good data, and the digests of what the shards hold.

    Attributes:
        shards, other_shards: of the same tree, split otherwise.
        run: a finished run.
        stopped: the same run, stopped on its way.
    """

    root: Path
    raw: Path
    data: Path
    shards: Path
    other_shards: Path
    run: Path
    stopped: Path
    photos: Path
    samples: dict[str, str]

    @property
    def checkpoint(self) -> Path:
        """The finished run's best checkpoint."""
        return self.run / "ckpt_best.pth"


def pack_words(data: Path, out: Path) -> list[object]:
    """Command line that packs the good shards."""
    size = ["--size", f"{SIDE}x{SIDE}", "--samples-per-shard", 6, "--workers", 1]
    return ["pack", "--data", data, "--out", out, *size]


def train_words(shards: Path | str, run: Path) -> list[object]:
    """Command line that trains the good run."""
    return [
        "train",
        f"data.shards={shards}",
        f"run.root={run.parent}",
        f"run.name={run.name}",
        *SETTINGS,
    ]


def build(root: Path) -> World:
    """Make the raw tree, splits, shards, a finished and a stopped run, and some photos."""
    raw, data, runs = root / "raw", root / "data", root / "runs"
    fractions = ["--val-fraction", 0.2, "--test-fraction", 0.2]
    _call(["synth", "--out", raw, "--pairs", PAIRS, "--seed", 5, "--workers", 1])
    for seed, name in ((1, ""), (2, "other-")):
        prepared, packed = root / f"{name}data", root / f"{name}shards"
        _call(["prepare", "--raw", raw, "--out", prepared, *fractions, "--seed", seed])
        _call(pack_words(prepared, packed))
    shards = root / "shards"
    _call(train_words(shards, runs / "good"))
    with _stopping_after(runs / "stopped" / "averaging_snapshots" / f"epoch-{STOP_AFTER}.pth"):
        _call(train_words(shards, runs / "stopped"), code=75)
    return World(
        root,
        raw,
        data,
        shards,
        root / "other-shards",
        runs / "good",
        runs / "stopped",
        _make_photos(raw, root / "photos"),
        samples(shards),
    )


def _call(words: list[object], code: int = 0) -> None:
    from portrait_dist import cli

    found = cli.run([str(word) for word in words])
    if found != code:
        raise RuntimeError(f"portrait-dist {words[0]} ended with {found}")


@contextlib.contextmanager
def _stopping_after(file: Path) -> Iterator[None]:
    """Send this process SIGTERM as soon as a file is there."""

    def stop() -> None:
        wait_for(file.exists, timeout=3600)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    yield
    thread.join()


def _make_photos(raw: Path, photos: Path) -> Path:
    from PIL import Image

    photos.mkdir()
    for number, path in enumerate(sorted((raw / "clip_img").rglob("*.jpg"))[:3]):
        with Image.open(path) as photo:
            photo.resize((120, 160)).save(photos / f"good{number}.jpg", quality=90)
    return photos


def samples(shards: Path | str, cache: Any = None) -> dict[str, str]:
    """Digest of the pixels of every sample, by split and key.

    Raises:
        PortraitDistError: what the reader finds.
    """
    from portrait_dist.data import build_loader

    found: dict[str, str] = {}
    for split in ("train", "val", "test"):
        loader = build_loader(
            shards,
            split,
            4,
            shuffle=False,
            drop_last=False,
            workers=-1,
            rank=0,
            world_size=1,
            cache=cache,
        )
        for batch in loader:
            for index, key in enumerate(batch.keys):
                pixels = batch.image[index].numpy().tobytes() + batch.alpha[index].numpy().tobytes()
                shape = str(tuple(batch.image.shape[1:])).encode()
                found[f"{split}/{key}"] = hashlib.sha256(shape + pixels).hexdigest()
    return found
