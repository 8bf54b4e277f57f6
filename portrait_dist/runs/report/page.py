"""The HTML of a run's report. Everything is in the one file: styles, curves (SVG) and pictures (data addresses); no script."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import shlex
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from portrait_dist import config as settings
from portrait_dist import recipes
from portrait_dist.runs.report.collect import Run
from portrait_dist.runs.report.svg import Point, Series, histogram, line_chart
from portrait_dist.visualize import errors

if TYPE_CHECKING:
    from portrait_dist.evaluation import ScoredSample

LARGEST_PICTURE = 320  # pixels; larger ones are reduced
NAMES = {
    "iou": "mean IoU over samples",
    "boundary_iou": "boundary IoU",
    "mae": "mean absolute error of alpha",
    "mse": "mean squared error of alpha",
    "gradient_error": "gradient error",
}
LEGEND = (
    'Differences: <span class="swatch missed"></span> person taken for background, '
    '<span class="swatch wrong"></span> background taken for person.'
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(run: Run) -> str:
    """The whole report of a run."""
    name = run.folder.resolve().name
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    parts = [
        _head(run, name),
        _curves(run),
        _scores(run),
        _happened(run),
        _configuration(run),
        _circumstances(run),
        _again(run),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
        f"<title>{escape(name)} · training report</title><style>{style}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(run: Run, name: str) -> str:
    status, epochs = run.status, _epochs(run.events)
    best = max(
        (e for e in epochs if _real(e.get("val_iou"))), key=lambda e: e["val_iou"], default=None
    )
    seconds = _training_seconds(run.events)
    speeds = [e["images_per_second"] for e in epochs if _real(e.get("images_per_second"))]
    waits = [e["data_wait_share"] for e in epochs if _real(e.get("data_wait_share"))]
    tiles = [
        (
            f"{best['val_iou']:.4f}" if best else "–",
            f"best validation IoU, epoch {best['epoch'] + 1}" if best else "validation IoU",
        ),
        (f"{status['epoch'] or 0} of {status['max_epochs'] or '?'}", "epochs"),
        (f"{status['samples_seen'] or 0:,}", "samples seen"),
        (f"{_median(speeds):.4g}" if speeds else "–", "images per second, median epoch"),
        (f"{_median(waits):.1%}" if waits else "–", "of the time waiting for data, median epoch"),
        (
            _duration(seconds),
            f"on {status['world_size'] or '?'} rank{'' if status['world_size'] == 1 else 's'}",
        ),
    ]
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for value, what in tiles
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    state = {"silent": "silent: no line for a long time", "failed": "failed"}.get(
        status["state"], status["state"]
    )
    bad = ' class="bad"' if status["state"] in ("failed", "silent") else ""
    return (
        f'<h1>{escape(name)}</h1><p class="soft"><span{bad}>{escape(state)}</span> · recipe '
        f'{escape(str(run.config.get("recipe") or "none"))} · report of {made}</p><div class="tiles">{boxes}</div>'
    )


def _curves(run: Run) -> str:
    epochs, events = _epochs(run.events), _progress(run.events)
    if not events:
        return "<h2>Curves</h2><p>The run has written no figures yet.</p>"
    first = min(event["epoch"] for event in run.events if "epoch" in event)
    restarts = [
        _place(event) for event in run.events if event.get("kind") == "start" and event["step"] > 0
    ]
    best = max(_points(epochs, "val_iou"), key=lambda point: point[1], default=None)
    loss = _points(epochs, "loss") if len(epochs) > 1 else _points(events, "loss")
    waits = [(x, 100 * y) for x, y in _points(events, "data_wait_share")]
    memory = [(x, y / 1e9) for x, y in _points(events, "gpu_memory_bytes") if y]
    charts = [
        line_chart(
            "Loss",
            [Series("training", loss), Series("validation", _points(epochs, "val_loss"))],
            lines=restarts,
        ),
        line_chart(
            "IoU",
            [
                Series("training", _points(epochs, "iou")),
                Series("validation", _points(epochs, "val_iou")),
            ],
            marks=[best] if best else [],
            lines=restarts,
        ),
        line_chart(
            "Throughput",
            [Series("images/s", _points(events, "images_per_second"))],
            unit="images/s",
            floor=0,
            lines=restarts,
        ),
        line_chart(
            "Waiting for data",
            [Series("share", waits)],
            unit="% of the time",
            floor=0,
            ceiling=5,
            lines=restarts,
        ),
        line_chart(
            "Learning rate", [Series("rate", _points(events, "lr"))], floor=0, lines=restarts
        ),
        line_chart("GPU memory", [Series("largest", memory)], unit="GB", floor=0, lines=restarts),
    ]
    notes = ["The ring marks the best validation IoU."] if best else []
    if restarts:
        notes.append(f"Dashed lines: the run went on after a stop ({len(restarts)}).")
    if first:
        notes.append(f"The lines begin with epoch {first + 1}.")
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div><p class="soft">{" ".join(notes)}</p>{_epoch_table(epochs)}'


def _epoch_table(epochs: Sequence[dict[str, Any]]) -> str:
    columns = {
        "loss": "loss",
        "val_loss": "validation loss",
        "iou": "IoU",
        "val_iou": "validation IoU",
    }
    columns |= {
        "lr": "learning rate",
        "images_per_second": "images/s",
        "data_wait_share": "waiting for data",
    }
    head = "".join(f"<th>{name}</th>" for name in ("epoch", *columns.values()))
    body = "".join(
        f'<tr><td class="n">{event["epoch"] + 1}</td>'
        + "".join(f'<td class="n">{_figure(event.get(key))}</td>' for key in columns)
        + "</tr>"
        for event in epochs
    )
    table = f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
    return (
        f"<details><summary>All {len(epochs)} epochs as a table</summary>{table}</details>"
        if epochs
        else ""
    )


def _scores(run: Run) -> str:
    scores = run.scores
    if scores is None:
        return f"<h2>Pictures</h2><p>{escape(run.no_scores)}</p>"
    part = (
        ""
        if scores.samples == scores.split_samples
        else f" of {scores.split_samples:,}, spread evenly over the split"
    )
    rows = [
        ("IoU, all pixels pooled", scores.iou),
        *(
            (NAMES.get(name, name), value)
            for name, value in dataclasses.asdict(scores.means).items()
        ),
    ]
    table = _table([(name, _figure(value)) for name, value in rows])
    checkpoint = run.checkpoint.name if run.checkpoint else ""
    lead = f"Scored with <code>{escape(checkpoint)}</code> on {scores.samples:,} validation samples{part}."
    spread = histogram("IoU of each sample", scores.ious, x_label="IoU")
    return (
        f'<h2>Validation</h2><p>{lead}</p><div class="charts">{spread}<div>{table}</div></div>'
        f'<h2>Worst cases</h2><p class="soft">The lowest IoU first. {LEGEND}</p>{_grid(scores.worst)}'
        f'<h2>Gallery</h2><p class="soft">Spread evenly over the split. {LEGEND}</p>{_grid(scores.gallery)}'
    )


def _grid(samples: Iterable[ScoredSample]) -> str:
    return f'<div class="samples">{"".join(_sample(sample) for sample in samples)}</div>'


def _sample(sample: ScoredSample) -> str:
    difference = errors(sample.image, sample.alpha, sample.prediction)
    level = (np.clip(sample.prediction, 0, 1) * 255 + 0.5).astype(np.uint8)
    pictures = {
        "image": sample.image,
        "matte": sample.alpha,
        "prediction": level,
        "difference": difference,
    }
    cells = "".join(
        f'<span><img src="{data_address(picture)}" alt="{name} of {escape(sample.key)}">{name}</span>'
        for name, picture in pictures.items()
    )
    says = f"IoU {sample.scores.iou:.4f}, MAE {sample.scores.mae:.4f}"
    return (
        f'<figure class="sample"><figcaption><b>{escape(sample.key)}</b><span>{says}</span></figcaption>'
        f'<div class="four">{cells}</div></figure>'
    )


def data_address(pixels: np.ndarray) -> str:
    """A picture as a ``data:`` address: JPEG for colour [H, W, 3], PNG for grey [H, W]; uint8, reduced to 320 pixels."""
    picture, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    kind = "png" if pixels.ndim == 2 else "jpeg"
    picture.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _happened(run: Run) -> str:
    told = [event for event in run.events if event.get("kind") in ("start", "stop", "error", "end")]
    if not told:
        return ""
    words = {"start": "started", "stop": "stopped", "error": "failed", "end": "finished"}
    rows = []
    for event in told:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(event["time"]))
        message = str(event.get("message") or "")
        if event["kind"] == "start":
            message = f"at epoch {event['epoch'] + 1}, {event.get('world_size', '?')} rank(s)"
        rows.append((when, words[event["kind"]], message))
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<h2>What happened</h2><div class="wide"><table class="events">{body}</table></div>'


def _configuration(run: Run) -> str:
    values = _flat(run.config)
    if not values:
        return "<h2>Configuration</h2><p>The run's folder has no config.yaml.</p>"
    rows = {key: _setting(key, value) for key, value in values.items()}
    changed = "".join(rows[key] for key, value in values.items() if _differs(key, value))
    return (
        f'<h2>Configuration</h2><p class="soft">What differs from the defaults:</p>{_settings(changed)}'
        f"<details><summary>All {len(values)} keys</summary>{_settings(''.join(rows.values()))}</details>"
    )


def _settings(rows: str) -> str:
    return f'<div class="wide"><table class="settings"><tr><th>key</th><th>value</th><th>default</th></tr>{rows}</table></div>'


def _differs(key: str, value: object) -> bool:
    known = settings.settings().get(key)
    return known is not None and value != known.default and key != "recipe"


def _setting(key: str, value: object) -> str:
    """A row: key with its meaning, value, default where it is another."""
    known, differs = settings.settings().get(key), _differs(key, value)
    about = f"<br><small>{escape(known.help)}</small>" if known else ""
    default = _plain(known.default) if known and differs else ""
    cells = [
        f"<code>{escape(key)}</code>{about}",
        f"<b>{escape(_plain(value))}</b>",
        escape(default),
    ]
    return f"<tr{' class=changed' if differs else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _circumstances(run: Run) -> str:
    machine = dict(run.machine)
    if "memory_bytes" in machine:
        machine["memory"] = f"{machine.pop('memory_bytes') / 1e9:.0f} GB"
    if "gpus" in machine:
        machine["gpus"] = ", ".join(machine["gpus"]) or "none"
    hardware = (
        _table([(name, str(value)) for name, value in machine.items()])
        if machine
        else "<p>The run did not record its machine.</p>"
    )
    versions = (
        _table(list(run.versions.items()))
        if run.versions
        else "<p>The run did not record versions.</p>"
    )
    about = [
        (name, f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in run.shards_about.items()
    ]
    data = _table([("shards", run.shards or "not named"), *about])
    return f"<h2>Data</h2>{data}<h2>Machine of rank 0</h2>{hardware}<h2>Versions</h2>{versions}"


def _again(run: Run) -> str:
    ranks = run.status["world_size"] or 1
    launch = (
        "portrait-dist" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m portrait_dist"
    )
    train = (run.config.get("train") or {}) if isinstance(run.config.get("train"), dict) else {}
    batch = ranks * int(train.get("batch_size") or 0) * int(train.get("accumulate") or 1)
    words = _words(run)
    note = (
        f"The global batch is {batch}: with another number of ranks, set train.batch_size so that ranks × batch_size × "
        "accumulate stays the same, and the batches are the same. On several nodes, spread the ranks over them."
    )
    lines = [
        f"{launch} train {words} run.name=again" if words else "",
        f"portrait-dist evaluate --checkpoint {_quoted(run.checkpoint)} --data {_quoted(run.shards)}"
        if run.checkpoint
        else "",
    ]
    commands = "\n\n".join(line for line in lines if line)
    whole = (
        f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"
        if run.config_text
        else ""
    )
    same = "<p>Or, with the configuration below in a file: <code>portrait-dist train --recipe config.yaml run.name=again</code></p>"
    return f"<h2>Do it again</h2><pre>{escape(commands)}</pre><p>{escape(note)}</p>{same if whole else ''}{whole}"


def _words(run: Run) -> str:
    """``--recipe`` and the ``key=value`` words that differ from it; nothing where the configuration is not known."""
    recipe = str(run.config.get("recipe") or "")
    values = _flat(run.config)
    if not values:
        return ""
    known = recipe in recipes.names()
    base = _flat(dataclasses.asdict(settings.load(recipe if known else None)))
    words = [f"--recipe {recipe}"] if known else [f"--recipe {_quoted(run.folder / 'config.yaml')}"]
    if known:
        skipped = ("recipe", "run.name", "run.resume")
        words += [
            _quoted(f"{k}={_plain(v)}")
            for k, v in values.items()
            if k not in skipped and k in base and base[k] != v
        ]
    return " ".join(words)


def _quoted(word: object) -> str:
    return shlex.quote(str(word))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict → ``section.key`` → value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _progress(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of intervals and epochs in the order of steps; of what was run twice after a crash, the later one."""
    found = {
        (event["step"], event["kind"]): event
        for event in events
        if event.get("kind") in ("interval", "epoch")
    }
    return [found[place] for place in sorted(found)]


def _epochs(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in _progress(events) if event["kind"] == "epoch"]


def _place(event: dict[str, Any]) -> float:
    return float(event["step"]) / max(1, event.get("steps_per_epoch") or 1)


def _points(events: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """(epochs done, value) where the value is a number."""
    return [(_place(event), float(event[key])) for event in events if _real(event.get(key))]


def _real(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _training_seconds(events: Sequence[dict[str, Any]]) -> float:
    """Time from each start to the last line of its turn, added up."""
    total, begin, last = 0.0, None, 0.0
    for event in events:
        if event.get("kind") == "start":
            total += last - begin if begin is not None else 0.0
            begin = float(event["time"])
        last = float(event["time"])
    return total + (last - begin if begin is not None else 0.0)


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _figure(value: object) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.5g}" if math.isfinite(value) else f"{value}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f'<div class="wide"><table>{body}</table></div>'
