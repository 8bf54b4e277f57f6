"""One throw-away SLURM cluster for all tests in this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, n0 and n1, with 2 CPUs each; jobs in it run this Python."""
    if missing := missing_programs():
        pytest.skip(
            f"no SLURM on this machine ({', '.join(missing)} missing): "
            "apt-get install slurm-wlm munge"
        )
    with Cluster(tmp_path_factory.mktemp("slurm") / "c") as started:
        started.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        yield started
