"""Attacks by servers, and on the cache of what they sent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from random import Random

from tests.campaign import odd, servers
from tests.campaign.case import DAMAGED, DONE, INPUT, OTHER, Case
from tests.campaign.data import read_all
from tests.campaign.world import World


def _read_from(
    world: World, cache: Path, way: str, seed: int, gigabytes: float = 0.002
) -> Callable[[], int]:
    """Make the action that reads every sample from a server."""

    def action() -> int:
        from portrait_dist.data.shards.cache import Cache, DownloadOptions

        options = DownloadOptions(wait_for_server_seconds=5, timeout_seconds=10)
        kept = Cache(cache, gigabytes, downloads=options)
        with servers.serve(world.shards, way, seed) as address:
            return read_all(world, address, kept)()

    return action


def hostile_servers(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Servers of shards that cut, lie, drip, send too much or redirect."""
    while True:
        # From this cache ``./../../outside`` of a hostile manifest is the folder ``outside``.
        way, cache = random.choice(servers.WAYS), folder / "home" / "cache"
        precious = folder / "outside" / "precious.tar"
        precious.parent.mkdir()
        precious.write_bytes(b"mine")
        yield Case(
            f"server that {way}",
            _read_from(world, cache, way, random.randrange(2**32)),
            allowed=(DONE, OTHER, INPUT, DAMAGED),
            checks=(
                lambda _: "" if precious.exists() else "a file outside the cache is gone",  # noqa: B023
                lambda _: _only_ours(precious.parent),  # noqa: B023
                lambda _: _small(cache),  # noqa: B023
            ),
        )
        for path in (cache.parent, precious.parent):
            shutil.rmtree(path, ignore_errors=True)


def _only_ours(outside: Path) -> str:
    others = [path.name for path in outside.iterdir() if path.name != "precious.tar"]
    return f"{others[0]} was written outside the cache" if others else ""


def _small(cache: Path) -> str:
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return f"the cache holds {size:,} bytes" if size > 5_000_000 else ""


def caches(world: World, random: Random, folder: Path) -> Generator[Case, None, None]:
    """Damaged and forged files, links, modes and times in a cache: right samples, or refused."""
    cache, outside = folder / "cache", folder / "outside"
    while True:
        outside.write_bytes(b"mine")
        fill = _read_from(world, cache, "is honest", 0)
        yield Case("an honest server fills the cache", fill, allowed=(DONE,))
        what = [_spoil(random, cache, outside) for _ in range(random.choice([1, 1, 2]))]
        gigabytes = random.choice([0.002, 0.000_1])  # also with room for one shard or so
        yield Case(
            f"cache: {'; '.join(what)}",
            _read_from(world, cache, "is honest", 0, gigabytes),
            allowed=(DONE, INPUT),
            checks=(lambda _: "" if outside.read_bytes() == b"mine" else "a link was followed",),
        )
        shutil.rmtree(cache)


def _spoil(random: Random, cache: Path, outside: Path) -> str:
    """Do something to a file of the cache and say what."""
    path = random.choice(sorted(path for path in cache.iterdir() if path.is_file()))
    way = random.choice(["damage", "damage", "damage", "link", "times", "mode", "forged", "part"])
    if way == "damage":
        return odd.damage_file(random, path)
    if way == "link":
        path.unlink()
        path.symlink_to(outside)
        return f"{path.name[-20:]} is a link"
    if way == "times":
        os.utime(path, (0, random.choice([0, 4_102_444_800])))
        return f"{path.name[-20:]} of another time"
    if way == "mode":
        cache.chmod(random.choice([0o777, 0o1777, 0o500, 0o770]))
        return "other access rights"
    tar = random.choice(sorted(cache.glob("*.tar")))
    data = tar.read_bytes()
    if way == "forged":  # right name, length and time, another content
        found = tar.stat()
        tar.write_bytes(random.randbytes(len(data)))
        os.utime(tar, ns=(found.st_atime_ns, found.st_mtime_ns))
        return f"{tar.name[-20:]} is forged"
    tar.unlink()
    part = cache / f".{tar.stem}.{len(data)}.part"
    part.write_bytes(random.choice([data[: len(data) // 2], b"rubbish", data + b"x", data]))
    return f"{part.name[-20:]} is a part of {part.stat().st_size} bytes"
