"""What an update may never undercut: one small file, apart from the metadata whose loss it makes up for.

It holds the security version that this unit committed to, per kind of release, and for each role of the metadata the
newest version seen beside a digest of the keys that the role had then. A version is compared only while the keys are
the same: whoever steals the timestamp's key can sign version 2147483647, and after the root has replaced that key the
units must be able to follow the honest numbers again (TUF specification 5.3.11). The root's own version counts
whatever its keys are, so that nobody leads a unit back to keys that were replaced.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from firmware_agent import files
from firmware_agent.update.target import Downgrade

_LOG: Final = logging.getLogger(__name__)
_FORMAT: Final = 1
_ROOT: Final = "root"


@dataclass(frozen=True)
class Mark:
    """How new a role's metadata was.

    Attributes:
        version: of the metadata.
        keys: digest of the role's keys and threshold at that time.
    """

    version: int
    keys: str


@dataclass(frozen=True)
class Floor:
    """The floor at one moment.

    Attributes:
        security: kind of release (`agent`, `os`) to the security version committed to.
        metadata: role to the newest metadata seen.
    """

    security: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    metadata: Mapping[str, Mark] = field(default_factory=lambda: MappingProxyType({}))

    def check(self, seen: Mapping[str, Mark]) -> None:
        """Refuse metadata that is older than what was seen before.

        Raises:
            Downgrade: some role went back.
        """
        for role, mark in seen.items():
            floor = self.metadata.get(role)
            comparable = floor is not None and (role == _ROOT or floor.keys == mark.keys)
            if floor is not None and comparable and mark.version < floor.version:
                raise Downgrade(
                    f"the {role} metadata went back from version {floor.version} to {mark.version}: a rollback"
                )

    def raised(self, seen: Mapping[str, Mark]) -> "Floor":
        """The floor after `seen`, which `check` has passed, was made durable."""
        return Floor(self.security, MappingProxyType({**self.metadata, **seen}))

    def committed(self, kind: str, security_version: int) -> "Floor":
        """The floor after a release was committed to; it never goes down."""
        highest = max(security_version, self.security.get(kind, 0))
        return Floor(MappingProxyType({**self.security, kind: highest}), self.metadata)


def read_floor(path: Path) -> Floor:
    """The floor in a file; an empty one if there is no file, or if it is damaged.

    A damaged file must not stop updates for ever: the metadata on disk and the running release's manifest still hold,
    and the next check writes it anew.
    """
    try:
        value = files.read_json(path)
        return Floor() if value is None else _parse(value)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _LOG.warning("the floor file is damaged and begins anew: %s", error)
        return Floor()


def write_floor(path: Path, floor: Floor) -> None:
    """Make a floor durable.

    Raises:
        OSError: the disk is full or read-only; the old floor is untouched.
    """
    value = {
        "format": _FORMAT,
        "security": dict(floor.security),
        "metadata": {role: {"version": mark.version, "keys": mark.keys} for role, mark in floor.metadata.items()},
    }
    for left in path.parent.glob(f".{path.name}.*.new"):
        files.remove(left)  # of a write that was killed
    files.write_atomic(path, json.dumps(value, indent=1, sort_keys=True).encode(), 0o600)


def _parse(value: Any) -> Floor:
    if value["format"] != _FORMAT:
        raise ValueError(f"format {value['format']!r}")
    security = {str(kind): _whole(number) for kind, number in value["security"].items()}
    metadata = {str(role): Mark(_whole(mark["version"]), str(mark["keys"])) for role, mark in value["metadata"].items()}
    return Floor(MappingProxyType(security), MappingProxyType(metadata))


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no version")
    return value
