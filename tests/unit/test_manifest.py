"""Manifests and indexes: one validating door, whatever the bytes are."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.data.shards import format as shard_format
from portrait_dist.data.shards.format import (
    IndexHeader,
    Manifest,
    Record,
    ShardEntry,
    SplitEntry,
    index_bytes,
    parse_index,
    parse_manifest,
)
from portrait_dist.data.shards.reader import DamagedSampleError, ShardSet, read_manifest
from portrait_dist.errors import DamagedDataError, InputError
from tests import cli

HASH = "0123456789abcdef" * 4


@pytest.fixture
def text(tiny_shards: Path) -> str:
    """The manifest of the small shards."""
    return (tiny_shards / "manifest.json").read_text()


def refused(data: str | bytes) -> str:
    """The one line that refuses a manifest."""
    with pytest.raises((DamagedDataError, InputError)) as caught:
        parse_manifest(data, "DIR/manifest.json")
    message = str(caught.value)
    assert message.startswith("DIR/manifest.json: ")
    assert "\n" not in message
    assert len(message) < 400
    return message


def without_digest(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    del found["sha256"]
    return found


def test_every_flipped_bit_of_a_manifest_is_refused_or_harmless(text: str) -> None:
    """All bits of all numbers and names, and every 7th of the rest, as the hashes are long."""
    data = text.encode()
    expected = parse_manifest(text, "m")
    hashes = {
        offset for match in re.finditer(rb"[0-9a-f]{64}", data) for offset in range(*match.span())
    }
    refusals = 0
    for offset in range(len(data)):
        for bit in range(8):
            if offset in hashes and (8 * offset + bit) % 7:
                continue
            flipped = bytearray(data)
            flipped[offset] ^= 1 << bit
            try:
                assert parse_manifest(bytes(flipped), "m") == expected, (offset, bit)
            except (DamagedDataError, InputError):
                refusals += 1
    assert refusals > 1000


def test_a_flipped_size_of_an_old_manifest_is_found_at_the_first_sample(
    tiny_shards: Path, tmp_path: Path, text: str
) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    old = without_digest(text)
    (folder / "manifest.json").write_text(json.dumps(old))
    assert ShardSet(folder, "train").read(0).key == ShardSet(tiny_shards, "train").read(0).key
    old["size"] = [48, 32]
    (folder / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(
        DamagedSampleError,
        match=r"sample 3: it has 32x32 pixels, the manifest says 48x32; .*pack or copy",
    ):
        ShardSet(folder, "train").read(3)


def set_in(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of a manifest at a path such as ``splits.train.shards.0.bytes``."""

    def edit(found: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            found = found[int(name)] if name.isdecimal() else found[name]
        found[last] = value

    edit.__name__ = f"{path}={value!r}"[:60]
    return edit


SHARD = "splits.train.shards.0"
WRONG = [
    set_in(path, value)
    for path, values in {
        "format": (None, "1", 1.0, True, [], -1),
        "splits": (None, 5, "x", [], [1]),
        "splits.train": (None, 5, "x", []),
        "splits.train.samples": (None, "57", 57.0, 58, -1, 1e400, 10**400),
        "splits.train.keys_sha256": (None, 5, "", "../x", HASH.upper(), HASH + "\n"),
        "splits.train.shards": (None, 5, {}, "x", [5], [None]),
        "splits.extra": ({"samples": 0, "keys_sha256": HASH, "shards": []},),
        "size": (
            [64],
            [64, 64, 64],
            [0, 64],
            [-1, 64],
            [64, 20000],
            [64.0, 64],
            "64",
            5,
            [True, 1],
        ),
        "codec": (None, "gif", 5, []),
        "quality": (None, 0, 101, "95", 95.5),
        "samples_per_shard": (None, 0, -1, 9, "10", 1e400),
        "source": (None, 5, [], "a\0b", "x" * 5000),
        f"{SHARD}.name": (
            *(None, 5, [], "", "../train-00000.tar", "/etc/train-00000.tar", "x.tar"),
            *("train-00000.index", "val-00000.tar", "train-00001.tar", "train-0000\0.tar"),
            "train-00000.tar\n",
        ),
        f"{SHARD}.samples": (None, 0, -1, 11, "10", 10.0, 1e400, 1 << 70),
        f"{SHARD}.bytes": (None, 0, -512, 513, "x", 1e400, 512, 1 << 60),
        f"{SHARD}.sha256": (None, 5, "", "./../../victim/backup", HASH[:-1], HASH[:-1] + "g"),
        f"{SHARD}.index_sha256": (None, 5, "", "../../x", HASH + "0"),
    }.items()
    for value in values
]


@pytest.mark.parametrize("edit", WRONG, ids=lambda edit: edit.__name__)
def test_a_field_of_a_wrong_type_or_out_of_bounds_is_refused(
    edit: Callable[[dict[str, Any]], None], text: str
) -> None:
    found = without_digest(text)
    parse_manifest(json.dumps(found), "m")  # without a digest: the fields alone decide
    edit(found)
    assert "damaged" in refused(json.dumps(found))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"5",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"format": ' + b"[" * 200_000,
        b'{"format": 1' + b"0" * 5000 + b"}",
        b'{"format": NaN}',
        b'{"format": 1, "splits": Infinity}',
        b"\0" * 100,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_manifest_is_refused_by_one_line(data: bytes) -> None:
    assert "damaged" in refused(data)


def test_a_manifest_beyond_the_limit_is_refused_before_it_is_parsed(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_format, "MANIFEST_LIMIT", len(text) - 1)
    assert "longer than" in refused(text)


def test_splits_that_are_open_at_the_same_time_share_one_manifest(
    tiny_shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    train, val = ShardSet(folder, "train"), ShardSet(folder, "val")
    assert train.manifest is val.manifest
    other = json.loads((folder / "manifest.json").read_text())
    del other["sha256"]
    (folder / "manifest.json").write_text(json.dumps(other | {"quality": 7}))
    assert read_manifest(folder).quality == 7, "the file is read, whatever is in use"


def test_a_newer_format_says_to_update(text: str) -> None:
    assert "format 2, this program knows 1" in refused(text.replace('"format": 1', '"format": 2'))


def test_a_manifest_survives_its_own_text(text: str) -> None:
    manifest = parse_manifest(text, "m")
    assert parse_manifest(manifest.to_json(), "m") == manifest
    assert manifest.to_json() == text
    compact = json.dumps(json.loads(text), separators=(",", ":"), sort_keys=True)
    assert parse_manifest(compact, "m") == manifest, "white space and order are no content"


def index(**changes: Any) -> bytes:
    header = IndexHeader("train-00000.tar", 1, 4096, HASH, None)
    line, _, records = index_bytes(header, [Record(0, 5, 5, 7)]).partition(b"\n")
    return json.dumps(json.loads(line) | changes).encode() + b"\n" + records


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"[]\n",
        b"x" * 100_000,
        b"[" * 60_000 + b"\n",
        index()[:-1],
        index() + b"\0",
        index(samples=2),
        index(samples=0),
        index(samples="1"),
        index(samples=1e400),
        index(format=2),
        index(shard="../x.tar"),
        index(shard=None),
        index(bytes=-1),
        index(sha256="x"),
        index(made_from=5),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_index_is_refused_by_one_line(data: bytes) -> None:
    header, records = parse_index(index(), "DIR/train-00000.index")
    assert (header.samples, len(records)) == (1, 20)
    with pytest.raises(DamagedDataError, match=r"^DIR/train-00000.index: damaged \(") as caught:
        parse_index(data, "DIR/train-00000.index")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "train-00000.tar", "train-00000.index"])
@pytest.mark.timeout(60)
def test_a_fifo_in_place_of_a_file_is_refused_by_name_and_does_not_hang(
    name: str, tiny_shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    expected = "is not a regular file"
    with pytest.raises(DamagedDataError, match=expected) as caught:
        ShardSet(folder, "train").read(0)
    assert name.removesuffix(".index") in str(caught.value)
    cli.assert_one_line(cli.call("verify", folder), 3, name, expected)


def test_a_hundred_thousand_shards_are_planned_within_bounded_memory() -> None:
    """10^8 samples: the manifest parses, and any sample is located, without a shard being there."""
    shards = [
        ShardEntry(f"train-{number:05d}.tar", 1000, 1024 * 1001, HASH, HASH)
        for number in range(100_000)
    ]
    splits = {"train": SplitEntry(100_000_000, HASH, shards)}
    text = Manifest("raw", (256, 256), "jpeg", 95, 1000, splits).to_json()
    assert len(text) < 400 * len(shards)
    manifest = parse_manifest(text, "m")
    assert manifest.splits["train"].samples == 10**8


def test_a_nul_in_a_path_is_refused_by_one_line() -> None:
    with pytest.raises(InputError, match="is no path"):
        read_manifest("shards\0")
