"""Compare recipes on the same images, seeds and steps: choose on validation, report on test.

    python benchmarks/recipes.py --raw RAW --json recipes.json                # a raw AISegment tree
    python benchmarks/recipes.py --pairs 109 --json recipes.json              # generated portraits
    python benchmarks/recipes.py --raw RAW --only tutorial aisegment_unet --side 128 --epochs 300
    python benchmarks/recipes.py --raw RAW --choices --epochs 12 --other RAW2 --json choices.json
    python benchmarks/recipes.py --page recipes.json ...                    # their tables, one page

From the tutorial's recipe on, one thing after the other is added; ``aisegment_unet`` has all of
them, new backgrounds last. With ``--choices`` each row is ``aisegment_unet`` with one thing
changed, which tells what that one is worth. Every row is trained with every seed: it decides over
the split (``prepare --seed``), the weights, the order and the augmentation, so each seed also has
other validation and test images. ``ckpt_best.pth`` (best on validation) is scored. ``--other`` is a
tree of another source: its training images (80 %), which no row has learned from, are scored too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure

from portrait_dist.system.info import cores

CLI = [sys.executable, "-m", "portrait_dist"]
NO_BACKGROUNDS = ["augment.background=0"]
NO_GEOMETRY = ["augment.scale=0", "augment.rotation=0", "augment.translation=0"]
LITTLE_GEOMETRY = ["augment.scale=0.1", "augment.rotation=3", "augment.translation=0.03"]
MUCH_GEOMETRY = ["augment.scale=0.5", "augment.rotation=20", "augment.translation=0.2"]
NO_SCHEDULE = [
    "train.ema=false",
    "train.warmup_steps=0",
    "train.optimizer=adam",
    "train.weight_decay=0",
    "train.lr=0.001",
]
ROWS: dict[str, list[str]] = {
    "tutorial": ["--recipe", "tutorial"],
    "soft IoU loss": ["--recipe", "aisegment_unet", *NO_BACKGROUNDS, *NO_GEOMETRY, *NO_SCHEDULE],
    "+ EMA, warm-up, AdamW": ["--recipe", "aisegment_unet", *NO_BACKGROUNDS, *NO_GEOMETRY],
    "+ zoom, rotation, shift": ["--recipe", "aisegment_unet", *NO_BACKGROUNDS],
    "aisegment_unet": ["--recipe", "aisegment_unet"],
}
CHOICES: dict[str, list[str]] = {
    "aisegment_unet": [],
    "the tutorial's loss": ["loss.kind=tutorial"],
    "cross-entropy alone": ["loss.iou_weight=0"],
    "soft IoU alone": ["loss.bce_weight=0"],
    "without EMA": ["train.ema=false"],
    "without warm-up": ["train.warmup_steps=0"],
    "learning rate 0.001": ["train.lr=0.001"],
    "learning rate 0.01": ["train.lr=0.01"],
    "without colours": ["augment.brightness=0", "augment.contrast=0", "augment.saturation=0"],
    "without zoom, rotation, shift": NO_GEOMETRY,
    "without new backgrounds": NO_BACKGROUNDS,
    "batches of 8": ["train.batch_size=8"],
    "batches of 32": ["train.batch_size=32"],
    "fp32": ["train.precision=fp32"],
    "16 features": ["model.init_features=16"],
    "4 features": ["model.init_features=4"],
    "a third of zoom, rotation, shift": LITTLE_GEOMETRY,
    "twice the zoom, rotation, shift": MUCH_GEOMETRY,
    "32 features": ["model.init_features=32"],
}
SIDES = {"64x64 images": 64, "128x128 images": 128, "192x192 images": 192}
"""Rows of the choices that differ in the images alone; they are scored at their own size."""
CHOICES |= {name: [] for name in SIDES}
SCORES = ("iou", "mean_iou", "boundary_iou", "mae")


def call(*arguments: str) -> tuple[dict[str, Any], float]:
    """Run one command of the package; return its JSON object and the CPU seconds it took."""
    text, cpu = measure.run_measured([*CLI, *arguments, "--json"], cwd=measure.REPOSITORY)
    return dict(json.loads(text)), cpu


def raw_tree(options: argparse.Namespace, work: Path) -> Path:
    """Return the tree as given, or generate one."""
    if options.raw:
        return Path(options.raw).resolve()
    call("synth", "--out", str(work / "raw"), "--pairs", str(options.pairs), "--seed", "1")
    return work / "raw"


def shards_of(seed: int, raw: Path, side: int, work: Path, kind: str = "") -> Path:
    """Split the images by this seed and pack them."""
    split, out = work / f"{kind}split{seed}", work / f"{kind}shards{seed}-{side}"
    call("prepare", "--raw", str(raw), "--out", str(split), "--seed", str(seed))
    call("pack", "--data", str(split), "--out", str(out), "--size", f"{side}x{side}")
    return out


def side_of(name: str, options: argparse.Namespace) -> int:
    """Return the side of a row's images in pixels."""
    return SIDES.get(name, int(options.side))


def settings_of(name: str, options: argparse.Namespace) -> list[str]:
    """List the arguments of ``train`` for a row, all but its folders and seed."""
    common = [
        f"model.init_features={options.features}",
        f"train.max_epochs={options.epochs}",
        f"train.precision={options.precision}",
    ]
    if options.choices:  # what a row changes may be one of these too: the last one holds
        return ["--recipe", "aisegment_unet", *common, *CHOICES[name]]
    return [*ROWS[name], *common]


def scores_of(checkpoint: str, shards: Path, split: str, name: str = "") -> dict[str, float]:
    """Score a checkpoint on a split; the scores' names begin with the split's or the given one."""
    scored, _ = call(
        "evaluate", "--checkpoint", checkpoint, "--data", str(shards), "--split", split
    )
    return {f"{name or split}_{score}": scored[score] for score in SCORES}


def score(
    name: str,
    seed: int,
    shards: Path,
    other: Path | None,
    options: argparse.Namespace,
    work: Path,
) -> dict[str, Any]:
    """Train one row with one seed; score its best on both held-out splits and the other source."""
    begin = time.monotonic()
    own = [
        f"data.shards={shards}",
        f"run.root={work / 'runs'}",
        f"run.name={list(options.table).index(name)}-{seed}",
        f"train.seed={seed}",
    ]
    threads = max(1, cores() // options.jobs)
    settings = settings_of(name, options)
    trained, cpu = call("train", *settings, *own, f"train.threads={threads}", "train.pictures=0")
    found: dict[str, Any] = {
        "minutes": round((time.monotonic() - begin) / 60, 2),
        # Of the whole command: imports and validation are in it.
        "cpu_seconds_per_image": float(f"{cpu / trained['samples_seen']:.4g}"),
    }
    checkpoint = str(trained["checkpoint"])
    for split in ("val", "test"):
        found |= scores_of(checkpoint, shards, split)
    if other:
        found |= scores_of(checkpoint, other, "train", "other")
    ious = f"val {found['val_iou']:.4f}, test {found['test_iou']:.4f}"
    print(f"  {name}, seed {seed}: {ious}, {found['minutes']} min", flush=True)
    return found | {"seed": seed, "steps": trained["steps"]}


def row(name: str, runs: list[dict[str, Any]], options: argparse.Namespace) -> measure.Row:
    """Average over the seeds, with the lowest and highest test IoU."""
    means = {
        key: round(statistics.mean(run[key] for run in runs), 4)
        for key in runs[0]
        if key not in ("seed", "steps")
    }
    tests = [run["test_iou"] for run in runs]
    return {
        "name": name,
        "test_iou": means["test_iou"],
        "low": round(min(tests), 4),
        "high": round(max(tests), 4),
        "val_iou": means["val_iou"],
        "test_mean_iou": means["test_mean_iou"],
        "test_boundary_iou": means["test_boundary_iou"],
        "test_mae": means["test_mae"],
        **{key: mean for key, mean in means.items() if key in ("other_iou", "other_boundary_iou")},
        "seeds": len(runs),
        "steps": runs[0]["steps"],
        "minutes": means["minutes"],
        "cpu_seconds_per_image": means["cpu_seconds_per_image"],
        "runs": runs,
        "command": "portrait-dist train " + " ".join(settings_of(name, options)),
    }


def page(found: dict[str, Any]) -> str:
    """Format the table and its commands as Markdown."""
    rows = [
        {key: value for key, value in line.items() if key != "command"} for line in found["rows"]
    ]
    commands = [
        f"- {line['name']}: `{line['command']} data.shards=SHARDS train.seed=SEED`"
        for line in found["rows"]
    ]
    machine = found["machine"]
    about = [
        f"## {found['pictures']}, {found['rows'][0]['steps']} steps",
        "",
        f"Means over the seeds {', '.join(map(str, found['seeds']))}; "
        "the column after test_iou has its lowest and highest.",
        "",
        measure.table(rows),
        "",
        f"- largest mean IoU on validation: {found['best']}",
        f"- {machine['cpu']}, {machine['cores']} cores, {found['jobs']} at a time; "
        f"commit {found['commit']}, {found['date']}",
    ]
    return "\n".join([*about, *commands, f"- all of it: `{found['command']}`", ""])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and score all rows with all seeds, or print the tables of results."""
    options = _options(arguments)
    if options.page:
        results = [json.loads(path.read_text()) for path in options.page]
        print("\n".join(["# Recipes", "", *(page(result) for result in results)]).rstrip())
        return {"pages": len(results)}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = options.work or Path(temporary)
        raw = raw_tree(options, work)
        sides = sorted({side_of(name, options) for name in options.only})
        shards = {
            (seed, side): shards_of(seed, raw, side, work)
            for seed in options.seeds
            for side in sides
        }
        other = {
            side: shards_of(1, options.other.resolve(), side, work, "other-")
            for side in (sides if options.other else ())
        }
        # Seed by seed, so that what is finished after an interruption compares all rows;
        # existing runs are resumed.
        jobs = [(name, seed) for seed in options.seeds for name in options.only]

        def scored(job: tuple[str, int]) -> dict[str, Any]:
            name, seed = job
            side = side_of(name, options)
            return score(name, seed, shards[seed, side], other.get(side), options, work)

        with ThreadPoolExecutor(options.jobs) as pool:
            scores = list(pool.map(scored, jobs))
    rows = [
        row(name, [run for job, run in zip(jobs, scores, strict=True) if job[0] == name], options)
        for name in options.only
    ]
    pictures = options.raw.name if options.raw else f"{options.pairs} generated pairs"
    best = max(rows, key=lambda line: line["val_iou"])["name"]
    about = {
        "pictures": f"{pictures}, {options.side}x{options.side}",
        "seeds": options.seeds,
        "jobs": options.jobs,
        **({"other": options.other.name} if options.other else {}),
    }
    found = measure.result("recipes", rows, best=best, **about)
    measure.write(found, options.json)
    print(page(found))
    return found


def arguments(description: str | None, rows: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Make a parser with what benchmarks that train on one set of images have in common."""
    names = tuple(rows)
    parser = measure.arguments(description, rounds=False)
    parser.add_argument(
        "--raw", type=Path, help="raw AISegment tree; portraits are generated when left out"
    )
    parser.add_argument("--pairs", type=int, default=109, help="pairs to generate")
    if names:
        parser.add_argument(
            "--only", nargs="+", choices=names, default=list(names), help="some of the rows"
        )
    parser.add_argument("--side", type=int, default=128, help="of the images, in pixels")
    parser.add_argument(
        "--work", type=Path, help="folder for shards and runs, kept; a temporary one when left out"
    )
    return parser


def _options(given: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, ROWS | CHOICES)
    parser.set_defaults(only=None)
    parser.add_argument(
        "--choices", action="store_true", help="aisegment_unet, each time with one thing changed"
    )
    parser.add_argument(
        "--other", type=Path, metavar="RAW", help="a tree of another source, to be scored on too"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument(
        "--features", type=int, default=8, help="channels of the network's first level"
    )
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument(
        "--jobs", type=int, default=cores(), help="runs at a time, which share the cores"
    )
    parser.add_argument(
        "--page",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="only print the tables of these results",
    )
    options = parser.parse_args(given)
    options.table = CHOICES if options.choices else ROWS
    options.only = options.only or list(options.table)
    if other := set(options.only) - set(options.table):
        parser.error(f"--only {', '.join(sorted(other))}: not a row of this table")
    return options


if __name__ == "__main__":
    main()
