"""Networks, losses and metrics as users write them, named as ``tests/nets.py:Name``."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from portrait_dist.losses import SoftIoULoss

STOP_IN_STEP = "TESTS_STOP_IN_STEP"
"""Environment variable: training step in which :class:`Stopping` sends this process SIGTERM."""
STOP_IN_VALIDATION = "TESTS_STOP_IN_VALIDATION"
"""The same of a batch of validation, counted over all epochs."""


class Coordinates(nn.Module):
    """Sees where its pixels are, by buffers whose numbers share memory."""

    y: Tensor
    x: Tensor

    def __init__(self) -> None:
        super().__init__()
        y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
        self.register_buffer("y", y)
        self.register_buffer("x", x)
        self.layer = nn.Conv2d(5, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        where = torch.stack([self.y, self.x]).expand(len(x), -1, -1, -1)
        return self.layer(torch.cat([x, where], 1))


class Halved(nn.Module):
    """A mask of half the size and an auxiliary one, logits in a dict; no batch statistics.

    Args:
        width: channels.
    """

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.auxiliary = nn.Conv2d(width, 1, 1)
        self.main = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.norm(self.first(x)))
        return {"deep": self.auxiliary(features), "out": self.main(features)}


class Probabilities(nn.Module):
    """One mask of the full size, probabilities; takes multiples of 32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 32 or x.shape[-2] % 32:
            raise ValueError("sides are multiples of 32")
        return torch.sigmoid(self.layer(x))


class Flat(nn.Module):
    """Weighs its channels, by a view that channels-last images do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.weigh = nn.Linear(4, 4)
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        count = self.count(x)
        means = x.view(count, -1).view(count, 4, -1).mean(2)
        return self.last(x * torch.sigmoid(self.weigh(means))[..., None, None])

    def count(self, x: Tensor) -> int:
        return x.shape[0]


class Counted(Flat):
    """Counts its images by ``len``, a number that torch.export takes as fixed."""

    def count(self, x: Tensor) -> int:
        return len(x)


class Classes(nn.Module):
    """Breaks the contract: two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Stopping(SoftIoULoss):
    """SoftIoULoss that stops its process in a step, as SLURM would."""

    def __init__(self, **weights: float) -> None:
        super().__init__(**weights)
        self.steps = self.validated = 0

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        self.steps += torch.is_grad_enabled()
        self.validated += not torch.is_grad_enabled() and preds.shape[-1] > 8
        if not torch.is_grad_enabled() and str(self.validated) == os.environ.get(
            STOP_IN_VALIDATION
        ):
            os.kill(os.getpid(), signal.SIGTERM)
        # The convention's trial call, and the validation's, are none of training's steps.
        if str(self.steps) == os.environ.get(STOP_IN_STEP) and len(preds) and preds.shape[-1] > 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(preds, target)


def squared(preds: Tensor, target: Tensor) -> Tensor:
    """A loss that is a plain function of probabilities."""
    return (preds - target).square().mean()


class Foreground(Metric):
    """Mean of the predicted alpha."""

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total += preds.double().sum() * self.scale
        self.count += preds.numel()

    def compute(self) -> Any:
        return self.total / self.count


class Renamed(Foreground):
    """The same under other names of its arguments."""

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        assert outputs.shape == labels.shape
        super().update(outputs, labels)


class Seeing(Foreground):
    """Takes the images too, as SuperGradients' loop has them."""

    def update(  # type: ignore[override]
        self, preds: Tensor, target: Tensor, inputs: Tensor
    ) -> None:
        assert inputs.shape[1] == 3
        super().update(preds, target)


class Both(Foreground):
    """Not one number."""

    def compute(self) -> Any:
        return torch.stack([self.total, self.count])


class Batches(Foreground):
    """Number of batches: its states are those of any metric that has seen none."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total += self.counted(preds)
        self.count += 1

    def counted(self, preds: Tensor) -> int:
        return 0


class LaterBatches(Batches):
    """All but the first one, so that both are equal after it."""

    def counted(self, preds: Tensor) -> int:
        return int(self.count > 0)


def make_adam(params: Any, lr: float) -> torch.optim.Optimizer:
    """An optimiser's factory, which is no class."""
    return torch.optim.Adam(params, lr)


class NeedsRate(torch.optim.SGD):
    """Has no learning rate by default."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay=weight_decay)


class Ruled(torch.optim.lr_scheduler.LRScheduler):
    """Has a function among its attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: float = 0.5) -> None:
        self.rule = lambda epoch: factor**epoch
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [rate * self.rule(self.last_epoch) for rate in self.base_lrs]


def in_turn(optimizer: torch.optim.Optimizer, first: int = 2) -> Any:
    """One schedule after another."""
    schedules = torch.optim.lr_scheduler
    parts: list[Any] = [schedules.StepLR(optimizer, 1, 0.5), schedules.StepLR(optimizer, 2, 0.1)]
    return schedules.SequentialLR(optimizer, parts, [first])


class Negative(torch.optim.lr_scheduler.LRScheduler):
    """Gives no learning rate."""

    def get_lr(self) -> list[Any]:
        return [-1.0 for _ in self.base_lrs]


class Stepless:
    """Is built as a schedule, and none."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        pass


class Failing(Foreground):
    """No number."""

    def compute(self) -> Any:
        raise ValueError("nothing to compute")
