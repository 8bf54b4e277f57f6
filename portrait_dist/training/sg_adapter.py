"""The one module that knows SuperGradients' internals (3.7.1, the last release).

It does three things:

1. imports SuperGradients without the packages that its training never runs
   (:mod:`portrait_dist.training.lean_import`) and without its side effects (a log in the home
   folder, an exception hook, muted ranks, arguments taken from the command line, false warnings
   about packages);
2. repairs what does not run on today's torchmetrics and torch, or is wrong under torchrun;
3. gives :class:`AdaptedTrainer`, SuperGradients' ``Trainer`` whose private steps call public
methods that a subclass fills:
   ``wrap_model``, ``restore``, ``run_training_epoch``, ``run_evaluation``, ``save_epoch``,
   ``make_average``.

Import it, or anything of :mod:`portrait_dist.training`, before ``super_gradients``: alone,
SuperGradients fails where packages that it does not need for training are missing. Imported
afterwards it adapts a SuperGradients that is loaded already.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import logging
import os
import pickle
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from portrait_dist import checkpoints, distributed
from portrait_dist.data.stream.loader import StreamLoader
from portrait_dist.errors import InputError
from portrait_dist.runs.folder import RunFolder
from portrait_dist.training import console, sg_losses, sg_parameters
from portrait_dist.training.lean_import import lean_import
from portrait_dist.training.plan import steps_of
from portrait_dist.training.schedules import in_steps
from portrait_dist.training.sg_metrics import AccuracyMetric, ConfusionMatrixMetric
from portrait_dist.training.trackers import Tracker

# Imported by SuperGradients at module level; used only by export, plotting, S3 upload, its own
# loggers of other services and other tasks' datasets. Without them importing it takes 12 s of CPU,
# with them 22 s. (It looks itself whether albumentations and deci_platform_client are there.)
UNUSED_PACKAGES = (
    "boto3",
    "botocore",
    "clearml",
    "dagshub",
    "data_gradients",
    "imagesize",
    "matplotlib",
    "mlflow",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "pandas",
    "pycocotools",
    "requests",
    "scipy",
    "wandb",
)

OLD_WEIGHTS = "https://sghub.deci.ai/models/"
"""Address of the pretrained weights in SuperGradients 3.7.1; nobody answers there any more."""
NEW_WEIGHTS = "https://sg-hub-nv.s3.amazonaws.com/models/"
"""Where they went (SuperGradients' issues 2057 and 2064)."""
WEIGHTS_VARIABLE = "PORTRAIT_DIST_SG_WEIGHTS"
"""Environment variable with the address of a mirror of yours."""


class _RunFolderLog:
    """In place of ``AutoLoggerConfig``: messages go to stderr on rank 0 and into the run folder."""

    filename: str | None = None

    @classmethod
    def get_instance(cls) -> type[_RunFolderLog]:
        logger = logging.getLogger("super_gradients")
        if not logger.handlers:
            logger.setLevel(logging.INFO if distributed.rank() == 0 else logging.ERROR)
            logger.propagate = False
            # On the logger for its own lines; the handlers below filter those of its children.
            logger.addFilter(_is_true_here)
            logger.addHandler(_with_format(logging.StreamHandler()))
        return cls

    @classmethod
    def get_log_file_path(cls) -> str | None:
        return cls.filename

    @classmethod
    def setup_logging(
        cls,
        filename: str,
        copy_already_logged_messages: bool,
        filemode: str = "a",
        log_level: object = None,
    ) -> None:
        cls.filename = filename
        logger = logging.getLogger("super_gradients")
        for handler in [one for one in logger.handlers if isinstance(one, logging.FileHandler)]:
            logger.removeHandler(handler)
            handler.close()
        logger.addHandler(
            _with_format(logging.FileHandler(filename, mode=filemode, encoding="utf-8"))
        )


def _with_format(handler: logging.Handler) -> logging.Handler:
    handler.addFilter(_is_true_here)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s - %(message)s", datefmt="[%Y-%m-%d %H:%M:%S]")
    )
    return handler


_FALSE_MESSAGES = (
    # It knows samplers only, and warns of a loader that splits the samples itself.
    "sampler you are using might not support DDP",
    "[CLEANUP] - Successfully",
)
_MESSAGES_SAID_BETTER = (
    "Started training for",  # counts epochs from 0
    "Using EMA with params",
)
_own_console = False
"""Whether a trainer of ours trains, and its lines stand for SuperGradients'."""


def _is_true_here(record: logging.LogRecord) -> bool:
    """Drop messages that are false, and those that the trainer's own lines replace."""
    text = record.getMessage()
    dropped = _FALSE_MESSAGES + (_MESSAGES_SAID_BETTER if _own_console else ())
    return not any(part in text for part in dropped)


class _NoConsoleSink:
    """In place of ``ConsoleSink``, which wraps stdout and stderr and writes to the home folder."""

    @staticmethod
    def set_location(filename: str) -> None: ...

    @staticmethod
    def flush() -> None: ...

    @staticmethod
    def get_filename() -> str:
        return ""


def _nothing(*_: Any, **__: Any) -> None: ...


# Modules of SuperGradients that only have side effects, and what stands in for each.
_REPLACED: dict[str, dict[str, Any]] = {
    "super_gradients.common.auto_logging.auto_logger": {"AutoLoggerConfig": _RunFolderLog},
    "super_gradients.common.auto_logging.console_logging": {"ConsoleSink": _NoConsoleSink},
    "super_gradients.common.abstractions.mute_processes": {
        "mute_subprocesses": _nothing,
        "mute_current_process": _nothing,
    },
    "super_gradients.common.crash_handler": {"setup_crash_handler": _nothing},
    "super_gradients.sanity_check": {"env_sanity_check": _nothing},
}


def import_super_gradients() -> types.ModuleType:
    """Import SuperGradients as described above; later calls return the same module.

    Raises:
        InputError: it is not installed.
    """
    # Looked for, not tried: a failed import would leave half of it in sys.modules.
    if importlib.util.find_spec("super_gradients") is None:
        raise InputError(
            "SuperGradients is not installed: pip install --no-deps super-gradients==3.7.1 "
            "(its own pins cannot be fulfilled any more; what it needs is here already)"
        )
    importlib.import_module("torchmetrics")  # with the real scipy, transformers … where they are
    return lean_import("super_gradients", UNUSED_PACKAGES, _REPLACED)


import_super_gradients()

from super_gradients.common.environment import monitoring as _monitoring  # noqa: E402
from super_gradients.common.environment.checkpoints_dir_utils import (  # noqa: E402
    generate_run_id,
    get_latest_run_id,
    is_run_dir,
)
from super_gradients.common.environment.device_utils import device_config  # noqa: E402
from super_gradients.common.registry.registry import LOSSES as _LOSSES  # noqa: E402
from super_gradients.common.sg_loggers import base_sg_logger as _base_sg_logger  # noqa: E402
from super_gradients.common.sg_loggers import clearml_sg_logger as _clearml_sg_logger  # noqa: E402
from super_gradients.common.sg_loggers import dagshub_sg_logger as _dagshub_sg_logger  # noqa: E402
from super_gradients.common.sg_loggers import wandb_sg_logger as _wandb_sg_logger  # noqa: E402
from super_gradients.common.sg_loggers.base_sg_logger import BaseSGLogger  # noqa: E402
from super_gradients.training import Trainer  # noqa: E402
from super_gradients.training.kd_trainer import KDTrainer  # noqa: E402
from super_gradients.training.kd_trainer import kd_trainer as _kd_trainer  # noqa: E402
from super_gradients.training.losses import bce_loss as _bce_loss  # noqa: E402
from super_gradients.training.losses import dice_loss as _dice_loss  # noqa: E402
from super_gradients.training.losses import iou_loss as _iou_loss  # noqa: E402
from super_gradients.training.losses import structure_loss as _structure_loss  # noqa: E402
from super_gradients.training.losses.bce_dice_loss import BCEDiceLoss as _BCEDiceLoss  # noqa: E402
from super_gradients.training.metrics import (  # noqa: E402
    classification_metrics as _classification_metrics,
)
from super_gradients.training.metrics import (  # noqa: E402
    segmentation_metrics as _segmentation_metrics,
)
from super_gradients.training.metrics.metric_utils import (  # noqa: E402
    get_metrics_results_tuple,
    get_train_loop_description_dict,
)
from super_gradients.training.params import (  # noqa: E402
    DEFAULT_TRAINING_PARAMS as _DEFAULT_PARAMETERS,
)
from super_gradients.training.sg_trainer import sg_trainer as _sg_trainer  # noqa: E402
from super_gradients.training.utils import checkpoint_utils as _checkpoint_utils  # noqa: E402
from super_gradients.training.utils import sg_trainer_utils  # noqa: E402
from super_gradients.training.utils.callbacks import (  # noqa: E402
    Callback,
    LinearBatchLRWarmup,
    LRCallbackBase,
    PhaseContext,
)
from super_gradients.training.utils.checkpoint_utils import (  # noqa: E402
    StrictLoad,
    adaptive_load_state_dict,
)
from super_gradients.training.utils.early_stopping import EarlyStop  # noqa: E402
from super_gradients.training.utils.ema import KDModelEMA, ModelEMA  # noqa: E402
from super_gradients.training.utils.optimizer_utils import build_optimizer  # noqa: E402
from super_gradients.training.utils.utils import AverageMeter, unwrap_model  # noqa: E402
from tensorboard.summary.writer import event_file_writer as _event_file_writer  # noqa: E402
from torchmetrics import MetricCollection  # noqa: E402

from super_gradients.common import MultiGPUMode  # noqa: E402  isort:skip

__all__ = [
    "AdaptedTrainer",
    "AverageMeter",
    "BaseSGLogger",
    "Callback",
    "KDTrainer",
    "ModelEMA",
    "PhaseContext",
    "Trainer",
    "device_config",
    "import_super_gradients",
    "make_optimizer",
    "unwrap_model",
    "use_device",
]


# Repairs ------------------------------------------------------------------------------------------

# torchmetrics >= 0.11 wants a task for these, also in the two that ``Trainer.__init__`` makes.
for _metric in (_segmentation_metrics.IoU, _segmentation_metrics.Dice):
    _metric.__bases__ = (ConfusionMatrixMetric,)
_classification_metrics.Accuracy.__bases__ = (AccuracyMetric,)
_compute_dice = _segmentation_metrics.Dice.compute


def _compute_dice_from_a_copy(self: Any) -> torch.Tensor:
    """Compute Dice. SuperGradients' function clears the ignored class in the counts it is given."""
    self.check_classes()
    # The original is put back: a resumed epoch adds to these counts.
    counts, self.confmat = self.confmat, self.confmat.clone()
    try:
        return _compute_dice(self)
    finally:
        self.confmat = counts


_segmentation_metrics.Dice.compute = _compute_dice_from_a_copy
# Of its losses of masks, only BCE-Dice had a name for ``training_params["loss"]``.
_structure_loss.AbstarctSegmentationStructureLoss.forward = sg_losses.structure_loss
_bce_loss.BCE.forward = sg_losses.binary_cross_entropy
_BCEDiceLoss.forward = sg_losses.bce_dice_loss
for _loss in (
    _bce_loss.BCE,
    _dice_loss.BinaryDiceLoss,
    _dice_loss.DiceLoss,
    _dice_loss.GeneralizedDiceLoss,
    _iou_loss.BinaryIoULoss,
    _iou_loss.GeneralizedIoULoss,
    _iou_loss.IoULoss,
):
    _LOSSES.setdefault(_loss.__name__, _loss)
# SuperGradients seeds with the local rank: two nodes would draw the same numbers.
_sg_trainer.random_seed = lambda is_ddp, device, seed: distributed.seed_everything(seed)
# It wraps sys.excepthook at each train(): every error would be printed twice.
_sg_trainer.sg_trainer_utils.log_uncaught_exceptions = _nothing


_fetch = _checkpoint_utils.load_state_dict_from_url


def _fetch_from_where_they_went(url: str, *args: Any, **kwargs: Any) -> Any:
    """Fetch pretrained weights from their new address, without executing anything in the file."""
    base = os.environ.get(WEIGHTS_VARIABLE) or NEW_WEIGHTS
    if url.startswith(OLD_WEIGHTS):
        url = f"{base.rstrip('/')}/{url.removeprefix(OLD_WEIGHTS)}"
    try:
        return _fetch(url, *args, **{**kwargs, "weights_only": True})
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{url}: holds more than weights, or is damaged; nothing was run"
        ) from error
    except OSError as error:
        raise InputError(
            f"{url}: SuperGradients' pretrained weights cannot be fetched ({error}); set "
            f"{WEIGHTS_VARIABLE} to the address of a mirror, or give model.weights=FILE"
        ) from error


_checkpoint_utils.load_state_dict_from_url = _fetch_from_where_they_went
# The other ranks would wait for ever where the first one fails; torch renames a whole file, so each
# may fetch for itself.
_checkpoint_utils.wait_for_the_master = lambda local_rank: contextlib.nullcontext()


class _JoinedSystemMonitor(_monitoring.SystemMonitor):
    """SuperGradients' monitor whose thread has ended when it is closed.

    Its own may write to a file that is closed already.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._started, self._closing = threading.Event(), threading.Event()
        super().__init__(*args, **kwargs)
        # The thread names itself when it runs, and close() has to find it.
        self._started.wait()
        for statistic in self.stat_aggregators:
            # TensorBoard sorts by name: 'system' behind 'loss', 'System' before it.
            statistic.name = statistic.name.replace("System/", "system/")

    def _run(self) -> None:
        self._thread = threading.current_thread()
        self._started.set()
        self._init_stat_aggregators()
        while self.running:
            for _ in range(self.n_samples_per_aggregate):
                self._sample()
                if self._closing.wait(self.sample_interval):
                    break
            self._aggregate_and_write()

    def close(self) -> None:
        """Stop and wait for the thread."""
        super().close()
        self._closing.set()
        self._thread.join()


_base_sg_logger.SystemMonitor = _JoinedSystemMonitor


class _SavesAtomically:
    """``torch`` as SuperGradients' loggers see it, whose ``save`` never leaves half a file.

    Those of other services write a checkpoint straight onto the one before.
    """

    save = staticmethod(lambda state, path: checkpoints.save_atomically(path, state))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


for _module in (_base_sg_logger, _clearml_sg_logger, _dagshub_sg_logger, _wandb_sg_logger):
    vars(_module)["torch"] = _SavesAtomically()


def use_device(device: torch.device) -> None:
    """Tell SuperGradients the device and the *global* rank, on any number of nodes.

    It takes LOCAL_RANK for the rank, refuses a second node, and knows DDP on GPUs only.
    """
    device_config.device = str(device)
    ranks = distributed.is_initialized()
    # -1 is SuperGradients' word for a process without DDP.
    device_config.assigned_rank = distributed.rank() if ranks else -1
    device_config.multi_gpu = MultiGPUMode.DISTRIBUTED_DATA_PARALLEL if ranks else MultiGPUMode.OFF


@contextmanager
def _exchanged(module: object, **members: Any) -> Iterator[None]:
    """Exchange names of a module for a while."""
    before = {name: getattr(module, name) for name in members}
    vars(module).update(members)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def _console_of(trainer: AdaptedTrainer) -> Iterator[None]:
    """Show the trainer's own lines in place of tables that are wrong for several ranks."""
    global _own_console
    before, _own_console = _own_console, True
    try:
        with (
            _exchanged(_sg_trainer, log_main_training_params=_nothing),
            _exchanged(
                sg_trainer_utils,
                display_epoch_summary=lambda epoch, **_: trainer.report_epoch(epoch),
            ),
        ):
            yield
    finally:
        _own_console = before


class UnpackedBatch(NamedTuple):
    """What SuperGradients' ``unpack_batch_items`` returns of a batch.

    Args:
        inputs: of the network.
        targets: of the loss.
        extra: additional items, for callbacks.
    """

    inputs: Any
    targets: Any
    extra: dict[str, Any]


class AdaptedTrainer(Trainer):
    """SuperGradients' Trainer with its private steps turned into public methods.

    A training without ``resume`` never writes into a folder that holds a run: the first run of a
    name lies in ``<ckpt_root_dir>/<experiment_name>/``, later ones in ``RUN_<date and time>``
    folders in it, as stock SuperGradients names them. ``resume=True`` continues the latest of
    them, ``run_id="RUN_…"`` that one.

    Args:
        experiment_name: name of the run.
        ckpt_root_dir: folder of all runs; the environment's ``CKPT_ROOT_DIR``, else
            ``./checkpoints``, when not given.
        device: refused with SuperGradients' advice, as by its own Trainer.
        multi_gpu: refused likewise.
    """

    checkpoint_writer: Callable[[str, dict[str, Any]], None]
    net: Any
    train_metrics: MetricCollection
    valid_metrics: MetricCollection
    train_monitored_values: dict[str, Any]
    _epoch_start_logging_values: dict[str, float]
    model_weight_averaging: Any
    ema_class: type[ModelEMA]
    images_per_second: float
    data_wait_share: float

    fixed_folder = False
    """Whether to train into ``<ckpt_root_dir>/<experiment_name>/`` itself whatever it holds.

    The command line sets it: it holds that folder's lock and has decided whether to resume.
    """
    tracker: Tracker | None = None
    """Experiment tracker of rank 0, besides TensorBoard; ``run.logger`` of the command line."""

    def __init__(
        self,
        experiment_name: str,
        ckpt_root_dir: str | None = None,
        *,
        device: str | None = None,
        multi_gpu: object = None,
    ) -> None:
        if distributed.is_initialized() and device_config.assigned_rank != distributed.rank():
            use_device(distributed.pick_device())
        super().__init__(
            experiment_name=experiment_name,
            device=device,
            multi_gpu=multi_gpu,
            ckpt_root_dir=ckpt_root_dir or os.environ.get("CKPT_ROOT_DIR") or "checkpoints",
        )
        self._best_epoch: int | None = None
        self._best_before = 0.0
        self._epochs_began: float | None = None

    # What a subclass fills ------------------------------------------------------------------------

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and wrap it for training."""
        raise NotImplementedError

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Load the model of a checkpoint, and return the checkpoint."""
        raise NotImplementedError

    def run_training_epoch(self, context: PhaseContext, show: bool) -> dict[str, float]:
        """Train one epoch; return mean losses and metrics by name."""
        raise NotImplementedError

    def run_evaluation(
        self,
        loader: object,
        metrics: object,
        context: PhaseContext,
        *,
        show: bool,
        validating: bool,
        title: str,
        max_batches: int | None,
    ) -> dict[str, float]:
        """Pass over a loader once; return mean losses and metrics by name."""
        raise NotImplementedError

    def save_epoch(
        self,
        epoch: int,
        train_values: dict[str, float],
        valid_values: dict[str, float],
        context: PhaseContext,
    ) -> None:
        """Write the checkpoints after a validated epoch (called on rank 0)."""
        raise NotImplementedError

    def first_batch(self, batch: object) -> UnpackedBatch:
        """Split a loader's batch, before any training."""
        raise NotImplementedError

    def make_average(self) -> Any:
        """Make the object that averages the best models; its ``cleanup()`` removes their files."""
        raise NotImplementedError

    def begin_run(self) -> None:
        """Prepare for a run in ``checkpoints_dir_path``, new or resumed."""

    def finish_writing(self) -> None:
        """Wait until the files of the last epoch are written."""

    # What it does itself --------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> None:
        """Train; arguments and training parameters as of SuperGradients' ``Trainer.train``."""
        with (
            _console_of(self),
            # It looks at a first batch, for networks that check the shape of their input.
            _exchanged(sg_trainer_utils, unpack_batch_items=self.first_batch),
        ):
            super().train(*args, **kwargs)

    @classmethod
    def train_from_config(cls, cfg: object) -> tuple[nn.Module, Any]:
        """Train by a recipe of SuperGradients, with this class."""

        def trainer(**kwargs: Any) -> AdaptedTrainer:
            # KDTrainer's methods look themselves up under this name.
            vars(_kd_trainer)["KDTrainer"] = KDTrainer
            return cls(**kwargs)

        with _exchanged(_sg_trainer, Trainer=cls), _exchanged(_kd_trainer, KDTrainer=trainer):
            return super().train_from_config(cfg)

    @classmethod
    def evaluate_from_config(cls, cfg: object) -> tuple[nn.Module, Any]:
        """Evaluate by a recipe of SuperGradients, with this class."""
        with _exchanged(_sg_trainer, Trainer=cls):
            return super().evaluate_from_config(cfg)

    @property
    def field_names(self) -> dict[str, str]:
        """Name of each loss and metric → its name in the field; see :func:`console.field_names`."""
        losses = list(self.loss_logging_items_names or ())
        metrics = [*self._titles(self.train_metrics), *self._titles(self.valid_metrics)]
        return console.field_names([*losses, *metrics], losses)

    @staticmethod
    def _titles(metrics: MetricCollection | None) -> list[str]:
        return [] if metrics is None else list(_sg_trainer.get_metrics_titles(metrics))

    def in_field_names(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values under their names in the field."""
        names = self.field_names
        return {names.get(name, name): float(value) for name, value in values.items()}

    def report_epoch(self, epoch: int) -> None:
        """Print the lines of an epoch. Called on rank 0, not in silent mode.

        Args:
            epoch: counted from 0.
        """
        validated = self._should_run_validation_for_epoch(epoch)
        valid = self.in_field_names(_current(self.valid_monitored_values)) if validated else {}
        left = self.max_epochs - epoch - 1
        since = time.monotonic() - (self._epochs_began or 0.0)
        per_epoch = since / (epoch + 1 - self.start_epoch)
        lines = console.epoch_line(
            epoch + 1,
            self.max_epochs,
            self.in_field_names(_current(self.train_monitored_values)),
            valid,
            best=self._best_text(epoch) if validated else "",
            images_per_second=self.images_per_second,
            wait_fraction=self.data_wait_share,
            seconds_left=left * per_epoch if left else None,
        )
        distributed.print0(lines)
        if self.test_loaders and (epoch + 1) % self.run_test_freq == 0:
            tested = _current(self.test_monitored_values)
            distributed.print0(f"  test  {console.values_text(tested)}")

    def _best_text(self, epoch: int) -> str:
        watched = self.valid_monitored_values.get(self.metric_to_watch)
        if watched is None or not self.training_params.save_model:
            return ""
        name = self.field_names.get(self.metric_to_watch, self.metric_to_watch)
        if self.best_metric != self._best_before:
            self._best_epoch = epoch + 1
            return f"best {name} so far, saved as {self.ckpt_best_name}"
        when = f" (epoch {self._best_epoch})" if self._best_epoch else ""
        return f"best {name} {self.best_metric:.4f}{when}"

    @property
    def finiteness_is_watched(self) -> bool:
        """Whether a callback of the user's ends the training at a loss that is not finite."""
        return any(
            isinstance(one, EarlyStop)
            and one.check_finite
            and one.monitor_key in (self.loss_logging_items_names or ())
            for one in self.phase_callbacks
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in a training epoch."""
        return int(self.max_train_batches or len(self.train_loader))

    @property
    def optimizer_steps_per_epoch(self) -> int:
        """Steps of the optimiser in a training epoch."""
        return steps_of(self.steps_per_epoch, self.batch_accumulate)

    def count_steps_in_schedules(self) -> None:
        """Make SuperGradients' warm-up and schedule again, with steps in place of batches.

        It has appended them to the callbacks that the user gave.
        """
        steps, params = self.optimizer_steps_per_epoch, self.training_params
        if steps == len(self.train_loader):
            return
        for index in range(len(params.phase_callbacks or []), len(self.phase_callbacks)):
            made = self.phase_callbacks[index]
            if isinstance(made, (LRCallbackBase, LinearBatchLRWarmup)):
                again = type(made)(
                    train_loader_len=steps,
                    net=self.net,
                    training_params=params,
                    update_param_groups=self.update_param_groups,
                    **params.to_dict(),
                )
                self.phase_callbacks[index] = in_steps(again, self.batch_accumulate)

    # SuperGradients' private steps ----------------------------------------------------------------

    def _maybe_eval_before_resume(self, *args: Any, **kwargs: Any) -> None:
        self.count_steps_in_schedules()  # all is set up, no epoch has begun
        super()._maybe_eval_before_resume(*args, **kwargs)

    def _net_to_device(self) -> None:
        self.net = self.wrap_model(self.net)
        if self.training_params is not None:
            self.training_params.torch_compile = False  # wrap_model compiles

    def _load_checkpoint_to_model(self) -> None:
        self._refuse_what_is_not_honoured()
        # Rank 0 looks and decides: the folder may change while another rank looks.
        chosen = distributed.on_every_rank(
            lambda: self._choose_folder() if distributed.rank() == 0 else None
        )
        folder, path = distributed.gather_objects(chosen)[0] or (None, None)
        self.checkpoints_dir_path = str(folder)
        self.begin_run()
        self.checkpoint = self.restore(path) if path else {}
        self.load_checkpoint = bool(self.checkpoint)
        self.start_epoch = self.checkpoint.get("epoch", 0)
        self._eval_before_resume = False
        self._best_epoch, self._epochs_began = None, None

    def _refuse_what_is_not_honoured(self) -> None:
        params = self.training_params.to_dict()
        loaders = (self.train_loader, self.valid_loader)
        stream = any(isinstance(loader, StreamLoader) for loader in loaders)
        on_gpu = torch.device(device_config.device).type == "cuda"
        sg_parameters.refuse_parameters(params, on_gpu=on_gpu, stream=stream)
        for line in sg_parameters.warnings_of(params, _DEFAULT_PARAMETERS):
            distributed.print0(f"warning: {line}")

    def _choose_folder(self) -> tuple[Path, Path | None]:
        """Choose the folder to train into, and the checkpoint to continue from."""
        params = self.training_params
        root = Path(self.ckpt_root_dir) / self.experiment_name
        run_id = getattr(params, "run_id", None)
        if self.fixed_folder:
            resumed = params.resume_path or (root / params.ckpt_name if params.resume else None)
            return root, Path(resumed) if resumed else None
        if run_id is not None:
            if not (root / run_id).is_dir():
                raise InputError(
                    f"run_id={run_id}: there is no such folder in {root}; "
                    f"it has {', '.join(_run_ids(root)) or 'none'}"
                )
            return root / run_id, Path(params.resume_path or root / run_id / params.ckpt_name)
        if params.resume and not params.resume_path:
            latest = get_latest_run_id(self.experiment_name, str(self.ckpt_root_dir))
            folder = root / latest if latest else root
            return folder, folder / params.ckpt_name
        folder = root
        if _holds_a_run(root):
            folder = root / generate_run_id()
            if not params.silent_mode:
                distributed.print0(f"{root}: holds a run; this one is saved in {folder}")
        return folder, Path(params.resume_path) if params.resume_path else None

    def load_weights(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's ``net`` as ``resume_strict_load`` says; strictly by default.

        Args:
            state: the checkpoint.

        Raises:
            RuntimeError: the checkpoint is of another model.
        """
        strict: Any = self.training_params.resume_strict_load
        net = unwrap_model(self.net)
        if isinstance(strict, str):
            strict = StrictLoad(strict)
        # The parameter's default is False, which cannot be distinguished from a user's choice; a
        # partly loaded run would continue in silence.
        if strict is StrictLoad.OFF:
            missing = net.load_state_dict(state["net"], strict=False)
            distributed.print0(f"resume_strict_load=OFF: {missing}")
        else:
            adaptive_load_state_dict(
                net, state, StrictLoad.ON if strict in (True, False) else strict
            )

    def _initialize_sg_logger_objects(
        self, additional_configs_to_log: dict[str, Any] | None = None
    ) -> None:
        if self.training_params.sg_logger == "base_sg_logger":
            self.training_params.sg_logger = "portrait_dist_logger"
        AtomicSGLogger.writer = staticmethod(self.checkpoint_writer)
        super()._initialize_sg_logger_objects(additional_configs_to_log)
        self.sg_logger.tracker = self.tracker
        # train() ends each epoch with the learning rates, which _write_scalars_to_logger has logged
        # already.
        add_scalars = self.sg_logger.add_scalars

        def add_scalars_if_any(tag_scalar_dict: dict[str, Any], global_step: object = None) -> None:
            if tag_scalar_dict:
                add_scalars(tag_scalar_dict=tag_scalar_dict, global_step=global_step)

        self.sg_logger.add_scalars = add_scalars_if_any

    def _set_train_metrics(self, train_metrics_list: object) -> None:
        super()._set_train_metrics(train_metrics_list=train_metrics_list)
        self.train_metrics = _apart(self.train_metrics)
        _add_directions(self.train_metrics, self.greater_train_metrics_is_better)

    def _set_valid_metrics(self, valid_metrics_list: object) -> None:
        super()._set_valid_metrics(valid_metrics_list=valid_metrics_list)
        self.valid_metrics = _apart(self.valid_metrics)
        _add_directions(self.valid_metrics, self.greater_valid_metrics_is_better)

    def _train_epoch(self, context: PhaseContext, silent_mode: bool = False) -> tuple[float, ...]:
        self._best_before = self.best_metric
        self._epochs_began = self._epochs_began or time.monotonic()
        self.net.train()
        self._reset_metrics()
        self.train_metrics.to(device_config.device)
        context.update_context(loss_avg_meter=AverageMeter(), metrics_compute_fn=self.train_metrics)
        values = self.run_training_epoch(context, show=not silent_mode)
        self.train_monitored_values = sg_trainer_utils.update_monitored_values_dict(
            self.train_monitored_values, values
        )
        return tuple(values.values())

    def evaluate(
        self,
        data_loader: Any,
        metrics: MetricCollection,
        evaluation_type: Any,
        epoch: int | None = None,
        silent_mode: bool = False,
        metrics_progress_verbose: bool = False,
        dataset_name: str = "",
        max_batches: int | None = None,
    ) -> dict[str, float]:
        """Pass over ``data_loader`` once; arguments as of SuperGradients' Trainer.evaluate."""
        context = PhaseContext(
            net=self.net,
            epoch=epoch,
            metrics_compute_fn=metrics,
            loss_avg_meter=AverageMeter(),
            criterion=self.criterion,
            device=device_config.device,
            lr_warmup_epochs=self.training_params.lr_warmup_epochs
            if self.training_params
            else None,
            sg_logger=self.sg_logger,
            train_loader=self.train_loader,
            valid_loader=self.valid_loader,
            loss_logging_items_names=self.loss_logging_items_names,
        )
        validating = evaluation_type.name == "VALIDATION"
        return self.run_evaluation(
            data_loader,
            metrics,
            context,
            show=not silent_mode,
            validating=validating,
            title=self._title_of_evaluation(validating, epoch, dataset_name),
            max_batches=max_batches,
        )

    def _title_of_evaluation(self, validating: bool, epoch: int | None, dataset_name: str) -> str:
        if not validating:
            return f"test {dataset_name}".strip()
        if epoch is None:
            return "validation"
        if epoch == self.max_epochs:
            return "validation of the averaged model"
        return f"validation of epoch {epoch + 1}"

    def _save_checkpoint(
        self,
        optimizer: object = None,
        epoch: int | None = None,
        train_metrics_dict: dict[str, float] | None = None,
        validation_results_dict: dict[str, float] | None = None,
        context: PhaseContext = None,
    ) -> None:
        if validation_results_dict is None:
            self.sg_logger.add_checkpoint(
                tag="ckpt_latest_weights_only.pth",
                state_dict={"net": unwrap_model(self.net).state_dict()},
                global_step=epoch,
            )
            return
        assert epoch is not None
        self.save_epoch(epoch, train_metrics_dict or {}, validation_results_dict, context)

    def processing_params(self) -> dict[str, Any]:
        """Return the ``processing_params`` entry of checkpoints, for networks with ``predict``."""
        found = self._get_preprocessing_from_valid_loader()
        return {} if found is None else {"processing_params": found}

    def _init_monitored_items(self) -> None:
        average = self.training_params.average_best_models
        # Otherwise it makes an average of its own, which unpickles and rewrites all snapshots.
        self.training_params.average_best_models = False
        super()._init_monitored_items()
        self.training_params.average_best_models = average
        known = self.greater_valid_metrics_is_better.get(self.metric_to_watch)
        if known is not None and known != self.greater_metric_to_watch_is_better:
            distributed.print0(
                "warning: greater_metric_to_watch_is_better="
                f"{self.greater_metric_to_watch_is_better}, but {self.metric_to_watch} says that "
                f"{'more' if known else 'less'} is better"
            )
        if average and self.model_weight_averaging is None:
            self.model_weight_averaging = self.make_average()

    def _init_loss_logging_names(self, loss_logging_items: Any) -> None:
        parts = getattr(self.criterion, "component_names", None)
        if len(loss_logging_items) == 1 and parts is not None and len(parts) != 1:
            # A loss that returns a scalar, whatever parts it can name.
            self.loss_logging_items_names = [self.criterion.__class__.__name__]
        else:
            super()._init_loss_logging_names(loss_logging_items)

    def _initialize_mixed_precision(self, mixed_precision_enabled: bool) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super()._initialize_mixed_precision(False)  # bf16 autocast needs no gradient scaler
        return mixed_precision_enabled

    def _instantiate_ema_model(self, ema_params: dict[str, Any]) -> ModelEMA:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ema = self.ema_class.from_params(self.net, **ema_params)
        if unwrap_model(self.net)._compiled_call_impl is not None:  # a copy is not compiled
            ema.ema.compile(**self.training_params.torch_compile_options)
        return ema

    def _get_epoch_start_logging_values(self) -> dict[str, float]:
        """Learning rates, under the tags that the epoch's values have too."""
        groups = self.optimizer.param_groups
        # Groups of one name differ in their weight decay only.
        rates = {group.get("name", i): group["lr"] for i, group in enumerate(groups)}
        if len(rates) == 1:
            return {"lr": groups[0]["lr"]}
        return {f"lr/{name}": rate for name, rate in rates.items()}

    def _write_scalars_to_logger(
        self, metrics: dict[str, float], epoch: int, inference_time: float, tag: str
    ) -> None:
        """Write an epoch's values as ``loss/train``, ``iou/val`` …; steps count from 1."""
        if self.ddp_silent_mode:
            return
        part = {"Train": "train", "Valid": "val", "Test": "test"}[tag]
        scalars = {}
        for name, value in metrics.items():
            data_set, _, of_set = name.partition(":") if part == "test" else ("", "", name)
            field = self.field_names.get(of_set or name, of_set or name)
            scalars[f"{field}/{part}{f'_{data_set}' if of_set and data_set else ''}"] = value
        if part == "train":
            scalars |= self._epoch_start_logging_values
            self._epoch_start_logging_values = {}
        scalars[f"seconds/{part}"] = inference_time / 1000  # SuperGradients' Timer: milliseconds
        self.sg_logger.add_scalars(tag_scalar_dict=scalars, global_step=epoch + 1)

    def _validate_final_average_model(
        self,
        context: PhaseContext,
        checkpoint_dir_path: str,
        cleanup_snapshots_pkl_file: bool = False,
    ) -> None:
        """Validate the average of the best models, and say and log its values."""
        self.finish_writing()
        distributed.barrier()  # rank 0 has written it
        path = Path(checkpoint_dir_path) / self.average_model_checkpoint_filename
        if not path.is_file():  # save_model=False
            return
        net = unwrap_model(self.net)
        # The last weights come back: train() returns with the network that it trained.
        kept = copy.deepcopy(net.state_dict())
        net.load_state_dict(checkpoints.read(path)["net"])
        context.update_context(epoch=self.max_epochs)
        try:
            values = self._validate_epoch(context, silent_mode=self.training_params.silent_mode)
        finally:
            net.load_state_dict(kept)
        if self.ddp_silent_mode:
            return
        named = self.in_field_names(values)
        if not self.training_params.silent_mode:
            distributed.print0(f"averaged model: validation {console.values_text(named)}")
        self.sg_logger.add_scalars(
            tag_scalar_dict={f"{name}/val_averaged_model": value for name, value in named.items()},
            global_step=self.max_epochs,
        )
        if cleanup_snapshots_pkl_file:
            self.model_weight_averaging.cleanup()

    # Parts that the loops of a subclass call ------------------------------------------------------

    def compute_loss(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute (loss to minimise, detached values to log)."""
        loss, items = self._get_losses(outputs, targets)
        return loss, items

    def name_losses(self) -> None:
        """Name the loss items where no batch has named them yet."""
        parts = getattr(self.criterion, "component_names", None)
        self._init_loss_logging_names([0.0] * len(parts or (0,)))

    def metric_values(self, metrics: MetricCollection) -> tuple[torch.Tensor, ...]:
        """Compute all metrics, over all ranks (one collective per state)."""
        return get_metrics_results_tuple(metrics)

    def named_values(self, values: Sequence[Any], metrics: MetricCollection) -> dict[str, float]:
        """Name losses and metric values, as Python numbers."""
        return get_train_loop_description_dict(
            tuple(values), metrics, self.loss_logging_items_names
        )

    def values_so_far(self, losses: Sequence[float], metrics: MetricCollection) -> dict[str, float]:
        """Name this rank's losses and metrics so far, without a collective. Waits for the device.

        Args:
            losses: this rank's mean losses so far.
            metrics: their values are computed from this rank's sums alone.
        """
        found: dict[str, Any] = {}
        for name, metric in metrics.items(keep_base=True, copy_state=False):
            if metric._update_count:
                # compute() would be a collective, and only this rank shows a line now.
                synchronises, metric._to_sync = metric._to_sync, False
                try:
                    found[name] = metric.compute()
                finally:
                    metric._to_sync, metric._computed = synchronises, None
        flat = _sg_trainer_flatten(found)
        named = dict(zip(self.loss_logging_items_names or (), losses, strict=False))
        return self.in_field_names({**named, **flat})


def make_optimizer(
    network: nn.Module, params: Mapping[str, Any], *, decay_norms: bool, lr: float = 1e-3
) -> torch.optim.Optimizer:
    """Build the optimiser with the groups of parameters that SuperGradients gives it.

    Args:
        network: without wrappers.
        params: ``optimizer`` and ``optimizer_params``.
        decay_norms: whether biases and norms are in the group that decays.
        lr: learning rate at the start.
    """
    given = {
        "optimizer": params["optimizer"],
        "optimizer_params": dict(params["optimizer_params"]),
        "zero_weight_decay_on_bias_and_bn": not decay_norms,
        "finetune": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again when the training builds its own
        return build_optimizer(network, lr, types.SimpleNamespace(**given))


def _sg_trainer_flatten(values: Mapping[str, Any]) -> dict[str, float]:
    """One number for each name; metrics that give several numbers at once are left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        for key, one in value.items() if isinstance(value, dict) else [(name, value)]:
            if not isinstance(one, torch.Tensor) or one.numel() == 1:
                flat[key] = float(one)
    return flat


def _current(monitored: Mapping[str, Any]) -> dict[str, float]:
    """Return current values of SuperGradients' monitored values, as far as there are some."""
    return {name: one.current for name, one in monitored.items() if one.current is not None}


def _apart(metrics: MetricCollection) -> MetricCollection:
    """Return the same metrics, each updated by itself.

    By default torchmetrics joins for good those whose states are equal after a first batch, which
    two different metrics may be by chance.
    """
    apart = MetricCollection(
        [], compute_groups=False, prefix=metrics.prefix, postfix=metrics.postfix
    )
    apart._modules.update(metrics._modules)
    return apart


def _add_directions(metrics: MetricCollection, directions: dict[str, bool | None]) -> None:
    """Take torchmetrics' ``higher_is_better`` where ``greater_is_better`` is missing."""
    for name, metric in metrics.items():
        if directions.get(name) is None and metric.higher_is_better is not None:
            directions[name] = metric.higher_is_better


def _run_ids(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*") if path.is_dir() and is_run_dir(path.name))


def _holds_a_run(root: Path) -> bool:
    """Whether a folder has what a run leaves, of ours or of stock SuperGradients."""
    folder = RunFolder(root)
    return bool(
        folder.metrics.exists()
        or any(root.glob("*.pth"))
        or any(root.glob("events.out.tfevents*"))
        or _run_ids(root)
    )


class FusedEMA(ModelEMA):
    """SuperGradients' ModelEMA, updated by a few fused kernels instead of two for each tensor."""

    _model: nn.Module | None = None
    _tensors: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def update(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Set ema = decay · ema + (1 - decay) · model for all floating-point tensors.

        The lists of tensors are kept: making two state dicts costs 0.7 ms of each step, the update
        0.05 ms. Training, loading and broadcasting change the tensors in place.
        """
        # By identity: the lists are of this network's own tensors.
        if self._model is not model:
            self._model, self._tensors = model, self._pair_up(unwrap_model(model))
        ours, theirs = self._tensors
        decay = self.decay_function(self.decay, step, total_steps)
        with torch.no_grad():
            torch._foreach_lerp_(ours, theirs, 1.0 - decay)

    def _pair_up(self, model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """List the floating-point tensors of both state dicts, in the same order."""
        ours, theirs = (net.state_dict().values() for net in (self.ema, model))
        pairs = zip(ours, theirs, strict=True)
        floats = [(one, other) for one, other in pairs if one.dtype.is_floating_point]
        return [one for one, _ in floats], [other.detach() for _, other in floats]


class FusedKDEMA(FusedEMA, KDModelEMA):
    """The same of a student; the teacher is the network's own one, not a copy."""


class _QuietWriterThread(_event_file_writer._AsyncWriterThread):
    """TensorBoard's thread that writes, without a traceback of its own.

    It keeps an error of the disk, which the next write or flush raises in the training thread.
    """

    def run(self) -> None:
        with contextlib.suppress(OSError):
            super().run()


_event_file_writer._AsyncWriterThread = _QuietWriterThread


class AtomicSGLogger(BaseSGLogger):
    """SuperGradients' base logger, whose checkpoints are the old or the new file, never half.

    The system monitor is off unless ``sg_logger_params`` says ``monitor_system=True``.
    """

    writer: Callable[[str, dict[str, Any]], None]
    tracker: Tracker | None = None
    """What gets the curves and pictures too; on rank 0."""

    def __init__(self, *args: Any, monitor_system: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, monitor_system=monitor_system, **kwargs)

    def add_scalars(self, tag_scalar_dict: dict[str, Any], global_step: int | None = None) -> None:
        """Write the values of an epoch into TensorBoard and the text log.

        Args:
            tag_scalar_dict: tag → value.
            global_step: the epoch, counted from 1.
        """
        if distributed.rank() != 0:
            return
        numbers = {tag: float(value) for tag, value in tag_scalar_dict.items()}
        for tag, number in numbers.items():
            super().add_scalar(tag, number, global_step)
        if self.tracker:
            self.tracker.scalars(numbers, global_step or 0)
        self.tensorboard_writer.flush()
        values = "\t".join(f"{tag}: {number}" for tag, number in numbers.items())
        self._write_to_log_file([f"\nepoch {global_step}/{self.max_global_steps}  {values}"])

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        """Write one value into TensorBoard, and give it to the tracker."""
        super().add_scalar(tag=tag, scalar_value=scalar_value, global_step=global_step)
        if self.tracker and distributed.rank() == 0:
            self.tracker.scalars({tag: float(scalar_value)}, int(global_step or 0))

    def add_image(
        self, tag: str, image: Any, data_format: str = "CHW", global_step: int | None = None
    ) -> None:
        """Write a picture into TensorBoard, and give uint8 [H, W, 3] to the tracker."""
        super().add_image(tag=tag, image=image, data_format=data_format, global_step=global_step)
        if self.tracker and distributed.rank() == 0 and data_format == "HWC":
            self.tracker.image(tag, image, int(global_step or 0))

    def close(self) -> None:
        """Close TensorBoard's file and the tracker."""
        super().close()
        if self.tracker and distributed.rank() == 0:
            self.tracker.close()

    def _save_checkpoint(self, path: str, state_dict: dict[str, Any]) -> None:
        type(self).writer(path, state_dict)

    def _save_code(self) -> None: ...


_sg_trainer.SG_LOGGERS["portrait_dist_logger"] = AtomicSGLogger
