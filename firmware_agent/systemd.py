"""Telling systemd how the agent is: sd_notify(3), which is one datagram, and nothing where nobody listens."""

import contextlib
import socket
from collections.abc import Mapping


class Systemd:
    """The service manager's ear.

    Args:
        address: the value of `NOTIFY_SOCKET`; None where the agent was not started by systemd.
        watchdog_seconds: how soon it kills a silent service; None without a watchdog.
    """

    def __init__(self, address: str | None = None, watchdog_seconds: float | None = None) -> None:
        self._address = address
        self.watchdog_seconds = watchdog_seconds

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Systemd":
        """As systemd announces itself to `Type=notify` services."""
        microseconds = environment.get("WATCHDOG_USEC")
        return cls(environment.get("NOTIFY_SOCKET"), int(microseconds) / 1e6 if microseconds else None)

    def ready(self) -> None:
        """The service does its work now."""
        self._say("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._say("STATUS=" + text.replace("\n", " "))

    def alive(self) -> None:
        """Feed the watchdog."""
        self._say("WATCHDOG=1")

    def stopping(self) -> None:
        """The service is on its way out."""
        self._say("STOPPING=1")

    def _say(self, message: str) -> None:
        if self._address is None:
            return
        # A leading @ stands for the NUL of Linux's abstract socket names.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A service manager that is gone is no reason for an alarm system to stop.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.sendto(message.encode(), address)
