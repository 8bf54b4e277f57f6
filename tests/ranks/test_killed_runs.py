"""Killed at any file of an epoch and run again, a run leaves what an undisturbed one leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from portrait_dist.checkpoints import read, read_info
from tests.jobs import largest_difference, lines
from tests.ranks.killed_run import EPOCHS, deadly_names

NAMES = [
    f"{name}-{before}"
    for before in (False, True)
    for name in ("each", *(name for name, _ in deadly_names()))
]


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of the script, and that each was killed as planned."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.ranks.killed_run", str(tiny_shards), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    deaths = dict(line.split() for line in done.stdout.splitlines())
    assert sorted(deaths) == sorted(NAMES)
    assert all(int(count) == 1 for name, count in deaths.items() if not name.startswith("each"))
    # config.yaml, then for each epoch a snapshot, best or latest, and the average.
    assert all(int(count) >= 6 for name, count in deaths.items() if name.startswith("each"))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_a_file_the_average_equals_an_undisturbed_runs_to_the_bit(
    name: str, runs: Path
) -> None:
    run, reference = runs / name, runs / "undisturbed"
    for file in ("average_model.pth", "ckpt_latest.pth", "ckpt_best.pth"):
        ours, theirs = read(run / file), read(reference / file)
        assert largest_difference(ours["net"], theirs["net"]) == 0, file
        assert (ours["epoch"], ours["acc"]) == (theirs["epoch"], theirs["acc"]), file
    averaged = read_info(run / "average_model.pth").averaged
    assert averaged == read_info(reference / "average_model.pth").averaged
    assert averaged is not None
    assert [one.epoch for one in averaged] == list(range(1, EPOCHS + 1))


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_a_file_the_run_ends_with_its_end_line_and_without_snapshots(
    name: str, runs: Path
) -> None:
    run = runs / name
    assert lines(run)[-1]["kind"] == "end"
    left = {path.name for path in run.iterdir()} - {
        path.name for path in (runs / "undisturbed").iterdir()
    }
    assert not {entry for entry in left if "snapshot" in entry or "tmp" in entry}, left
    assert not (run / "averaging_snapshots").exists()


def test_the_undisturbed_average_is_the_mean_of_the_snapshots(runs: Path) -> None:
    """The run that was killed behind its last checkpoint still has all snapshots."""
    snapshots = runs / "ckpt_latest.pth-False-dead" / "averaging_snapshots"
    states = [read(snapshots / f"epoch-{epoch}.pth")["net"] for epoch in range(1, EPOCHS + 1)]
    mean = read(runs / "undisturbed" / "average_model.pth")["net"]
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            total = sum((state[name].double() for state in states), torch.zeros(()).double())
            assert torch.equal(tensor, (total / EPOCHS).float()), name
