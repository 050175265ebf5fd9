"""When a job may be rolled out: its start, its end and its maintenance windows, as AWS IoT Jobs writes them.

https://docs.aws.amazon.com/iot/latest/apireference/API_SchedulingConfig.html
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

_CRON = re.compile(r"cron\((?P<fields>[^)]*)\)")
_WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")


@dataclass(frozen=True)
class Window:
    """A recurring time, in UTC, in which a job may be rolled out. `weekdays` as AWS counts them: 1 is Sunday."""

    hour: int
    minute: int
    weekdays: frozenset[int]
    duration: timedelta

    def open_at(self, moment: datetime) -> bool:
        """Whether the window is open at `moment` (aware)."""
        moment = moment.astimezone(UTC)
        for days_ago in (0, 1):  # a window lasts less than a day
            day = moment - timedelta(days=days_ago)
            start = day.replace(hour=self.hour, minute=self.minute, second=0, microsecond=0)
            if start.isoweekday() % 7 + 1 in self.weekdays and start <= moment < start + self.duration:
                return True
        return False


def parse_window(config: Mapping[str, Any]) -> Window:
    """A maintenance window in AWS's words: `cron(minute hour day month weekday year)` and a duration.

    Raises:
        ValueError: it is none, or one that names days of the month, months or years, which is not supported here.
    """
    match = _CRON.fullmatch(str(config.get("startTime", "")).strip())
    fields = match["fields"].split() if match else []
    if len(fields) != 6 or any(field not in {"*", "?"} for field in (fields[2], fields[3], fields[5])):
        raise ValueError(f"a maintenance window must look like cron(30 2 ? * MON-FRI *): {config.get('startTime')!r}")
    minutes = int(config.get("durationInMinutes") or 0)
    if not 1 <= minutes <= 1430:
        raise ValueError(f"a maintenance window lasts 1 to 1430 minutes, not {minutes}")
    hour, minute = int(fields[1]), int(fields[0])
    if not (0 <= hour < 24 and 0 <= minute < 60):
        raise ValueError(f"no time of day: {hour}:{minute}")
    return Window(hour, minute, _weekdays(fields[4]), timedelta(minutes=minutes))


def _weekdays(field: str) -> frozenset[int]:
    if field in {"*", "?"}:
        return frozenset(range(1, 8))
    days: set[int] = set()
    for part in field.split(","):
        first, _, last = part.partition("-")
        begin, end = _weekday(first), _weekday(last or first)
        days |= set(range(begin, end + 1)) if begin <= end else {*range(begin, 8), *range(1, end + 1)}
    return frozenset(days)


def _weekday(name: str) -> int:
    if name.upper() in _WEEKDAYS:
        return _WEEKDAYS.index(name.upper()) + 1
    if name.isdecimal() and 1 <= int(name) <= 7:
        return int(name)
    raise ValueError(f"no day of the week is called {name!r}")


def may_roll_out(schedule: Mapping[str, Any] | None, now: datetime) -> bool:
    """Whether a job with this `schedulingConfig` may give its document to further devices now."""
    schedule = schedule or {}
    start, end = schedule.get("startTime"), schedule.get("endTime")
    if start and now < datetime.fromisoformat(start).replace(tzinfo=UTC):
        return False
    if end and now >= datetime.fromisoformat(end).replace(tzinfo=UTC):
        return False
    windows: Sequence[Mapping[str, Any]] = schedule.get("maintenanceWindows") or []
    return not windows or any(parse_window(window).open_at(now) for window in windows)
