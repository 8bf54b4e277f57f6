"""``portrait-dist report``: one HTML file about a run, to keep, mail or open without a network.

    portrait-dist report runs/first --out first.html

The curves come from ``metrics.jsonl``, the configuration from ``config.yaml``, versions from the checkpoint; every validation
sample is scored anew with the best checkpoint, which gives the gallery, the worst cases and the spread of IoU.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from portrait_dist.errors import InputError, PortraitDistError
from portrait_dist.runs.folder import RunFolder
from portrait_dist.runs.status import run_status

if TYPE_CHECKING:
    from portrait_dist.data.stream.loader import Batch
    from portrait_dist.evaluation import SampleScores, ScoredSample
    from portrait_dist.models import UNet

CHECKPOINTS = ("ckpt_best.pth", "ckpt_latest.pth")


@dataclass
class Scores:
    """What the checkpoint does on the validation split.

    ``iou`` pools all pixels, as training does; ``means`` are means over the samples; ``ious`` has every sample's own;
    ``gallery`` is spread evenly over the split, ``worst`` has the lowest IoU first.
    """

    split_samples: int
    iou: float
    means: SampleScores
    ious: list[float]
    gallery: list[ScoredSample]
    worst: list[ScoredSample]

    @property
    def samples(self) -> int:
        return len(self.ious)


@dataclass
class Run:
    """Everything known of a run: ``events`` of metrics.jsonl, ``config`` as nested dict, ``checkpoint`` and its ``versions``."""

    folder: Path
    status: dict[str, Any]
    events: list[dict[str, Any]]
    config: dict[str, Any]
    config_text: str
    checkpoint: Path | None
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    shards: str = ""
    shards_about: dict[str, Any] = field(default_factory=dict)
    scores: Scores | None = None
    no_scores: str = ""


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    shards: str | None = None,
    samples: int = 8,
    at_most: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Write the report of a run, atomically.

    Args:
        folder: the run's folder.
        out: the HTML file; ``report.html`` in the run's folder by default.
        shards: folder or address of the shards; those of the run's configuration by default.
        samples: pictures in the gallery, and as many worst cases; 0 leaves the scoring out.
        at_most: validation samples to score, spread evenly over the split; 0 means all.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        ``file``, ``samples`` (scored) and ``val_iou`` (pixels pooled; None when nothing was scored).

    Raises:
        InputError: no run there; ``shards`` was given and is none; ``out`` cannot be written.
        DamagedDataError: a damaged sample or checkpoint.
    """
    from portrait_dist.runs.report.page import page

    run = read_run(folder)
    run.shards = shards or str((run.config.get("data") or {}).get("shards") or "")
    run.no_scores = _why_not(run, samples)
    if not run.no_scores:
        try:
            _score_into(run, samples, at_most, device)
        except InputError as error:
            if shards:
                raise
            run.no_scores = str(error)
    out = out or folder / "report.html"
    _write(out, page(run))
    return {
        "file": str(out),
        "samples": run.scores.samples if run.scores else 0,
        "val_iou": run.scores.iou if run.scores else None,
        "no_pictures": run.no_scores,
    }


def _why_not(run: Run, samples: int) -> str:
    """Why no picture can be scored, or nothing."""
    if samples == 0:
        return "No pictures were asked for (--samples 0)."
    if run.checkpoint is None:
        return "The run has no checkpoint yet."
    return "" if run.shards else "The run's configuration names no shards; give them with --data."


def read_run(folder: Path) -> Run:
    """Read what a run's folder says.

    Raises:
        InputError: there is no run, or its config.yaml is not YAML.
        DamagedDataError: the checkpoint is damaged.
    """
    status = dataclasses.asdict(run_status(folder))
    path = folder / "config.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        config = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(
            f"{path}: not YAML; restore it, or move it away to report without it"
        ) from error
    events = [
        {name: value for name, value in dataclasses.asdict(event).items() if value is not None}
        for event in RunFolder(folder).events()
    ]
    checkpoint = next((folder / name for name in CHECKPOINTS if (folder / name).exists()), None)
    run = Run(folder, status, events, config if isinstance(config, dict) else {}, text, checkpoint)
    if checkpoint:
        from portrait_dist.checkpoints import read_info

        run.versions = dict(read_info(checkpoint).packages)
    run.machine = next(
        (event["machine"] for event in reversed(events) if isinstance(event.get("machine"), dict)),
        {},
    )
    return run


def _score_into(run: Run, samples: int, at_most: int, device: str) -> None:
    from portrait_dist.checkpoints import load_model
    from portrait_dist.data.shards.reader import ShardSet
    from portrait_dist.preprocessing import DEFAULT_SIZE

    assert run.checkpoint is not None
    model, info = load_model(run.checkpoint)
    size = info.size or DEFAULT_SIZE
    shards = ShardSet(run.shards, "val")
    stored = f"{shards.size[0]}x{shards.size[1]}" if shards.size else "their own size"
    counts = {split: entry.samples for split, entry in shards.manifest.splits.items()}
    run.shards_about = {
        "stored": f"{stored}, {shards.codec}",
        **counts,
        "sha256 of the validation split": shards.identity,
    }
    if shards.samples:
        run.scores = score(model, run.shards, (size[0], size[1]), samples, at_most, device)
    else:
        run.no_scores = "The validation split is empty."


def score(
    model: UNet,
    shards: str,
    size: tuple[int, int],
    pictures: int,
    at_most: int = 0,
    device: str = "auto",
) -> Scores:
    """Score a model on the validation split, sample by sample.

    Args:
        model: a U-Net in evaluation mode.
        shards: folder or address.
        size: (H, W) of the network's input.
        pictures: how many samples to keep for the gallery, and how many of the worst.
        at_most: samples to score, spread evenly over the split; 0 for all.
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    from portrait_dist.distributed import pick_device
    from portrait_dist.evaluation import Scorer, mean_scores

    scorer = Scorer(model, pick_device(device))
    total, batches = _batches(shards, size, at_most)
    scored = min(total, at_most or total)
    shown = {number * scored // pictures for number in range(pictures)} if pictures else set()
    rows: list[SampleScores] = []
    worst: list[tuple[float, int, ScoredSample]] = []  # a heap: the best of the worst is on top
    gallery: list[ScoredSample] = []
    for number, sample in enumerate(scorer.score(batches)):
        rows.append(sample.scores)
        if number in shown:
            gallery.append(sample.copy())
        if len(worst) < pictures or (pictures and -sample.scores.iou > worst[0][0]):
            heapq.heappush(worst, (-sample.scores.iou, -number, sample.copy()))
            if len(worst) > pictures:
                heapq.heappop(worst)
    ranked = [sample for _, _, sample in sorted(worst, key=lambda item: (-item[0], -item[1]))]
    ious = [row.iou for row in rows]
    return Scores(total, float(scorer.pooled.compute()), mean_scores(rows), ious, gallery, ranked)


def _batches(shards: str, size: tuple[int, int], at_most: int) -> tuple[int, Iterator[Batch]]:
    """Samples in the validation split, and its batches in order: all, or ``at_most`` samples spread over it."""
    from portrait_dist.data import build_loader
    from portrait_dist.evaluation import read_positions
    from portrait_dist.system.progress import track

    loader = build_loader(
        shards, "val", 8, shuffle=False, size=size, drop_last=False, rank=0, world_size=1
    )
    total = loader.dataset.samples
    if not at_most or at_most >= total:
        return total, iter(track(loader, len(loader), "batches"))
    wanted = [number * total // at_most for number in range(at_most)]
    return total, read_positions(loader.dataset, wanted)


def _write(out: Path, text: str) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if not out.parent.is_dir():
            raise InputError(
                f"{out}: there is no folder {out.parent}; make it, or give another --out"
            )
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise PortraitDistError(
            f"{out}: cannot be written ({error.strerror}); give another --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
