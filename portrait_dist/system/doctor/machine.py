"""Checks of cores, memory, file handles and the speed of decoding."""

from __future__ import annotations

import io
import os
import shutil
import time
from pathlib import Path

from portrait_dist.system import info
from portrait_dist.system.doctor.check import FAIL, GB, OK, WARN, Check

FEW_HANDLES, TOO_FEW_HANDLES = 1024, 256
"""A reader keeps up to 256 shards of each split open."""
LITTLE_MEMORY = 4 * GB
LITTLE_SHARED_MEMORY = 1 * GB
"""Containers come with 64 MB."""
SLOW_DECODING = 300.0
"""Pairs of 256×256 per second and core."""
CORES_PER_GPU = 4


def check_cores() -> Check:
    """Compare the usable cores with the container's limit and the number of GPUs."""
    import torch

    cores, quota, gpus = info.cores(), info.cpu_quota(), torch.cuda.device_count()
    found = f"{cores} of {os.cpu_count()} usable ({info.cpu_name()})"
    if quota is not None and quota < cores:
        advice = (
            f"set train.threads={max(1, int(quota))}, or give the container more: "
            "too many threads wait for each other"
        )
        return Check(
            "cores", WARN, f"{found}, but the container may use only {quota:g} cores' time", advice
        )
    if gpus and cores < CORES_PER_GPU * gpus:
        advice = (
            f"ask for {CORES_PER_GPU} cores for each GPU, "
            "or store pixels with 'portrait-dist pack --codec raw'"
        )
        return Check(
            "cores", WARN, f"{found} for {gpus} GPUs: decoding may keep them waiting", advice
        )
    return Check("cores", OK, found)


def check_memory() -> Check:
    """Look at the free memory."""
    import psutil

    free, total = psutil.virtual_memory().available, info.memory_limit()
    found = f"{min(free, total) / GB:.1f} GB free of {total / GB:.1f} GB"
    if min(free, total) < LITTLE_MEMORY:
        return Check("memory", WARN, found, "start fewer ranks, or lower train.batch_size")
    return Check("memory", OK, found)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Look at /dev/shm, where NCCL's ranks and DataLoader's worker processes meet."""
    advice = "start containers with --shm-size=8g or --ipc=host"
    if not folder.is_dir():
        return Check("shared memory", WARN, f"no {folder}", advice)
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GB:.2f} GB free of {usage.total / GB:.2f} GB in {folder}"
    return (
        Check("shared memory", OK, found)
        if usage.free >= LITTLE_SHARED_MEMORY
        else Check("shared memory", WARN, found, advice)
    )


def check_file_handles() -> Check:
    """Look at the limit of open files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
    if soft == resource.RLIM_INFINITY or soft >= FEW_HANDLES:
        return Check(
            "file handles",
            OK,
            f"{'no limit' if soft == resource.RLIM_INFINITY else soft} (at most {most})",
        )
    enough = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    advice = f"'ulimit -n {enough}' in the shell or job script"
    return Check(
        "file handles",
        FAIL if soft < TOO_FEW_HANDLES else WARN,
        f"{soft} (at most {most}); shards need more",
        advice,
    )


def check_decoders(seconds: float = 0.15) -> Check:
    """Count the pairs of 256×256 that one core decodes in ``seconds``."""
    import numpy as np
    import simplejpeg
    from PIL import Image

    from portrait_dist.data.shards.decode import decode_pair

    rows, columns = np.mgrid[0:256, 0:256]
    image = np.stack([rows, columns, (rows * columns) >> 8], axis=2).astype(np.uint8)
    alpha = ((rows - 128) ** 2 + (columns - 128) ** 2 < 90**2).astype(np.uint8) * 255
    jpeg, png = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95), io.BytesIO()
    Image.fromarray(alpha).save(png, "png")
    out_image, out_alpha = np.empty_like(image), np.empty_like(alpha)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        decode_pair(jpeg, png.getvalue(), None, out_image, out_alpha)
        count += 1
    speed = count / (time.perf_counter() - started)
    found = f"{speed:.0f} pairs/s on one core, 256x256"
    if speed < SLOW_DECODING:
        advice = (
            "something else may be using the cores; "
            "or store pixels with 'portrait-dist pack --codec raw'"
        )
        return Check("decoders", WARN, found, advice)
    return Check("decoders", OK, found)
