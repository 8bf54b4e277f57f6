"""The report of a run: right numbers, one file, nothing from outside, readable on a phone."""

from __future__ import annotations

import base64
import errno
import json
import math
import os
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from portrait_dist import config, metrics
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.evaluation import ERROR_GROUPS
from portrait_dist.runs.folder import RunFolder
from portrait_dist.runs.report import collect, page, svg, write_report
from portrait_dist.system import info
from tests.browser import CHROMIUM, Browser
from tests.cli import assert_one_line, call

BOMB = b"a0: &a0 {x: y}\n" + b"".join(
    b"a%d: &a%d {%s}\n" % (n, n, b", ".join(b"k%d: *a%d" % (k, n - 1) for k in range(9)))
    for n in range(1, 9)
)
"""A YAML file whose anchors stand for 9^8 values."""

KEYS = (
    "train.max_epochs=3",
    "train.batch_size=8",
    "train.threads=1",
    "train.log_every_steps=3",
    "train.average_best=false",
    "train.pictures=0",
    "model.init_features=2",
)


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of three epochs over the tiny shards, 7 of them for validation."""
    from portrait_dist.training import main

    root = tmp_path_factory.mktemp("runs")
    overrides = [*KEYS, f"data.shards={tiny_shards}", f"run.root={root}", "run.name=first"]
    main.train(config.load("aisegment_unet", overrides))
    return root / "first"


@pytest.fixture(scope="module")
def html(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report(finished, out, samples=4, device="cpu")
    return out


def run_of_lines(folder: Path, *events: dict[str, Any]) -> Path:
    """A run folder that holds these lines and no checkpoint."""
    folder.mkdir()
    position = {
        "time": 1e9,
        "steps_per_epoch": 10,
        "max_epochs": 5,
        "samples_seen": 0,
        "world_size": 2,
    }
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(position | event) + "\n" for event in events)
    )
    return folder


def test_the_iou_of_the_report_is_that_of_the_best_epoch(finished: Path, tmp_path: Path) -> None:
    result = write_report(finished, tmp_path / "r.html", device="cpu")
    best = max(event.val_iou or 0 for event in RunFolder(finished).events().of_kind("epoch"))
    assert result.samples == 7
    assert result.val_iou == pytest.approx(best, abs=1e-12)
    assert f"{best:.4f}" in (tmp_path / "r.html").read_text()


def test_worst_cases_are_the_lowest_iou_first_and_images_are_their_own(
    finished: Path, tiny_shards: Path
) -> None:
    from portrait_dist.checkpoints import load_model

    model, info = load_model(finished / "ckpt_best.pth")
    assert info.size
    scores = collect.score(model, str(tiny_shards), info.size, images=3, device="cpu")
    assert [sample.scores.iou for sample in scores.worst] == sorted(scores.ious)[:3]
    assert len({sample.key for sample in scores.gallery}) == 3
    assert len(scores.ious) == scores.split_samples == 7
    for sample in [*scores.worst, *scores.gallery]:
        masks = (
            torch.from_numpy(sample.prediction)[None],
            torch.from_numpy(sample.alpha)[None] / 255,
        )
        assert float(metrics.sample_iou(*masks)) == sample.scores.iou
        assert float(abs(sample.alpha / 255 - sample.prediction).mean()) == pytest.approx(
            sample.scores.mae, abs=1e-6
        )


def test_scoring_some_samples_takes_them_from_all_over_the_split(
    finished: Path, tiny_shards: Path
) -> None:
    from portrait_dist.checkpoints import load_model

    model, info = load_model(finished / "ckpt_best.pth")
    assert info.size
    every = collect.score(model, str(tiny_shards), info.size, images=7, device="cpu")
    some = collect.score(model, str(tiny_shards), info.size, images=7, at_most=3, device="cpu")
    assert [sample.key for sample in some.gallery] == [
        every.gallery[position].key for position in (0, 2, 4)
    ]
    assert some.split_samples == 7


class Addresses(HTMLParser):
    """Collects what a page refers to, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "srcset", "action", "data", "poster", "background", "xlink:href")
        self.found += [value or "" for name, value in attrs if name in names]


def test_the_report_says_where_the_wrong_pixels_are(
    finished: Path, html: Path, tiny_shards: Path
) -> None:
    command = ("evaluate", "--checkpoint", finished / "ckpt_best.pth", "--data", tiny_shards)
    errors = call(*command, "--split", "val", "--errors", "--json").json["errors"]
    text = html.read_text()
    assert f"Where the {errors['wrong']:,} wrong pixels are" in text
    for name, words in ERROR_GROUPS.items():
        assert f"<tr><td>{words}</td><td>{errors[name] / errors['wrong']:.0%}</td></tr>" in text


def test_the_file_refers_to_nothing_outside_itself(html: Path) -> None:
    text = html.read_text()
    page = Addresses()
    page.feed(text)
    assert page.tags.count("img") == 2 * 4 * 4
    assert all(address.startswith("data:") for address in page.found)
    assert not {"script", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    assert list(html.parent.iterdir()) == [html]


def test_images_in_the_file_are_whole() -> None:
    import io

    from PIL import Image

    grey = np.random.default_rng(1).integers(0, 256, (400, 300), dtype=np.uint8)
    kind, _, data = page.data_address(grey).partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    assert (kind, image.size) == ("data:image/png;base64", (240, 320))


def test_settings_data_and_versions_stand_in_the_report(html: Path, tiny_shards: Path) -> None:
    text = html.read_text()
    for fact in (
        "model.init_features",
        str(tiny_shards),
        "<td>train</td><td>57</td>",
        "aisegment_unet",
    ):
        assert fact in text
    for package in ("torch", "super-gradients", "numpy"):
        assert f"<td>{package}</td><td>{metadata.version(package)}</td>" in text


def test_the_machine_that_a_run_recorded_stands_in_the_report(tmp_path: Path) -> None:
    folder = run_of_lines(
        tmp_path / "run",
        {"kind": "start", "epoch": 0, "step": 0, "machine": asdict(info.machine())},
    )
    write_report(folder, tmp_path / "r.html")
    assert f"<td>cores</td><td>{info.cores()}</td>" in (tmp_path / "r.html").read_text()
    assert info.cpu_name() in (tmp_path / "r.html").read_text()


def test_the_command_in_the_report_gives_the_configuration_of_the_run(finished: Path) -> None:
    arguments = page.train_arguments(collect.read_run(finished))
    again = config.load(arguments[1], arguments[2:])
    again.run.name = "first"
    assert again.to_yaml() == (finished / "config.yaml").read_text()


def test_a_run_without_checkpoint_or_shards_still_gets_its_curves(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(finished, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"shards: .*", f"shards: {tmp_path}/gone", text))
    events = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(
        re.sub(r'"shards": "[^"]*"', f'"shards": "{tmp_path}/gone"', events)
    )
    result = write_report(folder, samples=2)
    assert (result.samples, result.val_iou) == (0, None)
    page = (folder / "report.html").read_text()
    assert "<polyline" in page
    assert f"{tmp_path}/gone" in page
    (folder / "ckpt_best.pth").unlink()
    (folder / "ckpt_latest.pth").unlink()
    assert "no checkpoint" in write_report(folder).no_pictures


def test_shards_given_and_wrong_are_an_error_and_a_damaged_checkpoint_too(
    finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="nowhere"):
        write_report(finished, tmp_path / "r.html", shards=str(tmp_path / "nowhere"))
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    os.truncate(folder / "ckpt_best.pth", 100)
    with pytest.raises(DamagedDataError, match="ckpt_best"):
        write_report(folder, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_wrong_input_is_one_line_before_anything_is_scored(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_line(call("report", tmp_path / "none"), 2, "there is no such run folder")
    assert_one_line(call("report", tmp_path), 2, "not a run folder")
    for out, message in (
        (tmp_path / "no" / "r.html", "there is no folder"),
        (tmp_path / "file" / "r.html", "there is no folder"),
        (tmp_path, "directory"),
        ("", "is a folder; give the path of a file"),
    ):
        result = call("report", finished, "--out", out)
        assert_one_line(result, 2, message)
        assert "batches" not in result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert not (finished / "report.html").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_of_lines(tmp_path / "run", {"kind": "start", "epoch": 0, "step": 0})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert_one_line(call("report", folder), 1, "report.html: not written, the disk is full")
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_has_only_begun_gets_a_report(tmp_path: Path) -> None:
    folder = run_of_lines(tmp_path / "new", {"kind": "start", "epoch": 0, "step": 0})
    result = call("report", folder)
    assert (result.exit_code, "without images" in result.stdout) == (0, True)
    assert "no numbers yet" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (BOMB, "anchors"),
        (b"a: &a [*a]", "anchors"),
        (b"[" * 5000, "nested too deeply"),
        (b"data: x\ntrain: {batch_size: x}\n", "train.batch_size"),
        ("name: Jürgen".encode("latin-1"), "not UTF-8"),
        (b"train: [1, 2]", "train"),
        (b"run: {name: \x00}", "control character"),
        (b"'", "not YAML"),
        (b"", "config.yaml is empty"),
    ],
)
def test_a_report_is_written_whatever_stands_in_the_configuration(
    tmp_path: Path, content: bytes, shown: str
) -> None:
    folder = run_of_lines(tmp_path / "run", {"kind": "start", "epoch": 0, "step": 0})
    (folder / "config.yaml").write_bytes(content)
    result = call("report", folder)
    assert result.exit_code == 0, result
    assert shown in (folder / "report.html").read_text()


def test_what_differs_is_decided_by_the_recipe_of_the_run(finished: Path) -> None:
    rows = {row.key: row for row in collect.read_run(finished).settings.rows()}
    recipe, defaults = config.load("aisegment_unet"), config.load()
    assert rows["train.batch_size"].changed
    assert rows["train.batch_size"].base == str(recipe.train.batch_size)
    of_the_recipe = [
        key
        for key in rows
        if config.value_of(recipe, key) != config.value_of(defaults, key) and key != "recipe"
    ]
    given = {override.partition("=")[0] for override in KEYS}
    assert set(of_the_recipe) - given
    assert not any(rows[key].changed for key in set(of_the_recipe) - given)


@pytest.mark.parametrize("noted", [True, False])
def test_a_report_finds_its_shards_wherever_it_is_made(
    finished: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    """Training ran in ``there`` with relative paths; old runs did not note where that was."""
    there = tmp_path / "there"
    shutil.copytree(finished, there / "runs" / "first")
    shutil.copytree(tiny_shards, there / "shards")
    config_file, metrics_file = (
        there / "runs" / "first" / name for name in ("config.yaml", "metrics.jsonl")
    )
    text = re.sub(r"shards: .*", "shards: shards", config_file.read_text())
    config_file.write_text(re.sub(r"root: .*", "root: runs", text))
    shards = str(there / "shards") if noted else None
    events = [
        json.dumps(json.loads(line) | ({"shards": shards} if "shards" in line else {}))
        for line in metrics_file.read_text().splitlines()
    ]
    metrics_file.write_text("\n".join(events) + "\n")
    monkeypatch.chdir("/")
    run = collect.read_run(there / "runs" / "first")
    assert collect.find_shards(run) == collect.ShardsLocation(str(there / "shards"))
    if not noted:
        shutil.move(there / "runs" / "first", tmp_path / "first")
        lost = collect.find_shards(collect.read_run(tmp_path / "first"))
        assert "relative to the folder where training ran" in lost.problem


def test_slow_ranks_stand_in_the_report_the_slowest_report_of_each(tmp_path: Path) -> None:
    slow = {"kind": "straggler", "rank": 5, "host": "node<7>"}
    folder = run_of_lines(
        tmp_path / "run",
        {"kind": "start", "epoch": 0, "step": 0},
        slow | {"relative_speed": 0.5, "message": "waits for data"},
        slow | {"relative_speed": 0.6, "message": "computes slowly"},
    )
    write_report(folder, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert 'node&lt;7&gt;</td><td class="n">2</td><td class="n">0.50</td>' in text
    assert "<td>computes slowly</td>" in text


def test_what_a_run_wrote_cannot_become_markup(tmp_path: Path) -> None:
    folder = run_of_lines(
        tmp_path / "<b>run",
        {"kind": "start", "epoch": 0, "step": 0},
        {"kind": "error", "message": "<script>alert(1)</script> & more"},
    )
    write_report(folder, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text
    assert "<b>run" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


def test_what_was_run_twice_after_a_crash_counts_once_and_what_is_not_finite_is_dropped(
    tmp_path: Path,
) -> None:
    folder = run_of_lines(
        tmp_path / "run",
        {"kind": "start", "epoch": 0, "step": 0},
        {
            "kind": "epoch",
            "epoch": 0,
            "step": 10,
            "loss": 0.5,
            "val_loss": math.nan,
            "val_iou": 0.5,
            "lr": 0.1,
        },
        {
            "kind": "epoch",
            "epoch": 1,
            "step": 20,
            "loss": 0.4321,
            "val_loss": 0.4,
            "val_iou": 0.6,
            "lr": 0.1,
        },
        {"kind": "start", "epoch": 1, "step": 10},
        {
            "kind": "epoch",
            "epoch": 1,
            "step": 20,
            "loss": 0.3,
            "val_loss": 0.3,
            "val_iou": 0.7,
            "lr": 0.1,
        },
    )
    progress = page.deduplicated(collect.read_run(folder).events)
    epochs = [event for event in progress if event.kind == "epoch"]
    assert page.points(epochs, "loss") == [(1.0, 0.5), (2.0, 0.3)]
    assert page.points(epochs, "val_loss") == [(2.0, 0.3)]
    write_report(folder, tmp_path / "r.html")
    assert "0.4321" not in (tmp_path / "r.html").read_text()
    assert "was resumed after a stop (1)" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 1.0),
        (0.131, 0.1312),
        (-3e-5, 8e-5),
        (0.0, 0.0),
        (5.0, 5.0),
        (1.0, 3e7),
        (0, 99),
        (0.0, 5e-324),
        (-1e299, 1e299),
    ],
)
def test_ticks_are_round_and_hold_the_values(low: float, high: float) -> None:
    found = svg.ticks(low, high)
    assert 2 <= len(found) <= 12
    assert found[0] <= low
    assert found[-1] >= high
    digits = [re.sub(r"[-.]|e.*", "", f"{tick:.10g}").strip("0") for tick in found]
    assert max(map(len, digits)) <= 5


def test_a_long_curve_is_drawn_with_few_points_and_keeps_its_mean() -> None:
    points = [(float(x), math.sin(x / 500)) for x in range(10_000)]
    thinned = svg.thin(points)
    assert len(thinned) == svg.MOST_POINTS
    assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(
        sum(y for _, y in points) / len(points), abs=1e-3
    )
    assert thinned[0][0] < 50
    assert thinned[-1][0] > 9950


def test_every_value_is_counted_in_the_histogram() -> None:
    values = [0.5, 0.91, 0.92, 0.9, 1.0, 1.0, 0.99]
    counted = re.findall(r": (\d+) samples</title>", svg.histogram("IoU", values))
    assert sum(map(int, counted)) == len(values)
    assert re.findall(r": (\d+) samples</title>", svg.histogram("IoU", [1.0])).count("1") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is only checked as text")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_real_browser_shows_it_without_errors_requests_or_sideways_scrolling(
    browser: Browser, html: Path, width: int, scheme: str
) -> None:
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=width < 600,
    )
    browser.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    browser.call("Page.navigate", url=html.as_uri())
    browser.wait_for("Page.loadEventFired")
    assert (
        browser.evaluate(
            "[...document.images].every(i => i.complete && i.naturalWidth > 0) "
            "&& document.images.length"
        )
        == 32
    )
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(
        "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 250)"
    )
    assert (
        browser.evaluate(
            "Math.min(...[...document.querySelectorAll('svg text')]"
            ".map(t => t.getBoundingClientRect().height))"
        )
        > 10
    )
    ink, paper = (
        browser.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("color", "backgroundColor")
    )
    assert contrast(ink, paper) > 7
    requested = [
        seen["params"]["request"]["url"]
        for seen in browser.events
        if seen["method"] == "Network.requestWillBeSent"
    ]
    assert {url for url in requested if not url.startswith("data:")} == {html.as_uri()}
    reported = [
        seen
        for seen in browser.events
        if seen["method"]
        in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert reported == []


def contrast(one: str, other: str) -> float:
    """WCAG contrast of two CSS colours, ``rgb(r, g, b)``."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
