"""``portrait-dist report``: one HTML file about a run, to keep, mail or open without a network.

    portrait-dist report runs/first --out first.html

The curves come from ``metrics.jsonl``, the settings from ``config.yaml``, versions from the
checkpoint. Every validation sample is scored anew with the best checkpoint, which gives the
gallery, the worst cases and the spread of IoU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portrait_dist import files
from portrait_dist.errors import InputError
from portrait_dist.runs.scores import Score

if TYPE_CHECKING:
    from portrait_dist.runs.report.collect import Run, ScoredRun, ShardsLocation


@dataclass(frozen=True)
class Report:
    """A written report.

    Args:
        file: the HTML file.
        samples: how many validation samples were scored.
        val_iou: their IoU with all pixels pooled; None when nothing was scored.
        no_pictures: why nothing was scored, or an empty string.
        no_settings: why the settings are missing, or an empty string.
        sets: scores of each of several shard sets, by name; None for a single one.
    """

    file: str
    samples: int
    val_iou: float | None
    no_pictures: str
    no_settings: str
    sets: dict[str, dict[str, Any]] | None = None


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    shards: str | None = None,
    samples: int = 8,
    at_most: int = 0,
    device: str = "auto",
    trust_code: bool = False,
) -> Report:
    """Write the report of a run, whole or not at all.

    Args:
        folder: the run's folder.
        out: the HTML file; ``report.html`` in the run's folder by default.
        shards: folder or address of the shards; those that the run was trained on by default.
        samples: images in the gallery, and as many worst cases; 0 scores nothing.
        at_most: validation samples to score, spread evenly over the split; 0 means all.
        device: ``auto``, ``cpu`` or ``cuda``.
        trust_code: import the network's code where it is the user's.

    Raises:
        InputError: no run there; ``shards`` was given and is none; ``out`` cannot be written.
        DamagedDataError: a damaged sample or checkpoint.
    """
    from portrait_dist.runs.report import collect, page

    run = collect.read_run(folder)
    out = out or run.folder.report
    files.check_writable(out)  # before the scoring, which takes minutes
    location = collect.find_shards(run, shards)
    scored, reason = _score(
        run, location, samples, at_most, device, trust_code=trust_code, must=bool(shards)
    )
    files.write_text(out, page.render(run, location, scored, reason), durable=True)
    count, iou = (scored.scores.samples, scored.scores.iou) if scored else (0, None)
    return Report(
        str(out),
        count,
        iou,
        no_pictures=reason,
        no_settings=run.settings.problem,
        sets=_sets_of(scored),
    )


def _sets_of(scored: ScoredRun | None) -> dict[str, dict[str, Any]] | None:
    """Return the scores of each shard set under the names that ``evaluate`` gives them."""
    if not scored or not scored.scores.sets:
        return None
    return {
        name: asdict(Score(one.samples, one.iou, one.means.iou, one.means.mae))
        for name, one in scored.scores.sets.items()
    }


def _score(
    run: Run,
    location: ShardsLocation,
    samples: int,
    at_most: int,
    device: str,
    *,
    trust_code: bool,
    must: bool,
) -> tuple[ScoredRun | None, str]:
    """Score the run, or say why that cannot be; for shards that must be read, raise instead."""
    from portrait_dist.runs.report import collect

    if reason := _why_not(run, location, samples):
        return None, reason
    try:
        found = collect.score_run(
            run, location.path, samples, at_most, device, trust_code=trust_code
        )
        return found, ""
    except InputError as error:
        # Shards that moved since training: a report without images is better than none.
        if must:
            raise
        return None, str(error)


def _why_not(run: Run, location: ShardsLocation, samples: int) -> str:
    """Say why no image can be scored; empty where they can."""
    if samples == 0:
        return "No images were asked for (--samples 0)."
    if run.checkpoint is None:
        return "The run has no checkpoint yet."
    return location.problem
