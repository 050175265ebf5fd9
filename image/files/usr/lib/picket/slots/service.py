"""The socket and the command line.

On the socket one JSON line is the question, `{"verb": "install"}`; with install, an open file comes along (SCM_RIGHTS).
The answer is any number of lines `{"progress": 0.25}`, then `{"ok": {...}}` or `{"error": {"code", "detail"}}`.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from . import factory_mode
from .board import Places
from .faults import Fault, Gone
from .slots import Slots, log

_QUESTION_LIMIT: Final = 4096
_QUESTION_SECONDS: Final = 30.0
#: Progress goes out so often at most.
_TOLD_SECONDS: Final = 1.0

_VERBS: Final = ("status", "try", "keep", "go-back", "check", "end-trial")
_USAGE: Final = """\
usage: slots status [--json]   what the slots hold, and which one runs
       slots install FILE      write a bundle into the other slot
       slots try               boot the other slot once, at the next restart
       slots keep              boot the running slot from now on
       slots go-back           boot the slot before from now on
For systemd's units: serve, check, end-trial. For the initramfs: factory-mode, with the authorisation as its input."""


def answer(slots: Slots, verb: object, handle: int | None, progress: Callable[[float], None]) -> dict[str, Any]:
    """What a verb comes to.

    Raises:
        Fault: it does not work.
    """
    if verb == "install":
        if handle is None:
            raise Fault("bad-request", "install wants an open file")
        return slots.install(handle, progress)
    verbs = {"status": slots.status, "try": slots.try_other, "keep": slots.keep, "go-back": slots.go_back}
    if not isinstance(verb, str) or verb not in verbs:
        raise Fault("bad-request", f"there is no verb {str(verb)[:40]!r}")
    return verbs[verb]()


class Progress:
    """Tells a peer how far it is, not too often. A peer that is gone stops the work: it will ask again."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._last = 0.0

    def __call__(self, fraction: float) -> None:
        """So much is done."""
        now = time.monotonic()
        if now - self._last >= _TOLD_SECONDS:
            self._last = now
            say(self._peer, {"progress": round(fraction, 3)})


def say(peer: socket.socket, value: dict[str, Any]) -> None:
    """One line.

    Raises:
        Gone: nobody listens.
    """
    try:
        peer.sendall(json.dumps(value).encode() + b"\n")
    except OSError as error:
        raise Gone(f"whoever asked is gone: {error}") from error


def hear(peer: socket.socket) -> tuple[object, int | None]:
    """The verb and the file that came along.

    Raises:
        Fault: bad-request.
    """
    peer.settimeout(_QUESTION_SECONDS)
    data, handles = b"", list[int]()
    try:
        while not data.endswith(b"\n"):
            piece, more, _, _ = socket.recv_fds(peer, _QUESTION_LIMIT, 4)
            handles += more
            data += piece
            if not piece or len(data) > _QUESTION_LIMIT:
                raise Fault("bad-request", "no question came")
        value = json.loads(data)
        if not isinstance(value, dict) or set(value) != {"verb"} or len(handles) > 1:
            raise Fault("bad-request", "a question is a verb, with one file at most")
    except (ValueError, OSError) as error:
        raise Fault("bad-request", f"no question came: {error}") from error
    peer.settimeout(None)
    return value["verb"], handles[0] if handles else None


def serve(peer: socket.socket, slots: Callable[[], Slots]) -> None:
    """Answer one question; `slots` looks at the unit."""
    try:
        try:
            verb, handle = hear(peer)
            done = {"ok": answer(slots(), verb, handle, Progress(peer))}
        except (Fault, OSError) as error:
            fault = error if isinstance(error, Fault) else Fault("io", str(error))
            log(f"{fault.code}: {fault.detail}")
            done = {"error": {"code": fault.code, "detail": fault.detail}}
        say(peer, done)
    except Gone as gone:
        log(str(gone))


def restart() -> None:
    """Ask systemd for an ordinary reboot."""
    subprocess.run(["/usr/bin/systemctl", "--no-block", "reboot"], check=True, timeout=60)


def main(words: Sequence[str]) -> int:
    """Run; 1 is a fault, 2 a mistake in the words."""
    places = Places.under(Path(os.environ.get("PICKET_ROOT", "/")))
    match list(words):
        case ["serve"]:
            serve(socket.socket(fileno=0), lambda: Slots.of_this_unit(places))
            return 0
        case [("status" | "try" | "keep" | "go-back" | "check" | "end-trial") as verb, *rest] if rest in (
            [],
            ["--json"],
        ):
            return _command(places, verb, None, as_json="--json" in rest)
        case ["factory-mode"]:
            return _factory_mode(places)
        case ["install", path]:
            return _command(places, "install", path, as_json=False)
        case _:
            log(_USAGE)
            return 2


def _command(places: Places, verb: str, path: str | None, *, as_json: bool) -> int:
    try:
        slots = Slots.of_this_unit(places)
        if verb in {"check", "end-trial"}:
            if slots.check() if verb == "check" else slots.end_trial():
                restart()
            return 0
        with contextlib.ExitStack() as stack:
            handle = stack.enter_context(Path(path).open("rb")).fileno() if path else None
            done = answer(slots, verb, handle, lambda _: None)
    except (Fault, OSError, subprocess.SubprocessError) as error:
        log(f"{error.code}: {error.detail}" if isinstance(error, Fault) else str(error))
        return 1
    text = json.dumps(done, indent=1) if as_json or verb != "status" else _words(done)
    sys.stdout.write(f"{text}\n")
    return 0


def _factory_mode(places: Places) -> int:
    """Whether standard input opens factory mode, for this boot; what is said goes to the console."""
    try:
        factory_mode.enter(sys.stdin.buffer.read(factory_mode.LIMIT + 1), places)
    except (Fault, OSError, UnicodeError) as error:
        log(f"factory mode stays closed: {error}")
        return 1
    log("factory mode, by a signed authorisation, until the next boot")
    return 0


def _words(status: dict[str, Any]) -> str:
    """A status for people."""
    lines = []
    for slot, held in status["slots"].items():
        what = f"{status['product']} {held['version']}" if held else "empty"
        marks = [name for name, is_so in (
            ("runs", status["booted"] == slot),
            ("is booted by default", status["kept"] == slot),
            ("on trial", status["trial"] is not None and status["trial"]["slot"] == slot),
        ) if is_so]  # fmt: skip
        lines.append(f"{slot}  {what}{': ' if marks else ''}{', '.join(marks)}")
    lines.append(f"security floor {status['floor']}; one try by {status['one_try']}")
    if status["ended"]:
        lines.append(f"the last trial ended: {status['ended']}")
    return "\n".join(lines)
