"""What a signed target says about a release, and whether this unit may run it. Pure: nothing here touches disk or net.

Faults, by who must act; the `code` goes into the job's status:

    TrustFault
    ├── Unreachable        download        nobody answers, or answers something else: try again (`retry`)
    ├── ClockNotTrusted    download        whether metadata is expired cannot be told yet: try again (`retry`)
    ├── BadSignature       bad-signature   too few of the right keys signed this, or the files do not belong together
    │   ├── Expired        bad-signature   nobody renewed the metadata, or somebody holds back newer: (`retry`)
    │   └── NotListed      bad-signature   the signed metadata do not name this release, or do not any more
    ├── Downgrade          downgrade       older than what this unit has seen, or below its floor
    ├── BadTarget          bad-document    the path, or what was signed about it, makes no sense
    ├── WrongProduct       wrong-product
    ├── WrongHardware      wrong-hardware
    ├── WrongRing          not-possible    for the canaries, and this unit is none
    └── TooOldToUpdate     not-possible    the running release is older than `min_from`: an intermediate release first
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from firmware_agent.errors import AgentFault

_T = TypeVar("_T")

GIBIBYTE: Final = 1 << 30
_PATH: Final = re.compile(r"(?:agent|os)(?:/[A-Za-z0-9][A-Za-z0-9._+-]{0,127}){1,3}")
_VERSION: Final = re.compile(r"(?:0|[1-9][0-9]{0,5})(?:\.(?:0|[1-9][0-9]{0,5})){1,3}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9,._+-]{0,63}")


class TrustFault(AgentFault):
    """A release that this unit does not take; `retry` says whether the same job may end better later."""

    code = "bad-signature"
    retry = False


class Unreachable(TrustFault):
    """The metadata could not be fetched."""

    code = "download"
    retry = True


class ClockNotTrusted(TrustFault):
    """The time is not known well enough to judge what has expired."""

    code = "download"
    retry = True


class BadSignature(TrustFault):
    """Signatures or digests do not hold."""


class Expired(BadSignature):
    """Metadata past its date: a freeze attack, or a renewal that was forgotten."""

    retry = True


class NotListed(BadSignature):
    """No signed metadata names the target."""


class Downgrade(TrustFault):
    """Metadata or a release older than what may not be undercut."""

    code = "downgrade"


class BadTarget(TrustFault):
    """A target's path or signed description is malformed."""

    code = "bad-document"


class WrongProduct(TrustFault):
    """A release of another product."""

    code = "wrong-product"


class WrongHardware(TrustFault):
    """A release for other boards."""

    code = "wrong-hardware"


class WrongRing(TrustFault):
    """A release for canaries only, on a unit that is none."""

    code = "not-possible"


class TooOldToUpdate(TrustFault):
    """The running release cannot go to this one directly.

    Attributes:
        min_from: the oldest version that can.
    """

    code = "not-possible"

    def __init__(self, message: str, min_from: str) -> None:
        super().__init__(message)
        self.min_from = min_from


@dataclass(frozen=True)
class Payload:
    """A file to download, and how to know that each piece of it is right.

    Attributes:
        path: its target path, which is what the job document's `urls` go by.
        length: in bytes.
        sha256: hex digest of the whole file.
        chunk_bytes: length of every chunk but the last.
        chunks: hex SHA-256 of each chunk, in order.
    """

    path: str
    length: int
    sha256: str
    chunk_bytes: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class DeltaHint:
    """A delta that the release says exists; its own target says what it is."""

    source: str
    path: str


@dataclass(frozen=True)
class Target:
    """What was signed about a release.

    Attributes:
        kind: `agent` or `os`; each has a security floor of its own.
        product: for which it was made.
        version: its own.
        security_version: never goes down on a unit that committed to it.
        hardware: device-tree `compatible` strings, of which the board must have one.
        min_from: the oldest version that can be updated to it, or None.
        tar_sha256: of the uncompressed tar; the release's identity.
        tar_size: of that tar, in bytes.
        full: the archive.
        deltas: which deltas exist.
        delta: the one from the running release, if there is one that was signed.
    """

    kind: str
    product: str
    version: str
    security_version: int
    hardware: tuple[str, ...]
    min_from: str | None
    tar_sha256: str
    tar_size: int
    full: Payload
    deltas: tuple[DeltaHint, ...] = ()
    delta: Payload | None = None

    @property
    def release(self) -> str:
        """The name of its release directory."""
        return f"{self.version}-{self.tar_sha256[:8]}"


@dataclass(frozen=True)
class Running:
    """What runs on this unit now.

    Attributes:
        version: of the running release (for `os/` targets: of the image).
        security_version: from its manifest; counts as a floor even if all state was lost.
        hardware: the board's own device-tree `compatible` strings.
        tar: hex SHA-256 of its tar, or the first eight digits or more of it; empty if unknown (then no delta).
    """

    version: str
    security_version: int
    hardware: tuple[str, ...]
    tar: str = field(default="")


def version_key(version: str) -> tuple[int, ...]:
    """A version as numbers to compare; `1.2` and `1.2.0` are the same.

    Raises:
        BadTarget: it is not two to four numbers with dots between them.
    """
    if not _VERSION.fullmatch(version):
        raise BadTarget(f"{version[:40]!r} is no version")
    numbers = [int(part) for part in version.split(".")]
    return tuple(numbers + [0] * (4 - len(numbers)))


def check_path(path: str) -> str:
    """The kind (`agent` or `os`) of a target path.

    Raises:
        BadTarget: it is no path of a release.
    """
    if not _PATH.fullmatch(path):
        raise BadTarget(f"{path[:80]!r} is no path of a release")
    return path.partition("/")[0]


def parse_target(path: str, length: int, sha256: str, custom: object) -> Target:
    """The release that signed metadata describe.

    Keys that this agent does not know are passed over: a newer repository must stay readable for units that have not
    been updated yet. Known keys must be exactly right.

    Raises:
        BadTarget: something that is needed is missing or malformed; the message names it.
    """
    kind = check_path(path)
    fields = _Fields(path, custom)
    min_from = fields.take("min_from", _optional(_version))
    return Target(
        kind=kind,
        product=fields.take("product", _name),
        version=fields.take("version", _version),
        security_version=fields.take("security_version", _count(0, 2**31 - 1)),
        hardware=fields.take("hardware", _list(_name, 1, 64)),
        min_from=min_from,
        tar_sha256=fields.take("tar_sha256", _digest),
        tar_size=fields.take("tar_size", _count(1, GIBIBYTE)),
        full=_payload(path, length, sha256, fields),
        deltas=fields.take("deltas", _list(_hint, 0, 64)),
    )


def parse_delta(path: str, length: int, sha256: str, custom: object, source: str, result: str) -> Payload:
    """The delta that signed metadata describe.

    Args:
        path: of its target.
        length: in bytes.
        sha256: of the file.
        custom: what else was signed about it.
        source: tar digest that it must start from.
        result: tar digest that it must lead to.

    Raises:
        BadTarget: it is malformed, or leads elsewhere.
    """
    fields = _Fields(path, custom)
    if (fields.take("from", _digest), fields.take("to", _digest)) != (source, result):
        raise BadTarget(f"{path} does not lead from the running release to the new one")
    return _payload(path, length, sha256, fields)


def judge(target: Target, running: Running, product: str, floor: int) -> None:
    """Refuse a release that is signed, but not for this unit as it is.

    Args:
        target: the release.
        running: what runs now.
        product: whose releases this unit takes.
        floor: the security version that was committed to, from the floor file.

    Raises:
        WrongProduct, WrongHardware, Downgrade, TooOldToUpdate: as they say.
    """
    if target.product != product:
        raise WrongProduct(f"{target.full.path} is for {target.product}, and this unit is a {product}")
    if not set(target.hardware) & set(running.hardware):
        board = ", ".join(running.hardware) or "unknown"
        raise WrongHardware(f"{target.version} is for {', '.join(target.hardware)}, and this board is {board}")
    lowest = max(floor, running.security_version)
    if target.security_version < lowest:
        raise Downgrade(f"{target.version} has security version {target.security_version}, the floor is {lowest}")
    if target.min_from is not None and version_key(running.version) < version_key(target.min_from):
        raise TooOldToUpdate(
            f"{target.version} can be reached from {target.min_from} on, and {running.version} runs", target.min_from
        )


class _Fields:
    """Signed, but foreign: every field is parsed before anything uses it."""

    def __init__(self, path: str, custom: object) -> None:
        if not isinstance(custom, dict):
            raise BadTarget(f"{path} is signed without a description")
        self._path = path
        self._custom: Mapping[str, Any] = custom

    def take(self, key: str, parse: Callable[[Any], _T]) -> _T:
        if key not in self._custom:
            raise BadTarget(f"{self._path} is signed without {key}")
        try:
            return parse(self._custom[key])
        except ValueError as error:
            raise BadTarget(f"{self._path} is signed with a {key} that is not {error}") from None


def _payload(path: str, length: int, sha256: str, fields: _Fields) -> Payload:
    if not 1 <= length <= GIBIBYTE:
        raise BadTarget(f"{path} is signed as {length} bytes long")
    if not _DIGEST.fullmatch(sha256):
        raise BadTarget(f"{path} is signed without a SHA-256")
    chunk = fields.take("chunk_bytes", _count(65536, 16 << 20))
    count = -(-length // chunk)
    chunks = fields.take("chunks", _list(_digest, count, count))
    return Payload(path, length, sha256, chunk, chunks)


def _text(value: object, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(what)
    return value


def _digest(value: object) -> str:
    return _text(value, _DIGEST, "64 hex digits")


def _name(value: object) -> str:
    return _text(value, _NAME, "a plain name")


def _version(value: object) -> str:
    return _text(value, _VERSION, "a version")


def _hint(value: object) -> DeltaHint:
    if not isinstance(value, dict):
        raise ValueError("a list of from and target")  # noqa: TRY004 - one kind of error says what was expected
    return DeltaHint(_digest(value.get("from")), _text(value.get("target"), _PATH, "a list of from and target"))


def _count(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def _list(parse: Callable[[object], _T], low: int, high: int) -> Callable[[object], tuple[_T, ...]]:
    def parse_all(value: object) -> tuple[_T, ...]:
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise ValueError(f"a list of {low} entries" if low == high else f"a list of {low} to {high} entries")
        return tuple(parse(item) for item in value)

    return parse_all


def _optional(parse: Callable[[object], _T]) -> Callable[[object], _T | None]:
    def parse_or_none(value: object) -> _T | None:
        return None if value is None else parse(value)

    return parse_or_none
