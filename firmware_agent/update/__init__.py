"""How the agent replaces itself: signed metadata, download, delta, archive, releases. See docs/adr/0040 to 0042.

What can go wrong, drawn by what the update does about it; `code` goes into the job's status details:

    UpdateFault
    ├── DownloadFault       download     the payload did not come: the job fails, the fleet may try again
    │   ├── UrlExpired      download     ask for a fresh URL; what has come so far is kept
    │   └── BadPayload      download     what comes is not what was signed, again and again
    ├── Cancelled           cancelled    the caller said stop; what has come so far is kept
    ├── NoSpace             no-space     neither payload nor release would fit
    └── InstallFault        install      the release in force is untouched
        ├── BadArchive      install      not a canonical archive, or not the one that was signed
        └── BadDelta        install      does not lead to the release that was signed: take the full archive

None of the messages holds a URL's query string: presigned URLs are secrets.
"""

import errno
from typing import Final

from firmware_agent.errors import AgentFault

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class UpdateFault(AgentFault):
    """An update cannot go on."""

    code = "install"


class DownloadFault(UpdateFault):
    """The payload did not come."""

    code = "download"


class UrlExpired(DownloadFault):
    """The server does not take this URL (any more): 400, 401, 403 or 410."""


class BadPayload(DownloadFault):
    """The bytes that come are not those that were signed."""


class Cancelled(UpdateFault):
    """The caller wanted no more of it."""

    code = "cancelled"


class NoSpace(UpdateFault):
    """The disk has no room."""

    code = "no-space"


class InstallFault(UpdateFault):
    """A release cannot be put in place."""

    code = "install"


class BadArchive(InstallFault):
    """An archive that is not canonical, or not the expected one."""


class BadDelta(InstallFault):
    """A delta that does not lead to the expected archive."""


def disk_fault(error: OSError, what: str, otherwise: type[UpdateFault]) -> UpdateFault:
    """The fault for a disk that does not do `what`: `NoSpace` if it is full, else `otherwise`."""
    kind = NoSpace if error.errno in _FULL else otherwise
    return kind(f"cannot {what}: {error.strerror or type(error).__name__}")
