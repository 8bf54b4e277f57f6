"""A run that kills itself at a file, again and again until it is done; forked for each attempt.

Usage: python -m tests.ranks.killed_run SHARDS FOLDER
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from portrait_dist.config import load
from portrait_dist.training import main, sg_adapter  # noqa: F401  imported before the forks

EPOCHS = 4
SETTINGS = (
    "model.init_features=2",
    "train.batch_size=12",
    f"train.max_epochs={EPOCHS}",
    "train.pictures=0",
    "train.threads=1",
    "train.ema=true",
    "train.ema_decay=0.5",
    "data.workers=-1",
)
Fatal = Callable[[str, int], bool]
"""(name of the file, how often this attempt has renamed something) → is this the end?"""


def attempt(shards: str, folder: Path, name: str, fatal: Fatal | None, before: bool) -> bool:
    """Train in a child that dies at a rename; returns whether it ended by itself.

    Args:
        shards: data.shards.
        folder: run.root.
        name: run.name.
        fatal: which rename kills; None for none.
        before: whether it dies before the rename or behind it.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        return not os.WIFSIGNALED(status)
    code = 1
    try:
        if fatal:
            die_at(fatal, before)
        keys = [f"data.shards={shards}", f"run.root={folder}", f"run.name={name}", *SETTINGS]
        main.train(load(None, keys))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def die_at(fatal: Fatal, before: bool) -> None:
    """Put a trap into os.replace."""
    replace, count = os.replace, 0

    def trapped(source: str, target: str) -> None:
        nonlocal count
        count += 1
        deadly = fatal(Path(target).name, count)
        if not (deadly and before):
            replace(source, target)
        if deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = trapped  # type: ignore[assignment]


def deadly_names() -> Iterator[tuple[str, int]]:
    """Each file of the last epoch; occurrences count from the start of the run."""
    yield f"epoch-{EPOCHS}.pth", 1
    yield "ckpt_latest.pth", EPOCHS
    yield "average_model.pth", EPOCHS


def rename(number: int) -> Fatal:
    """The n-th rename of an attempt, whatever its name."""
    return lambda name, count: count == number


def occurrence(name: str, number: int) -> Fatal:
    """The n-th rename to a name in one attempt."""
    seen = 0

    def fatal(target: str, count: int) -> bool:
        nonlocal seen
        seen += target == name
        return target == name and seen == number

    return fatal


def main_() -> None:
    """Train undisturbed, then with kills; leave the runs for the test to compare."""
    shards, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    assert attempt(shards, folder, "undisturbed", None, False)
    for before in (False, True):
        name, deaths = f"each-{before}", 0
        # Each attempt gets one rename further than the one before it.
        while not attempt(shards, folder, name, rename(deaths + 1), before):
            deaths += 1
        print(name, deaths, flush=True)
        for target, number in deadly_names():
            name = f"{target}-{before}"
            died = not attempt(shards, folder, name, occurrence(target, number), before)
            print(name, int(died), flush=True)
            shutil.copytree(folder / name, folder / f"{name}-dead")
            assert attempt(shards, folder, name, None, False)


if __name__ == "__main__":
    main_()
