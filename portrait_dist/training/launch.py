"""Start the ranks of one machine: ``portrait-dist train --nproc N``, which is torchrun done right.

Plain ``torchrun -m portrait_dist train`` works too, but dies of USR2, gives each rank one thread,
and ends with 1 whatever a rank ended with. This starts torchrun's agent in this process: a signal
to it (TERM, INT, HUP, QUIT, USR2) reaches all ranks, which save at the same step; then their exit
code is this process's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError, Stopped
from portrait_dist.system.info import cores
from portrait_dist.training.results import TrainResult

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
"""What torchrun hands on to the ranks; by default it dies of USR2."""
SECONDS_TO_SAVE = 100
"""Seconds between such a signal and the kill; torchrun's own default is 30."""
TELLING = (InputError.exit_code, DamagedDataError.exit_code, Stopped.exit_code)
"""Exit codes of a rank that say what follows; every other failure is a 1."""


def ranks_here(wish: str) -> int:
    """Return the number of ranks to start.

    Args:
        wish: a number; ``gpu``: one for each GPU; ``auto``: the same, or two on a machine without
            GPUs (one where there is one core).

    Raises:
        InputError: not one of these, or ``gpu`` without one.
    """
    if wish.isascii() and wish.isdigit() and 1 <= int(wish[:5]) <= 4096 and len(wish) <= 5:
        return int(wish)
    if wish not in ("auto", "gpu"):
        raise InputError(f"--nproc {wish}: give a number of ranks from 1 to 4096, auto, or gpu")
    import torch

    gpus = torch.cuda.device_count()
    if wish == "gpu" and not gpus:
        raise InputError("--nproc gpu: torch sees no GPU here; see 'portrait-dist doctor'")
    return gpus or min(2, cores())


def run(ranks: int, arguments: Sequence[str]) -> TrainResult:
    """Run ``portrait-dist train ARGUMENTS`` on ranks of this machine until they are gone.

    Args:
        ranks: how many.
        arguments: those of ``train``, without ``--nproc`` and ``--json``.

    Returns:
        Rank 0's result.

    Raises:
        InputError: this process is a rank itself.
        Stopped: a signal stopped the ranks after they saved.
        PortraitDistError: a rank failed; it has said why, and its exit code is the error's.
    """
    if "RANK" in os.environ:
        raise InputError("--nproc: this process is a rank already; start it without torchrun")
    # torchrun would give each rank one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    # After the check above: torch costs seconds.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _silence_torchrun()
    command = ["-u", "-m", "portrait_dist", "train", "--json", *arguments]
    with tempfile.TemporaryDirectory(prefix="portrait-dist-") as scratch, _handlers_restored():
        try:
            elastic_launch(_settings(ranks, scratch), sys.executable)(*command)
        except SignalException as stopped:
            return _after_signal(_outputs(Path(scratch)), stopped)
        except ChildFailedError as error:
            raise _failure(_outputs(Path(scratch)), error) from None
        return TrainResult(**_outputs(Path(scratch))[0])


def _settings(ranks: int, scratch: str) -> LaunchConfig:
    """Return torchrun's settings: stdout of each rank into a file, stderr to the console."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    # A terminal gets the ranks' stderr itself, for the progress bar; a log file gets prefixes.
    tee = Std.NONE if sys.stderr.isatty() else Std.ERR
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        logs_specs=DefaultLogsSpecs(log_dir=scratch, redirects=Std.OUT, tee=tee),
        signals_to_handle=SIGNALS,
        log_line_prefix_template="[rank ${rank}] ",
    )


def _silence_torchrun() -> None:
    """Drop torchrun's own lines about a failure: the rank's line says more."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _handlers_restored() -> Iterator[None]:
    """Give the signals back that torchrun takes."""
    numbers = [signal.Signals[name] for name in SIGNALS.split(",")]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outputs(scratch: Path) -> dict[int, dict[str, Any]]:
    """Return the JSON object that each rank printed, by rank; most ranks print none."""
    found = {}
    for path in scratch.glob("**/stdout.log"):
        with contextlib.suppress(ValueError):
            value = json.loads(path.read_bytes())
            if isinstance(value, dict):
                found[int(path.parent.name)] = value
    return found


def _after_signal(outputs: dict[int, dict[str, Any]], signalled: SignalException) -> TrainResult:
    if 0 in outputs and "exit_code" not in outputs[0]:  # it had just finished
        return TrainResult(**outputs[0])
    for output in outputs.values():
        if output.get("exit_code") == Stopped.exit_code:
            stopped = Stopped(str(output.get("error", "")))
            stopped.quiet = True
            raise stopped
    name = signal.Signals(signalled.sigval).name
    raise PortraitDistError(
        f"stopped by {name} before the ranks were ready to save; run the same command again"
    )


def _failure(outputs: dict[int, dict[str, Any]], failed: ChildFailedError) -> PortraitDistError:
    """Make the error of the rank that has the reason."""
    codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
    # A rank that tells something has the reason; the others fail in its wake.
    code = next((code for code in codes.values() if code in TELLING), 1)
    reasons = [output for output in outputs.values() if output.get("exit_code") == code]
    if reasons:
        error = PortraitDistError(str(reasons[0].get("error", "")), result=reasons[0])
        error.quiet = True  # the rank has printed it
    else:
        rank, failure = failed.get_first_failure()
        how = (
            f"exit code {failure.exitcode}"
            if failure.exitcode >= 0
            else f"killed by {failure.signal_name()}"
        )
        error = PortraitDistError(
            f"rank {rank} ended without a message ({how}); run the same command again to resume"
        )
    error.exit_code = code
    return error
