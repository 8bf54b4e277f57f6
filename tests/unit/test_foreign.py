"""WebDataset tars that ``pack`` did not write: indexed once, exact as own shards, never wrong."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from portrait_dist.data import Batch, build_loader
from portrait_dist.data.shards import foreign, writer
from portrait_dist.data.shards.cache import Cache
from portrait_dist.data.shards.foreign import ForeignShardSet, choose, index_tar
from portrait_dist.data.shards.sets import open_shards
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.system.address import split_members
from tests import blobs
from tests.cli import assert_one_line, call
from tests.jobs import state_of, train_into
from tests.shard_server import serving
from tests.trees import write_tree

SIZE = (24, 16)
Members = dict[str, bytes]


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "portrait-dist" / "shards" / "indexes"


def picture(
    number: int, kind: str = "JPEG", mask: bool = False, size: tuple[int, int] = SIZE
) -> bytes:
    pixels = np.random.default_rng(number + 1000 * mask).integers(0, 256, (*size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if mask else pixels).save(out, kind)
    return out.getvalue()


def pair(number: int) -> Members:
    return {f"{number:05d}.jpg": picture(number), f"{number:05d}.png": picture(number, "PNG", True)}


def write_tar(path: Path, members: Members, kind: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tars(folder: Path, counts: dict[str, int]) -> Path:
    numbers = itertools.count()
    for name, count in counts.items():
        found: Members = {}
        for number in itertools.islice(numbers, count):
            found |= pair(number) | {f"{number:05d}.json": b"{}"}
        write_tar(folder / name, found)
    return folder


def everything(batches: Iterable[Batch]) -> dict[str, tuple[bytes, bytes]]:
    return {
        key: (batch.image[row].numpy().tobytes(), batch.alpha[row].numpy().tobytes())
        for batch in batches
        for row, key in enumerate(batch.keys)
    }


def test_foreign_tars_give_the_pixels_and_the_exact_stream_of_packed_shards(tmp_path: Path) -> None:
    data = write_tree(tmp_path / "data", {"train": [f"k{i:02d}" for i in range(17)], "val": ["v"]})
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    writer.pack(data, own, None, samples_per_shard=5)
    theirs.mkdir()
    for tar in own.glob("*.tar"):
        os.link(tar, theirs / tar.name)
    for split in ("train", "val"):
        mine = build_loader(own, split, 4, 1, 2, size=(20, 20), exact=True)
        other = build_loader(theirs, split, 4, 1, 2, size=(20, 20), exact=True)
        for one, two in zip(mine, other, strict=True):
            assert one.keys == two.keys
            assert torch.equal(one.image, two.image)
            assert torch.equal(one.alpha, two.alpha)
    ranks = [build_loader(theirs, "train", 4, 1, 2, rank, 2, size=(20, 20)) for rank in range(2)]
    one_rank = build_loader(theirs, "train", 8, 1, -1, 0, 1, size=(20, 20))
    for whole, *parts in zip(one_rank, *ranks, strict=True):
        assert whole.keys == [key for part in parts for key in part.keys]


def test_a_tar_is_no_second_set_under_another_name(tmp_path: Path) -> None:
    folder = tars(tmp_path / "theirs", {"train-0.tar": 6})
    shutil.copy(folder / "train-0.tar", folder / "train-1.tar")
    for other in (f"{folder}/train-1.tar", f"{folder}/./train-0.tar"):
        with pytest.raises(InputError, match=r"train-.\.tar: its train split is that of \S+-0.tar"):
            build_loader(f"{folder}/train-0.tar,{other}:2", "train", 2)


def test_tars_are_indexed_once_and_again_when_they_change(
    tmp_path: Path, cache_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tars(tmp_path / "set", {"train-0.tar": 6, "train-1.tar": 5, "val-0.tar": 3})
    first = open_shards(folder, "train")
    assert "3 WebDataset tar(s), 14 samples of image jpg mask png: train 11, val 3" in (
        capfd.readouterr().err
    )
    made = {path.name: path.stat().st_mtime_ns for path in cache_home.glob("*.index")}
    assert len(made) == 3
    again = open_shards(folder, "train")
    assert again.identity == first.identity
    assert capfd.readouterr().err == ""
    assert {path.name: path.stat().st_mtime_ns for path in cache_home.glob("*.index")} == made
    write_tar(folder / "train-1.tar", pair(100) | pair(101))
    changed = open_shards(folder, "train")
    assert changed.samples == 8
    assert changed.identity != first.identity
    for path in cache_home.glob("*.index"):  # a bit that fell over is no index
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert open_shards(folder, "train").identity == changed.identity


def test_threads_that_open_a_set_at_once_index_each_tar_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tars(tmp_path / "set", {"train-0.tar": 4, "val-0.tar": 2})
    indexed: list[str] = []
    together = threading.Barrier(4)

    def counted(tar: Path, members: dict[str, str]) -> foreign.TarIndex:
        indexed.append(tar.name)
        return index_tar(tar, members)

    def work() -> None:
        together.wait()
        assert open_shards(folder, "train", cache=Cache(tmp_path / "c")).samples == 4

    monkeypatch.setattr(foreign, "index_tar", counted)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(indexed) == ["train-0.tar", "val-0.tar"]


def test_tars_that_name_no_split_are_divided_by_key_the_same_everywhere(tmp_path: Path) -> None:
    folder = tars(tmp_path / "set", {"a.tar": 30, "more/b.tar": 20})
    found = {
        split: everything(build_loader(folder, split, 1, size=SIZE, drop_last=False))
        for split in ("train", "val", "test")
    }
    assert {split: len(one) for split, one in found.items()} == {"train": 40, "val": 5, "test": 5}
    assert len(set().union(*found.values())) == 50
    moved = folder.rename(tmp_path / "moved")
    assert everything(build_loader(moved, "val", 1, size=SIZE)) == found["val"]
    (moved / "train-c.tar").write_bytes((moved / "a.tar").read_bytes())
    with pytest.raises(InputError, match="its name says no split"):
        open_shards(moved, "val")


def test_names_say_their_split_in_capitals_too_and_reach_the_terminal_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"Train-0.tar": 3, "VALID/0.tar": 2}
    folder = tars(tmp_path / "set", names)
    odd = {"a.x\x1b[31m\n.jpg": picture(40), "a.mask.png": picture(40, "PNG", True)}
    write_tar(folder / "VALID" / "1.tar", odd)
    assert [open_shards(folder, split).samples for split in ("train", "val")] == [3, 3]
    printed = capsys.readouterr()
    assert "x\\x1b[31m\\n.jpg" in printed.out + printed.err
    assert "\x1b" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("suffixes", "image", "mask", "expected"),
    [
        ("jpg png json", "", "", ("jpg", "png")),
        ("jpeg seg.png txt", "", "", ("jpeg", "seg.png")),
        ("png mask.png", "", "", ("png", "mask.png")),
        ("image.webp alpha_mask.png", "", "", ("image.webp", "alpha_mask.png")),
        ("jpg a.png b.png", "", "b.png", "several"),
        ("jpg a.png b.png", "jpg", "b.png", ("jpg", "b.png")),
        ("jpg png mask.png", "jpg", "", ("jpg", "mask.png")),
        ("rgb.jpg depth.png seg.png", "", "", "several"),
        ("jpg", "", "", "no mask"),
        ("jpg jpeg", "", "", "no mask"),
        ("json cls", "", "", None),
        ("jpeg png", "jpg;jpeg", "png", ("jpeg", "png")),
    ],
)
def test_image_and_mask_are_told_by_their_names_or_asked_for(
    suffixes: str, image: str, mask: str, expected: object
) -> None:
    found = choose(tuple(suffixes.split()), image, mask)
    if isinstance(expected, str):
        assert isinstance(found, str)
        assert expected in found
    else:
        assert found == expected


def test_members_that_are_named_are_taken_and_every_picture_type_is_read(tmp_path: Path) -> None:
    turned, plain = (
        io.BytesIO(),
        Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(24, 16, 3)),
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(turned, "JPEG", exif=exif)
    palette = Image.new("P", (24, 16))
    palette.putpalette([0, 0, 0, 200, 30, 30])
    palette.paste(1, (3, 3, 9, 9))
    mask = io.BytesIO()
    palette.save(mask, "PNG")
    long = "folder/" + "n" * 120
    members = {
        f"{long}.photo.jpg": turned.getvalue(),
        f"{long}.depth.png": picture(1, "PNG", True),
        f"{long}.seg.png": mask.getvalue(),
        "b.photo.jpg": picture(2, "WEBP"),
        "b.seg.png": picture(2, "PNG", True),
    }
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar = write_tar(tmp_path / f"train-{kind}.tar", members, kind)
        shards = f"{tar}#image=photo.jpg+mask=seg.png"
        assert split_members(shards)[1] == {"image": "photo.jpg", "mask": "seg.png"}
        (batch,) = build_loader(shards, "train", 2, size=(16, 24), shuffle=False, exact=True)
        assert batch.keys == [long, "b"]
        expected = np.zeros((16, 24), np.uint8)
        expected[3:9, 3:9] = 255
        assert np.array_equal(batch.alpha[0].numpy(), expected)
        upright = np.asarray(
            Image.open(turned).convert("RGB").transpose(Image.Transpose.ROTATE_270)
        )
        assert np.abs(batch.image[0].numpy().astype(int) - upright).max() <= 4
    assert_one_line(
        call("show", "--data", tar, "--split", "train", "--out", tmp_path / "s.png"),
        2,
        str(tar),
        "several members",
        "#image=SUFFIX+mask=SUFFIX",
    )
    shown = call("show", "--data", shards, "--split", "train", "--out", tmp_path / "s.png")
    assert shown.exit_code == 0, shown.stderr


def whole() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (pair(0) | pair(1)).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def twice() -> bytes:
    """Two members of one name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a.jpg", "a.png", "a.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    return out.getvalue()


def with_field(start: int, value: bytes, member: int = 0) -> bytes:
    """A tar with bytes of a header replaced and its checksum right."""
    data = bytearray(whole())
    at = 0
    for _ in range(member):
        at += 512 + -(-int(data[at + 124 : at + 135], 8) // 512) * 512
    data[at + start : at + start + len(value)] = value
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


HOSTILE: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "a name twice": (twice, 3, "a.jpg is in it twice"),
    "empty": (lambda: b"", 3, "no whole tar"),
    "noise": (lambda: bytes(range(256)) * 40, 3, "no whole tar"),
    "compressed": (lambda: b"\x1f\x8b" + whole(), 2, "is compressed"),
    "cut within a member": (lambda: whole()[:3000], 3, "cut off"),
    "cut after a member": (
        lambda: whole()[: whole().rstrip(b"\0").__len__() // 512 * 512 + 512],
        3,
        "cut off",
    ),
    "a damaged header": (
        lambda: whole().replace(b"00001.jpg", b"00001.jpX"),
        3,
        "something follows",
    ),
    "two tars in one": (lambda: whole() + whole(), 3, "something follows"),
    "a link": (lambda: with_field(156, b"1"), 3, "is a link"),
    "a negative size": (lambda: with_field(124, b"\xff" * 12), 3, "no whole tar"),
    "a size of a disk": (lambda: with_field(124, b"77777777777\0", 2), 3, "no whole tar"),
    "a header of a disk": (
        lambda: with_field(124, b"77777777777\0" + bytes(12) + b" " * 8 + b"x"),
        3,
        "a header of 8,589,934,592 bytes",
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_tar_is_one_clear_line_and_leaves_no_index(
    name: str, tmp_path: Path, cache_home: Path
) -> None:
    make, code, part = HOSTILE[name]
    (tmp_path / "set").mkdir()
    tar = tmp_path / "set" / "train-0.tar"
    tar.write_bytes(make())
    result = call(
        "show", "--data", tmp_path / "set", "--split", "train", "--out", tmp_path / "s.png"
    )
    assert_one_line(result, code, str(tar), part)
    assert list(cache_home.glob("*.index")) == []


@pytest.mark.parametrize(
    ("members", "code", "part"),
    [
        (pair(0) | {"00001.jpg": picture(1)}, 2, "no mask among jpg"),
        (pair(0) | {"a.jpg": picture(1), "a.png": picture(1, "PNG", True, (9, 9))}, 2, "one size"),
        (
            pair(0) | {"a.jpg": b"no picture", "a.png": picture(1, "PNG", True)},
            3,
            "a.jpg: does not decode (it is no picture of a known kind); pack the tar again",
        ),
        (
            pair(0) | {"a.jpg": picture(1), "a.mask.png": b"no picture"},
            3,
            "a.mask.png: does not decode (it is no picture of a known kind); pack the tar again",
        ),
        ({"a.jpg": picture(1), "a.png": picture(1, "PNG")}, 2, "colour picture"),
        ({"a.jpg": picture(1)[:200], "a.png": picture(1, "PNG", True)}, 3, "does not decode"),
        ({"a.txt": b"no pictures"}, 2, "no image with a mask"),
        ({"a\n.jpg": picture(1), "a\n.png": picture(1, "PNG", True)}, 3, "no name of a sample"),
    ],
)
def test_wrong_members_are_refused_at_the_door_by_name(
    members: Members, code: int, part: str, tmp_path: Path
) -> None:
    tar = write_tar(tmp_path / "train-0.tar", members)
    result = call("show", "--data", tar, "--split", "train", "--out", tmp_path / "s.png")
    assert_one_line(result, code, str(tar), part)
    assert "object at" not in result.stderr
    assert "object at" not in result.stderr


def test_a_tar_that_changes_while_it_is_open_never_gives_another_sample(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "train-0.tar", pair(0) | pair(1))
    shards = ForeignShardSet(tar, "train")
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamagedDataError, match="sample 0: the sample is not what it was"):
        shards.read(0)
    tar.write_bytes(data[:1024])
    with pytest.raises(DamagedDataError, match="copy the tar again"):
        shards.read(1)


def test_packed_shards_that_lost_their_manifest_are_not_taken_for_foreign_ones(
    tiny_shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_shards.iterdir():
        if path.name != "manifest.json":
            os.link(path, copy / path.name)
    with pytest.raises(InputError, match=r"no manifest\.json in it"):
        open_shards(copy, "train")


def test_verify_decodes_every_sample_and_names_what_no_header_shows(tmp_path: Path) -> None:
    folder = tars(tmp_path / "set", {"train-0.tar": 5, "val-0.tar": 2})
    done = call("verify", folder, "--json")
    assert (done.exit_code, done.json["samples"], done.json["shards"]) == (0, 7, 2), done.stderr
    assert call("doctor", "--shards", folder, "--json").json["checks"]
    cut = pair(50)
    cut["00050.jpg"] = cut["00050.jpg"][:-200]
    write_tar(folder / "val-0.tar", pair(49) | cut)
    found = call("verify", folder, "--json")
    assert found.exit_code == 3
    assert found.json["samples"] == 6
    assert [line for line in found.json["errors"] if "val-0.tar, sample 1 (00050)" in line]


def test_a_run_on_foreign_tars_with_an_own_set_trains_evaluates_and_refuses_other_tars(
    tiny_shards: Path, tmp_path: Path
) -> None:
    folder = tars(tmp_path / "set", {"train-0.tar": 20, "val-0.tar": 3})
    sets = f"{tiny_shards}:1,{folder}:0.5"
    done = train_into(tmp_path, sets, "train.max_epochs=1", "train.batch_size=67")
    assert done.exit_code == 0, done.stderr
    assert done.json["samples_seen"] == 67
    checkpoint = blobs.save(blobs.random_network(), tmp_path / "net.pth", size=(32, 32))
    options = ("--split", "val", "--device", "cpu", "--json")
    scored = call("evaluate", "--checkpoint", checkpoint, "--data", sets, *options)
    assert {name: one["samples"] for name, one in scored.json["sets"].items()} == {
        "shards": 7,
        "set": 3,
    }
    before = state_of(tmp_path / "run")
    write_tar(folder / "train-0.tar", pair(7))
    refused = train_into(tmp_path, sets, "train.max_epochs=2", "train.batch_size=58")
    assert_one_line(refused, 2, "train split", "/set:0.5")
    assert state_of(tmp_path / "run") == before
    assert Counter(open_shards(sets, "train").shard_sizes)[1] == 1


def test_tars_of_others_at_an_address_are_refused_by_one_line_that_says_what_to_do(
    tmp_path: Path,
) -> None:
    folder = tars(tmp_path / "set", {"train-0.tar": 2, "val-0.tar": 1})
    with serving(folder) as server:
        for end, asked in (
            ("", ["manifest.json"]),
            ("/train-0.tar", []),
            ("/train-{0..9}.tar", []),
            ("/train-0.tar?sig=secret", []),
            ("#image=jpg+mask=png", []),
        ):
            server.asked.clear()
            done = train_into(tmp_path, f"{server.address}{end}", "train.max_epochs=1")
            assert_one_line(done, 2, server.address, "download them, and give that folder")
            assert "secret" not in done.stderr
            assert server.asked == asked
        addressed = f"{folder},{server.address}/train-0.tar:0.5"
        done = train_into(tmp_path, addressed, "train.max_epochs=1")
        assert_one_line(done, 2, f"{server.address}/train-0.tar", "and give that folder")
    assert not (tmp_path / "run").exists()
