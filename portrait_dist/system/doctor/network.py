"""Checks of what ranks need to talk to each other: process groups, SLURM."""

from __future__ import annotations

import os
import shutil
import socket

from portrait_dist import distributed
from portrait_dist.errors import kind_and_message
from portrait_dist.system.doctor.check import FAIL, OK, WARN, Check, output


def check_process_group() -> Check:
    """Start a process group of one (gloo), which needs a network interface, and look for NCCL."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count()
    nccl = dist.is_nccl_available()
    if gpus > 1 and not nccl:
        return Check(
            "processes",
            FAIL,
            f"{gpus} GPUs, but torch has no NCCL",
            "install a CUDA build of torch for Linux",
        )
    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
            dist.destroy_process_group()
        except RuntimeError as error:
            advice = (
                f"let the name '{socket.gethostname()}' lead to this machine (/etc/hosts), "
                "or set GLOO_SOCKET_IFNAME=lo"
            )
            return Check(
                "processes", FAIL, f"gloo does not start: {kind_and_message(error)}", advice
            )
    two_nodes = os.environ | {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}
    card = os.environ.get("GLOO_SOCKET_IFNAME") or distributed.gloo_interface(two_nodes)
    gloo = f"gloo ({card or 'no card found'} towards other nodes)"
    if not nccl:
        return Check("processes", OK, f"{gloo}; no NCCL, which only GPUs need")
    version = ".".join(map(str, torch.cuda.nccl.version())) if gpus else "not loaded without a GPU"
    return Check("processes", OK, f"{gloo}, NCCL {version}")


def check_slurm() -> Check:
    """Look for SLURM and ask its controller."""
    if not shutil.which("sbatch"):
        return Check("slurm", OK, "none here; torchrun needs none")
    version = output("sinfo", "--version") or "unknown version"
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        return Check("slurm", OK, f"{version}, inside job {job}")
    if not output("sinfo", "--noheader", "--format=%P"):
        return Check(
            "slurm",
            WARN,
            f"{version}, but the controller does not answer",
            "ask those who run the cluster; see 'sinfo'",
        )
    return Check("slurm", OK, f"{version}: 'portrait-dist submit' queues jobs")
