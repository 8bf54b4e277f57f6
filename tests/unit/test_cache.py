"""The cache: nothing is used before its content was checked, nothing is written through links."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from portrait_dist.data.shards import cache as cache_module
from portrait_dist.data.shards import writer
from portrait_dist.data.shards.cache import Cache
from portrait_dist.data.shards.download import open_part
from portrait_dist.data.shards.reader import ShardSet
from portrait_dist.errors import InputError, PortraitDistError
from tests.shard_server import Handler, ShardServer, serving
from tests.waiting import wait_for


@pytest.fixture
def server(tiny_shards: Path) -> Iterator[ShardServer]:
    with serving(tiny_shards) as started:
        yield started


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def read(server: ShardServer, cache: Cache) -> bytes:
    return bytes(ShardSet(server.address, "val", cache=cache).read(0).image)


def forge(path: Path) -> None:
    """Change the content of a file and nothing else that can be seen from outside."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_forged_file_of_the_right_name_and_length_is_never_used(
    server: ShardServer, cache: Cache
) -> None:
    expected = read(server, cache)
    tar = next(cache.folder.glob("*.tar"))
    for opened_in_this_process_before in (True, False):
        forge(tar)
        again = cache if opened_in_this_process_before else Cache(cache.folder)
        assert read(server, again) == expected
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == tar.stem


def test_a_file_that_somebody_else_put_there_is_checked_before_its_first_use(
    server: ShardServer, cache: Cache, tiny_shards: Path
) -> None:
    shard = ShardSet(tiny_shards, "val").shards[0]
    cache.folder.mkdir()
    (cache.folder / f"{shard.sha256}.tar").write_bytes(bytes(shard.bytes))
    assert read(server, cache) == bytes(ShardSet(tiny_shards, "val").read(0).image)
    assert "val-00000.tar" in server.asked


def test_each_file_is_hashed_once_and_not_again_by_other_processes(
    server: ShardServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(server, cache)
    hashed: list[object] = []
    digest = hashlib.file_digest

    def counted(file: object, name: str) -> object:
        hashed.append(file)
        return digest(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", counted)
    read(server, Cache(cache.folder))  # as another process: only the markers are shared
    assert hashed == []
    for marker in cache.folder.glob(".*.checked"):
        marker.unlink(missing_ok=True)
    read(server, Cache(cache.folder))
    assert len(hashed) == 2  # tar and index
    assert len(server.tars) == 1


@pytest.mark.parametrize("kind", ["lock", "part"])
def test_lock_and_part_files_that_are_links_are_refused(
    kind: str, server: ShardServer, cache: Cache, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    shard = ShardSet(server.address, "val", cache=cache).shards[0]
    name = ".lock" if kind == "lock" else f".{shard.sha256}.{shard.bytes}.part"
    cache.folder.mkdir()
    (cache.folder / name).symlink_to(victim)
    with pytest.raises(InputError, match=r"is a link\); give a local folder"):
        read(server, cache)
    assert victim.read_text() == "mine"


def test_a_partial_download_longer_than_the_file_is_no_beginning_of_it(
    server: ShardServer, cache: Cache, tiny_shards: Path
) -> None:
    expected = read(server, cache)
    shard = ShardSet(tiny_shards, "val").shards[0]
    whole = next(cache.folder.glob("*.tar"))
    server.starts.clear()
    asked = len(server.tars)
    (cache.folder / f".{shard.sha256}.{shard.bytes}.part").write_bytes(whole.read_bytes() + b"x")
    whole.unlink()
    assert read(server, Cache(cache.folder)) == expected
    assert server.starts == [0]
    assert len(server.tars) == asked + 1, "nobody asks for what lies behind the file's end"


def test_a_folder_that_others_may_write_to_is_refused(server: ShardServer, cache: Cache) -> None:
    for mode in (0o777, 0o770, 0o1777):
        cache.folder.mkdir(exist_ok=True)
        cache.folder.chmod(mode)
        with pytest.raises(InputError, match="can be written by other users"):
            read(server, cache)
    cache.folder.chmod(0o755)
    read(server, cache)


def test_a_folder_of_another_user_is_refused(
    server: ShardServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(InputError, match="belongs to another user"):
        read(server, cache)


def test_a_new_folder_is_closed_to_others(server: ShardServer, cache: Cache) -> None:
    read(server, cache)
    assert cache.folder.stat().st_mode & 0o077 == 0
    assert not [path for path in cache.folder.iterdir() if path.stat().st_mode & 0o022]


def test_files_of_others_are_neither_counted_nor_evicted(
    server: ShardServer, tmp_path: Path, tiny_shards: Path
) -> None:
    largest = max(path.stat().st_size for path in tiny_shards.glob("train-*.tar"))
    cache = Cache(tmp_path / "cache", gigabytes=1.5 * largest / 1e9)
    cache.folder.mkdir()
    others = ["notes.tar", "x.index", ".hidden.5.part", "0" * 63 + ".tar"]
    for name in others:
        (cache.folder / name).write_bytes(bytes(2 * largest))
    opened = ShardSet(server.address, "train", cache=cache)
    for sample in (0, 10, 20):
        opened.read(sample)
    assert all((cache.folder / name).exists() for name in others)
    assert len(list(cache.folder.glob("?" * 64 + ".tar"))) == 1


def test_eviction_removes_the_marker_too(
    server: ShardServer, tmp_path: Path, tiny_shards: Path
) -> None:
    largest = max(path.stat().st_size for path in tiny_shards.glob("train-*.tar"))
    cache = Cache(tmp_path / "cache", gigabytes=1.5 * largest / 1e9)
    opened = ShardSet(server.address, "train", cache=cache)
    for sample in (0, 10, 20):
        opened.read(sample)
    tars = {path.name for path in cache.folder.glob("*.tar")}
    assert {path.name[1:-8] for path in cache.folder.glob(".*.tar.checked")} == tars


@pytest.mark.parametrize("gigabytes", [0, -1, float("inf"), float("nan"), 1e300])
def test_a_limit_that_is_none_is_refused(gigabytes: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.cache_gigabytes"):
        Cache(tmp_path, gigabytes)


def test_a_full_disk_is_one_line_and_no_wrong_option(
    server: ShardServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PortraitDistError, match="the disk of the cache is full") as caught:
        read(server, cache)
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert read(server, cache)
    shutil.rmtree(cache.folder)


def test_a_wait_for_the_download_of_another_process_can_be_cancelled(
    server: ShardServer, cache: Cache
) -> None:
    shard = ShardSet(server.address, "val", cache=cache).shards[0]
    cache.folder.mkdir()
    cancelled = threading.Event()
    with (cache.folder / f".{shard.sha256}.{shard.bytes}.part").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter = threading.Thread(
            target=ShardSet(server.address, "val", cache=cache).fetch, args=(0, cancelled)
        )
        waiter.start()
        cancelled.set()
        waiter.join(timeout=30)
        assert not waiter.is_alive()
    assert "val-00000.tar" not in server.asked


def test_downloads_that_wait_for_their_server_hold_up_no_other(
    tmp_path: Path, split_dir: Path, cache: Cache
) -> None:
    """Of so many files the hashes of some that are there and some that are away begin alike."""
    writer.pack(split_dir, tmp_path / "shards", size=(16, 16), samples_per_shard=1)
    with serving(tmp_path / "shards") as server:
        shards = ShardSet(server.address, "train", cache=cache)
        absent = {shard.name for shard in shards.shards[::2]}
        refused: set[str] = set()

        def away(handler: Handler, name: str) -> bool:
            if name in absent:
                refused.add(name)
                handler.send_error(503)
            return name in absent

        server.instead = away
        cancelled = threading.Event()
        threads = [
            threading.Thread(target=shards.fetch, args=(number, cancelled), daemon=True)
            for number in range(len(shards.shards))
        ]
        for thread in threads[::2]:
            thread.start()
        wait_for(lambda: refused == absent, what="every absent shard to be asked for")
        for thread in threads[1::2]:
            thread.start()
        for thread in threads[1::2]:
            thread.join(timeout=30)
        assert [thread.is_alive() for thread in threads[:4]] == [True, False, True, False]
        assert len(list(cache.folder.glob("*.tar"))) == len(threads) // 2
        cancelled.set()
        for thread in threads:
            thread.join(timeout=30)
    assert not [thread for thread in threads if thread.is_alive()]


def test_who_waited_for_a_part_that_was_renamed_meanwhile_claims_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, whole = tmp_path / "part", tmp_path / "whole"
    opened = threading.Event()
    claimed: list[int] = []

    def open_and_tell(path: Path) -> io.FileIO:
        file = open_part(path)
        opened.set()
        return file

    def second() -> None:
        with cache_module._claimed(part, None):
            claimed.append(part.stat().st_ino)

    with cache_module._claimed(part, None):
        monkeypatch.setattr(cache_module, "open_part", open_and_tell)
        waiter = threading.Thread(target=second, daemon=True)
        waiter.start()
        assert opened.wait(30)
        part.replace(whole)
    waiter.join(timeout=30)
    assert claimed
    assert claimed[0] != whole.stat().st_ino


def test_room_is_not_made_with_the_part_of_a_download_that_began_a_moment_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"abandoned")

    def opened_before_another_one_took_the_name(path: Path) -> io.FileIO:
        file = open_part(path)
        path.rename(tmp_path / "complete")
        path.write_bytes(b"of another process")
        return file

    monkeypatch.setattr(cache_module, "open_part", opened_before_another_one_took_the_name)
    assert not cache_module._remove_abandoned(part)
    assert part.read_bytes() == b"of another process"
    monkeypatch.undo()
    assert cache_module._remove_abandoned(part)
    assert not part.exists()
