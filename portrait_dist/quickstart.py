"""The whole way in one call: data → split → shards → training under torchrun → test score → cut-out pictures.

Every step can be run again: what is finished is kept, so the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from portrait_dist.errors import InputError, PortraitDistError, Stopped

GENERATED_PAIRS = 160
SIZE = (128, 128)
STEPS = 450  # optimiser steps in all, so that the time does not depend on the number of pictures
MAX_EPOCHS = 100


def quickstart(raw: str | None, out: str, nproc: int | None) -> dict[str, Any]:
    """Run all steps under ``out``.

    Args:
        raw: a raw AISegment tree, or None for a small generated one.
        out: folder for the generated tree, split, shards, run and pictures.
        nproc: training processes; None for all GPUs, or 2 on a CPU.

    Returns:
        ``test_iou, baseline_iou, images_per_second, world_size, pictures, checkpoint, run_dir``.

    Raises:
        InputError: ``raw`` is no AISegment tree, or ``out`` holds something else.
        DamagedDataError: a picture or matte cannot be decoded.
    """
    folder = Path(out)
    _claim(folder, {"raw": str(Path(raw).resolve()) if raw else None})
    shards = _make_shards(Path(raw) if raw else None, folder)
    trained = _train(shards, folder, nproc or _default_processes())
    _say("4/5 test score")
    from portrait_dist import evaluation

    scored = evaluation.evaluate(trained["checkpoint"], str(shards), "test")
    assert scored is not None
    examples = evaluation.write_examples(
        scored, trained["checkpoint"], str(shards), folder / "pictures" / "test"
    )
    baseline = evaluation.baseline_iou(str(shards), SIZE)
    _say("5/5 cut-outs")
    pictures = [*_cut_out(trained["checkpoint"], folder), *examples]
    return {
        "test_iou": scored.scores.iou,
        "baseline_iou": baseline,
        "images_per_second": trained["images_per_second"],
        "world_size": trained["world_size"],
        "pictures": pictures,
        "checkpoint": trained["checkpoint"],
        "run_dir": trained["run_dir"],
    }


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Take an empty folder, or one where the same quickstart was begun."""
    marker = folder / "quickstart.json"
    if marker.is_file():
        if json.loads(marker.read_text()) != settings:
            raise InputError(
                f"{folder}: holds a quickstart with other pictures; choose another --out, or remove the folder"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: holds something else already; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(settings))


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


def _default_processes() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def _train(shards: Path, folder: Path, processes: int) -> dict[str, Any]:
    """Train under torchrun; its messages pass through to stderr."""
    from portrait_dist import config

    batch = config.load("quickstart").train.batch_size
    manifest = json.loads((shards / "manifest.json").read_text())
    steps = max(1, manifest["splits"]["train"]["samples"] // (batch * processes))
    epochs = max(1, min(MAX_EPOCHS, STEPS // steps))
    _say(f"3/5 training, {epochs} epochs of {steps} steps in {processes} processes")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "portrait_dist",
    ]
    keys = [
        f"data.shards={shards}",
        f"run.root={folder / 'runs'}",
        "run.name=quickstart",
        f"train.max_epochs={epochs}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(
        [*launcher, "train", "--json", "--recipe", "quickstart", *keys],
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        output, _ = process.communicate()
    except KeyboardInterrupt:  # the terminal sent it to torchrun too, which saves and ends
        process.wait()
        raise Stopped(
            f"stopped in training; 'portrait-dist quickstart --out {folder}' goes on"
        ) from None
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if process.returncode != 0:
        raise PortraitDistError(
            f"training ended with exit code {process.returncode}: the reason stands above; run again to go on"
        )
    result: dict[str, Any] = json.loads(output)
    return result


def _cut_out(checkpoint: str, folder: Path) -> list[str]:
    """Mask, cut-out and side-by-side picture of the first four test pictures at their own resolution."""
    from portrait_dist.data.source import split
    from portrait_dist.inference import batch

    images = [str(pair.image) for pair in split.read_split(folder / "data").pairs("test")[:4]]
    return batch.predict_files(checkpoint, images, folder / "pictures", force=True).files


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
