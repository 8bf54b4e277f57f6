"""Let new pairs join packed shards: ``pack --append``.

New pairs become new shards behind the old ones, which are not touched; the manifest gets the next
version. A sample that is there keeps its split, whatever the data says now. While shards are added
the old manifest stays: readers see the old version or the new one. Killed and run again it keeps
the new shards that are whole.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from portrait_dist.data.shards.encode import Settings
from portrait_dist.data.shards.format import Manifest, ShardEntry, SplitEntry, keys_sha256
from portrait_dist.data.shards.pack_folder import PackFolder
from portrait_dist.data.shards.plan import ShardPlan, check_keys, plan_shards
from portrait_dist.data.shards.reader import ShardSet
from portrait_dist.data.shards.writer import (
    PackResult,
    finish_folder,
    plan_missing,
    write_missing,
)
from portrait_dist.data.source.assignment import SPLITS
from portrait_dist.data.source.split import Split, open_data
from portrait_dist.errors import InputError
from portrait_dist.files import explained
from portrait_dist.preprocessing import DEFAULT_SIZE, Fit
from portrait_dist.system.info import cores
from portrait_dist.system.malloc import keep_freed_memory


def append(
    data: str | Path | Split,
    out: str | Path,
    size: tuple[int, int] | None = DEFAULT_SIZE,
    samples_per_shard: int = 1024,
    workers: int | None = None,
    codec: str = "jpeg",
    quality: int = 95,
    fit: Fit = "squash",
) -> PackResult:
    """Pack the pairs whose keys are not in packed shards yet, as new shards behind the old ones.

    Args:
        data: a prepared folder or any source; pairs that are there already are passed over.
        out: the packed shards.
        size: (H, W) in pixels, None for original; as all settings, that of the old shards.
        samples_per_shard: in all new shards but the last of a split.
        workers: threads; by default the CPUs this process may use.
        codec: of the old shards.
        quality: of the old shards.
        fit: of the old shards.

    Raises:
        InputError: no packed shards there, other settings, or a key that cannot be stored.
        DamagedDataError: a file that does not decode.
        PortraitDistError: the disk is full or failed.
    """
    settings = Settings(size, codec, quality, samples_per_shard, fit)
    settings.check()
    split = data if isinstance(data, Split) else open_data(data)
    check_keys(split)
    folder = PackFolder(Path(out).absolute(), split, settings)
    keep_freed_memory()
    with explained(folder.out):
        if not folder.manifest.is_file():
            raise InputError(
                f"{folder.out}: there are no complete shards to append to; pack without --append"
            )
        with folder.locked():
            return _append(folder, workers or cores())


def _append(folder: PackFolder, workers: int) -> PackResult:
    started = time.perf_counter()
    manifest = folder.read_manifest()
    folder.compare_settings(manifest.settings)
    old = {name: _keys(folder.out, name) for name in manifest.splits}
    new = _new(folder.split, old)
    plans = _behind(plan_shards(new, folder.settings.samples_per_shard), manifest)
    entries, missing = plan_missing(plans, new, folder.out, folder.settings)
    entries |= write_missing(missing, new, folder.out, folder.settings, workers)
    packed = sum(len(plan.keys) for plan in missing)
    if plans:
        splits = {
            name: _extended(manifest.splits.get(name), old.get(name, []), name, plans, entries)
            for name in SPLITS
        }
        manifest = dataclasses.replace(
            manifest, splits=splits, versions=_versions(manifest, splits)
        )
        finish_folder(folder.out, manifest)
    samples = {name: entry.samples for name, entry in manifest.splits.items()}
    shards = [shard for entry in manifest.splits.values() for shard in entry.shards]
    return PackResult(
        samples=sum(samples.values()),
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        pairs_per_second=packed / (time.perf_counter() - started),
        packed=packed,
        splits=samples,
        out=str(folder.out),
        part=None,
        finished=True,
        shards_missing=0,
        version=manifest.version,
    )


def _keys(out: Path, split: str) -> list[str]:
    shards = ShardSet(out, split)
    return [shards.key(sample) for sample in range(len(shards))]


def _new(split: Split, old: dict[str, list[str]]) -> Split:
    """Leave out the pairs that are packed already, in whichever split."""
    there = {key for keys in old.values() for key in keys}
    keys = {name: [key for key in split.keys(name) if key not in there] for name in SPLITS}
    return dataclasses.replace(split, splits=keys)


def _behind(plans: list[ShardPlan], manifest: Manifest) -> list[ShardPlan]:
    """Continue the numbers of each split's shards."""
    next_number = {
        name: 1 + max((_number(shard.name) for shard in entry.shards), default=-1)
        for name, entry in manifest.splits.items()
    }
    return [
        dataclasses.replace(
            plan,
            name=f"{plan.split}-{_number(plan.name) + next_number.get(plan.split, 0):05d}.tar",
        )
        for plan in plans
    ]


def _number(name: str) -> int:
    return int(name.rpartition("-")[2].removesuffix(".tar"))


def _extended(
    before: SplitEntry | None,
    keys: list[str],
    name: str,
    plans: list[ShardPlan],
    entries: dict[str, ShardEntry],
) -> SplitEntry:
    added = [plan for plan in plans if plan.split == name]
    shards = [*(before.shards if before else []), *(entries[plan.name] for plan in added)]
    everything = [*keys, *(key for plan in added for key in plan.keys)]
    return SplitEntry(len(everything), keys_sha256(everything), shards)


def _versions(manifest: Manifest, splits: dict[str, SplitEntry]) -> tuple[dict[str, int], ...]:
    first = {
        name: len(manifest.splits[name].shards) if name in manifest.splits else 0 for name in SPLITS
    }
    before = manifest.versions or (first,)
    return (*before, {name: len(entry.shards) for name, entry in splits.items()})
