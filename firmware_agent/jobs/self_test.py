"""The kind `self-test`: look at sensor, key, spool, disk, memory and clock, and say what was seen.

    test      each check says what it has seen, or what is wrong          (nothing is changed)

SUCCEEDED if all is well, FAILED `unhealthy` if not; in both cases each check's words are in statusDetails. The checks
themselves are used by an update's health gate, too (`vital`).
"""

import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from firmware_agent.board import Board
from firmware_agent.errors import AgentFault
from firmware_agent.jobs.kind import Context, Done, Failed, Phase, Result
from firmware_agent.jobs.single import Single

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

#: Below this an alarm system has no room to work: 8 MiB for the spool, 24 MiB for everything else.
LEAST_DISK_BYTES: Final = 32 << 20
LEAST_MEMORY_BYTES: Final = 16 << 20

#: What a unit cannot do its work without; a release that fails one of these is not kept.
VITAL: Final = ("pir", "key", "spool")

#: Says what it has seen; raises what is wrong.
Check = Callable[[], str]


class Unwell(AgentFault):
    """A check has seen something that is not right."""

    code = "unhealthy"


class Signer(Protocol):
    """The part of a device key that is tried."""

    def public_key(self) -> "ec.EllipticCurvePublicKey":
        """Its other half."""
        ...

    def sign(self, data: bytes) -> bytes:
        """An ECDSA signature with SHA-256, DER."""
        ...


def check_pir(level: Callable[[], int]) -> str:
    """Read the sensor's line."""
    return f"the line reads {'high' if level() else 'low'}"


def check_key(key: Signer) -> str:
    """Sign something new, and verify it."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - ten megabytes that the running agent does without
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    nonce = os.urandom(32)
    try:
        key.public_key().verify(key.sign(nonce), nonce, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise Unwell("the key signs, but not what its certificate could verify") from None
    return "signs"


def check_spool(probe: Callable[[], None], depth: Callable[[], int]) -> str:
    """Make a message durable and take it back."""
    try:
        probe()
    except sqlite3.Error as error:
        raise Unwell(f"an alarm could not be kept: {error}") from error
    return f"keeps messages; {depth()} wait"


def check_disk(board: Board, state: Path) -> str:
    """Look for room."""
    free = board.health(state).disk_free_bytes
    return _enough(free, LEAST_DISK_BYTES)


def check_memory(board: Board, state: Path) -> str:
    """Look for memory."""
    return _enough(board.health(state).memory_free_bytes, LEAST_MEMORY_BYTES)


def check_clock(board: Board) -> str:
    """Say how good the clock is; a bad one is no fault of the unit's."""
    return f"set by {quality}" if (quality := board.clock().quality) != "estimated" else "estimated: no server answered"


def _enough(free: int, least: int) -> str:
    words = f"{free >> 20} MiB free"
    if free < least:
        raise Unwell(f"{words}, {least >> 20} are needed")
    return words


def pir_of(opened: Callable[[], AbstractContextManager[Callable[[], int]]]) -> Check:
    """A check that opens the line itself, for a unit that has not opened it yet."""

    def check() -> str:
        with opened() as level:
            return check_pir(level)

    return check


def outcome(check: Check) -> tuple[bool, str]:
    """Whether a check is content, and its words."""
    try:
        return True, check()
    except AgentFault as fault:
        return False, str(fault)
    except Exception as error:  # noqa: BLE001 - a check that breaks has found something
        return False, f"{type(error).__name__}: {error}"


def vital(checks: Mapping[str, Check]) -> Callable[[], str | None]:
    """A health gate out of the vital checks: what is wrong now, or None."""

    def problem() -> str | None:
        seen = {name: outcome(checks[name]) for name in VITAL}
        wrong = [f"{name}: {words}" for name, (well, words) in seen.items() if not well]
        return "; ".join(wrong) or None

    return problem


class SelfTest(Single):
    """Run all checks.

    Args:
        checks: name to check; at most seven.
    """

    operation = "self-test"

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = dict(checks)
        self.phases = (Phase("test", self._test, code="unhealthy"),)

    def _test(self, context: Context) -> Result:
        seen: dict[str, tuple[bool, str]] = {}
        for name, check in self._checks.items():
            seen[name] = outcome(check)
            context.progress(len(seen) / len(self._checks))
        details = {name: f"{'ok' if well else 'bad'}: {words}" for name, (well, words) in seen.items()}
        wrong = [name for name, (well, _) in seen.items() if not well]
        if wrong:
            return Failed("unhealthy", f"not well: {', '.join(wrong)}", details)
        return Done(details)
