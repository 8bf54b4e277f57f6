"""Download files from addresses: resumed after a cut, bounded in bytes and in time.

Addresses are http and https, and whatever fsspec opens: ``file://``, ``memory://``, ``s3://`` (with
the extra ``s3``), …. A user name and password in an http address are sent as basic authentication,
to its own host only.

Three kinds of failure are kept apart, because they need different reactions:

- The server is away (no connection, 5xx, cut, too slow): it is waited for. After a limit that is
  an :class:`UnreachableError`.
- It refuses (401, 403, a certificate that is not trusted, no such host): an :class:`InputError`.
- It has no such file, or another one: a :class:`FetchError`, which the reader reports as damage.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import http.client
import io
import logging
import math
import os
import random
import socket
import ssl
import stat
import string
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from portrait_dist.errors import InputError, UnreachableError
from portrait_dist.system.address import check_address, redact

log = logging.getLogger("portrait_dist.data")

CHUNK = 1 << 20
ABSENT = (404, 410)
REFUSED = range(300, 429)
"""HTTP answers that stay the same: redirects that lead nowhere, 400, 401, 403, …. 5xx pass."""
PASSING = (408, 425)
"""Answers below 429 that pass: a timeout, and "too early"."""
CONNECTION_SECONDS = 10.0
"""For a connection to be there; a host that does not answer is asked again."""
WATCH_SECONDS = 0.2
"""Between two looks at whether a download is still needed."""
ATTEMPTS_FOR_A_NAME = 5
"""Attempts for a host name that does not exist, and for credentials that are missing."""

T = TypeVar("T")


@dataclass(frozen=True)
class DownloadOptions:
    """How long a download may take.

    Attributes:
        wait_for_server_seconds: how long a server may bring less than ``minimum_bytes_per_second``
            (nothing at all while it is away) before the download fails.
        minimum_bytes_per_second: mean rate below which a server counts as away.
        timeout_seconds: the same for one connection; then another one is opened.
        first_delay_seconds: pause after a first failure; it doubles with each further one.
        longest_delay_seconds: limit of that pause.
        report_seconds: pause between two lines of the log that say what is waited for.
    """

    wait_for_server_seconds: float = 1800.0
    minimum_bytes_per_second: float = 1000.0
    timeout_seconds: float = 60.0
    first_delay_seconds: float = 0.5
    longest_delay_seconds: float = 30.0
    report_seconds: float = 60.0


class FetchError(Exception):
    """A file is not there, or not the one that is asked for. The message says what and why."""


class AbsentError(FetchError):
    """There is no such file."""


class CancelledDownloadError(Exception):
    """Nobody needs the download any more."""


class LocalDiskError(Exception):
    """The partial download cannot be written; ``error`` says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class Stream(Protocol):
    """What is read from an address."""

    def read(self, size: int = -1, /) -> bytes: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class _Answer:
    """An open stream that begins at byte ``start``; ``total`` bytes of the whole file, if known.

    ``framed`` is True where an end of the stream is an end of the file even without ``total``.
    """

    stream: Stream
    start: int
    total: int | None
    framed: bool


def download(
    address: str,
    part: Path,
    sha256: str,
    *,
    size: int | None = None,
    limit: int,
    options: DownloadOptions,
    cancelled: threading.Event | None = None,
) -> None:
    """Download a file, resuming a partial download of an earlier attempt or a killed process.

    Args:
        address: of the file.
        part: file to write; what it holds is taken for the beginning of the file.
        sha256: of the content.
        size: bytes of the file, where known.
        limit: bytes that are written at most, where ``size`` is not known.
        options: times and rates.
        cancelled: ends the download when it is set; what has arrived is kept.

    Raises:
        FetchError: not there, or its content is another.
        InputError: the address is wrong, or the server refuses.
        UnreachableError: the server was away for too long.
        CancelledDownloadError: ``cancelled`` was set.
        LocalDiskError: the local disk is full or cannot be written.
    """
    with _local_disk():
        file = open_part(part)
    with file:
        try:
            _download(address, file, sha256, size, limit, options, cancelled)
        except FetchError:
            # Bytes of a wrong file must not become the beginning of the next attempt.
            part.unlink(missing_ok=True)
            raise


def _download(
    address: str,
    file: io.FileIO,
    sha256: str,
    size: int | None,
    limit: int,
    options: DownloadOptions,
    cancelled: threading.Event | None,
) -> None:
    for _ in range(2):  # the beginning of another file shows only in the hash: then once afresh
        retry(
            lambda: _copy(address, file, size, limit, options, cancelled),
            address,
            options,
            cancelled,
            lambda: _length(file),
        )
        length, found = _length(file), _sha256(file)
        if found == sha256:
            return
        with _local_disk():
            file.truncate(0)
    raise FetchError(
        f"the file there is not the one in the manifest ({length:,} bytes, sha256 {found[:12]}…)"
    )


def read_bytes(address: str, limit: int, options: DownloadOptions) -> bytes:
    """Return a small file's content.

    Raises:
        FetchError: not there, or longer than ``limit`` bytes.
        InputError, UnreachableError: see :func:`download`.
    """

    def attempt() -> bytes:
        pace = _Pace(options.minimum_bytes_per_second, options.timeout_seconds)
        with _open(address, 0, options) as answer:
            data = bytearray()
            while len(data) <= limit and (chunk := _read(answer.stream, limit + 1 - len(data))):
                data += chunk
                pace.check(len(data))
        if len(data) > limit:
            raise FetchError(f"is longer than {limit:,} bytes")
        if len(data) < (answer.total or 1):  # no manifest is empty
            raise ConnectionError(f"cut off after {len(data):,} of {answer.total or '?'} bytes")
        return bytes(data)

    return retry(attempt, address, options)


class _Pace:
    """Whether bytes arrive at a minimum rate; the clock of a rate that was met starts anew."""

    def __init__(self, bytes_per_second: float, seconds: float, reached: int = 0) -> None:
        self._rate, self._seconds = bytes_per_second, seconds
        self._since, self._reached = time.monotonic(), reached

    def seconds_left(self, reached: int) -> float:
        """Seconds until the download has been too slow for too long."""
        now = time.monotonic()
        if reached > self._reached and (
            reached - self._reached >= self._rate * (now - self._since)
        ):
            self._since, self._reached = now, reached
        return self._since + self._seconds - now

    def check(self, reached: int) -> None:
        """Raise :class:`ConnectionError` where it has."""
        if self.seconds_left(reached) < 0:
            raise ConnectionError(f"slower than {self._rate:,.0f} bytes/s for {self._seconds:g} s")


def retry(
    attempt: Callable[[], T],
    address: str,
    options: DownloadOptions,
    cancelled: threading.Event | None = None,
    reached: Callable[[], int] = lambda: 0,
) -> T:
    """Call ``attempt`` until it works, or the server has been away for too long.

    Args:
        attempt: one try; it raises what :func:`_lasting` tells apart.
        address: for messages.
        options: times and rates.
        cancelled: ends the wait when it is set.
        reached: bytes that all attempts together have brought.

    Raises:
        FetchError, InputError, LocalDiskError: failures that another attempt does not change.
        UnreachableError: with the last failure.
        CancelledDownloadError: ``cancelled`` was set.
    """
    cancelled = cancelled or threading.Event()
    failures, furthest = 0, reached()
    pace = _Pace(options.minimum_bytes_per_second, options.wait_for_server_seconds, furthest)
    while not cancelled.is_set():
        try:
            return attempt()
        except Exception as error:  # fsspec's file systems raise kinds of their own
            if cancelled.is_set():
                break
            failures += 1
            if (lasting := _lasting(error, address, failures)) is not None:
                raise lasting from error
            reason = _reason(error)
        if (length := reached()) > furthest:  # a link that drops every minute is no outage
            failures, furthest = 1, length
        left = pace.seconds_left(length)
        if left <= 0:
            raise _unreachable(address, reason, options)
        _report(address, reason, left, options)
        cancelled.wait(_delay(failures, left, options))
    raise CancelledDownloadError


def _unreachable(address: str, reason: str, options: DownloadOptions) -> UnreachableError:
    return UnreachableError(
        f"{redact(address)}: the server was away, or too slow, for "
        f"{options.wait_for_server_seconds:g} s ({reason}); run the same command again "
        "when it is back, or raise data.wait_for_server_seconds"
    )


def _delay(failures: int, left: float, options: DownloadOptions) -> float:
    """Seconds before the next attempt: doubled by each failure, at most ``left``."""
    delay = options.first_delay_seconds * 2 ** min(failures - 1, 30)
    # Shortened by up to a half at random, so that thousands of ranks do not come back at once.
    return min(delay, options.longest_delay_seconds, left) * random.uniform(0.5, 1.0)


def _lasting(error: Exception, address: str, failures: int) -> Exception | None:
    """Return the error to raise where another attempt does not help; else None."""
    if isinstance(error, FetchError | InputError | LocalDiskError | MemoryError):
        return error
    reason = getattr(error, "reason", None) if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return InputError(
            f"{redact(address)}: its certificate is not trusted ({reason.verify_message}); "
            "give the right host, or install its certificate authority here"
        )
    unknown = isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME
    if unknown and failures >= ATTEMPTS_FOR_A_NAME:
        return InputError(f"{redact(address)}: there is no such host; give the right address")
    if "Credentials" in type(error).__name__ and failures >= ATTEMPTS_FOR_A_NAME:
        return InputError(f"{redact(address)}: {_reason(error)}; give credentials for it")
    if isinstance(error, ValueError | TypeError) and not isinstance(error, OSError):
        return InputError(f"{redact(address)}: cannot be opened ({_reason(error)}); correct it")
    return None


_reported: dict[str, float] = {}
_report_lock = threading.Lock()


def _report(address: str, reason: str, left: float, options: DownloadOptions) -> None:
    """Say what is waited for: once a minute for each server, however many threads wait."""
    # By server, not by file: thousands of shards wait for the same one.
    server, now = urlsplit(redact(address)).netloc or redact(address), time.monotonic()
    with _report_lock:
        if now - _reported.get(server, -1e9) < options.report_seconds:
            return
        _reported[server] = now
    log.warning(
        "%s: waiting for the server (%s), for at most %.0f s more", redact(address), reason, left
    )


def _copy(
    address: str,
    file: io.FileIO,
    size: int | None,
    limit: int,
    options: DownloadOptions,
    cancelled: threading.Event | None,
) -> None:
    """Append what is missing; never more than ``size`` or ``limit`` bytes.

    Raises:
        CancelledDownloadError: ``cancelled`` was set.
        FetchError: the server has a file of another length.
        ConnectionError: cut off, or too slow.
    """
    start = _length(file)
    if size is not None and start > size:  # no beginning of this file
        start = 0
    with _open(address, start, options, cancelled) as answer:
        expected = size if size is not None else answer.total
        if answer.total not in (None, expected) or (expected or 0) > max(limit, size or 0):
            raise FetchError(
                "the file there is not the one in the manifest "
                f"({answer.total:,} bytes instead of {'at most ' if size is None else ''}"
                f"{limit if size is None else size:,})"
            )
        most = limit if expected is None else expected
        with _local_disk():
            # A server without ranges begins anew, and ours may be longer than what it has.
            file.truncate(answer.start)
        length = begin = file.seek(0, io.SEEK_END)
        pace = _Pace(options.minimum_bytes_per_second, options.timeout_seconds, length)
        while length < most and (chunk := _read(answer.stream, most - length)):
            with _local_disk():
                while chunk:  # an unbuffered file may take a part of it
                    written = file.write(chunk)
                    length, chunk = length + written, chunk[written:]
            if cancelled and cancelled.is_set():
                break
            pace.check(length)
        # A connection that was shut down ends like one whose file is whole.
        if cancelled and cancelled.is_set():
            raise CancelledDownloadError
        with _local_disk():
            # Before the rename that makes it a shard: a crash must not leave a name without its
            # bytes.
            os.fsync(file.fileno())
    # A body without a length ends like one that was cut; one that adds nothing to ours is whole.
    cut = answer.total is not None or (not answer.framed and (length > begin or length == 0))
    if expected is not None and length < expected and cut:
        raise ConnectionError(f"cut off after {length:,} of {expected:,} bytes")


@contextlib.contextmanager
def _local_disk() -> Iterator[None]:
    """Tell a failure of the local disk from one of the connection."""
    try:
        yield
    except OSError as error:
        raise LocalDiskError(error) from error


def _read(stream: Stream, most: int) -> bytes:
    """Read what has arrived; ``read`` would wait for a whole chunk, without an end at a trickle."""
    read = getattr(stream, "read1", stream.read)
    return read(min(CHUNK, most))


def open_part(path: Path) -> io.FileIO:
    """Open a file of the cache for reading and writing, made if need be; never through a link.

    Raises:
        OSError: it cannot be opened, is a link, or is no regular file.
    """
    # O_NONBLOCK: opening what somebody put there, such as a device, must not wait.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return open(descriptor, "r+b", buffering=0)


def _length(file: io.FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def _sha256(file: io.FileIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return redact(f"HTTP {error.code} {error.reason}")
    reason = " ".join(f"{getattr(error, 'reason', None) or error}".split())[:200]
    return redact(f"{type(error).__name__}: {reason}")


@contextlib.contextmanager
def _open(
    address: str,
    start: int,
    options: DownloadOptions,
    cancelled: threading.Event | None = None,
) -> Iterator[_Answer]:
    """Open a file from byte ``start``, or from its beginning where the server cannot do that."""
    if urlsplit(address).scheme in ("http", "https"):
        with _Watch(options.timeout_seconds, cancelled) as watch:
            answer = _open_http(address, start, options.timeout_seconds, watch)
            with contextlib.closing(answer.stream):
                yield answer
        return
    answer = _open_fsspec(address, start)
    with contextlib.closing(answer.stream):
        yield answer


class _Watch:
    """Shut connections down whose head takes too long, or that nobody needs any more.

    A socket's timeout is for each piece that arrives, so a head that drips would have no end; and
    only shutting the socket down wakes a thread that reads from it, closing does not.

    Args:
        seconds: from a connection to the whole head of its answer.
        cancelled: set where nobody needs the answer any more.
    """

    def __init__(self, seconds: float, cancelled: threading.Event | None) -> None:
        self._seconds, self._cancelled = seconds, cancelled or threading.Event()
        self._connection: socket.socket | None = None
        self._deadline = math.inf
        self._done = threading.Event()
        self._expired = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def begin(self, connection: socket.socket) -> None:
        """Watch a connection, in place of one that redirected to it."""
        self._deadline = time.monotonic() + self._seconds
        first, self._connection = self._connection is None, connection
        if first:
            threading.Thread(target=self._look, name="download-watch", daemon=True).start()

    def head_is_there(self) -> bool:
        """Watch the body; returns False where the head took too long."""
        self._deadline = math.inf
        return not self._expired

    def _look(self) -> None:
        while not self._done.wait(WATCH_SECONDS):
            late = time.monotonic() > self._deadline
            if late or self._cancelled.is_set():
                self._expired = self._expired or late
                connection = self._connection
                with contextlib.suppress(OSError):
                    if connection is not None:
                        # Not the method of a TLS socket, which then reads on without decrypting.
                        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _SameHostRedirects(urllib.request.HTTPRedirectHandler):
    """Sends the password again only where a redirect stays on the same scheme, host and port."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: io.BufferedIOBase,  # type: ignore[override]
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if following:
            following.watch = req.watch  # type: ignore[attr-defined]
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        password = req.unredirected_hdrs.get("Authorization")
        if following and password and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            following.add_unredirected_header("Authorization", password)
        return following


class _Request(urllib.request.Request):
    """A request whose connections are watched."""

    watch: _Watch


class _WatchedConnection(http.client.HTTPConnection):
    """Bounds the time until a connection is there, and lets a watch bound that of the head."""

    def __init__(self, *args: Any, watch: _Watch, **options: Any) -> None:
        super().__init__(*args, **options)
        self._watch = watch

    def connect(self) -> None:
        """Connect, in less time than an answer may take."""
        timeout, self.timeout = self.timeout, min(self.timeout or math.inf, CONNECTION_SECONDS)
        super().connect()
        self.sock.settimeout(timeout)
        self._watch.begin(self.sock)

    def getresponse(self) -> http.client.HTTPResponse:
        """Return the answer, or fail where its head takes too long."""
        response = super().getresponse()
        if not self._watch.head_is_there():  # http.client takes the stream's end for the head's
            response.close()
            raise TimeoutError("the head of the answer took too long")
        return response


class _WatchedSecureConnection(_WatchedConnection, http.client.HTTPSConnection):
    """The same over TLS."""


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: _Request) -> http.client.HTTPResponse:  # type: ignore[override]
        return self.do_open(functools.partial(_WatchedConnection, watch=req.watch), req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: _Request) -> http.client.HTTPResponse:  # type: ignore[override]
        return self.do_open(functools.partial(_WatchedSecureConnection, watch=req.watch), req)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_SameHostRedirects, _HttpHandler, _HttpsHandler)


def _open_http(address: str, start: int, timeout: float, watch: _Watch) -> _Answer:
    request = _request(address)
    request.watch = watch
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = _opener().open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing behind our bytes: they are whole, or of another file
            return _Answer(io.BytesIO(), start, None, True)
        if error.code in ABSENT:
            raise AbsentError(f"is not there (HTTP {error.code})") from error
        if error.code in REFUSED and error.code not in PASSING:
            raise InputError(
                f"{redact(address)}: the server refuses it ({_reason(error)}); "
                "give an address that may be read, with a signature or password that is valid"
            ) from error
        raise
    length = response.headers.get("Content-Length", "")
    # isdecimal takes digits of all scripts, and int() numbers of any length: both are hostile here.
    total = int(length) if length.isascii() and length.isdecimal() and len(length) < 20 else None
    # A server may answer 206 with another range than the one asked for.
    resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(
        f"bytes {start}-"
    )
    first = start if resumed else 0
    return _Answer(
        response, first, None if total is None else first + total, bool(response.chunked)
    )


def _request(address: str) -> _Request:
    """Build a request without user name and password in its address."""
    check_address(address)
    parts = urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    bare = urlunsplit(parts._replace(netloc=host, fragment=""))
    request = _Request(quote(bare, safe=string.punctuation))
    if at:
        token = base64.b64encode(unquote(user if ":" in user else f"{user}:").encode()).decode()
        # Unredirected: urllib would carry a plain header to whatever host it is sent on to.
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _open_fsspec(address: str, start: int) -> _Answer:
    import fsspec.core

    scheme = urlsplit(address).scheme
    try:
        system, path = fsspec.core.url_to_fs(address)
        if scheme in ("file", "local") and system.info(path)["type"] == "other":
            raise FetchError("is not a regular file")
        stream = system.open(path, "rb")
    except (ImportError, ValueError) as error:
        hint = (
            "install the extra 's3': pip install 'portrait-dist[s3]'"
            if scheme == "s3"
            else "use http, https, s3 or a folder"
        )
        raise InputError(
            f"{redact(address)}: {scheme}:// cannot be opened here ({_reason(error)}); {hint}"
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AbsentError("is not there") from error
    except PermissionError as error:
        raise InputError(f"{redact(address)}: may not be read; give credentials for it") from error
    total = getattr(stream, "size", None)
    start = min(start, total) if isinstance(total, int) else start
    stream.seek(start)
    return _Answer(stream, start, total if isinstance(total, int) else None, True)
