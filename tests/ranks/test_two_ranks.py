"""What two ranks do together, in one start of two forked processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from portrait_dist.training.preemption import NOTHING, SAVE, STOP


@pytest.fixture(scope="module")
def two_ranks(
    tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What each rank found, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "tests.ranks.two_ranks", str(tiny_shards), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    return first, second, folder


def test_ranks_learn_of_a_stop_in_the_same_step_within_two_intervals(two_ranks: Any) -> None:
    first, second, _ = two_ranks
    assert first["stop"] == second["stop"]
    # Requested from call 5 on, submitted in call 8, read in call 12.
    assert first["stop"].index(STOP) == 12


def test_one_request_for_a_save_is_one_save_on_every_rank(two_ranks: Any) -> None:
    first, second, _ = two_ranks
    assert first["save"] == second["save"]
    assert first["save"] == [NOTHING] * 3 + [SAVE] + [NOTHING] * 5


def test_a_network_that_uses_other_parameters_in_each_step_trains_on_ranks(two_ranks: Any) -> None:
    first, second, _ = two_ranks
    assert first["skips"] == second["skips"] == 48


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_its_own_step_and_samples(
    two_ranks: Any,
) -> None:
    first, second, folder = two_ranks
    assert first["diverged"] == second["diverged"]
    assert "epoch 1, step 3 of 4, on rank 1" in first["diverged"]
    assert "nothing was saved yet" in first["diverged"]
    lines = (folder / "diverged" / "keys-rank1.jsonl").read_text().splitlines()
    trained = [json.loads(line)["keys"] for line in lines]
    assert first["keys"] == second["keys"] == trained[2]
    assert all(key in first["diverged"] for key in trained[2])
    assert (first["agreed"], first["quiet"], second["quiet"]) == (True, False, True)
    assert not (folder / "diverged" / "ckpt_latest.pth").exists()


def test_a_checkpoint_is_read_by_rank_0_alone_and_damage_is_everybodys_error(
    two_ranks: Any,
) -> None:
    first, second, folder = two_ranks
    saved = torch.load(folder / "skips" / "ckpt_latest.pth", weights_only=True)
    total = float(saved["net"]["layers.0.weight"].double().sum())
    assert first["read"] == second["read"] == total
    assert first["damaged"] == second["damaged"]
    assert "damaged.pth" in first["damaged"]


def test_states_of_ranks_are_gathered_on_rank_0_alone(two_ranks: Any) -> None:
    first, second, folder = two_ranks
    assert first["gathered"] == [0, 1]
    assert second["gathered"] is None
    saved = torch.load(folder / "skips" / "ckpt_latest.pth", weights_only=True)
    assert len(saved["portrait_dist"]["ranks"]) == 2
