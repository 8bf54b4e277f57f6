"""Checkpoints: written whole or not at all, readable by plain torch with ``weights_only=True``.

The files have SuperGradients' names and content. Tensors lie in the usual NCHW order, names carry no prefix of DDP or
torch.compile, everything else is plain numbers, strings, lists and dicts, so loading one cannot execute code.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError

if TYPE_CHECKING:
    from portrait_dist.models import UNet

LATEST = "ckpt_latest.pth"
BEST = "ckpt_best.pth"
AVERAGE = "average_model.pth"


def plain(value: Any) -> Any:
    """A copy made of contiguous CPU tensors, dicts, lists, tuples, strings and Python numbers only."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu").contiguous()
    if isinstance(value, dict):
        return {
            str(key) if not isinstance(key, (int, str)) else key: plain(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def save_atomically(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name in the same folder, fsync, rename: a reader finds the old or the new one.

    Args:
        path: the checkpoint's file.
        state: anything :func:`plain` takes.

    Raises:
        PortraitDistError: the disk is full or the folder cannot be written; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    buffer = io.BytesIO()  # first in memory: torch.save hides the reason when a disk refuses
    torch.save(plain(state), buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = (
            "the disk is full; free some space"
            if full
            else f"{error.strerror}; make the folder writable"
        )
        raise PortraitDistError(
            f"{path}: the checkpoint was not written, the one before it is whole: {reason} and run again"
        ) from error


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises:
        InputError: there is no such file.
        DamagedDataError: the file is not a checkpoint, or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: there is no such checkpoint; give the path of a .pth file, for example runs/NAME/{BEST}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedDataError(
            f"{path}: not a checkpoint that can be read safely ({type(error).__name__}); "
            f"take another one of the run, such as {LATEST}"
        ) from error
    if not isinstance(state, dict) or "net" not in state:
        raise InputError(
            f"{path}: a torch file, but no checkpoint of portrait_dist or SuperGradients (it has no 'net')"
        )
    return state


def load_model(path: str | Path) -> tuple[UNet, dict[str, Any]]:
    """The U-Net of a checkpoint, in evaluation mode on the CPU, and what the checkpoint says of it.

    The averaged weights (``ema_net``) are taken where there are some.

    Returns:
        The model, and the checkpoint's ``portrait_dist`` entry: ``model``, ``size`` ([H, W] of training), ``config``.

    Raises:
        InputError: no such file, or a checkpoint of another model.
        DamagedDataError: the file is damaged.
    """
    from portrait_dist.models import UNet

    state = read(path)
    weights = state.get("ema_net") or state["net"]
    about = state.get("portrait_dist") or {}
    try:
        settings = about.get("model") or {
            "init_features": weights["encoder1.enc1conv1.weight"].shape[0]
        }
        model = UNet(**settings)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: a checkpoint of another model than the U-Net of this package ({reason})"
        ) from error
    return model.eval(), about
