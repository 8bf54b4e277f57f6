"""``evaluate``: score a checkpoint on a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from portrait_dist.commands import command, to_json
from portrait_dist.commands import options as shared
from portrait_dist.runs.scores import sets_lines

if TYPE_CHECKING:
    from portrait_dist.evaluation import (
        EvaluateResult,
        Evaluation,
        SampleRow,
        ScoringOptions,
    )

Cell = str | int | float
"""What a column of a CSV file holds."""

EXAMPLES = """\b
Examples:
  portrait-dist evaluate --checkpoint runs/first/ckpt_best.pth --data shards --split test
  portrait-dist evaluate --checkpoint runs/first/ckpt_best.pth --data shards \\
    --per-sample scores.csv --pictures worst
  torchrun --nproc-per-node 2 -m portrait_dist evaluate \\
    --checkpoint runs/first/ckpt_best.pth --data shards
"""


def _summary(result: EvaluateResult) -> str:
    return (
        f"{result.split}: {result.samples} samples\n"
        f"IoU {result.iou:.4f} (all pixels), {result.mean_iou:.4f} (mean over images)\n"
        f"precision {result.precision:.4f}, recall {result.recall:.4f}; "
        f"IoU is largest above {result.best_threshold:g}\n"
        f"boundary IoU {result.boundary_iou:.4f}, gradient error {result.gradient_error:.3f}\n"
        f"MAE {result.mae:.5f}, MSE {result.mse:.5f}, loss {result.loss:.4f}"
        f"{_errors_line(result.errors)}{sets_lines(result.sets)}"
    )


def _errors_line(errors: dict[str, int] | None) -> str:
    """Describe the error groups, where they were asked for."""
    if not errors:
        return ""
    from portrait_dist import evaluation

    wrong = errors["wrong"] or 1
    parts = ", ".join(
        f"{errors[name] / wrong:.0%} {text}" for name, text in evaluation.ERROR_GROUPS.items()
    )
    return f"\n{errors['wrong']} wrong pixels: {parts}"


@command("evaluate", summary=_summary, epilog=EXAMPLES)
@shared.checkpoint
@click.option(
    "--data", "shards", required=True, help="Folder or address of the shards, or several: a,b."
)
@click.option(
    "--split", default="test", show_default=True, type=click.Choice(["train", "val", "test"])
)
@shared.batch_size(16, "Samples per rank and batch.")
@click.option(
    "--workers",
    default=0,
    show_default=True,
    type=click.IntRange(-1),
    help="Decoding threads; 0 chooses by cores and ranks, -1 decodes without threads.",
)
@shared.device
@shared.trained_size
@click.option(
    "--per-sample",
    "table",
    type=click.Path(path_type=Path),
    help="CSV file for every sample's scores.",
)
@click.option(
    "--curve",
    type=click.Path(path_type=Path),
    help="CSV file for precision, recall and IoU over thresholds.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="JSON file for the result, which --json prints.",
)
@click.option(
    "--errors",
    is_flag=True,
    help="Count the wrong pixels by where they are: at the edge, person missed, background "
    "attached to the person, islands (which predict --largest drops).",
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="Folder for pictures of the worst and the median samples, and with --errors of those with "
    "the most wrong pixels of each group.",
)
@shared.trust_code
def evaluate(
    checkpoint: str,
    shards: str,
    split: str,
    table: Path | None,
    curve: Path | None,
    out: Path | None,
    errors: bool,
    pictures: Path | None,
    **options: Unpack[ScoringOptions],
) -> EvaluateResult | None:
    """Score a checkpoint on a split, alone or under torchrun; every sample counts exactly once."""
    from portrait_dist import distributed, evaluation, files

    try:
        distributed.start(distributed.pick_device(options["device"]))
        distributed.on_every_rank(lambda: _check_outputs((table, curve, out), pictures))
        found = evaluation.evaluate(checkpoint, shards, split, group_errors=errors, **options)
    finally:
        distributed.stop()
    if found is None:
        return None
    _write_tables(found, table, curve)
    drawn = None
    if pictures:
        drawn = evaluation.write_examples(
            found,
            checkpoint,
            shards,
            pictures,
            device=options["device"],
            size=options["size"],
            trust_code=options["trust_code"],
        )
    result = evaluation.EvaluateResult.of(found, drawn)
    if out:
        files.write_text(out, to_json(result) + "\n", durable=True)
    return result


def _check_outputs(paths: Iterable[Path | None], pictures: Path | None) -> None:
    """Refuse before the long work what could not be written after it."""
    from portrait_dist import distributed, files

    if distributed.rank() != 0:
        return
    for path in paths:
        if path:
            files.check_writable(path)
    if pictures:
        files.check_folder_writable(pictures)


def _write_tables(found: Evaluation, table: Path | None, curve: Path | None) -> None:
    """Write the CSV files."""
    if table:
        _write_csv(table, map(_columns, found.rows))
    if curve:
        _write_csv(curve, map(dataclasses.asdict, found.curve))


def _columns(row: SampleRow) -> dict[str, Cell]:
    errors = {
        f"{name}_errors": count
        for name, count in (dataclasses.asdict(row.errors) if row.errors else {}).items()
        if name != "pieces"
    }
    return {"key": row.key, **dataclasses.asdict(row.scores), **errors}


def _write_csv(path: Path, rows: Iterable[dict[str, Cell]]) -> None:
    """Write a table, numbers with six significant digits: more are noise of float32."""
    import csv
    import io

    from portrait_dist import files

    text = io.StringIO()
    lines = [
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]) if lines else ["key"])
    writer.writeheader()
    writer.writerows(lines)
    files.write_text(path, text.getvalue(), durable=True)
