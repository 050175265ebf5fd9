"""The agent's log: one line per event, its level and place first, and nothing in it that is secret.

    <4>warning link: offline: tls, AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE

The number is the journal's priority (sd-daemon(3)); the journal adds the time. Whatever a line was made from, it passes
through the same filter as a log that leaves the unit (`jobs.redact`). The last complaints are also kept in memory, for
`picket-agent status`.
"""

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, TextIO

from firmware_agent.jobs.redact import redact

#: Python's levels to syslog's (RFC 5424, 6.2.1).
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG: Final = 7

#: A line of the journal is cut at 48 kB by default; nobody reads so long a line.
LONGEST: Final = 4000

_KEPT: Final = 20


class Line(logging.Formatter):
    """One record, one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without an end."""
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG)
        return f"<{priority}>{record.levelname.lower()} {_place(record)}: {message(record)}"


def message(record: logging.LogRecord) -> str:
    """What a record says, in one line without secrets."""
    text = record.getMessage()
    if record.exc_info and record.exc_info[0] is not None:
        kind, error, trace = record.exc_info
        text += f" | {kind.__name__}: {error}{_way(trace)}"
    text = " ".join(redact(text).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _place(record: logging.LogRecord) -> str:
    return record.name.removeprefix("firmware_agent.").replace("firmware_agent", "agent")


def _way(trace: TracebackType | None) -> str:
    """A traceback in one line, the innermost call last."""
    steps = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
    return " (" + " > ".join(steps[-8:]) + ")" if steps else ""


@dataclass(frozen=True)
class Complaint:
    """A warning or worse.

    Attributes:
        uptime: when, in seconds of the monotonic clock.
        level: `warning`, `error` or `critical`.
        text: what, with its place.
        times: how often it was said in a row.
    """

    uptime: float
    level: str
    text: str
    times: int = 1


class Complaints(logging.Handler):
    """Keeps the last warnings and errors; the same one said again takes no room."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._clock = clock
        self._kept: deque[Complaint] = deque(maxlen=_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        level, text = record.levelname.lower(), f"{_place(record)}: {message(record)}"
        times = 1
        if self._kept and (self._kept[-1].level, self._kept[-1].text) == (level, text):
            times += self._kept.pop().times
        self._kept.append(Complaint(self._clock(), level, text, times))

    def last(self) -> tuple[Complaint, ...]:
        """The oldest first."""
        self.acquire()
        try:
            return tuple(self._kept)
        finally:
            self.release()


def set_up(stream: TextIO, *handlers: logging.Handler, level: int = logging.INFO) -> None:
    """All loggers write their lines to `stream`, and tell `handlers`."""
    lines = logging.StreamHandler(stream)
    lines.setFormatter(Line())
    logging.basicConfig(level=level, handlers=[lines, *handlers], force=True)
