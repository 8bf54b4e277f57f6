"""Train under torchrun, kill at random moments, run the same command again until it ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

COMMAND = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "portrait_dist",
    "train",
    "model.init_features=2",
    "model.norm=group",
    "train.max_epochs=4",
    "train.batch_size=2",
    "train.threads=1",
    "run.name=run",
    "train.save_every_steps=2",
)


def finish(shards: Path, root: Path, random: random.Random, kills: int) -> Path:
    """Train to the end with so many kills on the way; returns the run's folder."""
    command = [*COMMAND, f"data.shards={shards}", f"run.root={root}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for attempt in range(40):
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        family = [psutil.Process(process.pid)]
        if attempt < kills:
            time.sleep(random.uniform(8, 40))  # a random moment is the point
            family += family[0].children(recursive=True) if family[0].is_running() else []
            victim = random.choice(family)
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        code = process.wait(600)
        psutil.wait_procs(family, timeout=120)
        if code == 0:
            return root / "run"
    raise RuntimeError(f"{root}: not finished after 40 attempts")


def compare(reference: Path, run: Path) -> int:
    """Exit code 0 where all three checkpoints hold the same weights, to the bit."""
    import torch

    for name in ("ckpt_latest.pth", "ckpt_best.pth", "average_model.pth"):
        one = torch.load(reference / name, weights_only=True)["net"]
        other = torch.load(run / name, weights_only=True)["net"]
        if different := [key for key in one if not torch.equal(one[key], other[key])]:
            print(f"{name}: {len(different)} tensors differ, {different[0]}", file=sys.stderr)
            return 99
    return 0
