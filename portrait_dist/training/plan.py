"""What follows from a configuration, the number of training samples and the number of ranks.

Two words are never mixed: a *batch* is one forward of a rank, a *step* is one step of the
optimiser, made of ``accumulate`` batches on every rank. Everything that prints or stores such
numbers (the table before training, ``submit``, ``quickstart``, results, ``metrics.jsonl``) takes
them from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from portrait_dist.config import Config, TrainConfig
from portrait_dist.errors import InputError
from portrait_dist.system.address import redact


@dataclass(frozen=True)
class Plan:
    """Derived numbers of a run.

    Args:
        world_size: number of ranks.
        batch_size: samples of a rank in a batch.
        accumulate: batches whose gradients are averaged for a step.
        global_batch: samples of a step over all ranks.
        batches_per_epoch: batches of each rank in an epoch.
        steps_per_epoch: optimiser steps in an epoch.
        max_epochs: epochs of the whole run.
        train_samples: samples of the training split.
        dropped: samples that no step of an epoch sees; others in each epoch.
        lr: learning rate after scaling.
        lr_scale: factor of the linear rule that ``lr`` contains.
        warmup_steps: steps of linear warm-up.
        warmup_asked: the same as the configuration has it.
        notes: what was changed so that it fits, one line each.
    """

    world_size: int
    batch_size: int
    accumulate: int
    global_batch: int
    batches_per_epoch: int
    steps_per_epoch: int
    max_epochs: int
    train_samples: int
    dropped: int
    lr: float
    lr_scale: float
    warmup_steps: int
    warmup_asked: int
    notes: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.max_epochs

    def rows(self) -> dict[str, str]:
        """Return the numbers for people, by name."""
        split = f"{_ranks(self.world_size)} × {self.batch_size} samples"
        if self.accumulate > 1:
            split += f" × {self.accumulate} batches"
        per_epoch = f"{self.steps_per_epoch:,}"
        if self.accumulate > 1:
            per_epoch += f", {self.batches_per_epoch:,} batches on each rank"
        dropped = f" ({self.dropped:,} dropped in each epoch, others every time)"
        scaled = f"{self.lr_scale:g} times train.lr" if self.lr_scale != 1 else "not scaled"
        return {
            "world size": f"{self.world_size}",
            "global batch": f"{self.global_batch:,} samples = {split}",
            "steps per epoch": per_epoch,
            "epochs": f"{self.max_epochs:,}, {self.total_steps:,} steps in all",
            "training samples": f"{self.train_samples:,}{dropped if self.dropped else ''}",
            "learning rate": f"{self.lr:g}, {scaled}; {self._warmup()}",
        }

    def _warmup(self) -> str:
        if not self.warmup_asked:
            return "no warm-up"
        used = f"warm-up over {self.warmup_steps:,} steps"
        if self.warmup_steps < self.warmup_asked:
            used += f" ({self.warmup_asked:,} asked for; an epoch has no more)"
        return used


@dataclass(frozen=True)
class _Batches:
    """How the global batch is split over ranks and time."""

    size: int
    accumulate: int
    per_epoch: int
    notes: tuple[str, ...] = ()


def steps_of(batches: int, accumulate: int) -> int:
    """Return the optimiser steps of an epoch's first batches, rounded up.

    Gradients do not stay over the end of an epoch: what is left of a group of ``accumulate``
    batches is a step of its own.
    """
    # Floor division of the negative: rounded up, without a float.
    return -(-batches // accumulate)


def make_plan(config: Config, train_samples: int, world_size: int) -> Plan:
    """Derive the numbers of a run.

    Args:
        config: the configuration.
        train_samples: samples of the training split.
        world_size: number of ranks.

    Raises:
        InputError: the samples do not fill what was asked for, or the global batch does not divide.
    """
    train = config.train
    if train.global_batch:
        batches = _fixed_global_batch(config, train_samples, world_size)
    else:
        batches = _by_rank(config, train_samples, world_size)
    global_batch = batches.size * world_size * batches.accumulate
    scale = global_batch / train.lr_base_batch if train.lr_base_batch else 1.0
    steps = steps_of(batches.per_epoch, batches.accumulate)
    return Plan(
        world_size=world_size,
        batch_size=batches.size,
        accumulate=batches.accumulate,
        global_batch=global_batch,
        batches_per_epoch=batches.per_epoch,
        steps_per_epoch=steps,
        max_epochs=train.max_epochs,
        train_samples=train_samples,
        dropped=train_samples - batches.per_epoch * batches.size * world_size,
        lr=_scaled(train, global_batch),
        lr_scale=scale,
        warmup_steps=min(train.warmup_steps, steps),
        warmup_asked=train.warmup_steps,
        notes=batches.notes,
    )


def _scaled(train: TrainConfig, global_batch: int) -> float:
    return train.lr * global_batch / train.lr_base_batch if train.lr_base_batch else train.lr


def _by_rank(config: Config, samples: int, world_size: int) -> _Batches:
    """``train.batch_size`` samples on each rank; fewer where the split is small."""
    train = config.train
    size = train.batch_size
    notes: tuple[str, ...] = ()
    if samples < size * world_size:
        size = _largest_batch(config, samples, world_size)
        notes = (
            f"train.batch_size is {size} instead of {train.batch_size}: there are only "
            f"{samples} training samples for {_ranks(world_size)}",
        )
    # Computed from the manifest alone: every rank gets the same, before anything is read.
    per_epoch = samples // (size * world_size)
    return _Batches(size, train.accumulate, min(per_epoch, train.max_batches or per_epoch), notes)


def _largest_batch(config: Config, samples: int, world_size: int) -> int:
    """Return the batch size that a small split fills; refuse where the user chose another."""
    fits = samples // world_size
    batch = config.train.batch_size
    if fits and "train.batch_size" not in config.given:
        return fits
    what = f"{redact(config.data.shards)}: {samples} training samples do not fill one batch"
    if not fits:
        raise InputError(f"{what} on {_ranks(world_size)}; use at most {max(samples, 1)} rank(s)")
    raise InputError(
        f"{what} of {batch * world_size} ({_ranks(world_size)} × train.batch_size={batch}); "
        f"set train.batch_size={fits} or less, or use fewer ranks"
    )


def _fixed_global_batch(config: Config, samples: int, world_size: int) -> _Batches:
    """``train.global_batch`` samples a step, whatever the number of ranks.

    A rank takes its samples in as few batches as ``train.batch_size`` allows.
    """
    train, whole = config.train, config.train.global_batch
    if train.accumulate != 1:
        raise InputError(
            f"train.accumulate={train.accumulate} and train.global_batch={whole}: the first "
            "follows from the second; leave train.accumulate out"
        )
    if whole % world_size:
        possible = [ranks for ranks in range(1, 2 * world_size) if whole % ranks == 0]
        raise InputError(
            f"train.global_batch={whole} cannot be divided by {_ranks(world_size)}; use "
            f"{', '.join(map(str, possible))} ranks, or a multiple of {world_size}"
        )
    if samples < whole:
        raise InputError(
            f"{redact(config.data.shards)}: {samples} training samples do not fill "
            f"train.global_batch={whole}; set it to {samples} or less"
        )
    per_rank = whole // world_size
    accumulate = next(
        count
        for count in range(1, per_rank + 1)
        if per_rank % count == 0 and per_rank // count <= train.batch_size
    )
    steps = samples // whole
    if train.max_batches:
        # Whole steps: half a group of batches would be a step of another global batch.
        steps = min(steps, max(1, train.max_batches // accumulate))
    return _Batches(per_rank // accumulate, accumulate, steps * accumulate)


def _ranks(world_size: int) -> str:
    return f"{world_size} rank{'s' if world_size != 1 else ''}"
