"""A proxy that counts: every byte that goes over the wire to the broker and back, and when."""

import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Chunk:
    """Bytes that came at once: the monotonic time in seconds, how many, and whether the device sent them."""

    at: float
    size: int
    sent: bool


class Meter:
    """Between devices and a broker on this machine; a context manager. What passes is encrypted, and not looked at."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._chunks: list[Chunk] = []
        self._heard = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._others: dict[socket.socket, tuple[socket.socket, bool]] = {}
        self._thread = threading.Thread(target=self._serve, name="meter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.close()
        self._thread.join()

    def chunks(self, since: float = 0.0) -> list[Chunk]:
        """What has passed since a time of the monotonic clock."""
        with self._heard:
            return [chunk for chunk in self._chunks if chunk.at >= since]

    def last_sent(self, since: float, until: float, least: int) -> float:
        """When the device last sent `least` bytes or more at once in this span of the monotonic clock.

        Raises:
            LookupError: it did not.
        """
        with self._heard:
            for chunk in reversed(self._chunks):
                if chunk.sent and chunk.size >= least and since <= chunk.at <= until:
                    return chunk.at
        raise LookupError(f"nothing of {least} bytes was sent")

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._close()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        device, _ = self._listener.accept()
        try:
            broker = socket.create_connection(("127.0.0.1", self._port), 5)
        except OSError:
            device.close()
            return
        for one, other, sent in ((device, broker, True), (broker, device, False)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._others[one] = (other, sent)
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: socket.socket) -> None:
        if one not in self._others:
            return
        other, sent = self._others[one]
        data = b""
        with suppress(OSError):
            data = one.recv(65536)
        if data:
            with self._heard:
                self._chunks.append(Chunk(time.monotonic(), len(data), sent))
            with suppress(OSError):
                other.sendall(data)
                return
        for end in (one, other):
            self._others.pop(end, None)
            with suppress(KeyError, ValueError):
                self._selector.unregister(end)
            end.close()

    def _close(self) -> None:
        for one in (*self._others, self._listener, self._woken):
            one.close()
        self._selector.close()
