"""One node of a SLURM job: torchrun in this process, with flat log names and a telling exit code.

Plain ``torchrun --log-dir --tee`` would do without the imports from torch below, but it buries each
rank's log in ``<run id>_<random>/attempt_0/3/stderr.log`` and ends with 1 whatever a rank ended
with. Launches that are refused before there is a run folder (exit codes 2 and 3) would then be
requeued, because no metrics.jsonl tells why they ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    LogsDest,
    SignalException,
    Std,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from portrait_dist.errors import Stopped
from portrait_dist.slurm.allocation import Allocation, node_name
from portrait_dist.slurm.job import FAILURES
from portrait_dist.system.info import environment_number
from portrait_dist.training.launch import SECONDS_TO_SAVE, SIGNALS, TELLING


class RankLogs(DefaultLogsSpecs):
    """Each rank's output in two files of its own, and on the console.

    They are ``<folder>/<attempt>-rank<global rank>.out`` and ``.err``.

    Args:
        folder: where the files go; shared by all nodes of the job.
        attempt: begins the names, ``attempt2``; torchrun's own restarts within it add ``.1``, …
        scratch: folder for torchrun's own small files.
    """

    def __init__(self, folder: Path, attempt: str, scratch: str) -> None:
        super().__init__(log_dir=scratch, tee=Std.ALL)
        self.folder = folder
        self.attempt = attempt

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the files; ``envs`` holds each local rank's environment."""
        names = {local: self.folder / self._name(variables) for local, variables in envs.items()}
        out = {local: f"{name}.out" for local, name in names.items()}
        err = {local: f"{name}.err" for local, name in names.items()}
        # torchrun's own names lie in a folder of each node's disk and do not say the global rank.
        return dataclasses.replace(
            super().reify(envs), stdouts=out, stderrs=err, tee_stdouts=out, tee_stderrs=err
        )

    def _name(self, variables: dict[str, str]) -> str:
        restart = int(variables.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return f"{self.attempt}{f'.{restart}' if restart else ''}-rank{variables['RANK']}"


def run_node(address: str, logs: str, arguments: Sequence[str]) -> int:
    """Run torchrun until this node's ranks are gone.

    Args:
        address: of the first node, which hosts the rendezvous.
        logs: folder for the ranks' logs.
        arguments: those of ``portrait-dist``, the command first.

    Returns:
        0; an exit code of a failed rank that tells something (2, 3, 75); 75 after a signal; else 1.
    """
    allocation = Allocation.from_environment()
    threads = max(1, allocation.cpus // allocation.ranks_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    command = ["-u", "-m", "portrait_dist", *arguments]
    with tempfile.TemporaryDirectory(prefix="torchrun-") as scratch:
        launch = launch_config(allocation, environment_number("SLURM_NODEID"), address)
        launch.logs_specs = RankLogs(Path(logs), allocation.attempt, scratch)
        try:
            elastic_launch(launch, sys.executable)(*command)
        except SignalException:
            return Stopped.exit_code
        except ChildFailedError as error:
            return _report(error, Path(logs), allocation)
    return 0


def launch_config(allocation: Allocation, node: int, address: str) -> LaunchConfig:
    """Return torchrun's settings for one node: c10d rendezvous on the first node.

    Args:
        allocation: what SLURM gave the job.
        node: this node's number in the step; node 0 hosts the rendezvous.
        address: the first node's.
    """
    return LaunchConfig(
        min_nodes=allocation.nodes,
        max_nodes=allocation.nodes,
        nproc_per_node=allocation.ranks_per_node,
        max_restarts=environment_number("MAX_RESTARTS"),
        rdzv_backend="c10d",
        rdzv_endpoint=f"{address}:{allocation.port}",
        # Said, not guessed: torch compares host names, which differ between SLURM and the resolver.
        rdzv_configs={"is_host": node == 0},
        run_id=f"{allocation.job}-{allocation.attempt}",
        signals_to_handle=SIGNALS,
        log_line_prefix_template="[rank ${rank}] ",
    )


def _report(error: ChildFailedError, logs: Path, allocation: Allocation) -> int:
    """Print and write down which rank failed and where its log is; return the exit code."""
    telling = {
        rank: failure for rank, failure in error.failures.items() if failure.exitcode in TELLING
    }
    rank, failure = next(iter(telling.items()), None) or error.get_first_failure()
    how = (
        f"exit code {failure.exitcode}"
        if failure.exitcode >= 0
        else f"killed by {failure.signal_name()}"
    )
    file = logs / f"{allocation.attempt}-rank{rank}.err"
    line = f"node {node_name()}: rank {rank} failed ({how}); its log is {file}"
    print(line, file=sys.stderr, flush=True)
    if failure.exitcode in TELLING:
        return failure.exitcode
    if failure.exitcode != -signal.SIGTERM:  # by that torchrun ends the ranks of other nodes
        record = {
            "attempt": allocation.restarts + 1,
            "node": node_name(),
            "time": failure.timestamp,
        }
        with contextlib.suppress(OSError), open(logs / FAILURES, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
    return 1
