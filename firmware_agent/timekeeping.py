"""What time it can be: a floor below which no clock is right, a ceiling above, and the gate before TLS between them.

A Pi has no battery clock; it starts at the last time that it remembers, or in 1970. A handshake with such a clock
fails after half a minute and looks like a wrong CA, so none is tried. Nothing else waits for the time: the alarm works
without it, and every timer of the agent counts on the monotonic clock.

The floor is the latest of what is certain: when the image was built, the first day of the unit's certificate, and the
last time that the cloud itself has told over TLS. NTP never raises it: anybody on the network can speak NTP, and a
floor in the year 2099 would keep the unit from the cloud for good (docs/adr/0056).
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from firmware_agent import files
from firmware_agent.settings import Paths

#: How often the time is written down at most. A card wears out by writing.
KEEP_SECONDS: Final = 3600.0

#: A time told by the cloud is carried on by the monotonic clock, whose crystal may be off by 100 ppm (RP1 and BCM2835
#: boards: 50 ppm and temperature): an hour in 400 days.
_DRIFT_SECONDS: Final = 3600.0

_FORMAT: Final = 1


@dataclass(frozen=True)
class Bounds:
    """What the time lies between, in seconds since 1970, and where each bound comes from."""

    floor: float
    floor_is: str
    ceiling: float
    ceiling_is: str


@dataclass(frozen=True)
class Floor:
    """A time that has certainly passed."""

    unix: float
    what: str


class Dated(Protocol):
    """A certificate, as far as its dates go (`cryptography.x509.Certificate`, `certificate.Validity`)."""

    @property
    def not_valid_before_utc(self) -> datetime:
        """Its first moment."""
        ...

    @property
    def not_valid_after_utc(self) -> datetime:
        """Its last."""
        ...


def bounds(leaf: Dated, others: Iterable[Floor] = ()) -> Bounds:
    """The bounds by the unit's certificate, with the floor raised to the latest of `others`."""
    first = Floor(leaf.not_valid_before_utc.timestamp(), "its certificate's first day")
    floor = max((first, *others), key=lambda floor: floor.unix)
    return Bounds(floor.unix, floor.what, leaf.not_valid_after_utc.timestamp(), "its certificate's last day")


def certainly_wrong(now: float, limits: Bounds) -> str | None:
    """Why TLS cannot work with a clock that says `now`, or None when it may be right."""
    if now < limits.floor:
        return (
            f"the unit's clock says {_day(now)}, before {limits.floor_is} ({_day(limits.floor)}); "
            "it waits for a time server (is NTP reachable?)"
        )
    if now > limits.ceiling:
        return (
            f"the unit's clock says {_day(now)}, after {limits.ceiling_is} ({_day(limits.ceiling)}); "
            "either the clock is wrong or the certificate has expired"
        )
    return None


def _day(unix: float) -> str:
    try:
        return f"{datetime.fromtimestamp(unix, UTC):%Y-%m-%d %H:%M}"
    except (OverflowError, OSError, ValueError):
        return f"{unix:g} s after 1970"


class Timekeeper:
    """Judges the clock by the bounds, and remembers over reboots what time it has certainly been. Thread-safe.

    Args:
        paths: where the image's time and the remembered time are.
        leaf: the certificate in force now.
        monotonic: a clock that nobody sets; it should count through suspend.
    """

    def __init__(
        self,
        paths: Paths,
        leaf: Callable[[], Dated],
        *,
        monotonic: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._paths = paths
        self._leaf = leaf
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._kept = _read(paths)
        self._kept_at: float | None = None
        #: The latest time that the cloud has told, and the monotonic clock then.
        self._told: tuple[float, float] | None = None
        self._marked: bool | None = None

    def bounds(self) -> Bounds:
        """What the time lies between, as far as is known now."""
        floors = []
        with contextlib.suppress(OSError):
            floors.append(Floor(self._paths.clock_epoch.stat().st_mtime, "the day its image was built"))
        with self._lock:
            known = max((time for time in (self._kept, self._now_by_cloud()) if time is not None), default=None)
        if known is not None:
            floors.append(Floor(known - _DRIFT_SECONDS, "the last time that the cloud told it"))
        return bounds(self._leaf(), floors)

    def wrong(self, now: float) -> str | None:
        """Why there is to be no TLS with a clock that says `now`, or None.

        While it is wrong, `picket-clock.service` is told so by a file, and may ask the cloud for the time.
        """
        reason = certainly_wrong(now, self.bounds())
        self._mark(wrong=reason is not None)
        return reason

    def confirm(self, unix: float) -> None:
        """The cloud says, over TLS, that it is `unix` now. A time outside the bounds is not believed.

        Where nothing can be written, the time is known until the next reboot only.
        """
        limits = self.bounds()
        if not limits.floor <= unix <= limits.ceiling:
            return
        with self._lock:
            self._told = (unix, self._monotonic())
        self.tick()

    def tick(self) -> None:
        """Write the time down when that is due. Cheap; call it as often as you like."""
        if self._kept_at is None or self._monotonic() - self._kept_at >= KEEP_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write the time down now: before a planned reboot."""
        with self._lock:
            now = self._now_by_cloud()
            if now is None or (self._kept is not None and now <= self._kept):
                return
            with contextlib.suppress(OSError):
                text = json.dumps({"format": _FORMAT, "unix": int(now)})
                files.write_atomic(self._paths.clock, text.encode())
                self._kept = now
            self._kept_at = self._monotonic()

    def _now_by_cloud(self) -> float | None:
        return None if self._told is None else self._told[0] + self._monotonic() - self._told[1]

    def _mark(self, *, wrong: bool) -> None:
        if wrong == self._marked:
            return
        with contextlib.suppress(OSError):
            if wrong:
                self._paths.clock_wrong.touch()
            else:
                self._paths.clock_wrong.unlink(missing_ok=True)
            self._marked = wrong


def _read(paths: Paths) -> float | None:
    """The time that was written down; None when there is none that can be read: the other floors still hold."""
    try:
        kept: Any = files.read_json(paths.clock)
        if kept is None or kept["format"] != _FORMAT:
            return None
        return float(kept["unix"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
