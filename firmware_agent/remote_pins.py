"""GPIO lines that another process holds, over a Unix socket: a carrier's I/O daemon, or the simulated board.

One connection is one line, held until it is closed. All is text in lines:

    server:  pinctrl-bcm2835        the chip's label, so that the line is chosen as it is on a chip of the kernel's
    agent:   17                     the line that it wants
    server:  0                      the level now, and again after each change: 1, 0, 1...
             busy | none            instead: somebody else holds the line, or there is no such line; then it hangs up

An edge costs one write and one read on a local socket, some tens of microseconds. A server that goes away takes the
sensor with it: the level can then not be read, which is a fault and not "no motion", and the line is asked for again
until the server is back.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Final

from firmware_agent.errors import PirFault
from firmware_agent.pins import Pir, choose_chip

_log = logging.getLogger(__name__)

_ANSWER_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 0.5
_LONGEST: Final = 256


class RemotePins:
    """The lines behind a Unix socket.

    Args:
        server: the socket's path.
        lines: chip label to line, as in `[pir.lines]`.
        tamper: chip label to line of the case's loop, as in `[tamper.lines]`; empty where there is none.
    """

    def __init__(
        self, server: Path, lines: Mapping[str, int], tamper: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self._server = server
        self._lines = lines
        self._tamper = tamper

    def pir(self) -> AbstractContextManager[Pir]:
        """The sensor's line.

        Raises:
            PirFault: nobody serves it, or somebody else holds it.
        """
        return _held(self._server, self._lines)

    def tamper(self) -> AbstractContextManager[Pir | None]:
        """The case's loop, if one is configured.

        Raises:
            PirFault: nobody serves it, or somebody else holds it.
        """
        return _held(self._server, self._tamper) if self._tamper else nullcontext()


@contextmanager
def _held(server: Path, lines: Mapping[str, int]) -> Iterator["_Line"]:
    line = _Line(server, lines)
    try:
        yield line
    finally:
        line.close()


class _Wire:
    """One connection: the line is ours, and its level at that moment is known."""

    def __init__(self, server: Path, lines: Mapping[str, int]) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._rest = b""
        try:
            self._socket.settimeout(_ANSWER_SECONDS)
            self._socket.connect(str(server))
            _, line = choose_chip({0: self._word()}, lines)
            self._socket.sendall(b"%d\n" % line)
            self.level = self.next()
            self._socket.settimeout(None)
        except OSError as error:
            self.close()
            raise PirFault(f"the GPIO lines at {server} cannot be used: {error}") from error
        except BaseException:
            self.close()
            raise

    def next(self) -> bool:
        """The next level.

        Raises:
            PirFault: the line is not to be had.
            OSError: the server is gone.
        """
        word = self._word()
        if word not in {"0", "1"}:
            raise PirFault(f"the GPIO line cannot be used: {word or 'the server hung up'}")
        return word == "1"

    def _word(self) -> str:
        while b"\n" not in self._rest:
            part = self._socket.recv(_LONGEST)
            if not part:
                raise ConnectionResetError("the server hung up")
            self._rest += part
            if len(self._rest) > _LONGEST * 64:
                raise ConnectionAbortedError("the server does not speak in lines")
        word, _, self._rest = self._rest.partition(b"\n")
        return word.decode(errors="replace")

    def shut(self) -> None:
        """Hang up while another thread waits for the next level; it gets an `OSError`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the line."""
        self._socket.close()


class _Line:
    """A line seen as a `Pir`, over as many connections as it takes."""

    def __init__(self, server: Path, lines: Mapping[str, int]) -> None:
        self._server = server
        self._lines = lines
        self._wire: _Wire | None = _Wire(server, lines)
        self._level = self._wire.level
        self._edge: Callable[[bool], None] = lambda _rising: None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="picket-pins", daemon=True)
        self._thread.start()

    def level(self) -> int:
        """1 while the line is high.

        Raises:
            PirFault: the server is gone.
        """
        if self._wire is None:
            raise PirFault(f"the GPIO lines at {self._server} are gone")
        return int(self._level)

    def watch(self, edge: Callable[[bool], None]) -> None:
        """Call `edge` with the new level at each change, from the thread that follows the line."""
        self._edge = edge

    def close(self) -> None:
        """Let go of the line."""
        self._over.set()
        with self._lock:
            if self._wire is not None:
                self._wire.shut()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.is_set():
            wire = self._wire
            if wire is None:
                self._again()
                continue
            try:
                self._take(wire.next())
            except (OSError, PirFault) as error:
                with self._lock:
                    self._wire = None
                    wire.close()
                if not self._over.is_set():
                    _log.error("the GPIO lines at %s are gone: %s", self._server, error)
        if self._wire is not None:
            self._wire.close()

    def _again(self) -> None:
        if self._over.wait(_RETRY_SECONDS):
            return
        with contextlib.suppress(PirFault):
            wire = _Wire(self._server, self._lines)
            with self._lock:
                self._wire = wire
            if self._over.is_set():
                wire.shut()
            self._take(wire.level)

    def _take(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._edge(level)
