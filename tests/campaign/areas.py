"""The kinds of attack.

Each generator draws its cases from the random generator that it gets, so that a seed names a case.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from random import Random

from tests.campaign import data, inputs, network, places, races, runs
from tests.campaign.case import Area, Case
from tests.campaign.world import World


def areas(world: World) -> list[Area]:
    """Every area, for one world of good data."""

    def area(
        name: str,
        cases: Callable[..., Generator[Case, None, None]],
        *,
        needs_root: bool = False,
        every: int = 1,
        long: bool = False,
    ) -> Area:
        def bound(random: Random, folder: Path) -> Generator[Case, None, None]:
            return cases(world, random, folder)

        return Area(name, bound, needs_root, every, long)

    return [
        area("shards", data.shards),
        area("shard sets", data.shard_sets),
        area("foreign tars", data.foreign_tars),
        area("manifest", data.manifest),
        area("raw trees", data.raw_trees),
        area("splits", data.splits),
        area("lists", data.lists),
        area("layouts", data.layouts),
        area("settings", inputs.settings),
        area("submissions", inputs.submissions),
        area("recipes", inputs.recipes),
        area("checkpoints", inputs.checkpoints),
        area("run folders", inputs.run_folders),
        area("photos", inputs.photos),
        area("slurm variables", inputs.slurm_variables),
        area("outputs", places.outputs),
        area("names", places.names),
        area("full disks", places.full_disks, needs_root=True),
        area("read-only disks", places.read_only_disks, needs_root=True),
        area("servers", network.hostile_servers),
        area("caches", network.caches),
        area("two at once", races.two_at_once),
        area("killed and again", races.killed_and_again),
        area("resumed runs", runs.resumed, every=2),
        area("kills of ranks", runs.kills, every=100, long=True),
    ]
