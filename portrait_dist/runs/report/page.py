"""The HTML of a report. Everything is in the one file: styles, charts (SVG) and images; no script.

``page.html.j2`` holds the markup and escapes whatever it is given; this module prepares what it
shows.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from portrait_dist.runs.folder import Event, Events
from portrait_dist.runs.report.svg import Point, Series, histogram, line_chart
from portrait_dist.runs.status import State
from portrait_dist.visualize import errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from portrait_dist.evaluation import ScoredSample
    from portrait_dist.runs.report.collect import (
        Run,
        ScoredRun,
        Scores,
        SetScores,
        ShardsLocation,
    )
    from portrait_dist.runs.report.settings import Row

LARGEST_IMAGE = 320
"""Pixels; larger images are reduced."""
SCORE_NAMES = {
    "iou": "mean IoU over samples",
    "boundary_iou": "boundary IoU",
    "mae": "mean absolute error of alpha",
    "mse": "mean squared error of alpha",
    "gradient_error": "gradient error",
}
EVENT_NAMES = {"start": "started", "stop": "stopped", "error": "failed", "end": "finished"}
EPOCH_COLUMNS = {
    "loss": "loss",
    "val_loss": "validation loss",
    "iou": "IoU",
    "val_iou": "validation IoU",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "data_wait_share": "waiting for data",
}
UNKNOWN = "–"


@dataclass(frozen=True)
class Line:
    """A line of a chart: a field of the events, times a factor.

    Args:
        name: in the legend.
        field: of :class:`portrait_dist.runs.folder.Event`.
        factor: from the field's unit to the chart's.
        within_epochs: whether the lines within an epoch count too: always, never, or only as long
            as there are fewer than two epochs.
    """

    name: str
    field: str
    factor: float = 1.0
    within_epochs: bool | None = True


@dataclass(frozen=True)
class Chart:
    """A chart as data; see :func:`portrait_dist.runs.report.svg.line_chart`."""

    title: str
    lines: tuple[Line, ...]
    unit: str = ""
    floor: float | None = 0.0
    ceiling: float | None = None
    marks_best: bool = False


CHARTS = (
    Chart(
        "Loss",
        (Line("training", "loss", within_epochs=None), Line("validation", "val_loss")),
        floor=None,
    ),
    Chart(
        "IoU",
        (Line("training", "iou", within_epochs=False), Line("validation", "val_iou")),
        floor=None,
        marks_best=True,
    ),
    Chart("Throughput", (Line("images/s", "images_per_second"),), unit="images/s"),
    Chart(
        "Waiting for data",
        (Line("fraction", "data_wait_share", factor=100),),
        unit="% of the time",
        ceiling=5.0,
    ),
    Chart("Learning rate", (Line("rate", "lr"),)),
    Chart("GPU memory", (Line("largest", "gpu_memory_bytes", factor=1e-9),), unit="GB"),
)


def render(run: Run, location: ShardsLocation, scored: ScoredRun | None, no_scores: str) -> str:
    """Return the whole report.

    Args:
        run: what the folder says.
        location: where the shards are.
        scored: scores of the checkpoint, or None.
        no_scores: why there are none.
    """
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "data_address": data_address}
    style = Markup((here / "report.css").read_text(encoding="utf-8"))
    shown = contents(run, location, scored)
    template = environment.get_template("page.html.j2")
    return template.render(style=style, no_scores=no_scores, **vars(shown)).lstrip()


@dataclass(frozen=True)
class Contents:
    """What the template shows, by the names that it uses."""

    name: str
    made: str
    run: Run
    bad: bool
    tiles: list[Tile]
    charts: list[Markup]
    notes: list[str]
    columns: Mapping[str, str]
    epochs: list[Event]
    scores: Scores | None
    score_rows: list[tuple[str, float]]
    score_rows_of: Callable[[SetScores], list[tuple[str, float]]]
    error_rows: list[tuple[str, str]]
    spread: Markup
    images: Callable[[ScoredSample], dict[str, NDArray[np.uint8]]]
    happened: list[tuple[str, str, str]]
    slow_ranks: list[SlowRank]
    rows: list[Row]
    data: Mapping[str, str]
    machine: Mapping[str, str]
    commands: list[str]
    batch: int | None


def contents(run: Run, location: ShardsLocation, scored: ScoredRun | None) -> Contents:
    """Collect what the template shows."""
    progress = deduplicated(run.events)
    epochs = [event for event in progress if event.kind == "epoch"]
    return Contents(
        name=run.folder.path.resolve().name,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        run=run,
        bad=run.status.state in (State.FAILED, State.SILENT),
        tiles=tiles(run, epochs),
        charts=[Markup(chart) for chart in charts(progress, run.events)],
        notes=notes(progress, run.events),
        columns=EPOCH_COLUMNS,
        epochs=epochs,
        scores=scored.scores if scored else None,
        score_rows=score_rows(scored.scores) if scored else [],
        score_rows_of=score_rows,
        error_rows=error_rows(scored.scores) if scored else [],
        spread=Markup(spread(scored.scores) if scored else ""),
        images=images,
        happened=happened(run.events),
        slow_ranks=slow_ranks(run.events),
        rows=run.settings.rows() if run.settings.values else [],
        data={"shards": location.shown or "not named", **(scored.shards if scored else {})},
        machine=machine(run.machine),
        commands=commands(run, location),
        batch=global_batch(run),
    )


def deduplicated(events: Events) -> list[Event]:
    """Return the lines of intervals and epochs by batch; of what was run twice, the later one."""
    found = {
        (event.batches_done or 0, event.kind): event
        for event in events.of_kind("interval", "epoch")
    }
    return [found[at] for at in sorted(found)]


def position(event: Event) -> float:
    """Return how many epochs are done, with the fraction of the running one."""
    return (event.batches_done or 0) / max(1, event.batches_in_epoch or 1)


def points(events: Iterable[Event], field: str, factor: float = 1.0) -> list[Point]:
    """Return (epochs done, value) of the lines that have the value."""
    return [
        (position(event), getattr(event, field) * factor)
        for event in events
        if getattr(event, field) is not None
    ]


def best_epoch(events: Sequence[Event]) -> Event | None:
    """Return the epoch with the best validation IoU."""
    scored = [event for event in events if event.kind == "epoch" and event.val_iou is not None]
    return max(scored, key=lambda event: event.val_iou or 0.0, default=None)


def restarts(events: Events) -> list[float]:
    """Return where the run was resumed after a stop."""
    return [position(event) for event in events.of_kind("start") if event.batches_done]


@dataclass(frozen=True)
class Tile:
    """A large value with its label."""

    value: str
    label: str


def tiles(run: Run, epochs: Sequence[Event]) -> list[Tile]:
    """Return the numbers at the top of the page."""
    status, best = run.status, best_epoch(epochs)
    speed = median([event.images_per_second for event in epochs])
    wait = median([event.data_wait_share for event in epochs])
    ranks = "rank" if status.world_size == 1 else "ranks"
    return [
        Tile(
            UNKNOWN if best is None else f"{best.val_iou:.4f}",
            "validation IoU"
            if best is None
            else f"best validation IoU, epoch {(best.epoch or 0) + 1}",
        ),
        Tile(f"{status.epoch or 0} of {status.max_epochs or '?'}", "epochs"),
        Tile(f"{status.samples_seen or 0:,}", "samples seen"),
        Tile(UNKNOWN if speed is None else f"{speed:.4g}", "images per second, median epoch"),
        Tile(
            UNKNOWN if wait is None else f"{wait:.1%}",
            "of the time waiting for data, median epoch",
        ),
        Tile(
            short_duration(training_seconds(run.events)),
            f"on {status.world_size or '?'} {ranks}",
        ),
    ]


def charts(progress: Sequence[Event], events: Events) -> list[str]:
    """Draw the charts that have points."""
    epochs = [event for event in progress if event.kind == "epoch"]
    best = best_epoch(epochs)
    drawn = []
    for chart in CHARTS:
        series = []
        for line in chart.lines:
            within = len(epochs) < 2 if line.within_epochs is None else line.within_epochs
            found = points(progress if within else epochs, line.field, line.factor)
            if line.field == "gpu_memory_bytes":  # 0 on CPUs
                found = [point for point in found if point[1] > 0]
            series.append(Series(line.name, found))
        marks = points([best], "val_iou") if best and chart.marks_best else []
        drawn_chart = line_chart(
            chart.title,
            series,
            unit=chart.unit,
            floor=chart.floor,
            ceiling=chart.ceiling,
            marks=marks,
            restarts=restarts(events),
        )
        if drawn_chart:
            drawn.append(drawn_chart)
    return drawn


def notes(progress: Sequence[Event], events: Events) -> list[str]:
    """Return what explains the charts."""
    found = ["The ring marks the best validation IoU."] if best_epoch(progress) else []
    if count := len(restarts(events)):
        found.append(f"Dashed lines: the run was resumed after a stop ({count}).")
    first = min((event.epoch for event in events if event.epoch is not None), default=0)
    if first:
        found.append(f"The lines begin with epoch {first + 1}.")
    if events.skipped:
        found.append(f"{events.skipped} line(s) of metrics.jsonl could not be read.")
    return found


def score_rows(scores: Scores | SetScores) -> list[tuple[str, float]]:
    """Return names and values of the table of scores."""
    means = dataclasses.asdict(scores.means)
    rows = [(SCORE_NAMES.get(name, name), value) for name, value in means.items()]
    return [("IoU, all pixels pooled", scores.iou), *rows]


def error_rows(scores: Scores) -> list[tuple[str, str]]:
    """Return where the wrong pixels are, as fractions of all wrong pixels."""
    from portrait_dist.evaluation import ERROR_GROUPS

    wrong = scores.errors.wrong or 1
    return [
        (text, f"{getattr(scores.errors, name) / wrong:.0%}") for name, text in ERROR_GROUPS.items()
    ]


def spread(scores: Scores) -> str:
    """Draw how the samples' IoU is spread."""
    return histogram("IoU of each sample", scores.ious, x_label="IoU")


def images(sample: ScoredSample) -> dict[str, NDArray[np.uint8]]:
    """Return the images of a sample by name: uint8 [H, W, 3] or [H, W]."""
    level = (np.clip(sample.prediction, 0, 1) * 255 + 0.5).astype(np.uint8)
    return {
        "image": sample.image,
        "matte": sample.alpha,
        "prediction": level,
        "difference": errors(sample.image, sample.alpha, sample.prediction),
    }


def data_address(pixels: NDArray[np.uint8]) -> str:
    """Encode an image as a ``data:`` address, reduced to 320 pixels.

    Args:
        pixels: uint8; [H, W, 3] becomes a JPEG, [H, W] a PNG.
    """
    image, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    image.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
    if pixels.ndim == 2:
        image.save(buffer, "png", optimize=True)
    else:
        image.save(buffer, "jpeg", quality=88)
    kind = "png" if pixels.ndim == 2 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def happened(events: Events) -> list[tuple[str, str, str]]:
    """Return time, name and message of each start, stop, error and end."""
    rows = []
    for event in events.of_kind(*EVENT_NAMES):
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(event.time))
        message = event.message or ""
        if event.kind == "start":
            message = f"at epoch {(event.epoch or 0) + 1}, {event.world_size or '?'} rank(s)"
        rows.append((when, EVENT_NAMES[event.kind], message))
    return rows


@dataclass(frozen=True)
class SlowRank:
    """A rank that was reported as slow: how often, its lowest speed, and the last report."""

    rank: int
    host: str
    reports: int
    relative_speed: float
    message: str


def slow_ranks(events: Events) -> list[SlowRank]:
    """Return the ranks that were reported as slow, the most often reported one first."""
    reports: dict[tuple[int, str], list[Event]] = {}
    for event in events.of_kind("straggler"):
        if event.rank is not None and event.relative_speed is not None:
            reports.setdefault((event.rank, event.host or ""), []).append(event)
    found = [
        SlowRank(
            rank,
            host,
            len(lines),
            min(line.relative_speed or 0.0 for line in lines),
            lines[-1].message or "",
        )
        for (rank, host), lines in reports.items()
    ]
    return sorted(found, key=lambda one: -one.reports)


def machine(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the machine's facts as text, memory in GB."""
    rows = {}
    for name, value in found.items():
        if name == "memory_bytes" and isinstance(value, int | float):
            rows["memory"] = f"{value / 1e9:.0f} GB"
        elif name == "gpus" and isinstance(value, list):
            rows["gpus"] = ", ".join(map(str, value)) or "none"
        else:
            rows[name] = str(value)
    return rows


def commands(run: Run, location: ShardsLocation) -> list[str]:
    """Return the commands that train and score the same again."""
    ranks = run.status.world_size or 1
    launch = f"portrait-dist train --nproc {ranks}" if ranks > 1 else "portrait-dist train"
    lines = []
    if run.settings.values:
        arguments = shlex.join(train_arguments(run))
        lines.append(f"{launch} {arguments} run.name=again")
    if run.checkpoint:
        checkpoint, shards = shlex.quote(str(run.checkpoint)), shlex.quote(location.shown)
        lines.append(f"portrait-dist evaluate --checkpoint {checkpoint} --data {shards}")
    return lines


def train_arguments(run: Run) -> list[str]:
    """Return ``--recipe`` and the overrides that make the run's settings."""
    if not run.settings.recipe:
        return ["--recipe", str(run.settings.path)]
    return ["--recipe", run.settings.recipe, *run.settings.overrides()]


def global_batch(run: Run) -> int | None:
    """Return the samples of an optimiser step; None where the settings do not say."""
    batch, accumulate = (
        run.settings.number(key) for key in ("train.batch_size", "train.accumulate")
    )
    return batch and accumulate and (run.status.world_size or 1) * batch * accumulate


def training_seconds(events: Events) -> float:
    """Return the time from each start to the last line of its attempt, added up."""
    total, begin, last = 0.0, None, 0.0
    for event in events:
        if event.kind == "start":
            total += 0.0 if begin is None else last - begin
            begin = event.time
        last = event.time
    return total + (0.0 if begin is None else last - begin)


def short_duration(seconds: float) -> str:
    """Write a duration in one or two units."""
    if seconds < 600:
        return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def median(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that are known, None without one."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def number(value: float | None) -> str:
    """Write a value with five digits, a dash for None."""
    return UNKNOWN if value is None else f"{value:.5g}"
