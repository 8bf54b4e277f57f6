"""An HTTP service for masks and cut-outs.

    app = create_app(PortraitSegmenter.from_checkpoint("runs/NAME/ckpt_best.pth"))
    uvicorn.run(app, host="127.0.0.1", port=8000)

``POST /segment`` takes a photo as the body or as the form's file ``photo`` and answers with an
image; ``GET /health`` says that the network is there, ``GET /metrics`` is for Prometheus, and
``GET /`` is a page to try it. Threads read, shrink and encode photos; one thread runs the network
on all photos that wait for it. Everything is bounded: the bytes and pixels of a photo, the time of
a request, and how many are in progress at a time, beyond which the answer is 503 at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, cast

from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.inference.compositing import needs_no_file
from portrait_dist.inference.outputs import ImageFormat, OutputPlan, plan_outputs
from portrait_dist.inference.photos import KINDS, read_photo_bytes
from portrait_dist.inference.segmenter import PortraitSegmenter, PreparedPhoto
from portrait_dist.preprocessing import Alpha
from portrait_dist.system.info import check_extra, cores
from portrait_dist.system.threads import switch_off_opencv_threads

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SERVICE_PACKAGES = ("starlette", "uvicorn", "multipart", "prometheus_client")
LOCAL_NAMES = ("localhost", "127.0.0.1")
"""What a browser may call a service on loopback; another name is a page that was led here (DNS
rebinding)."""
CONNECTIONS_PER_REQUEST = 4
"""Open connections allowed for each request that may be in progress."""
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


@dataclass(frozen=True)
class ServiceLimits:
    """Limits of one service.

    Attributes:
        batch_size: photos that go through the network together, at most.
        max_requests: requests in progress at a time; further ones get 503.
        max_bytes: of one request's body.
        max_pixels: of one photo.
        timeout_seconds: for one request, from its first byte to its answer.
    """

    batch_size: int = 8
    max_requests: int = 64
    max_bytes: int = 32 << 20
    max_pixels: int = 50_000_000
    timeout_seconds: float = 30.0


def check_service_installed() -> None:
    """Check that the packages of the extra ``serve`` are there.

    Raises:
        InputError: one is missing.
    """
    check_extra("serve", SERVICE_PACKAGES, "serve")


class Batcher:
    """Run the network in one thread, on all photos that wait for it, up to ``batch_size``.

    Nobody waits for a batch to fill: while the network works on one, the next ones collect.

    Args:
        segmenter: its network.
        batch_size: photos of one batch, at most.
        seen: called with the number of photos of each batch.
    """

    def __init__(
        self, segmenter: PortraitSegmenter, batch_size: int, seen: Callable[[int], object]
    ) -> None:
        self._segmenter = segmenter
        self._batch_size = batch_size
        self._seen = seen
        self._waiting: queue.SimpleQueue[tuple[PreparedPhoto, Future[Alpha]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    def submit(self, photo: PreparedPhoto) -> Future[Alpha]:
        """Queue a photo; the future gives the network's alpha, float32 at the network's size."""
        future: Future[Alpha] = Future()
        self._waiting.put((photo, future))
        return future

    def close(self) -> None:
        """Wait for what was queued, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            batch = []
            item = self._waiting.get()
            while item is not None:
                if item[1].set_running_or_notify_cancel():  # not that of a request that timed out
                    batch.append(item)
                if len(batch) == self._batch_size:
                    break
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
            else:
                ended = True
            if batch:
                self._predict(batch)

    def _predict(self, batch: list[tuple[PreparedPhoto, Future[Alpha]]]) -> None:
        self._seen(len(batch))
        try:
            photos = (photo for photo, _ in batch)
            alphas = [alpha for _, alpha in self._segmenter.predict_prepared(photos, len(batch))]
        except Exception as error:  # an answer of 500 to each of them; the service lives on
            for _, future in batch:
                future.set_exception(error)
        else:
            for (_, future), alpha in zip(batch, alphas, strict=True):
                future.set_result(alpha)


class _Metrics:
    """What ``/metrics`` shows, and ``served``: how many photos were answered with an image."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self.requests = Counter(
            "portrait_requests", "Answers by status.", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            "portrait_request_seconds",
            "Seconds from a request to its answer.",
            registry=self.registry,
        )
        self.batches = Histogram(
            "portrait_batch_photos",
            "Photos that went through the network together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.working = Gauge(
            "portrait_requests_working", "Requests in progress.", registry=self.registry
        )
        self.served = 0

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self.requests.labels(str(status)).inc()
        self.seconds.observe(seconds)
        self.served += status == 200


class _TooLongError(Exception):
    """A body has more bytes than are accepted."""


class _BoundedBody:
    """ASGI middleware: stop reading a body at ``max_bytes``, whatever its headers promise."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def receive_bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_bytes:
                raise _TooLongError
            return message

        await self.app(scope, receive_bounded, send)


class Service:
    """The work behind the addresses; :func:`create_app` connects the two.

    Args:
        segmenter: predicts the masks.
        limits: see :class:`ServiceLimits`.
    """

    def __init__(self, segmenter: PortraitSegmenter, limits: ServiceLimits) -> None:
        self.segmenter = segmenter
        self.limits = limits
        self.metrics = _Metrics()
        self.working = 0
        switch_off_opencv_threads()
        self._pool = ThreadPoolExecutor(cores(), thread_name_prefix="photos")
        self._batcher = Batcher(segmenter, limits.batch_size, self.metrics.batches.observe)

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._pool.shutdown()
        self._batcher.close()

    async def segment(self, request: Request) -> Response:
        """Answer ``POST /segment``."""
        began = time.monotonic()
        # Before the body is read: what is refused costs no memory.
        if self.working >= self.limits.max_requests:
            busy = _refuse(503, f"{self.working} requests are in progress; try again in a second")
            busy.headers["Retry-After"] = "1"
            self.metrics.answered(503, 0.0)
            return busy
        self.working += 1
        self.metrics.working.inc()
        status = 500
        try:
            response = await self._answer(request)
            status = response.status_code
            return response
        finally:
            self.working -= 1
            self.metrics.working.dec()
            self.metrics.answered(status, time.monotonic() - began)

    async def _answer(self, request: Request) -> Response:
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect

        limits = self.limits
        try:
            async with asyncio.timeout(limits.timeout_seconds):
                plan = _plan_of(request)
                return await self._image(await _photo_of(request), plan)
        except InputError as error:
            # One error for all readers of photos; only here it is a status of its own.
            return _refuse(413 if "too many pixels" in str(error) else 400, str(error))
        except DamagedDataError as error:
            return _refuse(422, str(error))
        except _TooLongError:
            return _refuse(413, f"the photo has more than {limits.max_bytes:,} bytes")
        except TimeoutError:
            return _refuse(504, f"not done within {limits.timeout_seconds:g} s")
        except HTTPException as error:  # a form that is none
            return _refuse(error.status_code, error.detail)
        except ClientDisconnect:  # nobody reads the answer; 499 is the web servers' number for it
            return _refuse(499, "the client left before its photo was there")

    async def _image(self, data: bytes, plan: OutputPlan) -> Response:
        from starlette.responses import Response

        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._pool, self._prepare, data)
        # A request that times out here cancels its future, and the network skips the photo.
        small = await asyncio.wrap_future(self._batcher.submit(prepared))
        image = await loop.run_in_executor(self._pool, self._render, prepared, small, plan)
        return Response(image, media_type=MEDIA_TYPES[plan.image_format])

    def _prepare(self, data: bytes) -> PreparedPhoto:
        photo = read_photo_bytes(data, "the photo", self.limits.max_pixels)
        return self.segmenter.prepare(photo)

    def _render(self, prepared: PreparedPhoto, small: Alpha, plan: OutputPlan) -> bytes:
        alpha = self.segmenter.finish(prepared, small)
        (image,) = plan.render(prepared.photo, alpha).values()
        return image


def create_app(
    segmenter: PortraitSegmenter,
    limits: ServiceLimits | None = None,
    *,
    host_names: tuple[str, ...] = LOCAL_NAMES,
) -> Starlette:
    """Make the ASGI application; its ``state.service`` is the :class:`Service` behind it.

    Args:
        segmenter: predicts the masks.
        limits: see :class:`ServiceLimits`; the defaults when None.
        host_names: names of this service that a request's Host header may give; ``*`` for any.

    Raises:
        InputError: a package of the extra ``serve`` is missing.
    """
    check_service_installed()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    limits = limits or ServiceLimits()
    service = Service(segmenter, limits)
    app = Starlette(
        routes=[
            Route("/", _page),
            Route("/segment", service.segment, methods=["POST"]),
            Route("/health", _health),
            Route("/metrics", _metrics),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(host_names), www_redirect=False),
            Middleware(_BoundedBody, max_bytes=limits.max_bytes),
        ],
        exception_handlers={HTTPException: _refuse_as_json},
        lifespan=_close_service_at_the_end,
    )
    app.state.service = service
    return app


@contextlib.asynccontextmanager
async def _close_service_at_the_end(app: Starlette) -> AsyncIterator[None]:
    try:
        yield
    finally:
        app.state.service.close()


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket to listen at.

    Raises:
        InputError: no such address here, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {host} --port {port}: {reason}; give an address of this machine and a free "
            "port, or --port 0"
        ) from error


def address_of(listening: socket.socket) -> str:
    """Return the address at which a socket listens, ``http://127.0.0.1:8000``."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(segmenter: PortraitSegmenter, limits: ServiceLimits, listening: socket.socket) -> int:
    """Serve until SIGINT or SIGTERM; requests in progress are answered first.

    Args:
        segmenter: predicts the masks.
        limits: see :class:`ServiceLimits`.
        listening: from :func:`listen`.

    Returns:
        How many photos were answered with an image.
    """
    import uvicorn

    host = listening.getsockname()[0]
    # Which names lead to a public address only its owner knows.
    app = create_app(segmenter, limits, host_names=LOCAL_NAMES if host == "127.0.0.1" else ("*",))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            # Connections that send nothing are bounded too.
            limit_concurrency=CONNECTIONS_PER_REQUEST * limits.max_requests,
            timeout_graceful_shutdown=math.ceil(limits.timeout_seconds),
        )
    )
    # uvicorn raises the signal again when all is answered; here that is the wanted end.
    with contextlib.suppress(KeyboardInterrupt), _terminates_as_interrupt():
        server.run(sockets=[listening])
    return cast("Service", app.state.service).metrics.served


@contextlib.contextmanager
def _terminates_as_interrupt() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as SIGINT does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _service_of(request: Request) -> Service:
    return cast("Service", request.app.state.service)


async def _page(request: Request) -> Response:
    from starlette.responses import HTMLResponse

    page = package_files("portrait_dist.inference").joinpath("service_page.html").read_text()
    return HTMLResponse(page)


async def _health(request: Request) -> Response:
    from starlette.responses import JSONResponse

    service = _service_of(request)
    height, width = service.segmenter.size
    return JSONResponse(
        {
            "status": "ready",
            "device": str(service.segmenter.device),
            "size": f"{height}x{width}",
            "working": service.working,
            "max_requests": service.limits.max_requests,
        }
    )


async def _metrics(request: Request) -> Response:
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.responses import Response

    registry = _service_of(request).metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _refuse(status: int, reason: str) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": reason}, status_code=status)


async def _refuse_as_json(request: Request, error: Exception) -> Response:
    """Answer for a path or method that there is not."""
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException)
    answer = _refuse(error.status_code, error.detail)
    answer.headers.update(error.headers or {})
    return answer


def _plan_of(request: Request) -> OutputPlan:
    """Read what is asked for: ``output``, ``format`` and ``background``.

    Raises:
        InputError: an unknown option or value, or a background that is a file.
    """
    query = request.query_params
    unknown = sorted(set(query) - {"output", "format", "background"})
    if unknown:
        raise InputError(f"'{unknown[0][:40]}' is no option; there are output, format, background")
    kind = query.get("output", "cutout")
    image_format = query.get("format", "png")
    background = query.get("background", "transparent")
    if kind not in KINDS:
        raise InputError(f"output is {', '.join(KINDS)}, not '{kind[:40]}'")
    if image_format not in MEDIA_TYPES:
        raise InputError(f"format is {', '.join(MEDIA_TYPES)}, not '{image_format[:40]}'")
    if not needs_no_file(background):  # a client must not name files of this machine
        raise InputError("background is transparent, blur, or a colour such as white or #1e90ff")
    return plan_outputs(
        Path(),
        kinds=(kind,),
        image_format=cast("ImageFormat", image_format),
        background=background,
    )


async def _photo_of(request: Request) -> bytes:
    """Read the photo: the form's file ``photo``, or the whole body.

    Raises:
        InputError: a form without it, or an empty body.
        _TooLongError: more bytes than are accepted.
    """
    from starlette.datastructures import UploadFile

    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=1, max_fields=4) as form:
            file = form.get("photo")
            if not isinstance(file, UploadFile):
                raise InputError("the form has no file 'photo'; send it as 'photo', or as the body")
            data = await file.read()
    else:
        data = await request.body()
    if not data:
        raise InputError("the body is empty; send the photo's bytes, or a form with a file 'photo'")
    return data
