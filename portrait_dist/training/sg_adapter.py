"""The one module that knows SuperGradients' internals (3.7.1, the last release).

It does three things:

1. imports SuperGradients without the packages its training never runs and without its side effects (a log in the home
   folder, an exception hook, muted ranks, words taken from the command line, false warnings about packages);
2. replaces what does not run on today's torchmetrics and torch, or is wrong under torchrun;
3. gives :class:`AdaptedTrainer`, SuperGradients' ``Trainer`` whose private steps call public methods that a subclass fills:
   ``wrap_model``, ``restore``, ``run_training_epoch``, ``run_evaluation``, ``save_epoch``, ``make_average``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from portrait_dist import distributed

# Imported by SuperGradients at module level, used only by export, plotting, S3 upload and other tasks' datasets.
# torchmetrics, imported here too, takes matplotlib and scipy where it finds them, for plots.
UNUSED_PACKAGES = (
    "albumentations",
    "boto3",
    "botocore",
    "data_gradients",
    "deci_platform_client",
    "imagesize",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "pandas",
    "pycocotools",
    "requests",
    "scipy",
)
_STAND_IN = "portrait_dist.not_imported"


class _StandInType(type):
    """Metaclass: every attribute of a stand-in class is a stand-in class, so class bodies and annotations evaluate."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in_class(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ != _STAND_IN:
            return super().__call__(*args, **kwargs)
        return (
            args[0] if len(args) == 1 and callable(args[0]) else cls
        )  # as a decorator, or a call that makes one


def _stand_in_class(name: str) -> type:
    return _StandInType(name, (), {"__module__": _STAND_IN})


class _StandInModule(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in_class(name)


class _RunFolderLog:
    """In place of SuperGradients' ``AutoLoggerConfig``: its messages go to stderr on rank 0 and into the run folder."""

    filename: str | None = None

    @classmethod
    def get_instance(cls) -> type[_RunFolderLog]:
        logger = logging.getLogger("super_gradients")
        if not logger.handlers:
            logger.setLevel(logging.INFO if distributed.rank() == 0 else logging.ERROR)
            logger.propagate = False
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
        log_level: Any = None,
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


def _is_true_here(record: logging.LogRecord) -> bool:
    """SuperGradients knows samplers only, and warns of a loader that splits the samples itself."""
    return "sampler you are using might not support DDP" not in record.getMessage()


class _NoConsoleSink:
    """In place of ``ConsoleSink``, which wraps stdout and stderr and writes into the home folder."""

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


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in _REPLACED or fullname.partition(".")[0] in UNUSED_PACKAGES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name) if spec.name in _REPLACED else _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(_REPLACED.get(module.__name__, {}))


@contextmanager
def _lean_import() -> Iterator[None]:
    finder = _Finder()
    kept = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] in UNUSED_PACKAGES
    }
    hook, words = sys.excepthook, sys.argv
    sys.argv = words[:1]  # it would answer the program's --help and take its --local_rank away
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.meta_path.remove(finder)
        sys.excepthook, sys.argv = hook, words
        for name in [
            name for name, module in sys.modules.items() if isinstance(module, _StandInModule)
        ]:
            del sys.modules[name]
        sys.modules.update(kept)


def import_super_gradients() -> types.ModuleType:
    """Import SuperGradients (and torchmetrics) as described above; later calls return the same module."""
    with _lean_import():
        importlib.import_module("torchmetrics")
        return importlib.import_module("super_gradients")


import_super_gradients()

from super_gradients.common.environment.device_utils import device_config  # noqa: E402
from super_gradients.common.sg_loggers.base_sg_logger import BaseSGLogger  # noqa: E402
from super_gradients.training import Trainer  # noqa: E402
from super_gradients.training.metrics.metric_utils import (  # noqa: E402
    get_metrics_results_tuple,
    get_train_loop_description_dict,
)
from super_gradients.training.sg_trainer import sg_trainer as _sg_trainer  # noqa: E402
from super_gradients.training.utils import sg_trainer_utils  # noqa: E402
from super_gradients.training.utils.callbacks import Callback, PhaseContext  # noqa: E402
from super_gradients.training.utils.ema import ModelEMA  # noqa: E402
from super_gradients.training.utils.utils import AverageMeter, unwrap_model  # noqa: E402
from torchmetrics import MetricCollection  # noqa: E402

from super_gradients.common import MultiGPUMode  # noqa: E402  isort:skip

__all__ = [
    "AdaptedTrainer",
    "AverageMeter",
    "BaseSGLogger",
    "Callback",
    "ModelEMA",
    "PhaseContext",
    "Trainer",
    "device_config",
    "import_super_gradients",
    "unwrap_model",
    "use_device",
]


# ``Trainer.__init__`` builds Accuracy() and Top5(), which torchmetrics >= 0.11 refuses without a task; train() replaces them.
_sg_trainer.Accuracy = lambda: None
_sg_trainer.Top5 = lambda: None
_MetricCollection = _sg_trainer.MetricCollection
_sg_trainer.MetricCollection = lambda metrics, *args, **kwargs: _MetricCollection(
    [metric for metric in metrics if metric is not None]
    if isinstance(metrics, (list, tuple))
    else metrics,
    *args,
    **kwargs,
)
# SuperGradients seeds with the local rank: two nodes would draw the same numbers.
_sg_trainer.random_seed = lambda is_ddp, device, seed: distributed.seed_everything(seed)
# It wraps sys.excepthook at each train(): every error would be printed twice.
_sg_trainer.sg_trainer_utils.log_uncaught_exceptions = _nothing


def use_device(device: torch.device) -> None:
    """Tell SuperGradients the device and the *global* rank, on any number of nodes.

    It takes LOCAL_RANK for the rank, refuses a second node, and knows DDP on GPUs only.
    """
    device_config.device = str(device)
    ranks = distributed.is_initialized()
    device_config.assigned_rank = distributed.rank() if ranks else -1
    device_config.multi_gpu = MultiGPUMode.DISTRIBUTED_DATA_PARALLEL if ranks else MultiGPUMode.OFF


class AdaptedTrainer(Trainer):
    """SuperGradients' Trainer with its private steps turned into public methods.

    Args:
        experiment_name: name of the run; its folder is ``<ckpt_root_dir>/<experiment_name>``.
        ckpt_root_dir: folder of all runs.
    """

    checkpoint_writer: Callable[[str, dict[str, Any]], None]
    net: Any
    train_monitored_values: dict[str, Any]
    model_weight_averaging: Any

    def __init__(self, experiment_name: str, ckpt_root_dir: str | None = None) -> None:
        if distributed.is_initialized() and device_config.assigned_rank != distributed.rank():
            use_device(distributed.pick_device())
        super().__init__(
            experiment_name=experiment_name, ckpt_root_dir=ckpt_root_dir or "checkpoints"
        )

    # What a subclass fills ------------------------------------------------------------------------------------------

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and wrap it for training."""
        raise NotImplementedError

    def restore(self) -> dict[str, Any]:
        """Set ``checkpoints_dir_path``; load the model where a run goes on; return the checkpoint, or {}."""
        raise NotImplementedError

    def run_training_epoch(self, context: PhaseContext, show: bool) -> dict[str, float]:
        """One training epoch; mean losses and metrics by name."""
        raise NotImplementedError

    def run_evaluation(
        self,
        loader: Any,
        metrics: Any,
        context: PhaseContext,
        *,
        show: bool,
        validating: bool,
        title: str,
        max_batches: int | None,
    ) -> dict[str, float]:
        """One pass over a loader; mean losses and metrics by name."""
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

    def make_average(self) -> Any:
        """The object that averages the best models: ``get_average_model(net, validation_results_dict)`` and ``cleanup()``."""
        raise NotImplementedError

    # SuperGradients' private steps ----------------------------------------------------------------------------------

    def _net_to_device(self) -> None:
        self.net = self.wrap_model(self.net)
        self.training_params.torch_compile = (
            False if self.training_params is not None else None
        )  # wrap_model compiles

    def _load_checkpoint_to_model(self) -> None:
        self.checkpoint = self.restore()
        self.load_checkpoint = bool(self.checkpoint)
        self.start_epoch = self.checkpoint.get("epoch", 0)
        self._eval_before_resume = False

    def _initialize_sg_logger_objects(
        self, additional_configs_to_log: dict[str, Any] | None = None
    ) -> None:
        if self.training_params.sg_logger == "base_sg_logger":
            self.training_params.sg_logger = "portrait_dist_logger"
        AtomicSGLogger.writer = staticmethod(self.checkpoint_writer)
        super()._initialize_sg_logger_objects(additional_configs_to_log)

    def _train_epoch(self, context: PhaseContext, silent_mode: bool = False) -> tuple[float, ...]:
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
        """One pass over ``data_loader``; see SuperGradients' Trainer.evaluate for the arguments."""
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
        title = f"Validating epoch {epoch}" if validating else f"Testing {dataset_name}".strip()
        return self.run_evaluation(
            data_loader,
            metrics,
            context,
            show=not silent_mode,
            validating=validating,
            title=title,
            max_batches=max_batches,
        )

    def _save_checkpoint(
        self,
        optimizer: Any = None,
        epoch: int | None = None,
        train_metrics_dict: dict[str, float] | None = None,
        validation_results_dict: dict[str, float] | None = None,
        context: PhaseContext = None,
    ) -> None:
        assert epoch is not None
        self.save_epoch(epoch, train_metrics_dict or {}, validation_results_dict or {}, context)

    def _init_monitored_items(self) -> None:
        average, self.training_params.average_best_models = (
            self.training_params.average_best_models,
            False,
        )
        super()._init_monitored_items()
        self.training_params.average_best_models = average
        if average and self.model_weight_averaging is None:
            self.model_weight_averaging = self.make_average()

    def _init_loss_logging_names(self, loss_logging_items: Any) -> None:
        if len(loss_logging_items) == 1:  # a loss that returns a scalar, whatever parts it can name
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
            return FusedEMA.from_params(self.net, **ema_params)

    # Parts that the loops of a subclass call ------------------------------------------------------------------------

    def compute_loss(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss to minimise, detached values to log)."""
        loss, items = self._get_losses(outputs, targets)
        return loss, items

    def name_losses(self) -> None:
        """Name the loss items where no batch has named them yet."""
        self._init_loss_logging_names([0.0])

    def metric_values(self, metrics: MetricCollection) -> tuple[torch.Tensor, ...]:
        """Values of all metrics, over all ranks (one collective per state)."""
        return get_metrics_results_tuple(metrics)

    def named_values(self, values: Sequence[Any], metrics: MetricCollection) -> dict[str, float]:
        """Losses and metric values by name, as Python numbers."""
        return get_train_loop_description_dict(
            tuple(values), metrics, self.loss_logging_items_names
        )


class FusedEMA(ModelEMA):
    """SuperGradients' ModelEMA, updated by a few fused kernels instead of two for each tensor."""

    def update(self, model: nn.Module, step: int, total_steps: int) -> None:
        """ema = decay · ema + (1 - decay) · model for every floating-point tensor of the state dict."""
        decay = self.decay_function(self.decay, step, total_steps)
        pairs = [
            (ours, theirs.detach())
            for ours, theirs in zip(
                self.ema.state_dict().values(),
                unwrap_model(model).state_dict().values(),
                strict=True,
            )
            if ours.dtype.is_floating_point
        ]
        with torch.no_grad():
            torch._foreach_lerp_(
                [ours for ours, _ in pairs], [theirs for _, theirs in pairs], 1.0 - decay
            )


class AtomicSGLogger(BaseSGLogger):
    """SuperGradients' base logger, whose checkpoints are either the old or the new file, never half."""

    writer: Callable[[str, dict[str, Any]], None]

    def _save_checkpoint(self, path: str, state_dict: dict[str, Any]) -> None:
        type(self).writer(path, state_dict)

    def _save_code(self) -> None: ...


_sg_trainer.SG_LOGGERS["portrait_dist_logger"] = AtomicSGLogger
