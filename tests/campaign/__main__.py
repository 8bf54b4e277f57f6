"""Attack for as long as asked and print what was tried, what held and what broke.

python -m tests.campaign --minutes 60                 every area, round after round
python -m tests.campaign --cases 6 --quick            six of each area, always the same (CI)
python -m tests.campaign --minutes 5 --area manifest  one area
python -m tests.campaign --minutes 60 --out FILE.md   also write the table
python -m tests.campaign --broken                     break guarantees, and see it find each

A seed names the cases, and what is said of a broken one is the command that runs it again. No
verdict depends on how fast the machine is.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator
from pathlib import Path

from tests.campaign import broken, report
from tests.campaign.areas import areas
from tests.campaign.case import Area, Case, Tally, run
from tests.campaign.world import World, build

SHORT = 10
"""Minutes below which a campaign of all areas leaves out those whose cases take minutes."""


def main() -> int:
    """Run the campaign; exit code 1 where something broke."""
    options = _options()
    if options.broken:
        return broken.main(options.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    begin = time.monotonic()
    try:
        _preload()
        world = _build_in_fork(folder / "world")
        chosen = _choose(world, options)
        if not chosen:
            return 2
        tallies = _attack(chosen, folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = report.table(tallies, sys.argv[1:], (time.monotonic() - begin) / 60)
    print(table)
    if options.out:
        options.out.write_text(table)
    return int(any(tally.broken for tally in tallies.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="run for so long")
    parser.add_argument("--cases", type=int, default=0, help="run so many cases of each area")
    parser.add_argument("--seed", type=int, default=0, help="names the cases")
    parser.add_argument("--area", action="append", help="only this area; repeat for more")
    parser.add_argument("--quick", action="store_true", help="without areas that take minutes")
    parser.add_argument("--first", action="store_true", help="stop at the first broken case")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--broken", action="store_true", help="break guarantees on purpose")
    options = parser.parse_args()
    if not options.minutes and not options.cases and not options.broken:
        parser.error("give --minutes or --cases")
    return options


def _choose(world: World, options: argparse.Namespace) -> list[Area]:
    known = areas(world)
    if unknown := set(options.area or ()) - {area.name for area in known}:
        names = ", ".join(area.name for area in known)
        print(f"no area {', '.join(map(repr, unknown))}; there are {names}", file=sys.stderr)
        return []
    chosen = [area for area in known if not options.area or area.name in options.area]
    if not options.area and (options.quick or 0 < options.minutes < SHORT):
        chosen = [area for area in chosen if not area.long]
    for area in chosen:
        if area.needs_root and os.getuid() != 0:
            print(f"left out: {area.name}, which needs root", file=sys.stderr)
    return [area for area in chosen if not area.needs_root or os.getuid() == 0]


def _build_in_fork(root: Path) -> World:
    """Build the world in a fork: training starts threads, and this process forks on."""
    root.mkdir(parents=True)
    kept = root / "world.pkl"

    def action() -> int:
        kept.write_bytes(pickle.dumps(build(root)))
        return 0

    case = Case("the good data", action, allowed=(0,), cpu_seconds=600, idle_seconds=300)
    outcome, wrong = run(case, root)
    if wrong:
        raise RuntimeError(f"the good data could not be made: {wrong}\n{outcome.stderr[-3000:]}")
    world = pickle.loads(kept.read_bytes())
    assert isinstance(world, World)
    return world


def _preload() -> None:
    """Import what the cases need once; each case is a fork of this process."""
    import torch

    import portrait_dist.commands.evaluate
    import portrait_dist.commands.predict
    import portrait_dist.commands.report
    import portrait_dist.data.shards.writer
    import portrait_dist.data.stream.loader
    import portrait_dist.evaluation
    import portrait_dist.inference.batch
    import portrait_dist.inference.export
    import portrait_dist.runs.report.collect
    import portrait_dist.slurm.submit
    import portrait_dist.training.trainer  # noqa: F401

    torch.set_num_threads(1)


def _attack(chosen: list[Area], folder: Path, options: argparse.Namespace) -> dict[str, Tally]:
    tallies = {area.name: Tally() for area in chosen}
    streams = {area.name: _stream(area, folder, options.seed) for area in chosen}
    for area in _turns(chosen, options):
        where, cases = streams[area.name]
        wrong = _one(next(cases), where, tallies[area.name], area, options.seed)
        if wrong and options.first:
            break
    for _, cases in streams.values():
        cases.close()
    return tallies


def _turns(chosen: list[Area], options: argparse.Namespace) -> Iterator[Area]:
    """Yield whose turn it is, round after round, until the time or the cases are over."""
    deadline = time.monotonic() + options.minutes * 60
    for number in itertools.count():
        if not options.minutes and number >= options.cases:
            return
        for area in chosen:
            if options.minutes and time.monotonic() > deadline:
                return
            # Of one area alone each round counts.
            if number % area.every == 0 or len(chosen) == 1:
                yield area


def _stream(area: Area, folder: Path, seed: int) -> tuple[Path, Generator[Case, None, None]]:
    where = folder / area.name.replace(" ", "-")
    where.mkdir()
    return where, area.cases(random.Random(f"{area.name} {seed}"), where)


def _one(case: Case, where: Path, tally: Tally, area: Area, seed: int) -> str:
    """Run a case and count it; returns what is wrong."""
    tally.tried += 1
    try:
        _, wrong = run(case, where)
    except Exception:
        wrong = "the campaign itself failed: " + traceback.format_exc(limit=3)
    if not wrong:
        tally.held += 1
        return ""
    again = f"--area '{area.name}' --seed {seed} --cases {tally.tried}"
    tally.broken.append(f"{case.name}: {wrong} ({again})")
    print(f"BROKEN {area.name}: {tally.broken[-1]}", file=sys.stderr, flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
