"""What the agent tells the cloud, as JSON on `dt/picket/<thing>/<kind>`.

A message is made when something happens, and may leave the unit days later. If the clock was not to be trusted then and
is now, the moment is put right on the way out: the message has kept the time since boot, and the unit knows when that
boot was as soon as a server, or a battery clock, has told it the time.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from firmware_agent import __version__
from firmware_agent.board import ClockReading, Facts, Quality
from firmware_agent.settings import Image

if TYPE_CHECKING:  # it brings all of X.509 along
    from firmware_agent.identity import Identity

Mode = Literal["factory", "product"]

#: A boot's id to the Unix time at which it began, in seconds.
Boots = Mapping[str, float]

_LAST: Final = 253402300799.0  # the end of the year 9999, the last that RFC 3339 can write


def timestamp(unix: float) -> str:
    """RFC 3339 in UTC with milliseconds, e.g. `2026-11-21T05:53:35.123Z`; however wrong the clock, there is one."""
    within = min(max(unix, 0.0), _LAST)
    return datetime.fromtimestamp(within, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


class _Message:
    """A payload that is its own fields."""

    #: What is left out while it is None.
    _optional: tuple[str, ...] = ()

    def payload(self) -> bytes:
        """The JSON text as bytes."""
        document: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return _json({k: v for k, v in document.items() if v is not None or k not in self._optional})


@dataclass(frozen=True)
class Hello(_Message):
    """Sent at each connection: who is there, in which mode. `nonce` proves to the line that it is this very session.

    `release` names the release in force, where there are several; `safe_mode` says why the unit does only what is most
    needed, if that is so.
    """

    mode: Mode
    nonce: str | None
    boot_id: str
    agent: str
    image: str
    batch: str
    board: str
    at: str
    key: str
    release: str | None = None
    safe_mode: str | None = None

    _optional = ("release", "safe_mode")


@dataclass(frozen=True)
class Alarm(_Message):
    """Something to wake the owner for. The same form on the topic `event` is something for the log.

    `event_id` makes duplicates harmless (QoS 1 may deliver twice). `sequence` makes a gap visible; alarms and events
    are counted apart. `monotonic_ms` is the time since boot: with `boot_id` it tells the moment also when `at` is
    wrong. `at_quality` is how far to trust `at`: as the clock was, or `corrected` afterwards.
    """

    event_id: str
    sequence: int
    at: str
    at_quality: Quality | Literal["corrected"]
    boot_id: str
    monotonic_ms: int
    kind: str = "motion"
    detail: str | None = None

    _optional = ("detail",)


@dataclass(frozen=True)
class Heartbeat(_Message):
    """A sign of life. `spool` is how many messages wait on the unit."""

    at: str
    boot_id: str
    uptime_s: int
    spool: int
    temperature_c: float | None
    safe_mode: str | None = None

    _optional = ("safe_mode",)


def hello(
    mode: Mode,
    *,
    nonce: str | None,
    facts: Facts,
    identity: "Identity",
    image: Image,
    clock: ClockReading,
    key: str,
    release: str | None = None,
    safe_mode: str | None = None,
) -> Hello:
    """The hello of this unit now."""
    return Hello(
        mode=mode,
        nonce=nonce,
        boot_id=facts.boot_id,
        agent=__version__,
        image=str(image),
        batch=identity.batch,
        board=facts.serial,
        at=timestamp(clock.unix),
        key=key,
        release=release,
        safe_mode=safe_mode,
    )


def alarm(
    sequence: int,
    *,
    clock: ClockReading,
    uptime: float,
    boot_id: str,
    kind: str = "motion",
    detail: str = "",
) -> Alarm:
    """An alarm, or an event, for what happened at `clock` and `uptime` (seconds since boot)."""
    return Alarm(
        event_id=str(uuid.uuid4()),
        sequence=sequence,
        at=timestamp(clock.unix),
        at_quality=clock.quality,
        boot_id=boot_id,
        monotonic_ms=round(uptime * 1000),
        kind=kind,
        detail=detail or None,
    )


def put_right(payload: bytes, boots: Boots) -> bytes:
    """An alarm or event with its moment corrected, where its clock was not to be trusted and its boot is known."""
    if b'"at_quality":"estimated"' not in payload:
        return payload
    document = json.loads(payload)
    began = boots.get(document["boot_id"])
    if began is None:
        return payload
    at = timestamp(began + document["monotonic_ms"] / 1000)
    return _json(document | {"at": at, "at_quality": "corrected"})
