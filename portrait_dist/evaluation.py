"""Score a checkpoint on a split: every sample once, on one rank or on many, added up exactly.

There is one scoring loop, :class:`Scorer`; ``portrait-dist evaluate`` and ``portrait-dist report``
both run it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import cv2
import numpy as np
import torch

from portrait_dist import distributed, files
from portrait_dist.checkpoints import input_geometry, load_model, read_info
from portrait_dist.data import build_loader
from portrait_dist.data.shards.sets import ShardSets, open_shards
from portrait_dist.errors import InputError
from portrait_dist.losses import SoftIoULoss
from portrait_dist.metrics import BOUNDARY_RATIO, PrecisionRecall, SoftIoU, per_sample
from portrait_dist.preprocessing import Alpha, ImageArray, normalise
from portrait_dist.system.malloc import keep_freed_memory

if TYPE_CHECKING:
    from portrait_dist.checkpoints import CheckpointInfo, InputGeometry
    from portrait_dist.data.shards.sets import Part
    from portrait_dist.data.stream.dataset import AISegmentIterableDataset
    from portrait_dist.data.stream.loader import Batch, StreamLoader
    from portrait_dist.models import MaskNetwork, UNet

ERROR_GROUPS = {
    "edge": "at the edge",
    "missed": "person missed",
    "attached": "background attached",
    "islands": "islands",
}
"""Groups of wrong pixels, see :class:`ErrorGroups`, as people read them."""
EXAMPLES = 4
"""Samples in each of the two pictures of examples."""


@dataclass(frozen=True)
class SampleScores:
    """Scores of one sample, as :func:`portrait_dist.metrics.per_sample` defines them.

    ``iou`` cuts both masks at 0.5.
    """

    iou: float
    mae: float
    mse: float
    boundary_iou: float
    gradient_error: float


@dataclass(frozen=True)
class ErrorGroups:
    """Wrong pixels (masks cut at 0.5) by where they are; counts of one sample or sums of many.

    Attributes:
        edge: within 2 % of the diagonal of the true edge (the band of boundary IoU): hair, blur.
        missed: person beyond that band taken for background: hands, bags, clothes.
        attached: background beyond it taken for person, in one piece with the person.
        islands: background in pieces that touch no person; ``predict --largest`` drops them.
        pieces: number of such islands.
    """

    edge: int = 0
    missed: int = 0
    attached: int = 0
    islands: int = 0
    pieces: int = 0

    def __add__(self, other: ErrorGroups) -> ErrorGroups:
        """Add up the counts."""
        return ErrorGroups(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def wrong(self) -> int:
        """Number of wrong pixels."""
        return self.edge + self.missed + self.attached + self.islands


@dataclass(frozen=True)
class SampleRow:
    """What is kept of every sample.

    Attributes:
        key: of the sample.
        position: number of the sample in the split.
        scores: of the prediction.
        errors: of the prediction, where they were asked for.
    """

    key: str
    position: int
    scores: SampleScores
    errors: ErrorGroups | None


@dataclass(frozen=True)
class ScoredSample(SampleRow):
    """A sample with its scores and its images.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        alpha: uint8 [H, W], the true matte.
        prediction: float32 [H, W] in [0, 1].
    """

    image: ImageArray
    alpha: ImageArray
    prediction: Alpha

    def row(self) -> SampleRow:
        """Return the sample without its images."""
        return SampleRow(self.key, self.position, self.scores, self.errors)

    def copy(self) -> ScoredSample:
        """Return a copy that does not keep the whole batch in memory."""
        images = (self.image.copy(), self.alpha.copy(), self.prediction.copy())
        return ScoredSample(self.key, self.position, self.scores, self.errors, *images)


@dataclass(frozen=True)
class CurvePoint:
    """Precision, recall and IoU above one threshold, pixels pooled over the split."""

    thresholds: float
    precision: float
    recall: float
    iou: float


@dataclass(frozen=True)
class SplitScores:
    """Scores of a split.

    ``iou``, ``precision`` and ``recall`` pool the pixels of all samples and cut at 0.5;
    ``mean_iou`` to ``gradient_error`` are means over the samples; ``best_threshold`` is the one
    with the largest pooled IoU.
    """

    split: str
    samples: int
    iou: float
    loss: float
    mean_iou: float
    mae: float
    mse: float
    boundary_iou: float
    gradient_error: float
    precision: float
    recall: float
    best_threshold: float
    world_size: int


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        scores: of the whole split.
        rows: of every sample, ordered by key.
        curve: at 101 thresholds from 0 to 1.
        errors: sums over the split, where they were asked for.
        sets: scores of each of several shard sets, by name.
    """

    scores: SplitScores
    rows: list[SampleRow]
    curve: list[CurvePoint]
    errors: ErrorGroups | None = None
    sets: dict[str, SplitScores] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateResult(SplitScores):
    """What ``portrait-dist evaluate`` prints.

    Attributes:
        errors: wrong pixels by group, and ``wrong``, their number; None where not asked for.
        pictures: files of example images; None where not asked for.
        sets: scores of each of several shard sets, by name; None for a single one.
    """

    errors: dict[str, int] | None = None
    pictures: list[str] | None = None
    sets: dict[str, dict[str, Any]] | None = None

    @classmethod
    def of(cls, found: Evaluation, pictures: list[str] | None) -> EvaluateResult:
        """Take what is printed out of an evaluation."""
        groups = found.errors
        errors = asdict(groups) | {"wrong": groups.wrong} if groups else None
        sets = {name: asdict(scores) for name, scores in found.sets.items()}
        return cls(**asdict(found.scores), errors=errors, pictures=pictures, sets=sets or None)


class ScoringOptions(TypedDict, total=False):
    """Options of :func:`evaluate`, which documents them."""

    batch_size: int
    workers: int
    device: str
    size: tuple[int, int] | None
    trust_code: bool


class Scorer:
    """Score batches sample by sample and add up what is pooled over samples.

    Args:
        model: a network in evaluation mode; it is moved to ``device``.
        device: where to compute.
        group_errors: count the wrong pixels of every sample by where they are, on the host.

    Attributes:
        pooled: IoU over all pixels seen so far; its ``compute`` sums over the ranks.
        thresholds: precision and recall likewise.
        loss_sum: float64 scalar, the losses of the samples seen so far, of this rank.
        samples: how many samples were seen, of this rank.
    """

    def __init__(
        self, model: UNet | MaskNetwork, device: torch.device, *, group_errors: bool = False
    ) -> None:
        self.model, self.device = model.to(device), device
        self.group_errors = group_errors
        self.pooled = SoftIoU().to(device)
        self.thresholds = PrecisionRecall().to(device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.samples = 0
        self._criterion = SoftIoULoss(0.5, 0.5)

    def fresh(self) -> Scorer:
        """Make one of the same network that has seen nothing."""
        return Scorer(self.model, self.device, group_errors=self.group_errors)

    def add(self, other: Scorer) -> None:
        """Add what another one of the same network has seen on this rank."""
        for mine, its in ((self.pooled, other.pooled), (self.thresholds, other.thresholds)):
            for name, value in its.metric_state.items():
                setattr(mine, name, getattr(mine, name) + value)
            mine._update_count += its._update_count
        self.loss_sum += other.loss_sum
        self.samples += other.samples

    def score(self, batches: Iterable[Batch]) -> Iterator[ScoredSample]:
        """Yield every sample of the batches in order; its images are views of its batch."""
        for batch in batches:
            predictions, columns = self._score_batch(batch)
            images, alphas = batch.image.numpy(), batch.alpha.numpy()
            for i, key in enumerate(batch.keys):
                scores = SampleScores(**{name: values[i] for name, values in columns.items()})
                errors = group_errors(alphas[i], predictions[i]) if self.group_errors else None
                yield ScoredSample(
                    key,
                    int(batch.positions[i]),
                    scores,
                    errors,
                    images[i],
                    alphas[i],
                    predictions[i],
                )

    @torch.inference_mode()
    def _score_batch(self, batch: Batch) -> tuple[Alpha, dict[str, list[float]]]:
        """Predictions, float32 [B, H, W], and the scores of the batch's samples by name."""
        with exact_float32():
            images, mattes = normalise(batch.image.to(self.device), batch.alpha.to(self.device))
            logits = self.model(images, return_logits=True)
            probabilities = torch.sigmoid(logits)
            self.pooled.update(probabilities, mattes)
            self.thresholds.update(probabilities, mattes)
            self.loss_sum += self._criterion(logits, mattes).double() * len(images)
            self.samples += len(images)
            found = per_sample(probabilities, mattes)
        # One copy from the device for all scores: each `tolist` of its own would wait for it again.
        rows = torch.stack(list(found.values())).tolist()
        return probabilities[:, 0].float().cpu().numpy(), dict(zip(found, rows, strict=True))


def group_errors(alpha: ImageArray, prediction: Alpha) -> ErrorGroups:
    """Count the wrong pixels of one sample by where they are.

    Args:
        alpha: uint8 [H, W], the true matte.
        prediction: float32 [H, W] in [0, 1].
    """
    truth, found = alpha > 127, prediction > 0.5
    wrong = truth != found
    if not wrong.any():
        return ErrorGroups()
    reach = max(1, round(BOUNDARY_RATIO * math.hypot(*truth.shape)))
    box = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    # A pixel is in the band where its neighbourhood holds both person and background.
    band = cv2.dilate(truth.astype(np.uint8), box) > cv2.erode(truth.astype(np.uint8), box)
    count, labels = cv2.connectedComponents(found.astype(np.uint8), connectivity=8)
    touching = np.zeros(count, bool)
    touching[np.unique(labels[truth])] = True
    touching[0] = True  # the background
    island = ~touching[labels]
    beyond = wrong & ~band & ~island
    return ErrorGroups(
        edge=int((wrong & band & ~island).sum()),
        missed=int((beyond & truth).sum()),
        attached=int((beyond & found).sum()),
        islands=int(island.sum()),
        pieces=int(count - touching.sum()),
    )


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Multiply float32 numbers as float32, whatever the caller has set.

    That is without TF32 on GPUs and without bfloat16 on CPUs. TF32 keeps 10 bits of the mantissa; a
    score would depend on the machine. The caller's settings come back afterwards.
    """
    backends = torch.backends
    switches = (
        backends.cuda.matmul,
        backends.cudnn.conv,  # type: ignore[attr-defined]
        backends.mkldnn.matmul,  # type: ignore[attr-defined]
        backends.mkldnn.conv,  # type: ignore[attr-defined]
    )
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def evaluate(
    checkpoint: str | Path,
    shards: str,
    split: str = "test",
    *,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
    size: tuple[int, int] | None = None,
    group_errors: bool = False,
    trust_code: bool = False,
) -> Evaluation | None:
    """Score a checkpoint on a split; under torchrun every rank calls it.

    Args:
        checkpoint: a .pth file of a run.
        shards: folder or address of the shards, or several, ``a,b``: each is scored, and all.
        split: ``train``, ``val`` or ``test``.
        batch_size: samples per rank and batch; no score depends on it.
        workers: decoding threads.
        device: ``auto``, ``cpu`` or ``cuda``.
        size: (H, W) of training, for a checkpoint that does not say it.
        group_errors: count wrong pixels by where they are.
        trust_code: import the network's code where it is the user's.

    Returns:
        The evaluation on rank 0, None on the other ranks.

    Raises:
        InputError: no such checkpoint or shards, or shards of another size than the checkpoint's.
        DamagedDataError: one of them is damaged.
    """
    chosen = _start(device)
    model, info = distributed.on_every_rank(lambda: load_model(checkpoint, trust_code=trust_code))
    loader = distributed.on_every_rank(
        lambda: _open_split(shards, split, batch_size, workers, chosen, checkpoint, info, size)
    )
    return _score_split(Scorer(model, chosen, group_errors=group_errors), loader, split)


def _score_split(every: Scorer, loader: StreamLoader, split: str) -> Evaluation | None:
    """Score all samples, of several sets each on its own too."""
    if isinstance(loader.dataset.shards, ShardSets):
        return _score_sets(every, loader, loader.dataset.shards.parts, split)
    return _gathered(every, split, [sample.row() for sample in every.score(loader)])


def _score_sets(
    every: Scorer, loader: StreamLoader, parts: Sequence[Part], split: str
) -> Evaluation | None:
    """Score several sets one after the other, each on its own and all together."""
    rows: list[SampleRow] = []
    sets: dict[str, SplitScores] = {}
    for part in parts:
        if not part.shards.samples:
            continue
        scorer = every.fresh()
        own = _open_part(loader, part)
        found = [_numbered(sample.row(), part) for sample in scorer.score(own)]
        if scores := _gathered(scorer, split, found):
            sets[part.name] = scores.scores
        every.add(scorer)
        rows += found
    whole = _gathered(every, split, rows)
    return replace(whole, sets=sets) if whole else None


def _open_part(loader: StreamLoader, part: Part) -> StreamLoader:
    """Open one of several sets as all of them are: every sample once, at the same size."""
    return build_loader(
        part.shards.location,
        loader.dataset.split,
        loader.batch_size,
        workers=loader.num_workers or -1,
        pin_memory=loader.pin_memory,
        shuffle=False,
        size=loader.dataset.size,
        fit=loader.dataset.fit,
        drop_last=False,
    )


def _numbered(row: SampleRow, part: Part) -> SampleRow:
    """Name and number a sample of one set as one of all sets."""
    return replace(row, key=f"{part.name}:{row.key}", position=part.first + row.position)


def _start(device: str) -> torch.device:
    """Join the process group; return where this rank computes."""
    keep_freed_memory()
    chosen = distributed.pick_device(device)
    distributed.start(chosen)
    return chosen


def check_inputs(checkpoint: str | Path, shards: str, split: str) -> None:
    """Check that a checkpoint and a split can be opened, before a job for them is queued.

    Raises:
        InputError: no such checkpoint, shards or split.
        DamagedDataError: one of them is damaged.
    """
    read_info(Path(checkpoint))
    open_shards(shards, split)


def _open_split(
    shards: str,
    split: str,
    batch_size: int,
    workers: int,
    device: torch.device,
    checkpoint: str | Path,
    info: CheckpointInfo,
    size: tuple[int, int] | None,
) -> StreamLoader:
    """Open this rank's part of a split, every sample once, at the size of training."""
    trained = input_geometry(info, size)
    return build_loader(
        shards,
        split,
        batch_size,
        workers=workers,
        pin_memory=device.type == "cuda",
        shuffle=False,
        size=size_of_shards(shards, split, trained, checkpoint),
        fit=trained.fit,
        drop_last=False,
    )


def _gathered(scorer: Scorer, split: str, rows: list[SampleRow]) -> Evaluation | None:
    """Sum over the ranks; None on all ranks but 0."""
    sums = torch.stack([scorer.loss_sum, scorer.loss_sum.new_tensor(scorer.samples)])
    distributed.sum_over_ranks([sums])
    iou = float(scorer.pooled.compute())
    columns = {name: values.tolist() for name, values in scorer.thresholds.compute().items()}
    columns["thresholds"] = [round(value, 6) for value in columns["thresholds"]]  # 0.01, in float32
    parts = distributed.gather_to_rank_0(rows)
    if parts is None:
        return None
    every = [row for part in parts for row in part]
    every.sort(key=lambda row: row.key)
    curve = [
        CurvePoint(**dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]
    half = next(point for point in curve if point.thresholds == 0.5)
    means = mean_scores([row.scores for row in every])
    scores = SplitScores(
        split=split,
        samples=len(every),
        iou=iou,
        loss=float(sums[0] / sums[1].clamp(min=1)),
        mean_iou=means.iou,
        mae=means.mae,
        mse=means.mse,
        boundary_iou=means.boundary_iou,
        gradient_error=means.gradient_error,
        precision=half.precision,
        recall=half.recall,
        best_threshold=max(curve, key=lambda point: point.iou).thresholds,
        world_size=distributed.world_size(),
    )
    errors = [row.errors for row in every if row.errors]
    return Evaluation(scores, every, curve, sum(errors, ErrorGroups()) if errors else None)


def mean_scores(scores: Sequence[SampleScores]) -> SampleScores:
    """Mean of each score over the samples; 0 without samples."""
    count = max(len(scores), 1)
    names = [field.name for field in fields(SampleScores)]
    return SampleScores(**{name: sum(getattr(s, name) for s in scores) / count for name in names})


def size_of_shards(
    shards: str, split: str, trained: InputGeometry, checkpoint: str | Path
) -> tuple[int, int]:
    """Return the size of training where the shards can be read at it.

    Raises:
        InputError: no shards there, or they were packed at another size or fit than the checkpoint
            was trained with.
    """
    opened = open_shards(shards, split)
    packed, size = opened.size, trained.size
    if packed is not None and opened.fit != trained.fit:
        raise InputError(
            f"{checkpoint}: the checkpoint was trained on images with --fit {trained.fit}, but "
            f"{opened.shown} was packed with --fit {opened.fit}; pack again with "
            f"--fit {trained.fit}, or with --size original for any"
        )
    if packed is not None and tuple(packed) != size:
        raise InputError(
            f"{checkpoint}: the checkpoint was trained at {size[0]}x{size[1]}, but "
            f"{opened.shown} was packed at {packed[0]}x{packed[1]}; pack again with "
            f"--size {size[0]}x{size[1]}, or with --size original for any size"
        )
    return size


def write_examples(
    found: Evaluation,
    checkpoint: str | Path,
    shards: str,
    folder: Path,
    *,
    device: str = "auto",
    size: tuple[int, int] | None = None,
    trust_code: bool = False,
) -> list[str]:
    """Draw the worst and the median samples by IoU: image, matte, prediction, cut-out, errors.

    Where errors were grouped, also those with the most wrong pixels of each group.

    Args:
        found: what :func:`evaluate` returned for this checkpoint and these shards.
        checkpoint: as for :func:`evaluate`.
        shards: likewise.
        device: likewise.
        size: likewise.
        trust_code: likewise.
        folder: for ``SPLIT-worst.png``, ``SPLIT-median.png``, ``SPLIT-edge.png`` and so on; made
            where it does not exist.

    Returns:
        The written files; none without samples.
    """
    split = found.scores.split
    paths = []
    for name, positions in _positions_to_draw(found.rows).items():
        samples = score_positions(
            checkpoint, shards, split, positions, device=device, size=size, trust_code=trust_code
        )
        paths.append(folder / f"{split}-{name}.png")
        _draw(samples, paths[-1])
    return [str(path) for path in paths]


def _positions_to_draw(rows: Sequence[SampleRow]) -> dict[str, list[int]]:
    """Return the positions to draw by name of the picture; nothing without samples."""
    ranked = [row.position for row in sorted(rows, key=lambda row: row.scores.iou)]
    middle = max(0, (len(ranked) - EXAMPLES) // 2)
    pictures = {"worst": ranked[:EXAMPLES], "median": ranked[middle : middle + EXAMPLES]}
    for group in ERROR_GROUPS:
        counts = [(getattr(row.errors, group), row.position) for row in rows if row.errors]
        most = sorted((one for one in counts if one[0]), key=lambda one: (-one[0], one[1]))
        if most:
            pictures[group] = [position for _, position in most[:EXAMPLES]]
    return pictures if ranked else {}


def _draw(samples: Sequence[ScoredSample], path: Path) -> None:
    """Draw samples below each other into one picture."""
    from portrait_dist.visualize import picture_grid

    grid = picture_grid(
        [sample.image for sample in samples],
        [sample.alpha for sample in samples],
        [sample.prediction for sample in samples],
        [sample.scores.iou for sample in samples],
    )
    with files.explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(path, suffix=".png") as temporary:
        grid.save(temporary)


def score_positions(
    checkpoint: str | Path,
    shards: str,
    split: str,
    positions: Sequence[int],
    *,
    device: str = "auto",
    size: tuple[int, int] | None = None,
    trust_code: bool = False,
) -> list[ScoredSample]:
    """Score a few samples of a split, such as the worst ones; only these are read and decoded.

    Args:
        checkpoint: as for :func:`evaluate`.
        shards: likewise.
        split: likewise.
        device: likewise.
        size: likewise.
        trust_code: likewise.
        positions: numbers of the samples in the split.
    """
    model, info = load_model(checkpoint, trust_code=trust_code)
    trained = input_geometry(info, size)
    loader = build_loader(
        shards,
        split,
        1,
        rank=0,
        world_size=1,
        shuffle=False,
        size=size_of_shards(shards, split, trained, checkpoint),
        fit=trained.fit,
        drop_last=False,
    )
    scorer = Scorer(model, distributed.pick_device(device))
    return list(scorer.score(read_positions(loader.dataset, positions)))


def read_positions(
    dataset: AISegmentIterableDataset, positions: Sequence[int], batch_size: int = 8
) -> Iterator[Batch]:
    """Read and decode chosen samples of a split, in the order given.

    Args:
        dataset: the split, not shuffled.
        positions: numbers of the samples in the split.
        batch_size: samples in a batch; the last one may be shorter.

    Raises:
        DamagedDataError: names shard and sample.
    """
    from portrait_dist.data.stream.loader import Batch

    for first in range(0, len(positions), batch_size):
        chosen = np.asarray(positions[first : first + batch_size], np.int64)
        images = np.empty((len(chosen), *dataset.size, 3), np.uint8)
        alphas = np.empty((len(chosen), *dataset.size), np.uint8)
        keys = [
            dataset.read(int(position), images[i], alphas[i]) for i, position in enumerate(chosen)
        ]
        yield Batch(torch.from_numpy(images), torch.from_numpy(alphas), keys, 0, chosen)


def baseline_iou(shards: str, size: tuple[int, int], split: str = "test") -> float:
    """Score one constant mask on a split: the mean matte of the training split, cut at 0.5.

    Args:
        shards: folder or address of the shards.
        size: (H, W) at which both are compared.
        split: the split to score.

    Returns:
        IoU, pixels pooled.
    """

    def batches(name: str) -> Iterable[Batch]:
        return build_loader(
            shards, name, 16, rank=0, world_size=1, shuffle=False, size=size, drop_last=False
        )

    total, count = torch.zeros(size, dtype=torch.float64), 0
    for batch in batches("train"):
        total += batch.alpha.to(torch.float64).sum(0) / 255
        count += len(batch.alpha)
    mean = (total / max(count, 1)).to(torch.float32)
    pooled = SoftIoU()
    for batch in batches(split):
        pooled.update(mean.expand(len(batch.alpha), *size), batch.alpha.to(torch.float32) / 255)
    return float(pooled.compute())
