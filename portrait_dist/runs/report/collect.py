"""What the report shows: everything that a run's folder says, and the scores of its checkpoint."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portrait_dist.errors import InputError
from portrait_dist.runs.folder import Events, RunFolder
from portrait_dist.runs.report.settings import RunSettings, read_settings
from portrait_dist.runs.status import RunStatus, run_status
from portrait_dist.system.address import is_address, read_locations, redact, split_members

if TYPE_CHECKING:
    from portrait_dist.data.shards.sets import AnyShards
    from portrait_dist.data.stream.dataset import AISegmentIterableDataset
    from portrait_dist.data.stream.loader import Batch
    from portrait_dist.evaluation import ErrorGroups, SampleScores, ScoredSample
    from portrait_dist.models import MaskNetwork, UNet
    from portrait_dist.preprocessing import Fit


@dataclass(frozen=True)
class Run:
    """Everything that a run's folder says.

    Args:
        folder: the run's folder.
        status: where the run stands.
        events: lines of metrics.jsonl.
        settings: of config.yaml.
        checkpoint: the best or latest one, None without one.
        versions: package → version, of the checkpoint.
        machine: of rank 0, the fields of :class:`portrait_dist.system.info.Machine`.
    """

    folder: RunFolder
    status: RunStatus
    events: Events
    settings: RunSettings
    checkpoint: Path | None
    versions: Mapping[str, str]
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class ShardsLocation:
    """Where the shards of a run are.

    Args:
        path: folder or address; empty where it is not known.
        problem: why they cannot be read, as far as that is known without opening them.
    """

    path: str
    problem: str = ""

    @property
    def shown(self) -> str:
        """The location without secrets of an address."""
        return redact(self.path)


@dataclass(frozen=True)
class SetScores:
    """What a checkpoint does on the validation samples of one of several shard sets.

    Args:
        samples: scored ones.
        split_samples: samples of the set in the split.
        iou: all pixels pooled.
        means: means over the scored samples.
    """

    samples: int
    split_samples: int
    iou: float
    means: SampleScores


@dataclass(frozen=True)
class Scores:
    """What a checkpoint does on the validation split.

    Args:
        split_samples: samples in the split.
        iou: all pixels pooled, as in training.
        means: means over the scored samples.
        ious: every scored sample's own.
        gallery: samples spread evenly over the split.
        worst: samples with the lowest IoU, the lowest first.
        errors: wrong pixels of all scored samples by where they are.
        sets: of each of several shard sets, by name; empty for a single one.
    """

    split_samples: int
    iou: float
    means: SampleScores
    ious: list[float]
    gallery: list[ScoredSample]
    worst: list[ScoredSample]
    errors: ErrorGroups
    sets: dict[str, SetScores]

    @property
    def samples(self) -> int:
        """How many samples were scored."""
        return len(self.ious)


@dataclass(frozen=True)
class ScoredRun:
    """Scores of a run's checkpoint, and facts of the shards that they were taken on."""

    scores: Scores
    shards: Mapping[str, str]


def read_run(folder: Path) -> Run:
    """Read what a run's folder says.

    Raises:
        InputError: there is no run.
        DamagedDataError: the checkpoint is damaged.
    """
    status = run_status(folder)
    run_folder = RunFolder(folder)
    events, checkpoint = run_folder.events(), run_folder.checkpoint
    versions: Mapping[str, str] = {}
    if checkpoint:
        from portrait_dist.checkpoints import read_info

        versions = read_info(checkpoint).packages
    return Run(
        folder=run_folder,
        status=status,
        events=events,
        settings=read_settings(run_folder.config),
        checkpoint=checkpoint,
        versions=versions,
        machine=events.latest("machine") or {},
    )


def find_shards(run: Run, given: str | None = None) -> ShardsLocation:
    """Find the shards that a run was trained on, wherever the report is made.

    A relative ``data.shards`` is relative to the folder where training ran. A run notes the
    absolute path when it starts. For old runs that folder follows from where the run's folder is,
    if ``run.root`` is relative too.

    Args:
        run: the run.
        given: what the user says instead.
    """
    if given:
        return ShardsLocation(given)
    if noted := run.events.latest("shards"):
        return ShardsLocation(noted)
    setting = run.settings.values.get("data.shards") or ""
    if not setting:
        return ShardsLocation("", "The run's settings name no shards; give them with --data.")
    for base in (_folder_of_training(run), Path()):
        if base is not None and (found := _below(base, setting)):
            return ShardsLocation(found)
    return ShardsLocation(
        setting,
        f"data.shards={setting} is relative to the folder where training ran, which this run did "
        "not note; give the shards with --data.",
    )


def _below(base: Path, setting: str) -> str:
    """Return shard sets with relative ones below a folder; empty where one is not there."""
    found = []
    for one in read_locations(setting):
        if not is_address(one.location) and not Path(one.location).is_absolute():
            if not (base / split_members(one.location)[0]).exists():
                return ""
            one = replace(one, location=str(base / one.location))
        found.append(one)
    return ",".join(one.shown for one in found)


def _folder_of_training(run: Run) -> Path | None:
    """Return the folder that a relative ``run.root`` is relative to; None where it is not known."""
    root = run.settings.values.get("run.root") or ""
    folder = run.folder.path.resolve()
    parts = Path(root).parts
    if not parts or Path(root).is_absolute() or folder.parent.parts[-len(parts) :] != parts:
        return None
    return folder.parents[len(parts)]


def score_run(
    run: Run,
    shards: str,
    images: int,
    at_most: int,
    device: str,
    *,
    trust_code: bool = False,
) -> ScoredRun:
    """Score a run's checkpoint on the validation split of its shards.

    Args:
        run: with a checkpoint.
        shards: folder or address.
        images: how many samples to keep for the gallery, and how many of the worst.
        at_most: samples to score, spread evenly over the split; 0 for all.
        device: ``auto``, ``cpu`` or ``cuda``.
        trust_code: import the network's code where it is the user's.

    Raises:
        InputError: no shards there, shards of another size, or an empty split.
        DamagedDataError: a damaged sample or checkpoint.
    """
    from portrait_dist.checkpoints import input_geometry, load_model
    from portrait_dist.data.shards.sets import open_shards
    from portrait_dist.evaluation import size_of_shards

    assert run.checkpoint is not None
    model, info = load_model(run.checkpoint, trust_code=trust_code)
    found = open_shards(shards, "val")
    if not found.samples:
        raise InputError(f"{found.shown}: the validation split is empty; there is nothing to score")
    trained = input_geometry(info)
    size = size_of_shards(shards, "val", trained, run.checkpoint)
    scores = score(model, shards, size, images, at_most, device, fit=trained.fit)
    return ScoredRun(scores, _facts_of(found))


def _facts_of(shards: AnyShards) -> dict[str, str]:
    """Return what the report says about the shards, by what it calls it."""
    from portrait_dist.data.shards.sets import ShardSets

    if isinstance(shards, ShardSets):
        counts = {part.name: f"{part.shards.samples:,} val" for part in shards.parts}
        return {**counts, "sha256 of the validation split": shards.identity}
    stored = f"{shards.size[0]}x{shards.size[1]}" if shards.size else "their own size"
    counts = {name: f"{entry.samples:,}" for name, entry in shards.manifest.splits.items()}
    return {
        "stored": f"{stored}, {shards.codec}",
        **counts,
        "sha256 of the validation split": str(shards.identity),
    }


def score(
    model: UNet | MaskNetwork,
    shards: str,
    size: tuple[int, int],
    images: int,
    at_most: int = 0,
    device: str = "auto",
    *,
    fit: Fit | None = None,
) -> Scores:
    """Score a model on the validation split, sample by sample.

    Args:
        model: a network in evaluation mode.
        shards: folder or address.
        size: (H, W) of the network's input, in pixels.
        images: how many samples to keep for the gallery, and how many of the worst.
        at_most: samples to score, spread evenly over the split; 0 for all.
        device: ``auto``, ``cpu`` or ``cuda``.
        fit: how images of another shape are brought to that size.
    """
    from portrait_dist.distributed import pick_device
    from portrait_dist.evaluation import ErrorGroups, Scorer, mean_scores

    scorer, errors = Scorer(model, pick_device(device), group_errors=True), ErrorGroups()
    dataset, batches = _batches(shards, size, at_most, fit)
    total, each_set = dataset.samples, _EachSet(dataset.shards)
    scored = min(total, at_most or total)
    shown = {number * scored // images for number in range(images)} if images else set()
    rows: list[SampleScores] = []
    worst = _Worst(images)
    gallery: list[ScoredSample] = []
    for number, sample in enumerate(scorer.score(batches)):
        rows.append(sample.scores)
        errors += sample.errors or ErrorGroups()
        each_set.add(sample)
        if number in shown:
            gallery.append(sample.copy())
        worst.add(number, sample)
    ious = [row.iou for row in rows]
    pooled = float(scorer.pooled.compute())
    return Scores(
        total, pooled, mean_scores(rows), ious, gallery, worst.ranked(), errors, each_set.scores()
    )


class _EachSet:
    """Add up scores for each of several shard sets; nothing for a single one.

    Args:
        shards: the split.
    """

    def __init__(self, shards: AnyShards) -> None:
        from portrait_dist.data.shards.sets import ShardSets
        from portrait_dist.metrics import SoftIoU

        self._sets = shards if isinstance(shards, ShardSets) else None
        parts = self._sets.parts if self._sets else []
        self._pooled = [SoftIoU() for _ in parts]
        self._rows: list[list[SampleScores]] = [[] for _ in parts]

    def add(self, sample: ScoredSample) -> None:
        """Add a sample to the scores of its set."""
        import torch

        if self._sets is None:
            return
        number = self._sets.number_of(sample.position)
        self._rows[number].append(sample.scores)
        self._pooled[number].update(
            torch.from_numpy(sample.prediction)[None, None],
            torch.from_numpy(sample.alpha)[None, None] / 255,
        )

    def scores(self) -> dict[str, SetScores]:
        """Return the scores of the sets that a sample was scored of, by name."""
        from portrait_dist.evaluation import mean_scores

        parts = self._sets.parts if self._sets else []
        return {
            part.name: SetScores(
                len(rows), part.shards.samples, float(pooled.compute()), mean_scores(rows)
            )
            for part, rows, pooled in zip(parts, self._rows, self._pooled, strict=True)
            if rows
        }


class _Worst:
    """The samples of smallest IoU.

    Args:
        at_most: how many to keep.
    """

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most
        # The best of the worst is on top.
        self.heap: list[tuple[float, int, ScoredSample]] = []

    def add(self, number: int, sample: ScoredSample) -> None:
        """Keep a copy of a sample that is worse than one of those kept."""
        if len(self.heap) < self.at_most or (self.at_most and -sample.scores.iou > self.heap[0][0]):
            heapq.heappush(self.heap, (-sample.scores.iou, -number, sample.copy()))
            if len(self.heap) > self.at_most:
                heapq.heappop(self.heap)

    def ranked(self) -> list[ScoredSample]:
        """List them, the worst first, of equal ones the earlier."""
        return [sample for *_, sample in sorted(self.heap, key=lambda one: (-one[0], -one[1]))]


def _batches(
    shards: str, size: tuple[int, int], at_most: int, fit: Fit | None
) -> tuple[AISegmentIterableDataset, Iterator[Batch]]:
    """Return the validation split and its batches in order.

    These are all, or ``at_most`` samples spread evenly over the split.
    """
    from portrait_dist.data import build_loader
    from portrait_dist.evaluation import read_positions
    from portrait_dist.system.progress import track

    loader = build_loader(
        shards, "val", 8, shuffle=False, size=size, fit=fit, drop_last=False, rank=0, world_size=1
    )
    total = loader.dataset.samples
    if not at_most or at_most >= total:
        return loader.dataset, iter(track(loader, len(loader), "batches"))
    wanted = [number * total // at_most for number in range(at_most)]
    return loader.dataset, read_positions(loader.dataset, wanted)
