"""The self-test's decisions, on answers that no simulated board gives."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from factory.errors import UnitFault
from factory.identify import Identity
from factory.limits import load_limits
from factory.record import NoWatcher, Step
from factory.self_test import _health


class Answering:
    """An agent that answers `self-test` with given values."""

    def __init__(self, **values: object) -> None:
        self._values = {
            "temperature_c": 40.0,
            "throttled": 0,
            "disk_free_bytes": 2**30,
            "memory_free_bytes": 2**30,
        } | values

    def ask(
        self,
        verb: str,
        params: Mapping[str, Any] | None = None,
        *,
        seconds: float = 30.0,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        assert verb == "self-test"
        return self._values


def identity(model: str) -> Identity:
    return Identity("1" * 16, "a02082", model, {}, None, 2**30, False, None, "file", "0", "picket 0", "b")


def health(model: str, **values: object) -> Step:
    step = Step("self-test", NoWatcher())
    _health(Answering(**values), identity(model), load_limits(), step)
    return step


def test_a_raspberry_pi_whose_temperature_cannot_be_read_fails() -> None:
    with pytest.raises(UnitFault, match="temperature cannot be read"):
        health("Raspberry Pi 4 Model B Rev 1.4", temperature_c=None)


def test_a_board_that_has_no_sensor_says_so_in_the_record() -> None:
    assert health("Picket virtual Pi", temperature_c=None).notes["temperature_c"] == "the board has no sensor"


def test_under_voltage_fails_the_unit() -> None:
    with pytest.raises(UnitFault, match="0x50005"):
        health("Raspberry Pi 4 Model B Rev 1.4", throttled=0x50005)


def test_an_answer_that_lacks_a_value_is_the_units_fault_by_name() -> None:
    with pytest.raises(UnitFault, match="disk_free_bytes"):
        health("Raspberry Pi 4 Model B Rev 1.4", disk_free_bytes="much")
