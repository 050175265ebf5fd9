"""The operator's hands: what the station asks a person to do where no driver can do it."""

import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from factory.errors import StationFault

_NOBODY = "Run it in a terminal, or name drivers in the bench file that need no hands (power, stimulus)."


class Operator(Protocol):
    """Somebody who stands at the bench."""

    def ask(self, what: str) -> None:
        """Have them do something, and wait until they say that it is done."""
        ...

    def tell(self, what: str) -> None:
        """Have them know or do something now; nobody waits."""
        ...


class TerminalOperator:
    """An operator at this process's terminal.

    The text goes to stderr, so that it neither mixes with JSON on stdout nor breaks a live table (which lets stderr
    through above itself). The answer comes from the terminal itself, so that a redirected stdin answers nothing.

    Raises:
        StationFault: there is no terminal, so nobody to ask.
    """

    def __init__(self) -> None:
        try:
            os.close(_open_terminal())
        except OSError as error:
            raise StationFault("this bench needs an operator, and there is no terminal", advice=_NOBODY) from error

    def ask(self, what: str) -> None:
        """Print `what`, and wait for Enter.

        Raises:
            StationFault: the terminal went away.
        """
        try:
            with _quiet_terminal() as terminal:
                self.tell(f"{what} Then press Enter.")
                while not (data := os.read(terminal, 1024)).endswith(b"\n"):
                    if not data:
                        raise OSError("end of file")
        except (OSError, termios.error) as error:
            raise StationFault("the operator's terminal went away", advice=_NOBODY) from error

    def tell(self, what: str) -> None:
        """Print `what`."""
        sys.stderr.write(f">>> {what}\n")
        sys.stderr.flush()


def _open_terminal() -> int:
    return os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)


@contextmanager
def _quiet_terminal() -> Iterator[int]:
    """The terminal without echo, for the Enter itself would move a live table by a line.

    What was typed before is forgotten: an Enter pressed too early confirms nothing.
    """
    terminal = _open_terminal()
    try:
        before = termios.tcgetattr(terminal)
        silent = termios.tcgetattr(terminal)
        silent[3] &= ~termios.ECHO
        termios.tcsetattr(terminal, termios.TCSAFLUSH, silent)
        try:
            yield terminal
        finally:
            termios.tcsetattr(terminal, termios.TCSANOW, before)
    finally:
        os.close(terminal)
