"""Every setting of a training run: one tree of dataclasses with defaults, units and bounds.

A recipe (``recipes/NAME.yaml`` or a file of yours) and ``key=value`` arguments override the
defaults, in that order:

    portrait-dist train --recipe aisegment_unet data.shards=shards train.lr=3e-4

``load`` raises :class:`InputError` for an unknown key (with the nearest known one) or a value out
of range, and names file and line where the value stands in a recipe.

A new setting is one line here. Its annotation holds its type, its bounds, its meaning, and what a
resumed run may do with it (:class:`OnResume`).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from portrait_dist import recipes
from portrait_dist.errors import InputError, nearest, shorten
from portrait_dist.recipes import reading
from portrait_dist.system.address import check_address, is_address, read_locations, redact

__all__ = ["Config", "InputError", "OnResume", "Setting", "load", "settings"]

LARGEST_COUNT = 2**31 - 1
"""Torch and SuperGradients keep counts in 32 bits."""
LARGEST_SEED = 2**62
"""Generators take 64 bits, and ranks add their number."""
MONTH = 30 * 24 * 3600.0
"""Longest time, in seconds; timers overflow not far beyond."""
LONGEST_NAME = 255
"""Bytes of a file's name that common file systems take."""
LONGEST_PATH = 4095
"""Bytes of a path that Linux takes."""

Seconds = Annotated[float, Ge(0), Le(MONTH)]
Count = Annotated[int, Ge(0), Le(LARGEST_COUNT)]
Positive = Annotated[int, Ge(1), Le(LARGEST_COUNT)]
Fraction = Annotated[float, Ge(0), Le(1)]
Weight = Annotated[float, Ge(0), Le(1e6)]


class OnResume(enum.Enum):
    """What a run that is resumed may do with another value of a setting; without a mark: anything.

    FIXED: nothing; the checkpoint would not fit, or scores would not compare.
    ASK: take it where ``run.accept_changes=true`` says that it is on purpose.
    """

    FIXED = "fixed"
    ASK = "ask"


FIXED, ASK = OnResume.FIXED, OnResume.ASK


@dataclass(frozen=True)
class Check:
    """A check that a type and bounds cannot express: says what is wrong with a value, or ``""``."""

    wrong: Callable[[str], str]


def _wrong_path(text: str) -> str:
    """Say why a text cannot be a path or an address."""
    # An address is checked by its own rules, and may be longer than a path.
    if is_address(text):
        try:
            check_address(text)
        except InputError as error:
            return str(error).partition(": ")[2]
        return ""
    if "\0" in text:
        return "it holds a NUL character"
    try:
        names = [os.fsencode(name) for name in text.split("/")]
    except UnicodeEncodeError:
        return "it is not text that a file can be named with"
    if any(len(name) > LONGEST_NAME for name in names):
        return f"a name in it is longer than {LONGEST_NAME} bytes"
    if sum(map(len, names)) + len(names) > LONGEST_PATH:
        return f"it is longer than {LONGEST_PATH} bytes"
    return ""


def _wrong_local_path(text: str) -> str:
    if is_address(text):
        return "it is an address; give a local path"
    return _wrong_path(text)


def _wrong_run_name(text: str) -> str:
    if problem := _wrong_local_path(text):
        return problem
    # Surrogates cannot be written to a log; others would forge or hide lines of it.
    if any(0xD800 <= ord(character) <= 0xDFFF or not character.isprintable() for character in text):
        return "it holds a character that cannot be printed"
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts:
        return "it leaves run.root; give a name, and the folder as run.root"
    if text and not path.parts:
        return "it names run.root itself"
    return ""


def _wrong_locations(text: str) -> str:
    """Say why a text cannot be one location, or a list of them with weights."""
    if "," not in text:
        return _wrong_path(text)
    try:
        parts = read_locations(text)
    except (InputError, ValueError) as error:
        return str(error).partition(": ")[2]
    return next((wrong for one in parts if (wrong := _wrong_path(one.location))), "")


PathText = Annotated[str, Check(_wrong_local_path)]
Locations = Annotated[str, Check(_wrong_locations)]


@dataclass
class RunConfig:
    """Where a run is, and what happens when it is started again."""

    root: Annotated[PathText, Doc("folder that holds the run folders")] = "runs"
    name: Annotated[
        str,
        Check(_wrong_run_name),
        Doc("name of the run; its folder is <root>/<name>; the recipe's name when empty"),
    ] = ""
    resume: Annotated[bool, Doc("resume an existing run; if false, it is an error")] = True
    logger: Annotated[
        Literal["tensorboard", "wandb", "mlflow", "clearml"],
        Doc("where curves and pictures go; TensorBoard's files are written in any case"),
    ] = "tensorboard"
    accept_changes: Annotated[
        bool,
        Doc("resume also where loss, augmentation or optimiser settings are not the run's"),
    ] = False
    max_requeues: Annotated[Count, Doc("maximum number of requeues of a SLURM job")] = 20
    requeue_on_failure: Annotated[
        bool, Doc("requeue a SLURM job also after a failed rank or node, not only after a stop")
    ] = True
    check_nodes: Annotated[
        bool, Doc("a SLURM job checks its nodes before it trains, and leaves sick ones")
    ] = True


@dataclass
class DataConfig:
    """Shards, decoding and order of samples."""

    shards: Annotated[
        Locations,
        Doc(
            "folder or address of the shards that 'portrait-dist pack' wrote, or a folder of other "
            "WebDataset tars; several with weights as a:1,b:0.3"
        ),
    ] = ""
    size: Annotated[
        int,
        Ge(0),
        Le(8192),
        Doc("side of the square training image, pixels, for shards of original size; 0 means 256"),
    ] = 0
    fit: Annotated[
        Literal["auto", "squash", "letterbox", "cover"],
        FIXED,
        Doc("how images of another shape reach that size; auto: as packed, else squash"),
    ] = "auto"
    workers: Annotated[
        int,
        Ge(-1),
        Le(4096),
        Doc(
            "decoding threads of each rank; 0 chooses by cores and ranks, -1 decodes in the "
            "training thread; never changes the batches"
        ),
    ] = 0
    prefetch_batches: Annotated[
        int, Ge(1), Le(1_000_000), Doc("batches decoded before they are needed, per rank")
    ] = 4
    order: Annotated[
        Literal["full", "block"],
        ASK,
        Doc("shuffle: the whole split, or by blocks (few shards open at a time)"),
    ] = "full"
    block_samples: Annotated[Positive, ASK, Doc("samples in a block when data.order=block")] = 16384
    on_damage: Annotated[
        Literal["stop", "skip"],
        Doc("a damaged sample stops the run, or is skipped and counted"),
    ] = "stop"
    log_keys: Annotated[
        bool,
        Doc("write the keys of every training batch to keys-rank<r>.jsonl in the run folder"),
    ] = False
    cache_dir: Annotated[
        PathText,
        Doc("folder for shards fetched from an address; the user's cache folder when empty"),
    ] = ""
    cache_gigabytes: Annotated[float, Gt(0), Le(1e6), Doc("size limit of that folder, GB")] = 50.0
    parallel_downloads: Annotated[
        int,
        Ge(0),
        Le(1024),
        Doc("remote shards that each rank prefetches at a time; 0 turns prefetching off"),
    ] = 8
    wait_for_server_seconds: Annotated[
        Seconds,
        Doc("how long a server of remote shards that does not answer is waited for, seconds"),
    ] = 1800.0

    @property
    def asked_shape(
        self,
    ) -> tuple[tuple[int, int] | None, Literal["squash", "letterbox", "cover"] | None]:
        """(H, W) of the batches and how images are brought to it; None: as packed."""
        return (
            (self.size, self.size) if self.size else None,
            None if self.fit == "auto" else self.fit,
        )


Args = dict[str, Any]
"""Arguments of a part that has a name: plain values by argument, set as ``SECTION.args.NAME``."""


@dataclass
class AugmentConfig:
    """Random changes of training images."""

    flip: Annotated[Fraction, ASK, Doc("probability of a horizontal flip")] = 0.5
    brightness: Annotated[float, Ge(0), Le(10), ASK, Doc("factor drawn from [1-b, 1+b]")] = 0.5
    contrast: Annotated[float, Ge(0), Le(10), ASK, Doc("factor drawn from [1-c, 1+c]")] = 0.5
    saturation: Annotated[float, Ge(0), Le(10), ASK, Doc("factor drawn from [1-s, 1+s]")] = 0.5
    scale: Annotated[float, Ge(0), Le(10), ASK, Doc("zoom drawn from [1/(1+s), 1+s]")] = 0.0
    rotation: Annotated[float, Ge(0), Le(180), ASK, Doc("angle drawn from [-r, r], degrees")] = 0.0
    translation: Annotated[
        Fraction, ASK, Doc("shift drawn from [-t, t], as a fraction of the side")
    ] = 0.0
    background: Annotated[
        Fraction,
        ASK,
        Doc("probability of a new background taken from another image of the batch"),
    ] = 0.0
    transforms: Annotated[
        str,
        ASK,
        Doc(
            "transforms of image and mask before these: package.module:build or file.py:build, "
            "which returns torchvision's, albumentations' or any callable"
        ),
    ] = ""
    args: Annotated[Args, ASK, Doc("arguments of its build, augment.args.NAME=VALUE")] = field(
        default_factory=dict
    )


@dataclass
class ModelConfig:
    """The network."""

    name: Annotated[
        str,
        FIXED,
        Doc(
            "network: unet, sg:NAME of SuperGradients, package.module.Name, package.module:Name, "
            "or file.py:Name"
        ),
    ] = "unet"
    args: Annotated[Args, FIXED, Doc("its arguments, model.args.NAME=VALUE")] = field(
        default_factory=dict
    )
    output: Annotated[
        Literal["auto", "logits", "probabilities"],
        FIXED,
        Doc("what another network than the U-Net returns; auto measures it"),
    ] = "auto"
    init_features: Annotated[
        int, Ge(1), Le(4096), FIXED, Doc("U-Net: channels of the first level")
    ] = 32
    norm: Annotated[
        Literal["batch", "group"],
        FIXED,
        Doc("U-Net: normalisation layers, batch, or group (nothing shared across samples)"),
    ] = "batch"
    weights: Annotated[
        PathText,
        Doc("checkpoint whose weights a new run starts with (fine-tuning); random when empty"),
    ] = ""
    strict: Annotated[
        bool, Doc("refuse weights that do not fit; if false, take those that do and name the rest")
    ] = True


@dataclass
class LossConfig:
    """The loss."""

    kind: Annotated[
        Literal["soft_iou", "tutorial"],
        ASK,
        Doc("IoU term: differentiable soft IoU, or the tutorial's (no gradient)"),
    ] = "soft_iou"
    bce_weight: Annotated[Weight, ASK, Doc("weight of binary cross-entropy")] = 0.5
    iou_weight: Annotated[Weight, ASK, Doc("weight of the IoU term")] = 0.5
    name: Annotated[
        str,
        ASK,
        Doc("another loss: torch.nn.Name, sg:NAME, package.module:Name, file.py:Name; else kind"),
    ] = ""
    args: Annotated[Args, ASK, Doc("its arguments, loss.args.NAME=VALUE")] = field(
        default_factory=dict
    )
    input: Annotated[
        Literal["auto", "logits", "probabilities"],
        ASK,
        Doc("what that loss takes; auto knows torch's and those with takes_logits or from_logits"),
    ] = "auto"
    aux_weight: Annotated[
        Weight, ASK, Doc("weight of the loss of each auxiliary output of a network")
    ] = 0.4


@dataclass
class MetricsConfig:
    """What is measured in each epoch."""

    names: Annotated[
        str,
        Doc(
            "metrics beside SoftIoU, comma between them: torchmetrics.classification.Name, "
            "sg:NAME, package.module:Name, file.py:Name"
        ),
    ] = ""
    args: Annotated[Args, Doc("their arguments, metrics.args.CLASS.NAME=VALUE")] = field(
        default_factory=dict
    )
    watch: Annotated[
        str, FIXED, Doc("metric that decides which checkpoint is the best, or loss")
    ] = "SoftIoU"
    watch_for: Annotated[
        Literal["auto", "max", "min"], FIXED, Doc("what is best; auto asks the metric")
    ] = "auto"


@dataclass
class OptimizerConfig:
    """An optimiser by name, in place of train.optimizer."""

    name: Annotated[
        str,
        FIXED,
        Doc("torch.optim.Name, sg:NAME, package.module:Name, file.py:Name; else train.optimizer"),
    ] = ""
    args: Annotated[Args, ASK, Doc("its arguments, optimizer.args.NAME=VALUE")] = field(
        default_factory=dict
    )


@dataclass
class ScheduleConfig:
    """A learning-rate schedule by name, in place of the cosine."""

    name: Annotated[
        str,
        FIXED,
        Doc("torch.optim.lr_scheduler.Name, sg:NAME, package.module:Name, file.py:Name"),
    ] = ""
    args: Annotated[Args, ASK, Doc("its arguments, schedule.args.NAME=VALUE")] = field(
        default_factory=dict
    )
    each: Annotated[Literal["epoch", "step"], FIXED, Doc("when a schedule of torch advances")] = (
        "epoch"
    )


@dataclass
class TrainConfig:
    """Epochs, batches, optimiser and machine."""

    max_epochs: Annotated[Positive, Doc("epochs")] = 100
    batch_size: Annotated[Positive, Doc("samples per rank and batch")] = 16
    accumulate: Annotated[
        Positive, Doc("batches whose gradients are averaged for one optimiser step")
    ] = 1
    global_batch: Annotated[
        Count,
        Doc(
            "samples per optimiser step on any number of ranks: batches of at most batch_size are "
            "accumulated; 0 means ranks × batch_size × accumulate"
        ),
    ] = 0
    max_batches: Annotated[Count, Doc("training batches per epoch, for trials; 0 means all")] = 0
    max_val_batches: Annotated[
        Count, Doc("validation batches per epoch and rank, for trials; 0 means all")
    ] = 0
    lr: Annotated[
        float, Gt(0), Le(1000), Doc("learning rate for lr_base_batch samples per step")
    ] = 1e-3
    lr_base_batch: Annotated[
        Count, Doc("scale lr by global batch / this (linear rule); 0 means no scaling")
    ] = 0
    warmup_steps: Annotated[
        Count, Doc("optimiser steps of linear warm-up, at most those of one epoch")
    ] = 0
    lr_final_ratio: Annotated[
        Fraction, Doc("learning rate at the end of the cosine, as a fraction of lr")
    ] = 0.01
    optimizer: Annotated[Literal["adam", "adamw", "sgd"], FIXED, Doc("optimiser")] = "adam"
    weight_decay: Annotated[float, Ge(0), Le(1000), ASK, Doc("weight decay")] = 0.0
    decay_norms: Annotated[bool, FIXED, Doc("weight decay on norms and biases too")] = False
    clip_grad_norm: Annotated[
        Weight, ASK, Doc("largest L2 norm of the gradient; 0 means no clipping")
    ] = 0.0
    ema: Annotated[
        bool,
        FIXED,
        Doc("keep an exponential moving average of the weights, validated and saved"),
    ] = False
    ema_decay: Annotated[Fraction, ASK, Doc("decay of that average")] = 0.999
    seed: Annotated[
        int, Ge(0), Le(LARGEST_SEED), ASK, Doc("seed of weights, order and augmentation")
    ] = 42
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Doc("auto: this rank's GPU if there is one, else the CPU")
    ] = "auto"
    precision: Annotated[
        Literal["fp32", "bf16"], ASK, Doc("arithmetic of forward and backward")
    ] = "fp32"
    channels_last: Annotated[bool, Doc("memory format of model and images")] = True
    compile: Annotated[bool, Doc("compile the model with torch.compile")] = False
    sync_bn: Annotated[bool, ASK, Doc("batch statistics over all ranks (SyncBatchNorm)")] = False
    average_best: Annotated[
        bool, Doc("keep average_model.pth, the mean of the ten best models")
    ] = True
    validate_every: Annotated[
        Positive,
        Doc(
            "epochs between two validations, after which the run is saved; the last epoch always is"
        ),
    ] = 1
    save_every_steps: Annotated[
        Count, Doc("save within the epoch every so many batches; 0 means never")
    ] = 0
    save_every_seconds: Annotated[
        Seconds, Doc("save within the epoch every so many seconds; 0 means never")
    ] = 60.0
    log_every_steps: Annotated[Positive, Doc("batches between two lines of progress")] = 50
    timeout_seconds: Annotated[
        float,
        Gt(0),
        Le(MONTH),
        Doc("a rank that stalls for so long at the start, in validation or a save ends the run, s"),
    ] = 600.0
    step_timeout_seconds: Annotated[
        Seconds,
        Doc("the same in training steps; 0 means 10 times the slowest step, at least 60 s"),
    ] = 0.0
    threads: Annotated[
        int,
        Ge(0),
        Le(4096),
        Doc("CPU threads of each rank; 0 means the machine's cores divided by its ranks"),
    ] = 0
    pictures: Annotated[
        int, Ge(0), Le(1024), Doc("validation samples in the image grid of each epoch")
    ] = 4


@dataclass
class Config:
    """The whole configuration of a run."""

    recipe: Annotated[
        str, Check(_wrong_run_name), Doc("name of the recipe this configuration started from")
    ] = ""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        # No field: what was given is not part of what the run is, and is not written down.
        self.given: frozenset[str] = frozenset()
        """Settings that the user chose; the others are defaults or a recipe of the package's."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values as nested dicts, for files that are kept.

        Addresses lose user name, password and query, which may be secrets.
        """
        return _redacted(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """Return the configuration as a recipe that ``load`` reads, addresses redacted."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def run_dir(self) -> Path:
        """Folder of the run, ``<run.root>/<run.name>``."""
        return Path(self.run.root) / (self.run.name or self.recipe or "run")


def _redacted(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Setting:
    """What is known of one setting.

    Args:
        name: its key, such as ``train.lr``.
        kind: ``bool``, ``int``, ``float`` or ``str``; ``dict`` for arguments of a named part.
        default: its value without recipe and arguments.
        help: its meaning, with the unit.
        choices: the allowed values, where there are few.
        on_resume: what a resumed run may do with another value; None: anything.
        annotation: type and bounds, for the validator.
    """

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...]
    on_resume: OnResume | None
    annotation: Any

    @property
    def allowed(self) -> str:
        """What values it takes, for people."""
        if self.choices:
            return "|".join(self.choices)
        bounds = [mark for mark in self.annotation.__metadata__ if isinstance(mark, (Ge, Gt, Le))]
        if self.kind in (bool, str, dict):
            return {bool: "true|false", str: "text", dict: "NAME=VALUE"}[self.kind]
        texts = []
        for mark in bounds:
            if isinstance(mark, Gt):
                texts.append(f"above {mark.gt}")
            elif isinstance(mark, Ge):
                texts.append(f"from {mark.ge}")
            else:
                texts.append(f"to {mark.le:,}" if mark.le != LARGEST_COUNT else "")
        return f"{'whole number' if self.kind is int else 'number'} {' '.join(texts)}".strip()


@functools.cache
def settings() -> dict[str, Setting]:
    """Return every setting by its key (``train.lr``), in the order of the classes above."""
    found = {}
    hints = typing.get_type_hints(Config, include_extras=True)
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(hints[section.name]):
            inner = typing.get_type_hints(hints[section.name], include_extras=True)
            for item in dataclasses.fields(hints[section.name]):
                key = f"{section.name}.{item.name}"
                found[key] = _setting(key, inner[item.name], _default(item))
        else:
            found[section.name] = _setting(section.name, hints[section.name], section.default)
    return found


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def owner_of(key: str) -> str:
    """Return the setting that a key belongs to: ``model.args`` for ``model.args.depth``."""
    section, args, _ = key.partition(".args.")
    return f"{section}.args" if args else key


def _setting(name: str, annotation: Any, default: Any) -> Setting:
    marks = annotation.__metadata__
    kind = annotation.__origin__
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return Setting(
        name=name,
        kind=str if choices else typing.get_origin(kind) or kind,
        default=default,
        help=next(mark.documentation for mark in marks if isinstance(mark, Doc)),
        choices=choices,
        on_resume=next((mark for mark in marks if isinstance(mark, OnResume)), None),
        annotation=annotation,
    )


def value_of(config: Config, key: str) -> Any:
    """Return the value of a setting, such as ``train.lr``."""
    return functools.reduce(getattr, key.split("."), config)


def load(recipe: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Take the defaults, then the recipe, then the ``key=value`` arguments.

    Args:
        recipe: name of a recipe that comes with the package, or path of a YAML file; None for the
            defaults.
        overrides: arguments such as ``train.lr=3e-4``.

    Raises:
        InputError: unknown recipe or key, or a value of the wrong type or out of range.
    """
    config = Config()
    given = []
    if recipe:
        path = recipes.find(recipe)
        # The name of a file of yours may be one that no run can have.
        config.recipe = "" if _wrong_run_name(path.stem) else path.stem
        leaves = reading.read(path)
        for leaf in leaves:
            _set(config, leaf.key, leaf.text, leaf.value, where=f"{path}, line {leaf.line}: ")
        if recipe not in recipes.names():
            given += [leaf.key for leaf in leaves]
    for argument in overrides:
        key, equals, text = argument.partition("=")
        if not equals:
            raise InputError(f"'{_shown(argument)}': write key=value, for example train.lr=3e-4")
        _set(config, key, text, reading.parse(text) if ".args." in key else None)
        given.append(key)
    config.given = frozenset(given)
    return config


def _set(config: Config, key: str, text: str | None, value: object, where: str = "") -> None:
    known = settings()
    owner = owner_of(key)
    if owner != key and owner in known:
        _set_argument(value_of(config, owner), key, key.removeprefix(f"{owner}."), value, where)
        return
    if key not in known:
        raise InputError(
            f"{where}there is no key '{_shown(key)}'.{nearest(key, list(known))} "
            "'portrait-dist train --keys' lists them"
        )
    section, _, name = key.rpartition(".")
    target = getattr(config, section) if section else config
    setattr(target, name, _validate(known[key], text, where))


def _set_argument(args: Args, key: str, path: str, value: object, where: str) -> None:
    """Set an argument of a named part; ``path`` may name one of a mapping, ``BinaryF1.beta``."""
    if not _is_plain(value):
        raise InputError(
            f"{where}{_shown(key)}: a value is a number, true, false, null, a text, or a list or "
            f"mapping of these, not {_shown(str(value))}"
        )
    *outer, name = path.split(".")
    for one in outer:
        args = args.setdefault(one, {})
        if not isinstance(args, dict):
            raise InputError(f"{where}{_shown(key)}: '{_shown(one)}' has a value already")
    if not name or not all(outer):
        raise InputError(f"{where}{_shown(key)}: the name of the argument is missing")
    args[name] = value


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


_NUMBER = {
    int: re.compile(r"[+-]?[0-9]{1,40}"),
    float: re.compile(r"[+-]?([0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})([eE][+-]?[0-9]{1,5})?"),
}
_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _validate(setting: Setting, text: str | None, where: str) -> Any:
    """Return the value that a text stands for.

    Args:
        setting: whose value it is.
        text: as written; None for a list.
        where: begins the message: file and line, or nothing for an argument.

    Raises:
        InputError: wrong type, out of bounds, not one of the choices, or a failed check.
    """
    if setting.kind is dict:
        raise InputError(f"{where}{setting.name}: write {setting.name}.NAME=VALUE")
    # pydantic would take 1_000 too, and what YAML calls a number is not what Python does.
    pattern = _NUMBER.get(setting.kind)
    if text is None or (pattern and not pattern.fullmatch(text.strip(" "))):
        raise _wrong_kind(setting, text, where)
    from pydantic import ValidationError  # 0.15 s, which --help and completion do not pay

    try:
        value = _validator(setting.name).validate_python(text)
    except ValidationError as error:
        raise _wrong_value(setting, text, where, error.errors()[0]) from None
    for check in _marks(setting, Check):
        if problem := check.wrong(value):
            raise InputError(f"{where}{setting.name} '{_shown(text)}': {problem}")
    return value


@functools.cache
def _validator(name: str) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(
        settings()[name].annotation, config=ConfigDict(allow_inf_nan=False, strict=False)
    )


def _marks(setting: Setting, kind: type) -> Iterable[Any]:
    return (mark for mark in setting.annotation.__metadata__ if isinstance(mark, kind))


def _wrong_kind(setting: Setting, text: str | None, where: str) -> InputError:
    shown = "a list" if text is None else f"'{_shown(text)}'"
    return InputError(f"{where}{setting.name} is {_KIND_NAMES[setting.kind]}, not {shown}")


def _wrong_value(setting: Setting, text: str, where: str, found: Mapping[str, Any]) -> InputError:
    """Say in one line what pydantic found."""
    bounds = {"ge": "at least", "gt": "above", "le": "at most"}
    # In this package's words: pydantic's speak of inputs and types.
    for name, words in bounds.items():
        if name in found.get("ctx", {}):
            limit = found["ctx"][name]
            limit = f"{limit:.16g}" if isinstance(limit, float) else limit
            return InputError(
                f"{where}{setting.name} is {words} {limit}, not {_shown(text.strip())}"
            )
    if setting.choices:
        return InputError(
            f"{where}{setting.name} is one of {', '.join(setting.choices)}, "
            f"not '{_shown(text)}'.{nearest(text, list(setting.choices))}"
        )
    return _wrong_kind(setting, text, where)


def _shown(text: str) -> str:
    """Make a user's text fit a message: short, and without the secrets of an address."""
    return shorten(redact(text))
