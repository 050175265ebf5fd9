"""Updates on the virtual Pi: the real image, the real fleet commands, and a plug that is pulled."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloud.rollout import Status
from factory.errors import ExitCode
from station import Station
from tests.site import Site
from tests.vm.shipping import Shipping, wait

pytestmark = pytest.mark.vm

#: The agent starts and connects, but could keep no alarm.
SLIP = ("firmware_agent/spool.py", 'execute("BEGIN IMMEDIATE")', 'execute("BEGIN IMEDIATE")')

CUTS = 20
SEED = 20261121


class Fielded(SimpleNamespace):
    """A sealed unit on a virtual Pi that is a canary, and the releases that there are for it."""

    serial: str
    station: Station
    shipping: Shipping
    archives: dict[str, Path]

    def update(self, version: str) -> tuple[Status, str]:
        """Bring a release out to the unit; how that ended, and why."""
        job = self.shipping.start(version)
        execution = self.shipping.finished(job, self.serial)
        return execution.status, " ".join(execution.details.values())

    def runs(self, version: str) -> None:
        """Wait until the unit says that it runs this."""
        wait(lambda: self.shipping.version(self.serial) == version, f"{self.serial} does not come back as {version}")


@pytest.fixture(scope="module")
def unit(site: Site) -> Iterator[Fielded]:
    serial = site.serial()
    shipping = Shipping.open(site)
    with Station.opened(site.bench(**site.virtual()), serial) as station:
        attempt = station.run(as_json=False)
        assert attempt.code is ExitCode.PASS, site.record(serial)[-1].reason
        shipping.name_canary(serial)
        first = shipping.version(serial)
        assert first is not None
        yield Fielded(serial=serial, station=station, shipping=shipping, archives={first: shipping.build(first)})


def test_a_release_reaches_the_unit_as_a_delta_and_is_committed(unit: Fielded) -> None:
    (base,) = unit.archives.values()
    unit.archives["0.1.1"] = unit.shipping.build("0.1.1", base)
    unit.shipping.publish("0.1.1")

    assert unit.update("0.1.1") == (Status.SUCCEEDED, "")

    unit.runs("0.1.1")


def test_a_release_that_cannot_do_its_work_comes_back_by_itself_and_says_why(unit: Fielded) -> None:
    unit.shipping.build("0.1.2", unit.archives["0.1.1"], change=SLIP)
    unit.shipping.publish("0.1.2")

    status, said = unit.update("0.1.2")

    assert status is Status.FAILED
    assert "unhealthy" in said
    unit.runs("0.1.1")


def test_the_plug_pulled_at_twenty_moments_of_an_update_leaves_the_old_release_or_the_new(unit: Fielded) -> None:
    unit.archives["0.1.3"] = unit.shipping.build("0.1.3", unit.archives["0.1.1"])
    unit.shipping.build("0.1.4", unit.archives["0.1.3"], unit.archives["0.1.1"])
    unit.shipping.publish("0.1.3")
    unit.shipping.publish("0.1.4")
    moments = random.Random(SEED)
    began = time.monotonic()
    assert unit.update("0.1.3")[0] is Status.SUCCEEDED
    takes = time.monotonic() - began
    running, ended = "0.1.3", dict[str, int]()

    for _ in range(CUTS):
        wanted = "0.1.4" if running == "0.1.3" else "0.1.3"
        job = unit.shipping.start(wanted)
        time.sleep(moments.uniform(0.0, takes))
        unit.station.bench.power.off()
        unit.station.bench.power.on()
        execution = unit.shipping.finished(job, unit.serial)
        ended[execution.status] = ended.get(execution.status, 0) + 1
        running = wanted if execution.status is Status.SUCCEEDED else running
        unit.runs(running)

    assert sum(ended.values()) == CUTS
    assert set(ended) <= {Status.SUCCEEDED, Status.FAILED}
