"""A user's network goes the whole way: two ranks, resumed to the bit, scored, used, exported.

``python -m tests.networks`` tries those of SuperGradients and segmentation_models_pytorch as well;
its table stands in benchmarks/results.
"""

from __future__ import annotations

from pathlib import Path

from tests.networks import CELLS, OWN, Way, make_data


def test_a_users_network_goes_the_whole_way(tmp_path: Path) -> None:
    shards, photo = make_data(tmp_path)
    assert Way(OWN, tmp_path, shards, photo).go() == dict.fromkeys(CELLS, "held")
