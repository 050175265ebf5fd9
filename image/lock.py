"""The lock of a recipe: every package by version and digest, so that the same lock gives the same root on any day.

    image/recipes/picket.toml     what people decide
    image/recipes/picket.lock     what the archive's own signed index had for it, when `make image-lock` was run

Recipes of the same packages share one (`lock_of`).

A lock pins four sets: `target` (the root), `headers` (Python's for the target, to compile against) and the native twins
of both kinds of build machine (`twin-amd64`, `twin-arm64`; image.twins). It names no host: where packages come from is
the recipe's business, and the digests say whether they are the right ones.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from image.errors import LockError
from image.recipe import Recipe

FORMAT: Final = 1
TARGET: Final = "target"
HEADERS: Final = "headers"
#: The sets of a lock; machines of these two architectures build images.
SETS: Final = (TARGET, HEADERS, "twin-amd64", "twin-arm64")

_PIN: Final = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]+) (?P<version>[0-9A-Za-z.+:~-]+) (?P<architecture>[a-z0-9]+) (?P<size>[0-9]+)"
    r" (?P<sha256>[0-9a-f]{64}) (?P<file>(?!/)(?!.*\.\./)[!-~]+\.deb)"
)


@dataclass(frozen=True, order=True)
class Pin:
    """One package, to the bit.

    Attributes:
        name: of the binary package.
        version: Debian's, with its epoch.
        architecture: the package's own; `all` for most scripts.
        size: of the .deb, in bytes.
        sha256: of the .deb, in hex.
        file: where an archive has it, relative to its top.
    """

    name: str
    version: str
    architecture: str
    size: int
    sha256: str
    file: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.architecture})"

    @property
    def line(self) -> str:
        """As it stands in the lock."""
        return f"{self.name} {self.version} {self.architecture} {self.size} {self.sha256} {self.file}"


@dataclass(frozen=True)
class Lock:
    """What a recipe's packages were resolved to.

    Attributes:
        wanted: what they were resolved for; a lock belongs to recipes that want the same.
        sets: pins by the name of their set, in the order of their names.
    """

    wanted: Mapping[str, tuple[str, ...]]
    sets: Mapping[str, tuple[Pin, ...]]

    def pins(self) -> tuple[Pin, ...]:
        """All pins, each once."""
        return tuple(sorted({pin for pins in self.sets.values() for pin in pins}))

    def dump(self) -> str:
        """The lock as a file: TOML, a line for each package."""
        lines = [
            "# Packages of the recipe beside this file, from the archive's signed index. Written by `make image-lock`.",
            f"format = {FORMAT}",
            "",
            "[wanted]",
            *(f"{name} = [{', '.join(_quoted(item) for item in items)}]" for name, items in self.wanted.items()),
            "",
            "[packages]  # name, version, architecture, bytes, SHA-256, place in the archive",
        ]
        for name, pins in self.sets.items():
            lines += [f"{name} = [", *(f"    {_quoted(pin.line)}," for pin in pins), "]"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Move:
    """What renewing a lock changed about one package; None where there is none."""

    set: str
    name: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        if self.old is None:
            return f"{self.set}: {self.name} {self.new} added"
        if self.new is None:
            return f"{self.set}: {self.name} {self.old} removed"
        if self.old == self.new:
            return f"{self.set}: {self.name} {self.old} has other bits"
        return f"{self.set}: {self.name} {self.old} -> {self.new}"


def wanted_by(recipe: Recipe, twins: Sequence[str], headers: str) -> dict[str, tuple[str, ...]]:
    """What a recipe's lock must be resolved for."""
    base = recipe.base
    vendor = (base.vendor.suite or base.suite, *base.vendor.components) if base.kind == "raspios" else ()
    return {
        "kind": (base.kind,),
        "suite": (base.suite,),
        "architecture": (base.architecture,),
        "components": base.components,
        "vendor": vendor,
        "packages": tuple(sorted(set(recipe.packages))),
        "twins": tuple(sorted(twins)),
        "headers": (headers,),
    }


def load(recipe: Recipe, wanted: Mapping[str, tuple[str, ...]]) -> Lock:
    """The lock that lies beside a recipe.

    Raises:
        LockError: there is none, it is damaged, or it was made for something else.
    """
    path = recipe.lock
    try:
        lock = parse(path.read_text(), str(path))
    except OSError as error:
        raise LockError(f"the lock {path} cannot be read: {error.strerror}; {_way_out(path)}") from error
    except UnicodeDecodeError as error:
        raise LockError(f"the lock {path} is no text; {_way_out(path)}") from error
    check_belongs(lock, wanted, path, recipe.file)
    return lock


def parse(text: str, name: str) -> Lock:
    """The lock in a file's text.

    Raises:
        LockError: it is damaged; the message names the place.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LockError(f"the lock {name} is no TOML: {error}; {_way_out(name)}") from error
    if table.get("format") != FORMAT:
        raise LockError(f"the lock {name} has format {table.get('format')!r}, this is for {FORMAT}; {_way_out(name)}")
    wanted = _texts(table.get("wanted"), name, "wanted")
    sets = {key: _pins(lines, name) for key, lines in _texts(table.get("packages"), name, "packages").items()}
    if set(sets) != set(SETS):
        raise LockError(f"the lock {name} must hold {', '.join(SETS)}; {_way_out(name)}")
    return Lock(MappingProxyType(wanted), MappingProxyType({key: sets[key] for key in SETS}))


def _texts(value: Any, name: str, place: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise LockError(f"the lock {name} has no [{place}]; {_way_out(name)}")
    for key, items in value.items():
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise LockError(f"the lock {name}: {place}.{key} is no list of texts; {_way_out(name)}")
    return {key: tuple(items) for key, items in value.items()}


def _pins(lines: Sequence[str], name: str) -> tuple[Pin, ...]:
    pins: dict[str, Pin] = {}
    for line in lines:
        found = _PIN.fullmatch(line)
        if found is None:
            raise LockError(f"the lock {name}: {line!r:.60} is no package; {_way_out(name)}")
        pin = Pin(found["name"], found["version"], found["architecture"], int(found["size"]), found["sha256"],
                  found["file"])  # fmt: skip
        if pin.name in pins:
            raise LockError(f"the lock {name}: {pin.name} stands there twice; {_way_out(name)}")
        pins[pin.name] = pin
    return tuple(sorted(pins.values()))


def check_belongs(lock: Lock, wanted: Mapping[str, tuple[str, ...]], path: Path, recipe: Path) -> None:
    """That a lock was made for what a recipe wants now.

    Raises:
        LockError: it was not; the message says what differs.
    """
    for key, items in wanted.items():
        locked = lock.wanted.get(key, ())
        if tuple(locked) == tuple(items):
            continue
        more, less = sorted(set(items) - set(locked)), sorted(set(locked) - set(items))
        differs = "; ".join(
            ([f"it lacks {', '.join(more)}"] if more else [])
            + ([f"it has {', '.join(less)}, which the recipe has not"] if less else [])
        )
        way_out = _way_out(path)
        if path != recipe.with_suffix(".lock"):
            way_out += f"; or take lock_of out of {recipe}: it then gets a lock of its own"
        raise LockError(
            f"the lock {path} does not belong to {recipe}: {key}: {differs or 'in another order'}; {way_out}"
        )


def moves(old: Lock | None, new: Lock) -> list[Move]:
    """What changed from one lock to the next, by set and name."""
    found = []
    for key in SETS:
        before = {pin.name: pin for pin in (old.sets[key] if old else ())}
        after = {pin.name: pin for pin in new.sets[key]}
        for name in sorted(set(before) | set(after)):
            was, now = before.get(name), after.get(name)
            if was is None or now is None or was.sha256 != now.sha256:
                found.append(Move(key, name, was.version if was else None, now.version if now else None))
    return found


def write(lock: Lock, path: Path) -> None:
    """Put a lock in place, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(lock.dump())
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _way_out(path: Path | str) -> str:
    return f"`make image-lock RECIPE={Path(path).with_suffix('.toml')}` makes it anew"


def _quoted(text: str) -> str:
    """TOML's literal text; none of ours holds a quote."""
    return f"'{text}'"
