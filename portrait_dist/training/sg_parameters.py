"""How each training parameter of SuperGradients is treated: none is ignored silently.

A parameter is *honoured* (it does what it does in SuperGradients), *refused* (with it the training
does not start), or *warned of* (SuperGradients itself does not read it, or it is unknown).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portrait_dist.errors import InputError

HONOURED = frozenset(
    (
        "average_best_models",
        "batch_accumulate",
        "ckpt_best_name",
        "ckpt_name",
        "clip_grad_norm",
        "cosine_final_lr_ratio",
        "criterion_params",
        "dataset_statistics",
        "ema",
        "ema_params",
        "finetune",
        "greater_metric_to_watch_is_better",
        "initial_lr",
        "kill_ddp_pgroup_on_end",
        "load_opt_params",
        "log_installed_packages",
        "loss",
        "lr_cooldown_epochs",
        "lr_decay_factor",
        "lr_mode",
        "lr_schedule_function",
        "lr_updates",
        "lr_warmup_epochs",
        "lr_warmup_steps",
        "max_epochs",
        "max_train_batches",
        "max_valid_batches",
        "metric_to_watch",
        "mixed_precision",
        "multiply_head_lr",
        "optimizer",
        "optimizer_params",
        "phase_callbacks",
        "pre_prediction_callback",
        "precise_bn",
        "precise_bn_batch_size",
        "resume",
        "resume_path",
        "resume_strict_load",
        "run_id",
        "run_test_freq",
        "run_validation_freq",
        "save_ckpt_epoch_list",
        "save_model",
        "seed",
        "sg_logger",
        "sg_logger_params",
        "silent_mode",
        "step_lr_update_freq",
        "sync_bn",
        "torch_compile",
        "torch_compile_loss",
        "torch_compile_options",
        "train_metrics_list",
        "valid_metrics_list",
        "warmup_initial_lr",
        "warmup_mode",
        "zero_weight_decay_on_bias_and_bn",
    )
)
"""As in SuperGradients. ``mixed_precision`` is bf16; ``batch_accumulate`` averages."""

REFUSED = {
    "resume_from_remote_sg_logger": (
        "not supported here; download the checkpoint and give its path as resume_path"
    ),
}
"""Refused where set: name → advice."""

WARNED = {
    "launch_tensorboard": "not read; give it in sg_logger_params",
    "tensorboard_port": "not read; give it in sg_logger_params",
    "tb_files_user_prompt": "not read; give it in sg_logger_params",
    "save_tensorboard_to_s3": "not read; give sg_logger_params.save_tensorboard_remote",
    "enable_qat": "not read; only SuperGradients' QATTrainer quantises",
    "loss_logging_items_names": "not read; the names are the loss's component_names",
    "static_assigner_end_epoch": "not read; give it to the callback that switches",
    "warmup_bias_lr": "not read by SuperGradients' warm-up",
    "warmup_momentum": "not read by SuperGradients' warm-up",
}
"""Warned of where set: name → what to do. SuperGradients says nothing."""

_NOT_PARAMETERS = frozenset({"schema", "_convert_"})


def refuse_parameters(params: Mapping[str, Any], *, on_gpu: bool, stream: bool) -> None:
    """Refuse parameters that are set and not honoured.

    Args:
        params: all training parameters, the defaults included.
        on_gpu: whether the training is on a GPU.
        stream: whether the loaders give batches of the stream, not (inputs, targets).

    Raises:
        InputError: one is set.
    """
    for name, advice in REFUSED.items():
        if params.get(name):
            raise InputError(f"{name}={params[name]}: {advice}")
    if params.get("precise_bn") and (stream or not on_gpu):
        raise InputError(
            "precise_bn=True: SuperGradients can do it on a GPU, with batches of (inputs, targets) "
            "only; leave it out"
        )
    if params.get("dataset_statistics") and stream:
        raise InputError(
            "dataset_statistics=True: not supported with the stream; portrait-dist show draws "
            "samples of the shards"
        )


def warnings_of(params: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return a line for each parameter that is set and that nobody reads.

    Args:
        params: all training parameters, the defaults included.
        defaults: SuperGradients' defaults.
    """
    lines = [
        f"{name}={params[name]!r}: {advice}"
        for name, advice in WARNED.items()
        if name in params and params[name] != defaults.get(name)
    ]
    known = HONOURED | set(REFUSED) | set(WARNED) | _NOT_PARAMETERS
    unknown = sorted(set(params) - known)
    if unknown:
        lines.append(
            f"{', '.join(unknown)}: no training parameter of SuperGradients; only a network or "
            "callback of yours can read it"
        )
    return lines
