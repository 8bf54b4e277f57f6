"""Measure the host's time of a training step by part, and that of an older commit beside it.

    python benchmarks/step_parts.py --json step_parts.json                   # this tree alone
    python benchmarks/step_parts.py --against c952b65 --json step_parts.json

Trains the recipe of the full U-Net on 32 px images with two channels, so that nothing but calling
the operations takes time: what is left of a step on a GPU when the GPU takes none, and the least
time that a step can have there. Times are CPU time of the training thread in milliseconds (it does
not run while decoders or neighbours do), the lower quartile of the steps of a round after the first
ones. ``other`` is what no part has: fetching the batch, callbacks, progress, the agreement on
stops. The trees take turns, round after round, in a process of their own for each round.

On a CPU the operations compute in the thread that is timed, and oneDNN, which picks and prepares a
kernel in each call of a convolution, takes half of forward and backward. ``--plain-kernels`` adds
rows without it, which are nearer to what a GPU's host does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import measure


def run_round(tree: Path, kind: str, shards: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one round with the package of a tree."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "parts.json")
        words = map(str, (shards, folder, out, options.steps, options.batch, kind, options.device))
        measure.run_in_tree(tree, "step_round.py", *words)
        return dict(json.loads(out.read_text()))


def pack_small(folder: Path, samples: int) -> Path:
    """Make and pack generated portraits at 32 px."""
    program = [sys.executable, "-m", "portrait_dist"]
    raw, data, shards = (folder / name for name in ("raw", "data", "shards"))
    for command in (
        ["synth", "--out", raw, "--pairs", str(samples)],
        ["prepare", "--raw", raw, "--out", data],
        ["pack", "--data", data, "--out", shards, "--size", "32x32"],
    ):
        measure.run_measured([*program, *map(str, command)])
    return shards


def main(arguments: list[str] | None = None) -> None:
    """Measure this tree, and an older commit's beside it."""
    options = _options(arguments)
    options.steps = options.steps or (60 if options.quick else 250)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        shards = pack_small(Path(folder), 130 if options.quick else 700)
        trees = {"this commit": measure.REPOSITORY}
        if options.against:
            trees[options.against] = stack.enter_context(measure.older_tree(options.against))
        cases = {name: (tree, "eager") for name, tree in trees.items()}
        if options.compiled:
            cases["this commit, compiled"] = measure.REPOSITORY, "compiled"
        if options.plain:
            cases |= {f"{name}, plain kernels": (tree, "plain") for name, tree in trees.items()}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for number in range(options.repeats or (1 if options.quick else 3)):
            for name, (tree, kind) in cases.items():
                rounds[name].append(run_round(tree, kind, shards, options))
            print(f"  round {number + 1} done", file=sys.stderr, flush=True)
    rows = [row(name, found, options.batch) for name, found in rounds.items()]
    about = {"batch_size": options.batch, "steps": options.steps, "size": 32}
    about["device"] = options.device
    measure.publish(measure.result("step_parts", rows, **about), options.json)


def row(name: str, rounds: list[dict[str, float]], batch: int) -> measure.Row:
    """Make the row of a tree: the lowest round of each part, for a neighbour only adds."""
    best = {part: round(min(one[part] for one in rounds), 3) for part in rounds[0]}
    whole = [one["step"] for one in rounds]
    line = measure.row(name, whole, "step_ms", cpu_seconds_per_image=best["step"] / 1e3 / batch)
    return {**line, "lowest_ms": best.pop("step"), **best}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = measure.arguments(__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="an older commit to run beside")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compiled", action="store_true", help="also with train.compile=true")
    parser.add_argument(
        "--plain-kernels", dest="plain", action="store_true", help="also without oneDNN"
    )
    parser.add_argument("--batch", type=int, default=2, help="images of a step")
    parser.add_argument("--steps", type=int, help="steps of a round")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
