"""Attack for as long as asked and print what was tried, what held and what broke.

python -m tests.campaign --minutes 60                 every area, round after round
python -m tests.campaign --cases 6                    six of each area, always the same (CI)
python -m tests.campaign --minutes 5 --area manifest  one area
python -m tests.campaign --minutes 60 --out FILE.md   also write the table
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.campaign.areas import areas
from tests.campaign.case import Area, Case, Tally, run
from tests.campaign.world import World


def main() -> int:
    """Run the campaign; exit code 1 where something broke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="run for so long")
    parser.add_argument("--cases", type=int, default=0, help="run so many cases of each area")
    parser.add_argument("--seed", type=int, default=0, help="names the cases")
    parser.add_argument("--area", action="append", help="only this area; repeat for more")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    if not options.minutes and not options.cases:
        parser.error("give --minutes or --cases")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        world = _build_in_child(folder / "world")
        _preload()
        tallies = _attack(world, folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = _table(tallies, options)
    print(table)
    if options.out:
        options.out.write_text(table)
    return int(any(tally.broken for tally in tallies.values()) or not tallies)


def _build_in_child(root: Path) -> World:
    """Build the world in a process of its own: training starts threads, and this one forks."""
    root.mkdir(parents=True)
    code = (
        "import sys, pickle; from pathlib import Path; from tests.campaign.world import build\n"
        "root = Path(sys.argv[1]); (root / 'world.pkl').write_bytes(pickle.dumps(build(root)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise RuntimeError(f"the good data could not be made:\n{done.stderr[-3000:]}")
    import pickle

    world = pickle.loads((root / "world.pkl").read_bytes())
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
    import portrait_dist.slurm.submit  # noqa: F401

    torch.set_num_threads(1)


def _attack(world: World, folder: Path, options: argparse.Namespace) -> dict[str, Tally]:
    chosen = [area for area in areas(world) if not options.area or area.name in options.area]
    chosen = [area for area in chosen if not (area.needs_root and os.getuid() != 0)]
    if options.minutes < 10 and not options.area:
        chosen = [area for area in chosen if not area.slow]
    tallies = {area.name: Tally() for area in chosen}
    streams = {area.name: _stream(area, folder, options.seed) for area in chosen}
    deadline = time.monotonic() + options.minutes * 60
    rounds = 0
    while (time.monotonic() < deadline) if options.minutes else (rounds < options.cases):
        rounds += 1
        for area in chosen:
            if area.slow and rounds % 200 != 1:
                continue
            where, cases = streams[area.name]
            _one(next(cases), where, tallies[area.name], area)
    for _, cases in streams.values():
        cases.close()  # type: ignore[attr-defined]
    return tallies


def _stream(area: Area, folder: Path, seed: int) -> tuple[Path, Iterator[Case]]:
    where = folder / area.name.replace(" ", "-")
    where.mkdir()
    return where, area.cases(random.Random(f"{area.name} {seed}"), where)


def _one(case: Case, where: Path, tally: Tally, area: Area) -> None:
    tally.tried += 1
    try:
        _, wrong = run(case, where)
    except Exception:
        wrong = "the campaign itself failed: " + traceback.format_exc(limit=3)
    if wrong:
        tally.broken.append(f"{case.name}: {wrong}")
        print(f"BROKEN {area.name}: {case.name}: {wrong}", file=sys.stderr, flush=True)
    else:
        tally.held += 1


def _table(tallies: dict[str, Tally], options: argparse.Namespace) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    length = f"{options.minutes:g} minutes" if options.minutes else f"{options.cases} cases an area"
    lines = [
        f"Campaign of {length}, seed {options.seed}, commit {commit.stdout.strip() or 'unknown'}",
        "",
        "| area | tried | held | broken |",
        "|---|---|---|---|",
    ]
    for name, tally in tallies.items():
        lines.append(f"| {name} | {tally.tried} | {tally.held} | {len(tally.broken)} |")
    total = [sum(getattr(tally, part) for tally in tallies.values()) for part in ("tried", "held")]
    lines += [f"| all | {total[0]} | {total[1]} | {total[0] - total[1]} |", ""]
    lines += [f"- {name}: {broken}" for name, tally in tallies.items() for broken in tally.broken]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
