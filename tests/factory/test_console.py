"""The console driver on ptys: a unit's UART is no friend, it speaks in pieces, garbage and silence."""

import array
import fcntl
import os
import socket
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from itertools import takewhile

import pytest

from factory.drivers.console import SerialConsole
from factory.errors import StationFault
from firmware_agent.wire import Banner, parse_banner

#: An upper bound that no test waits for.
SECONDS = 30.0

BANNER = Banner("10000000deadbeef", ("192.168.7.2",), "ssh-ed25519 AAAA", "0.1.0", "picket 0.1.0", "a-boot")


class Uart:
    """A pty with the unit at its master's end."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.name = os.ttyname(self._slave)

    def say(self, text: bytes) -> None:
        """Say it, and wait until the station has read it, so that it arrives as a piece of its own."""
        os.write(self._master, text)
        waiting = array.array("i", [1])
        while waiting[0]:
            fcntl.ioctl(self._slave, termios.FIONREAD, waiting)
            threading.Event().wait(0.001)

    def vanish(self) -> None:
        """The adapter is pulled."""
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        os.close(self._slave)
        if self._master >= 0:
            os.close(self._master)


@pytest.fixture
def uart() -> Iterator[Uart]:
    made = Uart()
    yield made
    made.close()


def listen(uart: Uart, unit: Callable[[], None]) -> Iterator[str]:
    """The console's lines while `unit` speaks; it begins once the station has opened the port."""
    lines = SerialConsole(lambda: uart.name).lines(SECONDS)
    hello = threading.Event()

    def speak() -> None:
        while not hello.is_set():  # the station drops what came before it opened the port
            os.write(uart._master, b"hello\n")
            hello.wait(0.01)
        uart.say(b"\nbegin\n")
        unit()

    speaker = threading.Thread(target=speak)
    speaker.start()
    try:
        next(lines)
        hello.set()
        for line in lines:
            if line == "begin":
                break
        yield from lines
    finally:
        hello.set()
        speaker.join()


def heard(uart: Uart, *pieces: bytes) -> list[str]:
    def unit() -> None:
        for piece in (*pieces, b"\nend\n"):
            uart.say(piece)

    return list(takewhile(lambda line: line != "end", listen(uart, unit)))


def test_a_line_that_comes_in_pieces_is_one_line(uart: Uart) -> None:
    assert ["[    0.000000] Booting Linux", "next", ""] == heard(
        uart, b"[    0.00", b"0000] Boot", b"ing Linux\r", b"\nnext\n"
    )


def test_several_lines_in_one_piece_are_several(uart: Uart) -> None:
    assert ["one", "", "two", "three"] == heard(uart, b"one\n\ntwo\r\nthree")


def test_binary_garbage_is_passed_on_as_text_and_breaks_nothing(uart: Uart) -> None:
    garbage = bytes(byte for byte in range(256) if byte != 0x0A)

    first, *rest = heard(uart, garbage + b"\n", BANNER.line().encode() + b"\n")

    assert "\ufffd" in first
    assert "\x00" in first
    assert [BANNER] == [parse_banner(line) for line in rest if line]


def test_garbage_before_a_banner_on_the_same_line_does_not_hide_it(uart: Uart) -> None:
    lines = heard(uart, b"\xff\xfe\x00\x80" + BANNER.line().encode() + b"\r\n")

    assert BANNER == parse_banner(lines[0])


@pytest.mark.parametrize("cut", [1, 8, 20, 60])
def test_a_banner_cut_in_half_is_none_and_the_whole_one_after_it_counts(uart: Uart, cut: int) -> None:
    whole = BANNER.line().encode()

    lines = heard(
        uart, whole[:-cut], b"\n[   12.5] a kernel message\n", whole[cut:], b"\n", whole[:30], whole[30:], b"\n"
    )

    assert [BANNER] == [banner for line in lines if (banner := parse_banner(line)) is not None]


def test_a_kernel_message_in_the_middle_of_a_banner_makes_it_none(uart: Uart) -> None:
    whole = BANNER.line().encode()

    lines = heard(uart, whole[:40] + b"[   12.5] usb 1-1: new device\r\n" + whole[40:] + b"\n")

    assert [None, None, None] == [parse_banner(line) for line in lines]


def test_a_port_that_vanishes_is_the_stations_fault(uart: Uart) -> None:
    lines = listen(uart, uart.vanish)

    with pytest.raises(StationFault, match="cannot be read") as fault:
        list(lines)
    assert "USB cable" in fault.value.advice


def test_a_port_that_is_not_there_is_the_stations_fault() -> None:
    with pytest.raises(StationFault, match="/dev/no-such-port cannot be read"):
        list(SerialConsole(lambda: "/dev/no-such-port").lines(SECONDS))


def test_a_console_server_that_hangs_up_is_the_stations_fault() -> None:
    opened = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                while not opened.is_set():  # what comes before the port is open is dropped
                    connection.sendall(b"hello\n")
                    opened.wait(0.01)

        thread = threading.Thread(target=serve)
        thread.start()
        lines = SerialConsole(lambda: f"socket://127.0.0.1:{server.getsockname()[1]}").lines(SECONDS)

        assert next(lines) == "hello"
        opened.set()
        with pytest.raises(StationFault, match="cannot be read"):
            list(lines)
        thread.join()


def test_silence_ends_with_the_time(uart: Uart) -> None:
    assert [] == list(SerialConsole(lambda: uart.name).lines(0.0))
