"""launch/torchrun.sh as on two nodes (two agents on this machine), and a signal to one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from portrait_dist.runs.status import run_status
from tests.jobs import TINY, checkpoint, lines, wait_for
from tests.slurm.cluster import LAUNCH


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.timeout(600)
def test_two_nodes_train_one_model_and_a_signal_to_one_script_saves_and_stops_both(
    tiny_shards: Path, tmp_path: Path
) -> None:
    environment = os.environ | {
        "PYTHON": sys.executable,
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "MASTER_PORT": str(_free_port()),
    }
    arguments = [
        f"data.shards={tiny_shards}",
        f"run.root={tmp_path}",
        "run.name=run",
        *TINY,
        "train.max_epochs=2000",
    ]
    nodes = []
    with open(tmp_path / "log", "wb") as log:
        for rank in ("0", "1"):
            variables = environment | {"NODE_RANK": rank}
            nodes.append(
                subprocess.Popen(
                    [str(LAUNCH / "torchrun.sh"), *arguments], env=variables, stdout=log, stderr=log
                )
            )
    try:
        wait_for(
            lambda: lines(tmp_path / "run", "epoch"), "the first epoch is trained", seconds=200
        )
        nodes[1].send_signal(signal.SIGUSR2)
        codes = [node.wait(60) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert 0 not in codes
    state = run_status(tmp_path / "run")
    assert (state.state, state.world_size) == ("stopped", 2), (tmp_path / "log").read_text()[-4000:]
    assert checkpoint(tmp_path / "run")["epoch"] >= 1
