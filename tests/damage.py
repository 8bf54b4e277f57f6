"""Damage files on purpose: flipped bits, cut ends, samples with wrong bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portrait_dist.data.shards import format as shard_format


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file in place.

    Args:
        path: the file; it keeps its length and gets a new inode never.
        offset: of the byte; a negative one counts from the end.
        bit: 0 (lowest) to 7.
    """
    with path.open("r+b") as file:
        file.seek(offset, 0 if offset >= 0 else 2)
        position = file.tell()
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def cut(path: Path, length: int) -> None:
    """Truncate a file to ``length`` bytes; a negative length removes that many from the end."""
    with path.open("r+b") as file:
        file.truncate(length if length >= 0 else path.stat().st_size + length)


def damage_sample(shards: Path, shard: str, position: int) -> None:
    """Flip one bit within the image of a sample.

    Args:
        shards: folder of packed shards.
        shard: name of the tar, such as ``train-00000.tar``.
        position: number of the sample within the shard.
    """
    tar = shards / shard
    _, records = shard_format.parse_index(tar.with_suffix(".index").read_bytes(), shard)
    record = shard_format.record_at(records, position)
    flip_bit(tar, record.offset + shard_format.BLOCK + record.image // 2)


def edit_manifest(shards: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of packed shards as if it had been written so: without a hash of itself.

    Args:
        shards: folder of packed shards.
        edit: changes the parsed JSON in place.
    """
    path = shards / shard_format.MANIFEST
    found = json.loads(path.read_bytes())
    found.pop(shard_format.DIGEST, None)
    edit(found)
    path.write_text(json.dumps(found))
