"""Time zones by name, wherever the function runs.

Lambda's image need not carry a zone database, so `tzdata` is packed with the functions; `zoneinfo` takes it where the
system has none.
"""

import functools
from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


class UnknownZoneError(ValueError):
    """No time zone of that name."""


@functools.cache
def zone(name: str) -> ZoneInfo:
    """The time zone called `name` in the IANA database, e.g. `Europe/Berlin`.

    Raises:
        UnknownZoneError: there is none.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UnknownZoneError(f"no time zone is called {name!r}: use a name like Europe/Berlin") from error


def local(at: datetime, zone_name: str) -> str:
    """A moment as people in that time zone write it, to the second."""
    return at.astimezone(zone(zone_name)).strftime("%Y-%m-%d %H:%M:%S")
