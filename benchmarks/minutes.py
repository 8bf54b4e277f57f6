"""Show how good the masks are after so many minutes of training: a curve.

    python benchmarks/minutes.py --raw RAW --stages 128:10 256:50 --json minutes.json
    python benchmarks/minutes.py --pairs 109 --stages 64:1       # generated portraits
    python benchmarks/minutes.py --draw minutes.json             # only its chart, minutes.svg

A stage ``SIDE:MINUTES`` trains on images of that side, from the weights of the stage before, with a
schedule that ends with it: small images teach the rough shape in little time, large ones the edges.
Each core has a rank. Minutes are CPU minutes on each core; calibration is left out (equal_time.py).
Each stage's ``ckpt_best.pth`` (best on validation) is scored on the test images at the stage's
size. The chart is written beside the JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import recipes
from equal_time import epochs_that_fit
from matplotlib import rc_context
from matplotlib.figure import Figure
from recipes import call, raw_tree, scores_of, shards_of

from portrait_dist import files
from portrait_dist.system.info import cores


@dataclass(frozen=True)
class Stage:
    """A training on images of one size.

    Attributes:
        side: of the images, in pixels.
        minutes: CPU minutes on each core.
    """

    side: int
    minutes: float

    @classmethod
    def of(cls, text: str) -> Stage:
        """Read ``SIDE:MINUTES``; raises ValueError where the text is none."""
        side, minutes = text.split(":")
        return cls(int(side), float(minutes))


def run_stage(
    stage: Stage, weights: list[str], raw: Path, options: argparse.Namespace, work: Path
) -> tuple[str, list[measure.Row], dict[str, Any]]:
    """Train a stage; return its best checkpoint, a row for each validation, scores and command."""
    shards = shards_of(options.seed, raw, stage.side, work)
    settings = [
        *("--recipe", options.recipe, f"model.init_features={options.features}"),
        *(f"train.precision={options.precision}", *options.settings, *weights),
        *("--nproc", str(options.nproc)),
    ]
    own = [f"data.shards={shards}", f"run.root={work}", "train.pictures=0"]
    own += [f"train.seed={options.seed}", "train.threads=1"]

    def train(epochs: int, name: str) -> tuple[dict[str, Any], float]:
        return call(*("train", *settings, *own, f"run.name={name}", f"train.max_epochs={epochs}"))

    epochs, _ = epochs_that_fit(
        stage.minutes, lambda few: train(few, f"{stage.side}-calibration-{few}")[1]
    )
    trained, _ = train(epochs, f"{stage.side}")
    lines = (work / f"{stage.side}" / "metrics.jsonl").read_text().splitlines()
    validated = [event for event in map(json.loads, lines) if "val_iou" in event]
    rows = [
        {
            "side": stage.side,
            "epoch": event["epoch"] + 1,
            "minutes": round(event["cpu_seconds"] * options.nproc / 60 / cores(), 2),
            "val_iou": round(event["val_iou"], 4),
        }
        for event in validated
    ]
    command = " ".join(["portrait-dist train", *settings, f"train.max_epochs={epochs}"])
    command = command.replace(f"{work}/", "")
    print(f"  {stage.side} px: val IoU {rows[-1]['val_iou']:.4f} after {epochs} epochs", flush=True)
    best = str(trained["checkpoint"])
    scores = scores_of(best, shards, "test")
    rounded = {name: round(score, 4) for name, score in scores.items()}
    return best, rows, {**rounded, "command": command}


def draw(found: dict[str, Any]) -> str:
    """Draw validation IoU against minutes, and each stage's test IoU, as SVG text."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for stage in found["stages"]:
        rows = [row for row in found["rows"] if row["side"] == stage["side"]]
        minutes = [row["minutes"] for row in rows]
        (line,) = axes.plot(
            minutes, [row["val_iou"] for row in rows], label=f"validation, {stage['side']} px"
        )
        axes.plot(minutes[-1], stage["test_iou"], "o", color=line.get_color())
        axes.annotate(
            f"test {stage['test_iou']:.3f}",
            (minutes[-1], stage["test_iou"]),
            ha="right",
            va="bottom",
        )
    machine = found["machine"]
    axes.set(
        xlabel=f"minutes of training on {machine['cores']} cores ({machine['cpu']})",
        ylabel="IoU",
        ylim=(0.8, 1),
        xlim=(0, found["rows"][-1]["minutes"] * 1.02),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "minutes"}):  # the same file each time
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train the stages, one after the other, and write the curve."""
    options = _options(arguments)
    if options.draw:
        found: dict[str, Any] = json.loads(options.draw.read_text())
        files.write_text(options.draw.with_suffix(".svg"), draw(found))
        return found
    rows: list[measure.Row] = []
    stages: list[dict[str, Any]] = []
    weights, before = list[str](), 0.0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = (options.work or Path(temporary)).resolve()
        raw = raw_tree(options, work)
        for stage in options.stages:
            best, validated, found = run_stage(stage, weights, raw, options, work)
            rows += [{**row, "minutes": round(row["minutes"] + before, 2)} for row in validated]
            before = rows[-1]["minutes"]
            stages.append({"side": stage.side, "minutes": before, **found})
            print(f"  {stages[-1]}", flush=True)
            weights = [f"model.weights={best}"]
    images = options.raw.name if options.raw else f"{options.pairs} generated pairs"
    result = measure.result("minutes", rows, stages=stages, images=images, seed=options.seed)
    measure.publish(result, options.json)
    if options.json:
        files.write_text(options.json.with_suffix(".svg"), draw(result))
    return result


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = recipes.arguments(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stages", type=Stage.of, nargs="+", metavar="SIDE:MINUTES")
    what.add_argument("--draw", type=Path, metavar="JSON", help="only the chart of these results")
    parser.add_argument("--recipe", default="unet_tiny")
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="more keys")
    parser.add_argument(
        "--nproc", type=int, default=cores(), help="ranks, of one thread each (their batch: a key)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of split, weights and order")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
