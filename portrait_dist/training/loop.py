"""A training epoch and a pass of evaluation, in plain PyTorch.

One step is load, forward, loss, backward, optimiser step. Nothing in it makes the host wait for the
device: losses and metrics accumulate there and are reduced over the ranks once, at the end of the
epoch. What happens around a step (callbacks, saving, stopping) is the business of the hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from portrait_dist import distributed
from portrait_dist.models.contract import Contract, Masks

Loss = Callable[[Any, Any], tuple[torch.Tensor, torch.Tensor]]
"""(outputs, targets) → (scalar to minimise, detached values to log [n])."""


class TrainingHooks(Protocol):
    """What happens around a step, in the order of the calls."""

    def batch_start(self, index: int, batch: object) -> tuple[Any, Any]:
        """Return (inputs, targets) of batch number ``index`` of the epoch."""
        ...

    def loss_end(
        self, index: int, loss: torch.Tensor, items: torch.Tensor, predictions: object
    ) -> None: ...
    def backward_end(self) -> None: ...
    def step_start(self) -> None: ...
    def step_end(self) -> None: ...
    def batch_end(self, index: int, batch: object) -> None: ...


class EvaluationHooks(Protocol):
    """What happens around a batch of an evaluation."""

    def batch_start(self, index: int, batch: object) -> tuple[Any, Any]: ...
    def batch_end(
        self, batch: object, outputs: object, targets: object, predictions: object
    ) -> bool:
        """Return whether to continue."""
        ...


@dataclass
class Forward:
    """One forward of a network.

    Args:
        device: for autocast.
        bf16: whether to compute in bfloat16 where autocast allows it.
        logits: whether the loss wants the output before the sigmoid.
        contract: what the network gives; None: whatever the loss takes, and logits where it has
            ``return_logits``.
    """

    device: torch.device
    bf16: bool = False
    logits: bool = False
    contract: Contract | None = None

    def __call__(self, net: nn.Module, inputs: Any) -> tuple[Any, Any]:
        """Return (what the loss takes, predictions), all in float32."""
        if self.contract is not None:
            return self._by_contract(self.contract, net, inputs)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            outputs = net(inputs, return_logits=True) if self.logits else net(inputs)
        if self.bf16:  # the loss is outside autocast: in bfloat16 it would lose what it adds up
            outputs = to_float32(outputs)
        return outputs, torch.sigmoid(outputs.detach()) if self.logits else outputs

    def _by_contract(
        self, contract: Contract, net: nn.Module, inputs: torch.Tensor
    ) -> tuple[Masks | torch.Tensor, torch.Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            raw = net(contract.laid_out(inputs))
        if self.bf16:
            raw = to_float32(raw)
        size = (inputs.shape[-2], inputs.shape[-1])
        masks = contract.read(raw, size, logits=self.logits, training=net.training)
        main = masks.main.detach()
        predictions = torch.sigmoid(main) if self.logits else main
        return masks if masks.auxiliary else masks.main, predictions


def to_float32(outputs: object) -> Any:
    """Convert all floating-point tensors of nested tuples, lists and dicts to float32."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    # A named tuple takes its values one by one, a tuple all in one.
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):  # a named tuple
        return type(outputs)(*map(to_float32, outputs))
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(map(to_float32, outputs))
    if isinstance(outputs, Mapping):
        return {name: to_float32(value) for name, value in outputs.items()}
    return outputs


@dataclass
class Learner:
    """What one optimiser step needs.

    Args:
        net: the network to train, in DDP where there are ranks.
        optimizer: its optimiser.
        forward, loss: see :class:`Forward` and :data:`Loss`.
        batches: batches of this rank in an epoch.
        accumulate: batches whose gradients are averaged for an optimiser step.
        clip_grad_norm: largest L2 norm of the gradient; None for no clipping.
        after_step: called with the index of the batch, for averages of the weights.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    forward: Forward
    loss: Loss
    batches: int
    accumulate: int = 1
    clip_grad_norm: float | None = None
    after_step: Callable[[int], None] | None = None

    def group(self, index: int) -> range:
        """Return the batches of the optimiser step that batch ``index`` belongs to.

        The last group of an epoch may be short.
        """
        first = index - index % self.accumulate
        return range(first, min(first + self.accumulate, self.batches))

    def gradients_synchronised(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Average the gradients over the ranks in this backward, or leave them local."""
        if wanted or not isinstance(self.net, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.net.no_sync()

    def step(self, index: int) -> None:
        """Take an optimiser step with the accumulated gradients."""
        if self.clip_grad_norm:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.after_step:
            self.after_step(index)


def train_epoch(
    learner: Learner, batches: Iterable[Any], hooks: TrainingHooks, *, done: int = 0
) -> None:
    """Train on the batches of an epoch, or on the rest of one.

    Args:
        learner: network, loss and optimiser.
        batches: of this rank.
        hooks: called around each step; an exception of theirs ends the epoch.
        done: batches of the epoch that were done before.
    """
    for index, batch in enumerate(batches, start=done):
        group = learner.group(index)
        last = index == group[-1]
        inputs, targets = hooks.batch_start(index, batch)
        # Averaged over the ranks in the last backward of a group: one all-reduce a step.
        with learner.gradients_synchronised(last):
            outputs, predictions = learner.forward(learner.net, inputs)
            loss, items = learner.loss(outputs, targets)
            hooks.loss_end(index, loss, items, predictions)
            # By the length of its own group: the last one of an epoch may be short.
            (loss / len(group)).backward()
        hooks.backward_end()
        if last:
            hooks.step_start()
            learner.step(index)
            hooks.step_end()
        hooks.batch_end(index, batch)


def evaluate(
    net: nn.Module, forward: Forward, batches: Iterable[Any], hooks: EvaluationHooks
) -> None:
    """Pass the batches through the network, without a collective: ranks may have different numbers.

    Args:
        net: without DDP; it is left in evaluation mode.
        forward: see :class:`Forward`.
        batches: of this rank.
        hooks: called around each batch; ``batch_end`` may end the pass.
    """
    net.eval()
    with torch.no_grad():
        for index, batch in enumerate(batches):
            inputs, targets = hooks.batch_start(index, batch)
            outputs, predictions = forward(net, inputs)
            if not hooks.batch_end(batch, outputs, targets, predictions):
                break


class LossMeter:
    """Sample-weighted means of the loss items, summed on the device in float64."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None
        self.count = 0

    def update(self, value: torch.Tensor, batch_size: int) -> None:
        """Add a batch: ``value`` are its mean losses, shape [n]; ``batch_size`` its samples."""
        # float64: the sum of a long epoch in float32 would lose its last batches' digits.
        weighted = value.detach().to(torch.float64) * batch_size
        self.sum = weighted if self.sum is None else self.sum + weighted
        self.count += batch_size

    @property
    def average(self) -> tuple[float, ...]:
        """Means so far on this rank (waits for the device)."""
        return () if self.sum is None else tuple((self.sum / max(self.count, 1)).tolist())

    def average_over_ranks(self, items: int, device: torch.device) -> tuple[float, ...]:
        """Return the means over the samples of all ranks; one collective.

        Args:
            items: number of loss items; a rank may have seen no batch.
            device: of the collective.
        """
        total = torch.zeros(items + 1, dtype=torch.float64, device=device)
        if self.sum is not None:
            total[:items] = self.sum
        total[items] = self.count
        distributed.sum_over_ranks([total])
        return tuple((total[:items] / total[items].clamp(min=1)).tolist())


@dataclass(frozen=True)
class Step:
    """A step of the epoch: its batch, the batch's sample keys where known, the learning rate."""

    index: int
    keys: tuple[str, ...]
    lr: float
    rank: int = 0


@dataclass
class LossWatch:
    """Find the first loss that is not finite, without a host that waits in each step.

    The losses stay on the device until ``first_bad`` reads them all at once.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    bad: Step | None = None

    MOST = 1024
    """Losses kept at most: one read in so many steps costs nothing, and the memory is bounded."""

    def add(self, step: Step, loss: torch.Tensor) -> None:
        """Keep a step's loss, a scalar on the device."""
        self.losses.append(loss.detach())
        self.steps.append(step)
        if len(self.losses) >= self.MOST:
            self.first_bad()

    def first_bad(self) -> Step | None:
        """Return the epoch's first step with a loss that is not finite (waits for the device)."""
        if self.losses and self.bad is None:
            finite = torch.isfinite(torch.stack(self.losses)).tolist()
            self.bad = next(
                (step for step, good in zip(self.steps, finite, strict=True) if not good), None
            )
        self.losses, self.steps = [], []
        return self.bad


def weights_are_finite(net: nn.Module) -> bool:
    """Check all parameters (waits for the device). Buffers may hold infinities, as masks do."""
    floating = (one.detach() for one in net.parameters() if one.is_floating_point())
    parameters = [one for one in floating if one.numel()]  # of nothing there is no norm
    if not parameters:
        return True
    # One kernel for all tensors, and one number each: a NaN or infinity survives the maximum norm.
    largest = torch._foreach_norm(parameters, float("inf"))
    return bool(torch.isfinite(torch.stack(largest)).all())
