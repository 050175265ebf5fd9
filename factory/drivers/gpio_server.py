"""The simulated board's GPIO chip: lines that the hardware drives and that processes read over a Unix socket.

It speaks the protocol of firmware_agent/remote_pins.py. As on a chip of the kernel's, a line has one holder; it is free
again when the holder's connection closes, which the end of a process does too.
"""

import selectors
import socket
import threading
from contextlib import suppress
from pathlib import Path

_LONGEST = 64


class GpioServer:
    """A chip with a label and some lines, all low at first."""

    def __init__(self, path: Path, label: str, lines: frozenset[int]) -> None:
        self._label = label
        self._levels = dict.fromkeys(lines, False)
        self._holders: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="gpio", daemon=True)
        self._thread.start()

    def drive(self, line: int, *, high: bool) -> None:
        """Set a line's level; its holder is told if that is a change."""
        with self._lock:
            if self._levels[line] is high:
                return
            self._levels[line] = high
            if (holder := self._holders.get(line)) is not None:
                _send(holder, b"%d\n" % high)

    def held(self, line: int) -> bool:
        """Whether somebody holds a line now."""
        with self._lock:
            return line in self._holders

    def close(self) -> None:
        """Hang up on everybody."""
        self._wake.close()
        self._thread.join()

    # --- the serving thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._hang_up()
                    return
                if key.fileobj is self._listener:
                    self._greet()
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)

    def _hang_up(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()

    def _greet(self) -> None:
        connection, _ = self._listener.accept()
        self._selector.register(connection, selectors.EVENT_READ)
        _send(connection, f"{self._label}\n".encode())

    def _hear(self, connection: socket.socket) -> None:
        try:
            asked = connection.recv(_LONGEST)
        except OSError:
            asked = b""
        if not asked:
            self._drop(connection)
            return
        with self._lock:
            line = int(asked) if asked.strip().isdigit() else -1
            if line not in self._levels:
                _send(connection, b"none\n")
            elif line in self._holders and not _gone(self._holders[line]):
                _send(connection, b"busy\n")
            else:
                self._holders[line] = connection
                _send(connection, b"%d\n" % self._levels[line])
                return
        self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        with self._lock:
            self._holders = {line: holder for line, holder in self._holders.items() if holder is not connection}
        self._selector.unregister(connection)
        connection.close()


def _send(connection: socket.socket, words: bytes) -> None:
    with suppress(OSError):  # whoever held the line is gone
        connection.sendall(words)


def _gone(connection: socket.socket) -> bool:
    """Whether the other end has hung up, although we have not come to notice it."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
