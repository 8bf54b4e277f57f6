"""prepare: right pairs, a split that is a pure function, a tree that is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from portrait_dist.data.source import assignment, layouts, split
from portrait_dist.data.source.assignment import SPLITS
from portrait_dist.data.source.pairs import PairTable, check_pairs
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.files import lock_output
from tests.cli import Result, assert_one_line, call


def add_pair(
    raw: Path, key: str, size: tuple[int, int] = (48, 64), matte_mode: str = "RGBA"
) -> tuple[Path, Path]:
    """Write a small pair in the AISegment layout."""
    group = key.partition("-")[0]
    image = raw / "clip_img" / group / "clip_00000000" / f"{key}.jpg"
    matte = raw / "matting" / group / "matting_00000000" / f"{key}.png"
    pixels = np.random.default_rng(list(key.encode())).integers(
        0, 256, (size[1], size[0], 4), np.uint8
    )
    for path, mode in ((image, "RGB"), (matte, matte_mode)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels, "RGBA").convert(mode).save(path)
    return image, matte


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Ten small pairs in three groups."""
    for number in range(10):
        add_pair(tmp_path / "raw", f"{100 + number % 3}-{number:08d}")
    return tmp_path / "raw"


def prepare(raw: Path, out: Path, *options: str) -> Result:
    return call("prepare", "--raw", raw, "--out", out, "--json", *options)


def files(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()
    }


def test_the_split_is_the_same_on_every_machine() -> None:
    keys = [f"1803151818-{number:08d}" for number in range(20)]
    assigned = assignment.assign(keys, 1, 0.1, 0.1)
    # Written down once: sha256 of "1:<key>" is the same everywhere, forever.
    assert [key[-2:] for key in assigned["val"] + assigned["test"]] == ["01", "16", "03", "04"]
    assert assignment.assign(keys[::-1], 1, 0.1, 0.1) == assigned
    assert assignment.assign(keys, 2, 0.1, 0.1) != assigned


@given(
    n=st.integers(1, 300), val=st.floats(0, 0.49), test=st.floats(0, 0.5), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_every_key_is_in_one_split_and_sizes_are_rounded_down(
    n: int, val: float, test: float, seed: int
) -> None:
    keys = [f"k{number}" for number in range(n)]
    assigned = assignment.assign(keys, seed, val, test)
    assert sorted(assigned["train"] + assigned["val"] + assigned["test"]) == sorted(keys)
    assert (len(assigned["val"]), len(assigned["test"])) == (int(val * n), int(test * n))


@given(sizes=st.lists(st.integers(1, 30), min_size=3, max_size=40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_no_group_is_in_two_splits_and_no_split_is_empty(sizes: list[int], seed: int) -> None:
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    keys = [f"k{number}" for number in range(len(groups))]
    assigned = assignment.assign(keys, seed, 0.2, 0.2, groups)
    of = dict(zip(keys, groups, strict=True))
    assert sorted(assigned["train"] + assigned["val"] + assigned["test"]) == sorted(keys)
    seen = [{of[key] for key in assigned[name]} for name in SPLITS]
    assert sum(len(each) for each in seen) == len(set(groups))
    wanted = int(0.2 * len(keys))
    assert all(seen) or not wanted
    assert all(len(assigned[name]) <= wanted + max(sizes) for name in ("val", "test"))


@pytest.mark.parametrize(
    ("val", "test"), [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0), (float("nan"), 0.1)]
)
def test_fractions_that_leave_no_training_pair_are_refused(val: float, test: float) -> None:
    with pytest.raises(InputError, match="fraction"):
        assignment.assign(["a", "b"], 1, val, test)


def test_the_real_sample_is_paired_and_junk_is_ignored(real_sample: Path, tmp_path: Path) -> None:
    done = prepare(real_sample, tmp_path / "data")
    result = done.json
    assert {name: result[name] for name in ("pairs", "train", "val", "test")} == {
        "pairs": 109,
        "train": 89,
        "val": 10,
        "test": 10,
    }
    assert (result["images_without_matte"], result["mattes_without_image"]) == (2, 1)
    assert "2000000006-00000063.jpg" in done.stderr
    assert "2000000006-00000065.png" in done.stderr
    made = split.read_split(tmp_path / "data")
    originals = {pair.key: pair for pair in layouts.find_pairs(real_sample).pairs}
    for name in SPLITS:
        for pair in made.pairs(name):
            original = originals[pair.key]
            assert Path(pair.image).read_bytes() == Path(original.image).read_bytes()
            assert Path(pair.matte).read_bytes() == Path(original.matte).read_bytes()
            assert pair.group == originals[pair.key].group
    assert sum(path.is_file() for path in (tmp_path / "data").rglob("*")) == 2 * 109 + 1


def test_junk_and_files_without_a_partner_are_reported_or_ignored(raw: Path) -> None:
    lone_image, other_matte = add_pair(raw, "100-00000090")
    other_matte.unlink()
    other_image, lone_matte = add_pair(raw, "101-00000091")
    other_image.unlink()
    (raw / "clip_img" / "._100").write_bytes(b"x")
    (raw / "matting" / "100" / "._matting_00000000").write_bytes(b"x")
    (lone_image.parent / "._100-00000000.jpg").write_bytes(b"x")
    (lone_image.parent / "Thumbs.db").write_bytes(b"x")
    (raw / "clip_img" / "100" / "elsewhere").mkdir()
    report = layouts.find_pairs(raw)
    assert len(report.pairs) == 10
    assert [pair.key for pair in report.pairs] == sorted(pair.key for pair in report.pairs)
    assert (report.images_without_matte, report.mattes_without_image) == (
        [lone_image],
        [lone_matte],
    )


def test_links_share_the_file_and_copies_do_not(raw: Path, tmp_path: Path) -> None:
    assert prepare(raw, tmp_path / "linked").exit_code == 0
    assert prepare(raw, tmp_path / "copied", "--mode", "copy").exit_code == 0
    assert files(tmp_path / "linked") == files(tmp_path / "copied")
    for pair in layouts.find_pairs(raw).pairs:
        (linked,) = (tmp_path / "linked").glob(f"*/{pair.key}.jpg")
        (copied,) = (tmp_path / "copied").glob(f"*/{pair.key}.jpg")
        assert linked.samefile(pair.image)
        assert not copied.samefile(pair.image)


def test_a_file_system_without_links_gets_copies(raw: Path, tmp_path: Path) -> None:
    shared_memory = Path("/dev/shm")
    if (
        not os.access(shared_memory, os.W_OK)
        or shared_memory.stat().st_dev == tmp_path.stat().st_dev
    ):
        pytest.skip("there is no second file system here")
    out = shared_memory / f"portrait-dist-test-{os.getpid()}"
    try:
        assert prepare(raw, out).exit_code == 0
        assert len(files(out)) == 21
    finally:
        shutil.rmtree(out)


def test_run_again_it_changes_nothing_and_adds_what_is_missing(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert prepare(raw, out).exit_code == 0
    before = files(out)
    kept = (out / "split.json").stat().st_mtime_ns
    assert prepare(raw, out).exit_code == 0
    next(out.glob("train/*.png")).unlink()
    assert prepare(raw, out).exit_code == 0
    assert files(out) == before
    assert (out / "split.json").stat().st_mtime_ns == kept


def test_what_a_killed_run_left_is_cleared(raw: Path, tmp_path: Path) -> None:
    (tmp_path / ".data.part" / "train").mkdir(parents=True)
    (tmp_path / ".data.part" / "train" / "half.jpg").write_bytes(b"x")
    assert prepare(raw, tmp_path / "data").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw"]
    assert not list((tmp_path / "data").rglob("half.jpg"))


def test_two_prepares_do_not_write_into_one_folder(raw: Path, tmp_path: Path) -> None:
    part = tmp_path / ".data.part"
    (part / "train").mkdir(parents=True)
    (part / "train" / "theirs.jpg").write_bytes(b"x")
    with lock_output(part, "prepare", tmp_path / "data"):
        refused = prepare(raw, tmp_path / "data")
        assert_one_line(refused, 2, "another 'portrait-dist prepare' is writing there")
        assert (part / "train" / "theirs.jpg").exists()
    assert prepare(raw, tmp_path / "data").exit_code == 0


def test_a_folder_that_another_process_has_just_made_is_accepted(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not there at the first look; now it is, whole, and of the same command."""

    def meanwhile(pairs: PairTable) -> None:
        monkeypatch.setattr(split, "check_pairs", check_pairs)
        assert prepare(raw, tmp_path / "data").exit_code == 0
        check_pairs(pairs)

    monkeypatch.setattr(split, "check_pairs", meanwhile)
    done = prepare(raw, tmp_path / "data")
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw"]


def change_settings(raw: Path, out: Path) -> list[str]:
    prepare(raw, out)
    return ["--seed", "7"]


def change_pairs(raw: Path, out: Path) -> list[str]:
    prepare(raw, out)
    add_pair(raw, "103-00000099")
    return []


def hold_something_else(raw: Path, out: Path) -> list[str]:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    return []


def be_a_file(raw: Path, out: Path) -> list[str]:
    out.write_text("mine")
    return []


@pytest.mark.parametrize("arrange", [change_settings, change_pairs, hold_something_else, be_a_file])
def test_an_output_folder_of_something_else_stays_as_it_is(
    raw: Path, tmp_path: Path, arrange: Callable[[Path, Path], list[str]]
) -> None:
    out = tmp_path / "data"
    options = arrange(raw, out)
    before = files(tmp_path)
    assert_one_line(prepare(raw, out, *options), 2, str(out))
    assert files(tmp_path) == before


def no_alpha(raw: Path) -> Path:
    return add_pair(raw, "100-00000050", matte_mode="RGB")[1]


def sizes_differ(raw: Path) -> Path:
    _, matte = add_pair(raw, "100-00000050")
    Image.new("RGBA", (48, 60)).save(matte)
    return matte


def png_named_jpg(raw: Path) -> Path:
    image, matte = add_pair(raw, "100-00000050")
    shutil.copy(matte, image)
    return image


def different_twin(raw: Path) -> Path:
    image, _ = add_pair(raw, "100-00000050")
    twin = raw / "clip_img" / "200" / "clip_00000000" / image.name
    twin.parent.mkdir(parents=True)
    Image.new("RGB", (48, 64)).save(twin)
    return twin


def dotted_name(raw: Path) -> Path:
    return add_pair(raw, "100-00000050.v2")[0]


def truncated_image(raw: Path) -> Path:
    image, _ = add_pair(raw, "100-00000050", size=(300, 400))
    image.write_bytes(image.read_bytes()[:-5000])
    return image


def truncated_matte(raw: Path) -> Path:
    _, matte = add_pair(raw, "100-00000050", size=(300, 400))
    matte.write_bytes(matte.read_bytes()[:-100])
    return matte


def empty_file(raw: Path) -> Path:
    image, _ = add_pair(raw, "100-00000050")
    image.write_bytes(b"")
    return image


def no_picture(raw: Path) -> Path:
    _, matte = add_pair(raw, "100-00000050")
    matte.write_text("<html>404</html>")
    return matte


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (no_alpha, 2),
        (sizes_differ, 2),
        (png_named_jpg, 2),
        (different_twin, 2),
        (dotted_name, 2),
        (truncated_image, 3),
        (truncated_matte, 3),
        (empty_file, 3),
        (no_picture, 3),
    ],
)
def test_a_bad_pair_is_named_and_nothing_is_written(
    raw: Path, tmp_path: Path, spoil: Callable[[Path], Path], code: int
) -> None:
    bad = spoil(raw)
    result = prepare(raw, tmp_path / "data")
    assert_one_line(result, code, str(bad))
    assert len(result.lines) == 1
    assert result.json["exit_code"] == code
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_of_identical_files_one_is_used_and_the_other_named(raw: Path, tmp_path: Path) -> None:
    image, _ = add_pair(raw, "100-00000050")
    twin = raw / "clip_img" / "200" / "clip_00000000" / image.name
    twin.parent.mkdir(parents=True)
    shutil.copy(image, twin)
    result = prepare(raw, tmp_path / "data")
    assert result.json["identical_files"] == 1
    assert str(twin) in result.stderr


def test_bytes_behind_the_end_of_a_jpeg_are_no_damage(raw: Path, tmp_path: Path) -> None:
    image, _ = add_pair(raw, "100-00000050")
    image.write_bytes(image.read_bytes() + bytes(9000))
    assert prepare(raw, tmp_path / "data").exit_code == 0


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "no such folder"),
        (".", "Did you mean"),
        ("raw/clip_img", "no AISegment tree"),
        ("raw/matting", "clip_img"),
    ],
)
def test_a_folder_that_is_no_raw_tree_is_named(
    raw: Path, tmp_path: Path, folder: str, message: str
) -> None:
    result = prepare(tmp_path / folder, tmp_path / "data")
    assert_one_line(result, 2, message)
    assert len(result.lines) == 1
    assert not (tmp_path / "data").exists()


def test_a_tree_without_one_pair_is_refused(tmp_path: Path) -> None:
    _, matte = add_pair(tmp_path / "raw", "100-00000000")
    matte.rename(matte.with_name("other.png"))
    assert_one_line(prepare(tmp_path / "raw", tmp_path / "data"), 2, "1 images and 1 mattes")


def test_images_that_are_no_jpeg_are_named_with_what_was_expected(
    raw: Path, tmp_path: Path
) -> None:
    image, _ = add_pair(raw, "100-00000050")
    png = image.with_suffix(".png")
    image.rename(png)
    result = prepare(raw, tmp_path / "data")
    assert result.json["other_pictures"] == 1
    assert f"no JPEG by its name: {png}" in result.stderr
    for image in raw.glob("clip_img/*/*/*.jpg"):
        image.rename(image.with_suffix(".webp"))
    refused = prepare(raw, tmp_path / "other")
    assert_one_line(refused, 2, ".webp: is no JPEG by its name", "convert the images to JPEG")


def bomb(raw: Path) -> Path:
    """A PNG that claims 400 million pixels."""
    _, matte = add_pair(raw, "100-00000050")
    data = bytearray(matte.read_bytes())
    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    matte.write_bytes(data)
    return matte


def huge(raw: Path) -> Path:
    """A real JPEG of 20000×16000 pixels, 4 MB."""
    image, _ = add_pair(raw, "100-00000050")
    Image.new("L", (20000, 16000), 128).save(image)
    return image


@pytest.mark.parametrize("spoil", [bomb, huge])
def test_a_picture_of_too_many_pixels_is_named_beside_other_bad_pairs(
    raw: Path, tmp_path: Path, spoil: Callable[[Path], Path]
) -> None:
    bad = spoil(raw)
    cut = add_pair(raw, "101-00000051")[0]
    cut.write_bytes(cut.read_bytes()[:-9])
    result = prepare(raw, tmp_path / "data")
    assert_one_line(result, 2, str(bad), "178,956,970 pixels", "and 1 more such pairs")
    assert len(result.lines) == 1


def loop(folder: Path) -> Path:
    path = folder / "loop.jpg"
    path.symlink_to(path.name)
    return path


def loop_of_folders(folder: Path) -> Path:
    path = folder.parent / "clip_loop"
    path.symlink_to(path.name)
    return path


def named_pipe(folder: Path) -> Path:
    path = folder / "pipe.jpg"
    os.mkfifo(path)
    return path


def socket_file(folder: Path) -> Path:
    path = folder / "s.jpg"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a path of a socket has at most 107 bytes
    return path


def device(folder: Path) -> Path:
    path = folder / "zero.jpg"
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("make", [loop, loop_of_folders, named_pipe, socket_file, device])
def test_what_is_neither_file_nor_folder_is_refused_by_name(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    folder = next((raw / "clip_img" / "100").glob("clip_*"))
    monkeypatch.chdir(folder)
    bad = make(folder)
    result = prepare(raw, tmp_path / "data")
    assert_one_line(result, 2, str(bad), "remove it")
    assert len(result.lines) == 1
    assert not (tmp_path / "data").exists()


def test_names_of_255_bytes_work(tmp_path: Path) -> None:
    for number in range(3):
        add_pair(tmp_path / "raw", f"100-{number:0247d}")
    out = tmp_path / ("d" * 255)
    assert prepare(tmp_path / "raw", out, "--mode", "copy").json["pairs"] == 3
    assert prepare(tmp_path / "raw", out, "--mode", "copy").exit_code == 0
    assert len(files(out)) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "raw"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "٦٤"),
        ("--seed", "1_000"),
        ("--seed", "9" * 30),
        ("--val-fraction", "nan"),
        ("--val-fraction", "inf"),
        ("--val-fraction", "٠٫١"),
        ("--test-fraction", "-0.1"),
        ("--test-fraction", "1e400"),
    ],
)
def test_numbers_that_are_none_are_refused_in_one_line(
    raw: Path, tmp_path: Path, option: str, value: str
) -> None:
    result = prepare(raw, tmp_path / "data", option, value)
    assert_one_line(result, 2, option)
    assert len(result.lines) == 1
    assert not (tmp_path / "data").exists()


def test_an_output_that_cannot_be_written_is_one_line_and_leaves_nothing(
    raw: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    result = prepare(raw, tmp_path / "file" / "data")
    assert_one_line(result, 2, "file", "give the path of a folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "raw"]


DAMAGED_SPLITS = [
    b"{",
    b"[]",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"format": 1, "splits": {"train": []}}',
    b'{"format": 1, "splits": {"train": [1], "val": [], "test": []}}',
    b'{"format": 1, "splits": {"train": "abc", "val": [], "test": []}}',
    b'{"format": 1, "splits": [[], [], []]}',
    b'{"format": 1, "source": 5, "splits": {"train": [], "val": [], "test": []}}',
    b'{"format": 1, "seed": 1e400, "splits": {"train": [], "val": [], "test": []}}',
    b'{"format": 1, "seed": {}, "splits": {"train": [], "val": [], "test": []}}',
    b'{"format": "1", "splits": {"train": [], "val": [], "test": []}}',
]


@pytest.mark.parametrize("content", DAMAGED_SPLITS, ids=range(len(DAMAGED_SPLITS)))
def test_a_damaged_split_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "split.json").write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"split\.json: damaged"):
        split.read_split(tmp_path)


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../../x", "a/b", "a\\b", "a\0b", "line\nbreak", "\ud800"]
)
def test_a_key_that_is_no_file_name_is_refused(tmp_path: Path, key: str) -> None:
    splits = {"train": ["good"], "val": [key], "test": []}
    (tmp_path / "split.json").write_text(json.dumps({"format": 1, "splits": splits}))
    with pytest.raises(InputError, match=r"split\.json, val: the key '.*' cannot be a file name"):
        split.read_split(tmp_path)


def test_a_named_pipe_in_place_of_the_split_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "split.json")
    with pytest.raises(InputError, match=r"split\.json: cannot be read \(is not a regular file\)"):
        split.read_split(tmp_path)


def test_a_folder_that_is_not_prepared_gets_the_command_that_would(
    raw: Path, tmp_path: Path
) -> None:
    for folder, message in (
        (raw, "portrait-dist prepare --raw"),
        (tmp_path, "portrait-dist prepare"),
        (tmp_path / "x", "no such"),
    ):
        with pytest.raises(InputError, match=message):
            split.read_split(folder)


@pytest.mark.parametrize(
    "address", ["nowhere://a/b.jpg", "s3fs-is-missing://a/b.jpg", "a+b://x.jpg", "github://x.jpg"]
)
def test_an_address_in_a_list_that_nothing_here_opens_is_one_line(
    address: str, tmp_path: Path
) -> None:
    names = tmp_path / "list.csv"
    names.write_text(f"image,mask\n{address},{address.replace('jpg', 'png')}\n")
    refused = call("prepare", "--raw", names, "--out", tmp_path / "out")
    assert_one_line(refused, 2, address)
    assert not (tmp_path / "out").exists()
