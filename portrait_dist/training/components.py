"""Build the parts of a run from its configuration: network, loss, metrics, optimiser, schedule.

Names are those of :mod:`portrait_dist.recipes.parts`; what a network must be is described in
:mod:`portrait_dist.models.contract`. Foreign losses and metrics are adapted to one convention:

- a loss is a class, or a plain function. It takes (mask, target), both float [B, 1, H, W], and
  returns a scalar, or (scalar, values to log). Whether it wants logits is ``loss.input``.
- a metric is a ``torchmetrics.Metric`` whose ``update`` takes ``preds`` and ``target``, by these
  names or as two tensors in this order. Its value is a number, or numbers by the names that its
  ``component_names`` list. Those of
  torchmetrics get probabilities and masks of 0 and 1 as integers, those of SuperGradients logits
  and the same masks, all others probabilities and the soft matte. Its states are sums, so that a
  value over ranks and resumed epochs is that of one process.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from portrait_dist import checkpoints, distributed
from portrait_dist.config import Config, MetricsConfig
from portrait_dist.errors import InputError, kind_and_message
from portrait_dist.losses import CustomSegLoss, SoftIoULoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import Contract, UNet, build, check
from portrait_dist.models.contract import SMALLEST_PROBABILITY, Masks
from portrait_dist.models.registry import UNET, args_to_rebuild
from portrait_dist.recipes import parts

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
TAKE_PROBABILITIES = ("BCELoss", "MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss")
"""Losses of torch that want values from 0 to 1; its others for masks take logits."""
SHOWN_NAMES = 8
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Components:
    """Everything that a run is made of.

    Attributes:
        network: see :class:`Network`.
        loss: takes what the network gives.
        train_metrics, valid_metrics: of training and of validation.
        watched: what decides which checkpoint is the best.
        params: SuperGradients' training parameters of optimiser and schedule.
    """

    network: Network
    loss: nn.Module
    train_metrics: list[Metric]
    valid_metrics: list[Metric]
    watched: Watched
    params: Mapping[str, Any]


def make(config: Config, size: tuple[int, int], batch_size: int, *, new: bool) -> Components:
    """Build the parts of a run; what is wrong with one is found here, before anything starts.

    Args:
        config: the configuration.
        size: (H, W) of the training images.
        batch_size: samples of a training batch.
        new: a new run, which starts with ``model.weights`` where they are given.

    Raises:
        InputError: there is no part of a name, it refuses its arguments, or breaks the convention.
    """
    network = make_network(config, size, batch_size, new=new)
    loss = make_loss(config, network.contract)
    train_metrics, valid_metrics = make_metrics(config.metrics), make_metrics(config.metrics)
    return Components(
        network,
        loss,
        train_metrics,
        valid_metrics,
        watched(config.metrics, valid_metrics, loss),
        {**optimizer_params(config), **schedule_params(config, valid_metrics, loss)},
    )


# Network ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A built network.

    Attributes:
        module: it.
        contract: what is known of it; None for the U-Net.
        entries: for the checkpoints' ``portrait_dist`` dict.
    """

    module: nn.Module
    contract: Contract | None
    entries: Mapping[str, Any]

    @property
    def described(self) -> str:
        """The network in a few words, for the table before training."""
        count = sum(weight.numel() for weight in self.module.parameters())
        name = self.entries.get("build", {}).get("name", type(self.module).__name__)
        found = f"{name}, {count:,} parameters"
        if self.contract is not None:
            found += f", gives {self.contract.output}"
            if not self.contract.channels_last:
                found += ", takes no channels-last images"
        return found


def make_network(config: Config, size: tuple[int, int], batch_size: int, *, new: bool) -> Network:
    """Build the network, and check it with images of the real size.

    Args:
        config: the configuration.
        size: (H, W) of the training images.
        batch_size: samples of a training batch.
        new: a new run, which starts with ``model.weights`` where they are given.

    Raises:
        InputError: no such network, one that breaks the contract, or weights that do not fit.
    """
    model = config.model
    torch.manual_seed(config.train.seed)  # the same weights on every rank
    if model.name == UNET:
        given = {"init_features": model.init_features, "norm": model.norm, **model.args}
        found = Network(build(UNET, given), None, {})
        _check_unet(found.module)
    else:
        _refuse_settings_of_the_unet(config)
        module = build(model.name, model.args)
        contract = check(module, size, batch_size, name=model.name, output=model.output)
        again = args_to_rebuild(model.name, model.args)
        entries = {"build": {"name": model.name, "args": again, **asdict(contract)}}
        found = Network(module, contract, entries)
    if model.weights and new:
        load_weights(found.module, config)
    return found


def _check_unet(network: nn.Module) -> None:
    assert isinstance(network, UNet)
    channels = network.in_channels, network.out_channels
    if channels != (3, 1):
        raise InputError(
            f"model.args: the U-Net has {channels[0]} input and {channels[1]} output channels; "
            "the stream gives RGB images, and one mask is trained"
        )


def _refuse_settings_of_the_unet(config: Config) -> None:
    for key in sorted(config.given & {"model.init_features", "model.norm"}):
        raise InputError(
            f"{key} is the U-Net's; give arguments of {config.model.name} as model.args.NAME=VALUE"
        )


def load_weights(network: nn.Module, config: Config) -> None:
    """Load the weights of ``model.weights``; report what does not fit where that is allowed.

    Raises:
        InputError: no checkpoint, or with ``model.strict`` weights of another network.
    """
    path = config.model.weights
    weights = checkpoints.weights_of(checkpoints.read(path))
    fits, said = fitting(weights, network)
    if said and config.model.strict:
        raise InputError(
            f"model.weights={path}: a network of another form; "
            f"{_form_of(path)}or take what fits with model.strict=false ({said})"
        )
    if not fits:
        raise InputError(f"model.weights={path}: none of its weights fit ({said})")
    network.load_state_dict(fits, strict=False)
    if said:
        total = len(network.state_dict())
        distributed.print0(f"model.weights={path}: {len(fits)} of {total} taken; {said}")


def fitting(weights: Mapping[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return the weights that fit a network, and what does not in words; empty where all do."""
    own = network.state_dict()
    fits = {
        name: weight
        for name, weight in weights.items()
        if name in own and own[name].shape == weight.shape
    }
    problems = {
        "missing": sorted(own.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - own.keys()),
        "of another shape": sorted((own.keys() & weights.keys()) - fits.keys()),
    }
    said = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    return fits, "; ".join(said)


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _form_of(path: str) -> str:
    """Say which settings make the network of a checkpoint, as far as that follows from it."""
    build_info = checkpoints.read_info(path).build
    if build_info is not None:
        return f"it is of model.name={build_info.name}; give that, "
    try:
        given, _ = checkpoints.load_model(path)
    except InputError:
        return ""
    assert isinstance(given, UNet)
    form = {"init_features": given.init_features, "norm": given.norm}
    return f"give {' '.join(f'model.{name}={value}' for name, value in form.items())}, "


# Loss ---------------------------------------------------------------------------------------------


class MaskLoss(nn.Module):
    """Any loss under one convention: it says what it takes, and adds the auxiliary outputs.

    Args:
        loss: a module that takes (mask, target), both [B, 1, H, W].
        takes_logits: whether the mask is one before the sigmoid.
        aux_weight: weight of the loss of each auxiliary output.
    """

    def __init__(self, loss: nn.Module, takes_logits: bool, aux_weight: float = 0.0) -> None:
        super().__init__()
        self.loss, self.takes_logits, self.aux_weight = loss, takes_logits, aux_weight
        if names := getattr(loss, "component_names", None):
            self.component_names = names  # SuperGradients asks only whether it is there

    def forward(self, outputs: Tensor | Masks, target: Tensor) -> Any:
        """Return what the loss returns for the main mask, plus the auxiliary ones' weighted sum."""
        main = outputs.main if isinstance(outputs, Masks) else outputs
        found = self.loss(main, target)
        others = outputs.auxiliary if isinstance(outputs, Masks) else ()
        extra = sum(self.aux_weight * _scalar(self.loss(one, target)) for one in others)
        return (found[0] + extra, *found[1:]) if isinstance(found, tuple) else found + extra


def _scalar(found: Any) -> Tensor:
    scalar: Tensor = found[0] if isinstance(found, tuple) else found
    return scalar


def make_loss(config: Config, contract: Contract | None) -> nn.Module:
    """Build the loss.

    Raises:
        InputError: there is none of that name, or it refuses its arguments.
    """
    loss = config.loss
    if not loss.name:
        kinds = {
            "tutorial": lambda: CustomSegLoss(loss.bce_weight, loss.iou_weight, from_logits=True),
            "soft_iou": lambda: SoftIoULoss(loss.bce_weight, loss.iou_weight),
        }
        own = kinds[loss.kind]()
        return own if contract is None else MaskLoss(own, True, loss.aux_weight)
    factory = parts.resolve(loss.name, "loss.name", {})
    if inspect.isfunction(factory):  # of (mask, target), not one that builds a loss
        found: Any = functools.partial(factory, **loss.args)
    else:
        found = parts.build(factory, loss.args, "loss.name", loss.name)
    module = found if isinstance(found, nn.Module) else _Function(found)
    takes = _takes_logits(found) if loss.input == "auto" else loss.input == "logits"
    checked = MaskLoss(module, takes, loss.aux_weight)
    _try_loss(checked, loss.name)
    return checked


class _Function(nn.Module):
    """A loss that is a plain function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, mask: Tensor, target: Tensor) -> Any:
        return self.function(mask, target)


def _takes_logits(loss: object) -> bool:
    for name in ("takes_logits", "from_logits", "apply_sigmoid"):
        if isinstance(found := getattr(loss, name, None), bool):
            return found
    return type(loss).__name__ not in TAKE_PROBABILITIES


def _try_loss(loss: MaskLoss, name: str) -> None:
    """Compute it once for two small masks, with its gradient."""
    with torch.random.fork_rng(devices=[]):
        mask, target = _tried_masks()
        mask.requires_grad_()
        try:
            value = _scalar(loss(mask, target))
            value.backward()
        except Exception as error:  # anybody's code
            raise InputError(
                f"loss.name={name}: fails for masks and targets [2, 1, 8, 8] "
                f"({kind_and_message(error)}); see docs/networks.md"
            ) from error
    if value.numel() != 1 or mask.grad is None:
        raise InputError(f"loss.name={name}: gives no scalar that depends on the mask")


# Metrics ------------------------------------------------------------------------------------------


def make_metrics(config: MetricsConfig) -> list[Metric]:
    """Build ``SoftIoU`` and the metrics of ``metrics.names``.

    Raises:
        InputError: there is none of a name, it refuses its arguments, or its states are no sums.
    """
    names = [name.strip() for name in config.names.split(",") if name.strip()]
    used: set[str] = set()
    found: list[Metric] = [SoftIoU()]
    for name in names:
        factory = parts.resolve(name, "metrics.names", {"SoftIoU": SoftIoU})
        short = name.rpartition(":")[2].rpartition(".")[2]
        used.add(short)
        args = config.args.get(short, {})
        if not isinstance(args, dict):
            raise InputError(f"metrics.args.{short}: write metrics.args.{short}.NAME=VALUE")
        metric = parts.build(factory, args, "metrics.names", name)
        found.append(_as_wanted(metric, name))
    if unknown := sorted(config.args.keys() - used):
        raise InputError(f"metrics.args.{unknown[0]}: there is no such metric in metrics.names")
    classes = [type(metric).__name__ for metric in found]
    for one in classes:
        if classes.count(one) > 1:
            raise InputError(f"metrics.names: {one} is listed twice")
    return found


def _as_wanted(metric: object, name: str) -> Metric:
    if not isinstance(metric, Metric):
        raise InputError(f"metrics.names={name}: it is no torchmetrics.Metric")
    for state, reduce in metric._reductions.items():
        summed = getattr(reduce, "__name__", "") == "dim_zero_sum"
        if not summed or not isinstance(getattr(metric, state), Tensor):
            raise InputError(
                f"metrics.names={name}: its state '{state}' is no sum, so that its value would "
                "depend on ranks and restarts; give it thresholds, or choose another metric"
            )
    kind = type(metric)
    package = kind.__module__.partition(".")[0]
    if package in ("torchmetrics", "super_gradients"):
        _become(metric, _with_binary_target(kind, package == "super_gradients"))
    elif _has_other_names(inspect.signature(metric.update)):
        _become(metric, _by_position(kind))
    if not _wants_more(inspect.signature(metric.update)):
        _try_metric(metric, name)
    return metric


def _wants_more(signature: inspect.Signature) -> bool:
    """Whether it takes something of SuperGradients' loop too, such as ``inputs``."""
    return any(
        one.default is one.empty and one.kind not in VARIADIC and name not in ("preds", "target")
        for name, one in signature.parameters.items()
    )


def _become(metric: Metric, kind: type[Metric]) -> None:
    """Let a metric be of a subclass with another ``update``."""
    metric.__class__ = kind
    metric.update = metric._wrap_update(kind.update.__get__(metric))  # type: ignore[method-assign]
    metric._update_signature = inspect.signature(metric.update)  # by which arguments are chosen


def _has_other_names(signature: inspect.Signature) -> bool:
    anything = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
    return not anything and not {"preds", "target"} <= signature.parameters.keys()


@functools.cache
def _by_position(kind: type[Metric]) -> type[Metric]:
    """Make a subclass that gets its two tensors by position, whatever it calls them."""

    def update(self: Metric, preds: Tensor, target: Tensor) -> None:
        kind.update(self, preds, target)

    return type(kind.__name__, (kind,), {"update": update, "__module__": kind.__module__})


def _try_metric(metric: Metric, name: str) -> None:
    """Score two small masks with a copy of it."""
    masks, target = _tried_masks()
    try:
        tried = metric.clone()
        tried.sync_on_compute = False  # each rank tries its own
        tried.update(**tried._filter_kwargs(preds=masks, target=target))
        found = tried.compute()
    except Exception as error:  # anybody's code
        raise InputError(
            f"metrics.names={name}: fails for masks and mattes [2, 1, 8, 8] "
            f"({kind_and_message(error)}); see docs/networks.md"
        ) from error
    names = getattr(metric, "component_names", None)
    values = [found] if names is None else [_entry(found, one) for one in names]
    if not all(isinstance(value, Tensor) and value.numel() == 1 for value in values):
        raise InputError(
            f"metrics.names={name}: gives {type(found).__name__}, not one number as a tensor (or "
            "numbers by the names that its component_names list)"
        )


def _entry(found: object, name: str) -> object:
    return found.get(name) if isinstance(found, Mapping) else None


def _tried_masks() -> tuple[Tensor, Tensor]:
    """Return a mask and a matte, float [2, 1, 8, 8], to try what takes both."""
    target = torch.zeros(2, 1, 8, 8)
    target[:, :, :4] = 1
    return torch.full((2, 1, 8, 8), 0.4), target


@functools.cache
def _with_binary_target(kind: type[Metric], logits: bool) -> type[Metric]:
    """Make a subclass that gets masks of 0 and 1, and logits where it applies a sigmoid itself."""

    def update(self: Metric, preds: Tensor, target: Tensor) -> None:
        if logits:
            preds = preds.logit(eps=SMALLEST_PROBABILITY)
        kind.update(self, preds, (target > 0.5).long())

    return type(kind.__name__, (kind,), {"update": update, "__module__": kind.__module__})


@dataclass(frozen=True)
class Watched:
    """What decides which checkpoint is the best.

    Attributes:
        name: SuperGradients' name of it.
        greater_is_better: its direction.
    """

    name: str
    greater_is_better: bool


def watched(config: MetricsConfig, metrics: list[Metric], loss: nn.Module) -> Watched:
    """Find the watched value among the metrics, their parts and the loss.

    Raises:
        InputError: there is none of that name.
    """
    directions = _directions(metrics)
    if config.watch not in directions:
        raise InputError(
            f"metrics.watch={config.watch}: there is no such value; "
            f"there are {', '.join(directions)}"
        )
    greater = directions[config.watch]
    if config.watch_for == "auto" and greater is None:
        raise InputError(
            f"metrics.watch={config.watch}: it does not say what is better; "
            "give metrics.watch_for=max or min"
        )
    best = bool(greater) if config.watch_for == "auto" else config.watch_for == "max"
    name = _name_of_loss(loss) if config.watch == "loss" else config.watch
    return Watched(name, best)


def _directions(metrics: list[Metric]) -> dict[str, bool | None]:
    """Return the values that can be watched, and whether greater is better, if that is known."""
    directions: dict[str, bool | None] = {"loss": False}
    for metric in metrics:
        parts_of = getattr(metric, "component_names", None)
        if parts_of:
            better = getattr(metric, "greater_component_is_better", {})
            directions |= {name: better.get(name) for name in parts_of}
        else:
            greater = getattr(metric, "greater_is_better", None)
            directions[type(metric).__name__] = (
                metric.higher_is_better if greater is None else greater
            )
    return directions


def _name_of_loss(loss: nn.Module) -> str:
    names = getattr(loss, "component_names", None)
    kind = type(loss).__name__
    return f"{kind}/{names[0]}" if names else kind


# Optimiser and schedule ---------------------------------------------------------------------------


def optimizer_params(config: Config) -> dict[str, Any]:
    """Return SuperGradients' parameters of the optimiser, which was tried with them.

    Raises:
        InputError: there is none of that name, it refuses its arguments, or takes no plain step.
    """
    train, named = config.train, config.optimizer
    if not named.name:
        own: dict[str, Any] = {"weight_decay": train.weight_decay}
        if train.optimizer == "sgd":
            own |= {"momentum": 0.9, "nesterov": True}
        if not {"foreach", "differentiable"} & named.args.keys():
            own["fused"] = True
        params = {
            "optimizer": OPTIMIZERS[train.optimizer],
            "optimizer_params": {**own, **named.args},
        }
        return _tried_optimizer(params, config, f"train.optimizer={train.optimizer}")
    setting = f"optimizer.name={named.name}"
    factory = parts.resolve(named.name, "optimizer.name", dict(OPTIMIZERS))
    if not (inspect.isclass(factory) and issubclass(factory, torch.optim.Optimizer)):
        raise InputError(f"{setting}: it is no class of torch.optim.Optimizer")
    args, known = dict(named.args), inspect.signature(factory).parameters
    if "weight_decay" in known:
        args.setdefault("weight_decay", train.weight_decay)
    elif train.weight_decay:
        raise InputError(f"{setting}: it has no weight_decay; give train.weight_decay=0")
    for name, value in (("lr", train.lr), ("momentum", None)):
        if name not in known:
            continue
        default = known[name].default
        if default is inspect.Parameter.empty:  # the groups of parameters have their own rate
            args.setdefault(name, value)
        elif name == "momentum":  # else SuperGradients gives some classes one of its own
            args.setdefault(name, default)
    return _tried_optimizer({"optimizer": factory, "optimizer_params": args}, config, setting)


def _tried_optimizer(params: dict[str, Any], config: Config, setting: str) -> dict[str, Any]:
    """Build the optimiser for a small network as the training will, and take a step."""
    from portrait_dist.training.sg_adapter import make_optimizer

    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    optimizer = parts.build(
        lambda **_: make_optimizer(network, params, decay_norms=config.train.decay_norms),
        config.optimizer.args,
        *setting.split("=", 1),
    )
    if params["optimizer_params"].get("capturable"):  # takes steps on a GPU only
        return params
    try:
        for weight in network.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    except Exception as error:  # anybody's code
        raise InputError(
            f"{setting}: takes no plain step ({kind_and_message(error)}); "
            "it has to work with groups of weights, their gradients and no closure"
        ) from error
    return params


def schedule_params(config: Config, metrics: list[Metric], loss: nn.Module) -> dict[str, Any]:
    """Return SuperGradients' parameters of the learning-rate schedule after the warm-up.

    Args:
        config: the configuration.
        metrics: of the training.
        loss: likewise; a schedule may follow their values.

    Raises:
        InputError: there is none of that name, or it refuses its arguments.
    """
    named = config.schedule
    if not named.name:
        return {
            "lr_mode": "CosineLRScheduler",
            "cosine_final_lr_ratio": config.train.lr_final_ratio,
        }
    if named.name.startswith(parts.SUPERGRADIENTS):  # its arguments are training parameters
        from portrait_dist.training.sg_parts import sg_schedule

        return sg_schedule(named.name, named.args)
    from portrait_dist.training.sg_parts import torch_schedule

    args, schedule = dict(named.args), _tried_schedule(config)
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        followed, known = args.get("metric_name"), _directions(metrics)
        if named.each != "epoch" or followed not in known:
            raise InputError(
                f"schedule.name={named.name}: follows a value of an epoch's training; give "
                f"schedule.each=epoch and schedule.args.metric_name={'|'.join(known)}"
            )
        if followed == "loss":
            args["metric_name"] = _name_of_loss(loss)
    factory = parts.resolve(named.name, "schedule.name", {})
    return {"lr_mode": torch_schedule(named.name, factory, args, named.each == "step")}


def make_schedule(config: Config, optimizer: torch.optim.Optimizer) -> Any:
    """Build a schedule of torch as it is at its start.

    Args:
        config: the configuration.
        optimizer: whose learning rates it sets.

    Raises:
        InputError: there is none of that name, or it refuses its arguments.
    """
    named = config.schedule
    factory = parts.resolve(named.name, "schedule.name", {})
    args = {name: value for name, value in named.args.items() if name != "metric_name"}
    return parts.build(
        lambda **given: factory(optimizer=optimizer, **given), args, "schedule.name", named.name
    )


def _tried_schedule(config: Config) -> Any:
    """Build a schedule of torch for an optimiser of one weight, and let it take a step."""
    setting = f"schedule.name={config.schedule.name}"
    tried = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.train.lr)
    schedule = make_schedule(config, tried)
    needs_value = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
    try:
        tried.step()
        schedule.step(*([0.0] if needs_value else []))
    except Exception as error:  # anybody's code
        raise InputError(
            f"{setting}: takes no step ({kind_and_message(error)}); it has "
            "to work as those of torch.optim.lr_scheduler"
        ) from error
    rate = float(tried.param_groups[0]["lr"])
    if not 0 <= rate < math.inf:
        raise InputError(f"{setting}: gives a learning rate of {rate}")
    return schedule
