"""Small files over HTTP, or from a mirror on a disk, for python-tuf: bounded in size and in time, all of it.

Imports python-tuf and urllib3 (8 MB of memory), so import this only where metadata is about to be fetched.

A server that sends one byte every few seconds never runs into a socket's time-out. So the clock runs over the whole
transfer, name look-up and headers included, and at its end the connection is cut from outside.
"""

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

import urllib3
from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    SlowRetrievalError,
)
from tuf.ngclient import FetcherInterface
from urllib3.connection import HTTPConnection, HTTPSConnection

_PIECE: Final = 16 << 10
_GAP_SECONDS: Final = 20.0


def is_near(host: str) -> bool:
    """Whether a host is this machine or on a private network, where plain HTTP may do."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_private


def check_url(url: str, *, allow_files: bool) -> SplitResult:
    """A base URL that may be asked, in its parts.

    Raises:
        DownloadError: plain HTTP to the wide world, a scheme that we do not speak, or parts that no base has.
    """
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port != 0
    except ValueError as error:
        raise DownloadError(f"the URL makes no sense ({error})") from None
    if parts.query or parts.fragment or parts.username or parts.password or not port_is_fine:
        raise DownloadError("the URL of metadata is scheme, host and path only")
    if parts.scheme == "file" and allow_files and not parts.netloc:
        return parts
    if parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and is_near(parts.hostname))):
        return parts
    raise DownloadError(f"metadata is fetched by https, not from {parts.scheme}://{parts.hostname or ''}")


class Fetcher(FetcherInterface):
    """Fetches metadata under one base URL, over one connection that is kept between files.

    Args:
        base: where the metadata are.
        authorities: PEM certificates that the server may chain to, beside the system's.
        allow_files: whether `file://` is a way, too.
        seconds: the longest that one file may take.

    Raises:
        DownloadError: the base is no URL to ask.
    """

    def __init__(self, base: str, *, authorities: str = "", allow_files: bool = False, seconds: float = 60.0) -> None:
        parts = check_url(base, allow_files=allow_files)
        self._seconds = seconds
        self._sockets: list[socket.socket] = []
        self._pool = None if parts.scheme == "file" else self._open_pool(parts, authorities)

    def close(self) -> None:
        """Give the connection up."""
        if self._pool is not None:
            self._pool.close()
        while self._sockets:
            self._sockets.pop().close()

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """The content at a URL; python-tuf's own way takes a detour through a temporary file.

        Raises:
            DownloadError: nobody answers, slower than allowed, longer than allowed, or with an HTTP error.
        """
        late = threading.Event()
        watch = threading.Timer(self._seconds, self._cut, [late])
        watch.daemon = True
        watch.start()
        content = bytearray()
        try:
            for piece in self._fetch(url):
                content += piece
                if len(content) > max_length:
                    raise DownloadLengthMismatchError(f"more than the {max_length} bytes that metadata may have")
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if late.is_set():
                raise SlowRetrievalError(f"not done after {self._seconds:g} s") from error
            raise DownloadError(_cause(error)) from error
        finally:
            watch.cancel()
        if late.is_set():
            raise SlowRetrievalError(f"not done after {self._seconds:g} s")
        return bytes(content)

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._read_file(url) if self._pool is None else self._request(url)

    def _read_file(self, url: str) -> Iterator[bytes]:
        path = Path(unquote(urlsplit(url).path))
        if not path.is_file():
            raise DownloadHTTPError(f"{path.name} is not there", 404)
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    def _request(self, url: str) -> Iterator[bytes]:
        assert self._pool is not None  # noqa: S101 - for the type checker; _fetch looked
        response = self._pool.request(
            "GET",
            urlsplit(url).path,
            headers={"Accept-Encoding": "gzip", "User-Agent": "picket-agent"},
            preload_content=False,
            redirect=False,
        )
        try:
            if response.status != 200:
                raise DownloadHTTPError(f"HTTP status {response.status}", response.status)
            yield from response.stream(_PIECE, decode_content=True)
        finally:
            response.drain_conn() if response.status in {403, 404} else response.release_conn()

    def _open_pool(self, parts: SplitResult, authorities: str) -> urllib3.HTTPConnectionPool:
        """A pool of one connection, whose sockets can be cut while somebody waits for them."""
        keep = self._sockets.append

        class Plain(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                made = super()._new_conn()
                keep(made.dup())
                return made

        class Secure(HTTPSConnection):
            def _new_conn(self) -> socket.socket:
                made = super()._new_conn()
                keep(made.dup())
                return made

        options: dict[str, Any] = {
            "port": parts.port,
            "timeout": urllib3.Timeout(connect=min(_GAP_SECONDS, self._seconds), read=min(_GAP_SECONDS, self._seconds)),
            "retries": False,
            "maxsize": 1,
        }
        pool: urllib3.HTTPConnectionPool
        if parts.scheme == "https":
            context = ssl.create_default_context()
            if authorities:
                context.load_verify_locations(cadata=authorities)
            pool = urllib3.HTTPSConnectionPool(parts.hostname or "", ssl_context=context, **options)
            pool.ConnectionCls = Secure
        else:
            pool = urllib3.HTTPConnectionPool(parts.hostname or "", **options)
            pool.ConnectionCls = Plain
        return pool

    def _cut(self, late: threading.Event) -> None:
        """End whatever the connection waits for; a duplicate of the socket reaches it even inside TLS."""
        late.set()
        for made in self._sockets:
            try:
                made.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is closed already


def _cause(error: Exception) -> str:
    """What went wrong, in words; urllib3's own text begins with an object's address."""
    inner = getattr(error, "reason", None) or error
    text = str(inner).rpartition(">: ")[2] or type(inner).__name__
    return text[:200]
