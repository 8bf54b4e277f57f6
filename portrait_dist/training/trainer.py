"""The Trainer: what SuperGradients asks for, around the loop of :mod:`portrait_dist.training.loop`.

SuperGradients brings parameters, callbacks, loggers and the sequence of epochs. Between two steps
all ranks agree whether to save or to stop (:mod:`portrait_dist.training.preemption`), so a
checkpoint in the middle of an epoch is a few integers more than one at its end: the position in the
stream, the sums so far, and the random state of every rank (:mod:`portrait_dist.training.state`).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from portrait_dist import checkpoints, distributed
from portrait_dist.checkpoints import CheckpointInfo
from portrait_dist.errors import DivergedError, InputError, Stopped, one_line
from portrait_dist.models import Contract, UNet
from portrait_dist.runs.folder import LATEST, RunFolder
from portrait_dist.runs.health import Activity
from portrait_dist.system.info import versions
from portrait_dist.system.malloc import keep_freed_memory
from portrait_dist.training import loop, state
from portrait_dist.training.averaging import AverageOfBest
from portrait_dist.training.console import EpochProgress
from portrait_dist.training.device_batches import (
    DeviceBatches,
    Position,
    TensorBatch,
    samples_in,
    to_device,
)
from portrait_dist.training.health import Health
from portrait_dist.training.loop import LossMeter, LossWatch, Step
from portrait_dist.training.plan import steps_of
from portrait_dist.training.preemption import (
    FAIL,
    NOTHING,
    SAVE,
    STOP,
    Agreement,
    StopNotice,
    StopSignals,
)
from portrait_dist.training.saving import EpochFiles, Saver
from portrait_dist.training.sg_adapter import (
    AdaptedTrainer,
    Callback,
    FusedEMA,
    FusedKDEMA,
    KDTrainer,
    PhaseContext,
    UnpackedBatch,
    unwrap_model,
)

# torch 2.15 renamed the option and warns of the old name.
_DDP_OPTIONS = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
_BUFFER_OPTION = (
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"
)
_NO_BUFFER_SYNC: dict[str, Any] = {_BUFFER_OPTION: False}

Prepare = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(batch: TensorBatch, training: bool, epoch: int | None) → (inputs, targets) on the device."""

KEYS_IN_A_MESSAGE = 16
MOST_RANKS_TO_ASK = 64
"""Ranks up to which a stop is agreed before each step while shards are fetched (10 ms at 64)."""


@dataclass
class LoopOptions:
    """What the loop can do beyond SuperGradients' training parameters.

    Attributes:
        channels_last: memory format of model and images; not of a network whose contract says that
            it does not take it.
        save_every_steps: save within the epoch every so many batches; 0 for never.
        save_every_seconds: the same in seconds.
        log_every_steps: batches between two lines of progress.
        log_keys: write the sample keys of every training batch into the run folder.
        timeout_seconds: a rank that stalls for so long ends the run.
        step_timeout_seconds: the same within a training step; 0 for ten times the slowest one.
        least_step_timeout_seconds: of the automatic one; a rank may wait for a server of shards.
        static_graph: tell DDP that every step uses the same parameters, which lets it prepare the
            exchange of gradients once. None: only for this package's U-Net, of which it is known.
    """

    channels_last: bool = False
    save_every_steps: int = 0
    save_every_seconds: float = 0.0
    log_every_steps: int = 50
    log_keys: bool = False
    timeout_seconds: float = 600.0
    step_timeout_seconds: float = 0.0
    least_step_timeout_seconds: float = 0.0
    static_graph: bool | None = None


class PortraitTrainer(AdaptedTrainer):
    """SuperGradients' Trainer that trains on any number of nodes, stops and resumes at any step.

    It takes SuperGradients' training parameters. ``mixed_precision`` means bf16 autocast,
    ``batch_accumulate`` averages the gradients of its batches, ``sync_bn``, ``ema``,
    ``clip_grad_norm``, ``torch_compile`` are as there. A loss that is not finite ends the training
    with :class:`portrait_dist.errors.DivergedError`, unless an ``EarlyStop`` watches the loss.

    Args:
        experiment_name: name of the run; its folder is ``<ckpt_root_dir>/<experiment_name>``.
        ckpt_root_dir: folder of all runs.
        options: what the loop can do beyond SuperGradients' parameters.
        signals: recorded stop signals, looked at between two steps.
        prepare: turns a batch of the stream into (inputs, targets) on the device; plain (inputs,
            targets) batches need none.
        contract: of a network that is not the U-Net, from :func:`portrait_dist.models.check`: its
            output is read as that says, auxiliary outputs included. None: the loss takes the output
            as it is.
        metadata: entries for the checkpoints' ``portrait_dist`` dict, such as the configuration.
            What network it is, the size of the images and the hash of the data are added.
        device, multi_gpu: refused with advice, as by SuperGradients' Trainer.

    Attributes:
        on_restore: called on every rank with a checkpoint that is resumed, before anything of it is
            loaded; what it changes there is taken.
    """

    ema_class = FusedEMA

    def __init__(
        self,
        experiment_name: str,
        ckpt_root_dir: str | None = None,
        *,
        options: LoopOptions | None = None,
        signals: StopSignals | None = None,
        prepare: Prepare | None = None,
        contract: Contract | None = None,
        metadata: dict[str, Any] | None = None,
        device: str | None = None,
        multi_gpu: object = None,
    ) -> None:
        super().__init__(experiment_name, ckpt_root_dir, device=device, multi_gpu=multi_gpu)
        keep_freed_memory()
        self.options = options or LoopOptions()
        self.signals = signals or StopSignals()
        self.prepare = prepare
        self.contract = contract
        taken = contract is None or contract.channels_last
        self.channels_last = self.options.channels_last and taken
        self.metadata = metadata or {}
        self.agreement = Agreement(self.options.timeout_seconds)
        self.notice = StopNotice()
        self.checkpoint_writer = checkpoints.save_atomically
        self.saver = Saver()
        self.health: Health | None = None
        self.samples_seen = 0
        self.images_per_second = 0.0
        self.data_wait_share = 0.0
        self.checkpoint: dict[str, Any] = {}
        self.on_restore: Callable[[dict[str, Any]], None] = lambda checkpoint: None
        self.losses = LossWatch()
        self.average: AverageOfBest | None = None
        self._images: state.ImageMetadata = {}
        self._images_described = False
        self._training_net: nn.Module | None = None
        self._rank_states: list[state.RankState] | None = []
        self._versions = versions()
        self._sums_of_training: state.Sums | None = None
        self._schedule_of_training: state.ScheduleState | None = None
        self._last_position = Position(0, {})
        self._last_save = time.monotonic()

    # Model ----------------------------------------------------------------------------------------

    @property
    def torch_device(self) -> torch.device:
        """This rank's device."""
        return torch.device(self.device)

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Device, memory format, SyncBatchNorm, compilation and DDP, in that order."""
        params = self.training_params
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        model = model.to(self.torch_device)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        ranks = distributed.is_initialized()
        if ranks and params is not None and params.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if params is not None and params.torch_compile:
            # In place: the names in the state dict stay as they are.
            model.compile(**params.torch_compile_options)
        if ranks and params is not None:
            model = self._in_ddp(model, params.batch_accumulate)
        self._training_net = model
        return model

    def _in_ddp(self, model: nn.Module, accumulate: int) -> nn.Module:
        """Wrap a model for the exchange of gradients.

        A static graph is prepared once, but a network that uses other parameters in some step
        (layer dropping, staged losses) dies in it; such a network needs the search for unused
        parameters.
        """
        uniform = self.options.static_graph
        if uniform is None:
            uniform = isinstance(model, UNet)
        gpu = [self.torch_device.index] if self.torch_device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=gpu,
            **_NO_BUFFER_SYNC,  # rank 0's statistics are broadcast once, before validation
            gradient_as_bucket_view=True,
            static_graph=uniform and accumulate == 1,  # no_sync() changes the graph
            # The search costs a walk over the graph in each step, so not where it is known to be
            # vain.
            find_unused_parameters=not uniform,
        )

    def forward(self) -> loop.Forward:
        """How the network is called. Losses with ``takes_logits`` get logits."""
        return loop.Forward(
            self.torch_device,
            bf16=bool(self.training_params and self.training_params.mixed_precision),
            logits=getattr(self.criterion, "takes_logits", False),
            contract=self.contract,
        )

    # Training -------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> None:
        """Train; see SuperGradients' Trainer.train for the arguments.

        All files are written when it returns, on every rank.
        """
        try:
            super().train(*args, **kwargs)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the reason
                self.saver.join()
            raise
        self.saver.join()
        distributed.barrier()  # the files are there for every rank
        if self.health:
            self.health.close()
            self.health = None

    def start_health(self) -> Health:
        """Watch the ranks from the first training epoch on. A collective, once in a run."""
        if self.health is None:
            self.health = Health.start(
                RunFolder(self.checkpoints_dir_path),
                device=self.torch_device,
                group=self.agreement.group,
                timeout_seconds=self.options.timeout_seconds,
                step_timeout_seconds=self.options.step_timeout_seconds,
                least_timeout_seconds=self.options.least_step_timeout_seconds,
            )
        return self.health

    def run_training_epoch(self, context: PhaseContext, show: bool) -> dict[str, float]:
        """Run one epoch, or the rest of one that was interrupted.

        Returns:
            Mean losses and metrics over all ranks, by name.
        """
        context.update_context(loss_avg_meter=LossMeter())
        done = self._start_epoch(context)
        total = self.steps_per_epoch
        batches = self._training_batches(done, total)
        learner = loop.Learner(
            self.net,
            self.optimizer,
            self.forward(),
            self.compute_loss,
            total,
            self.batch_accumulate,
            self.training_params.clip_grad_norm,
            self._update_ema(context.epoch) if self.ema else None,
        )
        # A new one for each epoch: losses of an interrupted one would name the wrong step.
        self.losses = LossWatch()
        self.agreement.start_epoch(steps_of(total - done, self.batch_accumulate))
        title = f"epoch {context.epoch + 1}/{self.max_epochs}"
        health = self.start_health()
        with health.training():
            with EpochProgress(title, total, done, show) as progress, contextlib.closing(batches):
                hooks = _TrainingHooks(self, context, learner, batches, progress, health)
                loop.train_epoch(learner, batches, hooks, done=done)
                if batches.gave_up:  # saved before the loader's threads are waited for
                    health.enter(Activity.OTHER)
                    self._stop_without_server(context, batches.position)
            # What follows waits for the other ranks and for files, which is no stalled step.
            health.enter(Activity.OTHER)
            if self.torch_device.type == "cuda":
                # The host is some steps ahead; the rate counts finished ones. _reduce waits anyway.
                torch.cuda.synchronize(self.torch_device)
            self.images_per_second, self.data_wait_share = batches.rate, batches.wait_share
            self._finish_training_part(context, batches.position)
            return self._reduce(context.loss_avg_meter, self.train_metrics)

    def _training_batches(self, done: int, total: int) -> DeviceBatches:
        """Return the rest of an epoch's batches; a stop signal ends a wait for a server of shards.

        A rank that waits takes no step, and the others wait for it within theirs, where nothing can
        be saved. So where shards may still have to be fetched, all ranks agree before each step
        whether everyone has a batch. That costs an exchange of one number, 2 (N - 1) hops.
        """
        dataset = getattr(self.train_loader, "dataset", None)
        may_wait = bool(getattr(getattr(dataset, "shards", None), "may_wait", False))
        # The exchange takes longer than a step there; such a wait ends with the step timeout.
        if distributed.world_size() > MOST_RANKS_TO_ASK:
            may_wait = False
        if not self.agreement.any_rank(may_wait):
            return DeviceBatches(self.train_loader, self.torch_device, total - done, done)
        return DeviceBatches(
            self.train_loader,
            self.torch_device,
            total - done,
            done,
            give_up=lambda: bool(self.signals.received),
            agree=self._agree_before_step,
        )

    def _agree_before_step(self, gave_up: bool) -> bool:
        if self.health and distributed.world_size() > 1:
            self.health.enter(Activity.OTHER)
        return self.agreement.any_rank(gave_up)

    def _start_epoch(self, context: PhaseContext) -> int:
        """Begin an epoch or take up an interrupted one; return how many batches are done."""
        loader, epoch = self.train_loader, context.epoch
        resumed = self.checkpoint.get("portrait_dist", {}) if epoch == self.start_epoch else {}
        # Taken over below; its tensors need not stay in memory for the whole run.
        self.checkpoint = {}
        if resumed:
            state.restore_random_state(resumed.get("ranks", []))
            # A checkpoint holds NCHW, and fused optimisers want the layout of the parameters.
            if self.channels_last:
                state.lay_out_as_parameters(self.optimizer)
        position = resumed.get("position")
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        elif hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        if not position:
            return 0
        meter = context.loss_avg_meter
        state.restore_sums(resumed["ranks"], meter, self.train_metrics, self.torch_device)
        # A rank may resume behind its last batch: nothing else would name the losses then.
        if meter.sum is not None and self.loss_logging_items_names is None:
            self.name_losses()
        if not hasattr(loader, "load_state_dict"):
            raise InputError(
                "this run stopped in the middle of an epoch: resume it with the loader of "
                "portrait_dist.data.build_loader"
            )
        loader.load_state_dict(position["loader"])
        # On another number of ranks, or with another batch size, the same samples are another
        # number of batches.
        left = getattr(loader, "batches_left", None)
        return int(position["batches"]) if left is None else len(loader) - int(left)

    def _update_ema(self, epoch: int) -> Callable[[int], None]:
        total, accumulate = self.optimizer_steps_per_epoch, self.batch_accumulate

        def update(index: int) -> None:
            step = steps_of(index + 1, accumulate) + total * epoch
            self.ema_model.update(
                self._training_net, step=step, total_steps=total * self.max_epochs
            )

        return update

    def inputs(self, batch: Any, *, epoch: int | None) -> UnpackedBatch:
        """Split a batch on the device into what network, loss and callbacks get.

        Args:
            batch: a :class:`TensorBatch` or a tuple.
            epoch: of training; None for evaluation, which is not augmented.
        """
        extra: dict[str, Any] = {}
        if isinstance(batch, TensorBatch):
            if self.prepare is None:
                raise InputError(
                    "batches of uint8 images need PortraitTrainer(prepare=…), such as "
                    "portrait_dist.training.main.Prepare"
                )
            inputs, targets = self.prepare(batch, training=epoch is not None, epoch=epoch)
            if not self.channels_last:  # as which the loader's images come
                inputs = inputs.contiguous()
        else:
            inputs, targets = batch[0], batch[1]
            extra = batch[2] if len(batch) > 2 else {}
        if self.channels_last and getattr(inputs, "ndim", 0) == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return UnpackedBatch(inputs, targets, extra)

    def first_batch(self, batch: object) -> UnpackedBatch:
        """Return what the network, the loss and the callbacks get of a batch of a loader."""
        return self.inputs(to_device(batch, self.torch_device), epoch=None)

    def describe_images(self, batch: object) -> None:
        """Keep for the checkpoints what the training images are; once, from the first batch."""
        if not self._images_described:
            self._images_described = True
            self._images |= state.describe_images(self.train_loader, batch)

    # Between two steps ----------------------------------------------------------------------------

    def between_steps(self, context: PhaseContext, index: int, position: Position) -> None:
        """Save, stop or fail where all ranks agree. Called after each optimiser step."""
        # A failed checkpoint ends the run at the next step, not at the end of the epoch.
        self.saver.check()
        options, batch = self.options, index + 1 + self.steps_per_epoch * context.epoch
        agreed = self.agreement.exchange(self._request())
        due = options.save_every_steps and batch % options.save_every_steps == 0
        if agreed == NOTHING and not due:
            return
        # A checkpoint may take longer than any step; that is no rank that hangs.
        with self.start_health().long_wait():
            self._act_on(agreed, context, index, position)

    def _act_on(self, agreed: int, context: PhaseContext, index: int, position: Position) -> None:
        if agreed == FAIL:
            self._raise_if_diverged(context)
        elif agreed == STOP:
            self._save_within_epoch(context, position)
            where = f"epoch {context.epoch + 1}, step {index + 1} of {self.steps_per_epoch}"
            self._stop(context, where)
        else:
            self._save_within_epoch(context, position)

    def _request(self) -> int:
        """Return what this rank wants to happen."""
        # `bad`, not first_bad(): that would wait for the device in each step.
        if self.losses.bad is not None:
            return FAIL
        if self.signals.received:
            return STOP
        every = self.options.save_every_seconds
        return SAVE if every and time.monotonic() - self._last_save > every else NOTHING

    def _stop_without_server(self, context: PhaseContext, position: Position) -> None:
        """Save after the last step and stop, on all ranks: a rank has no batch for the next one.

        Within an optimiser step of several batches nothing can be saved.
        """
        self.agreement.finish()
        with self.start_health().long_wait():
            where = f"epoch {context.epoch + 1}, waiting for batch {position.batches + 1}"
            # Gradients of a half step stand in no checkpoint.
            if position.batches % self.batch_accumulate == 0:
                self._save_within_epoch(context, position)
            self._stop(context, where)

    def _finish_training_part(self, context: PhaseContext, position: Position) -> None:
        """Act on the last exchange; keep what the checkpoint of this epoch needs of every rank."""
        if self.agreement.finish() == STOP:
            with self.start_health().long_wait():
                self._save_within_epoch(context, position)
                self._stop(context, f"the end of epoch {context.epoch + 1}")
        self._raise_if_diverged(context)
        # Now, on every rank: save_epoch runs on rank 0 alone, after the validation.
        self._rank_states = self._gather_states()
        self._last_position = position
        sums = state.sums_so_far(context.loss_avg_meter, self.train_metrics)
        # A copy: the metrics are reset before a stop in the validation could save them.
        self._sums_of_training = checkpoints.host_copy(sums)
        self._schedule_of_training = state.ScheduleState.of(
            self.optimizer, self._torch_lr_scheduler
        )

    def _gather_states(self, sums: state.Sums | None = None) -> list[state.RankState] | None:
        """Gather every rank's random state on rank 0, 16 kB each; over gloo where it can."""
        own = state.random_state()
        if sums is not None:
            own["sums"] = sums
        return distributed.gather_to_rank_0(checkpoints.host_copy(own), self.agreement.group)

    def _stop(self, context: PhaseContext, where: str) -> None:
        self.saver.join()
        # Nobody leaves, and makes torchrun end the others, before rank 0 has saved.
        distributed.barrier()
        context.update_context(stop_training=True)
        name = self.signals.received or "a signal to another rank"
        batches, accumulate = self._last_position.batches, self.batch_accumulate
        steps_per_epoch = steps_of(self.steps_per_epoch, accumulate)
        saved = f"saved in {self.checkpoints_dir_path}; the same command resumes there"
        if not self._can_save(self._last_position):
            saved = (
                "not saved within the epoch, which needs a loader with state_dict "
                "(portrait_dist.data.build_loader)"
            )
        raise Stopped(
            f"stopped by {name} at {where}, {saved}",
            epoch=context.epoch,
            batch=context.epoch * self.steps_per_epoch + batches,
            step=context.epoch * steps_per_epoch + steps_of(batches, accumulate),
            samples_seen=self.samples_seen,
        )

    def _raise_if_diverged(self, context: PhaseContext) -> None:
        """End the run on all ranks if a loss or the weights are not finite. A collective.

        SuperGradients' ``EarlyStop`` that watches the loss decides in its place.

        Raises:
            DivergedError: the same one on every rank, of the earliest step that any rank knows.
        """
        if self.finiteness_is_watched:
            return
        bad = self.losses.first_bad()
        broken = bad is None and not loop.weights_are_finite(unwrap_model(self.net))
        # A flag first: objects are gathered only where there is something to tell.
        flag = torch.tensor([float(bad is not None or broken)], device=self.torch_device)
        distributed.sum_over_ranks([flag])
        if flag.item() == 0:
            return
        found = [step for step in distributed.gather_objects(bad) if step is not None]
        # The earliest step: the all-reduce of its gradients has spoilt the other ranks after it.
        first = min(found, key=lambda step: (step.index, step.rank), default=None)
        error = self._diverged(context.epoch, first)
        error.agreed, error.quiet = True, distributed.rank() != 0
        if error.quiet:
            time.sleep(distributed.SECONDS_AFTER_RANK_0)  # rank 0 leaves first, with the message
        raise error

    def _diverged(self, epoch: int, first: Step | None) -> DivergedError:
        latest = Path(self.checkpoints_dir_path) / LATEST
        kept = f"{latest} stays as it was" if latest.exists() else "nothing was saved yet"
        advice = (
            "try a lower learning rate, gradient clipping (train.clip_grad_norm=1) or "
            "train.precision=fp32, and look at these samples"
        )
        if first is None:
            lr = float(self.optimizer.param_groups[0]["lr"])
            return DivergedError(
                f"the weights are not finite in epoch {epoch + 1}, learning rate {lr:g}; {kept}; "
                f"{advice}",
                epoch=epoch,
                lr=lr,
            )
        shown = ", ".join(first.keys[:KEYS_IN_A_MESSAGE]) or "(the loader gives no keys)"
        more = len(first.keys) - KEYS_IN_A_MESSAGE
        shown += f" and {more} more" if more > 0 else ""
        step = first.index + 1
        return DivergedError(
            f"the loss is not finite at epoch {epoch + 1}, step {step} of {self.steps_per_epoch}, "
            f"on rank {first.rank}, learning rate {first.lr:g}, samples {shown}; {kept}; {advice}",
            keys=first.keys,
            epoch=epoch,
            step=step + self.steps_per_epoch * epoch,
            lr=first.lr,
        )

    def show_progress(
        self, context: PhaseContext, index: int, batches: DeviceBatches, progress: EpochProgress
    ) -> None:
        """Report losses, metrics and speed so far; reads them from the device."""
        self.losses.first_bad()
        self.images_per_second, self.data_wait_share = batches.rate, batches.wait_share
        if distributed.rank() != 0:
            return
        means = context.loss_avg_meter.average
        losses = dict(zip(self.loss_logging_items_names, means, strict=False))
        # On a terminal the bar is redrawn often; metrics.jsonl and TensorBoard get the interval
        # only.
        if self._at_log_interval(index) or not progress.on_terminal:
            for callback in self.phase_callbacks:
                if hasattr(callback, "on_interval"):
                    callback.on_interval(self, context, index, losses)
        progress.show(self.values_so_far(means, self.train_metrics), self.images_per_second)

    def _at_log_interval(self, index: int) -> bool:
        return (index + 1) % self.options.log_every_steps == 0

    def report_if_due(
        self, context: PhaseContext, index: int, batches: DeviceBatches, progress: EpochProgress
    ) -> None:
        """Call ``show_progress`` at the log interval on every rank, and where a line is due."""
        if progress.due or self._at_log_interval(index):
            self.show_progress(context, index, batches, progress)

    def _reduce(self, meter: LossMeter, metrics: Any) -> dict[str, float]:
        """Mean losses and metrics over the samples of all ranks."""
        if self.loss_logging_items_names is None:  # this rank saw no batch yet
            self.name_losses()
        losses = meter.average_over_ranks(
            len(self.loss_logging_items_names or ()), self.torch_device
        )
        return self.named_values(losses + self.metric_values(metrics), metrics)

    # Evaluation -----------------------------------------------------------------------------------

    def run_evaluation(
        self,
        loader: Any,
        metrics: Any,
        context: PhaseContext,
        *,
        show: bool,
        validating: bool,
        title: str,
        max_batches: int | None = None,
    ) -> dict[str, float]:
        """Evaluate every sample of ``loader`` once; sums are reduced over the ranks at the end."""
        context.update_context(loss_avg_meter=LossMeter())
        # Without DDP: ranks may have different numbers of batches, and its forward may talk to
        # them.
        net = unwrap_model(self.net)
        self._broadcast_buffers(net)
        limit = len(loader) if max_batches is None else min(max_batches, len(loader))
        batches = DeviceBatches(
            loader,
            self.torch_device,
            limit,
            give_up=lambda: validating and self.notice.raised(bool(self.signals.received)),
        )
        with EpochProgress(title, limit, visible=show) as progress, contextlib.closing(batches):
            hooks = _EvaluationHooks(self, context, batches, progress, validating)
            loop.evaluate(net, self.forward(), batches, hooks)
        if validating:
            self._stop_in_validation(hooks.stopped or batches.gave_up, context)
        return self._reduce(context.loss_avg_meter, metrics)

    def _broadcast_buffers(self, net: nn.Module) -> None:
        """Give every rank rank 0's batch statistics, as DDP would at each forward."""
        if distributed.is_initialized():
            import torch.distributed as dist

            for buffer in net.buffers():
                dist.broadcast(buffer, src=0)

    def _stop_in_validation(self, stopped: bool, context: PhaseContext) -> None:
        flag = torch.tensor([float(stopped)], device=self.torch_device)
        distributed.sum_over_ranks([flag])
        if flag.item() == 0:
            return
        if context.epoch < self.max_epochs:
            self._save_within_epoch(context, self._last_position, validating=True)
            self._stop(context, f"validation of epoch {context.epoch + 1}")
        # Of the averaged model, whose weights the network has now: the run is saved already.
        context.update_context(epoch=self.max_epochs - 1)
        self._stop(context, "the validation of the averaged model")

    # Checkpoints ----------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Forget what belongs to a run before this one."""
        params = self.training_params
        self.average = self.model_weight_averaging = None
        self._images, self._images_described = {}, False
        if params.average_best_models:
            better = params.greater_metric_to_watch_is_better
            self.average = AverageOfBest(self.checkpoints_dir_path, better)

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Load a checkpoint into the model, and take over how far its run was.

        Raises:
            InputError: there is no such checkpoint, or it is of another model.
            DamagedDataError: the checkpoint or a snapshot of the average is damaged.
        """
        found = checkpoints.read_on_every_rank(checkpoint)
        checkpoints.check_resumable(found, checkpoint)
        self.on_restore(found)
        try:
            self.load_weights(found)
        except RuntimeError as error:
            raise InputError(
                f"{checkpoint}: holds another model ({one_line(error, 160)}); choose "
                "another run.name"
            ) from error
        info = checkpoints.info_of(found, checkpoint)
        distributed.on_every_rank(lambda: self._take_over(info))
        self._best_ckpt_metrics = found.get("_best_ckpt_metrics")
        return found

    def _take_over(self, info: CheckpointInfo) -> None:
        """Continue the counts of a run, its best value and its average."""
        params = self.training_params
        self.samples_seen = info.samples_seen
        if info.size is not None:
            self._images = {"size": list(info.size), "aspect": info.aspect}
            if info.fit != "squash":
                self._images["fit"] = info.fit
        best = info.best_metric if info.best_metric is not None else info.acc or 0.0
        if distributed.rank() == 0:
            # A kill between the two files leaves a best checkpoint that is newer than the latest
            # one.
            saved = Path(self.checkpoints_dir_path) / params.ckpt_best_name
            if saved.is_file() and (value := checkpoints.read_info(saved).acc) is not None:
                best = (max if params.greater_metric_to_watch_is_better else min)(best, value)
            # Weights taken from another folder bring no snapshots along.
            own = saved.parent.is_dir() and saved.parent.samefile(Path(info.path).parent)
            if self.average is not None and own:
                self.average.resume(info.averaged)
        self.best_metric = best  # only rank 0 compares with it

    def save_epoch(
        self,
        epoch: int,
        train_values: dict[str, float],
        valid_values: dict[str, float],
        context: PhaseContext,
    ) -> None:
        """Hand the files of a validated epoch to the writing thread. Called on rank 0."""
        self.saver.join()  # before the set of averaged models changes
        value = float(valid_values[self.metric_to_watch])
        sign = 1.0 if self.greater_metric_to_watch_is_better else -1.0
        better = bool(np.isfinite(value)) and sign * value > sign * self.best_metric
        metrics = {
            "tracked_metric_name": self.metric_to_watch,
            "valid": dict(valid_values),
            "train": dict(train_values),
        }
        if better:
            self.best_metric, self._best_ckpt_metrics = value, metrics
        averaged = self.average is not None and self.average.consider(epoch, value)
        entries = checkpoints.host_copy(self._state(epoch, value, metrics))
        epochs = self.training_params.save_ckpt_epoch_list
        files = EpochFiles(
            epoch,
            entries,
            latest=LATEST,
            best=self.ckpt_best_name if better else None,
            best_state=self.state_of_best(entries) if better else None,
            copy=f"ckpt_epoch_{epoch}.pth" if epoch in epochs else None,
            average=self.average,
            averaged=averaged,
        )
        self.saver.save(files, Path(self.checkpoints_dir_path), self.sg_logger)
        if better:
            if any(_acts_on_a_best_epoch(callback) for callback in self.phase_callbacks):
                self.saver.join()  # it may read the file
            self.phase_callback_handler.on_validation_end_best_epoch(context)
        self._last_save = time.monotonic()

    def state_of_best(self, entries: dict[str, Any]) -> dict[str, Any] | None:
        """Return what ``ckpt_best.pth`` holds; None for the whole checkpoint.

        Args:
            entries: the checkpoint, on the host.
        """
        return None

    def make_average(self) -> AverageOfBest | None:
        """Return the average of the best models; its ``cleanup()`` removes the snapshots."""
        return self.average

    def finish_writing(self) -> None:
        """Wait for the writing thread, before somebody reads the files."""
        self.saver.join()

    def _state(self, epoch: int, value: float, metrics: dict[str, Any]) -> dict[str, Any]:
        """Build SuperGradients' checkpoint dict, with what resuming needs besides."""
        averaged = None if self.average is None else [asdict(one) for one in self.average.members]
        entries = {
            "net": unwrap_model(self._training_net).state_dict(),
            "acc": value,
            "epoch": epoch,
            "metrics": metrics,
            "packages": self._versions,
            "_best_ckpt_metrics": self._best_ckpt_metrics,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.scaler.state_dict() if self.scaler is not None else {},
            "portrait_dist": {
                **state.describe_network(unwrap_model(self._training_net)),
                "data": state.describe_data(self.train_loader, self.valid_loader),
                **self._images,
                **self.metadata,
                "format": state.FORMAT,
                "best_metric": float(self.best_metric),
                "samples_seen": self.samples_seen,
                "world_size": distributed.world_size(),
                "ranks": self._rank_states,
                # A whole epoch; _save_within_epoch sets it.
                "position": None,
                "averaged": averaged,
            },
            **self.processing_params(),
        }
        if self.ema:
            entries["ema_net"] = unwrap_model(self.ema_model.ema).state_dict()
        if self._torch_lr_scheduler is not None:
            entries["torch_scheduler_state_dict"] = state.plain_state(self._torch_lr_scheduler)
        return entries

    def _save_within_epoch(
        self, context: PhaseContext, position: Position, *, validating: bool = False
    ) -> None:
        """Save ``ckpt_latest.pth`` between two steps. Every rank calls it; rank 0 writes.

        Args:
            context: of the epoch.
            position: in its training part.
            validating: that part is over; a schedule has advanced, and will again after a resume.
        """
        self._last_position = position
        if not self._can_save(position):
            return
        self._raise_if_diverged(context)
        # In validation the trainer's metrics are the validation's: those of training were kept.
        sums = self._sums_of_training
        if context.metrics_compute_fn is self.train_metrics:
            sums = state.sums_so_far(context.loss_avg_meter, self.train_metrics)
        self._rank_states = self._gather_states(sums=sums)
        if distributed.rank() == 0:
            metrics = {"tracked_metric_name": self.metric_to_watch, "valid": {}, "train": {}}
            self.saver.join()
            entries = self._state(context.epoch, float(self.best_metric), metrics)
            entries["portrait_dist"]["position"] = asdict(position)
            if validating and self._schedule_of_training:
                self._schedule_of_training.put_into(entries)
            files = EpochFiles(context.epoch, checkpoints.host_copy(entries), latest=LATEST)
            self.saver.save(files, Path(self.checkpoints_dir_path), self.sg_logger)
        self._last_save = time.monotonic()

    def _can_save(self, position: Position) -> bool:
        return bool(self.training_params.save_model and position.loader)


class PortraitKDTrainer(PortraitTrainer, KDTrainer):
    """SuperGradients' KDTrainer with the loop, the files and the guarantees of PortraitTrainer.

    ``train`` takes ``student`` and ``teacher``, or a ``KDModule``. The best checkpoint holds the
    student alone, ``ckpt_latest.pth`` both.
    """

    ema_class = FusedKDEMA

    def state_of_best(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Keep the student only: its averaged weights where there are some."""
        name = "ema_net" if "ema_net" in entries else "net"
        prefix = "student."
        student = {
            key.removeprefix(prefix): value
            for key, value in entries[name].items()
            if key.startswith(prefix)
        }
        own = {
            **entries["portrait_dist"],
            **state.describe_network(unwrap_model(self._training_net).student),
        }
        kept = {key: value for key, value in entries.items() if key != "ema_net"}
        return {**kept, "net": student, "portrait_dist": own}


# What SuperGradients gets to know around a batch --------------------------------------------------


class _TrainingHooks:
    """SuperGradients' callbacks of a training batch, then what the ranks do between two steps."""

    def __init__(
        self,
        trainer: PortraitTrainer,
        context: PhaseContext,
        learner: loop.Learner,
        batches: DeviceBatches,
        progress: EpochProgress,
        health: Health,
    ) -> None:
        self.trainer, self.context, self.learner = trainer, context, learner
        self.batches, self.progress, self.health = batches, progress, health
        self.callbacks = trainer.phase_callback_handler
        self.keys: tuple[str, ...] = ()

    def batch_start(self, index: int, batch: object) -> tuple[Any, Any]:
        self.health.begin_batch()
        trainer = self.trainer
        trainer.describe_images(batch)
        inputs, targets, extra = trainer.inputs(batch, epoch=self.context.epoch)
        if trainer.pre_prediction_callback is not None:
            inputs, targets = trainer.pre_prediction_callback(inputs, targets, index)
        self.keys = tuple(batch.keys) if isinstance(batch, TensorBatch) else ()
        if trainer.options.log_keys and self.keys:
            _log_keys(trainer.checkpoints_dir_path, self.context.epoch, index, self.keys)
        self.context.update_context(
            batch_idx=index,
            inputs=inputs,
            target=targets,
            additional_batch_items=extra,
            **extra,
        )
        self.callbacks.on_train_batch_start(self.context)
        return inputs, targets

    def loss_end(
        self, index: int, loss: torch.Tensor, items: torch.Tensor, predictions: object
    ) -> None:
        trainer = self.trainer
        lr = float(trainer.optimizer.param_groups[0]["lr"])
        trainer.losses.add(Step(index, self.keys, lr, distributed.rank()), loss)
        self.context.update_context(
            preds=predictions,
            loss_log_items=items,
            loss_logging_items_names=trainer.loss_logging_items_names,
        )
        self.callbacks.on_train_batch_loss_end(self.context)
        if index == 0:
            trainer._epoch_start_logging_values = trainer._get_epoch_start_logging_values()
        # From here on a rank may wait for the others: DDP exchanges gradients in the backward.
        self.health.enter(Activity.EXCHANGE)

    def backward_end(self) -> None:
        self.health.enter(Activity.OTHER)
        self.callbacks.on_train_batch_backward_end(self.context)

    def step_start(self) -> None:
        self.callbacks.on_train_batch_gradient_step_start(self.context)

    def step_end(self) -> None:
        self.callbacks.on_train_batch_gradient_step_end(self.context)

    def batch_end(self, index: int, batch: object) -> None:
        trainer = self.trainer
        self.callbacks.on_train_batch_end(self.context)
        # Every rank has as many: training drops what fills no global batch.
        trainer.samples_seen += samples_in(batch) * distributed.world_size()
        if index == self.learner.group(index)[-1]:
            trainer.between_steps(self.context, index, self.batches.position)
        self.progress.advance()
        trainer.report_if_due(self.context, index, self.batches, self.progress)
        self.health.end_batch()
        if trainer._at_log_interval(index):
            self.health.exchange()
        self.health.enter(Activity.DATA)


class _EvaluationHooks:
    """SuperGradients' callbacks of a validation or test batch."""

    def __init__(
        self,
        trainer: PortraitTrainer,
        context: PhaseContext,
        batches: DeviceBatches,
        progress: EpochProgress,
        validating: bool,
    ) -> None:
        self.trainer, self.context, self.batches = trainer, context, batches
        self.progress, self.validating = progress, validating
        self.stopped = False
        handler = trainer.phase_callback_handler
        self.before, self.after = (
            (handler.on_validation_batch_start, handler.on_validation_batch_end)
            if validating
            else (handler.on_test_batch_start, handler.on_test_batch_end)
        )

    def batch_start(self, index: int, batch: object) -> tuple[Any, Any]:
        inputs, targets, extra = self.trainer.inputs(batch, epoch=None)
        self.context.update_context(
            batch_idx=index,
            inputs=inputs,
            target=targets,
            additional_batch_items=extra,
            **extra,
        )
        self.before(self.context)
        return inputs, targets

    def batch_end(self, batch: Any, outputs: Any, targets: Any, predictions: Any) -> bool:
        trainer = self.trainer
        self.context.update_context(preds=predictions, batch=batch)
        # Trainer.test takes a network without a loss.
        if trainer.criterion is not None:
            self.context.update_context(loss_log_items=trainer.compute_loss(outputs, targets)[1])
        self.after(self.context)
        self.progress.advance()
        if self.progress.due:
            self.progress.show({}, self.batches.rate)
        if self.validating:
            self.stopped = trainer.notice.raised(bool(trainer.signals.received))
        return not self.stopped


def _acts_on_a_best_epoch(callback: object) -> bool:
    phase = getattr(callback, "phase", None)
    if phase is not None:  # a PhaseCallback has all methods and acts in one phase
        return str(getattr(phase, "name", phase)) == "VALIDATION_END_BEST_EPOCH"
    method = "on_validation_end_best_epoch"
    return getattr(type(callback), method, None) is not getattr(Callback, method)


def _log_keys(folder: str, epoch: int, batch: int, keys: tuple[str, ...]) -> None:
    path = RunFolder(folder).keys_file(distributed.rank())
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"epoch": epoch, "batch": batch, "keys": keys}) + "\n")
