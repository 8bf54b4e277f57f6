"""``evaluate``."""

from __future__ import annotations

from typing import Any

import click

from portrait_dist.commands import command


def _evaluate_summary(result: dict[str, Any]) -> str:
    return (
        f"{result['split']}: {result['samples']} samples\n"
        f"IoU {result['iou']:.4f} (all pixels), {result['mean_iou']:.4f} (mean over images)\n"
        f"precision {result['precision']:.4f}, recall {result['recall']:.4f}; IoU is largest above {result['best_threshold']:g}\n"
        f"boundary IoU {result['boundary_iou']:.4f}, gradient error {result['gradient_error']:.3f}\n"
        f"MAE {result['mae']:.5f}, MSE {result['mse']:.5f}, loss {result['loss']:.4f}"
    )


@command(
    "evaluate",
    summary=_evaluate_summary,
    epilog="\b\nExample:\n  portrait-dist evaluate --checkpoint runs/first/ckpt_best.pth --data shards --split test\n",
)
@click.option("--checkpoint", required=True, help="A .pth file of a run.")
@click.option("--data", "shards", required=True, help="Folder or address of the shards.")
@click.option(
    "--split", default="test", show_default=True, type=click.Choice(["train", "val", "test"])
)
@click.option(
    "--batch-size",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Samples per rank and step.",
)
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(0), help="Decoding threads."
)
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"])
)
@click.option(
    "--per-sample",
    "table",
    type=click.Path(dir_okay=False),
    help="CSV file for every sample's figures.",
)
@click.option(
    "--curve",
    type=click.Path(dir_okay=False),
    help="CSV file for precision, recall and IoU over thresholds.",
)
@click.option(
    "--pictures",
    type=click.Path(file_okay=False),
    help="Folder for pictures of the worst and the median samples.",
)
def evaluate(**options: Any) -> dict[str, Any] | None:
    """Score a checkpoint on a split, alone or under torchrun; every sample counts exactly once."""
    from portrait_dist import distributed, evaluation

    try:
        return evaluation.evaluate(
            options.pop("checkpoint"), options.pop("shards"), options.pop("split"), **options
        )
    finally:
        distributed.stop()
