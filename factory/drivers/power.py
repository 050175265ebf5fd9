"""The unit's supply: the operator's hand on the switch, or a USB hub that can cut the power of one port."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from typing import Protocol

from factory.drivers.prompts import Operator
from factory.errors import LinkFault, StationFault, UserMistake

#: Runs a program by its argument list; returns what it printed.
Run = Callable[[list[str]], str]

_PLACE = re.compile(r"(?P<hub>\d+(-\d+(\.\d+)*)?):(?P<port>\d+)")
_STATUS = re.compile(r"^\s*Port (?P<port>\d+): [0-9a-f]{4}(?P<words>[^\[\n]*)", re.MULTILINE)
_SECONDS = 30


class Switch(Protocol):
    """A board's power, with words for the operator's hands at the moment when the switch goes."""

    def on(self, first: str = "") -> None:
        """Supply the board; before that, have the operator do `first`."""
        ...

    def off(self, then: str = "") -> None:
        """Cut the supply, safe when it is off already; after that, have the operator do `then`."""
        ...


class OperatorPower:
    """The operator switches. What they were told last is remembered, so that nobody is asked twice in a row."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self._is_on: bool | None = None

    def on(self, first: str = "") -> None:
        """Have it switched on; `first` comes before in the same prompt."""
        self._operator.ask(_sentence(first, "switch the board's power on"))
        self._is_on = True

    def off(self, then: str = "") -> None:
        """Have it switched off, unless it is; `then` follows in the same prompt."""
        switch = "" if self._is_on is False else "switch the board's power off"
        if switch or then:
            self._operator.ask(_sentence(switch, then))
        self._is_on = False


def _sentence(*parts: str) -> str:
    text = ", then ".join(filter(None, parts))
    return f"{text[:1].upper()}{text[1:]}."


class HubPower:
    """One port of a USB hub with per-port power switching, through uhubctl.

    Many hubs report a port as off and go on feeding it: see the board's LED go out once before a hub is trusted.
    """

    def __init__(self, hub: str, port: int, operator: Operator, run: Run) -> None:
        self._hub = hub
        self._port = port
        self._operator = operator
        self._run = run

    @classmethod
    def at(cls, place: str, operator: Operator, run: Run) -> "HubPower":
        """The port that a place such as `1-1:2` names: the hub's location as uhubctl prints it, and its port.

        Raises:
            UserMistake: it is no such place.
            StationFault: uhubctl is missing, or knows no such port.
        """
        match = _PLACE.fullmatch(place)
        if match is None:
            raise UserMistake(
                f"board.power: {place!r} is no port of a hub",
                advice="Write LOCATION:PORT as `uhubctl` shows them, e.g. hub:1-1:2.",
            )
        power = cls(match["hub"], int(match["port"]), operator, run)
        power._status()
        return power

    def on(self, first: str = "") -> None:
        """Supply the port.

        Raises:
            StationFault: the hub does not do it.
        """
        if first:
            self._operator.ask(_sentence(first))
        self._switch("on", "power")

    def off(self, then: str = "") -> None:
        """Cut the port's supply.

        Raises:
            StationFault: the hub does not do it.
        """
        self._switch("off", "off")
        if then:
            self._operator.ask(_sentence(then))

    def _switch(self, action: str, expected: str) -> None:
        self._run(["uhubctl", "-l", self._hub, "-p", str(self._port), "-a", action])
        # What it printed is not proof: ask the hub again what its ports are now (a USB 3 hub shows as two).
        for words in self._status():
            if expected not in words:
                raise LinkFault(
                    f"port {self._port} of hub {self._hub} did not switch {action}: it reports {' '.join(words)!r}",
                    advice="Check the hub, and that it is one of those that can switch single ports.",
                )

    def _status(self) -> list[list[str]]:
        said = self._run(["uhubctl", "-l", self._hub, "-p", str(self._port)])
        found = [one["words"].split() for one in _STATUS.finditer(said) if int(one["port"]) == self._port]
        if not found:
            raise StationFault(
                f"hub {self._hub} has no port {self._port} that can be switched",
                advice="`uhubctl` lists the hubs and ports that can: correct `power` in the bench file.",
            )
        return found


def run(command: list[str]) -> str:
    """Run a program to its end and return what it printed.

    Raises:
        StationFault: it is not installed, failed, or did not end.
    """
    # Debian keeps uhubctl in /usr/sbin, which is on root's PATH only.
    program = shutil.which(command[0], path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    if program is None:
        raise StationFault(
            f"{command[0]} is not installed", advice=f"Install Debian's package {command[0]}: apt install {command[0]}"
        )
    try:
        done = subprocess.run(
            [program, *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StationFault(f"`{shlex.join(command)}` did not end within {_SECONDS} s") from error
    said = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode:
        raise StationFault(
            f"`{shlex.join(command)}` failed with {done.returncode}: {' '.join(said.split())[-300:]}",
            advice="Run it by hand; without root it needs a udev rule that lets you control the hub.",
        )
    return said
