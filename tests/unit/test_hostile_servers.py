"""Servers that are away, lie, drip or attack: waited for, bounded, or refused by one line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portrait_dist.data.shards import cache as cache_module
from portrait_dist.data.shards import download, reader
from portrait_dist.data.shards.cache import Cache, DownloadOptions
from portrait_dist.data.shards.reader import DamagedSampleError, ShardSet, read_manifest
from portrait_dist.data.stream import pipeline
from portrait_dist.data.stream.loader import StreamLoader, build_loader
from portrait_dist.errors import DamagedDataError, InputError, PortraitDistError, UnreachableError
from tests import cli
from tests.shard_server import Handler, ShardServer, content, serving
from tests.waiting import wait_for

PATIENT = DownloadOptions(wait_for_server_seconds=60, first_delay_seconds=0.01)
IMPATIENT = DownloadOptions(
    wait_for_server_seconds=0.3, first_delay_seconds=0.01, timeout_seconds=0.2
)
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", downloads=PATIENT)


@pytest.fixture
def impatient(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", downloads=IMPATIENT)


def for_shards(answer: Callable[[Handler, bytes], None]) -> Callable[[Handler, str], bool]:
    """Answer requests for tars by ``answer``, which gets the right content."""

    def instead(handler: Handler, name: str) -> bool:
        if name.endswith(".tar"):
            answer(handler, (handler.server.folder / name).read_bytes())
        return name.endswith(".tar")

    return instead


# --- away ------------------------------------------------------------------------------------


def test_a_server_that_is_away_is_waited_for_and_this_is_said_once_a_minute(
    server: ShardServer, folder: Path, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    server.failures = [503] * 5 + [500, 429, 502]
    with caplog.at_level(logging.WARNING):
        opened = ShardSet(server.address, "val", cache=cache)
        server.failures = [503] * 4
        assert content(opened) == content(ShardSet(folder, "val"))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, lines
    assert "waiting for the server (HTTP 503" in lines[0]


def test_a_server_that_was_away_too_long_is_no_damage_and_is_asked_again_later(
    server: ShardServer, folder: Path, impatient: Cache
) -> None:
    opened = ShardSet(server.address, "val", cache=impatient)
    server.failures = [503] * 10_000
    with pytest.raises(UnreachableError, match=r"val-00000\.index: the server was away.*503") as no:
        opened.read(2)
    assert no.value.exit_code == 1
    assert not isinstance(no.value, DamagedDataError)
    server.failures = []
    assert content(opened) == content(ShardSet(folder, "val"))


def test_a_connection_that_is_refused_is_waited_for(folder: Path, impatient: Cache) -> None:
    with serving(folder) as server:
        address = server.address
    server.server_close()
    with pytest.raises(UnreachableError, match="Connection refused"):
        ShardSet(address, "val", cache=impatient)


@pytest.mark.parametrize("workers", [-1, 2])
def test_what_cannot_be_reached_is_never_skipped_as_damage(
    server: ShardServer, folder: Path, impatient: Cache, workers: int
) -> None:
    loader = build_loader(
        server.address, "train", 8, on_damage="skip", workers=workers, cache=impatient
    )
    server.instead = for_shards(lambda handler, data: handler.send_error(503))
    with pytest.raises(UnreachableError):
        list(loader)
    assert loader.damaged == {}
    server.instead = lambda handler, name: False
    loader.set_epoch(0)
    got = [batch.keys for batch in loader]
    assert got == [batch.keys for batch in build_loader(folder, "train", 8, workers=-1)]
    assert loader.damaged == {}


def wait_for_the_end(handler: Handler, data: bytes) -> None:
    handler.server.may_send.wait()


def next_batch(loader: StreamLoader) -> None:
    with contextlib.suppress(IndexError, StopIteration):  # its pipeline is closed meanwhile
        next(iter(loader))


@pytest.mark.parametrize("server_is", ["away", "silent", "silent before its head"])
def test_a_loader_that_is_closed_while_it_waits_for_a_server_ends_at_once(
    server: ShardServer, cache: Cache, server_is: str
) -> None:
    cache.downloads = DownloadOptions(
        wait_for_server_seconds=3600, first_delay_seconds=1000, timeout_seconds=3600
    )
    others = threading.enumerate()
    loader = build_loader(server.address, "train", 8, workers=2, cache=cache)
    if server_is == "away":
        server.failures = [503] * 10_000
    server.may_send.clear()
    if server_is == "silent before its head":
        server.instead = for_shards(wait_for_the_end)
    # The consumer waits in a thread, as the main one would until a signal.
    threading.Thread(target=next_batch, args=(loader,), daemon=True).start()

    def running(*names: str) -> int:
        started = [thread for thread in threading.enumerate() if thread not in others]
        return sum(thread.name.startswith(names) for thread in started)

    wait_for(lambda: len(server.asked) >= 3, what="requests that fail or wait")
    wait_for(lambda: running("decode-") == 2, what="all threads are there")
    pipeline._close_all()
    names = "decode-", "prefetch-", "download-watch"
    wait_for(lambda: not running(*names), 60, "the end of the threads")


def test_a_missing_shard_is_damage_and_is_asked_for_again_after_a_while(
    server: ShardServer, folder: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "val-00000.tar").rename(folder / "kept")
    opened = ShardSet(server.address, "val", cache=cache)
    with pytest.raises(DamagedSampleError, match=r"val-00000\.tar, sample 2: is not there"):
        opened.read(2)
    asked = len(server.asked)
    with pytest.raises(DamagedSampleError, match="sample 3"):
        opened.read(3)
    assert len(server.asked) == asked, "every sample asks anew"
    (folder / "kept").rename(folder / "val-00000.tar")
    monkeypatch.setattr(reader, "SECONDS_UNTIL_RETRY", 0.0)
    opened.read(2)


def test_a_host_that_does_not_exist_is_refused_soon(
    impatient: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    impatient.downloads = PATIENT
    with pytest.raises(InputError, match=r"http://nobody\.invalid/.*: there is no such host"):
        ShardSet("http://nobody.invalid/s", "val", cache=impatient)


def test_an_address_that_may_not_be_read_is_refused_and_no_damage(
    server: ShardServer, cache: Cache
) -> None:
    opened = ShardSet(server.address, "val", cache=cache)
    server.failures = [403]
    with pytest.raises(InputError, match=r"the server refuses it \(HTTP 403"):
        opened.read(0)


# --- bounds ----------------------------------------------------------------------------------


def test_bytes_beyond_the_promised_size_are_never_written(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    most = 0

    def endless(handler: Handler, data: bytes) -> None:
        nonlocal most
        handler.begin(None)
        while True:
            handler.wfile.write(bytes(65536))
            sizes = [path.stat().st_size for path in cache.folder.glob(".*.part")]
            most = max(most, *sizes, 0)

    server.instead = for_shards(endless)
    opened = ShardSet(server.address, "val", cache=cache)
    with pytest.raises(DamagedSampleError, match="the file there is not the one in the manifest"):
        opened.read(0)
    assert most <= opened.shards[0].bytes
    assert not list(cache.folder.glob(".*.part"))


def announce(length: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, data: handler.begin(length)


def test_a_file_that_is_announced_longer_or_shorter_is_refused_before_it_is_read(
    server: ShardServer, cache: Cache
) -> None:
    opened = ShardSet(server.address, "val", cache=cache)
    for length in (10, 10**12):
        server.instead = for_shards(announce(length))
        with pytest.raises(DamagedSampleError, match=f"{length:,} bytes instead of"):
            opened.read(0)
        opened = ShardSet(server.address, "val", cache=cache)


@pytest.mark.parametrize("announced", [True, False])
def test_the_manifest_and_an_index_are_bounded(
    server: ShardServer, cache: Cache, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    def endless(handler: Handler, name: str) -> bool:
        if not name.endswith(suffix):
            return False
        handler.begin(10**12 if announced else None)
        while True:
            handler.wfile.write(bytes(65536))

    suffix = "manifest.json"
    monkeypatch.setattr(cache_module, "MANIFEST_LIMIT", 100_000)
    server.instead = endless
    with pytest.raises(InputError, match="is longer than 100,000 bytes"):
        ShardSet(server.address, "val", cache=cache)
    suffix = "nothing"
    opened = ShardSet(server.address, "val", cache=cache)
    suffix = ".index"
    with pytest.raises(DamagedSampleError, match="is not the one in the manifest"):
        opened.read(0)


def test_a_drip_ends_and_is_resumed_where_it_was(
    server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    starts: list[int] = []

    def drip(handler: Handler, data: bytes) -> None:
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        starts.append(start)
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        handler.begin(len(data) - start, 206 if start else 200, Content_Range=span)
        for offset in range(start, len(data)):
            handler.wfile.write(data[offset : offset + 1])
            stopped.wait(0.01)

    stopped = threading.Event()
    server.instead = for_shards(drip)
    options = DownloadOptions(
        wait_for_server_seconds=1.0,
        timeout_seconds=0.2,
        minimum_bytes_per_second=1e6,
        first_delay_seconds=0.01,
    )
    opened = ShardSet(server.address, "val", cache=Cache(tmp_path / "cache", downloads=options))
    with pytest.raises(UnreachableError, match=r"away, or too slow, for 1 s .*slower than"):
        opened.read(0)
    stopped.set()
    assert len(starts) > 1
    assert starts == sorted(starts)
    assert starts[-1] > 0
    server.instead = lambda handler, name: False
    opened.cache.downloads = PATIENT
    assert content(opened) == content(ShardSet(folder, "val"))
    assert server.starts[0] > 0, "the partial download was not resumed"


def test_a_head_that_drips_ends(server: ShardServer, impatient: Cache) -> None:
    stopped = threading.Event()

    def drip(handler: Handler, name: str) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not stopped.is_set():
            handler.wfile.write(b"x")
            stopped.wait(0.01)
        return True

    server.instead = drip
    with pytest.raises(UnreachableError, match=r"manifest\.json: the server was away"):
        ShardSet(server.address, "val", cache=impatient)
    stopped.set()


def test_a_cut_index_is_resumed(server: ShardServer, folder: Path, cache: Cache) -> None:
    server.cut_suffix, server.cuts = ".index", [10, 20, 0, 30, 1]
    opened = ShardSet(server.address, "val", cache=cache)
    assert content(opened) == content(ShardSet(folder, "val"))
    assert not server.cuts
    assert server.asked.count("val-00000.index") == 6


def test_answers_that_are_no_http_or_break_off_in_a_chunk_are_tried_again(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    ways = iter([b"\x16\x03\x01rubbish\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n"])
    chunk = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nshort"

    def broken(handler: Handler, name: str) -> bool:
        answer = next(ways, None) if name.endswith(".tar") else None
        if answer is not None:
            handler.wfile.write(answer)
        elif name.endswith(".tar") and server.tars.count(name) == 4:
            handler.wfile.write(chunk)
        else:
            return False
        return True

    server.instead = broken
    opened = ShardSet(server.address, "val", cache=cache)
    assert content(opened) == content(ShardSet(folder, "val"))
    # The bytes of the broken chunk are kept, the hash finds them out, and all is fetched afresh.
    assert len(server.tars) == 6


# --- attacks ---------------------------------------------------------------------------------

ESCAPES = {
    "deletes by sha256": ("sha256", "./../../victim/backup"),
    "writes by sha256": ("sha256", ".//../../victim/new"),
    "deletes by index_sha256": ("index_sha256", "./../../victim/backup"),
    "leaves by a name": ("name", "../../victim/train-00000.tar"),
}


@pytest.mark.parametrize("field_and_value", ESCAPES.values(), ids=ESCAPES.keys())
def test_a_hostile_manifest_writes_and_deletes_nothing(
    field_and_value: tuple[str, str], server: ShardServer, folder: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    shard = manifest["splits"]["train"]["shards"][0]
    (victim / "backup.tar").write_bytes(bytes(shard["bytes"]))
    (victim / "backup.sql").write_bytes(b"mine")
    shard[field_and_value[0]] = field_and_value[1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = {path: path.stat() for path in sorted(tmp_path.rglob("*"))}
    with pytest.raises(DamagedDataError, match=r"manifest\.json: damaged"):
        ShardSet(server.address, "train", cache=Cache(tmp_path / "a" / "b")).read(0)
    assert {path: path.stat() for path in sorted(tmp_path.rglob("*"))} == before


def test_the_cache_refuses_hashes_and_suffixes_that_are_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for sha256, name in (("../x", "a.tar"), ("0" * 64, "a.sh"), ("0" * 64, "a")):
        with pytest.raises(ValueError, match="is no file of a shard"):
            cache.fetch(f"http://127.0.0.1:9/{name}", sha256)
    with pytest.raises(ValueError, match="is not a sha256"):
        cache.discard("*")
    assert not (tmp_path / "cache").exists()


@pytest.mark.timeout(60)
def test_a_fifo_behind_a_file_address_is_refused_and_does_not_hang(
    folder: Path, cache: Cache
) -> None:
    (folder / "val-00000.tar").unlink()
    os.mkfifo(folder / "val-00000.tar")
    with pytest.raises(DamagedSampleError, match="is not a regular file"):
        ShardSet(f"file://{folder}", "val", cache=cache).read(0)


# --- secrets ---------------------------------------------------------------------------------

SECRETS = ("bob", "hunter2", "hunter%2F2", "topsecret")


def with_secrets(server: ShardServer) -> str:
    server.password = "bob:hunter/2"
    parts = urllib.parse.urlsplit(server.address)
    return f"http://bob:hunter%2F2@{parts.netloc}/?X-Signature=topsecret"


def assert_no_secret(text: str) -> None:
    assert not [secret for secret in SECRETS if secret in text], text


def test_a_password_and_a_signature_in_an_address_work_and_are_shown_nowhere(
    server: ShardServer, folder: Path, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    address = with_secrets(server)
    loader = build_loader(address, "train", 8, on_damage="skip", shuffle=False, cache=cache)
    (folder / "train-00002.tar").unlink()
    with caplog.at_level(logging.WARNING):
        keys = [key for batch in loader for key in batch.keys]
    assert len(keys) == 46
    for text in (*loader.damaged, *loader.damaged.values(), loader.describe(), caplog.text):
        assert_no_secret(text)
    assert "train-00002.tar" in caplog.text


def test_no_error_shows_the_secrets_of_an_address(
    server: ShardServer, folder: Path, impatient: Cache
) -> None:
    address = with_secrets(server)
    opened = ShardSet(address, "val", cache=impatient)
    failing: list[Callable[[], object]] = [
        lambda: ShardSet(address, "nosplit", cache=impatient),
        lambda: opened.read(0),
        lambda: read_manifest(address.replace("/?", "/nothing?"), IMPATIENT),
        lambda: read_manifest(address.replace("hunter", "wrong"), IMPATIENT),
        lambda: read_manifest(address.replace("http:", "nonsense:"), IMPATIENT),
    ]
    shown = 0
    for failures in ([], [503] * 10_000, [403] * 10_000):
        for call in failing:
            server.failures = list(failures)
            try:
                call()
            except PortraitDistError as error:
                shown += 1
                assert_no_secret(f"{error!r} {error}")
    assert shown >= 12
    server.failures = []
    result = cli.call("verify", address.replace("hunter", "wrong"))
    cli.assert_one_line(result, 2, "the server refuses it (HTTP 401")
    assert_no_secret(result.stderr + result.stdout)


def test_a_password_follows_a_redirect_on_its_host_only(
    server: ShardServer, folder: Path, cache: Cache
) -> None:
    address = with_secrets(server)
    with serving(folder) as other:
        seen: list[str | None] = []

        def record(handler: Handler, name: str) -> bool:
            seen.append(handler.headers.get("Authorization"))
            return False

        def redirect(handler: Handler, name: str) -> bool:
            if name == "manifest.json" or name.startswith("moved"):
                return False
            there = "" if name.endswith(".index") else other.address
            handler.begin(0, 302, Location=f"{there}/{'moved-' if not there else ''}{name}")
            return True

        other.instead, server.instead = record, redirect
        for index in folder.glob("*.index"):
            shutil.copy(index, index.with_name(f"moved-{index.name}"))
        assert content(ShardSet(address, "val", cache=cache)) == content(ShardSet(folder, "val"))
    assert seen == [None]
    assert "moved-val-00000.index" in server.asked


def test_the_options_of_downloads_have_the_documented_defaults() -> None:
    assert DownloadOptions().wait_for_server_seconds == 1800
    assert Cache().parallel_downloads == 8
    assert download.CHUNK == 1 << 20


def test_show_works_with_an_address_with_secrets_and_shows_none(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    address = with_secrets(server)
    sheet = tmp_path / "sheet.png"
    result = cli.call("show", "--data", address, "--split", "val", "--out", sheet)
    assert result.exit_code == 0, result
    assert sheet.is_file()
    empty = cli.call("show", "--data", address, "--split", "nosplit", "--out", sheet)
    assert empty.exit_code == 2
    for text in (result.stdout, result.stderr, empty.stdout, empty.stderr):
        assert_no_secret(text)
    names = [str(path) for path in (tmp_path / "user").rglob("*")]
    assert names
    assert_no_secret(" ".join(names))


def test_a_run_from_an_address_with_secrets_keeps_none_of_them(
    server: ShardServer, tmp_path: Path
) -> None:
    result = cli.call_process(
        "train",
        "--json",
        f"data.shards={with_secrets(server)}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run.root={tmp_path / 'runs'}",
        "run.name=secret",
        "model.init_features=2",
        "train.max_epochs=1",
        "train.max_batches=2",
        "train.batch_size=4",
        "train.device=cpu",
    )
    assert result.exit_code == 0, result
    assert_no_secret(result.stdout + result.stderr)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "ckpt_latest.pth"} <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        # Three letters may stand in compressed data by chance; the others may not.
        assert not [secret for secret in SECRETS[1:] if secret.encode() in data], path
