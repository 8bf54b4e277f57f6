"""Train on two ranks, kill at random moments, run the same command again until it ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.campaign.case import TEMPORARY

TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "portrait_dist", "train"),
)
LAUNCHER = (sys.executable, "-m", "portrait_dist", "train", "--nproc", "2")
SETTINGS = (
    "model.init_features=2",
    "model.norm=group",
    "train.max_epochs=4",
    "train.batch_size=2",
    "train.threads=1",
    "run.name=run",
    "train.save_every_steps=2",
)
FILES = ("metrics.jsonl", "ckpt_latest.pth", "ckpt_best.pth", "average_model.pth")
HARD = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ATTEMPTS = 40


@dataclass(frozen=True)
class Kill:
    """A disturbance.

    Args:
        file: of the run folder, whose changes are counted; empty for the number of processes.
        changes: after how many of them.
        delay: seconds after that.
        victim: which process of the family; -1 for the one that was started.
        number: the signal.
    """

    file: str
    changes: int
    delay: float
    victim: int
    number: signal.Signals

    def __str__(self) -> str:
        who = "the launcher" if self.victim < 0 else f"process {self.victim}"
        return f"{self.number.name} to {who} at change {self.changes} of {self.file or 'its start'}"


def schedule(draw: random.Random, kills: int) -> list[Kill]:
    """Draw disturbances. Their moments follow the run's own progress, not the clock."""
    return [
        Kill(
            draw.choice(("", *FILES)),
            draw.randrange(1, 5),
            draw.choice([0.0, 0.0, draw.uniform(0, 1)]),
            draw.choice([-1, 0, 1, 2]),
            draw.choice(HARD),
        )
        for _ in range(kills)
    ]


def finish(
    shards: Path, root: Path, kills: Sequence[Kill] = (), launcher: Sequence[str] = TORCHRUN
) -> Path:
    """Train to the end with these disturbances on the way; returns the run's folder."""
    command = [*launcher, *SETTINGS, f"data.shards={shards}", f"run.root={root}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (root.parent / f"{root.name}.log").open("ab") as log:
        for attempt in range(ATTEMPTS):
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            family = {process.pid: psutil.Process(process.pid)}
            if attempt < len(kills):
                _disturb(kills[attempt], process, family, root / "run")
            _remember(family, process.pid)
            code = process.wait()
            psutil.wait_procs(list(family.values()))  # ranks whose launcher was killed end too
            if code == 0:
                return root / "run"
    raise RuntimeError(f"{root}: not finished after {ATTEMPTS} attempts")


def _disturb(
    kill: Kill, process: subprocess.Popen[bytes], family: dict[int, psutil.Process], run: Path
) -> None:
    count = _changes(run / kill.file) if kill.file else lambda: len(family) - 1
    while process.poll() is None:
        _remember(family, process.pid)
        if count() >= kill.changes:
            time.sleep(kill.delay)  # a random moment is the point
            _remember(family, process.pid)
            others = [one for one in family.values() if one.pid != process.pid]
            victim = others[kill.victim % len(others)] if kill.victim >= 0 and others else None
            with contextlib.suppress(psutil.NoSuchProcess):
                (victim or family[process.pid]).send_signal(kill.number)
            return
        time.sleep(0.02)  # between two looks at the processes and the file


def _changes(path: Path) -> Callable[[], int]:
    """Return what counts how often a file was replaced or grew since now."""
    seen: list[tuple[int, int]] = [_state(path)]

    def count() -> int:
        if (state := _state(path)) != seen[-1]:
            seen.append(state)
        return len(seen) - 1

    return count


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_ino, found.st_size)


def _remember(family: dict[int, psutil.Process], pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in psutil.Process(pid).children(recursive=True):
            family.setdefault(one.pid, one)


def compare(reference: Path, run: Path) -> int:
    """Exit code 0 where all three checkpoints hold the same weights, to the bit."""
    import torch

    for name in ("ckpt_latest.pth", "ckpt_best.pth", "average_model.pth"):
        one = torch.load(reference / name, weights_only=True)["net"]
        other = torch.load(run / name, weights_only=True)["net"]
        if different := [key for key in one if not torch.equal(one[key], other[key])]:
            print(f"{name}: {len(different)} tensors differ, {different[0]}", file=sys.stderr)
            return 99
    left = [path.name for path in run.rglob("*") if TEMPORARY.search(path.name)]
    if left or (run / "averaging_snapshots").exists():
        print(f"left behind: {left or 'averaging_snapshots'}", file=sys.stderr)
        return 98
    return 0
