"""launch/torchrun.sh on two nodes (two agents on this machine), and a signal to one of them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from portrait_dist.runs.status import run_status
from tests.jobs import TINY, checkpoint, lines
from tests.slurm.cluster import LAUNCH
from tests.waiting import wait_for


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
                    [str(LAUNCH / "torchrun.sh"), *arguments],
                    env=variables,
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        wait_for(lambda: lines(tmp_path / "run", "epoch"), 200, "the first epoch is trained")
        nodes[1].send_signal(signal.SIGUSR2)
        codes = [node.wait(60) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert 0 not in codes
    status = run_status(tmp_path / "run")
    log_text = (tmp_path / "log").read_text()[-4000:]
    assert (status.state, status.world_size) == ("stopped", 2), log_text
    assert checkpoint(tmp_path / "run")["epoch"] >= 1


def test_the_script_finds_the_environment_of_its_checkout_or_says_what_to_do(
    tmp_path: Path,
) -> None:
    script = tmp_path / "checkout" / "launch" / "torchrun.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(LAUNCH / "torchrun.sh", script)
    hidden = {"PYTHON", "VIRTUAL_ENV", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python").write_text("#!/bin/sh\nexit 1\n")
    (bare / "python").chmod(0o755)
    environment["PATH"] = f"{bare}:/usr/bin:/bin"

    def run() -> subprocess.CompletedProcess[str]:
        command = [str(script), "train.lrr=1"]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    done = run()
    assert done.returncode == 2
    assert "does not have portrait_dist; run 'uv sync'" in done.stderr
    found = script.parent.parent / ".venv" / "bin" / "python"
    found.parent.mkdir(parents=True)
    found.write_text(f'#!/bin/sh\necho "ran: $*" >&2\nexec {sys.executable} "$@"\n')
    found.chmod(0o755)
    done = run()
    assert "ran: -m torch.distributed.run" in done.stderr
    assert "Did you mean 'train.lr'" in done.stderr
