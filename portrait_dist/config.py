"""Every knob of a training run: one tree of dataclasses with defaults, units and checks.

A recipe (``recipes/NAME.yaml`` or a file of yours) and ``key=value`` words override the defaults, in that order:

    portrait-dist train --recipe aisegment_unet data.shards=shards train.lr=3e-4

``load`` raises :class:`InputError` for an unknown key (with the nearest known one) or a value out of range, and names file
and line where the value stands in a recipe.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from portrait_dist.errors import InputError, nearest

RECIPES = Path(__file__).parent / "recipes"


def knob(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with its help text (unit included) and its bounds; ``above`` is an open lower bound."""
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "minimum": minimum,
            "above": above,
            "maximum": maximum,
        },
    )


@dataclass
class RunConfig:
    root: str = knob("runs", "folder that holds the run folders")
    name: str = knob(
        "", "name of the run; its folder is <root>/<name>; the recipe's name when empty"
    )
    resume: bool = knob(True, "go on if the run exists; false refuses to touch an existing run")
    max_requeues: int = knob(20, "times a SLURM job puts itself back into the queue", minimum=0)
    requeue_on_failure: bool = knob(
        True, "a SLURM job whose rank or node failed comes back too, not only one that was stopped"
    )


@dataclass
class DataConfig:
    shards: str = knob("", "folder or address of the shards that 'portrait-dist pack' wrote")
    size: int = knob(
        0,
        "side of the square training picture, pixels, for shards of original size; 0 means 256",
        minimum=0,
    )
    workers: int = knob(
        2, "decoding threads of each rank; changes the speed, never the batches", minimum=0
    )
    prefetch_batches: int = knob(4, "batches decoded ahead, per rank", minimum=1)
    order: str = knob(
        "full",
        "shuffle: the whole split, or by blocks (few shards open at a time)",
        choices=("full", "block"),
    )
    block_samples: int = knob(16384, "samples in a block when data.order=block", minimum=1)
    on_damage: str = knob(
        "stop",
        "a damaged sample stops the run, or is skipped and counted",
        choices=("stop", "skip"),
    )
    log_keys: bool = knob(
        False, "write the keys of every training batch to keys-rank<r>.jsonl in the run folder"
    )
    cache_dir: str = knob(
        "", "folder for shards fetched from a remote address; the user's cache folder when empty"
    )
    cache_gigabytes: float = knob(50.0, "size limit of that folder, GB", above=0, maximum=1e9)
    parallel_downloads: int = knob(
        8, "remote shards that each rank prefetches at a time; 0 turns prefetching off", minimum=0
    )
    wait_for_server_seconds: float = knob(
        1800.0,
        "how long a server of remote shards that does not answer is waited for, seconds",
        minimum=0,
        maximum=1e9,
    )


@dataclass
class AugmentConfig:
    flip: float = knob(0.5, "probability of a horizontal flip", minimum=0, maximum=1)
    brightness: float = knob(0.5, "factor drawn from [1-b, 1+b]", minimum=0)
    contrast: float = knob(0.5, "factor drawn from [1-c, 1+c]", minimum=0)
    saturation: float = knob(0.5, "factor drawn from [1-s, 1+s]", minimum=0)
    scale: float = knob(0.0, "zoom factor drawn from [1/(1+s), 1+s]", minimum=0)
    rotation: float = knob(0.0, "angle drawn from [-r, r] degrees", minimum=0, maximum=180)
    translation: float = knob(
        0.0, "shift drawn from [-t, t], as a share of the side", minimum=0, maximum=1
    )
    background: float = knob(
        0.0,
        "probability of a new background taken from another picture of the batch",
        minimum=0,
        maximum=1,
    )


@dataclass
class ModelConfig:
    init_features: int = knob(32, "channels of the first level", minimum=1)
    norm: str = knob(
        "batch",
        "normalisation layers: batch, or group (nothing shared across samples)",
        choices=("batch", "group"),
    )
    weights: str = knob(
        "", "checkpoint whose weights a new run begins with (fine-tuning); random ones when empty"
    )


@dataclass
class LossConfig:
    kind: str = knob(
        "soft_iou",
        "IoU term: differentiable soft IoU, or the tutorial's (no gradient)",
        choices=("soft_iou", "tutorial"),
    )
    bce_weight: float = knob(0.5, "weight of binary cross-entropy", minimum=0)
    iou_weight: float = knob(0.5, "weight of the IoU term", minimum=0)


@dataclass
class TrainConfig:
    max_epochs: int = knob(100, "epochs", minimum=1)
    batch_size: int = knob(16, "samples per rank and step", minimum=1)
    accumulate: int = knob(
        1, "batches whose gradients are added up before an optimiser step", minimum=1
    )
    max_batches: int = knob(0, "training batches per epoch, for trials; 0 means all", minimum=0)
    max_val_batches: int = knob(
        0, "validation batches per epoch and rank, for trials; 0 means all", minimum=0
    )
    lr: float = knob(1e-3, "learning rate for lr_base_batch samples per step", above=0)
    lr_base_batch: int = knob(
        0, "scale lr by global batch / this (linear rule); 0 means no scaling", minimum=0
    )
    warmup_steps: int = knob(0, "steps of linear warm-up", minimum=0)
    lr_final_ratio: float = knob(
        0.01, "learning rate at the end of the cosine, as a share of lr", minimum=0, maximum=1
    )
    optimizer: str = knob("adam", "optimiser", choices=("adam", "adamw", "sgd"))
    weight_decay: float = knob(0.0, "weight decay", minimum=0)
    decay_norms: bool = knob(False, "weight decay on norms and biases too")
    clip_grad_norm: float = knob(
        0.0, "largest L2 norm of the gradient; 0 means no clipping", minimum=0
    )
    ema: bool = knob(
        False, "keep an exponential moving average of the weights, validated and saved"
    )
    ema_decay: float = knob(0.999, "decay of that average", minimum=0, maximum=1)
    seed: int = knob(42, "seed of weights, order and augmentation", minimum=0)
    device: str = knob(
        "auto",
        "auto: this rank's GPU if there is one, else the CPU",
        choices=("auto", "cpu", "cuda"),
    )
    precision: str = knob("fp32", "arithmetic of forward and backward", choices=("fp32", "bf16"))
    channels_last: bool = knob(True, "memory format of model and images")
    compile: bool = knob(False, "compile the model with torch.compile")
    sync_bn: bool = knob(False, "batch statistics over all ranks (SyncBatchNorm)")
    average_best: bool = knob(True, "keep average_model.pth, the mean of the ten best models")
    save_every_steps: int = knob(
        0, "save within the epoch every so many steps; 0 means never", minimum=0
    )
    save_every_seconds: float = knob(
        600.0, "save within the epoch every so many seconds; 0 means never", minimum=0
    )
    log_every_steps: int = knob(50, "steps between two lines of progress", minimum=1)
    timeout_seconds: float = knob(600.0, "a rank that stalls for so long ends the run", above=0)
    threads: int = knob(
        0, "CPU threads of each rank; 0 means the machine's cores divided by its ranks", minimum=0
    )
    pictures: int = knob(4, "validation samples in the picture grid of each epoch", minimum=0)


@dataclass
class Config:
    recipe: str = knob("", "name of the recipe this configuration started from")
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_yaml(self) -> str:
        """The whole configuration as a recipe that ``load`` reads back to an equal one."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    @property
    def run_dir(self) -> Path:
        """Folder of the run, ``<run.root>/<run.name>``."""
        return Path(self.run.root) / (self.run.name or self.recipe or "run")


def knobs() -> dict[str, dataclasses.Field[Any]]:
    """Every key (``train.lr``) with its field: default, help and bounds in ``metadata``."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.default_factory):
            for item in dataclasses.fields(section.default_factory):
                found[f"{section.name}.{item.name}"] = item
        else:
            found[section.name] = section
    return found


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(recipe: str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults, then the recipe, then the ``key=value`` words.

    Args:
        recipe: name of a recipe that comes with the package, or path of a YAML file; None for the defaults.
        overrides: words such as ``train.lr=3e-4``.

    Raises:
        InputError: unknown recipe or key, or a value of the wrong type or out of range.
    """
    config = Config()
    if recipe:
        path = _recipe_path(recipe)
        config.recipe = path.stem
        for key, text, line in _read_recipe(path):
            _set(config, key, text, where=f"{path}, line {line}")
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"'{word}': write key=value, for example train.lr=3e-4")
        _set(config, key, text, where=f"option '{word}'")
    return config


def _recipe_path(recipe: str) -> Path:
    if recipe in recipes():
        return RECIPES / f"{recipe}.yaml"
    path = Path(recipe)
    if path.is_file():
        return path
    raise InputError(
        f"no recipe '{recipe}'.{nearest(recipe, recipes())} There are {', '.join(recipes())}, or give the path of a YAML file"
    )


def _read_recipe(path: Path) -> list[tuple[str, Any, int]]:
    """(key, value, line) of each leaf of a YAML file."""
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(
            f"{path}, line {line}: not YAML ({error.problem}); mend that line"
        ) from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise InputError(
            f"{path}, line 1: a recipe is a mapping such as 'train:' with 'lr: 0.001' under it"
        )
    return list(_leaves(root, ""))


def _leaves(node: yaml.MappingNode, prefix: str) -> typing.Iterator[tuple[str, Any, int]]:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode):
            yield from _leaves(value_node, f"{key}.")
        else:
            yield (
                key,
                value_node.value if isinstance(value_node, yaml.ScalarNode) else None,
                key_node.start_mark.line + 1,
            )


def _set(config: Config, key: str, text: Any, where: str) -> None:
    known = knobs()
    if key not in known:
        raise InputError(
            f"{where}: there is no key '{key}'.{nearest(key, list(known))} 'portrait-dist train --keys' lists them"
        )
    section, _, name = key.rpartition(".")
    target = getattr(config, section) if section else config
    hint = typing.get_type_hints(type(target))[name]
    value = _parse(text, hint, key, where)
    _check(value, known[key].metadata, key, where)
    setattr(target, name, value)


def _parse(text: Any, kind: type | types.UnionType, key: str, where: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[
                str(text).lower()
            ]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if text is None:
            raise ValueError
        return str(text)
    except (KeyError, ValueError, TypeError):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        name = names[kind]  # type: ignore[index]
        raise InputError(f"{where}: {key} is {name}, not '{text}'") from None


def _check(value: Any, bounds: typing.Mapping[str, Any], key: str, where: str) -> None:
    if bounds.get("choices") and value not in bounds["choices"]:
        raise InputError(
            f"{where}: {key} is one of {', '.join(bounds['choices'])}, not '{value}'.{nearest(value, list(bounds['choices']))}"
        )
    if bounds.get("minimum") is not None and not value >= bounds["minimum"]:
        raise InputError(f"{where}: {key} is at least {bounds['minimum']}, not {value}")
    if bounds.get("above") is not None and not value > bounds["above"]:
        raise InputError(f"{where}: {key} is above {bounds['above']}, not {value}")
    if bounds.get("maximum") is not None and not value <= bounds["maximum"]:
        raise InputError(f"{where}: {key} is at most {bounds['maximum']}, not {value}")
