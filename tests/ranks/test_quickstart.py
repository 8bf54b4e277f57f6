"""The whole way, with real data where this machine has some, shortened to a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from portrait_dist import quickstart
from tests.cli import assert_one_line, call


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_quickstart_goes_from_photos_to_cut_outs_and_writes_nowhere_else(
    real_or_generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "STEPS", 12)
    monkeypatch.setattr(quickstart, "SIZE", (64, 64))
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(here)
    arguments: list[str | Path] = [
        "quickstart",
        "--json",
        "--nproc",
        "2",
        "--raw",
        real_or_generated,
    ]
    done = call(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    result = done.json
    assert set(result) >= {
        "test_iou",
        "baseline_iou",
        "images_per_second",
        "world_size",
        "pictures",
        "checkpoint",
        "run_dir",
    }
    assert result["world_size"] == 2
    score = call(
        *("evaluate", "--json", "--checkpoint", result["checkpoint"]),
        *("--data", tmp_path / "out" / "shards", "--split", "test"),
    )
    assert score.json["iou"] == result["test_iou"], "the test score is that of evaluate"
    assert 0.3 < result["baseline_iou"] < 1
    assert result["pictures"]
    for path in [*result["pictures"], result["checkpoint"]]:
        assert Path(path).is_file(), path
    run = {path.name.split(".")[0] for path in Path(result["run_dir"]).iterdir()}
    assert run >= {"ckpt_best", "ckpt_latest", "average_model", "config", "metrics", "events"}
    events = EventAccumulator(result["run_dir"])
    events.Reload()
    images, scores = events.Images("examples/validation"), events.Scalars("iou/val")
    assert len(images) == len(scores) > 0, "an image grid for each epoch"
    assert tree(here) == set()
    assert not [
        name
        for name in tree(home)
        if "sg_logs" in name or not name.startswith((".cache", ".config"))
    ]

    other = call("quickstart", "--raw", tmp_path / "elsewhere", "--out", tmp_path / "out")
    assert_one_line(other, 2, "holds a quickstart with other images")
    again = call(*arguments, "--out", tmp_path / "out")
    assert again.exit_code == 0, "run again, it finds everything done"
    assert again.json["test_iou"] == result["test_iou"]
