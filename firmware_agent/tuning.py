"""The settings that the owner may change from afar: how the sensor is judged, and how often the unit speaks.

The image gives the defaults (`[tuning]` of its settings), the owner's shadow or a `configure` job what differs from
them. Only the difference is kept, so that a new image's defaults reach the units that never asked for anything else. A
value that comes from the cloud is refused by name; a key that the file holds and this release does not know is passed
over: the newer release that wrote it may have been rolled back.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

from firmware_agent import files

Sensitivity = Literal["low", "normal", "high"]

SENSITIVITIES: Final = ("low", "normal", "high")

_FORMAT: Final = 1


class BadTuning(Exception):
    """A value that no unit takes; the message names the key and what is allowed."""


def _sensitivity(value: object) -> str:
    if not isinstance(value, str) or value not in SENSITIVITIES:
        raise TypeError("one of " + ", ".join(SENSITIVITIES))
    return value


def _seconds(low: float, high: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise TypeError(f"a number from {low:g} to {high:g}")
        return float(value)

    return parse


@dataclass(frozen=True)
class Tuning:
    """What the owner may change.

    Attributes:
        sensitivity: `normal` takes the first pulse for motion, `low` wants two of them close together, `high` takes
            the first and alarms again during a long movement.
        quiet_seconds: how long the sensor must have been still before motion is a new movement; with `high`, how long
            after an alarm the next may follow.
        stuck_seconds: a sensor that is high for so long is stuck.
        silent_hours: a sensor without a pulse for so long is named; 0 for never. A cut wire looks like this, and so
            does a house whose people are away, so it is no alarm.
        heartbeat_seconds: between two signs of life.
        report_seconds: between two reports of health. Device Defender takes one in five minutes.
    """

    sensitivity: Sensitivity = field(default="normal", metadata={"parse": _sensitivity})
    quiet_seconds: float = field(default=10.0, metadata={"parse": _seconds(0, 3600)})
    stuck_seconds: float = field(default=900.0, metadata={"parse": _seconds(10, 86400)})
    silent_hours: float = field(default=168.0, metadata={"parse": _seconds(0, 8760)})
    heartbeat_seconds: float = field(default=300.0, metadata={"parse": _seconds(5, 86400)})
    report_seconds: float = field(default=900.0, metadata={"parse": _seconds(300, 86400)})


_PARSERS: Final[Mapping[str, Callable[[object], Any]]] = {one.name: one.metadata["parse"] for one in fields(Tuning)}


def parse(wanted: object, defaults: Tuning) -> Tuning:
    """`defaults`, with what `wanted` says instead.

    Args:
        wanted: a JSON object with any of the keys of `Tuning`; null means the default.
        defaults: the image's.

    Raises:
        BadTuning: it is no object, or a key is unknown, or a value is of the wrong type or out of its range.
    """
    if not isinstance(wanted, Mapping):
        raise BadTuning(f"the tuning must be an object with any of {', '.join(_PARSERS)}")
    changes = {}
    for key, value in wanted.items():
        if key not in _PARSERS:
            raise BadTuning(f"there is no {str(key)[:64]!r} to tune; known are {', '.join(_PARSERS)}")
        if value is None:
            continue
        try:
            changes[key] = _PARSERS[key](value)
        except TypeError as error:
            raise BadTuning(f"{key} must be {error}, not {str(value)[:64]!r}") from None
    return replace(defaults, **changes)


def changes(tuning: Tuning, defaults: Tuning) -> dict[str, Any]:
    """What differs from the defaults, as a JSON object."""
    return {key: getattr(tuning, key) for key in _PARSERS if getattr(tuning, key) != getattr(defaults, key)}


def save(path: Path, tuning: Tuning, defaults: Tuning) -> None:
    """Keep what differs from the defaults, durably.

    Raises:
        OSError: the disk is full; what was kept before still is.
    """
    document = {"format": _FORMAT, "tuning": changes(tuning, defaults)}
    files.write_atomic(path, json.dumps(document).encode(), 0o600)


def load(path: Path, defaults: Tuning) -> Tuning:
    """What was kept; the defaults when nothing was.

    Raises:
        BadTuning: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        document = files.read_json(path)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are
        raise BadTuning(f"{path} is damaged: {error}") from error
    if document is None:
        return defaults
    if not isinstance(document, dict) or not isinstance(document.get("tuning"), dict):
        raise BadTuning(f"{path} is damaged: it holds no tuning")
    try:
        return parse({key: value for key, value in document["tuning"].items() if key in _PARSERS}, defaults)
    except BadTuning as error:
        raise BadTuning(f"{path} is damaged: {error}") from error
