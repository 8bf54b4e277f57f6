"""The Trainer: SuperGradients' parameters, callbacks, loggers and checkpoints around a loop that never waits for the host.

One step is load, forward, loss, backward, optimiser step. Losses and metrics accumulate on the device and are reduced over the
ranks once, at the end of the epoch. Between two steps all ranks agree whether to save or to stop
(:mod:`portrait_dist.training.preemption`), so a checkpoint in the middle of an epoch is a few integers more than one at its
end: the position in the stream, the sums so far, and the random state of every rank.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from portrait_dist import checkpoints, distributed
from portrait_dist.errors import InputError, Stopped
from portrait_dist.runs.folder import LATEST
from portrait_dist.system.info import versions
from portrait_dist.system.malloc import keep_freed_memory
from portrait_dist.training.averaging import AverageOfBest
from portrait_dist.training.console import EpochProgress
from portrait_dist.training.device_batches import DeviceBatches, TensorBatch
from portrait_dist.training.preemption import SAVE, STOP, Agreement, StopNotice, StopSignals
from portrait_dist.training.sg_adapter import AdaptedTrainer, PhaseContext, unwrap_model

# torch 2.15 renamed the option and warns of the old name.
_DDP_OPTIONS = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
_BUFFER_OPTION = (
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"
)
_NO_BUFFER_SYNC: dict[str, Any] = {_BUFFER_OPTION: False}


@dataclass
class LoopOptions:
    """What the loop can do beyond SuperGradients' training parameters; see ``config.TrainConfig`` for units."""

    channels_last: bool = False
    save_every_steps: int = 0
    save_every_seconds: float = 0.0
    log_every_steps: int = 50
    log_keys: bool = False


class LossMeter:
    """Sample-weighted means of the loss items, summed on the device in float64."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None
        self.count = 0

    def update(self, value: torch.Tensor, batch_size: int) -> None:
        """Add a batch: ``value`` are its mean losses, shape [n]; ``batch_size`` its samples."""
        weighted = value.detach().to(torch.float64) * batch_size
        self.sum = weighted if self.sum is None else self.sum + weighted
        self.count += batch_size

    @property
    def average(self) -> tuple[float, ...]:
        """Means so far on this rank (waits for the device)."""
        return () if self.sum is None else tuple((self.sum / max(self.count, 1)).tolist())

    def average_over_ranks(self, items: int, device: torch.device) -> tuple[float, ...]:
        """Means over the samples of all ranks; one collective. A rank may have seen none."""
        total = torch.zeros(items + 1, dtype=torch.float64, device=device)
        if self.sum is not None:
            total[:items] = self.sum
        total[items] = self.count
        distributed.sum_over_ranks([total])
        return tuple((total[:items] / total[items].clamp(min=1)).tolist())


class PortraitTrainer(AdaptedTrainer):
    """SuperGradients' Trainer that trains on any number of nodes, stops and resumes at any step.

    It takes SuperGradients' training parameters. ``mixed_precision`` means bf16 autocast, ``batch_accumulate`` averages the
    gradients of its batches, ``sync_bn``, ``ema``, ``clip_grad_norm``, ``torch_compile`` are as there.

    Args:
        experiment_name: name of the run; its folder is ``<ckpt_root_dir>/<experiment_name>``.
        ckpt_root_dir: folder of all runs.
        options: what the loop can do beyond SuperGradients' parameters.
        signals: noted stop signals, looked at between two steps.
        prepare: turns a batch of the stream into (inputs, targets) on the device; plain (inputs, targets) batches need none.
        about: entries for the checkpoints' ``portrait_dist`` dict (model settings, size, configuration).
        device, multi_gpu: refused with advice, as by SuperGradients' Trainer.
    """

    def __init__(
        self,
        experiment_name: str,
        ckpt_root_dir: str | None = None,
        *,
        options: LoopOptions | None = None,
        signals: StopSignals | None = None,
        prepare: Any = None,
        about: dict[str, Any] | None = None,
        device: str | None = None,
        multi_gpu: Any = None,
    ) -> None:
        super().__init__(experiment_name, ckpt_root_dir, device=device, multi_gpu=multi_gpu)
        keep_freed_memory()
        self.options = options or LoopOptions()
        self.signals = signals or StopSignals()
        self.prepare = prepare
        self.about = about or {}
        self.agreement = Agreement()
        self.notice = StopNotice()
        self.checkpoint_writer = checkpoints.save_atomically
        self.samples_seen = 0
        self.images_per_second = 0.0
        self.data_wait_share = 0.0
        self.checkpoint: dict[str, Any] = {}
        self._training_net: nn.Module | None = None
        self._rank_states: list[dict[str, Any]] = []
        self._versions = versions()
        self._sums_of_training: dict[str, Any] = {}
        self._last_position: dict[str, Any] = {}
        self._last_save = time.monotonic()

    # Model ----------------------------------------------------------------------------------------------------------

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
        if self.options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        ranks = distributed.is_initialized()
        if ranks and params is not None and params.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if params is not None and params.torch_compile:
            # In place: the names in the state dict stay as they are.
            model.compile(**params.torch_compile_options)
        if ranks and params is not None:
            gpu = [self.torch_device.index] if self.torch_device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(
                model,
                device_ids=gpu,
                **_NO_BUFFER_SYNC,  # rank 0's statistics are broadcast once, before validation
                gradient_as_bucket_view=True,
                static_graph=params.batch_accumulate == 1,  # no_sync() changes the graph
            )
        self._training_net = model
        return model

    def _forward(self, net: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the loss takes, probabilities). Losses with ``takes_logits`` get logits."""
        logits_wanted = getattr(self.criterion, "takes_logits", False)
        bf16 = bool(self.training_params and self.training_params.mixed_precision)
        with torch.autocast(self.torch_device.type, dtype=torch.bfloat16, enabled=bf16):
            outputs = net(inputs, return_logits=True) if logits_wanted else net(inputs)
        if isinstance(outputs, torch.Tensor) and bf16:
            outputs = outputs.float()
        return outputs, torch.sigmoid(outputs.detach()) if logits_wanted else outputs

    # Training -------------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in a training epoch."""
        return int(self.max_train_batches or len(self.train_loader))

    def run_training_epoch(self, context: PhaseContext, show: bool) -> dict[str, float]:
        """One epoch, or the rest of one that was interrupted. Returns mean losses and metrics over all ranks."""
        context.update_context(loss_avg_meter=LossMeter())
        done = self._start_epoch(context)
        steps = self.steps_per_epoch
        batches = DeviceBatches(self.train_loader, self.torch_device, limit=steps - done, done=done)
        title = f"epoch {context.epoch + 1}/{self.max_epochs}"
        with EpochProgress(title, steps, done, show) as progress, contextlib.closing(batches):
            for batch_idx, batch in enumerate(batches, start=done):
                self._train_step(batch, batch_idx, context)
                self.samples_seen += len(batch) * distributed.world_size()
                self._between_steps(context, batch_idx, batches.position)
                progress.advance()
                if progress.due or (batch_idx + 1) % self.options.log_every_steps == 0:
                    self._show_progress(context, batch_idx, batches, progress)
        self.images_per_second, self.data_wait_share = batches.rate, batches.wait_share
        self._finish_training_part(context, batches.position)
        return self._reduce(context.loss_avg_meter, self.train_metrics)

    def _start_epoch(self, context: PhaseContext) -> int:
        """Tell the loader the epoch; take up an interrupted one. Returns the batches of this rank that are done."""
        loader, epoch = self.train_loader, context.epoch
        resumed = self.checkpoint.get("portrait_dist", {}) if epoch == self.start_epoch else {}
        self.checkpoint = {}
        if resumed:
            self._restore_random_state(resumed)
            self._restore_memory_format()
        position = resumed.get("position")
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        elif hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        if not position:
            return 0
        self._restore_sums(resumed, context.loss_avg_meter)
        if not hasattr(loader, "load_state_dict"):
            raise InputError(
                "this run stopped in the middle of an epoch: resume it with the loader of portrait_dist.data.build_loader"
            )
        loader.load_state_dict(position["loader"])
        return int(position["batches"])

    def _train_step(self, batch: TensorBatch, batch_idx: int, context: PhaseContext) -> None:
        inputs, targets, extra = self._inputs(batch, training=True, epoch=context.epoch)
        if self.pre_prediction_callback is not None:
            inputs, targets = self.pre_prediction_callback(inputs, targets, batch_idx)
        if self.options.log_keys and isinstance(batch, TensorBatch):
            self._log_keys(context.epoch, batch_idx, batch.keys)
        context.update_context(
            batch_idx=batch_idx,
            inputs=inputs,
            target=targets,
            additional_batch_items=extra,
            **extra,
        )
        self.phase_callback_handler.on_train_batch_start(context)
        first, last = self._accumulation_bounds(batch_idx)
        with contextlib.nullcontext() if batch_idx == last else self._no_sync():
            outputs, probabilities = self._forward(self.net, inputs)
            loss, items = self.compute_loss(outputs, targets)
            context.update_context(
                preds=probabilities,
                loss_log_items=items,
                loss_logging_items_names=self.loss_logging_items_names,
            )
            self.phase_callback_handler.on_train_batch_loss_end(context)
            if batch_idx == 0:
                self._epoch_start_logging_values = self._get_epoch_start_logging_values()
            (loss / (last - first + 1)).backward()
        self.phase_callback_handler.on_train_batch_backward_end(context)
        if batch_idx == last:
            self._optimizer_step(batch_idx, context)
        self.phase_callback_handler.on_train_batch_end(context)

    def _log_keys(self, epoch: int, batch: int, keys: list[str]) -> None:
        with open(
            Path(self.checkpoints_dir_path) / f"keys-rank{distributed.rank()}.jsonl",
            "a",
            encoding="utf-8",
        ) as file:
            file.write(json.dumps({"epoch": epoch, "batch": batch, "keys": keys}) + "\n")

    def _accumulation_bounds(self, batch_idx: int) -> tuple[int, int]:
        """First and last batch of the group whose gradients make one optimiser step; the last group may be short."""
        first = batch_idx - batch_idx % self.batch_accumulate
        return first, min(first + self.batch_accumulate, self.steps_per_epoch) - 1

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        return (
            self.net.no_sync()
            if isinstance(self.net, nn.parallel.DistributedDataParallel)
            else contextlib.nullcontext()
        )

    def _optimizer_step(self, batch_idx: int, context: PhaseContext) -> None:
        self.phase_callback_handler.on_train_batch_gradient_step_start(context)
        if self.training_params.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(
                self.net.parameters(), self.training_params.clip_grad_norm
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            step = batch_idx + 1 + self.steps_per_epoch * context.epoch
            self.ema_model.update(
                self._training_net, step=step, total_steps=self.steps_per_epoch * self.max_epochs
            )
        self.phase_callback_handler.on_train_batch_gradient_step_end(context)

    def _inputs(
        self, batch: Any, training: bool, epoch: int | None
    ) -> tuple[torch.Tensor, Any, dict[str, Any]]:
        if isinstance(batch, TensorBatch):
            if self.prepare is None:
                raise InputError(
                    "batches of uint8 images need PortraitTrainer(prepare=…), such as training.run.Prepare"
                )
            inputs, targets = self.prepare(batch, training=training, epoch=epoch)
            extra: dict[str, Any] = {}
        else:
            inputs, targets = batch[0], batch[1]
            extra = batch[2] if len(batch) > 2 else {}
        if self.options.channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, targets, extra

    # Between two steps ----------------------------------------------------------------------------------------------

    def _between_steps(
        self, context: PhaseContext, batch_idx: int, position: dict[str, Any]
    ) -> None:
        """Save or stop where all ranks agree, always at an optimiser step."""
        if batch_idx != self._accumulation_bounds(batch_idx)[1]:
            return
        options = self.options
        overdue = (
            options.save_every_seconds
            and time.monotonic() - self._last_save > options.save_every_seconds
        )
        agreed = self.agreement.exchange(STOP if self.signals.received else SAVE if overdue else 0)
        step = batch_idx + 1 + self.steps_per_epoch * context.epoch
        if agreed == STOP:
            self._save_within_epoch(context, position)
            self._stop(
                context,
                f"epoch {context.epoch + 1}, step {batch_idx + 1} of {self.steps_per_epoch}",
            )
        elif agreed == SAVE or (options.save_every_steps and step % options.save_every_steps == 0):
            self._save_within_epoch(context, position)

    def _finish_training_part(self, context: PhaseContext, position: dict[str, Any]) -> None:
        """The last exchange may ask for a stop; then note what the checkpoint of this epoch needs of every rank."""
        if self.agreement.finish() == STOP:
            self._save_within_epoch(context, position)
            self._stop(context, f"the end of epoch {context.epoch + 1}")
        own = checkpoints.host_copy(_random_state())
        self._rank_states = distributed.gather_objects(own)
        self._last_position = position
        self._sums_of_training = checkpoints.host_copy(self._sums(context))

    def _stop(self, context: PhaseContext, where: str) -> None:
        distributed.barrier()  # nobody leaves, and makes torchrun end the others, before rank 0 has saved
        context.update_context(stop_training=True)
        name = self.signals.received or "a signal to another rank"
        batches, accumulate = self._last_position["batches"], self.batch_accumulate
        steps_per_epoch = -(-self.steps_per_epoch // accumulate)
        saved = f"saved in {self.checkpoints_dir_path}; the same command goes on from there"
        if not self._can_save(self._last_position):
            saved = "not saved within the epoch, which needs a loader with state_dict (portrait_dist.data.build_loader)"
        raise Stopped(
            f"stopped by {name} at {where}, {saved}",
            epoch=context.epoch,
            batch=context.epoch * self.steps_per_epoch + batches,
            step=context.epoch * steps_per_epoch + -(-batches // accumulate),
            samples_seen=self.samples_seen,
        )

    def _show_progress(
        self, context: PhaseContext, batch_idx: int, batches: DeviceBatches, progress: EpochProgress
    ) -> None:
        self.images_per_second, self.data_wait_share = batches.rate, batches.wait_share
        if distributed.rank() != 0:
            return
        means = context.loss_avg_meter.average
        losses = dict(zip(self.loss_logging_items_names, means, strict=False))
        if (batch_idx + 1) % self.options.log_every_steps == 0 or not progress.on_terminal:
            for callback in self.phase_callbacks:
                if hasattr(callback, "on_interval"):
                    callback.on_interval(self, context, batch_idx, losses)
        progress.show(self.values_so_far(means, self.train_metrics), self.images_per_second)

    def _reduce(self, meter: LossMeter, metrics: Any) -> dict[str, float]:
        """Mean losses and metrics over the samples of all ranks."""
        if self.loss_logging_items_names is None:  # this rank saw no batch yet
            self.name_losses()
        losses = meter.average_over_ranks(
            len(self.loss_logging_items_names or ()), self.torch_device
        )
        return self.named_values(losses + self.metric_values(metrics), metrics)

    # Evaluation -----------------------------------------------------------------------------------------------------

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
        """Every sample of ``loader`` once, without a collective inside the loop; sums are reduced at the end.

        The ranks may have different numbers of batches, or none.
        """
        context.update_context(loss_avg_meter=LossMeter())
        net = unwrap_model(self.net)
        self._broadcast_buffers(net)
        net.eval()
        handler = self.phase_callback_handler
        before, after = (
            (handler.on_validation_batch_start, handler.on_validation_batch_end)
            if validating
            else (handler.on_test_batch_start, handler.on_test_batch_end)
        )
        limit = len(loader) if max_batches is None else min(max_batches, len(loader))
        batches = DeviceBatches(loader, self.torch_device, limit=limit)
        stopped = False
        with (
            EpochProgress(title, limit, visible=show) as progress,
            contextlib.closing(batches),
            torch.no_grad(),
        ):
            for batch_idx, batch in enumerate(batches):
                inputs, targets, extra = self._inputs(batch, training=False, epoch=None)
                context.update_context(
                    batch_idx=batch_idx,
                    inputs=inputs,
                    target=targets,
                    additional_batch_items=extra,
                    **extra,
                )
                before(context)
                outputs, probabilities = self._forward(net, inputs)
                context.update_context(preds=probabilities, batch=batch)
                if self.criterion is not None:
                    context.update_context(loss_log_items=self.compute_loss(outputs, targets)[1])
                after(context)
                progress.advance()
                if progress.due:
                    progress.show({}, batches.rate)
                if validating and (stopped := self.notice.raised(bool(self.signals.received))):
                    break
        if validating:
            self._stop_in_validation(stopped, context)
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
        if flag.item() > 0:
            self._save_within_epoch(context, self._last_position)
            self._stop(context, f"validation of epoch {context.epoch + 1}")

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Load a checkpoint into the model, and take over how far its run was.

        Raises:
            InputError: there is no such checkpoint, or it is of another model.
        """
        params = self.training_params
        state = checkpoints.read(checkpoint)
        try:
            self.load_weights(state)
        except RuntimeError as error:
            raise InputError(
                f"{checkpoint}: holds another model ({' '.join(str(error).split())[:160]}); choose another run.name"
            ) from error
        about = state.get("portrait_dist", {})
        self.samples_seen = int(about.get("samples_seen", 0))
        self._best_ckpt_metrics = state.get("_best_ckpt_metrics")
        self.best_metric = float(about.get("best_metric", state.get("acc", 0.0)))
        best = Path(self.checkpoints_dir_path) / params.ckpt_best_name
        if best.is_file():
            better = max if params.greater_metric_to_watch_is_better else min
            self.best_metric = better(self.best_metric, float(checkpoints.read(best)["acc"]))
        return state

    def save_epoch(
        self,
        epoch: int,
        train_values: dict[str, float],
        valid_values: dict[str, float],
        context: PhaseContext,
    ) -> None:
        """Best (when better), then latest, then the average of the best; on rank 0, after validation."""
        value = float(valid_values[self.metric_to_watch])
        sign = 1.0 if self.greater_metric_to_watch_is_better else -1.0
        better = np.isfinite(value) and (sign * value > sign * self.best_metric)
        metrics = {
            "tracked_metric_name": self.metric_to_watch,
            "valid": dict(valid_values),
            "train": dict(train_values),
        }
        if better:
            self.best_metric, self._best_ckpt_metrics = value, metrics
        state = self._state(epoch, value, metrics)
        if better:
            self.sg_logger.add_checkpoint(
                tag=self.ckpt_best_name, state_dict=state, global_step=epoch
            )
            self.phase_callback_handler.on_validation_end_best_epoch(context)
        self.sg_logger.add_checkpoint(tag=LATEST, state_dict=state, global_step=epoch)
        if epoch in self.training_params.save_ckpt_epoch_list:
            self.sg_logger.add_checkpoint(
                tag=f"ckpt_epoch_{epoch}.pth", state_dict=state, global_step=epoch
            )
        if self.training_params.average_best_models:
            net = unwrap_model(self.ema_model.ema if self.ema else self._training_net)
            mean = self.model_weight_averaging.get_average_model(net, valid_values)
            rest = {
                name: state[name]
                for name in ("acc", "epoch", "metrics", "packages", "portrait_dist")
            } | self.processing_params()
            self.sg_logger.add_checkpoint(
                tag=self.average_model_checkpoint_filename,
                state_dict={"net": mean, **rest},
                global_step=epoch,
            )
        self._last_save = time.monotonic()

    def make_average(self) -> AverageOfBest:
        """Mean of the ten best models."""
        return AverageOfBest(
            self.checkpoints_dir_path, self.metric_to_watch, self.greater_metric_to_watch_is_better
        )

    def _state(self, epoch: int, value: float, metrics: dict[str, Any]) -> dict[str, Any]:
        """SuperGradients' checkpoint dict, and under ``portrait_dist`` what exact resuming needs beyond it."""
        state = {
            "net": unwrap_model(self._training_net).state_dict(),
            "acc": value,
            "epoch": epoch,
            "metrics": metrics,
            "packages": self._versions,
            "_best_ckpt_metrics": self._best_ckpt_metrics,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.scaler.state_dict() if self.scaler is not None else {},
            "portrait_dist": {
                **self.about,
                "format": 1,
                "best_metric": float(self.best_metric),
                "samples_seen": self.samples_seen,
                "world_size": distributed.world_size(),
                "ranks": self._rank_states,
                "position": None,
            },
            **self.processing_params(),
        }
        if self.ema:
            state["ema_net"] = unwrap_model(self.ema_model.ema).state_dict()
        if self._torch_lr_scheduler is not None:
            state["torch_scheduler_state_dict"] = self._torch_lr_scheduler.state_dict()
        return state

    def _save_within_epoch(self, context: PhaseContext, position: dict[str, Any]) -> None:
        """Save ``ckpt_latest.pth`` between two steps. Every rank calls it; rank 0 writes."""
        self._last_position = position
        if not self._can_save(position):
            return
        in_training = context.metrics_compute_fn is self.train_metrics
        sums = self._sums(context) if in_training else self._sums_of_training
        self._rank_states = distributed.gather_objects(
            checkpoints.host_copy({**_random_state(), "sums": sums})
        )
        if distributed.rank() == 0:
            metrics = {"tracked_metric_name": self.metric_to_watch, "valid": {}, "train": {}}
            state = self._state(context.epoch, float(self.best_metric), metrics)
            state["portrait_dist"]["position"] = {
                "loader": position["loader"],
                "batches": position["batches"],
            }
            self.sg_logger.add_checkpoint(tag=LATEST, state_dict=state, global_step=context.epoch)
        self._last_save = time.monotonic()

    def _can_save(self, position: dict[str, Any]) -> bool:
        return bool(self.training_params.save_model and position.get("loader"))

    def _sums(self, context: PhaseContext) -> dict[str, Any]:
        """This rank's sums of the training epoch so far."""
        meter = context.loss_avg_meter
        return {
            "loss": meter.sum,
            "count": meter.count,
            "metrics": _metric_states(self.train_metrics),
        }

    def _restore_random_state(self, about: dict[str, Any]) -> None:
        """Each rank's random state; a rank that the saved run did not have keeps its seed."""
        ranks = about.get("ranks", [])
        if len(ranks) == distributed.world_size():
            _set_random_state(ranks[distributed.rank()])

    def _restore_sums(self, about: dict[str, Any], meter: LossMeter) -> None:
        """The sums of the interrupted epoch: each rank's own, or on another world size all of them on rank 0."""
        sums = [rank["sums"] for rank in about.get("ranks", []) if "sums" in rank]
        if len(sums) == distributed.world_size():
            sums = [sums[distributed.rank()]]
        elif distributed.rank() != 0:
            return
        for one in sums:
            if one["loss"] is not None:
                loss = one["loss"].to(self.torch_device)
                meter.sum = loss if meter.sum is None else meter.sum + loss
            meter.count += int(one["count"])
            _add_metric_states(self.train_metrics, one["metrics"])
        if meter.sum is not None and self.loss_logging_items_names is None:
            self.name_losses()

    def _restore_memory_format(self) -> None:
        """The optimiser's averages lie in memory as their parameters do; a loaded checkpoint has them in NCHW."""
        if not self.options.channels_last:
            return
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim == 4:
                    state[name] = value.contiguous(memory_format=torch.channels_last)


def _random_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators, as plain numbers and tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": {
            "version": version,
            "words": torch.tensor(words, dtype=torch.int64),
            "gauss": gauss,
        },
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        (
            numpy["name"],
            numpy["keys"].numpy().astype(np.uint32),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached"],
        )
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _metric_states(metrics: Any) -> dict[str, dict[str, Any]]:
    return {
        name: dict(metric.metric_state)
        for name, metric in metrics.items(keep_base=True, copy_state=False)
    }


def _add_metric_states(metrics: Any, saved: dict[str, dict[str, Any]]) -> None:
    for name, metric in metrics.items(keep_base=True, copy_state=False):
        for key, value in saved.get(name, {}).items():
            setattr(metric, key, getattr(metric, key) + value.to(metric.device))
        metric._update_count = max(metric._update_count, 1)
        metric._computed = None
