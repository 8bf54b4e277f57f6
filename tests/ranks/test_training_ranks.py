"""One model on any number of ranks and nodes: one writer, exact validation, as one process."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import TORCHRUN, checkpoint, largest_difference, lines, train

PLAIN_STEPS = ("train.optimizer=sgd", "train.lr=0.3")
"""Adam divides by small numbers, so that it makes large differences of the last bits."""
WEIGHTS = 1e-5
LOSSES = 1e-6
"""fp32: sums over ranks are taken in another order."""
GLOBAL_BATCH = 12


@pytest.fixture(scope="module")
def one_process(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: one process without torchrun and with the whole global batch."""
    root = tmp_path_factory.mktemp("one")
    keys = (*PLAIN_STEPS, f"train.batch_size={GLOBAL_BATCH}")
    result = train(root, tiny_shards, *keys, ranks=0).result()
    assert result["world_size"] == 1
    assert result["epochs"] == 3
    assert result["steps"] == 12
    assert result["samples_seen"] == 3 * 48
    return root / "run"


def assert_same_run(run: Path, reference: Path) -> None:
    """Same samples, losses, validation scores and weights, up to rounding."""
    ours, theirs = lines(run, "epoch"), lines(reference, "epoch")
    assert [line["samples_seen"] for line in ours] == [line["samples_seen"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert abs(one["loss"] - other["loss"]) < LOSSES
        assert abs(one["val_loss"] - other["val_loss"]) < LOSSES
        assert abs(one["val_iou"] - other["val_iou"]) < 1e-3
    assert largest_difference(checkpoint(run)["net"], checkpoint(reference)["net"]) < WEIGHTS


@pytest.fixture(scope="module")
def tuned(one_process: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that two ranks fine-tune for an epoch, with curves in ``mlruns`` too."""
    folder = tmp_path_factory.mktemp("tuned")
    keys = (
        "run.logger=mlflow",
        f"model.weights={one_process / 'ckpt_latest.pth'}",
        "train.lr=1e-12",
        "train.max_epochs=1",
        "train.batch_size=6",
    )
    store = (f"MLFLOW_TRACKING_URI=file://{folder}/mlruns", "MLFLOW_ALLOW_FILE_STORE=true")
    job = train(folder, tiny_shards, *keys, ranks=2, prefix=("env", *store))
    assert job.result()["world_size"] == 2
    assert "continues without it" not in job.text()
    return folder


def test_fine_tuning_begins_where_the_given_checkpoint_ended(
    one_process: Path, tuned: Path
) -> None:
    before, after = checkpoint(one_process)["net"], checkpoint(tuned / "run")["net"]
    assert largest_difference(after, before) < 1e-6


def test_of_two_ranks_rank_0_alone_sends_a_run_to_the_tracker_and_each_value_once(
    tuned: Path,
) -> None:
    (found,) = (tuned / "mlruns").glob("*/*/meta.yaml")
    known = json.loads((tuned / "run" / "tracker.json").read_text())
    assert found.parent.name == known["id"]
    (epoch,) = lines(tuned / "run", "epoch")
    for tag, value in (("iou/val", epoch["val_iou"]), ("loss/train", epoch["loss"])):
        ((_, sent, step),) = (
            line.split() for line in (found.parent / "metrics" / tag).read_text().splitlines()
        )
        assert (float(sent), step) == (pytest.approx(value), "1")


@pytest.mark.parametrize("ranks", [2, 3])
def test_n_ranks_train_the_same_model_as_one_process_with_the_same_global_batch(
    ranks: int, one_process: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    keys = (*PLAIN_STEPS, f"train.batch_size={GLOBAL_BATCH // ranks}")
    result = train(tmp_path, tiny_shards, *keys, ranks=ranks).result()
    assert result["world_size"] == ranks
    assert_same_run(tmp_path / "run", one_process)


def test_two_nodes_train_one_model_and_rank_0_alone_writes(
    one_process: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """Two torchrun agents with two ranks each on this machine: LOCAL_RANK is not RANK."""
    keys = (*PLAIN_STEPS, f"train.batch_size={GLOBAL_BATCH // 4}", "train.save_every_steps=1")
    rendezvous = (
        "--nnodes=2",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:29611",
        "--rdzv-id=two",
    )
    jobs = [train(tmp_path, tiny_shards, *keys, launcher=rendezvous) for _ in range(2)]
    outputs = []
    for job in jobs:
        assert job.wait() == 0, job.text()[-4000:]
        assert job.process.stdout is not None
        outputs.append(job.process.stdout.read())
    assert sorted(bool(output) for output in outputs) == [False, True], (
        "one rank of all prints the result"
    )
    run = tmp_path / "run"
    assert_same_run(run, one_process)
    writers = {path.name.rsplit(".", 2)[1] for path in run.glob("events.out.tfevents.*")}
    assert len(writers) == 1, (
        "one process writes TensorBoard's files (their names end in process and number)"
    )
    assert len(list(run.glob("experiment_logs_*.txt"))) == 1
    assert len(lines(run, "start")) == 1


def test_validation_on_uneven_counts_equals_one_process_to_1e_6(
    one_process: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """The same weights on 7 samples: one rank has 4, the other 3, in batches of 2."""
    command = [
        "-m",
        "portrait_dist",
        "evaluate",
        "--json",
        "--data",
        str(tiny_shards),
        "--split",
        "val",
        "--batch-size",
        "2",
    ]
    command += ["--checkpoint", str(one_process / "ckpt_latest.pth")]

    def scored(name: str, *launcher: str) -> dict[str, Any]:
        files = (
            "--per-sample",
            f"{tmp_path / name}.csv",
            "--curve",
            f"{tmp_path / name}-curve.csv",
        )
        done = subprocess.run([*launcher, *command, *files], stdout=subprocess.PIPE, check=True)
        return dict(json.loads(done.stdout))

    two = scored("two", *TORCHRUN, "--standalone", "--nproc-per-node=2")
    one = scored("one", sys.executable)
    assert (one["samples"], two["samples"], one["world_size"], two["world_size"]) == (7, 7, 1, 2)
    for name in (
        "iou",
        "mean_iou",
        "mae",
        "mse",
        "loss",
        "boundary_iou",
        "gradient_error",
        "precision",
        "recall",
    ):
        assert abs(one[name] - two[name]) < 1e-6, name
    for name in ("", "-curve"):
        tables = [
            list(csv.DictReader((tmp_path / f"{who}{name}.csv").open())) for who in ("one", "two")
        ]
        assert [len(table) for table in tables] == ([101, 101] if name else [7, 7])
        for row, other in zip(*tables, strict=True):
            assert row.pop("key", None) == other.pop("key", None)
            assert all(abs(float(row[figure]) - float(other[figure])) < 1e-5 for figure in row)
    half = next(row for row in tables[0] if float(row["thresholds"]) == 0.5)
    assert abs(float(half["iou"]) - one["iou"]) < 1e-6
    last = lines(one_process, "epoch")[-1]
    assert abs(last["val_iou"] - one["iou"]) < 1e-6
    assert abs(last["val_loss"] - one["loss"]) < 1e-6


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with an address each (10.77.0.1, 10.77.0.2), joined by a cable."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 (ip) to make network namespaces")
    names = ("pd-host-1", "pd-host-2")
    script = f"""
        ip netns add {names[0]} && ip netns add {names[1]}
        ip link add pd-cable-1 netns {names[0]} type veth peer name pd-cable-2 netns {names[1]}
        for i in 1 2; do
            ip -n pd-host-$i addr add 10.77.0.$i/24 dev pd-cable-$i
            ip -n pd-host-$i link set pd-cable-$i up
            ip -n pd-host-$i link set lo up
        done
    """
    made = subprocess.run(["bash", "-euc", script], capture_output=True, text=True)
    try:
        if made.returncode:
            pytest.skip(f"this machine gives no network namespaces: {made.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_with_their_own_addresses_train_one_model(
    two_hosts: tuple[str, str], one_process: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    jobs = []
    for number, host in enumerate(two_hosts, start=1):
        rendezvous: tuple[str, ...] = (
            "--nnodes=2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=10.77.0.1:29612",
            "--rdzv-id=hosts",
        )
        rendezvous += (f"--local-addr=10.77.0.{number}", f"--rdzv-conf=is_host={int(number == 1)}")
        prefix = ("ip", "netns", "exec", host, "env", f"GLOO_SOCKET_IFNAME=pd-cable-{number}")
        jobs.append(
            train(
                tmp_path,
                tiny_shards,
                *PLAIN_STEPS,
                f"train.batch_size={GLOBAL_BATCH // 2}",
                launcher=rendezvous,
                prefix=prefix,
            )
        )
    for job in jobs:
        assert job.wait() == 0, job.text()[-4000:]
    assert_same_run(tmp_path / "run", one_process)
