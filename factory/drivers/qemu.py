"""QEMU and its helpers as child processes, and the two sockets by which a running QEMU is spoken to.

Children die with the station, however it ends: `setpriv --pdeathsig` lets the kernel see to that. It counts the thread
that started them, so power is switched from a thread that lives as long as the board does.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from factory.errors import StationFault

_SETUP = "Run `make setup`: it installs the system packages of the virtual Pi."
_ANSWER_SECONDS = 10.0
_START_SECONDS = 20.0
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def program(name: str) -> str:
    """The path of a program.

    Raises:
        StationFault: it is not installed.
    """
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    if found is None:
        raise StationFault(f"{name} is not installed on this station", advice=_SETUP)
    return found


def run(*command: str | Path) -> str:
    """Run a program to its end; returns what it printed.

    Raises:
        StationFault: it is not installed, or it failed.
    """
    name, *arguments = map(str, command)
    done = subprocess.run([program(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StationFault(f"{name} {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Child:
    """A process that lives no longer than the station. What it says goes to a log file."""

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [program("setpriv"), "--pdeathsig", "KILL", "--", program(name), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the station is the station's to handle
            )

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready` says so.

        Raises:
            StationFault: the process ended, or did not become ready; its last words are in the message.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            if not self.running or time.monotonic() > deadline:
                how = "did not start in time" if self.running else f"ended at once ({self._process.returncode})"
                said = self._log.read_text(errors="replace").strip()[-800:]
                self.stop()
                raise StationFault(f"{self.name} {how}: {said or 'it said nothing'}", advice=f"Its log is {self._log}.")
            time.sleep(0.01)

    def stop(self, *, politely: bool = False) -> None:
        """End it; politely leaves it two seconds to save its state."""
        if self.running:
            self._process.send_signal(signal.SIGTERM if politely else signal.SIGKILL)
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Lines:
    """A Unix socket with lines."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_ANSWER_SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._rest = b""

    def send(self, line: str) -> None:
        try:
            self._socket.sendall(line.encode() + b"\n")
        except OSError as error:
            raise StationFault(f"QEMU is gone: {error}") from error

    def wait_for_ever(self) -> None:
        """Let what is received take its time."""
        self._socket.settimeout(None)

    def receive(self) -> str:
        while b"\n" not in self._rest:
            try:
                part = self._socket.recv(65536)
            except OSError as error:
                raise StationFault(f"QEMU does not answer: {error}") from error
            if not part:
                raise StationFault("QEMU is gone")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        self._socket.close()


class Qmp:
    """QEMU's machine protocol (qemu.org docs/interop/qmp-spec)."""

    def __init__(self, path: Path) -> None:
        self._lines = _Lines(path)
        self._lines.receive()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Execute a command and return its result; events on the way are passed over."""
        self._lines.send(json.dumps({"execute": command, "arguments": arguments}))
        while True:
            message = json.loads(self._lines.receive())
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise StationFault(f"QEMU refuses {command}: {message['error'].get('desc')}")

    def end(self) -> str:
        """Wait for the machine's end and say how it came, as QAPI's ShutdownCause names it: `guest-reset` and so on.

        `watchdog` where that was its cause, which QAPI does not tell apart; empty where QEMU was killed.
        """
        self._lines.wait_for_ever()
        starved = False
        try:
            while True:
                message = json.loads(self._lines.receive())
                starved = starved or message.get("event") == "WATCHDOG"
                if message.get("event") == "SHUTDOWN":
                    return "watchdog" if starved else str(message["data"].get("reason", ""))
        except StationFault:
            return ""

    def find(self, kind: str) -> str:
        """The path of the first device of a type that the machine made by itself.

        Raises:
            StationFault: the machine has none.
        """
        for item in self.ask("qom-list", path="/machine/unattached"):
            if item["type"] == f"child<{kind}>":
                return f"/machine/unattached/{item['name']}"
        raise StationFault(f"this QEMU's machine has no {kind}")

    def close(self) -> None:
        """Hang up."""
        self._lines.close()


class Qtest:
    """QEMU's test protocol (docs/devel/testing/qtest), here only to drive a wire from outside."""

    def __init__(self, path: Path) -> None:
        self._lines = _Lines(path)

    def set_input(self, device: str, line: int, *, high: bool) -> None:
        """Drive an unnamed GPIO input of a device."""
        self._lines.send(f"set_irq_in {device} unnamed-gpio-in {line} {int(high)}")
        answer = self._lines.receive()
        if not answer.startswith("OK"):
            raise StationFault(f"QEMU does not drive {device} line {line}: {answer}")

    def close(self) -> None:
        """Hang up."""
        self._lines.close()


def free_port() -> int:
    """A TCP port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
