"""Checks of GPUs and their driver."""

from __future__ import annotations

import os
from pathlib import Path

from portrait_dist.errors import kind_and_message
from portrait_dist.system import info
from portrait_dist.system.doctor.check import FAIL, GB, OK, WARN, Check, output


def check_gpu(required: bool = False) -> Check:
    """Compute on every GPU that torch sees, or say why it sees none.

    No GPU, a CPU build of torch, hidden GPUs and a driver that does not fit are distinguished.
    """
    import torch

    if torch.cuda.is_available():
        return _try_gpus()
    driver = driver_version()
    if driver is None:
        advice = (
            "training on CPUs works, only far slower; for a GPU install NVIDIA's driver "
            "(containers: start with GPUs)"
        )
        return Check("gpu", FAIL if required else WARN, "no GPU and no NVIDIA driver here", advice)
    if torch.version.cuda is None:
        found = f"NVIDIA driver {driver}, but torch {torch.__version__} is a build for CPUs"
        return Check("gpu", FAIL, found, "install a CUDA build of the same torch version")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Check(
            "gpu",
            FAIL,
            f"CUDA_VISIBLE_DEVICES='{hidden}' hides every GPU",
            "unset CUDA_VISIBLE_DEVICES",
        )
    return Check(
        "gpu",
        FAIL,
        f"driver {driver}, CUDA {torch.version.cuda} in torch: {_cuda_error()}",
        _driver_advice(),
    )


def _cuda_error() -> str:
    """Return why CUDA does not start, as it says itself."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return kind_and_message(error)
    return "torch sees no GPU"


def _driver_advice() -> str:
    import torch

    return (
        f"update the driver to one for CUDA {torch.version.cuda} or install a torch built for an "
        "older CUDA; after a driver update restart the machine; in a container or job ask for "
        "GPUs; 'nvidia-smi' must list them"
    )


def _try_gpus() -> Check:
    """Multiply on every GPU: a torch without code for its generation fails here, not later."""
    import torch

    names = info.gpu_names()
    for number, name in enumerate(names):
        try:
            square = torch.ones(64, 64, device=f"cuda:{number}")
            if float((square @ square).sum()) != 64**3:
                return Check(
                    "gpu",
                    FAIL,
                    f"GPU {number} ({name}) computes wrong results",
                    "take it out of use",
                )
        except RuntimeError as error:
            found = f"GPU {number} ({name}) does not compute: {kind_and_message(error)}"
            return Check("gpu", FAIL, found, _driver_advice())
    memory = [torch.cuda.mem_get_info(number) for number in range(len(names))]
    total = ", ".join(
        f"{name} {whole / GB:.0f} GB" for name, (_, whole) in zip(names, memory, strict=True)
    )
    found = f"{len(names)} ({total}), driver {driver_version()}, CUDA {torch.version.cuda}"
    busy = [str(number) for number, (free, whole) in enumerate(memory) if free < 0.5 * whole]
    if busy:
        return Check(
            "gpu",
            WARN,
            f"{found}; more than half of the memory of GPU {', '.join(busy)} is taken",
            "see 'nvidia-smi'",
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Check(
            "gpu", WARN, f"{found}; no bf16 in hardware", "train with train.precision=fp32"
        )
    return Check("gpu", OK, found)


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, None without one.

    ``unknown`` stands for a driver of which only the devices show.
    """
    text = _read("/proc/driver/nvidia/version")
    versions = [part for part in text.split() if part[:1].isdigit() and "." in part]
    if versions:
        return versions[0]
    if text or Path("/dev/nvidiactl").exists():
        return "unknown"
    return (
        output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[
            0
        ]
        or None
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
