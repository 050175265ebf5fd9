"""The unit's serial console through pyserial: a port by path, a pty, or any URL that pyserial knows."""

import time
from collections.abc import Callable, Iterator

import serial

from factory.errors import StationFault

BAUD = 115_200


class SerialConsole:
    """A console behind a pyserial URL, e.g. `/dev/serial/by-path/...` or `socket://127.0.0.1:4000`.

    The URL is asked for when the console is read, for a virtual console has none before its board has power.
    """

    def __init__(self, url: Callable[[], str]) -> None:
        self._url = url

    def lines(self, seconds: float) -> Iterator[str]:
        """Every line from now on, for at most `seconds`.

        Raises:
            StationFault: there is no such port, or it broke away.
        """
        deadline = time.monotonic() + seconds
        url = self._url()
        try:
            with serial.serial_for_url(url, baudrate=BAUD, timeout=0.2, exclusive=True) as port:
                rest = b""
                while time.monotonic() < deadline:
                    rest += port.read(max(1, port.in_waiting))
                    *whole, rest = rest.split(b"\n")
                    for line in whole:
                        yield line.decode(errors="replace").rstrip("\r")
        except (serial.SerialException, OSError, ValueError) as error:
            raise StationFault(
                f"the console {url} cannot be read: {error}",
                advice="Check `console` in the bench file and the adapter's USB cable.",
            ) from error
