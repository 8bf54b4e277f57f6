"""Samples of packed shards in their exact order, read and decoded.

``AISegmentIterableDataset`` is a plain torch ``IterableDataset``;
``portrait_dist.data.stream.loader`` puts decoding threads and whole batches on top of it. Both ask
the same ``Order`` and ``BatchPlan``, so they give the same samples in the same order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from portrait_dist import distributed
from portrait_dist.data.shards.sets import AnyShards, ShardSets, open_shards, shape_of_batches
from portrait_dist.data.stream.mixing import MixedOrder, Source
from portrait_dist.data.stream.order import BatchPlan, Ints, Order, whole_number
from portrait_dist.data.stream.transforms import SampleTransforms, Transform
from portrait_dist.errors import DamagedDataError, InputError, one_line
from portrait_dist.preprocessing import FITS, Fit

if TYPE_CHECKING:
    from portrait_dist.data.shards.cache import Cache

log = logging.getLogger("portrait_dist.data")

POSITIONS_PLANNED_AT_ONCE = 4096
"""Positions mapped to samples by one call, whose fixed cost is that of a thousand of them."""


class StreamSample(TypedDict):
    """One sample as torch's DataLoader gets it; it collates dicts, and no dataclasses.

    Shape:
        image: uint8 [H, W, 3], RGB; alpha: uint8 [H, W].
    """

    image: torch.Tensor
    alpha: torch.Tensor
    key: str
    position: int
    epoch: int


class StreamKeywords(TypedDict, total=False):
    """The fields of :class:`StreamOptions`, which documents them, as keyword arguments."""

    shuffle: bool | None
    size: tuple[int, int] | None
    fit: Fit | None
    exact: bool | None
    order: str
    block_samples: int
    on_damage: str
    drop_last: bool | None
    cache: Cache | None
    transforms: Transform | None


@dataclass(frozen=True)
class StreamOptions:
    """How a split is ordered, read and decoded.

    Args:
        shuffle: shuffle the split; None: only ``train``.
        size: (H, W) in pixels of the batches, for shards at original size; None: 256×256 there.
        fit: how shards at original size are brought there; None: as others of the run were
            packed, else squashed.
        exact: decode exactly as the tutorial does. False lets original-size JPEGs be decoded at a
            reduced scale, which is faster and slightly different. None: exact for all but
            ``train``.
        order: ``full`` or ``block``, see :class:`portrait_dist.data.stream.order.Order`.
        block_samples: samples in a block.
        on_damage: ``stop`` raises at a damaged sample; ``skip`` drops it, counts it and logs it
            once.
        drop_last: drop what does not fill a global batch; None: only for ``train``.
        cache: where remote shards are kept; None: the user's cache folder.
        transforms: of image and mask, see :mod:`portrait_dist.data.stream.transforms`; the decoding
            threads apply them, with random numbers by (seed, epoch, position).

    Raises:
        InputError: a value is wrong.
    """

    shuffle: bool | None = None
    size: tuple[int, int] | None = None
    fit: Fit | None = None
    exact: bool | None = None
    order: str = "full"
    block_samples: int = 16384
    on_damage: str = "stop"
    drop_last: bool | None = None
    cache: Cache | None = None
    transforms: Transform | None = None

    def __post_init__(self) -> None:
        if self.on_damage not in ("stop", "skip"):
            raise InputError(f"on_damage={self.on_damage}: it is stop or skip")
        if self.fit not in (None, *FITS):
            raise InputError(f"fit={self.fit}: it is one of {', '.join(FITS)}")
        if self.order not in ("full", "block"):
            raise InputError(f"order={self.order}: it is full or block")
        whole_number("block_samples", self.block_samples, 1)
        if self.size is not None:
            if len(self.size) != 2:
                raise InputError(f"size={self.size}: give (height, width) in pixels")
            for side in self.size:
                whole_number("size", side, 1)


class AISegmentIterableDataset(IterableDataset[StreamSample]):
    """Portraits and their alpha from packed shards: every sample once an epoch, dealt to the ranks.

    Yields dicts: ``image`` uint8 [H, W, 3] RGB, ``alpha`` uint8 [H, W], ``key`` str, ``position``
    and ``epoch`` int.

    With ``DataLoader(dataset, batch_size=dataset.batch_size, num_workers=n)`` the batches are those
    of ``build_loader``, for any n: worker w takes the batches w, w+n, …, and the DataLoader asks
    its workers in turn. ``set_epoch`` also reaches persistent workers; without it every iteration
    repeats the epoch. With another batch size, or where damaged samples are skipped, every sample
    still comes once, in other batches.

    Args:
        shards: folder or address that ``portrait-dist pack`` wrote, or several with weights,
            ``a:1,b:0.3`` (see :mod:`portrait_dist.data.stream.mixing`).
        split: ``train``, ``val`` or ``test``.
        batch_size: samples of this rank in a whole batch; the order is dealt to the ranks by
            batches.
        seed: of the shuffle.
        rank: this process's rank; the process group's by default, else torchrun's, else 0.
        world_size: number of ranks; give both or none.
        options: see :class:`StreamOptions`.

    Raises:
        InputError: no shards there, no such split, or an option is wrong.
        DamagedDataError: while iterating, when a shard or sample is not what the manifest says.
    """

    def __init__(
        self,
        shards: str | Path,
        split: str = "train",
        batch_size: int = 16,
        seed: int = 0,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        options: StreamOptions | None = None,
    ) -> None:
        super().__init__()
        options = options or StreamOptions()
        train = split == "train"
        self.location, self.split, self.cache = shards, split, options.cache
        self.shards = open_shards(shards, split, cache=options.cache)
        stored = (self.shards.size, self.shards.fit)
        self.size, self.fit = shape_of_batches(
            stored, (options.size, options.fit), self.shards.shown
        )
        # Scores must not depend on a shortcut of the decoder; training may take it.
        self.exact = not train if options.exact is None else options.exact
        self.on_damage = options.on_damage
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self.rank, self.world_size = _rank_and_world_size(rank, world_size)
        self.drop_last = train if options.drop_last is None else options.drop_last
        shuffle = train if options.shuffle is None else options.shuffle
        self.order = _order_of(self.shards, seed, options, shuffle)
        self.seed = self.order.seed
        self.transforms = (
            None
            if options.transforms is None
            else SampleTransforms(options.transforms, self.seed, "augment.transforms")
        )
        self.damaged: dict[str, str] = {}
        self._identity = ""  # of its shards, in the process that sent this one
        # Epoch and positions done, in shared memory: copies of this dataset in the processes of a
        # DataLoader, persistent ones too, see a change.
        self._progress = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.plan(0)  # raises for a wrong batch size or rank, before anything starts

    def __len__(self) -> int:
        """Return how many samples this rank yields in an epoch; ``samples`` is the whole split."""
        plan = self.plan(0)
        first, end = plan.span(plan.whole_batches)
        return plan.whole_batches * plan.batch_size + end - first

    @property
    def samples(self) -> int:
        """Samples of an epoch, over all ranks: those of the split, but for sets with weights."""
        return self.order.samples

    @property
    def epoch(self) -> int:
        """Epoch of the next iteration."""
        return int(self._progress[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration.

        It starts at the epoch's beginning, unless it is the epoch of a loaded state.
        """
        epoch = whole_number("epoch", epoch, 0)
        if epoch != self.epoch:
            self._progress[0] = epoch
            self._progress[1] = 0

    def state_after(self, batches: int) -> dict[str, int]:
        """Return the state after each rank has used so many batches of the present iteration."""
        return self.state(self.plan(int(self._progress[1])).seen_after(batches))

    def state(self, samples_seen: int) -> dict[str, int]:
        """Return the state as whole numbers.

        It holds the present epoch, the positions of it that all ranks have done, and what they
        belong to: the number of samples and the seed.
        """
        return {"epoch": self.epoch, "samples_seen": samples_seen, **self._belongs_to()}

    def _belongs_to(self) -> dict[str, int]:
        """Return what a position depends on; of several sets also their content and weights."""
        found = {"samples": self.samples, "seed": self.seed}
        if isinstance(self.shards, ShardSets):
            found["data"] = int(self.shards.identity[:15], 16)
        return found

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Iterate over the rest of the epoch of ``state`` until another epoch is set.

        Any number of ranks may continue.

        Raises:
            InputError: the state belongs to other data or another seed, so that its rest is not
                known, or it is no state.
        """
        for name, here in self._belongs_to().items():
            if state.get(name, here) != here:
                raise InputError(
                    f"{self.shards.shown}: the saved position is for {name}={state[name]}, here "
                    f"it is {here}; resume with the shards and seed that it was saved with, or "
                    "start a new run"
                )
        if not {"epoch", "samples_seen"} <= state.keys():
            raise InputError(
                f"{self.shards.shown}: the saved position lacks epoch or samples_seen; "
                "give what state_dict() returned"
            )
        epoch = whole_number("epoch", state["epoch"], 0)
        # Raises for a position outside of the epoch, before anything is changed.
        self.plan(state["samples_seen"])
        self._progress[0] = epoch
        self._progress[1] = state["samples_seen"]

    def plan(self, start: int) -> BatchPlan:
        """Return the batches of this rank for the rest of an epoch after ``start`` positions."""
        return BatchPlan(
            self.samples, self.batch_size, self.rank, self.world_size, self.drop_last, start
        )

    def batches(
        self, epoch: int, start: int, *, first: int = 0, step: int = 1, most: int | None = None
    ) -> Iterator[tuple[Ints, Ints]]:
        """Yield positions and samples of this rank's batches ``first``, ``first + step`` and so on.

        Both are int64 arrays. Nothing is read. Of ``most`` batches at most; None for all.
        """
        plan = self.plan(start)
        # Mapped in blocks, yielded batch by batch: an epoch of 10^9 samples needs no list of them.
        at_once = max(1, POSITIONS_PLANNED_AT_ONCE // self.batch_size)
        mine = range(first, plan.batches if most is None else min(most, plan.batches), step)
        for begin in range(0, len(mine), at_once):
            positions = [
                np.arange(*plan.span(batch), dtype=np.int64)
                for batch in mine[begin : begin + at_once]
            ]
            samples = self.order.samples_at(epoch, np.concatenate(positions))
            ends = np.cumsum([len(part) for part in positions])
            yield from zip(positions, np.split(samples, ends[:-1]), strict=True)

    def read(
        self,
        sample: int,
        image: NDArray[np.uint8],
        alpha: NDArray[np.uint8],
        cancelled: threading.Event | None = None,
    ) -> str:
        """Read and decode one sample, and return its key.

        Args:
            sample: number of the sample in the split.
            image: uint8 [H, W, 3], contiguous; it is filled.
            alpha: uint8 [H, W]; it is filled.
            cancelled: ends the wait for a server of remote shards when it is set.

        Raises:
            UnreachableError: that server was away for longer than it is waited for.
            DamagedDataError: names shard and sample.
        """
        from portrait_dist.data.shards.decode import decode_pair

        encoded = self.shards.read(sample, cancelled)
        try:
            decode_pair(
                encoded.image,
                encoded.alpha,
                self.size,
                image,
                alpha,
                exact=self.exact,
                codec=encoded.codec,
                fit=self.fit,
            )
        except Exception as error:  # the codecs raise kinds of their own
            raise DamagedDataError(
                f"{self.shards.name(sample)} ({encoded.key}): does not decode "
                f"({one_line(error)}); find all such samples with 'portrait-dist "
                "verify', pack them again, or skip them with data.on_damage=skip"
            ) from error
        return encoded.key

    def skip(self, sample: int, error: DamagedDataError) -> None:
        """Count a damaged sample and log it once, or raise when ``on_damage`` is ``stop``."""
        if self.on_damage == "stop":
            raise error
        name = self.shards.name(sample)
        if name not in self.damaged:
            self.damaged[name] = str(error)
            log.warning("skipped: %s", error)

    def __iter__(self) -> Iterator[StreamSample]:
        if self._identity and self.shards.identity != self._identity:
            raise InputError(
                f"{self.shards.shown}: have changed since this dataset was made, by 'pack "
                "--append' perhaps; make it, or the loader, again"
            )
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, start = self._progress.tolist()
        for positions, samples in self.batches(epoch, start, first=first, step=step):
            for position, sample in zip(positions.tolist(), samples.tolist(), strict=True):
                image, alpha = np.empty((*self.size, 3), np.uint8), np.empty(self.size, np.uint8)
                try:
                    name = self.read(sample, image, alpha)
                except DamagedDataError as error:
                    self.skip(sample, error)
                    continue
                if self.transforms:
                    self.transforms(image, alpha, epoch=epoch, position=position, key=name)
                yield {
                    "image": torch.from_numpy(image),
                    "alpha": torch.from_numpy(alpha),
                    "key": name,
                    "position": position,
                    "epoch": epoch,
                }

    # Open shards hold file descriptors and locks, which do not pickle: a worker process opens its
    # own.
    def __getstate__(self) -> dict[str, object]:
        kept = {name: value for name, value in self.__dict__.items() if name != "shards"}
        return {**kept, "_identity": self.shards.identity}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.shards = open_shards(self.location, self.split, cache=self.cache)


def _order_of(
    shards: AnyShards, seed: int, options: StreamOptions, shuffle: bool
) -> Order | MixedOrder:
    # Validation and test have every sample once, and sets without weights are one split.
    if shuffle and shards.split == "train" and isinstance(shards, ShardSets) and shards.weighted:
        sources = [
            Source(part.shards.samples, part.epoch_samples, part.shards.shard_sizes)
            for part in shards.parts
        ]
        return MixedOrder(sources, seed, options.order, block_samples=options.block_samples)
    return Order(
        shards.samples,
        seed,
        options.order if shuffle else "sequential",
        block_samples=options.block_samples,
        shard_sizes=shards.shard_sizes,
    )


def _rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size: given, else the process group's, else torchrun's, else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise InputError(f"rank={rank}, world_size={world_size}: give both or none")
    if rank is not None and world_size is not None:
        return rank, world_size
    if distributed.is_initialized():
        import torch.distributed as dist

        return dist.get_rank(), dist.get_world_size()
    return distributed.rank(), distributed.world_size()
