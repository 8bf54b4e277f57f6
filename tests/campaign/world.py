"""What the attacks start from: a raw tree, its split and shards, and a finished run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAIRS = 24
SIDE = 32


@dataclass(frozen=True)
class World:
    """Folders of good data, and the digests of what the shards hold."""

    root: Path
    raw: Path
    data: Path
    shards: Path
    run: Path
    photos: Path
    samples: dict[str, str]

    @property
    def checkpoint(self) -> Path:
        """The finished run's best checkpoint."""
        return self.run / "ckpt_best.pth"


def build(root: Path) -> World:
    """Make the raw tree, split, shards, a run of one epoch, and some photos."""
    from PIL import Image

    from portrait_dist import cli

    raw, data, shards, photos = root / "raw", root / "data", root / "shards", root / "photos"
    steps: list[list[object]] = [
        ["synth", "--out", raw, "--pairs", PAIRS, "--seed", 5, "--workers", 1],
        ["prepare", "--raw", raw, "--out", data, "--val-fraction", 0.2, "--test-fraction", 0.2],
        [
            "pack",
            "--data",
            data,
            "--out",
            shards,
            "--size",
            f"{SIDE}x{SIDE}",
            "--samples-per-shard",
            6,
            "--workers",
            1,
        ],
        [
            "train",
            f"data.shards={shards}",
            f"run.root={root / 'runs'}",
            "run.name=good",
            "model.init_features=2",
            "train.max_epochs=1",
            "train.batch_size=4",
            "train.threads=1",
        ],
    ]
    for step in steps:
        code = cli.run([str(word) for word in step])
        if code:
            raise RuntimeError(f"portrait-dist {step[0]} ended with {code}")
    photos.mkdir()
    for number, path in enumerate(sorted((raw / "clip_img").rglob("*.jpg"))[:3]):
        with Image.open(path) as photo:
            photo.resize((120, 160)).save(photos / f"good{number}.jpg", quality=90)
    return World(root, raw, data, shards, root / "runs" / "good", photos, samples(shards))


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
