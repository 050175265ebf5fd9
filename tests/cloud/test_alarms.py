"""The agent's alarms, against mosquitto and against the local cloud: the same promises, whoever is at the other end.

On mosquitto an observer sees what was published; in the local cloud the alarm's own rule and function have to have
recorded it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pytest

from firmware_agent import identity
from firmware_agent.identity import Identity
from firmware_agent.product import Product
from firmware_agent.spool import Spool
from tests.cloud.conftest import Fleet
from tests.firmware_agent.conftest import broker as _broker
from tests.firmware_agent.conftest import ca as _ca
from tests.firmware_agent.faults import FaultProxy
from tests.firmware_agent.support import BOARD, Broker, Unit, free_port, provision, wait_for

broker, ca = _broker, _ca  # fixtures of the agent's tests


class Side(Protocol):
    """The other end."""

    @property
    def port(self) -> int:
        """Where it listens."""
        ...

    def provision(self, unit: Unit, port: int) -> None:
        """Give the unit an identity for this end, which it reaches at `port`."""
        ...

    def alarms(self) -> list[dict[str, Any]]:
        """What has come, each id once, in the order of its first coming or of its moment."""
        ...


@dataclass
class Mosquitto:
    """An independent broker; it knows nothing of alarms."""

    broker: Broker
    _seen: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return self.broker.port

    def provision(self, unit: Unit, port: int) -> None:
        self.broker.start()
        provision(unit, self.broker.ca, port)

    def alarms(self) -> list[dict[str, Any]]:
        while not self.broker.seen.empty():
            seen = self.broker.seen.get()
            if seen.topic.endswith("/alarm"):
                self._seen.setdefault(seen.payload["event_id"], seen.payload)
        return list(self._seen.values())


@dataclass
class LocalCloud:
    """The local cloud with the real stack in it."""

    fleet: Fleet
    _serial: str = ""

    @property
    def port(self) -> int:
        return self.fleet.endpoint.port

    def provision(self, unit: Unit, port: int) -> None:
        joined = self.fleet.unit(board=BOARD)
        self._serial = joined.serial
        for directory in (unit.settings.paths.state, unit.settings.paths.run):
            directory.mkdir(parents=True)
        unit.settings.paths.key_file.write_text(joined.leaf.key)
        found = Identity(joined.serial, joined.leaf.chain, self.fleet.trust, self.fleet.endpoint.host, port, "WO-1")
        identity.install(unit.settings.paths.identity, found)

    def alarms(self) -> list[dict[str, Any]]:
        rows = self.fleet.rows(self._serial, "EVENT#")
        return [{**row, "sequence": int(row["sequence"])} for row in rows]


@dataclass
class Scene:
    """A unit, the other end, and the network between them, which can be cut."""

    unit: Unit
    side: Side
    proxy: FaultProxy

    def cut(self) -> None:
        self.proxy.target = free_port()
        self.proxy.reset()

    def mend(self) -> None:
        self.proxy.target = self.side.port

    @contextmanager
    def running(self) -> Iterator[Product]:
        product = Product(self.unit.settings, self.unit.board, self.unit.pins)
        product.start()
        try:
            yield product
        finally:
            product.stop()
            product.join()

    def wave(self, times: int = 1) -> None:
        for _ in range(times):
            self.unit.pir.drive_high()
            self.unit.pir.drive_low()

    def waiting(self) -> int:
        with Spool(self.unit.settings.paths.spool) as spool:
            return spool.depth().alarms

    def learned_the_time(self) -> bool:
        """Whether the unit has noted that its clock was set."""
        with Spool(self.unit.settings.paths.spool) as spool:
            return any(b'"clock-set"' in message.body for message in spool.oldest(10))

    def sequences(self) -> list[int]:
        return [one["sequence"] for one in self.side.alarms()]


@pytest.fixture(params=["mosquitto", "local cloud"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    side: Side
    if request.param == "mosquitto":
        side = Mosquitto(request.getfixturevalue("broker"))
    else:
        side = LocalCloud(request.getfixturevalue("fleet"))
    unit = Unit.make(tmp_path / "unit")
    proxy = FaultProxy(side.port)
    try:
        side.provision(unit, proxy.port)
        yield Scene(unit, side, proxy)
    finally:
        proxy.close()


def test_motion_becomes_one_alarm(scene: Scene) -> None:
    with scene.running():
        scene.wave()
        wait_for(lambda: scene.sequences() == [1], 40)
        wait_for(lambda: scene.waiting() == 0)

    (alarm,) = scene.side.alarms()
    assert (alarm["kind"], alarm["at_quality"]) == ("motion", "ntp")
    assert abs((datetime.fromisoformat(alarm["at"]) - datetime.now(UTC)).total_seconds()) < 60


def test_alarms_raised_offline_all_arrive_once_by_id_and_in_order(scene: Scene) -> None:
    scene.cut()
    with scene.running():
        scene.wave(8)
        wait_for(lambda: scene.waiting() == 8)
        scene.mend()
        wait_for(lambda: len(scene.side.alarms()) == 8, 120)
        wait_for(lambda: scene.waiting() == 0)

    by_moment = sorted(scene.side.alarms(), key=lambda one: one["sequence"])
    assert [one["sequence"] for one in by_moment] == list(range(1, 9))
    assert [one["at"] for one in by_moment] == sorted(one["at"] for one in by_moment)
    assert len({one["event_id"] for one in by_moment}) == 8


def test_a_link_that_breaks_again_and_again_costs_no_alarm(scene: Scene) -> None:
    with scene.running() as product:
        for _ in range(4):
            scene.wave(2)
            scene.proxy.reset()
            time.sleep(0.3)
            product._wake_link(urgent=True)
        wait_for(lambda: len(scene.side.alarms()) == 8, 120)

    assert sorted(scene.sequences()) == list(range(1, 9))


def test_what_waits_outlives_the_agent(scene: Scene) -> None:
    scene.cut()
    for count in (3, 6):
        with scene.running():
            scene.wave(3)
            wait_for(lambda count=count: scene.waiting() == count)  # type: ignore[misc]
    scene.mend()

    with scene.running():
        wait_for(lambda: sorted(scene.sequences()) == [1, 2, 3, 4, 5, 6], 60)


def test_an_alarm_without_time_arrives_with_the_time_that_was_learned_later(scene: Scene) -> None:
    scene.cut()
    scene.unit.board.clock_offset, scene.unit.board.quality = -56 * 365 * 86400, "estimated"
    with scene.running():
        scene.wave()
        wait_for(lambda: scene.waiting() == 1)
        scene.unit.board.clock_offset, scene.unit.board.quality = 0.0, "ntp"
        wait_for(scene.learned_the_time)
        scene.mend()
        wait_for(lambda: scene.sequences() == [1], 60)

    (alarm,) = scene.side.alarms()
    assert alarm["at_quality"] == "corrected"
    assert abs((datetime.fromisoformat(alarm["at"]) - datetime.now(UTC)).total_seconds()) < 60


def test_an_opened_case_arrives_as_what_it_is(scene: Scene) -> None:
    scene = replace(scene, unit=scene.unit.with_case())  # open from the start: nothing drives the mock's line high
    with scene.running():
        wait_for(lambda: [one["kind"] for one in scene.side.alarms()] == ["tamper"], 40)
