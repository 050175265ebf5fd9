"""Time zones by name, wherever the function runs.

Lambda's Python image carries no zone database, and neither does a slim container. `python-dateutil`, which comes with
boto3 and is packed with the functions, carries one; the system's is used where there is one, for it is newer.
"""

import functools
import io
import tarfile
from datetime import datetime
from importlib import resources
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


class UnknownZoneError(ValueError):
    """No time zone of that name in any database at hand."""


@functools.cache
def zone(name: str) -> ZoneInfo:
    """The time zone called `name` in the IANA database, e.g. `Europe/Berlin`.

    Raises:
        UnknownZoneError: there is none.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    archive = resources.files("dateutil.zoneinfo").joinpath("dateutil-zoneinfo.tar.gz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(archive)) as zones:
        try:
            data = zones.extractfile(name)
        except KeyError:
            data = None
        if data is None:
            raise UnknownZoneError(f"no time zone is called {name!r}: use a name like Europe/Berlin")
        try:
            return ZoneInfo.from_file(data, key=name)
        except ValueError as error:
            raise UnknownZoneError(f"no time zone is called {name!r}: use a name like Europe/Berlin") from error


def local(at: datetime, zone_name: str) -> str:
    """A moment as people in that time zone write it, to the second."""
    return at.astimezone(zone(zone_name)).strftime("%Y-%m-%d %H:%M:%S")
