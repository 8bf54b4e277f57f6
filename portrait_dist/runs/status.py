"""How far a run is, from its folder alone: ``metrics.jsonl`` and the checkpoints. Needs neither SLURM nor torch."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portrait_dist.errors import InputError

METRICS = "metrics.jsonl"
SILENT_SECONDS = (
    900.0  # longer without a line than this, and than ten usual gaps: nobody seems to be training
)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of the run's ``metrics.jsonl``, oldest first; a last line cut short by a crash is left out."""
    try:
        lines = (run_dir / METRICS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def checkpoint_time(run_dir: Path) -> float | None:
    """When the newest checkpoint was written, in seconds since 1970; None without one."""
    times = [path.stat().st_mtime for path in run_dir.glob("ckpt_*.pth")]
    return max(times, default=None)


def run_status(run_dir: Path, now: float | None = None) -> dict[str, Any]:
    """Where a run stands.

    Args:
        run_dir: the run's folder.
        now: seconds since 1970; the clock's when None.

    Returns:
        ``run_dir``; ``state`` (running, silent, stopped, failed, finished, empty); ``epoch`` (complete ones), ``max_epochs``,
        ``step`` (optimiser steps), ``total_steps``, ``samples_seen``; ``iou`` and ``best_iou`` (validation), ``loss``;
        ``images_per_second``, ``seconds_left``, ``checkpoint_age_seconds``, ``seconds_since_last_line``; ``last_error``,
        ``last_error_age_seconds``, ``world_size``. What is not known is None.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    now = time.time() if now is None else now
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: there is no such run folder; give <run.root>/<run.name>")
    events, newest = read_events(run_dir), checkpoint_time(run_dir)
    if not events and newest is None and not (run_dir / "config.yaml").exists():
        raise InputError(
            f"{run_dir}: no metrics.jsonl, no checkpoint: not a run folder; give <run.root>/<run.name>"
        )
    state = _state(events, now)
    step, total = _latest(events, "step"), _total_steps(events)
    scores = [float(event["val_iou"]) for event in events if event.get("val_iou") is not None]
    error = next((event for event in reversed(events) if event.get("kind") == "error"), None)
    return {
        "run_dir": str(run_dir),
        "state": state,
        "epoch": _epochs_done(events),
        "max_epochs": _latest(events, "max_epochs"),
        "step": step,
        "total_steps": total,
        "samples_seen": _latest(events, "samples_seen"),
        "iou": scores[-1] if scores else None,
        "best_iou": max(scores, default=None),
        "loss": _latest(events, "loss"),
        "images_per_second": _latest(events, "images_per_second"),
        "seconds_left": 0.0 if state == "finished" else _seconds_left(events),
        "checkpoint_age_seconds": None if newest is None else round(now - newest, 1),
        "seconds_since_last_line": round(now - events[-1]["time"], 1) if events else None,
        "last_error": error.get("message") if error else None,
        "last_error_age_seconds": round(now - error["time"], 1) if error else None,
        "world_size": _latest(events, "world_size"),
    }


def _latest(events: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((event[key] for event in reversed(events) if event.get(key) is not None), None)


def _total_steps(events: Sequence[Mapping[str, Any]]) -> int | None:
    epochs, steps = _latest(events, "max_epochs"), _latest(events, "steps_per_epoch")
    return None if epochs is None or steps is None else int(epochs) * int(steps)


def _epochs_done(events: Sequence[Mapping[str, Any]]) -> int | None:
    """Complete epochs: one more than the last whose line is there, or where the run started from."""
    for event in reversed(events):
        if event.get("kind") == "epoch":
            return int(event["epoch"]) + 1
        if event.get("kind") == "start":
            return int(event["epoch"])
    return None


def _state(events: Sequence[Mapping[str, Any]], now: float) -> str:
    if not events:
        return "empty"
    kind = events[-1].get("kind")
    epochs, total = _epochs_done(events), _latest(events, "max_epochs")
    if kind == "end" or (
        kind == "epoch" and epochs is not None and total is not None and epochs >= total
    ):
        return "finished"
    if kind in ("stop", "error"):
        return "stopped" if kind == "stop" else "failed"
    times = [float(event["time"]) for event in _this_turn(events)]
    gaps = sorted(after - before for before, after in itertools.pairwise(times))
    usual = gaps[len(gaps) // 2] if gaps else 0.0
    return "silent" if now - times[-1] > max(SILENT_SECONDS, 10 * usual) else "running"


def _this_turn(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines since the run was last started."""
    starts = [index for index, event in enumerate(events) if event.get("kind") == "start"]
    return list(events[starts[-1] if starts else 0 :])


def _seconds_left(events: Sequence[Mapping[str, Any]]) -> float | None:
    """Steps that are left at the pace of this turn's last epoch's worth of lines, validation and saving included."""
    total, steps_per_epoch = _total_steps(events), _latest(events, "steps_per_epoch")
    marks = [
        (float(event["time"]), int(event["step"]))
        for event in _this_turn(events)
        if event.get("step") is not None
    ]
    if total is None or len(marks) < 2:
        return None
    end, step = marks[-1]
    window = [mark for mark in marks[:-1] if mark[1] <= step - int(steps_per_epoch)]
    begin, before = window[-1] if window else marks[0]
    return (
        None if step <= before else round(max(0, total - step) * (end - begin) / (step - before), 1)
    )


def table(result: Mapping[str, Any]) -> str:
    """The lines a person reads."""
    rows = {
        "state": f"{result['state']}, last line {_duration(result['seconds_since_last_line'])} ago",
        "epoch": f"{_known(result['epoch'])} of {_known(result['max_epochs'])}",
        "step": f"{_known(result['step'])} of {_known(result['total_steps'])}",
        "validation IoU": f"{_number(result['iou'])} (best {_number(result['best_iou'])})",
        "speed": f"{_number(result['images_per_second'], 1)} images/s on {_known(result['world_size'])} rank(s)",
        "time left": _duration(result["seconds_left"]),
        "last checkpoint": f"{_duration(result['checkpoint_age_seconds'])} ago",
    }
    if result["last_error"]:
        rows["last error"] = (
            f"{_duration(result['last_error_age_seconds'])} ago: {result['last_error']}"
        )
    return "\n".join(
        [str(result["run_dir"]), *(f"  {name:16s} {text}" for name, text in rows.items())]
    )


def _known(value: Any) -> str:
    return "?" if value is None else f"{value}"


def _number(value: float | None, digits: int = 4) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )
