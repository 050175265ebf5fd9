"""What the unit tells the cloud: the three JSON payloads, built in one place so that factory and product mode agree."""

import json
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from firmware_agent import __version__
from firmware_agent.board import ClockReading, Facts, Quality
from firmware_agent.identity import Identity
from firmware_agent.settings import Image

Mode = Literal["factory", "product"]


def timestamp(unix: float) -> str:
    """RFC 3339 in UTC with milliseconds, e.g. `2026-11-21T05:53:35.123Z`."""
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Message:
    """A payload that is its own fields."""

    def payload(self) -> bytes:
        """The JSON text as bytes."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False).encode()  # type: ignore[call-overload]


@dataclass(frozen=True)
class Hello(_Message):
    """Sent at each connection: who is there, in which mode. `nonce` proves to the line that it is this very session."""

    mode: Mode
    nonce: str | None
    boot_id: str
    agent: str
    image: str
    batch: str
    board: str
    at: str
    key: str


@dataclass(frozen=True)
class Alarm(_Message):
    """Motion. `event_id` makes duplicates harmless (QoS 1 may deliver twice), `sequence` makes a gap visible.

    `monotonic_ms` is the time since boot, so that a wrong `at` can be put right later with the help of `boot_id`.
    """

    event_id: str
    sequence: int
    at: str
    at_quality: Quality
    boot_id: str
    monotonic_ms: int
    kind: Literal["motion"] = "motion"


@dataclass(frozen=True)
class Heartbeat(_Message):
    """A sign of life. `spool` is how many messages wait on the unit."""

    at: str
    boot_id: str
    uptime_s: int
    spool: int
    temperature_c: float | None


def hello(
    mode: Mode,
    *,
    nonce: str | None,
    facts: Facts,
    identity: Identity,
    image: Image,
    clock: ClockReading,
    key: str,
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
    )


def alarm(sequence: int, *, clock: ClockReading, uptime: float, boot_id: str) -> Alarm:
    """An alarm for a rising edge seen at `clock` and `uptime`."""
    return Alarm(
        event_id=str(uuid.uuid4()),
        sequence=sequence,
        at=timestamp(clock.unix),
        at_quality=clock.quality,
        boot_id=boot_id,
        monotonic_ms=round(uptime * 1000),
    )
