"""Fixtures of the tests of remote shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shard_server import ShardServer, serving


@pytest.fixture
def folder(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the small shards, to be served."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "served"))


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    """A server of that copy."""
    with serving(folder) as started:
        yield started
