"""How the unit is, in numbers: what the board says, and what only the agent knows.

An alarm is taken for false when the unit is disarmed within ten minutes of it: somebody who lives there has come home
and forgot, or was at home, or looked and found the cat. Alarms with less than ten minutes between them are one
incident. The rate is that of the last fifty incidents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from firmware_agent.board import Health

FALSE_SECONDS: Final = 600.0
_INCIDENTS: Final = 50


@dataclass(frozen=True)
class Incidents:
    """The last incidents.

    Attributes:
        false: of each, the oldest first, whether it was a false alarm.
        alarm_at: when the last alarm was, in seconds of a clock that nobody sets; None before the first since the
            agent started.
    """

    false: tuple[bool, ...] = ()
    alarm_at: float | None = None

    def alarm(self, at: float) -> "Incidents":
        """An alarm was raised."""
        same = self.alarm_at is not None and at - self.alarm_at < FALSE_SECONDS
        return replace(self, alarm_at=at, false=self.false if same else (*self.false, False)[-_INCIDENTS:])

    def disarmed(self, at: float) -> "Incidents":
        """The unit was disarmed."""
        if self.alarm_at is None or at - self.alarm_at >= FALSE_SECONDS:
            return self
        return replace(self, alarm_at=None, false=(*self.false[:-1], True))

    @property
    def rate(self) -> float | None:
        """The share of false ones, from 0 to 1; None without incidents."""
        return sum(self.false) / len(self.false) if self.false else None


def metrics(
    health: Health, *, uptime: float, spool: int, incidents: Incidents, expires: datetime, now: datetime
) -> Mapping[str, float]:
    """What is known, by the name that the fleet's side knows it by; what is not known is left out.

    Args:
        health: what the board says.
        uptime: in seconds.
        spool: how many messages wait.
        incidents: the last ones.
        expires: the last moment of the unit's certificate.
        now: by the unit's clock.
    """
    rate = incidents.rate
    known: dict[str, Any] = {
        "temperature_c": health.temperature_c,
        # The firmware's bits 0 to 3 are what is the case now, 16 to 19 what was since boot.
        "throttled": None if health.throttled is None else health.throttled & 0xF,
        "throttled_since_boot": None if health.throttled is None else health.throttled >> 16 & 0xF,
        "disk_wear_percent": health.disk_wear_percent,
        "disk_free_mb": health.disk_free_bytes // 1_000_000,
        "memory_free_mb": health.memory_free_bytes // 1_000_000,
        "radio_dbm": health.radio_dbm,
        "uptime_s": int(uptime),
        "spool_depth": spool,
        "false_alarm_percent": None if rate is None else round(rate * 100),
        "certificate_days": (expires - now).days,
    }
    return {name: value for name, value in known.items() if value is not None}
