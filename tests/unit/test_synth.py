"""Synthetic raw trees: reproducible, like AISegment's files, and finished after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from portrait_dist.data.source import layouts, synthetic
from portrait_dist.files import temporary_path
from tests.cli import PORTRAIT_DIST, assert_one_line, call, call_process
from tests.waiting import wait_for


def contents(tree: Path) -> dict[str, bytes]:
    """Every picture of a tree."""
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*.*g")}


def test_a_pair_depends_on_seed_and_index_only(tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "alone", 3, seed=5, workers=1)
    synthetic.generate(tmp_path / "larger", 5, seed=5, workers=2)
    synthetic.generate(tmp_path / "other", 1, seed=6, workers=1)
    alone, larger = contents(tmp_path / "alone"), contents(tmp_path / "larger")
    assert len(alone) == 6
    assert alone == {name: larger[name] for name in alone}
    other = contents(tmp_path / "other")
    assert all(other[name] != alone[name] for name in other)


def test_files_are_like_those_of_aisegment(raw_tree: Path) -> None:
    report = layouts.find_pairs(raw_tree)
    assert len(report.pairs) == 71
    assert not report.images_without_matte
    assert not report.mattes_without_image
    for pair in report.pairs[::6]:
        assert Path(pair.image).parent.name == "clip_00000000"
        assert pair.key.startswith(f"{pair.group}-")
        assert 60_000 <= Path(pair.image).stat().st_size <= 150_000
        image, matte = Image.open(Path(pair.image)), Image.open(Path(pair.matte))
        assert (image.mode, image.size, matte.mode, matte.size) == (
            "RGB",
            (600, 800),
            "RGBA",
            (600, 800),
        )
        colours, alpha = np.asarray(matte)[..., :3], np.asarray(matte)[..., 3]
        assert not colours[alpha == 0].any()
        difference = np.abs(np.asarray(image).astype(int) - colours)[alpha > 0]
        assert difference.mean() < 12  # JPEG's own loss


def test_mattes_have_soft_edges_and_no_constant_mask_fits_them(raw_tree: Path) -> None:
    mattes = [
        np.asarray(Image.open(Path(pair.matte)))[::4, ::4, 3]
        for pair in layouts.find_pairs(raw_tree).pairs
    ]
    for matte in mattes:
        assert (matte == 0).mean() > 0.1
        assert (matte == 255).mean() > 0.1
        assert ((matte > 0) & (matte < 255)).any()
    figures = np.stack(mattes) >= 128
    constant = figures.mean(0) >= 0.5
    assert 0.5 < (figures & constant).sum() / (figures | constant).sum() < 0.8


def test_a_killed_run_leaves_whole_files_and_no_process_and_is_finished_by_the_same_command(
    tmp_path: Path,
) -> None:
    out = tmp_path / "raw"
    arguments = ["synth", "--out", str(out), "--pairs", "10", "--seed", "3", "--workers", "2"]
    process = subprocess.Popen([*PORTRAIT_DIST, *arguments])
    before = wait_for(
        lambda: {path: path.stat() for path in out.rglob("*.jpg")}, what="the first image"
    )
    assert process.poll() is None, "it ended before it could be killed"
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    for path in out.rglob("*.png"):
        Image.open(path).load()
    (next(iter(before)).parent / ".half.jpg.part").write_bytes(b"x")  # as releases before 0.2
    result = call_process(*arguments, "--json").json
    assert result["pairs"] == len(layouts.find_pairs(out).pairs) == 10
    assert result["bytes"] == sum(len(data) for data in contents(out).values())
    assert all(path.stat().st_mtime_ns == stat.st_mtime_ns for path, stat in before.items())
    assert not list(out.rglob(".*"))
    whole = tmp_path / "whole"
    synthetic.generate(whole, 10, seed=3, workers=1)
    assert contents(out) == contents(whole)


def test_what_a_kill_left_while_the_folder_was_claimed_goes(tmp_path: Path) -> None:
    """It lies beside the marker, not beside a picture that is missing."""
    out = tmp_path / "out"
    out.mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = temporary_path(out / "any").name.replace(f"-{os.getpid()}-", f"-{ended.pid}-")
    (out / name).write_text('{"form')
    synthetic.generate(out, 1, workers=1)
    assert [path.name for path in out.rglob(".tmp-*")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "4", "--seed", "2"], "--seed 1"),
        (["--pairs", "1", "--seed", "1"], "holds 2 pairs"),
        (["--pairs", "0", "--seed", "1"], "--pairs"),
        (["--pairs", "two"], "--pairs"),
        (["--pairs", "٢"], "--pairs"),
        (["--pairs", "2", "--seed", "9" * 40], "--seed"),
        (["--pairs", "2", "--workers", "1000000"], "--workers"),
    ],
)
def test_a_folder_of_another_seed_or_more_pairs_stays_as_it_is(
    tmp_path: Path, options: list[str], message: str
) -> None:
    synthetic.generate(tmp_path / "raw", 2, seed=1, workers=1)
    before = contents(tmp_path / "raw")
    result = call("synth", "--out", tmp_path / "raw", *options)
    assert_one_line(result, 2, message)
    assert len(result.lines) == 1
    assert contents(tmp_path / "raw") == before


def test_a_folder_that_holds_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    result = call("synth", "--out", tmp_path, "--pairs", "1")
    assert_one_line(result, 2, "already holds something else")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_output_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = call("synth", "--out", tmp_path / "file" / "raw", "--pairs", "1")
    assert_one_line(result, 2, "is a file; give the path of a folder")
