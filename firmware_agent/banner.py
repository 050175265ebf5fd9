"""The factory banner: how a unit in factory mode shows itself on its serial console.

This runs early in the boot on a slow core, so it imports the standard library alone and re-reads what may still change:
an address that DHCP brings, the SSH host key that the first boot makes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from firmware_agent import __version__
from firmware_agent.board import Board, addresses
from firmware_agent.settings import Settings
from firmware_agent.wire import Banner

INTERVAL_SECONDS = 2.0


def host_key(path: Path) -> str:
    """The SSH host key's public half as type and base64, without its comment; empty while there is none."""
    try:
        return " ".join(path.read_text().split()[:2])
    except OSError:
        return ""


def banner(settings: Settings, board: Board) -> Banner:
    """What this unit says now."""
    facts = board.facts()
    return Banner(
        board=facts.serial,
        addresses=addresses(),
        host_key=host_key(settings.paths.host_key),
        agent=__version__,
        image=str(settings.image),
        boot_id=facts.boot_id,
    )


def repeat(
    settings: Settings,
    board: Board,
    out: TextIO,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Say the banner until the station has opened a session in this boot.

    It stays silent while there is no host key: without one the station could not pin its connection.
    """
    while not settings.paths.answered.exists():
        now = banner(settings, board)
        if now.host_key:
            # The newline in front gives the line a start of its own behind half a kernel message.
            out.write("\r\n" + now.line() + "\r\n")
            out.flush()
        sleep(INTERVAL_SECONDS)
