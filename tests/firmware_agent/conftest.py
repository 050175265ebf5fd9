"""Fixtures of the agent's tests; what they are made of is in support.py."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.firmware_agent.support import Broker, Ca, Station, Unit, mosquitto_path


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    return Unit.make(tmp_path)


@pytest.fixture(scope="session")
def ca() -> Ca:
    return Ca()


@pytest.fixture
def connect() -> Iterator[Callable[[Unit], Station]]:
    """Opens sessions, and closes them at the end of the test."""
    stations: list[Station] = []

    def open_session(unit: Unit) -> Station:
        stations.append(Station(unit))
        return stations[-1]

    yield open_session
    for station in stations:
        station.close()


@pytest.fixture
def station(unit: Unit, connect: Callable[[Unit], Station]) -> Station:
    return connect(unit)


@pytest.fixture
def broker(ca: Ca, tmp_path: Path) -> Iterator[Broker]:
    """A broker that is not started yet."""
    if mosquitto_path() is None:
        pytest.skip("mosquitto is not installed")
    broker = Broker(ca, tmp_path / "broker")
    yield broker
    broker.stop()
