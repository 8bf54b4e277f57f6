"""The service: the masks of predict, everything bounded, nothing lost."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from portrait_dist.inference import compositing
from portrait_dist.inference.outputs import encode
from portrait_dist.inference.segmenter import PortraitSegmenter
from portrait_dist.inference.service import Service, ServiceLimits, create_app
from portrait_dist.preprocessing import ImageArray
from tests import blobs
from tests.browser import CHROMIUM, Browser
from tests.cli import PORTRAIT_DIST, assert_one_line, call
from tests.waiting import wait_for


@dataclass(frozen=True)
class Answer:
    """Status, headers and body of an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def image(self) -> ImageArray:
        """The answer as an array; it must be an image."""
        assert self.status == 200, self.body
        return np.asarray(Image.open(io.BytesIO(self.body)))

    @property
    def error(self) -> str:
        """The line that says what was wrong."""
        return str(json.loads(self.body)["error"])


@dataclass(frozen=True)
class Running:
    """A service in a thread of this process."""

    address: str
    service: Service

    def get(self, path: str) -> Answer:
        """GET a path."""
        return _open(urllib.request.Request(self.address + path))

    def post(self, body: bytes, query: str = "", **headers: str) -> Answer:
        """POST a photo."""
        headers = {"Content-Type": "image/png"} | headers
        return _open(
            urllib.request.Request(f"{self.address}/segment?{query}", body, headers, method="POST")
        )


def _open(request: urllib.request.Request) -> Answer:
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Answer(answer.status, dict(answer.headers), answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read())


@contextmanager
def running(segmenter: PortraitSegmenter, limits: ServiceLimits | None = None) -> Iterator[Running]:
    """Serve in a thread, at a free port of the loopback interface."""
    app = create_app(segmenter, limits)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.service)
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive(), "it ends when it is asked to"


def test_what_is_no_form_no_path_or_no_colour_is_refused_as_json_and_counted(
    segmenter: PortraitSegmenter,
) -> None:
    with running(segmenter) as service:
        form = "multipart/form-data"
        answers = [
            service.post(b"abc", **{"Content-Type": form}),
            service.post(b"abc", **{"Content-Type": f"{form}; boundary=x"}),
            service.post(b"abc", "background=rgb(300,0,0)"),
            service.get("/nothing"),
            service.get("/segment"),
        ]
        assert [answer.status for answer in answers] == [400, 400, 400, 404, 405]
        assert all(answer.error for answer in answers)
        assert 'status="500"' not in service.get("/metrics").body.decode()


def test_a_client_that_leaves_is_no_error_of_the_service(
    segmenter: PortraitSegmenter, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(segmenter) as service:
        host, port = service.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = "POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nabc"
            client.sendall(head.encode())
            wait_for(lambda: service.service.working == 1, what="the request is there")
        wait_for(lambda: service.service.working == 0, what="it is over")
        assert 'status="499"' in service.get("/metrics").body.decode()
    assert "Traceback" not in capfd.readouterr().err


class HeldUp:
    """Holds the network up until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, segmenter: PortraitSegmenter) -> None:
        self.arrived, self.let_go = threading.Event(), threading.Event()
        original = segmenter.alpha_of

        def alpha_of(inputs: torch.Tensor) -> torch.Tensor:
            self.arrived.set()
            assert self.let_go.wait(60)
            return original(inputs)

        monkeypatch.setattr(segmenter, "alpha_of", alpha_of)


@pytest.fixture(scope="module")
def segmenter(trained_checkpoint: Path) -> PortraitSegmenter:
    return PortraitSegmenter.from_checkpoint(trained_checkpoint, device="cpu", precision="fp32")


@pytest.fixture
def service(segmenter: PortraitSegmenter) -> Iterator[Running]:
    with running(segmenter) as started:
        yield started


def photo(seed: int, height: int = 90, width: int = 70) -> ImageArray:
    return blobs.photo(height, width, seed=seed)[0]


def png(seed: int = 0, height: int = 90, width: int = 70) -> bytes:
    return encode(photo(seed, height, width), "png")


def form(name: str, data: bytes) -> tuple[bytes, str]:
    """A form with one file, and its content type."""
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'
    return head.encode() + data + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


def test_the_answer_is_what_predict_makes_of_the_photo(
    service: Running, segmenter: PortraitSegmenter
) -> None:
    alpha = segmenter.predict(photo(1))
    mask = compositing.to_bytes(alpha)
    cutout = compositing.cut_out(photo(1), alpha, compositing.parse_background("white"))
    assert np.array_equal(service.post(png(1), "output=mask").image, mask)
    answer = service.post(png(1), "output=cutout&background=white&format=png")
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(answer.image, cutout)
    assert service.post(png(1), "format=webp").headers["content-type"] == "image/webp"
    body, kind = form("photo", png(1))
    assert np.array_equal(service.post(body, "output=mask", **{"Content-Type": kind}).image, mask)


def test_each_of_many_requests_at_once_gets_its_own_mask_and_they_share_batches(
    service: Running, segmenter: PortraitSegmenter
) -> None:
    seeds = range(24)
    expected = [compositing.to_bytes(segmenter.predict(photo(seed))) for seed in seeds]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda seed: service.post(png(seed), "output=mask"), seeds))
    for answer, mask in zip(answers, expected, strict=True):
        assert np.abs(answer.image.astype(int) - mask).max() <= 1
    metrics = service.get("/metrics").body.decode()
    assert 'portrait_requests_total{status="200"} 24.0' in metrics
    batches = float(metrics.split("portrait_batch_photos_count ")[1].split()[0])
    assert batches < 24, "photos that wait go through the network together"


def test_beyond_the_limit_the_answer_is_503_at_once_and_what_was_taken_is_done(
    segmenter: PortraitSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldUp(monkeypatch, segmenter)
    with (
        running(segmenter, ServiceLimits(max_requests=2)) as service,
        ThreadPoolExecutor(2) as pool,
    ):
        taken = [pool.submit(service.post, png(seed)) for seed in (1, 2)]
        wait_for(lambda: service.service.working == 2 and held.arrived.is_set(), what="both work")
        refused = service.post(png(3))
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert service.get("/health").status == 200
        held.let_go.set()
        assert [one.result().status for one in taken] == [200, 200]
        assert service.post(png(3)).status == 200


def test_a_request_ends_at_its_time_limit_and_the_next_ones_are_answered(
    segmenter: PortraitSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldUp(monkeypatch, segmenter)
    with running(segmenter, ServiceLimits(timeout_seconds=0.5)) as service:
        late = service.post(png(1))
        assert (late.status, late.error) == (504, "not done within 0.5 s")
        host, port = service.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:  # promises more than it sends
            slow.sendall(b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx")
            assert b" 504 " in slow.recv(4096)
        held.let_go.set()
        wait_for(lambda: service.service.working == 0, what="nobody waits any more")
        assert service.post(png(2)).status == 200


def test_what_is_too_large_or_no_photo_is_refused_by_name(segmenter: PortraitSegmenter) -> None:
    limits = ServiceLimits(max_bytes=40_000, max_pixels=10_000)
    with running(segmenter, limits) as service:
        large = service.post(bytes(50_000))
        assert (large.status, large.error) == (413, "the photo has more than 40,000 bytes")
        body, kind = form("photo", bytes(50_000))
        assert service.post(body, **{"Content-Type": kind}).status == 413
        wide = service.post(png(1, 101, 100))
        assert wide.status == 413
        assert "10,100, at most 10,000" in wide.error
        assert service.post(b"GIF8 no picture").status == 422
        cut = service.post(png(1)[:2000])
        assert cut.status == 422
        assert "damaged" in cut.error
        assert service.post(b"").status == 400
        body, kind = form("picture", png(1))
        assert "'photo'" in service.post(body, **{"Content-Type": kind}).error
        assert service.post(png(1)).status == 200


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("output=alpha", "output is mask, cutout"),
        ("format=gif", "format is png, webp, jpeg"),
        ("format=jpeg", "JPEG holds no transparency"),
        ("size=4", "'size' is no option"),
        ("background=pyproject.toml", "background is transparent, blur, or a colour"),
        ("background=LICENSE", "background is transparent, blur, or a colour"),
    ],
)
def test_a_wrong_option_is_refused_and_none_names_a_file_of_the_machine(
    service: Running, query: str, reason: str
) -> None:
    answer = service.post(png(1), query)
    assert answer.status == 400
    assert reason in answer.error


def test_a_page_of_another_name_cannot_reach_a_service_on_loopback(service: Running) -> None:
    request = urllib.request.Request(service.address + "/health", headers={"Host": "evil.example"})
    assert _open(request).status == 400


def test_a_failure_of_the_network_is_answered_and_the_service_lives(
    service: Running, segmenter: PortraitSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def fail(inputs: object) -> object:
            raise RuntimeError("out of memory")

        patched.setattr(segmenter, "alpha_of", fail)
        assert service.post(png(1)).status == 500
    assert service.post(png(1)).status == 200


def test_sigterm_ends_the_command_after_the_request_in_work(trained_checkpoint: Path) -> None:
    command = [
        *PORTRAIT_DIST,
        "serve",
        "--checkpoint",
        str(trained_checkpoint),
        "--port",
        "0",
        "--json",
    ]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        address = process.stderr.readline().split()[2].rstrip(",")
        host, port = address.removeprefix("http://").split(":")
        body = png(1, 600, 450)
        head = f"POST /segment HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode() + body[:-1])
            wait_for(lambda: _working(address) == 1, what="the request is in work")
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: not _listens(host, int(port)), what="it takes no new connections")
            client.sendall(body[-1:])
            assert client.recv(64).startswith(b"HTTP/1.1 200")
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert json.loads(out) == {"address": address, "photos": 1}
    assert "Traceback" not in err


def _working(address: str) -> int:
    with urllib.request.urlopen(address + "/health", timeout=60) as answer:
        return int(json.loads(answer.read())["working"])


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def test_a_port_that_is_taken_and_a_host_that_is_not_here_are_one_line(
    trained_checkpoint: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = call("serve", "--checkpoint", trained_checkpoint, "--port", str(port))
        assert_one_line(result, 2, f"--port {port}", "in use", "--port 0")
    result = call(
        "serve", "--checkpoint", trained_checkpoint, "--host", "203.0.113.7", "--port", "0"
    )
    assert_one_line(result, 2, "203.0.113.7")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to show the page")
def test_a_real_browser_shows_the_page_and_a_cut_out_without_outside_requests(
    service: Running, browser: Browser
) -> None:
    browser.call("Page.navigate", url=f"{service.address}/#draw")
    browser.wait_for("Page.loadEventFired")

    def message() -> str:
        text = str(browser.evaluate("document.getElementById('message').textContent"))
        return "" if text.startswith("working") else text

    text = wait_for(message, what="the drawn portrait is answered")
    assert text.startswith("300 × 400 pixels in ")
    requested = [
        seen["params"]["request"]["url"]
        for seen in browser.events
        if seen["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith((service.address, "blob:")) for url in requested), requested
