"""Start training jobs as users do: real torchrun, real processes, and look at what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tests import waiting
from tests.cli import Result, call

# Small enough that a job is little more than its imports; no batch norm, so that the number of
# ranks changes nothing but rounding.
TINY = (
    "train.threads=1",
    "model.init_features=2",
    "model.norm=group",
    "train.max_epochs=3",
    "train.average_best=false",
    "train.pictures=0",
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@dataclass
class Job:
    """A started job and where its output goes."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, timeout: float = 240) -> int:
        """Exit code of torchrun, or of the only process."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(
                f"still running after {timeout} s:\n{self.text()[-4000:]}"
            ) from None

    def text(self) -> str:
        """Read stdout and stderr of all ranks."""
        return self.log.read_text(errors="replace")

    def result(self) -> dict[str, Any]:
        """Return the last JSON object on stdout; the job must have succeeded.

        Attempts that torchrun restarted have left an object with their error before it.
        """
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.text()[-6000:]}"
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.read().splitlines()[-1])
        return found

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in the order of their ranks."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [
            child
            for child in children
            if "RANK" in _environment(child) and "torch.distributed.run" not in child.cmdline()
        ]
        return sorted(found, key=lambda child: int(_environment(child)["RANK"]))

    def end(self) -> None:
        """Kill what is left of the job."""
        try:
            family = [
                psutil.Process(self.process.pid),
                *psutil.Process(self.process.pid).children(recursive=True),
            ]
        except psutil.NoSuchProcess:
            return
        for process in family:
            with _gone_is_fine():
                process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        yield


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return {}


PLAIN = str(Path(__file__).parent / "plain.yaml")


def train(
    folder: Path,
    shards: Path,
    *keys: str,
    ranks: int = 1,
    launcher: tuple[str, ...] = (),
    prefix: tuple[str, ...] = (),
    name: str = "run",
    recipe: str = PLAIN,
    nproc: int = 0,
) -> Job:
    """Start ``portrait-dist train --json`` alone (``ranks=0``) or under torchrun.

    Args:
        folder: run.root; the log stands beside the runs.
        shards: data.shards.
        keys: settings.
        ranks: processes under torchrun; 0 for none.
        name: run.name.
        recipe: its name or file.
        launcher: torchrun options in place of ``--standalone --nproc-per-node ranks``.
        prefix: arguments before the command, such as ``ip netns exec NAME``.
        nproc: start so many ranks by ``train --nproc``, without torchrun's command line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = launcher or ("--standalone", f"--nproc-per-node={ranks}")
    start = (sys.executable,) if ranks == 0 or nproc else (*TORCHRUN, *options)
    command = [*prefix, *start, "-m", "portrait_dist", "train", "--json", "--recipe", recipe]
    command += [f"data.shards={shards}", f"run.root={folder}", f"run.name={name}", *TINY, *keys]
    command += ["--nproc", str(nproc)] if nproc else []
    log = folder / f"{name}-{time.time_ns()}.log"
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=environment)
    return Job(process, log)


def wait_for(
    condition: Callable[[], Any], what: str, job: Job | None = None, seconds: float = 120
) -> Any:
    """Wait until the condition holds and return its value; fail at once where the job has ended."""

    def holds() -> Any:
        value = condition()
        if not value and job is not None and job.process.poll() is not None and not condition():
            raise AssertionError(f"the job ended before {what}:\n{job.text()[-4000:]}")
        return value

    return waiting.wait_for(holds, seconds, what)


def lines(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, of one kind or all."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    # The last line may be on its way to the disk.
    found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def checkpoint(run: Path, name: str = "ckpt_latest.pth") -> dict[str, Any]:
    """A checkpoint, read as anybody may read it."""
    return torch.load(run / name, map_location="cpu", weights_only=True)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two state dicts."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def train_into(root: Path, shards: Path | str, *keys: str) -> Result:
    """Call ``train`` in this process for a tiny run named ``run``."""
    return call(
        "train",
        "--json",
        "--recipe",
        PLAIN,
        f"data.shards={shards}",
        f"run.root={root}",
        "run.name=run",
        "train.batch_size=19",
        *TINY,
        *keys,
    )


def state_of(run: Path) -> dict[str, str]:
    """Hash every file of a run folder but the lock."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
