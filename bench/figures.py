"""What a measurement is and what comes of it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class NotMeasuredError(Exception):
    """This machine cannot take the measurement; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Place:
    """Where a measurement works.

    Attributes:
        scratch: an empty folder of its own, on a disk; it is removed afterwards.
        image: description of the image that is flashed and booted.
        say: tells whoever waits what is going on.
    """

    scratch: Path
    image: Path
    say: Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """What one measurement found.

    Attributes:
        value: ours.
        peer_value: the peer's, from the same run.
        note: where the time goes, and how the values spread.
        judged: what is held against the target, where that is not `value` but, say, the worst of many.
    """

    value: float
    peer_value: float
    note: str = ""
    judged: float | None = None


@dataclass(frozen=True)
class Target:
    """The most that `value` may be: an absolute limit, or so many times the peer's value."""

    limit: float
    of_peer: bool = False

    def value(self, peer_value: float) -> float:
        """The limit in the measurement's own unit."""
        return self.limit * peer_value if self.of_peer else self.limit


@dataclass(frozen=True)
class Measurement:
    """One line of the table of measurements.

    Attributes:
        name: by which it is asked for.
        what: what is timed.
        peer: what it is compared with.
        target: the most that it may be.
        run: takes it.
        unit: of value, peer and target.
        slow: too slow for a run of all; it is left out unless it is asked for.
    """

    name: str
    what: str
    peer: str
    target: Target
    run: Callable[[Place], Reading]
    unit: str = "s"
    slow: bool = False


@dataclass(frozen=True)
class Figure:
    """A line of the result. What was not measured is None, and `note` says why.

    `target` is in `unit`, also where it was set as a multiple of the peer's value. `ratio` is value / peer_value.
    """

    name: str
    value: float | None
    unit: str
    peer: str
    peer_value: float | None
    ratio: float | None
    target: float | None
    met: bool | None
    note: str
    failed: bool = field(default=False)

    @classmethod
    def of(cls, measurement: Measurement, reading: Reading) -> "Figure":
        """A measurement that was taken."""
        target = measurement.target.value(reading.peer_value)
        return cls(
            name=measurement.name,
            value=round(reading.value, 4),
            unit=measurement.unit,
            peer=measurement.peer,
            peer_value=round(reading.peer_value, 4),
            ratio=round(reading.value / reading.peer_value, 4),
            target=round(target, 4),
            met=(reading.value if reading.judged is None else reading.judged) <= target,
            note=reading.note,
        )

    @classmethod
    def without(cls, measurement: Measurement, why: str, *, failed: bool = False) -> "Figure":
        """A measurement that could not be taken, or that failed."""
        return cls(
            name=measurement.name,
            value=None,
            unit=measurement.unit,
            peer=measurement.peer,
            peer_value=None,
            ratio=None,
            target=None if measurement.target.of_peer else measurement.target.limit,
            met=None,
            note=f"{'error' if failed else 'not measured'}: {why}",
            failed=failed,
        )

    def as_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        plain = asdict(self)
        del plain["failed"]
        return plain
