"""What the end of an epoch costs: seconds between two epochs' steps, and bytes written.

    python benchmarks/epoch_ends.py --json epoch_ends.json
    python benchmarks/epoch_ends.py --against c952b65 --json epoch_ends.json
    python benchmarks/epoch_ends.py --quick

Trains the full U-Net (32 features) on few small images, validates one batch, and reports per epoch
the seconds between the last training step and the first one of the next epoch. Rows: ``background``
is the trainer; ``at once`` waits for each save before the next epoch, as the trainer did before
files were written by a thread; ``no files`` trains without saving: the floor; the last row is an
older commit's trainer. ``megabytes_written`` is what the process gave to write(2) per epoch
(/proc/self/io), so it counts every file. The rows take turns, each round in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import measure


def run_round(
    tree: Path, kind: str, epochs: int, steps: int, features: int
) -> dict[str, list[float]]:
    """Run one round with the package of a tree; return its gaps and the bytes after each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "round.json")
        numbers = map(str, (epochs, steps, features))
        measure.run_in_tree(tree, "epoch_round.py", str(out), *numbers, kind)
        return dict(json.loads(out.read_text()))


def main(arguments: list[str] | None = None) -> None:
    """Measure all rows, round after round."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--features", type=int, default=32, help="channels of the first level")
    parser.add_argument("--against", metavar="COMMIT", help="an older commit to run beside")
    options = parser.parse_args(arguments)
    epochs, steps = (4, 2) if options.quick else (12, 10)
    cases = {name: (measure.REPOSITORY, name) for name in ("no files", "at once", "background")}
    gaps: dict[str, list[float]] = {}
    written: dict[str, list[float]] = {}
    with ExitStack() as stack:
        if options.against:
            tree = stack.enter_context(measure.older_tree(options.against))
            cases[options.against] = tree, "background"
        for number in range(options.repeats or (1 if options.quick else 3)):
            for name, (tree, kind) in cases.items():
                found = run_round(tree, kind, epochs, steps, options.features)
                gaps.setdefault(name, []).extend(found["gaps"])
                total = found["written"]
                pairs = itertools.pairwise(total)
                written.setdefault(name, []).extend(after - before for before, after in pairs)
            print(f"  round {number + 1} done", file=sys.stderr, flush=True)
    rows = [
        measure.row(
            name, gaps[name], "seconds", megabytes_written=statistics.median(written[name]) / 1e6
        )
        for name in cases
    ]
    measure.publish(measure.result("epoch ends", rows), options.json)


if __name__ == "__main__":
    main()
