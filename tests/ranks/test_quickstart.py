"""The whole way, with real data where this machine has some, shortened to a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from portrait_dist import cli, quickstart


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_quickstart_goes_from_pictures_to_cut_outs_and_writes_nowhere_else(
    real_or_generated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quickstart, "STEPS", 12)
    monkeypatch.setattr(quickstart, "SIZE", (64, 64))
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(here)
    words = [
        "quickstart",
        "--json",
        "--raw",
        str(real_or_generated),
        "--out",
        str(tmp_path / "out"),
        "--nproc",
        "2",
    ]
    assert cli.run(words) == 0
    result = json.loads(capfd.readouterr().out)
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
    assert 0 <= result["test_iou"] <= 1
    assert 0.3 < result["baseline_iou"] < 1
    assert result["pictures"]
    for path in [*result["pictures"], result["checkpoint"]]:
        assert Path(path).is_file(), path
    run = {path.name.split(".")[0] for path in Path(result["run_dir"]).iterdir()}
    assert run >= {"ckpt_best", "ckpt_latest", "average_model", "config", "metrics", "events"}
    events = EventAccumulator(result["run_dir"])
    events.Reload()
    assert len(events.Images("validation")) == len(events.Scalars("valid_softiou")) > 0, (
        "a picture grid for each epoch"
    )
    assert tree(here) == set()
    assert not [
        name
        for name in tree(home)
        if "sg_logs" in name or not name.startswith((".cache", ".config"))
    ]

    assert cli.run([*words[:4], str(tmp_path / "elsewhere"), *words[5:]]) == 2, (
        "another raw tree, the same --out"
    )
    capfd.readouterr()
    assert cli.run(words) == 0, "run again, it finds everything done"
    assert json.loads(capfd.readouterr().out)["test_iou"] == result["test_iou"]
