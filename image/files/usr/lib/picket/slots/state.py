"""What root knows about the slots, in /data/system: slots.json and os-floor. The agent can write neither.

    {"format": 1,
     "slots": {"a": {"version": "0.1.0", "security_version": 1, "manifest": "<sha256>"}, "b": null},
     "trial": {"slot": "b", "before": "a", "attempts": 0, "limit": 3, "counted": true},
     "previous": null, "ended": "picket 0.2.0 was started 3 times and not kept"}

A slot is listed only while it is whole. `previous` is the slot that the last `keep` took over from, until something is
installed into it. `ended` says why the last trial ended, for people.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from . import medium
from .board import SLOTS

FORMAT: Final = 1


@dataclass(frozen=True)
class Held:
    """What a slot holds; `manifest` is the hex SHA-256 of its bundle's manifest, empty for what the factory wrote."""

    version: str
    security_version: int
    manifest: str = ""


@dataclass(frozen=True)
class Trial:
    """A slot that is to prove itself.

    Attributes:
        slot: on trial.
        before: the one that comes back.
        attempts: boots so far.
        limit: boots that it has, if `counted`.
        counted: the slot was made the chosen one at once, so nothing but counting ends the trial.
    """

    slot: str
    before: str
    attempts: int
    limit: int
    counted: bool


@dataclass(frozen=True)
class State:
    """slots.json."""

    slots: Mapping[str, Held] = field(default_factory=lambda: MappingProxyType({}))
    trial: Trial | None = None
    previous: str | None = None
    ended: str = ""

    def to_bytes(self) -> bytes:
        """As it is on the disk."""
        value = {
            "format": FORMAT,
            "slots": {slot: asdict(self.slots[slot]) if slot in self.slots else None for slot in SLOTS},
            "trial": None if self.trial is None else asdict(self.trial),
            "previous": self.previous,
            "ended": self.ended,
        }
        return json.dumps(value, indent=1).encode() + b"\n"


def parse(data: bytes) -> State:
    """The state in slots.json.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is damaged.
    """
    value = json.loads(data)
    if value["format"] != FORMAT:
        raise ValueError(f"format {value['format']!r}")
    slots = {slot: _held(value["slots"][slot]) for slot in SLOTS if value["slots"].get(slot) is not None}
    trial = None if value["trial"] is None else _trial(value["trial"])
    previous = None if value["previous"] is None else _slot(value["previous"])
    return State(MappingProxyType(slots), trial, previous, str(value["ended"]))


def load(directory: Path) -> State:
    """The state on the disk; an empty one where there is none yet, or where it is damaged.

    A damaged one must not stop the unit: what runs is known without it, and of the other slot nothing is believed.
    """
    try:
        return parse((directory / "slots.json").read_bytes())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return State()


def save(directory: Path, state: State) -> None:
    """Make a state durable.

    Raises:
        OSError: the disk is full or read-only; the old one is untouched.
    """
    medium.write_file(directory / "slots.json", state.to_bytes())


def load_floor(directory: Path) -> int:
    """The security version that was kept; 0 before anything was."""
    try:
        return max(0, int((directory / "os-floor").read_text()))
    except (OSError, ValueError):
        return 0


def raise_floor(directory: Path, security_version: int) -> None:
    """The floor is at least this from now on; it never goes down.

    Raises:
        OSError: the disk is full or read-only; the old floor holds.
    """
    if security_version > load_floor(directory):
        medium.write_file(directory / "os-floor", b"%d\n" % security_version)


def _held(value: Any) -> Held:
    return Held(str(value["version"]), int(value["security_version"]), str(value["manifest"]))


def _trial(value: Any) -> Trial:
    slot, before = _slot(value["slot"]), _slot(value["before"])
    if slot == before:
        raise ValueError("a trial against itself")
    return Trial(slot, before, int(value["attempts"]), int(value["limit"]), bool(value["counted"]))


def _slot(value: Any) -> str:
    if value not in SLOTS:
        raise ValueError(f"no slot is called {value!r}")
    return str(value)
