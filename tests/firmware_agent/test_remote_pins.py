"""GPIO lines behind a Unix socket: held, followed, lost and found again."""

import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from firmware_agent.errors import PirFault
from firmware_agent.pins import LgpioPins, open_pins
from firmware_agent.remote_pins import RemotePins
from firmware_agent.settings import parse
from tests.firmware_agent.support import wait_for

LINES = {"pinctrl-bcm2835": 17}


class Server:
    """A daemon that serves one line, with a script of what it says."""

    def __init__(self, path: Path, greeting: bytes = b"pinctrl-bcm2835\n", level: bytes = b"0\n") -> None:
        self.path = path
        self.asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._greeting = greeting
        self._level = level
        self._connections: list[socket.socket] = []
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            connection.sendall(self._greeting)
            asked = connection.recv(64)
            self.asked.put(asked)
            if asked:
                connection.sendall(self._level)

    def say(self, words: bytes) -> None:
        self._connections[-1].sendall(words)

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in self._connections:
            connection.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    opened = Server(tmp_path / "gpio")
    yield opened
    opened.close()


def test_the_line_is_chosen_by_the_chips_label(server: Server) -> None:
    with RemotePins(server.path, {"pinctrl-rp1": 3, "pinctrl-bcm2835": 17}).pir():
        assert server.asked.get(timeout=5) == b"17\n"


def test_the_level_and_every_edge_arrive_in_order(server: Server) -> None:
    edges: queue.SimpleQueue[bool] = queue.SimpleQueue()
    with RemotePins(server.path, LINES).pir() as pir:
        assert pir.level() == 0
        pir.watch(edges.put)
        server.say(b"1\n0\n1")
        server.say(b"\n")

        assert [edges.get(timeout=5) for _ in range(3)] == [True, False, True]
        assert pir.level() == 1


def test_an_edge_takes_less_than_a_millisecond(server: Server) -> None:
    """The best of many: a slow machine is not what is tested."""
    edges: queue.SimpleQueue[float] = queue.SimpleQueue()
    took = []
    with RemotePins(server.path, LINES).pir() as pir:
        pir.watch(lambda _rising: edges.put(time.perf_counter()))
        for number in range(50):
            begin = time.perf_counter()
            server.say(b"%d\n" % ((number + 1) % 2))
            took.append(edges.get(timeout=5) - begin)

    assert min(took) < 0.001


def test_a_line_that_somebody_else_holds_is_a_fault(tmp_path: Path) -> None:
    server = Server(tmp_path / "gpio", level=b"busy\n")
    try:
        with pytest.raises(PirFault, match="busy"), RemotePins(server.path, LINES).pir():
            pass
    finally:
        server.close()


def test_a_chip_that_no_setting_names_is_a_fault(tmp_path: Path) -> None:
    server = Server(tmp_path / "gpio", greeting=b"pcf8574\n")
    try:
        with pytest.raises(PirFault, match="this board has pcf8574"), RemotePins(server.path, LINES).pir():
            pass
    finally:
        server.close()


def test_a_socket_that_nobody_serves_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(PirFault, match="cannot be used"), RemotePins(tmp_path / "none", LINES).pir():
        pass


def test_a_server_that_is_gone_is_a_fault_and_not_stillness(server: Server) -> None:
    with RemotePins(server.path, LINES).pir() as pir:
        server.asked.get(timeout=5)
        server.close()

        def unreadable() -> bool:
            try:
                return pir.level() not in {0, 1}
            except PirFault:
                return True

        wait_for(unreadable)
        again = Server(server.path, level=b"1\n")
        try:
            edges: queue.SimpleQueue[bool] = queue.SimpleQueue()
            pir.watch(edges.put)

            assert edges.get(timeout=5) is True  # what changed in between is an edge
            assert pir.level() == 1
        finally:
            again.close()


@pytest.mark.parametrize(("driver", "kind"), [("lgpio", LgpioPins), ("unix:/run/gpio", RemotePins)])
def test_the_settings_name_the_driver(driver: str, kind: type) -> None:
    settings = parse(f'[image]\nname = "a"\nversion = "1"\n[gpio]\ndriver = "{driver}"\n')

    assert isinstance(open_pins(settings), kind)
