"""Fetches a signed payload over HTTP, in spite of everything: broken links, reboots, expired URLs, wrong bytes.

The payload grows in a `.part` file. Each of its chunks (1 MiB) has a signed sha256, and counts as soon as it was
checked and is durable; a small JSON beside the file says how many do. After a restart the last of those is checked
again (and all, if that one is not right), the bytes behind them are taken up, and the rest is asked for with `Range`.
Before the file is handed out, all of it is read back from the disk and checked once more.

The server is not trusted with anything: nothing is written beyond the signed size, an answer that does not begin where
it was asked to is dropped, a chunk that is not what was signed is fetched again a bounded number of times, and so is a
connection that gives nothing or next to nothing. A presigned URL is a secret: no message holds more than its host.

RFC 9110: 13.1.5 If-Range, 14.2 Range, 14.4 Content-Range, 15.3.7 Partial Content. S3 honours all of them.
"""

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from firmware_agent import backoff, files
from firmware_agent.digests import sha256
from firmware_agent.update import BadPayload, Cancelled, DownloadFault, UrlExpired, disk_fault

if TYPE_CHECKING:
    import hashlib
    import ssl

    import urllib3

_READ: Final = 64 << 10

#: An attempt that brought this much was worth it: failures are counted from zero again.
_WORTH_BYTES: Final = 64 << 10

#: S3 answers 400 when the credentials that signed the URL have expired, 403 when the URL itself has.
_EXPIRED: Final = frozenset({400, 401, 403, 410})

_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_STRONG_ETAG: Final = re.compile(r'"[\x21\x23-\x7e]{1,200}"')


@dataclass(frozen=True)
class Payload:
    """What was signed about a file: its size in bytes, and the sha256 (hex) of each of its chunks."""

    name: str
    size: int
    chunks: tuple[str, ...]
    chunk_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.size <= 0 or self.chunk_bytes <= 0 or len(self.chunks) != -(-self.size // self.chunk_bytes):
            raise ValueError(f"{len(self.chunks)} chunks of {self.chunk_bytes} bytes are not {self.size} bytes")

    @property
    def key(self) -> str:
        """Tells this payload from any other."""
        words = "\n".join([str(self.size), str(self.chunk_bytes), *self.chunks])
        return sha256(words.encode()).hexdigest()

    def start(self, chunk: int) -> int:
        """Where a chunk begins; of the chunk behind the last, where the payload ends."""
        return min(chunk * self.chunk_bytes, self.size)


@dataclass(frozen=True)
class Limits:
    """How long and how often.

    Attributes:
        attempts: connections in a row that bring nothing worth while, before the download fails.
        chunk_attempts: how often one chunk may arrive wrong.
        connect_seconds: for the connection.
        read_seconds: for the next byte.
        slow_seconds: within this time ...
        slow_bytes: ... at least this much must come, or the connection is given up.
    """

    attempts: int = 8
    chunk_attempts: int = 3
    connect_seconds: float = 15.0
    read_seconds: float = 30.0
    slow_seconds: float = 60.0
    slow_bytes: int = 16 << 10


class _Broken(Exception):
    """This attempt is over, the next may do better."""


class _BadChunk(Exception):
    """A chunk is not what was signed; it is not in the file any more."""

    def __init__(self, chunk: int) -> None:
        super().__init__(f"chunk {chunk} is not what was signed")
        self.chunk = chunk


# --- the disk -----------------------------------------------------------------------------------------------------


class Part:
    """The payload as far as it has come.

    Attributes:
        verified: how many chunks are checked and durable.
        position: bytes in the file: the verified chunks, and a part of the next.
        etag: the entity tag of what the server sends, or None.
    """

    def __init__(self, payload: Payload, directory: Path) -> None:
        self.payload = payload
        self.path = directory / f"{payload.key[:16]}.part"
        self._sidecar = directory / f"{payload.key[:16]}.json"
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._sha256 = sha256()
        self.verified = 0
        self.position = 0
        self.etag: str | None = None
        self._take_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    @property
    def complete(self) -> bool:
        """Whether all chunks are there."""
        return self.verified == len(self.payload.chunks)

    def write(self, data: bytes) -> None:
        """Append what came; what is beyond the signed size is dropped.

        Raises:
            _BadChunk: with this, a chunk is there, and is wrong.
            OSError: the disk is full.
        """
        view = memoryview(data)
        while view and not self.complete:
            end = self.payload.start(self.verified + 1)
            piece, view = view[: end - self.position], view[end - self.position :]
            self._sha256.update(piece)
            while piece:
                count = os.pwrite(self._handle, piece, self.position)
                self.position += count
                piece = piece[count:]
            if self.position == end:
                self._finish_chunk()

    def drop_tail(self) -> None:
        """Forget the bytes behind the last verified chunk."""
        self.position = self.payload.start(self.verified)
        self._sha256 = sha256()
        os.ftruncate(self._handle, self.position)

    def check_all(self) -> None:
        """Read everything back from the disk.

        Raises:
            _BadChunk: the first that is wrong; it is dropped, with all behind it.
        """
        for chunk in range(self.verified):
            if not self._is_right(chunk):
                self.verified = chunk
                self.drop_tail()
                self._save()
                raise _BadChunk(chunk)

    def _finish_chunk(self) -> None:
        chunk = self.verified
        if self._sha256.hexdigest() != self.payload.chunks[chunk]:
            self.drop_tail()
            raise _BadChunk(chunk)
        os.fsync(self._handle)
        self.verified += 1
        self._sha256 = sha256()
        self._save()

    def _save(self) -> None:
        value = {"format": 1, "payload": self.payload.key, "verified": self.verified, "etag": self.etag}
        files.write_atomic(self._sidecar, json.dumps(value).encode(), mode=0o600)

    def _take_up(self) -> None:
        there = os.fstat(self._handle).st_size
        told, self.etag = self._told()
        while told and self.payload.start(told) > there:
            told -= 1
        if told and not self._is_right(told - 1):
            told = 0
        self.verified = told
        while not self.complete and self.payload.start(self.verified + 1) <= there and self._is_right(self.verified):
            self.verified += 1
        start = self.payload.start(self.verified)
        if self.complete or there >= self.payload.start(self.verified + 1):
            self.drop_tail()
        else:
            self.position = there
            self._sha256 = self._hash(start, there)

    def _told(self) -> tuple[int, str | None]:
        """What the sidecar says, if it is about this payload."""
        try:
            value: Any = files.read_json(self._sidecar)
        except (OSError, ValueError):
            return 0, None
        if not isinstance(value, dict) or value.get("format") != 1 or value.get("payload") != self.payload.key:
            return 0, None
        verified, etag = value.get("verified"), value.get("etag")
        if type(verified) is not int or not 0 <= verified <= len(self.payload.chunks):
            return 0, None
        return verified, strong_etag(etag)

    def _is_right(self, chunk: int) -> bool:
        start, end = self.payload.start(chunk), self.payload.start(chunk + 1)
        return self._hash(start, end).hexdigest() == self.payload.chunks[chunk]

    def _hash(self, start: int, end: int) -> "hashlib._Hash":
        hashed = sha256()
        while start < end and (piece := os.pread(self._handle, min(_READ, end - start), start)):
            hashed.update(piece)
            start += len(piece)
        return hashed


# --- the network --------------------------------------------------------------------------------------------------


def strong_etag(value: object) -> str | None:
    """An entity tag that `If-Range` may carry: strong (RFC 9110, 13.1.5), and of sane length."""
    return value if isinstance(value, str) and _STRONG_ETAG.fullmatch(value) else None


def download(
    payload: Payload,
    url: str,
    directory: Path,
    *,
    progress: Callable[[int, int], None] = lambda _have, _size: None,
    cancelled: Callable[[], bool] = lambda: False,
    limits: Limits | None = None,
    context: "ssl.SSLContext | None" = None,
    delay: Callable[[int], float] = backoff.delay,
) -> Path:
    """Fetch `payload`, going on where an earlier call (or process) stopped.

    Args:
        payload: what was signed.
        url: http or https; may be presigned.
        directory: where the part file lives; there is one per payload, and the caller removes it in the end.
        progress: is told the bytes that are there, and the size, now and then.
        cancelled: asked often; if it says yes, the download stops.
        limits: how long and how often.
        context: which certificates to trust, by default the system's.
        delay: seconds to wait after so many failures in a row.

    Returns:
        The file, complete and checked.

    Raises:
        UrlExpired: call again with a fresh URL.
        BadPayload: a chunk was wrong too often.
        DownloadFault: the server does not give it.
        Cancelled: `cancelled` said so.
        NoSpace: the disk is full.
    """
    limits = limits or Limits()
    try:
        with Part(payload, directory) as part, _Source(url, limits, context) as source:
            _fetch_all(part, source, progress, cancelled, limits, delay)
            return part.path
    except OSError as error:
        raise disk_fault(error, f"write {payload.name}", DownloadFault) from error


def _fetch_all(
    part: Part,
    source: "_Source",
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
    limits: Limits,
    delay: Callable[[int], float],
) -> None:
    name, failures = part.payload.name, 0
    wrong: Counter[int] = Counter()
    while True:
        gained = 0
        try:
            if part.complete:
                part.check_all()
                return
            with closing(source.read_from(part, cancelled)) as pieces:
                for data in pieces:
                    part.write(data)
                    gained += len(data)
                    progress(part.position, part.payload.size)
            continue
        except _Broken as error:
            words = str(error)
        except _BadChunk as error:
            words = str(error)
            wrong[error.chunk] += 1
            if wrong[error.chunk] >= limits.chunk_attempts:
                raise BadPayload(f"{name}: {words} (from {source.host}, {wrong[error.chunk]} times)") from None
        failures = 0 if gained >= _WORTH_BYTES else failures + 1
        if failures >= limits.attempts:
            raise DownloadFault(f"{name}: {words} ({source.host}, {failures} times in a row)")
        _wait(delay(failures), cancelled)


def _wait(seconds: float, cancelled: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        _stop_if(cancelled)
        time.sleep(min(left, 0.2))


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("the download was stopped")


class _Source:
    """Where the payload comes from."""

    def __init__(self, url: str, limits: Limits, context: "ssl.SSLContext | None") -> None:
        import urllib3  # noqa: PLC0415 - only while an update runs

        logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it logs URLs, and these are secrets
        self._url = url
        self._limits = limits
        try:
            parts = urlsplit(url)
            self.host = parts.hostname or ""
        except ValueError:
            raise DownloadFault("the URL is malformed") from None
        if parts.scheme not in {"http", "https"} or not self.host:
            raise DownloadFault("the URL is neither http nor https, or names no host")
        self._pool = urllib3.PoolManager(ssl_context=context, retries=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.clear()

    def read_from(self, part: Part, cancelled: Callable[[], bool]) -> Generator[bytes, None, None]:
        """One attempt: the bytes from `part.position` on, until there are enough.

        Raises:
            _Broken: it ended before its time.
            UrlExpired, DownloadFault: there is no use in trying this URL again.
            Cancelled: the caller stopped it.
        """
        import http.client  # noqa: PLC0415 - two megabytes of TLS, only while an update runs

        import urllib3  # noqa: PLC0415

        _stop_if(cancelled)
        try:
            response = self._request(part)
        except urllib3.exceptions.LocationValueError:
            raise DownloadFault("the URL is malformed") from None
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise _Broken(_words(error)) from None
        try:
            skip = self._judge(response, part)
            needed = part.payload.size - part.position
            pace = _Pace(self._limits)
            while needed:
                _stop_if(cancelled)
                data: bytes = response.read1(_READ, decode_content=False)
                if not data:
                    raise _Broken(f"the body ended {needed} bytes early")
                pace.came(len(data))
                skipped, data = data[:skip], data[skip:]
                skip -= len(skipped)
                data = data[:needed]
                needed -= len(data)
                if data:
                    yield data
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise _Broken(_words(error)) from None
        finally:
            response.close()

    def _request(self, part: Part) -> "urllib3.BaseHTTPResponse":
        import urllib3  # noqa: PLC0415

        headers = {"Accept-Encoding": "identity", "User-Agent": "picket-agent"}
        if part.position:
            headers["Range"] = f"bytes={part.position}-{part.payload.size - 1}"
            if part.etag:
                headers["If-Range"] = part.etag
        timeout = urllib3.Timeout(connect=self._limits.connect_seconds, read=self._limits.read_seconds)
        return self._pool.request(
            "GET", self._url, headers=headers, timeout=timeout, redirect=False, preload_content=False
        )

    def _judge(self, response: "urllib3.BaseHTTPResponse", part: Part) -> int:
        """Whether the answer is what was asked for; returns how many of its bytes are to be skipped."""
        status, headers, size = response.status, response.headers, part.payload.size
        if status in _EXPIRED:
            raise UrlExpired(f"{part.payload.name}: {self.host} answers {status}")
        if status == HTTPStatus.NOT_FOUND:
            raise DownloadFault(f"{part.payload.name}: {self.host} does not have it")
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.etag = None
            part.drop_tail()
            raise _Broken("the server has less than was signed")
        if status not in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT}:
            raise _Broken(f"the server answers {status}")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise _Broken("the server sends it encoded")
        part.etag = strong_etag(headers.get("ETag"))
        if status == HTTPStatus.OK:
            part.drop_tail()
            if headers.get("Content-Length", str(size)) != str(size):
                raise _Broken("the server has another size than was signed")
            return part.position
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if not match or int(match[1]) != part.position or int(match[2]) >= size or match[3] not in {str(size), "*"}:
            raise _Broken("the server sends another range than was asked for")
        return 0


class _Pace:
    """Gives a connection up that is alive, but hardly."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._since = time.monotonic()
        self._bytes = 0

    def came(self, count: int) -> None:
        self._bytes += count
        now = time.monotonic()
        if now - self._since >= self._limits.slow_seconds:
            if self._bytes < self._limits.slow_bytes:
                raise _Broken(f"only {self._bytes} bytes came in {now - self._since:.0f} s")
            self._since, self._bytes = now, 0


def _words(error: BaseException) -> str:
    """What happened, without the error's own text: that may hold the URL."""
    causes = [error, error.__cause__, error.__context__, *error.args]
    reasons = [reason for cause in causes if isinstance(reason := getattr(cause, "strerror", None), str)]
    return ": ".join([type(error).__name__, *reasons[:1]])
