"""Armed or not: kept on the disk, changed at the unit or from afar, and armed whenever there is doubt.

Two people may decide at once, one at the unit and one on the phone, while the unit may be offline. The rule:

- what the cloud decided is taken when nothing was decided here that the cloud does not know yet;
- arming here wins over everything that the cloud has not seen it win over;
- disarming here wins if it came after what the cloud decided; when the unit's clock cannot tell, the cloud's arming
  wins, because an alarm too many is better than one too few.

A unit without a record of it, or with a damaged one, is armed.
"""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

from firmware_agent import files
from firmware_agent.board import ClockReading, Quality

_log = logging.getLogger(__name__)

_FORMAT: Final = 1


@dataclass(frozen=True)
class Arming:
    """Whether the unit is armed, and how that came to be.

    Attributes:
        armed: whether motion is an alarm.
        by: who decided: `cloud`, whatever was given for a decision at the unit, or `default` for nobody.
        at: when, in seconds since 1970, by the clock of who decided; None for nobody.
        quality: how far that clock can be trusted.
        pending: decided here, and not yet known to the cloud.
        cloud_at: when the cloud's decision that was last looked at was made, by the cloud's clock; 0 for never.
        version: of the shadow, when it was last taken from there or written there; 0 for never.
    """

    armed: bool = True
    by: str = "default"
    at: float | None = None
    quality: Quality = "estimated"
    pending: bool = False
    cloud_at: float = 0.0
    version: int = 0


@dataclass(frozen=True)
class Wanted:
    """What the cloud decided.

    Attributes:
        armed: what is to be.
        at: when that was written, in seconds since 1970, by the cloud's clock.
        version: of the shadow that says so.
    """

    armed: bool
    at: float
    version: int


def decide_here(now: Arming, *, armed: bool, by: str, clock: ClockReading) -> Arming:
    """Somebody at the unit arms or disarms it."""
    return replace(now, armed=armed, by=by, at=clock.unix, quality=clock.quality, pending=True)


def decide_by_cloud(now: Arming, wanted: Wanted) -> Arming:
    """The cloud's document says `wanted`."""
    news = wanted.at != now.cloud_at
    seen = replace(now, cloud_at=wanted.at, version=wanted.version)
    if not now.pending:
        if wanted.armed == now.armed:
            return seen
        return replace(seen, armed=wanted.armed, by="cloud", at=wanted.at, quality="ntp")
    if wanted.armed == now.armed:
        return replace(seen, pending=False)  # both want the same: nothing is left to tell
    if now.armed or not news:
        return seen
    later = now.at is not None and now.quality != "estimated" and now.at >= wanted.at
    if later:
        return seen
    return replace(seen, armed=wanted.armed, by="cloud", at=wanted.at, quality="ntp", pending=False)


def load(path: Path) -> Arming:
    """What was kept; armed, when nothing was or it cannot be read."""
    try:
        kept: Any = files.read_json(path)
        return Arming() if kept is None else _parse(kept)
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.error("%s cannot be read (%s); the unit is armed", path, error)
        return Arming()


def save(path: Path, arming: Arming) -> None:
    """Keep it, durably.

    Raises:
        OSError: the disk does not take it. What was kept before still is, unless that would disarm after a restart.
    """
    try:
        files.write_atomic(path, json.dumps({"format": _FORMAT, **asdict(arming)}).encode(), 0o600)
    except OSError:
        if arming.armed:  # without a file it is armed, and a full disk still lets one go
            path.unlink(missing_ok=True)
        raise


def _parse(kept: Any) -> Arming:
    if kept["format"] != _FORMAT or not isinstance(kept["armed"], bool) or not isinstance(kept["pending"], bool):
        raise ValueError("it is not what this release writes")
    if kept["quality"] not in get_args(Quality):
        raise ValueError("its clock's quality is none")
    return Arming(
        armed=kept["armed"],
        by=str(kept["by"]),
        at=None if kept["at"] is None else float(kept["at"]),
        quality=kept["quality"],
        pending=kept["pending"],
        cloud_at=float(kept["cloud_at"]),
        version=int(kept["version"]),
    )


class ArmingStore:
    """The unit's one record of it. Thread-safe.

    Args:
        path: where it is kept.
        on_change: called with each change of `armed`, by whoever makes it; must not block.
    """

    def __init__(self, path: Path, on_change: Callable[[Arming], None] = lambda _: None) -> None:
        self._path = path
        self._on_change = on_change
        self._lock = threading.RLock()
        self._now = load(path)

    @property
    def now(self) -> Arming:
        """How it is."""
        return self._now

    def here(self, *, armed: bool, by: str, clock: ClockReading) -> Arming:
        """Somebody at the unit arms or disarms it."""
        with self._lock:
            return self._take(decide_here(self._now, armed=armed, by=by, clock=clock))

    def by_cloud(self, wanted: Wanted) -> Arming:
        """The cloud's document says `wanted`."""
        with self._lock:
            return self._take(decide_by_cloud(self._now, wanted))

    def told(self, decision: Arming, *, at: float, version: int) -> None:
        """The cloud has taken `decision` at `at`, as `version`; a later one is still to be told."""
        with self._lock:
            same = (self._now.armed, self._now.at) == (decision.armed, decision.at)
            pending = self._now.pending and not same
            self._take(replace(self._now, pending=pending, cloud_at=at, version=version))

    def _take(self, new: Arming) -> Arming:
        """In force at once, even if the disk does not take it: after a restart the unit is then as it was before."""
        old, self._now = self._now, new
        if new != old:
            try:
                save(self._path, new)
            except OSError as error:
                _log.error("armed=%s cannot be kept: %s", new.armed, error)
        if new.armed != old.armed:
            _log.info("%s by %s", "armed" if new.armed else "disarmed", new.by)
            self._on_change(new)
        return new
