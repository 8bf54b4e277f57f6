"""The report of a run: right figures, one file, nothing from outside, readable on a phone."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from portrait_dist import cli, config, metrics
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.runs.report import collect, page, svg
from portrait_dist.system import info

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
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
    words = [*KEYS, f"data.shards={tiny_shards}", f"run.root={root}", "run.name=first"]
    main.train(config.load("aisegment_unet", words))
    return root / "first"


@pytest.fixture(scope="module")
def html(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    collect.write_report(finished, out, samples=4, device="cpu")
    return out


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["kind"] == kind]


def run_of_lines(folder: Path, *events: dict[str, Any]) -> Path:
    """A run folder that holds these lines and no checkpoint."""
    folder.mkdir()
    place = {
        "time": 1e9,
        "steps_per_epoch": 10,
        "max_epochs": 5,
        "samples_seen": 0,
        "world_size": 2,
    }
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(place | event) + "\n" for event in events)
    )
    return folder


def invoke(*words: str) -> tuple[int, str]:
    """Exit code and output of the command line, in this process."""
    runner = CliRunner()
    result = runner.invoke(cli.portrait_dist, list(words), standalone_mode=False)
    return getattr(
        result.exception, "exit_code", 0 if result.exception is None else 1
    ), result.output


def test_the_figure_of_the_report_is_that_of_the_best_epoch(finished: Path, tmp_path: Path) -> None:
    result = collect.write_report(finished, tmp_path / "r.html", device="cpu")
    best = max(event["val_iou"] for event in lines(finished, "epoch"))
    assert result["samples"] == 7
    assert result["val_iou"] == pytest.approx(best, abs=1e-12)
    assert f"{best:.4f}" in (tmp_path / "r.html").read_text()


def test_worst_cases_are_the_lowest_iou_first_and_pictures_are_their_own(
    finished: Path, tiny_shards: Path
) -> None:
    from portrait_dist.checkpoints import load_model

    model, info = load_model(finished / "ckpt_best.pth")
    scores = collect.score(model, str(tiny_shards), info.size, pictures=3, device="cpu")
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
    every = collect.score(model, str(tiny_shards), info.size, pictures=7, device="cpu")
    some = collect.score(model, str(tiny_shards), info.size, pictures=7, at_most=3, device="cpu")
    assert [sample.key for sample in some.gallery] == [
        every.gallery[place].key for place in (0, 2, 4)
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


def test_the_file_refers_to_nothing_outside_itself(html: Path) -> None:
    text = html.read_text()
    page = Addresses()
    page.feed(text)
    assert page.tags.count("img") == 2 * 4 * 4
    assert all(address.startswith("data:") for address in page.found)
    assert not {"script", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    assert list(html.parent.iterdir()) == [html]


def test_pictures_in_the_file_are_whole() -> None:
    import io

    from PIL import Image

    grey = np.random.default_rng(1).integers(0, 256, (400, 300), dtype=np.uint8)
    kind, _, data = page.data_address(grey).partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    picture.load()
    assert (kind, picture.size) == ("data:image/png;base64", (240, 320))


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
        tmp_path / "run", {"kind": "start", "epoch": 0, "step": 0, "machine": info.machine()}
    )
    collect.write_report(folder, tmp_path / "r.html")
    assert f"<td>cores</td><td>{info.cores()}</td>" in (tmp_path / "r.html").read_text()
    assert info.cpu_name() in (tmp_path / "r.html").read_text()


def test_the_command_in_the_report_gives_the_configuration_of_the_run(finished: Path) -> None:
    words = shlex.split(page._words(collect.read_run(finished)))
    again = config.load(words[1], words[2:])
    again.run.name = "first"
    assert again.to_yaml() == (finished / "config.yaml").read_text()


def test_a_run_without_checkpoint_or_shards_still_gets_its_curves(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(finished, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"shards: .*", f"shards: {tmp_path}/gone", text))
    result = collect.write_report(folder, samples=2)
    assert (result["samples"], result["val_iou"]) == (0, None)
    page = (folder / "report.html").read_text()
    assert "<polyline" in page
    assert f"{tmp_path}/gone" in page
    (folder / "ckpt_best.pth").unlink()
    (folder / "ckpt_latest.pth").unlink()
    assert "no checkpoint" in collect.write_report(folder)["no_pictures"]


def test_shards_given_and_wrong_are_an_error_and_a_damaged_checkpoint_too(
    finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="nowhere"):
        collect.write_report(finished, tmp_path / "r.html", shards=str(tmp_path / "nowhere"))
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    os.truncate(folder / "ckpt_best.pth", 100)
    with pytest.raises(DamagedDataError, match="ckpt_best"):
        collect.write_report(folder, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_wrong_input_has_exit_code_2(tmp_path: Path, finished: Path) -> None:
    assert invoke("report", str(tmp_path / "none"))[0] == 2
    assert invoke("report", str(tmp_path))[0] == 2
    assert (
        invoke("report", str(finished), "--out", str(tmp_path / "no" / "r.html"), "--samples", "0")[
            0
        ]
        == 2
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_only_begun_gets_a_report(tmp_path: Path) -> None:
    folder = run_of_lines(tmp_path / "new", {"kind": "start", "epoch": 0, "step": 0})
    code, output = invoke("report", str(folder))
    assert (code, "without pictures" in output) == (0, True)
    assert "no figures yet" in (folder / "report.html").read_text()


def test_what_a_run_wrote_cannot_become_markup(tmp_path: Path) -> None:
    folder = run_of_lines(
        tmp_path / "<b>run",
        {"kind": "start", "epoch": 0, "step": 0},
        {"kind": "error", "message": "<script>alert(1)</script> & more"},
    )
    collect.write_report(folder, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text
    assert "<b>run" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


def test_what_was_run_twice_after_a_crash_counts_once_and_what_is_not_finite_is_left_out(
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
    events = collect.read_run(folder).events
    assert page._points(page._epochs(events), "loss") == [(1.0, 0.5), (2.0, 0.3)]
    assert page._points(page._epochs(events), "val_loss") == [(2.0, 0.3)]
    collect.write_report(folder, tmp_path / "r.html")
    assert "0.4321" not in (tmp_path / "r.html").read_text()
    assert "went on after a stop (1)" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (0.131, 0.1312), (-3e-5, 8e-5), (0.0, 0.0), (5.0, 5.0), (1.0, 3e7), (0, 99)],
)
def test_ticks_are_round_and_hold_the_values(low: float, high: float) -> None:
    found = svg.ticks(low, high)
    assert 2 <= len(found) <= 12
    assert found[0] <= low
    assert found[-1] >= high
    assert all(
        len(f"{tick:.10g}".replace("-", "").replace(".", "").strip("0")) <= 5 for tick in found
    )


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


class Browser:
    """Chromium without a window, spoken to over its DevTools pipe."""

    def __init__(self, profile: Path) -> None:
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()
        words = [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        shell = [
            "bash",
            "-c",
            f'exec "$@" 3<&{read_commands} 4>&{write_answers}',
            "bash",
            *words,
            "about:blank",
        ]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            shell, pass_fds=(read_commands, write_answers), stdout=quiet, stderr=quiet
        )
        os.close(read_commands)
        os.close(write_answers)
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; what comes before it are events."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = os.read(self.answers, 1 << 20)
            assert data, "the browser ended"
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def wait_for(self, event: str) -> None:
        while not any(seen["method"] == event for seen in self.events):
            self.next()

    def evaluate(self, expression: str) -> Any:
        return self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )["result"]["value"]

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    started = Browser(tmp_path / "profile")
    target = started.call("Target.createTarget", url="about:blank")["targetId"]
    started.session = started.call("Target.attachToTarget", targetId=target, flatten=True)[
        "sessionId"
    ]
    for domain in ("Page", "Network", "Log", "Runtime"):
        started.call(f"{domain}.enable")
    yield started
    started.end()
    time.sleep(0.2)  # its children still write into the profile


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
            "[...document.images].every(i => i.complete && i.naturalWidth > 0) && document.images.length"
        )
        == 32
    )
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(
        "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 250)"
    )
    assert (
        browser.evaluate(
            "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
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
    told = [
        seen
        for seen in browser.events
        if seen["method"]
        in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert told == []


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
