"""A run's folder: the names of its files, its events, and the lock that keeps it to one process."""

from __future__ import annotations

import os
from pathlib import Path

from portrait_dist import files

LATEST = "ckpt_latest.pth"
BEST = "ckpt_best.pth"
AVERAGE = "average_model.pth"
CONFIG = "config.yaml"
EVENTS = "metrics.jsonl"
LOCK = ".lock"

SECONDS_FOR_A_DEAD_NODE = 120.0
"""NFSv4 keeps the lock of a node that died for its lease, 90 s by default."""


class RunLock(files.ExclusiveLock):
    """One writer for a run folder, on any number of nodes.

    A job that was restarted or requeued waits for the lock of its own earlier attempt.

    Args:
        folder: the run's folder; made if it is missing.

    Raises:
        InputError: another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        with files.explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        restarted = int(os.environ.get("SLURM_RESTART_COUNT") or 0) or int(
            os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0
        )
        super().__init__(
            folder / LOCK,
            lambda holder: (
                f"{folder}: {holder} is training into this folder; stop it, or choose another run.name"
            ),
            wait_seconds=SECONDS_FOR_A_DEAD_NODE if restarted else 0.0,
        )
        files.remove_temporary_files(folder)
