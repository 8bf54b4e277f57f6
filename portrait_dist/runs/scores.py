"""Scores that ``submit evaluate`` keeps in a run's folder, and how scores of sets are shown.

Needs neither SLURM nor torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portrait_dist import files

SPLITS = ("train", "val", "test")
MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class Score:
    """Samples and scores of a split or of one set of it, as ``evaluate`` names them."""

    samples: int
    iou: float
    mean_iou: float
    mae: float

    def describe(self) -> str:
        """Return a line for people."""
        return (
            f"{self.samples} samples, IoU {self.iou:.4f}, mean {self.mean_iou:.4f}, "
            f"MAE {self.mae:.5f}"
        )


@dataclass(frozen=True)
class SplitScore(Score):
    """Scores of a split.

    Args:
        sets: of each of several shard sets, by name.
    """

    sets: dict[str, Score] = field(default_factory=dict)


def scores_file(run: Path, split: str) -> Path:
    """Return the file for a run's scores on a split."""
    return run / f"scores-{split}.json"


def read_scores(run: Path) -> dict[str, SplitScore]:
    """Read the scores that are kept in a run's folder, by split; files of others are passed by."""
    found = {}
    for split in SPLITS:
        try:
            content = json.loads(files.read_regular(scores_file(run, split), MOST_BYTES))
            sets = {str(name): Score(**_fields(one)) for name, one in _sets(content).items()}
            found[split] = SplitScore(**_fields(content), sets=sets)
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
    return found


def sets_lines(sets: Mapping[str, Mapping[str, Any]] | None) -> str:
    """Describe each of several shard sets, each on a line that begins with the line's end."""
    return "".join(
        f"\n{name}: {Score(**_fields(one)).describe()}" for name, one in (sets or {}).items()
    )


def _sets(content: Any) -> dict[str, Any]:
    return dict(content["sets"] or {})


def _fields(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`Score`; ValueError where one is no number."""
    numbers = {name: float(one[name]) for name in ("iou", "mean_iou", "mae")}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError("not a number")
    return {"samples": int(one["samples"]), **numbers}
