"""The slots of this unit, as root's helper manages them behind a Unix socket (image: /usr/lib/picket/slots).

One connection is one question, a JSON line; the bundle goes along as an open file, so that root reads nothing by a name
that the agent could change. The answer is lines `{"progress": 0.25}`, then `{"ok": ...}` or `{"error": ...}`.
"""

import json
import logging
import os
import socket
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from firmware_agent import files
from firmware_agent.errors import AgentFault
from firmware_agent.jobs.os_update import Refused

_log = logging.getLogger(__name__)

#: Root's helper starts, and may wait for another one that is at it.
_ANSWER_SECONDS: Final = 120.0
#: Asking again, where that does no harm.
_ATTEMPTS: Final = 3
_PAUSE_SECONDS: Final = 2.0

_LINE_LIMIT: Final = 64 << 10
_MANIFEST_LIMIT: Final = 64 << 10

#: The helper's words for "never" → the job's. All others may end better another time.
_REFUSALS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bad-signature": "bad-signature",
        "bad-bundle": "bad-document",
        "wrong-product": "wrong-product",
        "wrong-hardware": "wrong-hardware",
        "wrong-control": "not-possible",
        "wrong-disk": "not-possible",
        "too-large": "not-possible",
        "downgrade": "downgrade",
    },
)


class SlotsFault(AgentFault):
    """Root's helper cannot do it now."""

    code = "install"


class NoAnswer(SlotsFault):
    """Nobody knows whether it was done."""


class UnitSlots:
    """The slots behind root's helper.

    Args:
        path: its socket.
        reboot_request: the file that root watches for (settings: `paths.reboot_request`).
        seconds: how long an answer may take to begin or to go on.
        pause: before it is asked again.
    """

    def __init__(
        self, path: Path, reboot_request: Path, *, seconds: float = _ANSWER_SECONDS, pause: float = _PAUSE_SECONDS
    ) -> None:
        self._path = path
        self._request = reboot_request
        self._seconds = seconds
        self._pause = pause
        self._booted: str | None = None

    def missing(self) -> str | None:
        """Nothing, if the helper answers.

        Raises:
            SlotsFault: it does not; that may pass.
        """
        self.booted()
        return None

    def booted(self) -> str:
        """The slot that runs; asked once, for it stays the same until the board restarts."""
        if self._booted is None:
            self._booted = _slot(self._again("status").get("booted"))
        return self._booted

    def other(self) -> str:
        """The slot that does not."""
        return "b" if self.booted() == "a" else "a"

    def agent_security_version(self, bundle: Path) -> int:
        """What the bundle's manifest says of its agent."""
        try:
            with tarfile.open(bundle, "r:") as tar:
                first = tar.next()
                if first is None or first.name != "manifest.json" or not first.isreg() or first.size > _MANIFEST_LIMIT:
                    raise Refused("bad-document", "the bundle does not begin with its manifest")
                content = tar.extractfile(first)
                value = json.loads(content.read() if content else b"")["agent_security_version"]
        except (tarfile.TarError, ValueError, TypeError, KeyError, EOFError) as error:
            raise Refused("bad-document", f"the bundle's manifest cannot be read: {error}") from error
        if not isinstance(value, int) or isinstance(value, bool):
            raise Refused("bad-document", "the bundle does not say what its agent's security version is")
        return value

    def install(self, bundle: Path, progress: Callable[[float], None]) -> None:
        """Write a bundle into the other slot. Whatever `progress` raises ends it; the helper then stops as well.

        Raises:
            Refused, SlotsFault: as the helper says.
        """
        handle = os.open(bundle, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._ask("install", handle, progress)
        finally:
            os.close(handle)

    def try_other(self) -> None:
        """Boot the other slot once, at the next restart."""
        self._again("try")

    def ended(self) -> str:
        """Why the last trial ended, as root noted it; empty if there was none since the last install."""
        value = self._again("status").get("ended")
        if not isinstance(value, str):
            raise SlotsFault(f"root's helper for the slots says that a trial ended by {value!r}")
        return value

    def restart(self) -> None:
        """Ask root for a restart of the board."""
        files.write_atomic(self._request, b"os-update\n")

    def withdraw(self) -> None:
        """Ask for it no more."""
        for left in (self._request, *self._request.parent.glob(f".{self._request.name}.*.new")):
            files.remove(left)
        files.sync_directory(self._request.parent)

    def keep(self) -> None:
        """The running slot is the one to boot from now on."""
        self._again("keep")

    def go_back(self) -> None:
        """The slot before is the one to boot from now on."""
        self._again("go-back")

    def _again(self, verb: str) -> Mapping[str, Any]:
        """Ask what does no harm twice, until there is an answer."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._ask(verb)
            except NoAnswer as error:
                _log.warning("%s; asked again", error)
                time.sleep(self._pause)
        return self._ask(verb)

    def _ask(
        self, verb: str, handle: int | None = None, progress: Callable[[float], None] = lambda _: None
    ) -> Mapping[str, Any]:
        """The answer to a question.

        Raises:
            Refused, SlotsFault: as the helper says.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(self._seconds)
            try:
                peer.connect(str(self._path))
                question = json.dumps({"verb": verb}).encode() + b"\n"
                socket.send_fds(peer, [question], [] if handle is None else [handle])
            except OSError as error:
                raise NoAnswer(f"root's helper for the slots cannot be asked: {error}") from error
            with peer.makefile("rb") as lines:
                while True:
                    value = _line(lines.readline)
                    if "progress" not in value:
                        return _result(verb, value)
                    progress(_fraction(value["progress"]))


def _line(readline: Callable[[int], bytes]) -> Mapping[str, Any]:
    try:
        text = readline(_LINE_LIMIT)
        value = json.loads(text) if text.endswith(b"\n") else None
    except (OSError, ValueError) as error:
        raise NoAnswer(f"root's helper for the slots does not answer: {error}") from error
    if not isinstance(value, dict):
        raise NoAnswer("root's helper for the slots broke off")
    return value


def _result(verb: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(done := value.get("ok"), dict):
        return done
    error = value.get("error")
    if not isinstance(error, dict):
        raise SlotsFault(f"root's helper for the slots answers {verb} by nonsense")
    code, detail = str(error.get("code")), str(error.get("detail"))
    if verb == "install" and code in _REFUSALS:
        raise Refused(_REFUSALS[code], detail)
    raise SlotsFault(f"{verb}: {detail} ({code})")


def _fraction(value: object) -> float:
    return min(1.0, max(0.0, value)) if isinstance(value, int | float) else 0.0


def _slot(value: object) -> str:
    if value not in {"a", "b"}:
        raise SlotsFault(f"root's helper for the slots says that {value!r} runs")
    return str(value)


def image_security_version(layout: Path) -> int:
    """The security version of the image that runs; 0 for one that was built without slots."""
    try:
        value = json.loads(layout.read_bytes())["security_version"]
        return max(0, int(value))
    except (OSError, ValueError, TypeError, KeyError):
        return 0
