"""torchrun on one node of a SLURM job, as ``portrait_dist.slurm.job`` starts it: the same options, entry and signals as on the
command line, with flat names for the ranks' log files, and an exit code that says why it ended.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from portrait_dist.errors import DamagedDataError, InputError, Stopped

TELLING = (InputError.exit_code, DamagedDataError.exit_code, Stopped.exit_code)


class RankLogs(DefaultLogsSpecs):
    """Each rank's stdout and stderr in ``<folder>/<turn>-rank<global rank>.out`` and ``.err``, and on the console.

    Args:
        folder: where the files go; shared by all nodes of the job.
        turn: begins the names, ``turn2``; torchrun's own restarts within a turn add ``.1``, ``.2``, …
        scratch: folder for torchrun's own small files.
    """

    def __init__(self, folder: Path, turn: str, scratch: str) -> None:
        super().__init__(log_dir=scratch, tee=Std.ALL)
        self.folder = folder
        self.turn = turn

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the files; ``envs`` holds each local rank's environment."""
        names = {local: self.folder / self._name(variables) for local, variables in envs.items()}
        out = {local: f"{name}.out" for local, name in names.items()}
        err = {local: f"{name}.err" for local, name in names.items()}
        return dataclasses.replace(
            super().reify(envs), stdouts=out, stderrs=err, tee_stdouts=out, tee_stderrs=err
        )

    def _name(self, variables: dict[str, str]) -> str:
        attempt = int(variables.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return f"{self.turn}{f'.{attempt}' if attempt else ''}-rank{variables['RANK']}"


def run_torchrun(options: Sequence[Any], logs: Path, turn: str, words: Sequence[str]) -> int:
    """Run ``torchrun OPTIONS -m portrait_dist train WORDS`` in this process until its ranks are gone.

    Returns:
        0, or an exit code of a failed rank that tells something (2, 3, 75), 75 after a signal, else 1.
    """
    arguments = [*map(str, options), "-m", "portrait_dist", "train", *words]
    with tempfile.TemporaryDirectory(prefix="torchrun-") as scratch:
        config, command, rest = config_from_args(parse_args(["--log-dir", scratch, *arguments]))
        config.logs_specs = RankLogs(logs, turn, scratch)
        try:
            elastic_launch(config, command)(*rest)
        except SignalException:
            return Stopped.exit_code
        except ChildFailedError as error:
            return _explain(error, logs, turn)
    return 0


def _explain(error: ChildFailedError, logs: Path, turn: str) -> int:
    telling = {
        rank: failure for rank, failure in error.failures.items() if failure.exitcode in TELLING
    }
    rank, failure = next(iter(telling.items()), None) or error.get_first_failure()
    how = (
        f"exit code {failure.exitcode}"
        if failure.exitcode >= 0
        else f"killed by {failure.signal_name()}"
    )
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    line = f"node {host}: rank {rank} failed ({how}); its log is {logs}/{turn}-rank{rank}.err"
    print(line, file=sys.stderr, flush=True)
    return failure.exitcode if failure.exitcode in TELLING else 1
