"""Which parts of the agent may not speak for now, because the broker refuses them: the rest goes on.

A policy that forgot one topic must not cost the alarms. AWS IoT answers a forbidden SUBSCRIBE or PUBLISH with a reason
code, or it hangs up; a client that then simply tries again is thrown out again, for ever. So a feature that was refused
is put on hold, for a minute at first, then twice as long each time, up to an hour. A hang-up alone can be chance (a
broker that restarts), so it takes two in a row while the same operation waits for an answer.

Bookkeeping without clock or network of its own; times are seconds of a monotonic clock. Usable from several threads.
"""

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_log = logging.getLogger(__name__)

FIRST_SECONDS: Final = 60.0
LONGEST_SECONDS: Final = 3600.0

_STRIKES: Final = 2


@dataclass(frozen=True)
class Operation:
    """Something asked of the broker: by which feature, on which topic or filter."""

    feature: str
    topic: str


@dataclass(frozen=True)
class _Hold:
    reason: str
    until: float
    seconds: float


@dataclass(frozen=True)
class _Strike:
    count: int
    at: float


class Quarantine:
    """The features that are on hold.

    Args:
        first: seconds of the first hold.
        longest: seconds of the longest; a feature that gave no trouble for so long begins anew.
    """

    def __init__(self, first: float | None = None, longest: float | None = None) -> None:
        self._first = FIRST_SECONDS if first is None else first
        self._longest = LONGEST_SECONDS if longest is None else longest
        self._lock = threading.Lock()
        self._holds: dict[str, _Hold] = {}
        self._strikes: dict[Operation, _Strike] = {}

    def refused(self, feature: str, reason: str, now: float) -> None:
        """The broker said no to `feature`."""
        with self._lock:
            self._hold(feature, reason, now)

    def hung_up(self, waiting: Iterable[Operation], reason: str, now: float) -> None:
        """The broker hung up while `waiting` had no answer."""
        with self._lock:
            fresh = {one: strike for one, strike in self._strikes.items() if now - strike.at < self._longest}
            for one in waiting:
                count = fresh[one].count + 1 if one in fresh else 1
                fresh[one] = _Strike(count, now)
                if count >= _STRIKES:
                    del fresh[one]
                    self._hold(one.feature, f"the broker hangs up on {one.topic} ({reason})", now)
            self._strikes = fresh

    def proved(self, operation: Operation) -> None:
        """The broker has agreed to `operation`."""
        with self._lock:
            self._strikes.pop(operation, None)

    def held(self, feature: str, now: float) -> str | None:
        """Why `feature` has to wait, or None."""
        with self._lock:
            hold = self._holds.get(feature)
        return hold.reason if hold is not None and now < hold.until else None

    def all(self, now: float) -> dict[str, str]:
        """Feature to reason, of those on hold."""
        with self._lock:
            return {feature: hold.reason for feature, hold in self._holds.items() if now < hold.until}

    def _hold(self, feature: str, reason: str, now: float) -> None:
        last = self._holds.get(feature)
        if last is not None and now < last.until:
            return  # the same trouble, told again
        again = last is not None and now < last.until + self._longest
        seconds = min(last.seconds * 2, self._longest) if last is not None and again else self._first
        self._holds[feature] = _Hold(reason, now + seconds, seconds)
        _log.warning("%s waits for %.0f s: %s", feature, seconds, reason)
