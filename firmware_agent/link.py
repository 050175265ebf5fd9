"""The link to the cloud: the one owner of the connection and of the client id, and the only one that retries.

Hello at each connect, then the spool in order, each message deleted on its PUBACK.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Literal

from firmware_agent import backoff, keys, messages, topics
from firmware_agent.board import Board
from firmware_agent.identity import Identity
from firmware_agent.mqtt import Change, Connection, Down, Failed, NotDeliveredError, Stopped, Up
from firmware_agent.settings import Settings
from firmware_agent.spool import Spool, Spooled
from firmware_agent.systemd import Systemd
from firmware_agent.timekeeping import Timekeeper

_log = logging.getLogger(__name__)

_TICK_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 5.0
_ACK_SECONDS: Final = 30.0
_STEADY_SECONDS: Final = 30.0  # a link that lasted so long was no failure
_WINDOW: Final = 16  # messages in flight; AWS IoT takes 100 a second on one connection


@dataclass(frozen=True)
class _Wake:
    """Something waits in the spool, or the end has come: look. An urgent one does not wait for the next try's time."""

    urgent: bool = False


class Link:
    """Owns the connection: hello at each connect, then the spool in order, each message deleted on its PUBACK."""

    def __init__(
        self,
        settings: Settings,
        board: Board,
        found: Identity,
        key: keys.DeviceKey,
        spool: Spool,
        notify: Systemd,
    ) -> None:
        self._settings = settings
        self._board = board
        self._identity = found
        self._key = key
        self._spool = spool
        self._inbox: queue.SimpleQueue[Change | _Wake] = queue.SimpleQueue()
        self._notify = notify
        #: Whether the time can be right; told the time by the cloud.
        self.timekeeper = Timekeeper(settings.paths, lambda: self._identity.leaf)
        self._beat: Callable[[], None] = lambda: None
        self._stop = threading.Event()
        self._link: Literal["down", "connecting", "up"] = "down"
        self._failures = 0
        self._connect_at = 0.0
        self._up_since = 0.0
        self._greeted = False
        self._resume_at = 0.0

    def wake(self, *, urgent: bool = False) -> None:
        """Look into the spool now; `urgent` also shortens the wait for the next attempt to connect."""
        self._inbox.put(_Wake(urgent))

    def run(self, stop: threading.Event, beat: Callable[[], None]) -> None:
        """Until `stop`; `beat` is called at least every few seconds."""
        self._stop, self._beat = stop, beat
        connection = Connection(
            self._identity,
            self._key,
            keep_alive_seconds=self._settings.mqtt.keep_alive_seconds,
            on_change=self._inbox.put,
        )
        try:
            while not stop.is_set():
                beat()
                self.timekeeper.tick()
                if self._link == "down" and time.monotonic() >= self._connect_at and self._clock_may_be_right():
                    self._link = "connecting"
                    connection.connect()
                self._take_in(connection)
                if self._link == "up" and time.monotonic() >= self._resume_at:
                    self._deliver(connection)
        finally:
            connection.stop()

    def _clock_may_be_right(self) -> bool:
        """Whether TLS can work; when it cannot, the next look at the clock is a moment later."""
        wrong = self.timekeeper.wrong(self._board.clock().unix)
        if wrong is None:
            return True
        self._notify.status(f"offline: {wrong}")
        self._connect_at = time.monotonic() + _TICK_SECONDS
        return False

    def _take_in(self, connection: Connection) -> None:
        """Wait for the next change of the link or for something to do, then take in all there is."""
        now = time.monotonic()
        due = self._connect_at if self._link == "down" else self._resume_at
        try:
            change = self._inbox.get(timeout=min(_TICK_SECONDS, due - now) if due > now else _TICK_SECONDS)
            while True:
                self._note(change, connection)
                change = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _note(self, change: Change | _Wake, connection: Connection) -> None:
        match change:
            case Up():
                self._link, self._greeted, self._resume_at = "up", False, 0.0
                self._up_since = time.monotonic()
                self._notify.status(f"connected to {self._identity.host}")
            case Down(detail):
                self._retry(detail, connection)
            case Failed(outcome, detail):
                self._retry(f"{outcome}, {detail}", connection)
            case _Wake(urgent=True):
                # Motion: try at once, though not more than once a second, which is what AWS IoT allows.
                self._connect_at = min(self._connect_at, time.monotonic() + backoff.FIRST_SECONDS)
            case Stopped() | _Wake():
                pass

    def _retry(self, reason: str, connection: Connection) -> None:
        """After a failed attempt or a lost link: let go, and set the time of the next attempt."""
        now = time.monotonic()
        steady = self._link == "up" and now - self._up_since >= _STEADY_SECONDS
        wait = backoff.delay(0 if steady else self._failures)
        self._failures = 1 if steady else self._failures + 1
        self._link, self._connect_at = "down", now + wait
        self._notify.status(f"offline: {reason}")
        connection.stop()

    def _deliver(self, connection: Connection) -> None:
        """Send hello and everything in the spool; on the first refusal leave the rest for later."""
        if not self._greeted:
            hello = connection.publish(self._topic(topics.HELLO), self._hello())
            self._greeted = self._acknowledged(hello)
        while self._greeted and not self._stop.is_set():
            batch = self._spool.oldest(_WINDOW)
            if not batch:
                return
            if not self._deliver_batch(connection, batch):
                break
        self._resume_at = time.monotonic() + _RETRY_SECONDS

    def _deliver_batch(self, connection: Connection, batch: list[Spooled]) -> bool:
        """Whether all were acknowledged. What follows a refused one is sent again: late, but in order."""
        flying = [(message, connection.publish(self._topic(message.kind), message.body)) for message in batch]
        for message, delivered in flying:
            if not self._acknowledged(delivered):
                return False
            self._spool.delete(message)
        return True

    def _acknowledged(self, delivered: "Future[None]") -> bool:
        """Wait for the broker, in slices so that the watchdog and `stop` are served."""
        for _ in range(int(_ACK_SECONDS / _TICK_SECONDS)):
            self._beat()
            try:
                delivered.result(timeout=_TICK_SECONDS)
            except TimeoutError:
                if self._stop.is_set():
                    return False
                continue
            except NotDeliveredError as error:
                _log.warning("not delivered: %s", error)
                return False
            return True
        return False

    def _hello(self) -> bytes:
        return messages.hello(
            "product",
            nonce=None,
            facts=self._board.facts(),
            identity=self._identity,
            image=self._settings.image,
            clock=self._board.clock(),
            key=keys.grade(self._settings),
        ).payload()

    def _topic(self, kind: str) -> str:
        return topics.data_topic(self._identity.serial, kind)
