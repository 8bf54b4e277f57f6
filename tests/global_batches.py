"""A fixed global batch on the tiny set: the samples of each step, as planned and as trained."""

from __future__ import annotations

import json
from pathlib import Path

from portrait_dist.data import build_loader

GLOBAL_BATCH, SAMPLES, STEPS = 12, 57, 4
# A step takes about 0.1 s, so that a signal meets the middle of an epoch.
KEYS = (
    f"train.global_batch={GLOBAL_BATCH}",
    "train.batch_size=3",
    "model.init_features=16",
    "data.log_keys=true",
    "train.log_every_steps=1",
)
Steps = dict[tuple[int, int], list[str]]


def planned_steps(shards: Path, epochs: int) -> Steps:
    """The keys of each (epoch, step), as one process with the whole global batch sees them."""
    loader = build_loader(shards, "train", GLOBAL_BATCH, seed=42, workers=0, rank=0, world_size=1)
    found: Steps = {}
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for step, batch in enumerate(loader):
            found[epoch, step] = sorted(batch.keys)
    return found


def trained_steps(run: Path, seen: dict[Path, int], accumulate: int) -> Steps:
    """The keys of each (epoch, step) that were logged since the last call, over all ranks."""
    found: Steps = {}
    for path in run.glob("keys-rank*.jsonl"):
        logged = path.read_text().splitlines()
        for record in map(json.loads, logged[seen.get(path, 0) :]):
            at = record["epoch"], record["batch"] // accumulate
            found[at] = sorted([*found.get(at, []), *record["keys"]])
        seen[path] = len(logged)
    return found
