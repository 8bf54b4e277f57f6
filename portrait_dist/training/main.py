"""``portrait-dist train``: from a configuration to a trained model in ``<run.root>/<run.name>/``.

    portrait-dist train data.shards=shards                                                        one process
    torchrun --nproc-per-node 8 -m portrait_dist train data.shards=shards                         one node
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m portrait_dist train data.shards=/shared/shards run.root=/shared/runs                   several nodes
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from portrait_dist import checkpoints, distributed
from portrait_dist.config import Config
from portrait_dist.data import build_loader
from portrait_dist.data.augment import Augment
from portrait_dist.errors import InputError, PortraitDistError, Stopped
from portrait_dist.preprocessing import normalise
from portrait_dist.runs.folder import BEST, LATEST, RunFolder, RunLock
from portrait_dist.training import averaging
from portrait_dist.training.device_batches import TensorBatch
from portrait_dist.training.preemption import StopSignals


@dataclass
class Plan:
    """What follows from a configuration, the shards and the number of ranks."""

    world_size: int
    global_batch: int
    steps_per_epoch: int
    train_samples: int
    val_samples: int
    left_out: int
    lr: float
    warmup_steps: int
    device: str
    precision: str

    def table(self) -> str:
        """One short table for people."""
        rows = {
            "world size": f"{self.world_size}",
            "global batch": f"{self.global_batch} samples",
            "steps per epoch": f"{self.steps_per_epoch}",
            "training samples": f"{self.train_samples} ({self.left_out} left out each epoch, others every time)",
            "validation samples": f"{self.val_samples}",
            "learning rate": f"{self.lr:g} after scaling, {self.warmup_steps} warm-up steps",
            "device, precision": f"{self.device}, {self.precision}",
        }
        return "\n".join(f"  {name:20s} {value}" for name, value in rows.items())


class Prepare:
    """Batches of the stream → (images [B, 3, H, W] float32 normalised, mattes [B, 1, H, W] float32 in [0, 1]).

    Args:
        config: augmentation in training; validation gets none.
        seed: seed of the augmentation.
    """

    def __init__(self, config: Config, seed: int) -> None:
        self.augment = Augment(config.augment, seed)

    def __call__(
        self, batch: TensorBatch, training: bool, epoch: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not training:
            return normalise(batch.image, batch.alpha)
        images, mattes = self.augment(
            batch.image, batch.alpha, epoch=epoch or 0, positions=batch.source.positions
        )
        return images, mattes


def _let_another_rank_leave_first(signals: StopSignals, seconds: float = 10.0) -> None:
    """torchrun ends all ranks when the first one leaves, and reports that one: let it be the one that has the reason."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not signals.received:
        time.sleep(0.1)


def train(config: Config) -> dict[str, Any] | None:
    """Train as configured, or go on with the run if it exists.

    Returns:
        ``epochs, steps, samples_seen, best_iou, checkpoint, run_dir, images_per_second, world_size`` on rank 0, else None.

    Raises:
        InputError: shards, options or the existing run do not fit.
        DamagedDataError: a damaged shard or sample.
        Stopped: stopped by a signal, after saving.
    """
    with StopSignals() as signals:
        device = distributed.pick_device(config.train.device)
        _use_threads(config.train.threads, device)
        distributed.start(device, config.train.timeout_seconds)
        try:
            result = _train(config, device, signals)
        except Stopped as stopped:
            _leave_trace(config, "stop", str(stopped), **stopped.position)
            stopped.quiet = distributed.rank() != 0
            distributed.stop()
            raise
        except Exception as error:
            if isinstance(error, PortraitDistError) and error.agreed:
                if distributed.rank() == 0:
                    _leave_trace(
                        config,
                        "error",
                        str(error),
                        exit_code=error.exit_code,
                        requeue=error.requeue,
                    )
                raise
            first = distributed.first_to_fail()
            if first != distributed.rank():
                _let_another_rank_leave_first(signals)
                raise PortraitDistError(
                    f"rank {distributed.rank()} ended because rank {first} failed"
                ) from None
            _leave_trace(config, "error", f"rank {first}: {type(error).__name__}: {error}")
            raise
        distributed.barrier()  # rank 0 may still be writing; a rank that leaves early would end it
        distributed.stop()
        return result


def _use_threads(threads: int, device: torch.device) -> None:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // ranks_here))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def _leave_trace(config: Config, kind: str, message: str, **place: int) -> None:
    """The reason of an end, where `status` and the next run look for it."""
    if config.run_dir.is_dir() and (kind == "error" or distributed.rank() == 0):
        try:
            line = {
                "message": " ".join(message.split()),
                "world_size": distributed.world_size(),
                **place,
            }
            RunFolder(config.run_dir).append(kind, **line)
        except PortraitDistError as error:
            distributed.print0(str(error))


def _train(config: Config, device: torch.device, signals: StopSignals) -> dict[str, Any] | None:
    lock = distributed.on_every_rank(lambda: _claim_run_folder(config))
    if distributed.world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        distributed.on_every_rank(lambda: distributed.check_shared_folder(config.run_dir))
    loaders = distributed.on_every_rank(lambda: _loaders(config, device))
    distributed.on_every_rank(loaders[0].check_ranks)
    plan = distributed.on_every_rank(lambda: _plan(config, *loaders, device))
    distributed.print0(plan.table())
    trainer = _make_trainer(config, loaders[0], device, signals)
    resume = distributed.on_every_rank(lambda: _resume(config, plan))
    if resume == "finished":
        distributed.on_every_rank(lambda: _complete(config))
    else:
        model = distributed.on_every_rank(lambda: _make_model(config, new=resume == "start"))
        trainer.train(model, _training_params(config, plan, trainer, resume == "go on"), *loaders)
        if distributed.rank() == 0:
            RunFolder(config.run_dir).append("end", world_size=distributed.world_size())
    result = _result(config, trainer, plan) if distributed.rank() == 0 else None
    if lock:
        lock.release()
    return result


def _complete(config: Config) -> None:
    """Finish what a run left undone that was killed after its last checkpoint."""
    if distributed.rank() == 0:
        averaging.complete(config.run_dir)
        folder = RunFolder(config.run_dir)
        events = folder.events()
        if events and events[-1].kind != "end":
            folder.append("end", world_size=distributed.world_size())


def _claim_run_folder(config: Config) -> RunLock | None:
    """Rank 0 takes the run folder for itself, and writes ``config.yaml``."""
    if distributed.rank() != 0:
        return None
    folder = config.run_dir
    latest = folder / LATEST
    if not config.run.resume and latest.exists():
        raise InputError(
            f"{folder}: the run exists and run.resume=false; choose another run.name, or resume it with run.resume=true"
        )
    try:
        lock = RunLock(folder)
        temporary = folder / ".config.yaml.tmp"
        temporary.write_text(config.to_yaml())
        os.replace(temporary, folder / "config.yaml")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write the run folder ({error.strerror}); choose another run.root"
        ) from error
    return lock


def _loaders(config: Config, device: torch.device) -> tuple[Any, Any]:
    if not config.data.shards:
        raise InputError(
            "data.shards is not given: add data.shards=DIR, the folder that 'portrait-dist pack' wrote"
        )
    data, train = config.data, config.train
    cache = None
    if "://" in data.shards:
        from portrait_dist.data.shards.cache import Cache

        cache = Cache(data.cache_dir or None, data.cache_gigabytes)
    common: dict[str, Any] = {
        "seed": train.seed,
        "workers": data.workers,
        "prefetch": data.prefetch_batches,
        "cache": cache,
        "pin_memory": device.type == "cuda",
    }
    common |= {
        "on_damage": data.on_damage,
        "order": data.order,
        "block_samples": data.block_samples,
    }
    size = (data.size, data.size) if data.size else None
    return (
        build_loader(data.shards, "train", train.batch_size, size=size, **common),
        build_loader(data.shards, "val", train.batch_size, size=size, **common),
    )


def _plan(config: Config, train_loader: Any, val_loader: Any, device: torch.device) -> Plan:
    train = config.train
    world = distributed.world_size()
    batches = min(len(train_loader), train.max_batches or len(train_loader))
    samples = train_loader.dataset.samples
    if batches == 0:
        raise InputError(
            f"{config.data.shards}: {samples} training samples do not fill one global batch of {train.batch_size * world} "
            f"({world} ranks × train.batch_size={train.batch_size}); lower train.batch_size"
        )
    if train.sync_bn and device.type == "cpu":
        raise InputError(
            "train.sync_bn=true: torch has SyncBatchNorm for GPUs only; on CPUs use model.norm=group"
        )
    global_batch = train.batch_size * world * train.accumulate
    lr = train.lr * global_batch / train.lr_base_batch if train.lr_base_batch else train.lr
    return Plan(
        world_size=world,
        global_batch=global_batch,
        steps_per_epoch=-(-batches // train.accumulate),
        train_samples=samples,
        val_samples=val_loader.dataset.samples,
        left_out=samples - batches * train.batch_size * world,
        lr=lr,
        warmup_steps=min(train.warmup_steps, batches),
        device=f"{device}"
        if device.type == "cpu"
        else f"{device} ({torch.cuda.get_device_name(device)})",
        precision=train.precision,
    )


def _resume(config: Config, plan: Plan) -> str:
    """``start``, ``go on`` or ``finished``."""
    latest = config.run_dir / LATEST
    if not latest.exists():
        return "start"
    info = checkpoints.read_info(latest)
    if (info.epoch or 0) >= config.train.max_epochs:
        distributed.print0(
            f"{config.run_dir}: finished already ({info.epoch} epochs); raise train.max_epochs to train on"
        )
        return "finished"
    before = info.global_batch or plan.global_batch
    if info.batches is not None and before != plan.global_batch:
        raise InputError(
            f"{latest}: stopped in the middle of an epoch with a global batch of {before}, now it is {plan.global_batch}; "
            f"set train.batch_size so that ranks × batch_size × accumulate is {before}"
        )
    where = "in the middle of" if info.batches is not None else "at the start of"
    distributed.print0(f"{config.run_dir}: resuming {where} epoch {(info.epoch or 0) + 1}")
    return "go on"


def _make_model(config: Config, new: bool) -> torch.nn.Module:
    from portrait_dist.models import UNet

    torch.manual_seed(config.train.seed)  # the same weights on every rank
    settings: dict[str, Any] = {
        "init_features": config.model.init_features,
        "norm": config.model.norm,
    }
    model = UNet(**settings)
    if config.model.weights and new:
        given, _ = checkpoints.load_model(config.model.weights)
        found = {"init_features": given.init_features, "norm": given.norm}
        if found != settings:
            words = " ".join(f"model.{name}={value}" for name, value in found.items())
            raise InputError(
                f"model.weights={config.model.weights}: a network of another form; give {words}"
            )
        model.load_state_dict(given.state_dict())
    return model


def _make_trainer(config: Config, loader: Any, device: torch.device, signals: StopSignals) -> Any:
    from portrait_dist.training.sg_adapter import use_device
    from portrait_dist.training.trainer import LoopOptions, PortraitTrainer

    use_device(device)
    train = config.train
    options = LoopOptions(
        channels_last=train.channels_last,
        save_every_steps=train.save_every_steps,
        save_every_seconds=train.save_every_seconds,
        log_every_steps=train.log_every_steps,
        log_keys=config.data.log_keys,
        timeout_seconds=train.timeout_seconds,
    )
    metadata = {
        "config": dataclasses.asdict(config),
        "global_batch": train.batch_size * distributed.world_size() * train.accumulate,
    }
    trainer = PortraitTrainer(
        config.run_dir.name,
        str(config.run_dir.parent),
        options=options,
        signals=signals,
        prepare=Prepare(config, train.seed),
        metadata=metadata,
    )
    trainer.fixed_folder = True  # locked here, and resumed by the rules here
    return trainer


def _training_params(config: Config, plan: Plan, trainer: Any, resume: bool) -> dict[str, Any]:
    """SuperGradients' training parameters."""
    from portrait_dist.metrics import SoftIoU
    from portrait_dist.training.recorder import RunRecorder

    train = config.train
    params: dict[str, Any] = {
        "max_epochs": train.max_epochs,
        "initial_lr": plan.lr,
        "lr_mode": "CosineLRScheduler",
        "cosine_final_lr_ratio": train.lr_final_ratio,
        "lr_warmup_steps": plan.warmup_steps,
        "warmup_mode": "LinearBatchLRWarmup"
        if plan.warmup_steps
        else "LinearEpochLRWarmup",  # the latter does nothing
        "warmup_initial_lr": plan.lr / (plan.warmup_steps + 1) if plan.warmup_steps else None,
        "lr_warmup_epochs": 0,
        "loss": _make_loss(config),
        "train_metrics_list": [SoftIoU()],
        "valid_metrics_list": [SoftIoU()],
        "metric_to_watch": "SoftIoU",
        "greater_metric_to_watch_is_better": True,
        "zero_weight_decay_on_bias_and_bn": not train.decay_norms,
        "batch_accumulate": train.accumulate,
        "clip_grad_norm": train.clip_grad_norm or None,
        "mixed_precision": train.precision == "bf16",
        "torch_compile": train.compile,
        # torch's own defaults in place of SuperGradients' reduce-overhead.
        "torch_compile_options": {"mode": None, "dynamic": None},
        "sync_bn": train.sync_bn,
        "ema": train.ema,
        "ema_params": {"decay": train.ema_decay, "decay_type": "threshold"} if train.ema else {},
        "seed": train.seed,
        "resume": resume,
        "average_best_models": train.average_best,
        "max_train_batches": train.max_batches or None,
        "max_valid_batches": train.max_val_batches or None,
        "phase_callbacks": [RunRecorder(trainer, train.pictures)],
        "kill_ddp_pgroup_on_end": False,
        "log_installed_packages": False,
    }
    return params | _optimizer(config)


def _optimizer(config: Config) -> dict[str, Any]:
    train = config.train
    kinds: dict[str, Any] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
    }
    extra: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if train.optimizer == "sgd" else {}
    return {
        "optimizer": kinds[train.optimizer],
        "optimizer_params": {"weight_decay": train.weight_decay, "fused": True, **extra},
    }


def _make_loss(config: Config) -> torch.nn.Module:
    from portrait_dist.losses import CustomSegLoss, SoftIoULoss

    loss = config.loss
    if loss.kind == "tutorial":
        return CustomSegLoss(loss.bce_weight, loss.iou_weight, from_logits=True)
    return SoftIoULoss(loss.bce_weight, loss.iou_weight)


def _result(config: Config, trainer: Any, plan: Plan) -> dict[str, Any]:
    folder = config.run_dir
    latest = checkpoints.read_info(folder / LATEST)
    best = folder / BEST
    return {
        "epochs": latest.epoch,
        "steps": (latest.epoch or 0) * plan.steps_per_epoch,
        "samples_seen": latest.samples_seen,
        "best_iou": latest.best_metric,
        "checkpoint": str(best if best.exists() else Path(folder / LATEST)),
        "run_dir": str(folder),
        "images_per_second": round(trainer.images_per_second, 2),
        "world_size": plan.world_size,
    }
