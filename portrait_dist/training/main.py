r"""``portrait-dist train``: from a configuration to a trained model in ``<run.root>/<run.name>/``.

    portrait-dist train data.shards=shards                       one process
    portrait-dist train --nproc 8 data.shards=shards             one node, 8 ranks
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m portrait_dist train data.shards=/shared/shards run.root=/shared/runs     several nodes

Everything that can be refused is refused before the run folder is touched: shards, plan, then (with
the folder's lock) what an existing checkpoint says.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import yaml

from portrait_dist import checkpoints, distributed, files
from portrait_dist.config import AugmentConfig, Config
from portrait_dist.data import build_loader
from portrait_dist.data.augment import Augment
from portrait_dist.data.stream.dataset import StreamKeywords
from portrait_dist.data.stream.loader import StreamLoader
from portrait_dist.data.stream.transforms import Transform
from portrait_dist.errors import InputError
from portrait_dist.preprocessing import normalise
from portrait_dist.recipes import parts
from portrait_dist.runs.folder import RunFolder, RunLock
from portrait_dist.system.address import any_address, is_address, read_locations
from portrait_dist.system.info import cores, environment_number
from portrait_dist.training import averaging, components, refusals, resume, trackers
from portrait_dist.training.device_batches import TensorBatch
from portrait_dist.training.failures import FailureReport, reporting_failures
from portrait_dist.training.health import record_collectives
from portrait_dist.training.plan import Plan, make_plan
from portrait_dist.training.preemption import StopSignals
from portrait_dist.training.results import TrainResult
from portrait_dist.training.trackers import Tracker, open_tracker

if TYPE_CHECKING:
    from portrait_dist.training.trainer import PortraitTrainer

Loaders = tuple[StreamLoader, StreamLoader]
"""Those of training and of validation."""


class Prepare:
    """Turn batches of the stream into what the network takes.

    Images become float32 [B, 3, H, W], normalised; mattes float32 [B, 1, H, W] in [0, 1].

    Args:
        augment: what training images go through; validation gets none.
        seed: seed of the augmentation.
    """

    def __init__(self, augment: AugmentConfig | Config | None = None, seed: int = 0) -> None:
        # A whole configuration is taken as before.
        chosen = augment.augment if isinstance(augment, Config) else augment
        self.augment = Augment(chosen or AugmentConfig(), seed)

    def __call__(
        self, batch: TensorBatch, training: bool, epoch: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not training:
            return normalise(batch.image, batch.alpha)
        images, mattes = self.augment(
            batch.image, batch.alpha, epoch=epoch or 0, positions=batch.source.positions
        )
        return images, mattes


def train(config: Config) -> TrainResult | None:
    """Train as configured, or resume the run if it exists.

    Returns:
        What was done, on rank 0; None on the others.

    Raises:
        InputError: shards, options or the existing run do not fit; the run folder is as before.
        DamagedDataError: a damaged shard, sample or checkpoint.
        Stopped: stopped by a signal, after saving.
    """
    report = FailureReport()
    with StopSignals() as signals:
        device = distributed.pick_device(config.train.device)
        _use_threads(config.train.threads, device)
        record_collectives(config.run_dir)
        distributed.start(device, config.train.timeout_seconds)
        with reporting_failures(report, signals):
            result = _train(config, device, signals, report)
        distributed.barrier()  # rank 0 may still be writing; a rank that leaves early would end it
        distributed.stop()
        return result


def _use_threads(threads: int, device: torch.device) -> None:
    ranks_here = environment_number("LOCAL_WORLD_SIZE", 1, minimum=1)
    torch.set_num_threads(threads or max(1, cores() // ranks_here))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def _train(
    config: Config, device: torch.device, signals: StopSignals, report: FailureReport
) -> TrainResult | None:
    # Each step that may fail on one rank alone is agreed upon before the next one begins: a rank
    # that went further would wait in a collective for one that has ended.
    distributed.on_every_rank(lambda: trackers.check(config.run.logger))
    plan, loaders = distributed.on_every_rank(lambda: make_loaders(config, device))
    distributed.on_every_rank(loaders[0].check_ranks)
    distributed.on_every_rank(lambda: refusals.check_device(config, device))
    with _RunFolderOfRank0(config):
        if distributed.world_size() > environment_number("LOCAL_WORLD_SIZE", 1, minimum=1):
            distributed.on_every_rank(lambda: distributed.check_shared_folder(config.run_dir))
        start = _decide(config, plan, loaders)
        size = loaders[0].dataset.size
        made = distributed.on_every_rank(
            lambda: components.make(config, size, plan.batch_size, new=start.info is None)
        )
        distributed.on_every_rank(
            lambda: refusals.check_network(config, made.network.module, device)
        )
        trainer = _make_trainer(config, plan, device, signals, made.network)
        if start.finished:
            distributed.on_every_rank(lambda: _complete(config))
        else:
            if start.info is not None:
                distributed.on_every_rank(lambda: _check_files(config, made))
            _begin(config, report)
            trainer.tracker = _open_tracker(config)
            _print_plan(config, plan, loaders, device, start, made.network)
            params = _training_params(config, plan, trainer, made, resuming=start.info is not None)
            if plan.batches_per_epoch < len(loaders[0]):
                params["max_train_batches"] = plan.batches_per_epoch
            if (info := start.info) is not None:
                trainer.on_restore = lambda found: resume.apply_changes(
                    found, config, info, made.network.module
                )
            trainer.train(made.network.module, params, *loaders)
            if distributed.rank() == 0:
                RunFolder(config.run_dir).append("end", world_size=distributed.world_size())
        return _result(config, trainer, plan) if distributed.rank() == 0 else None


def _complete(config: Config) -> None:
    """Finish what a run left undone that was killed after its last checkpoint."""
    if distributed.rank() == 0:
        averaging.complete(config.run_dir)
        folder = RunFolder(config.run_dir)
        events = folder.events()
        if events and events[-1].kind != "end":
            folder.append("end", world_size=distributed.world_size())


class _RunFolderOfRank0:
    """Hold the lock of the run folder on rank 0; the other ranks wait for it."""

    def __init__(self, config: Config) -> None:
        self.folder = config.run_dir
        self.lock: RunLock | None = None

    def __enter__(self) -> None:
        self.lock = distributed.on_every_rank(
            lambda: RunLock(self.folder) if distributed.rank() == 0 else None
        )

    def __exit__(self, *_: object) -> None:
        if self.lock:
            self.lock.release()


def _begin(config: Config, report: FailureReport) -> None:
    """Write ``config.yaml``; from here on the run folder is this start's."""

    def write() -> None:
        if distributed.rank() == 0:
            folder = RunFolder(config.run_dir)
            folder.events()  # a file that cannot be continued is refused before one is written
            files.write_text(folder.config, config.to_yaml())

    distributed.on_every_rank(write)
    report.folder = config.run_dir


def _open_tracker(config: Config) -> Tracker | None:
    """Open the experiment tracker on rank 0; the settings it gets hold no secret."""
    if distributed.rank() != 0:
        return None
    return open_tracker(config.run.logger, config.run_dir, yaml.safe_load(config.to_yaml()))


def _decide(config: Config, plan: Plan, loaders: Loaders) -> resume.Start:
    """Let rank 0 read the checkpoint, and tell all ranks what follows from it."""
    data = _identity(loaders)

    def decide() -> resume.Start | None:
        if distributed.rank() != 0:
            return None
        return resume.decide(config, plan, data, loaders[0].dataset.size)

    start = distributed.broadcast_object(distributed.on_every_rank(decide))
    assert start is not None
    return start


def _check_files(config: Config, made: components.Components) -> None:
    """Let rank 0 check what the run resumes from."""
    if distributed.rank() == 0:
        resume.check_files(config, made.network.module, made.params)


def _identity(loaders: Loaders) -> dict[str, resume.DataIdentity]:
    """Return the hashes of each split's shards, by split."""
    splits = {loader.dataset.split: loader.dataset.shards for loader in loaders}
    return {
        split: resume.DataIdentity(shards.identity, shards.earlier_identities, shards.grown_since)
        for split, shards in splits.items()
    }


def make_loaders(config: Config, device: torch.device) -> tuple[Plan, Loaders]:
    """Open the shards, and make the plan with the loaders of training and validation.

    Raises:
        InputError: no shards there, or they do not fill what was asked for.
        DamagedDataError: the manifest is damaged.
    """
    from portrait_dist.data.shards.sets import open_shards

    if not config.data.shards:
        raise InputError(
            "data.shards is not given: add data.shards=DIR, the folder that 'portrait-dist pack' "
            "wrote"
        )
    data, train = config.data, config.train
    options = _loader_options(config, device)
    samples = open_shards(data.shards, "train", cache=options["cache"]).epoch_samples
    plan = make_plan(config, samples, distributed.world_size())
    augmented: _LoaderOptions = {**options, "transforms": _transforms(config.augment)}
    return plan, (
        build_loader(data.shards, "train", plan.batch_size, train.seed, **augmented),
        build_loader(data.shards, "val", plan.batch_size, train.seed, **options),
    )


def _transforms(augment: AugmentConfig) -> Transform | None:
    """Build the user's own transforms.

    Raises:
        InputError: they cannot be found or built.
    """
    if not augment.transforms:
        return None
    setting = "augment.transforms"
    factory = parts.resolve(augment.transforms, setting, {})
    built: Transform = parts.build(factory, augment.args, setting, augment.transforms)
    return built


class _LoaderOptions(StreamKeywords, total=False):
    """Options of ``build_loader`` that come from the configuration."""

    workers: int
    prefetch: int
    pin_memory: bool


def _loader_options(config: Config, device: torch.device) -> _LoaderOptions:
    data, cache = config.data, None
    size, fit = data.asked_shape
    if any_address(data.shards) or data.cache_dir:  # which also keeps the indexes of foreign tars
        from portrait_dist.data.shards.cache import Cache, DownloadOptions

        cache = Cache(
            data.cache_dir or None,
            data.cache_gigabytes,
            parallel_downloads=data.parallel_downloads,
            downloads=DownloadOptions(wait_for_server_seconds=data.wait_for_server_seconds),
        )
    return {
        "workers": data.workers,
        "prefetch": data.prefetch_batches,
        "cache": cache,
        "pin_memory": device.type == "cuda",
        "size": size,
        "fit": fit,
        "on_damage": data.on_damage,
        "order": data.order,
        "block_samples": data.block_samples,
    }


def _print_plan(
    config: Config,
    plan: Plan,
    loaders: Loaders,
    device: torch.device,
    start: resume.Start,
    network: components.Network,
) -> None:
    """Print the derived numbers as one short table."""
    rows = plan.rows()
    rows["network"] = network.described
    rows |= _sets_row(loaders[0])
    rows["validation samples"] = f"{loaders[1].dataset.samples:,}"
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    rows["device, precision"] = f"{device}{gpu}, {config.train.precision}"
    rows["time"] = _expected_time(config, plan, start)
    advice = loaders[0].dataset.shards.advice(config.data.order)
    for note in (*plan.notes, *([advice] if advice else [])):
        distributed.print0(note)
    distributed.print0("\n".join(f"  {name:20s} {value}" for name, value in rows.items()))


def _sets_row(loader: StreamLoader) -> dict[str, str]:
    """Return what each of several shard sets gives to an epoch."""
    parts = getattr(loader.dataset.shards, "parts", ())
    shown = [f"{part.name} {part.epoch_samples:,} of {part.shards.samples:,}" for part in parts]
    return {"in each epoch": ", ".join(shown)} if shown else {}


def _expected_time(config: Config, plan: Plan, start: resume.Start) -> str:
    """Say how long the rest takes at the speed of the run's last attempt."""
    speed = RunFolder(config.run_dir).events().latest("images_per_second")
    if not speed or start.info is None:
        return "known after the first steps"
    left = plan.total_steps * plan.global_batch - start.info.samples_seen
    minutes = max(0, round(left / speed / 60))
    return f"about {minutes // 60} h {minutes % 60:02d} min at the last {speed:.0f} images/s"


def _make_trainer(
    config: Config,
    plan: Plan,
    device: torch.device,
    signals: StopSignals,
    network: components.Network,
) -> PortraitTrainer:
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
        step_timeout_seconds=train.step_timeout_seconds,
        # A rank that waits for a server of shards is no hang.
        least_step_timeout_seconds=config.data.wait_for_server_seconds + 60.0
        if any_address(config.data.shards)
        else 0.0,
    )
    numbers = {"config": config.to_dict(), "global_batch": plan.global_batch}
    trainer = PortraitTrainer(
        config.run_dir.name,
        str(config.run_dir.parent),
        options=options,
        signals=signals,
        prepare=Prepare(config.augment, train.seed),
        contract=network.contract,
        metadata={**numbers, **network.entries},
    )
    trainer.fixed_folder = True  # locked here, and resumed by the rules here
    return trainer


def _training_params(
    config: Config,
    plan: Plan,
    trainer: PortraitTrainer,
    made: components.Components,
    *,
    resuming: bool,
) -> dict[str, Any]:
    """Return SuperGradients' training parameters."""
    from portrait_dist.training.recorder import RunRecorder

    train = config.train
    params: dict[str, Any] = {
        "max_epochs": train.max_epochs,
        "loss": made.loss,
        "train_metrics_list": made.train_metrics,
        "valid_metrics_list": made.valid_metrics,
        "metric_to_watch": made.watched.name,
        "greater_metric_to_watch_is_better": made.watched.greater_is_better,
        "zero_weight_decay_on_bias_and_bn": not train.decay_norms,
        "batch_accumulate": plan.accumulate,
        "clip_grad_norm": train.clip_grad_norm or None,
        "mixed_precision": train.precision == "bf16",
        "torch_compile": train.compile,
        # torch's own defaults in place of SuperGradients' reduce-overhead.
        "torch_compile_options": {"mode": None, "dynamic": None},
        "sync_bn": train.sync_bn,
        "ema": train.ema,
        "ema_params": {"decay": train.ema_decay, "decay_type": "threshold"} if train.ema else {},
        "seed": train.seed,
        "resume": resuming,
        "average_best_models": train.average_best,
        "max_valid_batches": train.max_val_batches or None,
        "run_validation_freq": train.validate_every,
        "phase_callbacks": [RunRecorder(trainer, train.pictures, _location(config.data.shards))],
        "kill_ddp_pgroup_on_end": False,
        "log_installed_packages": False,
    }
    return {**params, **_warmup(plan), **made.params}


def _warmup(plan: Plan) -> dict[str, float | str | None]:
    """Return the parameters of the learning rate and its way to the schedule."""
    return {
        "initial_lr": plan.lr,
        "lr_warmup_steps": plan.warmup_steps,
        # Without warm-up the one by epochs, which does nothing.
        "warmup_mode": "LinearBatchLRWarmup" if plan.warmup_steps else "LinearEpochLRWarmup",
        "warmup_initial_lr": plan.lr / (plan.warmup_steps + 1) if plan.warmup_steps else None,
        "lr_warmup_epochs": 0,
    }


def _location(shards: str) -> str:
    """Return where the shards are, without secrets, wherever the run is looked at."""
    everywhere = [
        one if is_address(one.location) else replace(one, location=os.path.abspath(one.location))
        for one in read_locations(shards)
    ]
    return ",".join(one.shown for one in everywhere)


def _result(config: Config, trainer: PortraitTrainer, plan: Plan) -> TrainResult:
    folder = RunFolder(config.run_dir)
    latest = checkpoints.read_info(folder.latest)
    epochs = latest.epoch or 0
    return TrainResult(
        epochs=epochs,
        steps=epochs * plan.steps_per_epoch,
        samples_seen=latest.samples_seen,
        best_iou=latest.best_metric if config.metrics.watch == "SoftIoU" else None,
        watched=config.metrics.watch,
        best=latest.best_metric,
        checkpoint=str(folder.checkpoint),
        run_dir=str(folder.path),
        images_per_second=round(trainer.images_per_second, 2),
        world_size=plan.world_size,
        global_batch=plan.global_batch,
        batches_per_epoch=plan.batches_per_epoch,
        steps_per_epoch=plan.steps_per_epoch,
    )
