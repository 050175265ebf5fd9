"""An HTTP server with one file, that knows ranges as S3 does, and can be told to misbehave request by request."""

import contextlib
import hashlib
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Store:
    """The file, what was asked for, and what shall go wrong: one fault per request, then none."""

    content: bytes
    faults: deque["Fault"] = field(default_factory=deque)
    always: "Fault | None" = None
    asked: list[tuple[str | None, str | None]] = field(default_factory=list)
    sent: int = 0
    closing: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


class Request(BaseHTTPRequestHandler):
    """One request; `start` and `end` are what it asked for, as far as the server minds."""

    protocol_version = "HTTP/1.1"
    server: "Server"
    start = 0
    end = 0
    partial = False

    def do_GET(self) -> None:
        store = self.store
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        store.asked.append((wanted, condition))
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        self.partial = match is not None and condition in {None, store.etag}
        self.start, self.end = (int(match[1]), int(match[2]) + 1) if match and self.partial else (0, len(store.content))
        self.end = min(self.end, len(store.content))
        self.close_connection = True
        fault = store.faults.popleft() if store.faults else store.always
        (fault or honest)(self)

    @property
    def store(self) -> Store:
        return self.server.store

    def head(self, status: int | None = None, **headers: str | None) -> None:
        """Status and headers; given ones replace what would be right, None leaves one out."""
        right: dict[str, str | None] = {"ETag": self.store.etag, "Content-Length": str(self.end - self.start)}
        if self.partial:
            right["Content-Range"] = f"bytes {self.start}-{self.end - 1}/{len(self.store.content)}"
        right |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.send_response(status or (206 if self.partial else 200))
        for name, value in right.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def body(self, data: bytes) -> None:
        self.store.sent += len(data)  # first: whoever has it all may look at once
        self.wfile.write(data)

    @property
    def data(self) -> bytes:
        return self.store.content[self.start : self.end]

    def reset(self) -> None:
        """End the connection with an RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_args: Any) -> None:
        pass


Fault = Callable[[Request], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, store: Store) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.store = store

    def handle_error(self, *_args: Any) -> None:
        """Clients go away; that is what they are here for."""


@contextlib.contextmanager
def serve(content: bytes) -> Iterator[Store]:
    """A server with this content; its URL is presigned, so to say."""
    store = Store(content)
    server = Server(store)
    store.url = f"http://127.0.0.1:{server.server_port}/agent/release.tar.zst?X-Amz-Signature=5ec2e7"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield store
    finally:
        store.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


# --- what can happen ----------------------------------------------------------------------------------------------


def honest(request: Request) -> None:
    request.head()
    request.body(request.data)


def in_chunks(request: Request) -> None:
    """Transfer-Encoding: chunked."""
    request.head(Content_Length=None, Transfer_Encoding="chunked")
    for start in range(0, len(request.data), 10_000):
        piece = request.data[start : start + 10_000]
        request.body(b"%x\r\n%s\r\n" % (len(piece), piece))
    request.body(b"0\r\n\r\n")


def ignores_ranges(request: Request) -> None:
    request.partial, request.start, request.end = False, 0, len(request.store.content)
    honest(request)


def cut_after(count: int) -> Fault:
    """The connection is reset after so many bytes."""

    def fault(request: Request) -> None:
        request.head()
        request.body(request.data[:count])
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_WR)

    return fault


def resets(request: Request) -> None:
    request.reset()


def answers(status: int, **headers: str | None) -> Fault:
    def fault(request: Request) -> None:
        request.partial = False
        request.head(status, Content_Length="4", **headers)
        request.body(b"no.\n")

    return fault


def heads(status: int | None = None, **headers: str | None) -> Fault:
    """The right body under the wrong head."""

    def fault(request: Request) -> None:
        request.head(status, **headers)
        request.body(request.data)

    return fault


def spoils(position: int) -> Fault:
    """One byte is wrong, if it is asked for."""

    def fault(request: Request) -> None:
        request.head()
        data = bytearray(request.data)
        if request.start <= position < request.end:
            data[position - request.start] ^= 1
        request.body(bytes(data))

    return fault


def never_ends(request: Request) -> None:
    request.head(Content_Length=None)
    request.body(request.data)
    while not request.store.closing.is_set():
        request.body(bytes(10_000))


def trickles(request: Request) -> None:
    request.head()
    for byte in request.data:
        if request.store.closing.wait(0.005):
            return
        request.body(bytes([byte]))


def stalls_after(count: int) -> Fault:
    def fault(request: Request) -> None:
        request.head()
        request.body(request.data[:count])
        request.store.closing.wait(20)

    return fault


def says_nothing(request: Request) -> None:
    request.store.closing.wait(20)


def talks_nonsense(request: Request) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


def garbles_headers(request: Request) -> None:
    request.wfile.write(b"HTTP/1.1 500 Oh\r\nno colon here\r\nContent-Length: 0\r\n\r\n")


def captive_portal(request: Request) -> None:
    request.partial = False
    page = b"<html>Please log in</html>"
    request.head(200, Content_Length=str(len(page)), ETag=None, Content_Type="text/html")
    request.body(page)
