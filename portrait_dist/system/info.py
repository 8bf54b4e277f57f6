"""What this machine is, and with which versions: facts that explain a speed or repeat a run."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from portrait_dist.errors import InputError

PACKAGES = (
    "portrait-dist",
    "torch",
    "torchvision",
    "super-gradients",
    "torchmetrics",
    "numpy",
    "webdataset",
    "simplejpeg",
    "isal",
)
"""Whose versions can change what a run computes."""


def environment_number(
    name: str,
    default: int = 0,
    *,
    minimum: int = 0,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Read a whole number from an environment variable; unset and empty mean the default.

    Args:
        name: the variable.
        default: where it is unset or empty.
        minimum: smaller numbers are refused.
        environment: variables to read; this process's when None.

    Raises:
        InputError: the variable holds something else.
    """
    text = (os.environ if environment is None else environment).get(name, "").strip()
    if not text:
        return default
    # isdecimal takes digits of all scripts, int() thousands of them
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) >= minimum):
        raise InputError(
            f"{name}={text[:40]}: write a whole number of at least {minimum}, or leave it unset"
        )
    return int(text)


@dataclass(frozen=True)
class Machine:
    """What a process may use of a machine.

    Args:
        cpu: name of the processor.
        cores: those that this process may use.
        memory_bytes: likewise.
        gpus: their names; empty without torch.
        system: operating system and release.
    """

    cpu: str
    cores: int
    memory_bytes: int
    gpus: list[str]
    system: str


def machine() -> Machine:
    """Describe the machine that this process runs on."""
    return Machine(
        cpu=cpu_name(),
        cores=cores(),
        memory_bytes=memory_limit(),
        gpus=gpu_names(),
        system=f"{platform.system()} {platform.release()}",
    )


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, the main packages, ``more`` and torch's CUDA.

    ``not installed`` stands for a missing package.
    """
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    torch = sys.modules.get("torch")
    if torch and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def check_extra(what: str, packages: Iterable[str], extra: str, otherwise: str = "") -> None:
    """Check that the packages of an extra are installed.

    Args:
        what: needs them.
        packages: names of their modules.
        extra: of this package.
        otherwise: what else can be done, after the comma.

    Raises:
        InputError: one is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{what} needs {', '.join(missing)}: pip install 'portrait-dist[{extra}]'{otherwise}"
        )


def cpu_name() -> str:
    """Model of the processor as Linux names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Count the cores that this process may run on; a container's limit is ``cpu_quota``."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Cores' worth of time that the container may use (cgroup v2); None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory_limit() -> int:
    """Return bytes of memory: the machine's, or the container's limit (cgroup v2)."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs.*|cifs|smb.*|lustre|gpfs|beegfs|ceph|glusterfs|afs|9p|fuse.*|pvfs2|orangefs|wekafs|panfs"
)


def is_network_file_system(device: int) -> bool:
    """Whether a mounted device is served by another machine or process.

    Args:
        device: ``st_dev`` of a file on it.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    # "36 35 98:0 /root /mount/point options - type source …", see proc(5)
    types = [line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == number]
    return any(NETWORK_FILE_SYSTEMS.fullmatch(kind) for kind in types)


def gpu_names() -> list[str]:
    """Names of the GPUs that torch sees."""
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
