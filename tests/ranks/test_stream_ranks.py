"""The stream on real ranks: torchrun, gloo, one process each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.data import build_loader
from tests.damage import damage_sample, edit_manifest

JOB = Path(__file__).parents[1] / "stream_job.py"


def torchrun(
    ranks: int, action: str, shards: Path, out: Path, **options: Any
) -> tuple[list[dict[str, Any]], str, int]:
    """Return what each rank saw, stderr and the exit code."""
    out.mkdir()
    arguments = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    arguments += [str(JOB), action, str(shards), str(out), json.dumps(options)]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return (
        [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))],
        done.stderr,
        done.returncode,
    )


def global_batches(ranks: list[dict[str, Any]], name: str) -> list[list[str]]:
    longest = max(len(rank[name]) for rank in ranks)
    return [
        [key for rank in ranks if k < len(rank[name]) for key in rank[name][k]]
        for k in range(longest)
    ]


@pytest.fixture(scope="module")
def damaged_shards(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards with one bit changed in the sample that rank 1 meets first, with batches of 4."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(tiny_shards, folder)
    dataset = build_loader(tiny_shards, "train", 4, rank=1, world_size=2).dataset
    sample = int(next(dataset.batches(0, 0))[1][0])
    number, position = dataset.shards.locate(sample)
    damage_sample(folder, f"train-{number:05d}.tar", position)
    return folder


@pytest.fixture(scope="module")
def alone(tiny_shards: Path) -> dict[str, list[list[str]]]:
    """Global batches of 12 samples as one process sees them."""
    loader = build_loader(tiny_shards, "train", 12, seed=3, workers=-1)
    seen = {}
    for epoch in (0, 1, 2):
        loader.set_epoch(epoch)
        seen[f"epoch {epoch}"] = [batch.keys for batch in loader]
    seen["val"] = [batch.keys for batch in build_loader(tiny_shards, "val", 12)]
    return seen


def reverse_the_first_hash(manifest: dict[str, Any]) -> None:
    shard = manifest["splits"]["train"]["shards"][0]
    shard["sha256"] = shard["sha256"][::-1]


@pytest.fixture(scope="module")
def ranks(
    tiny_shards: Path, damaged_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What three ranks saw."""
    out = tmp_path_factory.mktemp("three") / "out"
    state = {
        "epoch": 2,
        "samples_seen": 24,
        "samples": 57,
        "seed": 3,
    }  # taken by one process with batches of 12
    copy = tmp_path_factory.mktemp("copy")  # the same pictures, packed in other bytes
    shutil.copy(tiny_shards / "manifest.json", copy)
    edit_manifest(copy, reverse_the_first_hash)
    copies = [str(tiny_shards), str(copy)]
    options = {"batch_size": 4, "state": state, "damaged": str(damaged_shards), "copies": copies}
    seen, errors, code = torchrun(3, "see", tiny_shards, out, **options)
    assert code == 0, errors
    assert errors.count("skipped: ") == 1
    return seen


def test_ranks_have_equally_many_batches(ranks: list[dict[str, Any]]) -> None:
    assert [rank["batches"] for rank in ranks] == [57 // 12] * 3
    assert [len(rank["epoch 0"]) for rank in ranks] == [57 // 12] * 3
    assert [rank["dropped"] for rank in ranks] == [57 % 12] * 3


def test_ranks_see_the_global_batches_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, list[list[str]]]
) -> None:
    assert global_batches(ranks, "epoch 0") == alone["epoch 0"]
    assert global_batches(ranks, "epoch 1") == alone["epoch 1"]


def test_ranks_resume_where_one_process_stopped(
    ranks: list[dict[str, Any]], alone: dict[str, list[list[str]]]
) -> None:
    assert global_batches(ranks, "rest") == alone["epoch 2"][2:]


def test_ranks_validate_every_key_once(
    ranks: list[dict[str, Any]], alone: dict[str, list[list[str]]]
) -> None:
    validated = [key for batch in global_batches(ranks, "val") for key in batch]
    assert sorted(validated) == sorted(key for batch in alone["val"] for key in batch)
    assert len(set(validated)) == len(validated) == 7


def test_ranks_that_would_see_other_batches_are_refused_before_the_first_step(
    ranks: list[dict[str, Any]],
) -> None:
    assert all("seed is 0 on rank 0 and 1 on rank 1" in rank["other seed"] for rank in ranks)
    assert all(
        "data is" in rank["other shards"] and "on rank 1; give every rank" in rank["other shards"]
        for rank in ranks
    )


def test_skipping_damage_keeps_the_ranks_in_step(ranks: list[dict[str, Any]]) -> None:
    assert [rank["skipping"]["steps"] for rank in ranks] == [57 // 12] * 3
    assert [len(rank["skipping"]["keys"]) for rank in ranks] == [16, 15, 16]
    assert [len(rank["skipping"]["damaged"]) for rank in ranks] == [0, 1, 0]


def test_damage_met_by_one_rank_stops_all_ranks_with_its_message(
    damaged_shards: Path, tmp_path: Path
) -> None:
    seen, errors, code = torchrun(
        2, "train", damaged_shards, tmp_path / "out", batch_size=4, on_damage="stop"
    )
    assert code != 0
    assert seen == []  # nobody got to the end, and nobody hangs: torchrun has returned
    assert "DamagedSampleError" in errors
    assert ".tar, sample" in errors
