"""Damage is found and named, by ``verify`` and by the reader, and never becomes a wrong sample."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portrait_dist.data.shards.reader import DamagedSampleError, ShardSet, read_manifest
from portrait_dist.data.shards.verify import VerifyResult, verify
from portrait_dist.errors import DamagedDataError, InputError
from tests.cli import call
from tests.damage import cut, edit_manifest, flip_bit


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the small shards, to be damaged: train has six tars of ten samples but the last."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def cut_a_shard(folder: Path) -> str:
    path = folder / "train-00002.tar"
    cut(path, path.stat().st_size // 2)
    return "train-00002.tar: has .* bytes instead of .*cut off in sample [3-6] of 10"


def remove(folder: Path) -> str:
    (folder / "val-00000.tar").unlink()
    return "val-00000.tar: is missing"


def remove_index(folder: Path) -> str:
    (folder / "train-00001.index").unlink()
    return "train-00001.index: is missing"


def swap_indexes(folder: Path) -> str:
    shutil.copy(folder / "train-00000.index", folder / "train-00001.index")
    return "train-00001.tar: train-00001.index is not its index"


def swap_shards(folder: Path) -> str:
    shutil.copy(folder / "train-00003.tar", folder / "train-00001.tar")
    return "train-00001.tar[:,]"


def add(folder: Path) -> str:
    shutil.copy(folder / "train-00000.tar", folder / "train-00006.tar")
    return "train-00006.tar: is not in the manifest"


def drop_a_mask(folder: Path) -> str:
    path = folder / "train-00001.tar"
    with tarfile.open(path) as old:
        members = [(member, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as new:
        for member, data in members[:7] + members[8:]:
            with (folder / "data").open("wb+") as file:
                file.write(data)
                file.seek(0)
                new.addfile(member, file)
    (folder / "data").unlink()
    key = members[6][0].name.partition(".")[0]
    return rf"train-00001.tar: .*sample 3 \({key}\) has no image or no mask"


def flip_in_a_sample(folder: Path) -> str:
    flip_bit(folder / "test-00000.tar", 5000)
    return "test-00000.tar, sample [0-2]: the sample is damaged"


def flip_at_the_end(folder: Path) -> str:
    path = folder / "test-00000.tar"
    flip_bit(path, path.stat().st_size - 600)
    return "test-00000.tar: its sha256 differs"


def lose_the_wids_index(folder: Path) -> str:
    (folder / "val.json").write_text("{}")
    return "val.json: does not list the shards"


def put_a_pipe_for_a_shard(folder: Path) -> str:
    (folder / "val-00000.tar").unlink()
    os.mkfifo(folder / "val-00000.tar")
    return r"val-00000\.tar: cannot be read \(is not a regular file\)"


def put_a_pipe_for_an_index(folder: Path) -> str:
    (folder / "val-00000.index").unlink()
    os.mkfifo(folder / "val-00000.index")
    return r"val-00000\.index: cannot be read \(is not a regular file\)"


def put_a_pipe_for_the_wids_index(folder: Path) -> str:
    (folder / "val.json").unlink()
    os.mkfifo(folder / "val.json")
    return r"val\.json: cannot be read \(is not a regular file\)"


DAMAGES = [
    cut_a_shard,
    remove,
    remove_index,
    swap_indexes,
    swap_shards,
    add,
    drop_a_mask,
    flip_in_a_sample,
    flip_at_the_end,
    lose_the_wids_index,
    put_a_pipe_for_a_shard,
    put_a_pipe_for_an_index,
    put_a_pipe_for_the_wids_index,
]


def test_whole_shards_are_found_whole(tiny_shards: Path) -> None:
    assert verify(tiny_shards) == VerifyResult(samples=71, shards=8, ok=True, errors=[])


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_damaged(damage: Callable[[Path], str], shards: Path) -> None:
    message = damage(shards)
    result = verify(shards)
    assert not result.ok
    assert re.search(message, result.errors[0])
    assert str(shards) in result.errors[0]
    assert result.samples <= 71
    done = call("verify", shards, "--json")
    assert done.exit_code == 3
    assert {name: done.json[name] for name in asdict(result)} == asdict(result)
    assert re.search(message, done.stderr)


@pytest.mark.parametrize(
    "damage",
    [cut_a_shard, remove, remove_index, swap_indexes, swap_shards, drop_a_mask, flip_in_a_sample],
)
def test_the_reader_names_shard_and_sample_and_what_to_do(
    damage: Callable[[Path], str], shards: Path
) -> None:
    damage(shards)
    errors = []
    for split in ("train", "val", "test"):
        opened = ShardSet(shards, split)
        for sample in range(opened.samples):
            try:
                opened.read(sample)
            except DamagedSampleError as error:
                errors.append(error)
    for one in errors:
        assert str(one).startswith(f"{shards / one.shard}, sample {one.position}: ")
        assert "portrait-dist verify" in str(one)
        assert "\n" not in str(one)
    assert errors


def test_a_flipped_bit_anywhere_never_becomes_a_wrong_sample(shards: Path) -> None:
    path = shards / "train-00000.tar"
    read = [ShardSet(shards, "train").read(sample) for sample in range(10)]
    whole = [(one.key, bytes(one.image), bytes(one.alpha)) for one in read]
    rng = np.random.default_rng(0)
    for offset in rng.integers(0, path.stat().st_size - 1024, 40).tolist():
        flip_bit(path, offset, bit=offset % 8)
        opened, damaged = ShardSet(shards, "train"), 0
        for sample in range(10):
            try:
                encoded = opened.read(sample)
                assert (encoded.key, bytes(encoded.image), bytes(encoded.alpha)) == whole[sample]
            except DamagedSampleError:
                damaged += 1
        assert damaged == 1
        flip_bit(path, offset, bit=offset % 8)


def test_a_flipped_bit_in_an_index_is_found_before_anything_is_read(shards: Path) -> None:
    length = (shards / "train-00000.index").stat().st_size
    for offset in range(0, length, 37):
        flip_bit(shards / "train-00000.index", offset)
        with pytest.raises(DamagedSampleError, match="not the index of this shard"):
            ShardSet(shards, "train").read(3)
        flip_bit(shards / "train-00000.index", offset)


def test_a_shard_cut_off_while_it_is_read_is_named(shards: Path) -> None:
    opened = ShardSet(shards, "val")
    opened.read(0)
    cut(shards / "val-00000.tar", 1000)
    with pytest.raises(
        DamagedSampleError, match=r"val-00000\.tar, sample 6: the shard has 1,000 bytes instead of"
    ):
        opened.read(6)


def test_a_damaged_manifest_is_named(shards: Path) -> None:
    text = (shards / "manifest.json").read_text()
    manifest = json.loads(text)
    manifest["splits"]["train"]["samples"] += 1
    for broken in (
        text[: len(text) // 2],
        "[]",
        json.dumps(manifest),
        text.replace("train-00000.tar", "../x.tar"),
    ):
        (shards / "manifest.json").write_text(broken)
        with pytest.raises(DamagedDataError, match=r"manifest\.json: damaged"):
            read_manifest(shards)
        assert call("verify", shards).exit_code == 3
    (shards / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="format 2, this program knows 1"):
        read_manifest(shards)


def test_what_is_no_folder_of_shards_is_distinguished_from_one(
    raw_tree: Path, split_dir: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    for folder, message in (
        (raw_tree, "raw tree"),
        (split_dir, "not packed yet"),
        (tmp_path, "no manifest"),
        (tmp_path / "x", "no such"),
    ):
        with pytest.raises(InputError, match=message):
            ShardSet(folder, "train")
    with pytest.raises(InputError, match=r"no split 'tain' in it\. Did you mean 'train'"):
        ShardSet(tiny_shards, "tain")
    assert call("verify", tmp_path).exit_code == 2


def test_opening_reads_the_manifest_and_nothing_else(shards: Path) -> None:
    for path in shards.glob("*.tar"):
        path.unlink()
    opened = ShardSet(shards, "train")
    assert opened.samples == 57
    assert opened.shard_sizes == [10, 10, 10, 10, 10, 7]
    assert [opened.locate(sample) for sample in (0, 9, 10, 56)] == [(0, 0), (0, 9), (1, 0), (5, 6)]
    for sample in (-1, 57):
        with pytest.raises(IndexError):
            opened.locate(sample)


def test_shards_of_different_content_have_different_identities(
    shards: Path, tiny_shards: Path
) -> None:
    same = ShardSet(shards, "train").identity
    assert same == ShardSet(tiny_shards, "train").identity
    assert same != ShardSet(shards, "val").identity

    def change_one_hash(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["shards"][2]["sha256"] = "0" * 64

    edit_manifest(shards, change_one_hash)
    assert same != ShardSet(shards, "train").identity
