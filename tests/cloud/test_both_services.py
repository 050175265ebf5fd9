"""Jobs, shadows, health reports and hang-ups, against mosquitto and against the local cloud, in the same words.

The unit's parts are the real ones, on the real link. What each side is, and how the two differ, is in services.py. What
the whole agent makes of motion is in test_alarms.py, on both sides as well.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from firmware_agent import defender, topics, tuning
from firmware_agent.arming import ArmingStore
from firmware_agent.board import ClockReading
from firmware_agent.defender import Defender
from firmware_agent.jobs.kind import Context, Done, Failed, Kind, Next, Phase, Rejected, Result
from firmware_agent.jobs.runner import Runner
from firmware_agent.jobs.update import Limits, Update
from firmware_agent.link import Link
from firmware_agent.shadow import AlarmTwin, SettingsTwin, Shadows
from firmware_agent.tuning import Tuning
from firmware_agent.update import UrlExpired, download
from firmware_agent.update.trust import Trust
from tests import updates
from tests.cloud.conftest import alarm
from tests.cloud.services import LocalCloud, Mosquitto, Service, Tap, away, online
from tests.firmware_agent.conftest import broker as _broker
from tests.firmware_agent.conftest import ca as _ca
from tests.firmware_agent.conftest import unit as _unit
from tests.firmware_agent.jobs.conftest import goods as _goods
from tests.firmware_agent.jobs.test_runner import DOCUMENT, Scripted
from tests.firmware_agent.jobs.test_signed_update import publish
from tests.firmware_agent.jobs.world import HARDWARE, Goods
from tests.firmware_agent.jobs.world import Unit as Disk
from tests.firmware_agent.linking import Running
from tests.firmware_agent.support import Unit, wait_for

broker, ca, unit, goods = _broker, _ca, _unit, _goods  # fixtures of the agent's tests

DEFAULTS = Tuning()


@pytest.fixture(params=["mosquitto", "local cloud"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    if request.param == "mosquitto":
        with Mosquitto.opened(request.getfixturevalue("broker")) as mosquitto:
            yield mosquitto
    else:
        with LocalCloud.opened(request.getfixturevalue("fleet")) as cloud:
            yield cloud


@contextmanager
def running(run: Callable[[threading.Event], object], wake: Callable[[], None]) -> Iterator[threading.Thread]:
    """One of the agent's threads."""
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,))
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        wake()
        thread.join()


# --- jobs ---------------------------------------------------------------------------------------------------------


@contextmanager
def working(link: Link, unit: Unit, *kinds: Kind) -> Iterator[Runner]:
    """The unit's jobs."""
    runner = Runner(link, unit.settings.paths.jobs, kinds, product="picket", leave=lambda: None)
    with running(runner.run, runner.wake):
        yield runner


def work(_: Context) -> Result:
    return Done({"pir": "ok"})


def status(service: Service, job: str, number: int | None = None) -> str | None:
    found = service.seen(job, number)
    return None if found is None else found.status


class Busy:
    """A phase that works until it is told to be done, and says when it began and ended."""

    def __init__(self, result: Result | None = None) -> None:
        self.began, self.finish, self.ended = threading.Event(), threading.Event(), threading.Event()
        self._result = result or Done()

    def __call__(self, context: Context) -> Result:
        self.began.set()
        try:
            while not self.finish.is_set():
                context.wait(0.05)
        finally:
            self.ended.set()
        return self._result


def test_a_job_is_done_whether_it_was_there_before_the_unit_or_came_later(service: Service, unit: Unit) -> None:
    service.create("before", DOCUMENT)
    with online(service, unit) as up, working(up.link, unit, Scripted(Phase("work", work))):
        wait_for(lambda: status(service, "before") == "SUCCEEDED")
        service.create("after", DOCUMENT)
        wait_for(lambda: status(service, "after") == "SUCCEEDED")

    for job in ("before", "after"):
        seen = service.seen(job)
        assert seen is not None
        assert (seen.number, seen.version, dict(seen.details)) == (1, 3, {"pir": "ok"})


@pytest.mark.parametrize(
    ("changes", "result", "told"),
    [
        ({}, Failed("unhealthy", "the PIR's line is \x07dead"), ("FAILED", "unhealthy", "the PIR's line is dead")),
        ({}, Rejected("not-possible", "no"), ("REJECTED", "not-possible", "no")),
        ({"product": "toaster"}, Done(), ("REJECTED", "wrong-product", None)),
        ({"speed": 3}, Done(), ("REJECTED", "bad-document", None)),
    ],
)
def test_every_other_end_is_told_with_its_code_and_its_reason(
    service: Service, unit: Unit, changes: dict[str, Any], result: Result, told: tuple[str, str, str | None]
) -> None:
    service.create("j", DOCUMENT | changes, retries=0)
    with online(service, unit) as up, working(up.link, unit, Scripted(Phase("work", lambda _: result))):
        wait_for(lambda: status(service, "j") in {"FAILED", "REJECTED"})

    seen = service.seen("j")
    assert seen is not None
    assert (seen.status, seen.details["code"]) == told[:2]
    assert told[2] is None or seen.details["reason"] == told[2]


def test_a_restart_in_the_middle_goes_on_with_the_same_execution(service: Service, unit: Unit) -> None:
    said: list[str] = []
    busy = Busy(Done({"by": "the second process"}))

    def first(_: Context) -> Result:
        said.append("first")
        return Next({"kept": 1})

    def second(context: Context) -> Result:
        said.append(f"second {context.memo['kept']}")
        return busy(context)

    kind = Scripted(Phase("first", first), Phase("second", second))
    service.create("j", DOCUMENT)
    service.create("younger", DOCUMENT)
    with online(service, unit) as up, working(up.link, unit, kind):
        assert busy.began.wait(20)
    between = service.seen("j")
    busy.finish.set()
    with online(service, unit) as up, working(up.link, unit, kind):
        wait_for(lambda: status(service, "j") == "SUCCEEDED")
        wait_for(lambda: status(service, "younger") == "SUCCEEDED")

    assert between is not None
    assert (between.status, dict(between.details)) == ("IN_PROGRESS", {"phase": "second"})
    assert said == ["first", "second 1", "second 1", "first", "second 1"]
    assert service.seen("j", 2) is None


def test_what_is_in_progress_comes_first_and_without_notes_it_has_failed(service: Service, unit: Unit) -> None:
    done: list[str] = []
    service.create("older", DOCUMENT)
    service.create("younger", DOCUMENT)

    def note(context: Context) -> Result:
        done.append(context.key.job)
        younger = service.seen("younger")
        assert younger is not None
        return Done({"younger-was": younger.status})

    with online(service, unit) as up:
        job = _named(service, "younger")
        up.link.ask(topics.jobs_topic(service.serial, job, "update"), {"status": "IN_PROGRESS"})
        with working(up.link, unit, Scripted(Phase("work", note))):
            wait_for(lambda: status(service, "older") == "SUCCEEDED")

    younger, older = service.seen("younger"), service.seen("older")
    assert younger is not None
    assert older is not None
    assert (younger.status, younger.details["code"]) == ("FAILED", "interrupted")
    assert (done, dict(older.details)) == ([_named(service, "older")], {"younger-was": "FAILED"})


def _named(service: Service, job: str) -> str:
    """The job's name as the unit hears it."""
    return service._name(job) if isinstance(service, LocalCloud) else job


@pytest.mark.parametrize("how", ["cancelled", "deleted"])
def test_a_job_that_is_taken_away_is_dropped_at_once_and_the_next_one_done(
    service: Service, unit: Unit, how: str
) -> None:
    busy = Busy()
    service.create("j", DOCUMENT)
    with online(service, unit) as up, working(up.link, unit, Scripted(Phase("work", busy))):
        assert busy.began.wait(20)
        (service.cancel if how == "cancelled" else service.delete)("j")
        assert busy.ended.wait(20)
        busy.finish.set()
        service.create("next", DOCUMENT)
        wait_for(lambda: status(service, "next") == "SUCCEEDED")

    assert status(service, "j") == ("CANCELED" if how == "cancelled" else None)


def test_a_failure_is_tried_again_under_a_number_of_its_own(service: Service, unit: Unit) -> None:
    keys: list[int] = []

    def once_bad(context: Context) -> Result:
        keys.append(context.key.number)
        return Failed("download", "nobody answers") if len(keys) == 1 else Done()

    service.create("j", DOCUMENT, retries=1)
    with online(service, unit) as up, working(up.link, unit, Scripted(Phase("work", once_bad))):
        wait_for(lambda: status(service, "j", 2) == "SUCCEEDED")

    assert keys == [1, 2]
    assert status(service, "j", 1) == "FAILED"
    assert status(service, "j", 3) is None


def test_a_version_that_somebody_else_has_raised_costs_a_question_and_no_report(
    service: Service, unit: Unit, caplog: pytest.LogCaptureFixture
) -> None:
    service.create("j", DOCUMENT)
    with online(service, unit) as up:
        tap = Tap(up)

        def meddle(_: Context) -> Result:
            """An update of ours whose answer was lost looks the same."""
            up.link.publish(
                topics.jobs_topic(service.serial, _named(service, "j"), "update"),
                json.dumps({"status": "IN_PROGRESS"}).encode(),
            ).result(20)
            wait_for(lambda: (seen := service.seen("j")) is not None and seen.version == 3)
            return Done({"pir": "ok"})

        with working(up.link, unit, Scripted(Phase("work", meddle))):
            wait_for(lambda: status(service, "j") == "SUCCEEDED")

    seen = service.seen("j")
    assert seen is not None
    assert (tap.refused, seen.version, dict(seen.details)) == (["VersionMismatch"], 4, {"pir": "ok"})
    assert "refuses what this agent says" not in caplog.text


@pytest.mark.parametrize("bound", [False, True])
def test_a_step_that_is_silent_for_too_long_is_over_and_the_next_job_done(
    service: Service, unit: Unit, bound: bool
) -> None:
    busy = Busy()
    service.create("j", DOCUMENT)
    with online(service, unit) as up, working(up.link, unit, Scripted(Phase("work", busy, minutes=1, bound=bound))):
        assert busy.began.wait(20)
        service.pass_a_minute()
        wait_for(lambda: status(service, "j") == "TIMED_OUT")
        assert bound or busy.ended.wait(20)  # a bound one goes on, and reports too late
        busy.finish.set()
        service.create("next", DOCUMENT)
        wait_for(lambda: status(service, "next") == "SUCCEEDED")

    assert status(service, "j") == "TIMED_OUT"


def test_a_report_waits_for_the_service_to_come_back(service: Service, unit: Unit) -> None:
    busy = Busy()
    service.create("j", DOCUMENT)
    with online(service, unit) as up, working(up.link, unit, Scripted(Phase("work", busy))):
        assert busy.began.wait(20)
        service.hang_up()
        away(up)
        busy.finish.set()
        assert busy.ended.wait(20)
        service.come_back()
        wait_for(lambda: status(service, "j") == "SUCCEEDED", 60)

    assert service.seen("j", 2) is None


def test_an_update_is_installed_though_its_first_url_has_expired(
    service: Service, unit: Unit, goods: Goods, tmp_path: Path
) -> None:
    world = updates.World(tmp_path / "world")
    target = publish(world, goods)
    patch = f"agent/picket-agent-1.1.0.from-{goods.old.tar.sha256[:8]}.zpatch"
    expired: list[str] = []
    asked: list[str] = []
    again: list[bool] = []
    started: list[str] = []

    def get(payload: Any, url: str, directory: Path, **options: Any) -> Path:
        given = url if expired else service.expired(url)
        if expired:
            again.append(topics.jobs_topic(service.serial, _named(service, "update"), "get") in asked)
        try:
            return download.download(payload, given, directory, delay=lambda _: 0.0, **options)
        except UrlExpired:
            expired.append(given)
            asked.clear()
            raise

    def wake() -> None:
        if disk.runner is not None:
            disk.runner.wake()

    def process() -> None:
        """One, on a connection of its own, as systemd starts it."""
        with online(service, unit) as up:
            disk.link = up.link
            Tap(up).asked = asked
            name = disk.start()
            started.append(name)
            with running(lambda stop: disk.process(name, stop), wake) as thread:
                wait_for(lambda: not thread.is_alive() or status(service, "update") not in {"QUEUED", "IN_PROGRESS"})

    disk = Disk.make(tmp_path / "disk", goods, None)  # type: ignore[arg-type]
    trust = Trust(
        root=world.root,
        metadata=disk.state / "tuf",
        floor=disk.state / "floor.json",
        product="picket",
        serial=service.serial,
        now=lambda: world.now,
    )
    disk.kinds = lambda name: [
        Update(disk.releases, name, [HARDWARE], trust, disk.link, lambda: None, Limits(20.0, 20.0, 3), get=get)
    ]
    service.offer_update("update", world, "1.1.0", {target: goods.full, patch: goods.delta})

    process()
    process()

    seen = service.seen("update")
    assert seen is not None
    assert (seen.number, seen.status) == (1, "SUCCEEDED")
    assert started == [goods.old.name, goods.new]
    assert disk.releases.current() == goods.new
    assert len(expired) == 1
    assert again[0]  # the second URL was asked for, and is not the first once more
    assert {path for path in disk.orphans() if not path.startswith("state/tuf")} == set()


# --- shadows ------------------------------------------------------------------------------------------------------


class Shadowed:
    """A unit's shadows at work."""

    def __init__(self, up: Running, unit: Unit) -> None:
        paths = unit.settings.paths
        self.link = up.link
        self.store = ArmingStore(paths.arming)
        self.tunings = [tuning.load(paths.tuning, DEFAULTS)]
        self.tap = Tap(up)

        def apply(new: Tuning) -> None:
            tuning.save(paths.tuning, new, DEFAULTS)
            self.tunings.append(new)

        settings = SettingsTwin(paths.shadows, lambda: self.tunings[-1], DEFAULTS, apply)
        self.shadows = Shadows(up.link, AlarmTwin(self.store), settings)

    def here(self, *, armed: bool) -> None:
        """Somebody at the unit does it, a moment ago or long ago makes no difference when it is armed."""
        self.store.here(armed=armed, by="keypad", clock=ClockReading(2e9, "ntp"))
        self.shadows.changed()


@contextmanager
def shadowed(service: Service, unit: Unit) -> Iterator[Shadowed]:
    with online(service, unit) as up:
        made = Shadowed(up, unit)
        with running(made.shadows.run, made.shadows.changed):
            yield made


def reported(service: Service, name: str = "alarm") -> Any:
    return service.shadow(name).get("reported", {})


def test_a_unit_without_shadows_makes_them_and_is_armed(service: Service, unit: Unit) -> None:
    with shadowed(service, unit) as one:
        wait_for(lambda: reported(service).get("armed") is True)
        wait_for(lambda: reported(service, "settings").get("sensitivity") == "normal")

    assert sorted(one.tap.refused) == ["404", "404"]
    assert "desired" not in service.shadow("alarm")
    assert reported(service, "settings")["quiet_seconds"] == DEFAULTS.quiet_seconds


def test_wishes_are_followed_in_the_order_of_their_versions(service: Service, unit: Unit) -> None:
    with shadowed(service, unit) as one:
        wait_for(lambda: reported(service, "settings") != {})
        version = 0
        for seconds in range(11, 17):  # faster than the unit can answer
            version = service.desire("settings", quiet_seconds=seconds)
        service.desire("alarm", armed=False)
        wait_for(lambda: reported(service).get("armed") is False)
        wait_for(lambda: reported(service, "settings")["quiet_seconds"] == 16)
        wait_for(lambda: not one.shadows.busy)

    taken = [each.quiet_seconds for each in one.tunings]
    assert (taken[-1], taken[1:]) == (16, sorted(taken[1:]))
    assert version >= 7
    assert reported(service)["armed_by"] == "cloud"
    assert not ArmingStore(unit.settings.paths.arming).now.armed


def test_bad_wishes_are_answered_one_by_one_and_good_ones_taken(service: Service, unit: Unit) -> None:
    service.desire("settings", sensitivity="high", quiet_seconds=-1, colour="red")
    with shadowed(service, unit):
        wait_for(lambda: set(reported(service, "settings").get("rejected", {})) == {"quiet_seconds", "colour"})
        told = reported(service, "settings")
        service.desire("settings", quiet_seconds=None, colour=None)
        wait_for(lambda: "rejected" not in reported(service, "settings"))

    assert (told["sensitivity"], told["quiet_seconds"]) == ("high", DEFAULTS.quiet_seconds)
    assert tuning.load(unit.settings.paths.tuning, DEFAULTS).sensitivity == "high"


def test_a_wish_made_while_the_unit_was_away_is_followed_at_the_next_connect(service: Service, unit: Unit) -> None:
    with shadowed(service, unit) as one:
        wait_for(lambda: reported(service).get("armed") is True)
        service.hang_up()
        wait_for(lambda: not one.link.connected())
        service.desire("alarm", armed=False)
        service.come_back()
        wait_for(lambda: reported(service).get("armed") is False, 60)


def test_arming_at_the_unit_wins_over_a_wish_that_came_between(
    service: Service, unit: Unit, caplog: pytest.LogCaptureFixture
) -> None:
    with shadowed(service, unit) as one:
        wait_for(lambda: reported(service).get("armed") is True)
        service.desire("alarm", armed=False)
        wait_for(lambda: reported(service).get("armed") is False)
        wait_for(lambda: not one.shadows.busy)
        one.tap.refused.clear()
        faster = iter([1, 2])

        def somebody_is_faster(topic: str, body: Any) -> None:
            if topic.endswith("/alarm/update") and "version" in body and (note := next(faster, None)):
                service.desire("alarm", armed=False, note=note)

        one.tap.before = somebody_is_faster
        one.here(armed=True)
        wait_for(lambda: service.shadow("alarm").get("desired", {}).get("armed") is True)
        wait_for(lambda: reported(service).get("armed") is True)
        wait_for(lambda: not one.store.now.pending)

    assert one.tap.refused == ["409", "409"]
    assert "is not told" not in caplog.text  # a conflict is no fault
    assert one.store.now.armed
    assert reported(service)["armed_by"] == "keypad"


# --- health -------------------------------------------------------------------------------------------------------


def test_a_health_report_is_taken_and_a_broken_one_refused_in_words(
    service: Service, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    with online(service, unit) as up:
        paths = unit.settings.paths
        one = Defender(
            up.link,
            unit.board,
            state=paths.state,
            path=paths.reports,
            spool=lambda: len(up.spool),
            seconds=lambda: 300.0,
        )
        with monkeypatch.context() as patch:
            patch.setattr(
                defender, "message", lambda number, *_: b'{"header":{"report_id":%d,"version":"1.0"}}' % number
            )
            one.report()
            refused = one.fault
        one.report()

    assert refused is not None
    assert "InvalidPayload" in refused
    assert one.fault is None


# --- alarms -------------------------------------------------------------------------------------------------------


def test_alarms_wait_for_a_service_that_has_hung_up_and_are_gone_when_it_has_them(service: Service, unit: Unit) -> None:
    with online(service, unit) as up:
        _raise(up, 2)
        up.wait_drained()
        service.hang_up()
        away(up)
        _raise(up, 6)
        waiting = len(up.spool)
        service.come_back()
        up.wait_drained(60)
        wait_for(lambda: len(service.alarms()) == 8, 60)  # the local cloud calls a function for each

    assert waiting == 6
    assert [one["sequence"] for one in service.alarms()] == list(range(1, 9))


def _raise(up: Running, count: int) -> None:
    """As the keeper does it."""
    for _ in range(count):
        up.spool.alarm(
            lambda sequence: json.dumps(alarm(sequence=sequence, at=f"2026-11-21T05:53:{sequence:02}.000Z")).encode()
        )
    up.link.wake(urgent=True)
