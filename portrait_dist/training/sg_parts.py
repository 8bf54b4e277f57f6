"""SuperGradients' networks, losses, metrics, optimisers and schedules by their registered names.

:mod:`portrait_dist.recipes.parts` comes here for names that begin with ``sg:``. Repairs of what
these parts compute are in :mod:`portrait_dist.training.sg_adapter`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from portrait_dist.errors import InputError, nearest, shorten
from portrait_dist.recipes.parts import SUPERGRADIENTS
from portrait_dist.training import sg_adapter

sg_adapter.import_super_gradients()

from omegaconf import OmegaConf  # noqa: E402
from super_gradients.common.environment.omegaconf_utils import (  # noqa: E402
    register_hydra_resolvers,
)
from super_gradients.common.registry import registry  # noqa: E402
from super_gradients.training import models  # noqa: E402
from super_gradients.training.losses.bce_dice_loss import BCEDiceLoss  # noqa: E402
from super_gradients.training.params import DEFAULT_TRAINING_PARAMS  # noqa: E402
from super_gradients.training.pretrained_models import PRETRAINED_NUM_CLASSES  # noqa: E402


def find(section: str, name: str) -> Callable[..., Any]:
    """Return what builds a part.

    Args:
        section: of the configuration: ``model``, ``loss``, ``metrics``, ``optimizer`` or
            ``schedule``.
        name: as SuperGradients registered it.

    Raises:
        InputError: SuperGradients has none of this name.
    """
    known: Mapping[str, Any] = {
        "model": registry.ARCHITECTURES,
        "loss": registry.LOSSES,
        "metrics": registry.METRICS,
        "optimizer": registry.OPTIMIZERS,
        "schedule": registry.LR_SCHEDULERS_CLS_DICT,
    }[section]
    if name not in known:
        raise InputError(
            f"sg:{shorten(name)}: SuperGradients has none of this name.{nearest(name, list(known))}"
        )
    if section == "model":
        return functools.partial(_network, name)
    factory: Callable[..., Any] = known[name]
    return factory


def _network(name: str, *, pretrained: str = "", **args: Any) -> nn.Module:
    """Build a network of SuperGradients for one mask.

    Args:
        name: of its registry.
        pretrained: data set whose weights it begins with, such as ``cityscapes``; fetched.
        args: its ``arch_params``.
    """
    if pretrained and pretrained not in PRETRAINED_NUM_CLASSES:
        raise InputError(
            f"model.args.pretrained={pretrained}: there are {', '.join(PRETRAINED_NUM_CLASSES)}"
        )
    # The arguments of its U-Net refer to each other by these; its own recipes register them.
    if not OmegaConf.has_resolver("last"):
        register_hydra_resolvers()
    # The head of the data set is replaced by one for a mask, as SuperGradients does it.
    network: nn.Module = models.get(
        name, arch_params=args, num_classes=1, pretrained_weights=pretrained or None
    )
    return network


def sg_schedule(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return SuperGradients' training parameters of a schedule of its own.

    Args:
        name: ``sg:`` and the name.
        args: training parameters.

    Raises:
        InputError: there is none of that name, or a parameter is missing.
    """
    mode = name.removeprefix(SUPERGRADIENTS)
    known = inspect.signature(find("schedule", mode)).parameters.values()
    needed = {
        one.name for one in known if one.default is one.empty and one.kind is not one.VAR_KEYWORD
    }
    given = {name for name, value in DEFAULT_TRAINING_PARAMS.items() if value is not None}
    missing = sorted(needed - args.keys() - given - {"max_epochs"})
    if missing:
        raise InputError(f"schedule.name={name}: give schedule.args.{missing[0]}")
    return {"lr_mode": mode, **args}


def torch_schedule(
    name: str, factory: Callable[..., Any], args: Mapping[str, Any], each_step: bool
) -> dict[str, Any]:
    """Return SuperGradients' ``lr_mode`` for a schedule that is made for an optimiser of torch."""
    from super_gradients.training.utils.callbacks import Phase

    registry.TORCH_LR_SCHEDULERS[name] = factory
    phase = Phase.TRAIN_BATCH_STEP if each_step else Phase.TRAIN_EPOCH_END
    return {name: {**args, "phase": phase}}


# What ``loss.input=auto`` asks a loss.
BCEDiceLoss.takes_logits = property(lambda self: self.dice.apply_sigmoid)
