"""The whole way in one call: data, split, shards, training on ranks, test score, cut-outs.

Every step can be run again: what is finished is kept, so the same command resumes after an
interruption.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portrait_dist.errors import InputError, Stopped

if TYPE_CHECKING:
    from portrait_dist.training.results import TrainResult

GENERATED_PAIRS = 160
SIZE = (128, 128)
STEPS = 450
"""Optimiser steps in all, so that the time does not depend on the number of photos."""
MAX_EPOCHS = 100
MARKER = "quickstart.json"


@dataclass(frozen=True)
class QuickstartResult:
    """What a quickstart gives.

    Args:
        test_iou: IoU on the test split.
        baseline_iou: IoU there of a constant mask, the mean of the training split.
        images_per_second: training speed over all ranks.
        world_size: number of ranks.
        pictures: files to look at.
        checkpoint: the best checkpoint.
        run_dir: the run's folder.
    """

    test_iou: float
    baseline_iou: float
    images_per_second: float
    world_size: int
    pictures: list[str]
    checkpoint: str
    run_dir: str


def quickstart(raw: str | None, out: str, nproc: str) -> QuickstartResult:
    """Run all steps under ``out``.

    Args:
        raw: a raw AISegment tree, or None for a small generated one.
        out: folder for the generated tree, split, shards, run and cut-outs.
        nproc: ranks to train on, as in ``train --nproc``.

    Raises:
        InputError: ``raw`` is no AISegment tree, or ``out`` holds something else.
        DamagedDataError: an image or matte cannot be decoded.
        Stopped: stopped by a signal in training, after saving.
    """
    from portrait_dist.training import launch

    ranks = launch.ranks_here(nproc)
    folder = Path(out)
    _claim(folder, str(Path(raw).resolve()) if raw else None)
    shards = _make_shards(Path(raw) if raw else None, folder)
    trained = _train(shards, folder, ranks)
    checkpoint = trained.checkpoint
    _say("4/5 test score")
    from portrait_dist import evaluation

    scored = evaluation.evaluate(checkpoint, str(shards), "test")
    assert scored is not None
    test = folder / "pictures" / "test"
    examples = evaluation.write_examples(scored, checkpoint, str(shards), test)
    baseline = evaluation.baseline_iou(str(shards), SIZE)
    _say("5/5 cut-outs")
    return QuickstartResult(
        test_iou=scored.scores.iou,
        baseline_iou=baseline,
        images_per_second=trained.images_per_second,
        world_size=trained.world_size,
        pictures=[*_cut_out(checkpoint, folder), *examples],
        checkpoint=checkpoint,
        run_dir=trained.run_dir,
    )


def _claim(folder: Path, raw: str | None) -> None:
    """Take an empty folder, or one where the same quickstart was started."""
    from portrait_dist import files

    wanted = {"raw": raw}
    found = files.read_marker(folder, MARKER, "quickstart")
    if found is None:
        files.claim_folder(folder, MARKER, wanted)
    elif found != wanted:
        raise InputError(
            f"{folder}: holds a quickstart with other images; choose another --out, "
            "or remove the folder"
        )


def _make_shards(raw: Path | None, folder: Path) -> Path:
    from portrait_dist.data.shards import writer
    from portrait_dist.data.source import split, synthetic

    if raw is None:
        _say(f"1/5 {GENERATED_PAIRS} generated portraits")
        raw = folder / "raw"
        synthetic.generate(raw, GENERATED_PAIRS, seed=1)
    _say("2/5 split and shards")
    split.prepare(raw, folder / "data")
    writer.pack(folder / "data", folder / "shards", size=SIZE)
    return folder / "shards"


def _train(shards: Path, folder: Path, ranks: int) -> TrainResult:
    """Train on ranks of this machine; their messages pass through to stderr."""
    from portrait_dist import config
    from portrait_dist.data.shards.reader import ShardSet
    from portrait_dist.training import launch
    from portrait_dist.training.plan import make_plan

    samples = ShardSet(str(shards), "train").samples
    steps = make_plan(config.load("quickstart"), samples, ranks).steps_per_epoch
    epochs = max(1, min(MAX_EPOCHS, STEPS // steps))
    _say(f"3/5 training, {epochs} epochs of {steps} steps on {ranks} ranks")
    arguments = [
        "--recipe=quickstart",
        f"data.shards={shards}",
        f"run.root={folder / 'runs'}",
        "run.name=quickstart",
        f"train.max_epochs={epochs}",
    ]
    try:
        return launch.run(ranks, arguments)
    except Stopped:
        raise Stopped("stopped in training, saved; the same quickstart command resumes") from None


def _cut_out(checkpoint: str, folder: Path) -> list[str]:
    """Write mask, cut-out and side-by-side view of four test photos at their own resolution."""
    from portrait_dist.data.source import split
    from portrait_dist.inference import batch

    images = [str(pair.image) for pair in split.read_split(folder / "data").pairs("test")[:4]]
    return batch.predict_files(checkpoint, images, folder / "pictures", force=True).files


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
