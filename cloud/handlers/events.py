"""What reaches the functions from IoT rules, parsed into values that the rest can trust."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

#: A thing name that AWS accepts: the device's part of the topic, so it was already checked against its certificate.
_THING = re.compile(r"[a-zA-Z0-9:_-]{1,128}")
_EVENT_ID = re.compile(r"[a-zA-Z0-9-]{1,64}")
_CERTIFICATE_ID = re.compile(r"[0-9a-f]{64}")


class MalformedEventError(ValueError):
    """An event that is not what the device's firmware or AWS IoT sends; it goes to the dead letters."""


@dataclass(frozen=True)
class Alarm:
    """An alarm: motion, or tampering. `at` is the device's clock, `at_quality` how far to trust it."""

    thing: str
    event_id: str
    sequence: int
    at: datetime
    at_text: str
    at_quality: str
    boot_id: str
    kind: str


@dataclass(frozen=True)
class Hello:
    """What a device says on each connection.

    `received_ms` is the cloud's clock, in milliseconds of Unix time; `certificate_id` is of the certificate that the
    connection was made with, as the connection and not the device says; None when it was made without one.
    """

    thing: str
    mode: str
    nonce: str | None
    boot_id: str
    agent: str
    image: str
    batch: str
    board: str
    key: str
    at: str
    received_ms: int
    certificate_id: str | None


@dataclass(frozen=True)
class CertificateRegistered:
    """A device came with a certificate that the cloud had not seen, signed by a CA that it knows."""

    certificate_id: str
    ca_certificate_id: str


def _string(event: Mapping[str, Any], name: str, pattern: re.Pattern[str] | None = None, *, longest: int = 256) -> str:
    value = event.get(name)
    if not isinstance(value, str) or len(value) > longest or (pattern and not pattern.fullmatch(value)):
        raise MalformedEventError(f"{name} is {value!r}"[:200])
    return value


def _integer(event: Mapping[str, Any], name: str) -> int:
    value = event.get(name)
    if type(value) is not int or value < 0:
        raise MalformedEventError(f"{name} is {value!r}"[:200])
    return value


def parse_alarm(event: object) -> Alarm:
    """The alarm in a rule's event.

    Raises:
        MalformedEventError: a field is missing or is not what the firmware sends.
    """
    if not isinstance(event, Mapping):
        raise MalformedEventError("the event is no object")
    at_text = _string(event, "at", longest=40)
    try:
        at = datetime.fromisoformat(at_text)
    except ValueError as error:
        raise MalformedEventError(f"at is {at_text!r}") from error
    if at.tzinfo is None:
        raise MalformedEventError(f"at has no time zone: {at_text!r}")
    return Alarm(
        thing=_string(event, "thing", _THING),
        event_id=_string(event, "event_id", _EVENT_ID),
        sequence=_integer(event, "sequence"),
        at=at,
        at_text=at_text,
        at_quality=_string(event, "at_quality"),
        boot_id=_string(event, "boot_id"),
        kind=_string(event, "kind"),
    )


def parse_registration(event: object) -> Hello | CertificateRegistered:
    """The hello of a device, or AWS's notice of a new certificate.

    Raises:
        MalformedEventError: it is neither.
    """
    if not isinstance(event, Mapping):
        raise MalformedEventError("the event is no object")
    if "certificateId" in event:
        return CertificateRegistered(
            certificate_id=_string(event, "certificateId", _CERTIFICATE_ID),
            ca_certificate_id=_string(event, "caCertificateId", _CERTIFICATE_ID),
        )
    nonce = event.get("nonce")
    principal = _string(event, "principal")
    return Hello(
        thing=_string(event, "thing", _THING),
        mode=_string(event, "mode"),
        nonce=None if nonce is None else _string(event, "nonce"),
        boot_id=_string(event, "boot_id"),
        agent=_string(event, "agent"),
        image=_string(event, "image"),
        batch=_string(event, "batch"),
        board=_string(event, "board"),
        key=_string(event, "key"),
        at=_string(event, "at"),
        received_ms=_integer(event, "received_ms"),
        certificate_id=principal if _CERTIFICATE_ID.fullmatch(principal) else None,
    )
