"""Packing: plain WebDataset, the same bytes every time, whole shards or none."""

from __future__ import annotations

import fcntl
import glob
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import webdataset
from PIL import ExifTags, Image, ImageOps

from portrait_dist.data import AISegmentDataset
from portrait_dist.data.shards.decode import decode_stored
from portrait_dist.data.shards.encode import resize_image
from portrait_dist.data.shards.reader import ShardSet
from portrait_dist.data.shards.writer import pack
from portrait_dist.data.source.assignment import SPLITS
from portrait_dist.data.source.pairs import check_pairs
from portrait_dist.data.source.split import read_split
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.system.threads import map_in_order
from tests.cli import PORTRAIT_DIST, assert_one_line, call
from tests.damage import cut, flip_bit
from tests.trees import write_tree
from tests.waiting import wait_for


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """25 train, 3 val and no test pairs of 24×16."""
    return write_tree(
        tmp_path / "data",
        {"train": [f"p-{i:03d}" for i in range(25)], "val": ["q-1", "q-2", "q-3"]},
    )


def test_stock_webdataset_reads_every_sample_in_key_order(
    tiny_shards: Path, split_dir: Path
) -> None:
    for split in SPLITS:
        urls = sorted(glob.glob(str(tiny_shards / f"{split}-*.tar")))
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
        assert [sample["__key__"] for sample in samples] == sorted(
            read_split(split_dir).keys(split)
        )
        assert (
            {sample["jpg"].size for sample in samples}
            == {(32, 32)}
            == {sample["png"].size for sample in samples}
        )


def test_stock_wids_reads_any_sample_by_number(
    tiny_shards: Path, split_dir: Path, tmp_path: Path
) -> None:
    wids = pytest.importorskip("wids")
    dataset = wids.ShardListDataset(
        str(tiny_shards / "train.json"), cache_dir=str(tmp_path), transformations=[]
    )
    keys = read_split(split_dir).keys("train")
    assert len(dataset) == len(keys)
    assert [dataset[number]["__key__"] for number in (0, 9, 10, len(keys) - 1)] == [
        keys[0],
        keys[9],
        keys[10],
        keys[-1],
    ]


def test_the_stored_alpha_is_the_last_channel_of_the_matte_to_the_pixel(
    tiny_shards: Path, split_dir: Path
) -> None:
    shards = ShardSet(tiny_shards, "val")
    pairs = read_split(split_dir).pairs("val")
    assert shards.samples == len(pairs)
    for number, pair in enumerate(pairs):
        encoded = shards.read(number)
        assert encoded.key == pair.key
        alpha = (
            Image.open(Path(pair.matte)).getchannel("A").resize((32, 32), Image.Resampling.NEAREST)
        )
        assert (np.asarray(Image.open(io.BytesIO(encoded.alpha))) == np.asarray(alpha)).all()
        picture = Image.open(Path(pair.image))
        image = resize_image(np.array(picture), (32, 32))
        off = np.abs(
            image.astype(int) - np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))
        )
        assert off.max() <= 1
        assert (off > 0).mean() < 0.02
        stored = simplejpeg.encode_jpeg(
            image, quality=95, colorspace="RGB", colorsubsampling="420", fastdct=False
        )
        assert bytes(encoded.image) == stored


def test_original_size_keeps_the_jpeg_files_as_they_are(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out", size=None)
    shards = ShardSet(tmp_path / "out", "train")
    assert shards.size is None
    for number, pair in enumerate(read_split(tree).pairs("train")):
        assert bytes(shards.read(number).image) == Path(pair.image).read_bytes()


@pytest.mark.parametrize("size", [None, (24, 16)])
@pytest.mark.parametrize("matte", ["as shown", "as stored"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_image_that_exif_turns_is_stored_upright_with_its_matte(
    orientation: int, matte: str, size: tuple[int, int] | None, tmp_path: Path
) -> None:
    data = write_tree(tmp_path / "data", {"train": ["turned", "upright"]}, size=(16, 24))
    pair = read_split(data).pairs("train")[0]
    ramp = np.add.outer(np.arange(16) * 9, np.arange(24) * 3).astype(np.uint8)
    stored = Image.fromarray(np.repeat(ramp[..., None], 3, axis=2))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(Path(pair.image), quality=100, exif=exif)
    with Image.open(Path(pair.image)) as opened:
        shown = ImageOps.exif_transpose(opened)
    assert shown.size == (16, 24)
    alpha = (shown if matte == "as shown" else stored).getchannel(0)
    Image.merge("LA", (alpha, alpha)).save(Path(pair.matte))
    check_pairs([pair])
    pack(data, tmp_path / "out", size=size)
    encoded = ShardSet(tmp_path / "out", "train").read(0)
    image, mask = decode_stored(encoded.image, encoded.alpha, "jpeg")
    assert image.shape[:2] == mask.shape == (24, 16)
    assert np.abs(image.astype(int) - np.asarray(shown)).max() < 12
    assert np.abs(mask.astype(int) - np.asarray(shown)[..., 0]).max() < 12
    tutorial_image, tutorial_mask = AISegmentDataset(data, "train").read(0)
    assert tutorial_image.size == tutorial_mask.size == (16, 24)
    assert np.array_equal(np.asarray(tutorial_image), np.asarray(shown))
    assert np.array_equal(np.asarray(tutorial_mask), np.asarray(shown)[..., 0])
    if size is None:
        other = read_split(data).pairs("train")[1]
        assert (
            bytes(ShardSet(tmp_path / "out", "train").read(1).image)
            == Path(other.image).read_bytes()
        )


def test_the_same_pairs_give_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "one", size=(16, 16), samples_per_shard=4, workers=1)
    shutil.copytree(tree, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "split.json").read_text())
    for path in (tmp_path / "copy").rglob("*.*"):
        os.utime(path, (1e9, 1e9))  # a tar that held times would hold these
    pack(tmp_path / "copy", tmp_path / "two", size=(16, 16), samples_per_shard=4, workers=3)
    assert manifest["source"] == "by hand"
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_manifest_counts_and_hashes_what_is_there(tree: Path, tmp_path: Path) -> None:
    result = pack(tree, tmp_path / "out", size=(16, 16), samples_per_shard=10)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["size"] == [16, 16]
    assert [shard["samples"] for shard in manifest["splits"]["train"]["shards"]] == [10, 10, 5]
    assert manifest["splits"]["test"] == {**manifest["splits"]["test"], "samples": 0, "shards": []}
    assert (result.samples, result.shards) == (28, 4)
    assert result.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert result.pairs_per_second > 0
    assert not [name for name in files(tmp_path / "out") if name.startswith(".")]


def test_killed_and_run_again_it_keeps_whole_shards_and_ends_with_the_same_bytes(
    split_dir: Path, tmp_path: Path
) -> None:
    options = [
        "--data",
        str(split_dir),
        "--size",
        "64",
        "--samples-per-shard",
        "6",
        "--workers",
        "1",
    ]
    out = tmp_path / "out"
    command = [*PORTRAIT_DIST, "pack", *options, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob("*.index"))) >= 3, what="three shards")
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    before = {
        path.name: path.stat().st_ino
        for path in out.glob("*.tar")
        if path.with_suffix(".index").exists()
    }
    with pytest.raises(InputError, match="not finished; run the same"):
        ShardSet(out, "train")

    result = pack(split_dir, out, size=(64, 64), samples_per_shard=6)
    pack(split_dir, tmp_path / "whole", size=(64, 64), samples_per_shard=6)
    assert files(out) == files(tmp_path / "whole")
    assert {name: (out / name).stat().st_ino for name in before} == before, (
        "whole shards were written again"
    )
    assert result.packed == result.samples - 6 * len(before)


def test_a_shard_that_is_damaged_or_older_than_its_pairs_is_made_again(
    tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pack(tree, out, size=(16, 16), samples_per_shard=5)
    assert pack(tree, out, size=(16, 16), samples_per_shard=5).packed == 0
    whole = files(out)
    flip_bit(out / "train-00001.tar", 700)
    assert pack(tree, out, size=(16, 16), samples_per_shard=5).packed == 5
    assert files(out) == whole
    path = Path(read_split(tree).pairs("val")[1].image)
    length = path.stat().st_size
    other = min((tree / "train").glob("*.jpg"), key=lambda image: image.stat().st_size).read_bytes()
    path.write_bytes(
        other + bytes(length - len(other))
    )  # of the same length, so that only its time tells
    os.utime(path, (time.time() + 5, time.time() + 5))
    assert pack(tree, out, size=(16, 16), samples_per_shard=5).packed == 3
    assert files(out)["val-00000.tar"] != whole["val-00000.tar"]


@pytest.mark.parametrize("key", ["a.b", "..", "a/b", "a\\b", "", "line\nbreak", "x" * 95])
def test_keys_that_webdataset_would_misread_are_refused(key: str, tmp_path: Path) -> None:
    data = write_tree(tmp_path / "data", {"train": ["good"]})
    manifest = json.loads((data / "split.json").read_text())
    manifest["splits"]["train"].append(key)
    (data / "split.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="key"):
        pack(data, tmp_path / "out", size=(16, 16))
    assert not (tmp_path / "out").exists()


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    data = write_tree(tmp_path / "data", {"train": ["same", "other"], "val": ["same"]})
    with pytest.raises(InputError, match="'same' is there twice, also in train"):
        pack(data, tmp_path / "out", size=(16, 16))


def test_a_folder_that_holds_something_else_stays_as_it_is(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="already holds something else"):
        pack(tree, out, size=(16, 16))
    assert files(out) == {"thesis.tex": b"mine"}
    with pytest.raises(InputError, match="is a file"):
        pack(tree, out / "thesis.tex")


def test_other_settings_or_pairs_do_not_overwrite_shards(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(tree, out, size=(16, 16))
    before = files(out)
    with pytest.raises(InputError, match="was packed with --size 16x16, not original"):
        pack(tree, out, size=None)
    other = write_tree(tmp_path / "other", {"train": ["z"]})
    with pytest.raises(InputError, match="from other pairs"):
        pack(other, out, size=(16, 16))
    assert files(out) == before


def broken(tree: Path, kind: str) -> Path:
    """Break one pair; the file that has to be named."""
    pair = read_split(tree).pairs("train")[20]
    if kind == "cut":
        cut(Path(pair.image), -200)
        return Path(pair.image)
    if kind == "missing":
        Path(pair.matte).unlink()
        return Path(pair.matte)
    if kind == "no alpha":
        Image.new("RGB", (16, 24)).save(Path(pair.matte))
    elif kind == "other size":
        Image.new("RGBA", (16, 23)).save(Path(pair.matte))
    elif kind == "flipped":
        flip_bit(Path(pair.matte), Path(pair.matte).stat().st_size // 2)
    elif kind == "named pipe":
        Path(pair.matte).unlink()
        os.mkfifo(Path(pair.matte))
    elif kind == "too large":
        Image.new("L", (20000, 16000), 128).save(Path(pair.image))
        return Path(pair.image)
    return Path(pair.matte)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("cut", DamagedDataError, "does not decode"),
        ("missing", DamagedDataError, "missing"),
        ("flipped", DamagedDataError, "does not decode"),
        ("no alpha", InputError, "no alpha channel"),
        ("other size", InputError, "16x23 pixels, but its image"),
        ("named pipe", DamagedDataError, "is not a regular file"),
        ("too large", InputError, "20000x16000 pixels are more than the 178,956,970"),
    ],
)
def test_a_broken_pair_is_named_and_nothing_half_written_is_left(
    kind: str, error: type[Exception], message: str, tree: Path, tmp_path: Path
) -> None:
    path = broken(tree, kind)
    with pytest.raises(error, match=message) as caught:
        pack(tree, tmp_path / "out", size=(16, 16))
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_repaired_pair_lets_an_unfinished_folder_be_finished(tree: Path, tmp_path: Path) -> None:
    path = broken(tree, "cut")
    with pytest.raises(DamagedDataError):
        pack(tree, tmp_path / "out", size=(16, 16), samples_per_shard=10)
    left = files(tmp_path / "out")
    assert set(left) == {
        ".pack.json",
        "train-00000.tar",
        "train-00000.index",
        "train-00001.tar",
        "train-00001.index",
    }
    shutil.copy(tree / "train" / "p-001.jpg", path)
    assert pack(tree, tmp_path / "out", size=(16, 16), samples_per_shard=10).packed == 8


def test_two_packs_do_not_write_into_one_folder(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another 'portrait-dist pack' is writing there"):
        pack(tree, out, size=(16, 16))
    assert out.is_dir(), "the refused one leaves the folder to the one that has just begun"
    os.close(descriptor)
    assert pack(tree, out, size=(16, 16)).samples == 28


def test_memory_is_bounded_by_the_threads_whatever_the_number_of_pairs() -> None:
    pulled = 0

    def numbers() -> Iterator[int]:
        nonlocal pulled
        for number in range(100_000):
            pulled += 1
            yield number

    results = map_in_order(lambda number: number * number, numbers(), workers=3)
    for taken in range(1, 2000):
        assert next(results) == (taken - 1) ** 2
        assert pulled <= taken + 4 * 3
    results.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "original", "--codec", "raw"], "give --size"),
        (["--size", "4"], "--size 4x4"),
        (["--size", "٦٤"], "--size"),
        (["--size", "16385"], "--size"),
        (["--size", "99999999999999999999"], "--size"),
        (["--quality", "0"], "--quality"),
        (["--samples-per-shard", "0"], "--samples-per-shard"),
        (["--samples-per-shard", "1e3"], "--samples-per-shard"),
        (["--workers", "0"], "--workers"),
        (["--codec", "webp"], "--codec"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], message: str, tree: Path, tmp_path: Path
) -> None:
    result = call("pack", "--data", tree, "--out", tmp_path / "out", *options)
    assert_one_line(result, 2, message)
    assert len(result.lines) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_below_a_file_is_one_line(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = call("pack", "--data", tree, "--out", tmp_path / "file" / "out")
    assert_one_line(result, 2, "file", "give the path of a folder")
    assert len(result.lines) == 1


def test_a_named_pipe_in_place_of_a_shard_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out", size=(16, 16))
    tar = tmp_path / "out" / "train-00000.tar"
    tar.unlink()
    os.mkfifo(tar)
    with pytest.raises(InputError, match=r"train-00000\.tar: cannot be read .*; remove it"):
        pack(tree, tmp_path / "out", size=(16, 16))


def test_leftovers_of_killed_processes_are_cleared(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out", size=(16, 16))
    before = files(tmp_path / "out")
    for name in (".train-00000.tar.part", ".tmp-0123abcd-99-0", "train-00007.tar"):
        (tmp_path / "out" / name).write_bytes(b"half")
        os.utime(tmp_path / "out" / name, (1e9, 1e9))  # of another host, not written for long
    pack(tree, tmp_path / "out", size=(16, 16))
    assert files(tmp_path / "out") == before


def test_the_command_prints_one_json_object(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--data", tree, "--out", out)
    result = call("pack", *options, "--size", "24x16", "--codec", "raw", "--json").json
    assert set(result) >= {"samples", "shards", "bytes", "pairs_per_second"}
    assert (result["samples"], result["shards"]) == (28, 2)
    assert ShardSet(out, "train").size == (24, 16)
    assert_one_line(call("pack", *options, "--size", "24"), 2, "was packed with --size 24x16")
    assert_one_line(call("pack", "--data", tmp_path / "nowhere", "--out", out), 2, "nowhere")
