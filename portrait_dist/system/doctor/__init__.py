"""What this machine can run, and what is missing.

Each check looks at one thing and says what to do:

for check in diagnose(path=Path("runs"), shards="shards"):
    print(check.status, check.name, check.found, check.advice)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from portrait_dist.errors import kind_and_message
from portrait_dist.system.doctor import gpu, machine, network, software, storage
from portrait_dist.system.doctor.check import FAIL, OK, WARN, Check

__all__ = ["FAIL", "OK", "WARN", "Check", "all_checks", "diagnose", "run_checks"]


def diagnose(
    path: Path = Path(), shards: str | None = None, gpu_required: bool = False
) -> Iterator[Check]:
    """Run every check, one after the other, and yield the findings as they come.

    Args:
        path: folder whose disk is measured: where runs or shards shall lie. A file of 64 MB is
            written and removed.
        shards: folder or address of packed shards to look at.
        gpu_required: no usable GPU is a failure, not a warning.
    """
    return run_checks(all_checks(path, shards, gpu_required))


def all_checks(
    path: Path, shards: str | None, gpu_required: bool
) -> dict[str, Callable[[], Check]]:
    """Return every check by its name; see :func:`diagnose`."""
    checks: dict[str, Callable[[], Check]] = {
        "python": software.check_python,
        "packages": software.check_packages,
        "training": software.check_training,
        "gpu": functools.partial(gpu.check_gpu, required=gpu_required),
        "processes": network.check_process_group,
        "compiler": software.check_compiler,
        "cores": machine.check_cores,
        "memory": machine.check_memory,
        "shared memory": machine.check_shared_memory,
        "file handles": machine.check_file_handles,
        "disk": functools.partial(storage.check_disk, path),
        "locks": functools.partial(storage.check_locks, path),
        "decoders": machine.check_decoders,
        "slurm": network.check_slurm,
    }
    if shards:
        checks["shards"] = functools.partial(storage.check_shards, shards)
    return checks


def run_checks(checks: Mapping[str, Callable[[], Check]]) -> Iterator[Check]:
    """Run checks in order; one that itself breaks is a failure with the error's text."""
    for name, check in checks.items():
        try:
            yield check()
        except Exception as error:  # a broken check must not hide the findings of the others
            yield Check(
                name,
                FAIL,
                f"the check itself broke ({kind_and_message(error)})",
                "what it needs is missing or broken; fix that first",
            )
