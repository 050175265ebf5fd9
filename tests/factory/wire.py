"""The virtual Pi's console, to hear and to type at."""

import socket

from factory.drivers.virtual_pi import VirtualPi

SECONDS = 30.0


class Wire:
    """The console's other end."""

    def __init__(self, board: VirtualPi, seconds: float = SECONDS) -> None:
        host, _, port = board.console_url().removeprefix("socket://").partition(":")
        self._socket = socket.create_connection((host, int(port)), seconds)
        self._said = b""

    def hear(self, wanted: str) -> str:
        """Wait for a line that holds this."""
        while True:
            *lines, rest = self._said.split(b"\n")
            for index, line in enumerate(lines):
                if wanted in line.decode(errors="replace"):
                    self._said = b"\n".join([*lines[index + 1 :], rest])
                    return line.decode(errors="replace").strip()
            data = self._socket.recv(4096)
            assert data, f"the console fell silent; expected {wanted!r} in {self._said!r}"
            self._said += data

    def say(self, text: str) -> None:
        self._socket.sendall(text.encode())

    def close(self) -> None:
        self._socket.close()
