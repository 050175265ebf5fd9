"""The simulated board's GPIO chip, read by the agent's own driver."""

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

from factory.drivers.gpio_server import GpioServer
from firmware_agent.errors import PirFault
from firmware_agent.remote_pins import RemotePins
from tests.firmware_agent.support import wait_for

LABEL = "pinctrl-bcm2835"


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[GpioServer]:
    opened = GpioServer(tmp_path / "gpio", LABEL, frozenset({17, 27}))
    yield opened
    opened.close()


def pins(tmp_path: Path, line: int = 17, label: str = LABEL) -> RemotePins:
    return RemotePins(tmp_path / "gpio", {label: line}, {})


def test_every_edge_reaches_the_holder_in_order(chip: GpioServer, tmp_path: Path) -> None:
    edges: queue.SimpleQueue[bool] = queue.SimpleQueue()
    with pins(tmp_path).pir() as pir:
        pir.watch(edges.put)
        for high in (True, True, False, True):
            chip.drive(17, high=high)
        chip.drive(27, high=True)

        assert [edges.get(timeout=5) for _ in range(3)] == [True, False, True]
        assert edges.empty()


def test_a_line_begins_with_the_level_that_it_has(chip: GpioServer, tmp_path: Path) -> None:
    chip.drive(17, high=True)

    with pins(tmp_path).pir() as pir:
        assert pir.level() == 1


def test_a_line_has_one_holder_until_it_is_let_go(chip: GpioServer, tmp_path: Path) -> None:
    del chip
    with pins(tmp_path).pir():
        with pytest.raises(PirFault, match="busy"), pins(tmp_path).pir():
            pass
        with pins(tmp_path, 27).pir():
            pass

    with pins(tmp_path).pir():
        pass


@pytest.mark.parametrize(("line", "label"), [(4, LABEL), (17, "pinctrl-rp1")])
def test_a_line_that_the_chip_has_not_is_a_fault(chip: GpioServer, tmp_path: Path, line: int, label: str) -> None:
    del chip
    with pytest.raises(PirFault), pins(tmp_path, line, label).pir():
        pass


def test_a_chip_that_is_taken_away_is_a_fault_and_not_stillness(tmp_path: Path) -> None:
    chip = GpioServer(tmp_path / "gpio", LABEL, frozenset({17}))
    with pins(tmp_path).pir() as pir:
        chip.close()

        def unreadable() -> bool:
            try:
                return pir.level() not in {0, 1}
            except PirFault:
                return True

        wait_for(unreadable)
