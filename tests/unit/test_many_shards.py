"""Many shards, failing disks, truncated files: bounded descriptors and memory, no signals."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.data.shards import format as shard_format
from portrait_dist.data.shards import reader
from portrait_dist.data.shards.format import (
    IndexHeader,
    Manifest,
    Record,
    ShardEntry,
    SplitEntry,
    index_bytes,
    parse_manifest,
)
from portrait_dist.data.shards.reader import DamagedSampleError, ShardSet
from portrait_dist.errors import DamagedDataError, UnreachableError
from portrait_dist.system.info import is_network_file_system
from tests.damage import cut

HASH = "0123456789abcdef" * 4


def copies(folder: Path, tiny_shards: Path, shards: int, samples: int) -> Path:
    """Shards that hold one sample of the small ones again and again; hard links of one tar."""
    source = ShardSet(tiny_shards, "train")
    tar = (tiny_shards / source.shards[0].name).read_bytes()
    _, records = shard_format.parse_index(
        (tiny_shards / source.shards[0].index_name).read_bytes(), "index"
    )
    first = shard_format.record_at(records, 0)
    piece = tar[: first.length]
    data = piece * samples + bytes(2 * shard_format.BLOCK)
    places = [
        Record(number * first.length, first.image, first.alpha, first.crc32)
        for number in range(samples)
    ]
    folder.mkdir()
    sha256, entries = hashlib.sha256(data).hexdigest(), []
    (folder / "one").write_bytes(data)
    for number in range(shards):
        name = f"train-{number:05d}.tar"
        os.link(folder / "one", folder / name)
        index = index_bytes(IndexHeader(name, samples, len(data), sha256, None), places)
        (folder / name).with_suffix(".index").write_bytes(index)
        index_sha256 = hashlib.sha256(index).hexdigest()
        entries.append(ShardEntry(name, samples, len(data), sha256, index_sha256))
    split = SplitEntry(shards * samples, HASH, entries)
    manifest = Manifest("copies", (32, 32), "jpeg", 95, samples, {"train": split})
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


@pytest.fixture(scope="module")
def many(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 shards of 100 samples."""
    return copies(tmp_path_factory.mktemp("many") / "shards", tiny_shards, 600, 100)


@pytest.fixture
def descriptors() -> Iterator[Callable[[int], None]]:
    """Set this process's soft limit of file descriptors for one test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sets of other tests, whose threads may end late, take part in dividing descriptors."""
    gc.collect()
    monkeypatch.setattr(ShardSet, "_alive", weakref.WeakSet())


@pytest.mark.usefixtures("alone")
def test_600_shards_of_100_samples_are_all_kept_open_where_the_limit_allows_it(
    many: Path, descriptors: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptors(2048)
    opened = ShardSet(many, "train")
    assert (opened.samples, opened.most_open) == (60_000, 600)
    assert opened.advice("full") == ""
    before = open_descriptors()
    for sample in range(0, opened.samples, 50):
        opened.read(sample)
    assert open_descriptors() - before == 600

    def never(*_: Any) -> int:
        raise AssertionError("a shard was opened again")

    monkeypatch.setattr(reader, "open_regular", never)
    for sample in range(7, opened.samples, 99):
        opened.read(sample)
    del opened
    gc.collect()
    assert open_descriptors() <= before, "descriptors outlive the set"


@pytest.mark.usefixtures("alone")
def test_shards_open_at_a_time_follow_the_limit_and_indexes_stay_in_memory(
    many: Path, descriptors: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptors(612)
    opened = ShardSet(many, "train")
    assert opened.most_open == 612 - 512 - 1
    before = open_descriptors()
    for number in range(600):
        opened.read(100 * number)
        assert open_descriptors() - before <= opened.most_open
    assert "600 shards, of which 99 stay open" in opened.advice("full")
    assert "data.order=block" in opened.advice("full")
    assert opened.advice("block") == ""
    monkeypatch.setattr(reader, "read_regular", None)  # reading an index again would fail
    keys = {opened.read(sample).key for sample in range(0, opened.samples, 97)}
    assert len(keys) == 1


@pytest.mark.usefixtures("alone")
def test_splits_divide_the_descriptors_between_them(
    many: Path, descriptors: Callable[[int], None]
) -> None:
    descriptors(812)
    first, second = ShardSet(many, "train"), ShardSet(many, "train")
    assert first.most_open + second.most_open <= 812 - 512


def take_all(taken: list[int]) -> None:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))


def read_all(shards: ShardSet) -> None:
    for sample in range(shards.samples):
        shards.read(sample)


def test_a_shard_is_opened_where_something_else_took_the_descriptors(
    many: Path, descriptors: Callable[[int], None]
) -> None:
    opened = ShardSet(many, "train")
    for number in range(20):
        opened.read(100 * number)
    taken: list[int] = []
    descriptors(open_descriptors() + 40)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        take_all(taken)
    try:
        assert opened.read(59_999).key
    finally:
        for descriptor in taken:
            os.close(descriptor)


def test_memory_of_indexes_is_bounded(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ShardSet(many, "train")
    opened._indexes = reader._Indexes(limit=10 * 2000)
    for number in range(50):
        opened.read(100 * number)
    assert len(opened._indexes._records) == 10


def test_a_hundred_thousand_shards_open_within_seconds_and_300_megabytes() -> None:
    shards = [
        ShardEntry(f"train-{number:05d}.tar", 1000, 1024 * 1001, HASH, HASH)
        for number in range(100_000)
    ]
    text = Manifest(
        "raw", (256, 256), "jpeg", 95, 1000, {"train": SplitEntry(10**8, HASH, shards)}
    ).to_json()
    tracemalloc.start()
    try:
        manifest = parse_manifest(text, "m")
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert manifest.splits["train"].samples == 10**8
    assert kept < 100e6
    assert most < 300e6


def test_any_of_a_hundred_thousand_shards_is_located(tmp_path: Path) -> None:
    shards = [
        ShardEntry(f"train-{number:05d}.tar", 1000, 1024 * 1001, HASH, HASH)
        for number in range(100_000)
    ]
    split = {"train": SplitEntry(10**8, HASH, shards)}
    (tmp_path / "manifest.json").write_text(
        Manifest("raw", None, "jpeg", 95, 1000, split).to_json()
    )
    opened = ShardSet(tmp_path, "train")
    assert opened.locate(0) == (0, 0)
    assert opened.locate(10**8 - 1) == (99_999, 999)
    assert opened.most_open < 100_000
    with pytest.raises(DamagedSampleError, match=r"train-50000\.tar, sample 7: .* is missing"):
        opened.read(50_000_007)


READ_WHILE_TRUNCATED = """
import faulthandler, os, sys
faulthandler.enable()
from portrait_dist.data.shards.reader import ShardSet
from portrait_dist.errors import PortraitDistError
opened = ShardSet(sys.argv[1], "val")
opened.read(0)
os.truncate(sys.argv[1] + "/val-00000.tar", int(sys.argv[2]))
try:
    for sample in range(opened.samples):
        opened.read(sample)
except PortraitDistError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("length", [0, 700, 4096, 9000])
def test_a_shard_truncated_while_it_is_used_is_damage_and_no_signal(
    tiny_shards: Path, tmp_path: Path, length: int
) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    command = [sys.executable, "-c", READ_WHILE_TRUNCATED, str(folder), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == DamagedDataError.exit_code, done
    assert f"the shard has {length:,} bytes instead of" in done.stdout
    assert "val-00000.tar, sample" in done.stdout


def test_truncations_that_race_with_reads_are_damage_and_no_signal(
    tiny_shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    tar = folder / "val-00000.tar"
    data, stop = tar.read_bytes(), threading.Event()
    expected = {sample: bytes(ShardSet(folder, "val").read(sample).image) for sample in range(7)}

    def truncate() -> None:
        with tar.open("r+b") as file:
            while not stop.is_set():
                file.truncate(len(data) // 2)
                os.pwrite(file.fileno(), data, 0)

    thread = threading.Thread(target=truncate)
    thread.start()
    damaged = read = 0
    try:
        while not (damaged and read) or damaged + read < 2000:
            opened = None
            for sample in range(7):
                try:
                    opened = opened or ShardSet(folder, "val")
                    assert bytes(opened.read(sample).image) == expected[sample]
                    read += 1
                except DamagedSampleError:
                    damaged += 1
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("code", "network", "kind"),
    [
        (errno.EIO, False, DamagedSampleError),
        (errno.EIO, True, UnreachableError),
        (errno.ESTALE, False, UnreachableError),
        (errno.ENOTCONN, False, UnreachableError),
        (errno.ETIMEDOUT, False, UnreachableError),
    ],
)
def test_a_read_that_fails_names_the_shard(
    tiny_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    network: bool,
    kind: type[Exception],
) -> None:
    opened = ShardSet(tiny_shards, "val")
    opened.read(0)

    def fail(*_: Any) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(reader, "is_network_file_system", lambda device: network)
    with pytest.raises(kind, match=rf"val-00000\.tar.*{os.strerror(code)}"):
        opened.read(3)
    monkeypatch.undo()
    assert opened.read(3)


def test_a_stale_handle_of_a_network_file_system_is_opened_again(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, pread = ShardSet(tiny_shards, "val"), os.pread
    expected = bytes(opened.read(3).image)
    failures = [errno.ESTALE]

    def fail_once(*arguments: Any) -> bytes:
        if failures:
            raise OSError(failures.pop(), "Stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", fail_once)
    assert bytes(opened.read(3).image) == expected


def test_a_folder_that_vanished_is_no_damage(tiny_shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    opened = ShardSet(folder, "val")
    folder.rename(tmp_path / "away")
    with pytest.raises(UnreachableError, match=r"its manifest\.json is gone; mount"):
        opened.read(0)
    (tmp_path / "away").rename(folder)
    opened.read(0)
    (folder / "train-00000.tar").unlink()
    with pytest.raises(DamagedSampleError, match="the shard is missing"):
        ShardSet(folder, "train").read(0)


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(),
    reason="needs root and loop devices",
)
def test_a_disk_that_really_fails_a_read_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    """An ext4 image on a loop device loses its second half, so that the kernel's reads fail."""
    image, mount = tmp_path / "disk", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        folder = mount / "shards"
        shutil.copytree(tiny_shards, folder)
        with (folder / "filler").open("wb") as file:
            file.write(os.urandom(4 << 20))
        subprocess.run(["sync"], check=True)
        opened = ShardSet(folder, "val")
        opened.read(0)
        cut(image, 1 << 20)
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        with pytest.raises(
            DamagedSampleError, match=r"val-00000\.tar, sample .*(Input/output|bytes)"
        ):
            read_all(opened)
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_local_and_network_file_systems_are_distinguished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path.stat().st_dev
    assert not is_network_file_system(device)
    number = f"{os.major(device)}:{os.minor(device)}"
    for kind, network in (("nfs4", True), ("fuse.sshfs", True), ("lustre", True), ("ext4", False)):
        line = f"36 35 {number} / /data rw,relatime shared:1 - {kind} server:/export rw\n"
        monkeypatch.setattr(Path, "read_text", lambda self, line=line: line)
        assert is_network_file_system(device) is network
