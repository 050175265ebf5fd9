"""Process 1 of the simulated board, as a real process, with small programs in the place of the product."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.drivers.simulated_init import EXIT_REBOOT, EXIT_RESTART, Config, command, pause
from firmware_agent.__main__ import EXIT_HALTED, EXIT_SETTINGS

#: What every product here begins with: `tell` notifies, and each start leaves a line in the file `starts`.
PREAMBLE = """
import os, signal, socket, sys, time
def tell(words):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
        speaker.sendto(words.encode(), os.environ["NOTIFY_SOCKET"])
with open("starts", "a") as file:
    file.write(f"{os.getpid()}\\n")
started = len(open("starts").readlines())
"""


class Board:
    """A running process 1, and what it says."""

    def __init__(self, place: Path, product: str, **changes: Any) -> None:
        self.place = place
        self.reboot_request = place / "reboot-request"
        config = Config(
            command=[sys.executable, "-I", "-S", "-c", PREAMBLE + product],
            environment={},
            directory=str(place),
            notify=str(place / "notify"),
            reboot_request=str(self.reboot_request),
            **{"restart_seconds": 0.01, "stop_seconds": 0.2, "abort_seconds": 0.2} | changes,
        )
        config.dump(place / "init.json")
        self.process = subprocess.Popen(
            command(sys.executable, place / "init.json"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def says(self, words: str) -> str:
        """The next line with `words`; others are passed over."""
        passed: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=20)
            except queue.Empty:
                raise AssertionError(f"never said {words!r}, but {passed}") from None
            assert line is not None, f"ended without {words!r}: {passed}"
            passed.append(line)
            if words in line:
                return line

    def is_dark(self) -> None:
        """Wait until no process of the board is left: each holds the pipe's end."""
        while self._lines.get(timeout=20) is not None:
            pass

    def pids(self) -> list[int]:
        return [int(line) for line in (self.place / "starts").read_text().split()]

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self._thread.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait()


@contextmanager
def running(place: Path, product: str, **changes: Any) -> Iterator[Board]:
    board = Board(place, product, **changes)
    try:
        yield board
    finally:
        board.close()


def test_a_product_that_ends_is_started_again(tmp_path: Path) -> None:
    with running(tmp_path, "sys.exit(3) if started < 3 else tell('READY=1') or time.sleep(60)") as board:
        board.says("ended with 3")
        board.says("ended with 3")
        board.says("is ready")

        assert len(board.pids()) == 3


def test_a_product_that_is_killed_is_started_again(tmp_path: Path) -> None:
    with running(tmp_path, "tell('READY=1'); time.sleep(60)") as board:
        board.says("is ready")
        os.kill(board.pids()[0], signal.SIGKILL)

        assert "started again" in board.says("ended with SIGKILL")
        board.says("is ready")


def test_a_product_that_asks_for_a_restart_gets_it_at_once(tmp_path: Path) -> None:
    product = f"sys.exit({EXIT_RESTART}) if started == 1 else tell('READY=1') or time.sleep(60)"
    with running(tmp_path, product, restart_seconds=600) as board:
        assert "at once" in board.says(f"ended with {EXIT_RESTART}")
        board.says("is ready")


@pytest.mark.parametrize("code", [EXIT_HALTED, EXIT_SETTINGS])
def test_a_product_whose_key_or_settings_are_gone_is_tried_again(tmp_path: Path, code: int) -> None:
    """On trial it would else never be started often enough for the launcher to go back."""
    with running(tmp_path, f"sys.exit({code}) if started < 3 else tell('READY=1') or time.sleep(60)") as board:
        assert "started again" in board.says(f"ended with {code}")
        board.says("is ready")


def test_a_silent_product_is_aborted_and_started_again(tmp_path: Path) -> None:
    product = "tell('READY=1')\nif started == 1: time.sleep(60)\nwhile True: tell('WATCHDOG=1'); time.sleep(0.05)"
    with running(tmp_path, product, watchdog_seconds=0.5) as board:
        board.says("is ready")
        board.says("watchdog")
        board.says("ended with SIGABRT")
        board.says("is ready")


def test_a_silent_product_that_ignores_the_abort_is_killed(tmp_path: Path) -> None:
    product = "signal.signal(signal.SIGABRT, signal.SIG_IGN); tell('READY=1'); time.sleep(60)"
    with running(tmp_path, product, watchdog_seconds=0.1) as board:
        board.says("watchdog")
        board.says("ended with SIGKILL")


def test_a_product_that_never_gets_ready_is_aborted(tmp_path: Path) -> None:
    with running(tmp_path, "time.sleep(60)", start_seconds=0.2) as board:
        board.says("does not get ready")
        board.says("ended with SIGABRT")


def test_only_the_products_main_process_is_believed(tmp_path: Path) -> None:
    product = """
if os.fork() == 0:
    tell("READY=1")
    os._exit(0)
os.wait()
tell("STATUS=asked")
time.sleep(60)
"""
    with running(tmp_path, product, start_seconds=0.5) as board:
        board.says("status: asked")
        board.says("does not get ready")


def test_a_cut_of_the_power_ends_everything_between_two_instructions(tmp_path: Path) -> None:
    product = """
def politely(*_): open("polite", "w").close(); sys.exit(0)
signal.signal(signal.SIGTERM, politely)
if os.fork() == 0: time.sleep(60)
tell("READY=1")
time.sleep(60)
"""
    with running(tmp_path, product) as board:
        board.says("is ready")
        os.killpg(board.process.pid, signal.SIGKILL)
        board.is_dark()

        assert not (tmp_path / "polite").exists()


def test_a_board_whose_station_is_gone_has_no_power(tmp_path: Path) -> None:
    with running(tmp_path, "tell('READY=1'); time.sleep(60)") as board:
        board.says("is ready")
        assert board.process.stdin is not None
        board.process.stdin.close()
        board.is_dark()

        assert board.process.wait(20) == -signal.SIGKILL


def test_a_reboot_ends_the_product_politely(tmp_path: Path) -> None:
    product = """
def politely(*_): tell("STOPPING=1"); open("polite", "w").close(); sys.exit(0)
signal.signal(signal.SIGTERM, politely)
tell("READY=1")
time.sleep(60)
"""
    with running(tmp_path, product, stop_seconds=20) as board:
        board.says("is ready")
        board.reboot_request.touch()

        assert board.process.wait(20) == EXIT_REBOOT
        assert (tmp_path / "polite").exists()
        assert not board.reboot_request.exists()


def test_a_reboot_waits_for_no_stubborn_product(tmp_path: Path) -> None:
    product = "signal.signal(signal.SIGTERM, signal.SIG_IGN); tell('READY=1'); time.sleep(60)"
    with running(tmp_path, product) as board:
        board.says("is ready")
        board.reboot_request.touch()

        assert board.process.wait(20) == EXIT_REBOOT


@given(st.integers(-31, 255), st.integers(0, 10_000))
def test_a_pause_is_bounded_and_never_shrinks(code: int, failures: int) -> None:
    config = Config([], {}, "", "", "", restart_seconds=0.1, restart_max_seconds=10)

    now, later = pause(code, failures, config), pause(code, failures + 1, config)

    assert 0 <= now <= later <= 10
    assert (now == 0) is (code == EXIT_RESTART)
