"""Process 1 of the simulated board: starts the product as systemd does on a unit, watches over it, and starts it again.

    python3 -I -S simulated_init.py CONFIG.json

A program of its own, the standard library alone, so that it starts at once. It and the product are one process group,
so a SIGKILL to that group is what a power cut is to a board: everything ends between two instructions. Its standard
input is the supply: when the station's end of the pipe closes, however the station ended, the power is gone.

What it takes over from image/files/usr/lib/systemd/system/picket-agent.service: `Type=notify` (READY=1, WATCHDOG=1,
STATUS=, from the main process only), `WatchdogSec` and `TimeoutStartSec`, and `Restart=always` with growing pauses. As
picket-reboot.path does, it looks for a file that asks for a reboot; it then ends the product politely and itself with
`EXIT_REBOOT`, and the board boots again.

It says what happens on standard output, where the product's own words go too.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

#: The exit code that asks for a reboot of the board.
EXIT_REBOOT: Final = 64
#: The product's exit code for "another release is in force: start me again at once" (firmware_agent.__main__).
EXIT_RESTART: Final = 5

_POLL_SECONDS: Final = 0.05
#: A product that ran for so long did not fail at its start: the pauses begin anew.
_STEADY_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Config:
    """What is started, and how long it may take for what.

    Attributes:
        command: the product's program and arguments.
        environment: all of its environment, but for what is said here about notifications.
        directory: where it starts.
        notify: path of the socket that it says READY=1 to.
        reboot_request: the file by which it asks for a reboot.
        start_seconds: how long it may take to be ready.
        watchdog_seconds: how long it may be silent once it is ready.
        abort_seconds: how long it may take to die of a SIGABRT.
        stop_seconds: how long it may take to end when it is asked to.
        restart_seconds: the first pause before it is started again; each further one is twice as long.
        restart_max_seconds: the longest pause.
    """

    command: list[str]
    environment: dict[str, str]
    directory: str
    notify: str
    reboot_request: str
    start_seconds: float = 120.0
    watchdog_seconds: float = 60.0
    abort_seconds: float = 2.0
    stop_seconds: float = 10.0
    restart_seconds: float = 0.1
    restart_max_seconds: float = 10.0

    @classmethod
    def load(cls, path: Path) -> "Config":
        """From a JSON file.

        Raises:
            TypeError, ValueError: it is not one.
        """
        return cls(**json.loads(path.read_text()))

    def dump(self, path: Path) -> None:
        """To a JSON file."""
        path.write_text(json.dumps({member.name: getattr(self, member.name) for member in fields(self)}))


def pause(code: int, quick_failures: int, config: Config) -> float:
    """Seconds until the product is started again after it ended with `code`.

    `quick_failures` counts the starts in a row that did not come to a steady run.
    """
    if code == EXIT_RESTART:
        return 0.0
    return float(min(config.restart_seconds * 2 ** min(quick_failures, 16), config.restart_max_seconds))


def say(words: str) -> None:
    """One line of the board's log."""
    sys.stdout.write(f"init: {words}\n")
    sys.stdout.flush()


class Product:
    """One start of the product, until its process has ended."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.began = time.monotonic()
        self.ready = False
        self._deadline = self.began + config.start_seconds
        self._killed = False
        environment = config.environment | {
            "NOTIFY_SOCKET": config.notify,
            "WATCHDOG_USEC": str(int(config.watchdog_seconds * 1_000_000)),
        }
        self._process = subprocess.Popen(
            config.command, cwd=config.directory, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )

    @property
    def code(self) -> int | None:
        """Its exit code once it has ended; negative for a signal."""
        return self._process.poll()

    def hear(self, sender: int, message: str) -> None:
        """Take in a notification, if it comes from the product's main process."""
        if sender != self._process.pid:
            return
        now = time.monotonic()
        for line in message.splitlines():
            name, _, value = line.partition("=")
            if (name, value) == ("READY", "1"):
                self.ready = True
                self._deadline = now + self._config.watchdog_seconds
                say(f"the product is ready after {now - self.began:.2f} s")
            elif (name, value) == ("WATCHDOG", "1") and self.ready:
                self._deadline = now + self._config.watchdog_seconds
            elif (name, value) == ("STOPPING", "1"):
                self._deadline = now + self._config.stop_seconds
            elif name == "STATUS":
                say(f"status: {value}")

    def check(self) -> None:
        """Abort it when it has been silent for too long, and kill it when that does not help."""
        if time.monotonic() <= self._deadline:
            return
        if self._killed:
            self._process.kill()
        else:
            say("the watchdog has barked" if self.ready else "the product does not get ready")
            self._process.send_signal(signal.SIGABRT)
        self._killed = True
        self._deadline = time.monotonic() + self._config.abort_seconds

    def stop(self) -> None:
        """End it politely, or else by force."""
        self._process.terminate()
        try:
            self._process.wait(self._config.stop_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Ears:
    """The socket for notifications, and the supply."""

    def __init__(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.setblocking(False)
        self._socket.bind(path)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def listen(self, seconds: float) -> list[tuple[int, str]]:
        """The notifications that came, each with its sender's process id, after at most `seconds`.

        Raises:
            EOFError: the supply is gone.
        """
        heard: list[tuple[int, str]] = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is not self._socket:
                if not os.read(sys.stdin.fileno(), 4096):
                    raise EOFError
                continue
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
                    heard += [(_sender(ancillary), data.decode(errors="replace"))]
        return heard


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            pid: int = struct.unpack("3i", data[:12])[0]  # struct ucred: pid, uid, gid
            return pid
    return 0


def supervise(config: Config, ears: Ears) -> int:
    """Keep the product running until it asks for a reboot.

    Returns:
        EXIT_REBOOT.

    Raises:
        EOFError: the supply is gone.
    """
    product: Product | None = None
    failures = 0
    start_at = 0.0
    while True:
        if product is None and time.monotonic() >= start_at:
            product = Product(config)
        for sender, message in ears.listen(_POLL_SECONDS):
            if product is not None:
                product.hear(sender, message)
        if Path(config.reboot_request).exists():
            say("a reboot was asked for")
            if product is not None:
                product.stop()
            Path(config.reboot_request).unlink()
            return EXIT_REBOOT
        if product is None:
            continue
        product.check()
        if (code := product.code) is not None:
            lasted = time.monotonic() - product.began
            failures = 0 if lasted >= _STEADY_SECONDS or code == EXIT_RESTART else failures + 1
            wait = pause(code, max(failures - 1, 0), config)
            say(f"the product ended with {_called(code)} after {lasted:.1f} s; " + _next(wait))
            product, start_at = None, time.monotonic() + wait


def _called(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else str(code)


def _next(wait: float) -> str:
    return f"started again in {wait:.1f} s" if wait else "started again at once"


def main(arguments: list[str]) -> int:
    """Run the board until its power is cut or it reboots."""
    config = Config.load(Path(arguments[0]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an aborted product leaves no core file
    try:
        return supervise(config, Ears(config.notify))
    except EOFError:
        os.killpg(0, signal.SIGKILL)
        raise AssertionError("still alive after SIGKILL") from None


#: How the program is started: no site packages, no environment.
def command(python: str, config: Path) -> list[Any]:
    """The arguments that start this program on a configuration."""
    return [python, "-I", "-S", __file__, config]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
