"""Fixtures of several files: a trained network, and shards behind a server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import blobs
from tests.shard_server import ShardServer, serving


@pytest.fixture(scope="session")
def trained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that has learnt to find ellipses, as training saves it."""
    return blobs.save(blobs.train(), tmp_path_factory.mktemp("trained") / "ckpt_best.pth")


@pytest.fixture
def folder(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the small shards, to be served."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "served"))


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    """A server of that copy."""
    with serving(folder) as started:
        yield started
