"""Which rank is slow, how long a step may take, and which rank the others wait for."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.runs.health import find_stall, operations_of, read_heartbeats, read_operations
from portrait_dist.training.health import (
    RankTimes,
    StepTimeout,
    find_straggler,
    record_collectives,
)

NORMAL = RankTimes(step=0.070, data=0.0, compute=0.010, other=0.0)


def test_a_rank_that_waits_for_data_differs_from_one_that_computes_slowly_or_is_held_up() -> None:
    """All steps take 70 ms. A normal rank needs 40 of them, of which its own backward is 30."""
    slow = {
        "waits for data": RankTimes(0.070, 0.030, 0.010, 0.0),
        "computes slowly": RankTimes(0.070, 0.0, 0.0175, 0.0),
        "is held up between its steps": RankTimes(0.070, 0.0, 0.010, 0.030),
    }
    for reason, times in slow.items():
        found = find_straggler([NORMAL, NORMAL, times, NORMAL])
        assert found is not None
        assert (found.rank, found.reason) == (2, reason)
        assert found.relative_speed == pytest.approx(40 / 70)
        assert found.own_seconds == pytest.approx(0.070)
        assert found.message("node7").startswith("rank 2 on node7 runs at 0.57 of the median: ")
    assert find_straggler([NORMAL] * 8) is None
    assert find_straggler([NORMAL]) is None


def test_the_timeout_of_a_step_is_ten_of_the_slowest_and_at_least_a_minute() -> None:
    timeout = StepTimeout([], long_seconds=600)
    for slowest, seconds in ((0.5, 60), (12.0, 120), (3.0, 120), (90.0, 600)):
        timeout.note(slowest)
        timeout.shorten()
        assert timeout.seconds == seconds
    timeout.lengthen()
    assert timeout.seconds == 600
    chosen = StepTimeout([], long_seconds=600, step_seconds=7)
    chosen.shorten()
    assert chosen.seconds == 7
    waits_for_a_server = StepTimeout([], long_seconds=3600, least_seconds=660)
    waits_for_a_server.shorten()
    assert waits_for_a_server.seconds == 660


def beat(folder: Path, rank: int, written: float | None = None, **values: object) -> None:
    """Write a rank's heartbeat."""
    folder.mkdir(exist_ok=True)
    usual = {
        "rank": rank,
        "host": f"node{rank}",
        "world_size": 3,
        "collectives": 1204,
        "batches": 400,
        "activity": "averages gradients",
        "idle_seconds": 40.0,
        "interval_seconds": 1.0,
        "slowest_seconds": 0.5,
    }
    path = folder / f"rank-{rank}.json"
    path.write_text(json.dumps(usual | values))
    if written is not None:
        os.utime(path, (written, written))


def test_a_rank_that_began_fewer_collectives_is_the_one_that_the_others_wait_for(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "health"
    beat(folder, 0)
    beat(folder, 1, collectives=1203, activity="waits for data")
    beat(folder, 2)
    entry = {
        "collective_seq_id": 1204,
        "profiling_name": "nccl:all_reduce",
        "process_group": ("0", "default_pg"),
    }
    other_group = entry | {"process_group": ("1", ""), "profiling_name": "gloo:all_gather"}
    (folder / "nccl-2").write_bytes(pickle.dumps({"entries": [entry, other_group]}))
    stall = find_stall(folder)
    assert stall is not None
    assert [one.rank for one in stall.missing] == [1]
    assert "rank 1 on node1 did not reach all_reduce 1,204 (waits for data)" in stall.message
    assert "the others have waited for 4" in stall.message


def test_ranks_that_step_validate_save_or_have_ended_are_no_stall(tmp_path: Path) -> None:
    folder = tmp_path / "health"
    assert find_stall(folder) is None
    for rank in range(3):
        beat(folder, rank, idle_seconds=1.0)
    assert find_stall(folder) is None, "they continue"
    for rank in range(3):
        beat(folder, rank, activity="is not in a training step")
    assert find_stall(folder) is None, "they validate"
    for rank in range(3):
        beat(folder, rank, slowest_seconds=30.0)
    assert find_stall(folder) is None, "five of their slowest steps take longer"
    for rank in range(3):
        beat(folder, rank, collectives=1204 - rank, written=time.time() - 3600)
    assert find_stall(folder) is None, "their processes are gone"


def test_a_stall_of_all_ranks_in_one_collective_points_at_the_network(tmp_path: Path) -> None:
    for rank in range(3):
        beat(tmp_path / "health", rank)
    stall = find_stall(tmp_path / "health")
    assert stall is not None
    assert stall.missing == ()
    assert "all ranks are in collective 1,204" in stall.message
    assert "network" in stall.message


def test_a_rank_whose_process_does_not_run_or_never_reported_is_named(tmp_path: Path) -> None:
    folder, now = tmp_path / "health", time.time()
    beat(folder, 0, written=now)
    beat(folder, 1, written=now - 30, collectives=1203)
    stall = find_stall(folder, now=now)
    assert stall is not None
    assert "rank 1 on node1" in stall.message
    assert "its process does not run, silent for 30 s" in stall.message
    assert "rank 2 never reported" in stall.message


def test_damaged_files_are_ignored_and_no_pickle_executes_code(tmp_path: Path) -> None:
    folder = tmp_path / "health"
    beat(folder, 0)
    for rank, content in ((1, b"\xff"), (2, b'{"rank": 2}'), (3, b"[" * 100_000)):
        (folder / f"rank-{rank}.json").write_bytes(content)
    beat(folder, 4, world_size=-1)
    beat(folder, 5, idle_seconds="long")
    os.mkfifo(folder / "rank-6.json")
    assert list(read_heartbeats(folder)) == [0]
    witness = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (witness,))

    (folder / "nccl-1").write_bytes(pickle.dumps({"entries": [Attack()]}))
    (folder / "nccl-2").write_bytes(b"\x80\x05garbage")
    (folder / "collectives-3.json").write_text('{"entries": [1, {"collective_seq_id": "x"}]}')
    assert read_operations(folder) == {}
    assert not witness.exists()


def test_torchs_own_record_of_collectives_is_understood(tmp_path: Path) -> None:
    """Two collectives of a group of one rank, recorded by torch, read as JSON and as pickle."""
    import subprocess
    import sys

    code = (
        "import sys, torch, torch.distributed as dist\n"
        "from torch._C import _distributed_c10d as c10d\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "for _ in range(2): dist.all_reduce(torch.ones(1))\n"
        "what = dict(includeCollectives=True, onlyActive=False)\n"
        "record = c10d._dump_fr_trace(includeStackTraces=False, **what)\n"
        "open(sys.argv[1] + '/nccl-0', 'wb').write(record)\n"
        "record = c10d._dump_fr_trace_json(**what)\n"
        "open(sys.argv[1] + '/collectives-0.json', 'wb').write(record)\n"
    )
    environment = os.environ | {"TORCH_FR_BUFFER_SIZE": "10"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    for name in ("nccl-0", "collectives-0.json"):
        only = tmp_path / name.partition("-")[0]
        only.mkdir()
        (tmp_path / name).rename(only / name)
        assert read_operations(only) == {1: "all_reduce", 2: "all_reduce"}, name
    assert operations_of("nonsense") == {}


def test_the_record_of_collectives_is_on_by_default_and_lies_in_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    record_collectives(tmp_path / "run")
    assert int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0
    assert os.environ["TORCH_FR_DUMP_ON_TIMEOUT"] == "1"
    # torch puts the rank behind it.
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "run" / "health" / "nccl-")
    monkeypatch.setattr(os, "environ", {"TORCH_FR_BUFFER_SIZE": "0"})
    record_collectives(tmp_path / "run")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "0", "what the user has set stays"


def test_a_rank_that_stopped_outside_a_step_is_named_as_soon_as_one_that_stopped_in_it(
    tmp_path: Path,
) -> None:
    """What it said last is old: it may have been suspended before it could say more."""
    folder, now = tmp_path / "health", time.time()
    for rank, written in ((0, now), (1, now - 20), (2, now)):
        late = {"collectives": 1203, "activity": "is not in a training step"} if rank == 1 else {}
        beat(folder, rank, written=written, idle_seconds=20.0, **late)
    stall = find_stall(folder, now=now)
    assert stall is not None
    assert [one.rank for one in stall.missing] == [1]
    assert "its process does not run, silent for 20 s" in stall.message
    beat(folder, 1, written=now, collectives=1203, activity="is not in a training step")
    assert find_stall(folder, now=now) is None, "it validates, and says so"
