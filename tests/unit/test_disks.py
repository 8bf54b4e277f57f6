"""Full and read-only disks: one line, nothing half-written, and the same bytes with room."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.cli import assert_one_line, call
from tests.disks import small_disk


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def commands(raw_tree: Path, split_dir: Path) -> dict[str, list[str]]:
    """Command lines that write more than a small disk holds; ``--out`` comes behind them."""
    pack = ["pack", "--data", str(split_dir), "--size", "128", "--samples-per-shard", "8"]
    return {
        "pack": pack,
        "part": [*pack, "--part", "0/1"],
        "prepare": ["prepare", "--raw", str(raw_tree), "--mode", "copy"],
    }


@pytest.mark.parametrize("name", ["pack", "part", "prepare"])
def test_a_full_disk_is_one_line_and_with_room_the_bytes_are_the_same(
    commands: dict[str, list[str]], tmp_path: Path, name: str
) -> None:
    arguments = commands[name]
    assert call(*arguments, "--out", tmp_path / "whole").exit_code == 0
    with small_disk(tmp_path / "disk", kilobytes=300) as disk:
        out = disk.folder / "out"
        refused = call(*arguments, "--out", out)
        assert_one_line(refused, 1, "the disk is full; free some space and run again")
        assert len(refused.lines) == 1
        assert not [path for path in disk.folder.rglob("*") if ".tmp-" in path.name]
        if name == "prepare":
            assert not list(disk.folder.iterdir())
        disk.remount("size=60m")
        assert call(*arguments, "--out", out).exit_code == 0
        assert hashes(out) == hashes(tmp_path / "whole")
        assert [path.name for path in disk.folder.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["pack", "part", "prepare", "synth", "show"])
def test_a_read_only_disk_is_one_line(
    commands: dict[str, list[str]], split_dir: Path, tmp_path: Path, name: str
) -> None:
    commands["synth"] = ["synth", "--pairs", "1"]
    commands["show"] = ["show", "--data", str(split_dir), "--samples", "1", "--size", "64"]
    with small_disk(tmp_path / "disk", kilobytes=300) as disk:
        disk.remount("ro")
        result = call(*commands[name], "--out", disk.folder / "deep" / "out.png")
        assert_one_line(result, 2, "Read-only file system")
        assert len(result.lines) == 1
        assert not list(disk.folder.iterdir())


def test_a_full_disk_leaves_no_sheet(split_dir: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=20) as disk:
        options = ("--samples", "2", "--augmented", "0")
        out = disk.folder / "sheet.png"
        result = call("show", "--data", split_dir, "--out", out, *options)
        assert_one_line(result, 1, "the disk is full")
        assert not list(disk.folder.iterdir())
