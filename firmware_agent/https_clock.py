"""The time from the cloud's own endpoint, for networks that let HTTPS through and NTP not: `picket-agent clock`.

A certificate's dates cannot be checked by a clock that is not known, so here they are left out of the handshake and
checked afterwards, by the time that the server tells: chain and name are pinned as ever. What is left to an attacker
is a key of the endpoint's whose certificate has expired; with it he can choose a time within that certificate's days,
and not before the floor (`timekeeping`). Sources that prove nothing are never asked.
"""

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509

from firmware_agent import files, identity, timekeeping
from firmware_agent.board import Board, ClockReading
from firmware_agent.errors import AgentFault
from firmware_agent.settings import Paths, Settings
from firmware_agent.timekeeping import Bounds, Timekeeper

#: X509_V_FLAG_NO_CHECK_TIME of OpenSSL's <openssl/x509_vfy.h>; Python has no name for it.
_NO_CHECK_TIME: Final = 0x200000

_SECONDS: Final = 20.0
_LONGEST_HEAD: Final = 16 * 1024

#: A clock set this way is asked for again after so long: a quartz is off by seconds a day.
REFRESH_SECONDS: Final = 6 * 3600.0

#: RFC 9110, 5.6.7: the one form that a server may send.
_IMF_FIXDATE: Final = "%a, %d %b %Y %H:%M:%S GMT"

#: A clock that is this near is right: the header has whole seconds.
_NEAR_SECONDS: Final = 2.0


class NoTime(AgentFault):
    """The endpoint did not tell a time that can be believed."""

    code = "no-time"


@dataclass(frozen=True)
class Told:
    """What the endpoint says that the time is, and the days of its certificate; seconds since 1970."""

    unix: float
    not_before: float
    not_after: float


def ask(host: str, port: int, trust: str, *, seconds: float = _SECONDS) -> Told:
    """The `Date` of the HTTPS server at `host`, which must prove its name by the roots in `trust` (PEM).

    Args:
        host: its name, also for TLS.
        port: its TCP port; AWS IoT speaks HTTPS on 443.
        trust: the roots that it must chain to.
        seconds: how long all may take, but for the name's resolution.

    Raises:
        NoTime: it cannot be reached, is somebody else, or tells no time.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which asks for a certificate and checks the name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=trust)
        context.verify_flags |= _NO_CHECK_TIME
        end = time.monotonic() + seconds
        with (
            socket.create_connection((host, port), timeout=seconds) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            request = f"HEAD / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: picket-agent\r\nConnection: close\r\n\r\n"
            secure.sendall(request.encode("ascii"))
            head = _head(secure, end)
            leaf = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError) as error:
        raise NoTime(f"{host}:{port} tells no time: {error or type(error).__name__}") from error
    return Told(date(head), leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp())


def _head(secure: ssl.SSLSocket, end: float) -> bytes:
    """The response up to its empty line, or as much as a server that means ill gets to say."""
    data = b""
    while b"\r\n\r\n" not in data and len(data) < _LONGEST_HEAD:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("it takes too long")
        secure.settimeout(left)
        part = secure.recv(4096)
        if not part:
            break
        data += part
    return data


def date(head: bytes) -> float:
    """The time in the `Date` field of an HTTP response's head, in seconds since 1970.

    Raises:
        NoTime: this is no head of a response, or it has not exactly one date, in the form of RFC 9110.
    """
    lines, ended, _ = head.partition(b"\r\n\r\n")
    first, *fields = lines.decode("latin-1").split("\r\n")
    if not ended or not first.startswith("HTTP/1."):
        raise NoTime("the answer is not HTTP")
    dates = [value.strip() for name, _, value in (line.partition(":") for line in fields) if name.lower() == "date"]
    if len(dates) != 1:
        raise NoTime(f"the answer has {len(dates)} dates, not one")
    try:
        return datetime.strptime(dates[0], _IMF_FIXDATE).replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise NoTime("the answer's date is none") from error


def judge(told: Told, limits: Bounds) -> float:
    """The time that was told, when it can be believed.

    Raises:
        NoTime: it lies outside the unit's bounds, or outside the days of the certificate that vouches for it.
    """
    if told.unix < limits.floor:
        raise NoTime(f"the endpoint's date is before {limits.floor_is}; it is not believed")
    if told.unix > limits.ceiling:
        raise NoTime(f"the endpoint's date is after {limits.ceiling_is}; it is not believed")
    if not told.not_before <= told.unix <= told.not_after:
        raise NoTime("the endpoint's date is not within the days of its own certificate; it is not believed")
    return told.unix


def due(reading: ClockReading, wrong: str | None, asked: float | None, uptime: float) -> bool:
    """Whether the endpoint is to be asked.

    Args:
        reading: the clock.
        wrong: why it is certainly wrong, if it is.
        asked: the uptime when the endpoint last set the clock in this boot.
        uptime: the uptime now, seconds.
    """
    if wrong is not None:
        return True
    if reading.quality in ("ntp", "rtc"):
        return False
    return asked is None or uptime - asked >= REFRESH_SECONDS


def run(
    settings: Settings,
    board: Board,
    *,
    fetch: Callable[[str, int, str], Told] = ask,
    set_clock: Callable[[float], None] = lambda unix: time.clock_settime(time.CLOCK_REALTIME, unix),
) -> str:
    """Set the clock by the endpoint if no time server has done so; what was done, in a sentence.

    Raises:
        WrongState: the unit was never provisioned.
        NoTime: the endpoint tells no time that can be believed, or the clock cannot be set.
    """
    paths = settings.paths
    found = identity.load(paths.identity)
    keeper = Timekeeper(paths, lambda: found.leaf)
    reading = board.clock()
    wrong = timekeeping.certainly_wrong(reading.unix, keeper.bounds())
    if not due(reading, wrong, _asked(paths), board.uptime()):
        return f"nothing to do: the clock's quality is {reading.quality}"
    unix = judge(fetch(found.host, settings.clock.port, found.trust), keeper.bounds())
    off = unix - board.clock().unix
    if abs(off) > _NEAR_SECONDS:
        try:
            set_clock(unix)
        except OSError as error:
            raise NoTime(f"the clock cannot be set: {error.strerror}") from error
    files.write_atomic(paths.clock_https, json.dumps({"uptime": board.uptime()}).encode())
    paths.clock_wrong.unlink(missing_ok=True)
    keeper.confirm(unix)
    keeper.keep()
    return f"the clock was {off:+.0f} s off and is set by {found.host}" if abs(off) > _NEAR_SECONDS else "it was right"


def _asked(paths: Paths) -> float | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        marker: Any = files.read_json(paths.clock_https)
        return None if marker is None else float(marker["uptime"])
    return None
