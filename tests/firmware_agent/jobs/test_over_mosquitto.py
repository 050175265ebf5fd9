"""The same jobs over the real link and a real broker: mosquitto, mutual TLS, an ACL like the cloud's policy."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from firmware_agent.jobs.kind import Context, Done, Kind, Phase, Result
from firmware_agent.jobs.runner import Runner
from firmware_agent.link import Link
from tests.firmware_agent.jobs.test_runner import DOCUMENT, Scripted
from tests.firmware_agent.jobs_service import Bridge, JobsService
from tests.firmware_agent.linking import Running, permit
from tests.firmware_agent.support import SERIAL, Broker, Ca, Unit, wait_for


@contextmanager
def working(link: Link, directory: Path, *kinds: Kind) -> Iterator[None]:
    runner = Runner(link, directory, kinds, product="picket", leave=lambda: None, seconds=5.0)
    stop = threading.Event()
    thread = threading.Thread(target=runner.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        runner.wake()
        thread.join()


@pytest.fixture
def online(unit: Unit, ca: Ca, broker: Broker, tmp_path: Path) -> Iterator[tuple[Running, JobsService]]:
    permit(broker)
    broker.start()
    service = JobsService()
    with Bridge(service, ca, broker.port), Running.of(unit, ca, broker.port) as running:
        running.wait_connected()
        yield running, service


def work(_: Context) -> Result:
    return Done({"pir": "ok"})


def test_jobs_come_and_are_done(online: tuple[Running, JobsService], tmp_path: Path) -> None:
    running, service = online
    service.create("before", DOCUMENT, SERIAL)
    with working(running.link, tmp_path / "jobs", Scripted(Phase("work", work))):
        wait_for(lambda: service.status("before", SERIAL) == "SUCCEEDED")
        service.create("after", DOCUMENT, SERIAL)
        wait_for(lambda: service.status("after", SERIAL) == "SUCCEEDED")
        service.create("foreign", DOCUMENT | {"product": "toaster"}, SERIAL)
        wait_for(lambda: service.status("foreign", SERIAL) == "REJECTED")

    assert [told.short for told in service.told] == [
        *["IN_PROGRESS work", "SUCCEEDED"] * 2,
        "REJECTED wrong-product",
    ]


def test_a_job_that_is_cancelled_is_dropped_at_once(online: tuple[Running, JobsService], tmp_path: Path) -> None:
    running, service = online
    ended = threading.Event()

    def endless(context: Context) -> Result:
        try:
            context.wait(3600)
        finally:
            ended.set()
        return Done()

    service.create("j", DOCUMENT, SERIAL)
    with working(running.link, tmp_path / "jobs", Scripted(Phase("work", endless))):
        wait_for(lambda: service.status("j", SERIAL) == "IN_PROGRESS")
        service.cancel("j", SERIAL, force=True)
        assert ended.wait(20)

    assert [told.short for told in service.told] == ["IN_PROGRESS work"]


def test_a_broker_that_restarts_costs_no_report(
    online: tuple[Running, JobsService], broker: Broker, tmp_path: Path
) -> None:
    running, service = online
    away = threading.Event()

    def offline(_: Context) -> Result:
        broker.stop()
        away.set()
        wait_for(lambda: not running.link.connected())
        return Done()

    service.create("j", DOCUMENT, SERIAL)
    with working(running.link, tmp_path / "jobs", Scripted(Phase("work", offline))):
        assert away.wait(20)
        wait_for(lambda: not running.link.connected())
        broker.start()
        wait_for(lambda: service.status("j", SERIAL) == "SUCCEEDED", 60)

    assert [told.short for told in service.told] == ["IN_PROGRESS work", "SUCCEEDED"]
