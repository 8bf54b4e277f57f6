"""Remote shards: whole, hashed, fetched once, in a cache that keeps its size."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from portrait_dist.data.shards import download
from portrait_dist.data.shards.cache import Cache, DownloadOptions, FetchError
from portrait_dist.data.shards.reader import DamagedSampleError, ShardSet
from portrait_dist.data.shards.verify import verify
from portrait_dist.data.stream.loader import StreamLoader, build_loader
from portrait_dist.errors import InputError
from portrait_dist.system.address import join
from tests.shard_server import ShardServer, content
from tests.waiting import wait_for

# A server that is away is waited for 20 s at most, and asked again after 10 ms.
DOWNLOADS = DownloadOptions(wait_for_server_seconds=10, first_delay_seconds=0.01)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", downloads=DOWNLOADS)


def cached(cache: Cache) -> int:
    """Bytes in the cache."""
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_http_gives_the_samples_of_the_folder(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    opened = ShardSet(server.address, "train", cache=cache)
    assert server.asked == ["manifest.json"], "opening fetched more than the manifest"
    assert content(opened) == content(ShardSet(folder, "train"))
    assert verify(server.address, cache=cache).ok


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_any_fsspec_address_gives_the_samples_of_the_folder(
    scheme: str, folder: Path, cache: Cache
) -> None:
    address = f"file://{folder}"
    if scheme == "memory":
        address = "memory://some/shards"
        fsspec.filesystem("memory").put(f"{folder}/", "/some/shards/", recursive=True)
    assert content(ShardSet(address, "train", cache=cache)) == content(ShardSet(folder, "train"))
    with pytest.raises(InputError, match="is not there"):
        ShardSet(f"{address}/deeper", "train", cache=cache)


def test_a_connection_cut_again_and_again_gives_whole_shards(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    for ranges in (True, False):
        server.ranges, server.cuts = ranges, [1000, 0, 5000, 1] if ranges else [7, 3000, 9000]
        shutil.rmtree(cache.folder, ignore_errors=True)
        assert content(ShardSet(server.address, "val", cache=cache)) == content(
            ShardSet(folder, "val")
        )
        assert not server.cuts
    server.failures = [503, 500, 429]
    assert content(ShardSet(server.address, "test", cache=cache)) == content(
        ShardSet(folder, "test")
    )


def test_a_changed_or_missing_shard_is_named_and_never_used(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    shutil.copy(folder / "train-00001.tar", folder / "train-00000.tar")
    (folder / "train-00002.tar").unlink()
    opened = ShardSet(server.address, "train", cache=cache)
    with pytest.raises(
        DamagedSampleError,
        match=r"train-00000\.tar, sample 0: the file there is not the one in the manifest",
    ):
        opened.read(0)
    with pytest.raises(
        DamagedSampleError, match=r"train-00002\.tar, sample 0: is not there \(HTTP 404\)"
    ):
        opened.read(20)
    opened.read(10)
    assert not verify(server.address, cache=cache).ok


def test_a_file_that_changes_while_it_is_fetched_is_fetched_anew(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    name, opened = "val-00000.tar", ShardSet(server.address, "val", cache=cache)
    cache.folder.mkdir()
    (cache.folder / f".{opened.shards[0].sha256}.{opened.shards[0].bytes}.part").write_bytes(
        b"the beginning of another file"
    )
    assert content(opened) == content(ShardSet(folder, "val"))
    assert server.asked.count(name) == 2


def test_a_damaged_copy_in_the_cache_is_replaced(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    content(ShardSet(server.address, "val", cache=cache))
    for path in cache.folder.glob("*.*"):
        data = bytearray(path.read_bytes())
        if path.suffix in (".tar", ".index") and data:
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    assert content(ShardSet(server.address, "val", cache=cache)) == content(ShardSet(folder, "val"))


def test_the_cache_keeps_its_size_and_evicts_the_least_recently_used(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    sizes = sorted(path.stat().st_size for path in folder.glob("train-*.tar"))
    cache = Cache(tmp_path / "cache", 2.5 * sizes[-1] / 1e9, downloads=DOWNLOADS)
    opened = ShardSet(server.address, "train", cache=cache)
    for sample in (0, 10, 1, 20, 2, 30, 3, 40, 50):
        opened.read(sample)
        assert cached(cache) <= cache.limit
    names = {path.stem for path in cache.folder.glob("*.tar")}
    assert names == {opened.shards[4].sha256, opened.shards[5].sha256}
    assert content(opened) == content(ShardSet(folder, "train")), (
        "what was evicted is downloaded again"
    )
    with pytest.raises(InputError, match="smaller than one shard"):
        ShardSet(server.address, "train", cache=Cache(tmp_path / "small", gigabytes=1e-6)).read(0)


def test_splits_that_are_open_together_keep_to_the_size_of_the_cache(
    server: ShardServer, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", downloads=DOWNLOADS)
    splits = [ShardSet(server.address, split, cache=cache) for split in ("train", "val")]
    sizes = [sum(shard.bytes for shard in opened.shards) for opened in splits]
    cache.limit = sum(sizes)
    assert [opened.fits_cache for opened in splits] == [True, True]
    cache.limit -= 1
    assert [opened.fits_cache for opened in splits] == [False, False], "each alone would fit"
    del splits[1]
    gc.collect()
    assert splits[0].fits_cache


def test_shards_that_the_cache_evicts_while_they_are_verified_are_fetched_again(
    server: ShardServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, files, evicted = Cache(tmp_path / "cache", downloads=DOWNLOADS), ShardSet.files, set()

    def evict(self: ShardSet, number: int, *rest: Any) -> tuple[Path, Path]:
        found = files(self, number, *rest)
        if (self.split, number) not in evicted:  # once each: another process made room
            evicted.add((self.split, number))
            found[number % 2].unlink()
        return found

    monkeypatch.setattr(ShardSet, "files", evict)
    found = verify(server.address, 2, cache=cache)
    assert (found.errors, found.ok) == ([], True)
    assert found.samples == verify(folder, 2).samples

    def never(self: ShardSet, *given: Any) -> tuple[Path, Path]:
        tar, index = files(self, *given)
        tar.unlink()
        return tar, index

    monkeypatch.setattr(ShardSet, "files", never)
    gone = verify(server.address, 1, cache=cache).errors
    assert gone
    assert all(line.startswith(f"{server.address}/") for line in gone), "shards, no cache files"


def limited(server: ShardServer, folder: Path, shards: float) -> ShardSet:
    """The training split behind a cache for so many shards."""
    opened = ShardSet(server.address, "train", cache=Cache(folder / "cache", downloads=DOWNLOADS))
    opened.cache.limit = int(shards * max(shard.bytes for shard in opened.shards))
    return opened


def test_a_download_reserves_its_size_in_the_cache(server: ShardServer, tmp_path: Path) -> None:
    opened = limited(server, tmp_path, 3.9)
    for number in range(3):
        opened.fetch(number)
    with stalled(server, opened, 3, 4):
        assert len(list(opened.cache.folder.glob("*.tar"))) == 1
    assert len(list(opened.cache.folder.glob("*.tar"))) == 3
    assert cached(opened.cache) <= opened.cache.limit


def test_a_download_is_never_evicted(server: ShardServer, tmp_path: Path) -> None:
    opened = limited(server, tmp_path, 1.5)
    with stalled(server, opened, 0, 1) as fetched:
        pass
    assert [one.result()[0].name for one in fetched] == [
        f"{shard.sha256}.tar" for shard in opened.shards[:2]
    ]
    assert server.starts == [0, 0]


def wait_until_asked(count: Callable[[], int], number: int) -> None:
    wait_for(lambda: count() >= number, what=f"{number} requests")


@contextlib.contextmanager
def stalled(
    server: ShardServer, opened: ShardSet, *numbers: int
) -> Iterator[list[Future[tuple[Path, Path]]]]:
    """Shards, one after the other, in the middle of being fetched; at the end they are whole."""
    server.may_send.clear()
    with ThreadPoolExecutor(len(numbers)) as threads:
        fetched = []
        for number in numbers:
            asked = len(server.starts) + 1
            fetched.append(threads.submit(opened.files, number))
            wait_until_asked(lambda: len(server.starts), asked)
        try:
            yield fetched
        finally:
            server.may_send.set()


def sequential(server: ShardServer, cache: Cache) -> StreamLoader:
    """Batches of half a shard, in the order of the shards, one decoded ahead."""
    return build_loader(
        server.address,
        "train",
        5,
        rank=0,
        world_size=1,
        shuffle=False,
        drop_last=False,
        workers=1,
        prefetch=1,
        cache=cache,
    )


def test_shards_are_prefetched_and_each_once(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    loader = sequential(server, cache)
    batches, shards = iter(loader), loader.dataset.shards.shards
    found = next(batches).keys
    wait_for(lambda: len(server.tars) == len(shards), what="fetching all shards")
    assert found + [key for batch in batches for key in batch.keys] == [
        key for key, _, _ in content(ShardSet(folder, "train"))
    ]
    assert sorted(server.tars) == [shard.name for shard in shards]


def test_prefetching_keeps_to_its_fraction_of_a_cache_that_does_not_hold_the_split(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    largest = max(path.stat().st_size for path in folder.glob("train-*.tar"))
    loader = sequential(server, Cache(tmp_path / "cache", 4.5 * largest / 1e9, downloads=DOWNLOADS))
    batches, keys = iter(loader), []
    for number, batch in enumerate(batches):
        keys += batch.keys
        asked = min(number // 2 + 2, 6)  # those of the batches so far, and the next one
        wait_until_asked(lambda: len(server.tars), asked)
        time.sleep(0.05)  # no event says that nothing more will be asked
        assert len(server.tars) == asked
    assert keys == [key for key, _, _ in content(ShardSet(folder, "train"))]
    assert sorted(server.tars) == [shard.name for shard in loader.dataset.shards.shards]


def test_a_shard_that_cannot_be_prefetched_is_named_where_it_is_needed(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    cache.parallel_downloads = 1
    expected = [key for key, _, _ in content(ShardSet(folder, "train"))]
    (folder / "train-00003.tar").unlink()
    batches = iter(sequential(server, cache))
    assert [key for _ in range(6) for key in next(batches).keys] == expected[:30]
    wait_for(lambda: "train-00005.tar" in server.tars, what="fetching the last shard")
    with pytest.raises(
        DamagedSampleError, match=r"train-00003\.tar, sample 0: is not there \(HTTP 404\)"
    ):
        next(batches)


def test_a_dropped_loader_downloads_nothing_more(server: ShardServer, cache: Cache) -> None:
    cache.parallel_downloads = 1
    others = threading.enumerate()
    server.may_send.clear()
    batches = iter(sequential(server, cache))
    wait_for(lambda: len(server.starts) == 1, what="the first fetch")
    threading.Timer(0.2, server.may_send.set).start()
    started = [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith(("prefetch-", "decode-")) and thread not in others
    ]
    assert len(started) == 2
    del batches
    wait_for(
        lambda: not any(thread.is_alive() for thread in started), what="the end of the threads"
    )
    assert len(server.tars) <= 2


def _read_all(address: str, folder: Path) -> int:
    return len(content(ShardSet(address, "train", cache=Cache(folder, downloads=DOWNLOADS))))


def _read_all_by_small_pieces(address: str, folder: Path) -> None:
    download.CHUNK = 4096
    _read_all(address, folder)


def test_processes_and_threads_of_a_machine_fetch_each_shard_once(
    server: ShardServer, cache: Cache
) -> None:
    server.delay = 0.002
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(_read_all, [(server.address, cache.folder)] * 3) == [57] * 3
    with ThreadPoolExecutor(4) as threads:
        shared = ShardSet(server.address, "val", cache=cache)
        list(threads.map(shared.read, range(7)))
    for name in [f"train-{number:05d}.tar" for number in range(6)] + ["val-00000.tar"]:
        assert server.asked.count(name) == 1


def test_a_killed_download_leaves_nothing_wrong_and_is_resumed(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    server.may_send.clear()
    process = multiprocessing.get_context("spawn").Process(
        target=_read_all_by_small_pieces, args=(server.address, cache.folder)
    )
    process.start()
    wait_for(
        # The indexes, which come first, are parts for a moment, too.
        lambda: server.starts and any(p.stat().st_size for p in cache.folder.glob(".*.part")),
        what="the beginning of a shard",
    )
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.may_send.set()
    assert server.starts == [0]
    assert content(ShardSet(server.address, "train", cache=cache)) == content(
        ShardSet(folder, "train")
    )
    assert server.starts[1] > 0, "the shard was fetched again from its beginning"
    assert not list(cache.folder.glob(".*.part"))


def test_an_address_that_cannot_be_opened_says_what_to_do(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match="give the address of a folder that 'portrait-dist pack' wrote"
    ):
        ShardSet(f"{server.address}/nothing", "train")
    with pytest.raises(InputError, match="nonsense:// cannot be opened here"):
        ShardSet("nonsense://bucket/shards", "train")
    server.failures = [403]
    with pytest.raises(InputError, match="the server refuses it"):
        ShardSet(server.address, "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the cache cannot be written"):
        ShardSet(server.address, "val", cache=Cache(tmp_path / "file" / "cache")).read(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().folder == tmp_path / "portrait-dist" / "shards"


def test_a_signed_address_keeps_its_signature(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    assert content(ShardSet(f"{server.address}/?sig=a/b", "val", cache=cache)) == content(
        ShardSet(folder, "val")
    )
    assert join("https://host/dir/?sig=1", "a.tar") == "https://host/dir/a.tar?sig=1"
    assert join("s3://bucket/dir/", "a.tar") == "s3://bucket/dir/a.tar"


def test_fetching_to_a_wrong_hash_is_an_error(server: ShardServer, cache: Cache) -> None:
    with pytest.raises(FetchError, match="is not the one in the manifest"):
        cache.fetch(f"{server.address}/val-00000.tar", "0" * 64)
    assert not list(cache.folder.glob("*.tar"))
    assert not list(cache.folder.glob(".*.part"))
