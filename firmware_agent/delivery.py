"""The spool on its way to the broker: oldest first, so many at once, deleted when acknowledged, many with one fsync.

How many are under way at once grows with each acknowledgement and halves with each trouble: on a link of a few hundred
bytes a second a full window would never be acknowledged in time.
"""

import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Final

from firmware_agent import mqtt, topics
from firmware_agent.backoff import Pace
from firmware_agent.mqtt import NotAllowedError
from firmware_agent.quarantine import Quarantine
from firmware_agent.session import Session
from firmware_agent.spool import Spool, Spooled

_log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 5.0  # until what was not acknowledged is sent again

_LARGEST_WINDOW: Final = 64  # AWS IoT lets a client have 100 unacknowledged messages
_FIRST_WINDOW: Final = 16
_CHUNK: Final = 128  # messages read from the disk, or deleted, at once

#: What may wait while the broker refuses it. An alarm is tried again and again, and what is behind it waits for it.
_MAY_WAIT: Final = (topics.EVENT, topics.HEARTBEAT)


class Delivery:
    """Drains the spool; used by the link's thread alone.

    Args:
        spool: what waits.
        thing: the unit's name in its topics.
        pace: how fast to send.
        quarantine: which kinds the broker refuses; they wait, the others go on.
        tell: called, on another thread, with each message sent and what came of it; must hand it to `note`.
    """

    def __init__(
        self,
        spool: Spool,
        thing: str,
        pace: Pace,
        quarantine: Quarantine,
        tell: Callable[[Session, Spooled, BaseException | None], None],
    ) -> None:
        self._spool = spool
        self._thing = thing
        self._pace = pace
        self._quarantine = quarantine
        self._tell = tell
        self._window = float(_FIRST_WINDOW)
        self._read: deque[Spooled] = deque()
        self._flying: dict[int, Spooled] = {}
        self._done: list[Spooled] = []
        self._acknowledged_at = 0.0
        self._resume_at = 0.0

    def begin(self) -> None:
        """A new session: what was not acknowledged before is sent again."""
        self._flying.clear()
        self._read.clear()
        self._acknowledged_at = time.monotonic()
        self._resume_at = 0.0

    def patience(self, now: float) -> float | None:
        """Seconds until there is something to do without being told, or None."""
        if now < self._resume_at:
            return self._resume_at - now
        return self._pace.wait(now) if self._read and self._room() else None

    def go_on(self, session: Session) -> None:
        """Send what may be sent now, and forget what is done."""
        now = time.monotonic()
        if now < self._resume_at:
            return
        try:
            self._delete()
            for _ in range(self._room()):
                if not self._more(now) or self._pace.wait(time.monotonic()):
                    return
                self._send(session, self._read.popleft())
        except sqlite3.Error as error:
            _log.error("the spool cannot be read or shortened: %s", error)
            self._resume_at = now + RETRY_SECONDS

    def note(self, message: Spooled, error: BaseException | None) -> bool:
        """What came of `message`: False when it seems that nobody is there any more.

        A slow link is not left for a new one, which costs a handshake: on it, others are acknowledged meanwhile.
        """
        now = time.monotonic()
        known = self._flying.pop(message.id, None) is not None
        if error is None:
            self._acknowledged_at = now
            self._window = min(_LARGEST_WINDOW, self._window + 0.5)
            self._done.append(message)
            return True
        if not known:
            return True  # lost with an earlier one, and sent again since
        _log.warning("the %s %d is not delivered: %s", message.kind, message.id, error)
        self._flying.clear()
        self._read.clear()
        self._window = max(1.0, self._window / 2)
        refused = isinstance(error, NotAllowedError)
        if not (refused and message.kind in _MAY_WAIT):
            self._resume_at = now + RETRY_SECONDS
        return refused or now - self._acknowledged_at < mqtt.ACK_SECONDS / 2

    def _room(self) -> int:
        return max(0, int(self._window) - len(self._flying))

    def _more(self, now: float) -> bool:
        """Whether there is something to send, read from the disk if need be."""
        if not self._read:
            held = [kind for kind in _MAY_WAIT if self._quarantine.held(kind, now) is not None]
            known = self._flying.keys() | {message.id for message in self._done}
            oldest = self._spool.oldest(_CHUNK + len(known), without=held)
            self._read.extend(message for message in oldest if message.id not in known)
        return bool(self._read)

    def _send(self, session: Session, message: Spooled) -> None:
        self._flying[message.id] = message
        sent = session.publish(topics.data_topic(self._thing, message.kind), message.body)
        sent.add_done_callback(partial(self._told, session, message))

    def _told(self, session: Session, message: Spooled, sent: "Future[None]") -> None:
        self._tell(session, message, sent.exception())

    def _delete(self) -> None:
        """When many are done, or nothing else is to do."""
        if len(self._done) >= _CHUNK or (self._done and not self._flying):
            self._spool.delete(*self._done)
            self._done.clear()
