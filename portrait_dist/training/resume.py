"""Start, resume or refuse: what a run folder allows, decided before anything is written into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portrait_dist import checkpoints, distributed
from portrait_dist.checkpoints import CheckpointInfo
from portrait_dist.config import ASK, FIXED, Config, settings
from portrait_dist.errors import DamagedDataError, InputError, one_line, shorten
from portrait_dist.recipes import parts
from portrait_dist.runs.folder import LATEST, RunFolder
from portrait_dist.system.address import redact
from portrait_dist.training import components
from portrait_dist.training.averaging import AverageOfBest
from portrait_dist.training.plan import Plan
from portrait_dist.training.state import plain_state

SILENT = ("recipe", "run.", "data.workers", "data.prefetch_batches", "data.cache_", "train.threads")
"""Settings whose change is not worth a word."""


@dataclass(frozen=True)
class Start:
    """How a run starts.

    Args:
        info: what the latest checkpoint says; None for a new run.
        finished: the run has all its epochs.
    """

    info: CheckpointInfo | None = None
    finished: bool = False


@dataclass(frozen=True)
class Change:
    """A setting that the checkpoint has otherwise."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.before)}, now it is {_shown(self.now)}"


@dataclass(frozen=True)
class DataIdentity:
    """The content of a split.

    Args:
        now: hash of it.
        earlier: its hashes in the versions before, the first version's first; ``pack --append``
            makes versions.
        grown_since: says which of several sets have grown since they had another hash.
    """

    now: str
    earlier: Sequence[str] = ()
    grown_since: Callable[[str], str] = lambda identity: ""

    @property
    def version(self) -> int:
        """Number of the version."""
        return len(self.earlier) + 1


def decide(
    config: Config, plan: Plan, data: Mapping[str, DataIdentity], size: tuple[int, int]
) -> Start:
    """Compare a run's latest checkpoint with what is asked for; reads only.

    Args:
        config: the configuration.
        plan: what follows from it.
        data: identity of each split of the shards, by split.
        size: (H, W) of the training images.

    Raises:
        InputError: ``run.resume=false``, or the run was started with other data, another network or
            other settings.
        DamagedDataError: the checkpoint is damaged.
    """
    folder = RunFolder(config.run_dir)
    if not folder.latest.exists():
        return Start()
    if not config.run.resume:
        raise InputError(
            f"{folder.path}: the run exists and run.resume=false; choose another run.name, or "
            "resume it with run.resume=true"
        )
    info = checkpoints.read_info(folder.latest)
    _refuse_other_data(config, info, data)
    _refuse_changes(config, info, size)
    if (info.epoch or 0) >= plan.max_epochs:
        distributed.print0(
            f"{folder.path}: finished already ({info.epoch} epochs); raise train.max_epochs to "
            "train on"
        )
        return Start(info, finished=True)
    _refuse_other_batch(folder, plan, info)
    _print_start(config, info)
    return Start(info)


def _refuse_other_batch(folder: RunFolder, plan: Plan, info: CheckpointInfo) -> None:
    # A position within an epoch is a number of global batches: of another size it is another place.
    if info.batches is not None and info.global_batch not in (None, plan.global_batch):
        raise InputError(
            f"{folder.latest}: stopped in the middle of an epoch with a global batch of "
            f"{info.global_batch}, now it is {plan.global_batch}; set "
            f"train.global_batch={info.global_batch}"
        )


def check_files(config: Config, network: nn.Module, params: Mapping[str, Any]) -> None:
    """Read to the last byte what training will read, before anything in the folder changes.

    Args:
        config: of a run that is resumed.
        network: what its weights must fit.
        params: SuperGradients' training parameters of the optimiser.

    Raises:
        InputError: the weights are of another network.
        DamagedDataError: a checkpoint is damaged.
    """
    folder = RunFolder(config.run_dir)
    state = checkpoints.read(folder.latest)
    checkpoints.check_resumable(state, folder.latest)
    if misfit := components.fitting(state["net"], network)[1]:
        raise InputError(f"{folder.latest}: holds another model ({misfit}); {_advice(config)}")
    if state.get("ema_net") and (misfit := components.fitting(state["ema_net"], network)[1]):
        raise DamagedDataError(
            f"{folder.latest}: the moving average in it does not fit its network ({misfit}); start "
            "again from its weights, with model.weights= and another run.name"
        )
    _check_optimizer(state["optimizer_state_dict"], config, network, params, folder.latest)
    members = checkpoints.info_of(state, folder.latest).averaged or ()
    AverageOfBest(folder.path, greater_is_better=True).check_files(members)
    if not folder.best.exists() or folder.best.samefile(folder.latest):
        return
    try:
        checkpoints.check_whole(folder.best)
    except (InputError, DamagedDataError) as error:
        raise DamagedDataError(
            f"{folder.best}: is damaged; remove it and resume: the run continues from {LATEST}, "
            "and the next epoch that is better writes it again"
        ) from error


def _check_optimizer(
    state: dict[str, Any], config: Config, network: nn.Module, params: Mapping[str, Any], path: Path
) -> None:
    """Take a step with the state of the optimiser, on a copy of the weights.

    With one learning rate SuperGradients names all groups ``default``. A step of somebody's own
    optimiser may do more than change weights, so none is taken.
    """
    problem = ""
    if any(group.get("name") != "default" for group in state["param_groups"]):
        problem = "name"
    elif params["optimizer"] in components.OPTIMIZERS.values():
        from portrait_dist.training.sg_adapter import make_optimizer

        copied = copy.deepcopy(network).cpu()
        for weight in copied.parameters():
            weight.grad = torch.zeros_like(weight)
        try:
            tried = make_optimizer(copied, params, decay_norms=config.train.decay_norms)
            tried.load_state_dict(state)
            tried.step()
        except Exception as error:  # torch meets a state that it did not write with any of them
            problem = one_line(error)
    if problem:
        raise DamagedDataError(
            f"{path}: damaged ({problem} of the optimizer); start again from its weights, with "
            "model.weights= and another run.name"
        )


def apply_changes(
    state: dict[str, Any], config: Config, info: CheckpointInfo, network: nn.Module
) -> None:
    """Put settings that a run changes on purpose over those that a checkpoint would bring back.

    An optimiser's state holds its options, and that of a schedule of torch its arguments. What the
    old and the new configuration build alike stays as it was saved.

    Args:
        state: of the checkpoint; it is changed.
        config: of the run.
        info: of the checkpoint.
        network: without wrappers.
    """
    before = _as_it_was(config, info)
    if before is None:
        return
    (then, old), (now, new) = (_at_the_start(one, network) for one in (before, config))
    for saved, *fresh in zip(
        state["optimizer_state_dict"]["param_groups"],
        then.param_groups,
        now.param_groups,
        strict=True,
    ):
        # Schedules of SuperGradients compute the rate anew, those of torch from the one before.
        if new is not None:
            saved["lr"] *= fresh[1].get("initial_lr", 1) / fresh[0].get("initial_lr", 1)
        _merge(saved, *fresh)
    if new is not None:
        _merge(state["torch_scheduler_state_dict"], plain_state(old), plain_state(new))


def _at_the_start(config: Config, network: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """Build the optimiser, and the schedule where it is one of torch, as a new run has them."""
    from portrait_dist.training.sg_adapter import make_optimizer

    named, train = config.schedule.name, config.train
    optimizer = make_optimizer(
        network,
        components.optimizer_params(config),
        decay_norms=train.decay_norms,
        lr=train.lr,
    )
    if not named or named.startswith(parts.SUPERGRADIENTS):
        return optimizer, None
    return optimizer, components.make_schedule(config, optimizer)


RATES = ("initial_lr", "base_lrs", "_last_lr")
"""What follows the learning rate in proportion: a run may have scaled it by its ranks."""


def _merge(saved: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Change what differs between two states of a start; the rest is how far the run is."""
    for name, value in new.items():
        before = old.get(name)
        if name in ("params", "lr", "name") or _same(value, before):
            continue
        if name in RATES and name in saved:
            saved[name] = _in_proportion(saved[name], before, value)
        elif _are_states(states := [saved.get(name), before, value]):
            for three in zip(*states, strict=True):
                _merge(*three)
        else:
            saved[name] = value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    return bool(one == other)


def _in_proportion(saved: Any, old: Any, new: Any) -> Any:
    if isinstance(saved, (list, tuple)):
        return [_in_proportion(*three) for three in zip(saved, old, new, strict=True)]
    return saved * (new / old) if old else new


def _are_states(values: list[Any]) -> bool:
    """Whether all are lists of equally many states, as those of schedules of schedules."""
    return (
        all(isinstance(one, (list, tuple)) and one for one in values)
        and len({len(one) for one in values}) == 1
        and all(isinstance(state, dict) for one in values for state in one)
    )


def _as_it_was(config: Config, info: CheckpointInfo) -> Config | None:
    """Return the configuration with the checkpoint's values; None where nothing has changed."""
    before, changed = copy.deepcopy(config), False
    for change in _changes(config, info):
        section, _, name = change.key.partition(".")
        if section in ("train", "optimizer", "schedule"):
            setattr(getattr(before, section), name, change.before)
            changed = True
    return before if changed else None


def _print_start(config: Config, info: CheckpointInfo) -> None:
    where = "in the middle of" if info.batches is not None else "at the start of"
    distributed.print0(f"{config.run_dir}: resuming {where} epoch {(info.epoch or 0) + 1}")
    changed = [str(one) for one in _changes(config, info) if not one.key.startswith(SILENT)]
    if changed:
        distributed.print0(f"{config.run_dir}: resuming with other settings: {'; '.join(changed)}")


def _advice(config: Config) -> str:
    best = RunFolder(config.run_dir).checkpoint
    return f"choose another run.name (model.weights={best} starts it from this run's weights)"


def _refuse_other_data(
    config: Config, info: CheckpointInfo, data: Mapping[str, DataIdentity]
) -> None:
    if (version := _earlier_version(info, data)) is not None:
        _refuse_other_version(config, info, version, max(one.version for one in data.values()))
        return
    for split, identity in data.items():
        before = info.data.get(split)
        if before is not None and before != identity.now:
            if grown := identity.grown_since(before):
                raise InputError(
                    f"{config.run_dir}: this run saw {grown}; a run of several sets takes no set "
                    f"that has grown: {_advice(config)}"
                )
            shards = _of(info.config, "data.shards") or "other shards"
            raise InputError(
                f"{config.run_dir}: this run's {split} split is that of {_shown(shards)} "
                f"({before[:8]}), now it is that of {_shown(config.data.shards)} "
                f"({identity.now[:8]}): scores would not compare; {_advice(config)}, or give the "
                "run's own shards"
            )


def _earlier_version(info: CheckpointInfo, data: Mapping[str, DataIdentity]) -> int | None:
    """Return the earlier version of the same shards that a checkpoint saw; None for no such one."""
    known = {split: info.data[split] for split in data if info.data.get(split) is not None}
    if all(data[split].now == before for split, before in known.items()):
        return None
    for version in range(min((len(one.earlier) for one in data.values()), default=0)):
        if all(data[split].earlier[version] == before for split, before in known.items()):
            return version + 1
    return None


def _refuse_other_version(config: Config, info: CheckpointInfo, before: int, now: int) -> None:
    """Let shards that have grown join between two epochs, and only on purpose.

    Raises:
        InputError: in the middle of an epoch, or without ``run.accept_changes``.
    """
    what = (
        f"{config.run_dir}: this run saw version {before} of {_shown(config.data.shards)}, "
        f"now it is version {now}"
    )
    if info.batches is not None:
        raise InputError(
            f"{what}, and it stopped in the middle of an epoch, which is an order of one version; "
            f"{_advice(config)}"
        )
    if not config.run.accept_changes:
        raise InputError(
            f"{what}; {_advice(config)}, or continue with the new version on purpose with "
            "run.accept_changes=true"
        )
    distributed.print0(f"{what}; it continues with that")


def _refuse_changes(config: Config, info: CheckpointInfo, size: tuple[int, int]) -> None:
    changes = list(_changes(config, info))
    if info.size is not None and info.size != size:
        before, now = (f"{height}x{width}" for height, width in (info.size, size))
        changes.insert(0, Change("image size", before, now))
    known = settings()
    fixed = [one for one in changes if one.key not in known or known[one.key].on_resume is FIXED]
    if fixed:
        raise InputError(f"{config.run_dir}: {'; '.join(map(str, fixed))}; {_advice(config)}")
    asked = [change for change in changes if known[change.key].on_resume is ASK]
    if asked and not config.run.accept_changes:
        raise InputError(
            f"{config.run_dir}: {'; '.join(map(str, asked))}; {_advice(config)}, or resume on "
            "purpose with run.accept_changes=true"
        )


def _changes(config: Config, info: CheckpointInfo) -> Iterator[Change]:
    """Compare the settings with the checkpoint's; one that it does not know had its default."""
    if not info.config:  # written by PortraitTrainer from Python
        return
    kept = config.to_dict()
    for key, setting in settings().items():
        before, now = _of(info.config, key, setting.default), _of(kept, key)
        if before != now:
            yield Change(key, before, now)


def _of(values: Mapping[str, Any], key: str, default: object = None) -> Any:
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return shorten(redact(str(value))) if value != "" else "empty"
