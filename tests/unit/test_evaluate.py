"""``evaluate`` scores every sample once and refuses first what it could not write."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from portrait_dist import distributed, evaluation
from portrait_dist.checkpoints import load_model
from portrait_dist.data import Batch
from portrait_dist.data.stream.dataset import AISegmentIterableDataset
from tests import blobs, cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the size of the tiny shards."""
    folder = tmp_path_factory.mktemp("run")
    return blobs.save(blobs.train(steps=8), folder / "ckpt_best.pth", size=(32, 32))


def evaluate(checkpoint: Path, shards: Path, *arguments: str | Path) -> cli.Result:
    options = ("--checkpoint", checkpoint, "--data", shards, "--split", "val", "--device", "cpu")
    return cli.call("evaluate", *options, "--json", *arguments)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_hold_what_the_result_sums_up(
    checkpoint: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    rows, curve = tmp_path / "rows.csv", tmp_path / "curve.csv"
    result = evaluate(checkpoint, tiny_shards, "--per-sample", rows, "--curve", curve)
    assert result.exit_code == 0, result.stderr
    scores: dict[str, Any] = result.json
    assert list(table(rows)[0]) == ["key", "iou", "mae", "mse", "boundary_iou", "gradient_error"]
    assert len(table(rows)) == scores["samples"] == 7
    for name in ("mae", "mse", "boundary_iou", "gradient_error"):
        mean = sum(float(row[name]) for row in table(rows)) / 7
        assert mean == pytest.approx(scores[name], rel=1e-5)
    points = table(curve)
    assert [point["thresholds"] for point in points[:3]] == ["0", "0.01", "0.02"]
    half = next(point for point in points if point["thresholds"] == "0.5")
    assert float(half["iou"]) == pytest.approx(scores["iou"], rel=1e-5)
    assert max(len(value) for row in [*table(rows), *points] for value in row.values()) < 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.csv", "rows.csv"]


@pytest.mark.parametrize(
    ("option", "output", "reason"),
    [
        ("--per-sample", "none/rows.csv", "there is no folder"),
        ("--curve", "none/curve.csv", "there is no folder"),
        ("--per-sample", "file/rows.csv", "there is no folder"),
        ("--per-sample", "folder", "is a folder"),
        ("--pictures", "file", "is a file"),
        ("--pictures", "file/deeper", "is a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, option: str, output: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    result = evaluate(tmp_path / "no.pth", tmp_path / "no", option, tmp_path / output)
    cli.assert_one_line(result, 2, str(tmp_path / output), reason)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_outputs_on_a_read_only_or_full_disk_are_one_line_and_leave_nothing(
    checkpoint: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["--checkpoint", str(checkpoint), "--data", str(tiny_shards), "--split", "val"]
    evaluating = shlex.join([*cli.PORTRAIT_DIST, "evaluate", *options, "--workers", "0"])
    script = f"""
        mount -t tmpfs -o ro,size=64k tmpfs {disk}
        {evaluating} --per-sample {disk}/rows.csv; echo $? >> {tmp_path}/codes
        {evaluating} --pictures {disk}/deep/pictures; echo $? >> {tmp_path}/codes
        mount -o remount,rw {disk}
        head -c 65536 /dev/zero > {disk}/filler
        {evaluating} --curve {disk}/curve.csv; echo $? >> {tmp_path}/codes
        ls -A {disk} > {tmp_path}/left
    """
    as_root = () if os.getuid() == 0 else ("unshare", "--map-root-user", "--mount")
    done = subprocess.run(
        [*as_root, "unshare", "--mount", "bash", "-c", script], capture_output=True, text=True
    )
    assert (tmp_path / "codes").read_text().split() == ["2", "2", "1"], done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    assert f"{disk}/rows.csv: cannot be written (Read-only" in lines[0]
    assert f"{disk}/deep/pictures: cannot be written (Read-only" in lines[1]
    assert f"{disk}/curve.csv: not written, the disk is full" in lines[2]
    assert (tmp_path / "left").read_text().split() == ["filler"]


def test_pictures_of_the_worst_and_the_median_samples_read_only_these_samples_again(
    checkpoint: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = AISegmentIterableDataset.read

    def counted(self: AISegmentIterableDataset, sample: int, *arrays: Any) -> str:
        read.append(sample)
        return plain(self, sample, *arrays)

    monkeypatch.setattr(AISegmentIterableDataset, "read", counted)
    result = evaluate(checkpoint, tiny_shards, "--split", "train", "--pictures", tmp_path)
    files = [str(tmp_path / f"train-{name}.png") for name in ("worst", "median")]
    assert result.json["pictures"] == files
    assert len(read) == 57 + 2 * evaluation.EXAMPLES
    assert Image.open(files[0]).size[0] > 5 * 32


def test_the_worst_samples_come_first_and_are_scored_as_in_the_split(
    checkpoint: Path, tiny_shards: Path
) -> None:
    found = evaluation.evaluate(checkpoint, str(tiny_shards), "train", device="cpu")
    assert found
    chosen = sorted(found.rows, key=lambda row: row.scores.iou)[:3]
    again = evaluation.score_positions(
        checkpoint, str(tiny_shards), "train", [row.position for row in chosen], device="cpu"
    )
    assert [sample.key for sample in again] == [row.key for row in chosen]
    for sample, row in zip(again, chosen, strict=True):
        assert sample.scores.mae == pytest.approx(row.scores.mae, abs=1e-6)


def test_scores_are_computed_in_full_float32_and_the_settings_come_back(
    checkpoint: Path, tiny_shards: Path
) -> None:
    backends: Any = torch.backends
    switches = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    seen: list[list[str]] = []
    model, _ = load_model(checkpoint)
    model.register_forward_hook(
        lambda *_: seen.append([switch.fp32_precision for switch in switches])
    )
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        batch = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
        scorer = evaluation.Scorer(model, torch.device("cpu"))
        list(scorer.score([Batch(batch, batch[..., 0], ["a", "b"], 0, np.arange(2))]))
        assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
    assert seen == [["ieee", "ieee"]]


def test_rows_of_samples_go_to_rank_0_alone(
    checkpoint: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []

    def as_on_rank_1(rows: list[Any]) -> None:
        gathered.append(len(rows))

    monkeypatch.setattr(distributed, "gather_to_rank_0", as_on_rank_1)
    assert evaluation.evaluate(checkpoint, str(tiny_shards), "val", device="cpu") is None
    assert gathered == [7]


def test_shards_of_another_size_are_refused_with_the_size_of_training(
    tiny_shards: Path, tmp_path: Path
) -> None:
    large = blobs.save(blobs.train(steps=1), tmp_path / "ckpt.pth", size=(64, 64))
    result = evaluate(large, tiny_shards)
    cli.assert_one_line(result, 2, "trained at 64x64", "packed at 32x32", "--size 64x64")


def test_pictures_of_a_group_show_the_samples_with_most_of_its_errors_first() -> None:
    scores = evaluation.SampleScores(0.5, 0, 0, 0, 0)
    counts = [3, 0, 9, 1, 9, 2, 5]
    rows = [
        evaluation.SampleRow(str(i), i, scores, evaluation.ErrorGroups(missed=count))
        for i, count in enumerate(counts)
    ]
    found = evaluation._positions_to_draw(rows)
    assert list(found) == ["worst", "median", "missed"]
    assert found["missed"] == [2, 4, 6, 0]


def test_wrong_pixels_are_grouped_by_where_they_are_and_every_one_counts_once(
    checkpoint: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    alpha = np.zeros((100, 100), np.uint8)
    alpha[20:80, 20:60] = 255  # the person; the band of the edge is 3 pixels wide on each side
    prediction = (alpha / 255).astype(np.float32)
    prediction[19, 20:60] = 1  # 40 pixels at the edge
    prediction[40:44, 30:35] = 0  # a hole of 20 pixels
    prediction[50:60, 60:90] = 1  # 300 pixels attached, 30 of them within the band
    prediction[5:9, 90:95] = 1  # an island of 20 pixels
    groups = evaluation.group_errors(alpha, prediction)
    assert groups == evaluation.ErrorGroups(40 + 30, 20, 270, 20, 1)
    assert groups.wrong == int(((alpha > 127) != (prediction > 0.5)).sum())
    rows = tmp_path / "rows.csv"
    pictures = tmp_path / "pictures"
    options = ("--errors", "--per-sample", rows, "--pictures", pictures)
    result = evaluate(checkpoint, tiny_shards, *options).json
    drawn = {path.name for path in pictures.iterdir()}
    assert drawn == {"val-worst.png", "val-median.png"} | {
        f"val-{name}.png" for name in evaluation.ERROR_GROUPS if result["errors"][name]
    }
    assert len(drawn) > 2
    assert result["errors"]["wrong"] == sum(
        int(row[f"{name}_errors"]) for row in table(rows) for name in evaluation.ERROR_GROUPS
    )
    assert evaluate(checkpoint, tiny_shards).json["errors"] is None
