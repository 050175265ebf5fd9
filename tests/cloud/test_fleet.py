"""The fleet's operator against a real local cloud with real MQTT devices: ship, watch, stop, take back.

A minute of jobs is a second here. The devices answer jobs as the agent does. They say hello only where a test looks at
it: each hello is a call of a function.
"""

import contextlib
import functools
import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import pytest

from cloud import rollout
from cloud.errors import NoSuchName, NotYet
from cloud.fleet import Fleet as Operator
from cloud.repository import Repository
from cloud.rollout import Abort, Kind, Plan, Rate, Ring, Status
from cloud.target import Target
from firmware_agent.jobs.document import CollectLogs, Update, parse
from firmware_agent.update.target import Running
from firmware_agent.update.trust import Trust
from tests.cloud.conftest import Fleet, Unit, deployed, eventually, hello
from tests.cloud.device import Device, connected
from tests.cloud.test_jobs_overlay import fetch
from tests.updates import World

SOON = timedelta(hours=12)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A cloud of this file's own, as its rings are counted."""
    with deployed(tmp_path_factory.mktemp("fleet")) as made:
        yield made


@pytest.fixture(scope="module")
def pool(fleet: Fleet) -> list[Unit]:
    return [fleet.admitted() for _ in range(32)]


@pytest.fixture
def operator(fleet: Fleet) -> Iterator[Operator]:
    """The operator, before empty rings and no jobs."""
    made = Operator(fleet.target)
    yield made
    iot = fleet.target.iot
    for job in made.jobs(""):
        iot.delete_job(jobId=job.name, force=True)
    for ring in Ring:
        for serial in made.members(ring):
            iot.remove_thing_from_thing_group(thingName=serial, thingGroupName=made.group(ring))
    for name in ("Metadata", "Releases"):
        for entry in fleet.target.s3.list_objects_v2(Bucket=fleet.outputs[name]).get("Contents", []):
            fleet.target.s3.delete_object(Bucket=fleet.outputs[name], Key=entry["Key"])


Outcome = tuple[str, dict[str, str]]
GOOD: Outcome = ("SUCCEEDED", {})
UNHEALTHY: Outcome = ("FAILED", {"code": "unhealthy", "reason": "the PIR line does not open"})


@dataclass
class Worker:
    """A unit that does its jobs: it answers each as `outcome` says, and may say hello when an update succeeded."""

    device: Device
    outcome: Callable[[dict[str, Any]], Outcome]
    says_hello: bool = False
    agent: str = "1.1.0"
    image: str = "picket 1.0.0"
    done: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.is_set():
            execution = self.device.start(statusDetails={"phase": "check"})
            if execution is None:
                self._wait()
                continue
            document = execution["jobDocument"]
            status, details = self.outcome(document)
            if self.says_hello and status == "SUCCEEDED" and "version" in document:
                if document["operation"] == "os-update":
                    self.image = f"picket {document['version']}"
                    self.say_hello(self.agent)
                else:
                    self.say_hello(document["version"])
            self.device.update(execution["jobId"], status, statusDetails={"phase": "report", **details})
            self.done.append(document.get("version", document["operation"]))

    def say_hello(self, version: str) -> None:
        self.agent = version
        body = hello(agent=version, image=self.image, mode="product", nonce=None)
        self.device.publish_data("hello", body)

    def _wait(self) -> None:
        with contextlib.suppress(queue.Empty):
            self.device.next("jobs/notify-next")

    def stop(self) -> None:
        self._stop.set()
        self.device.wake("jobs/notify-next")


@contextmanager
def working(
    fleet: Fleet,
    units: Sequence[Unit],
    outcome: Callable[[str, dict[str, Any]], Outcome] = lambda *_: GOOD,
    *,
    says_hello: bool = False,
) -> Iterator[list[Worker]]:
    """All these units at work; `outcome` is asked with the serial and the job's document."""
    with ExitStack() as stack, ThreadPoolExecutor(8) as helpers:
        devices = [Device(fleet, unit) for unit in units]
        for device in devices:
            stack.callback(device.close)
        list(helpers.map(Device.open, devices))
        workers = [Worker(device, functools.partial(outcome, device.serial), says_hello) for device in devices]
        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        try:
            yield workers
        finally:
            for worker in workers:
                worker.stop()
            for thread in threads:
                thread.join()


def _serials(units: Sequence[Unit]) -> list[str]:
    return [unit.serial for unit in units]


def _repository(world: World) -> Repository:
    return Repository(world.directory)


def _plan(**changes: Any) -> Plan:
    return Plan(**{"rate": None, "abort": Abort(100, 100), "retries": 0, "timeout": SOON, **changes})


def _now() -> datetime:
    return datetime.now(UTC)


def _ready(operator: Operator, world: World, version: str, ring: Ring = Ring.MAIN, **details: Any) -> Any:
    """A release that is signed for the ring and lies in the bucket."""
    world.release(version, ring, **details)
    operator.upload(_repository(world))
    return operator.release(_repository(world), ring, version)


def _counts(operator: Operator, job: str) -> dict[Status, int]:
    return dict(operator.progress(job).summary.counts)


# --- releases ------------------------------------------------------------------------------------------------------


def test_a_repository_is_uploaded_once_and_its_timestamp_last(fleet: Fleet, operator: Operator, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.release("1.2.0")
    repository = _repository(world)
    names = [file.name for file in repository.files_to_publish()]

    first = operator.upload(repository)
    second = operator.upload(repository)

    assert (list(first.new), second.new, second.kept) == (names, (), len(names))
    assert first.new[-1] == "metadata/timestamp.json"
    private = {entry["Key"] for entry in fleet.target.s3.list_objects_v2(Bucket=fleet.outputs["Releases"])["Contents"]}
    public = {entry["Key"] for entry in fleet.target.s3.list_objects_v2(Bucket=fleet.outputs["Metadata"])["Contents"]}
    assert {name.partition("/")[0] for name in private} == {"targets"}
    assert {name.partition("/")[0] for name in public} == {"metadata"}


def test_an_upload_that_ended_early_leaves_the_old_timestamp_and_is_completed_by_the_next(
    operator: Operator, tmp_path: Path
) -> None:
    world = World(tmp_path)
    world.release("1.2.0")
    operator.upload(_repository(world))
    world.release("1.3.0")
    put = operator._s3.put_object
    before = operator._published_timestamp()

    with (
        mock.patch.object(operator._s3, "put_object", side_effect=_fails_at(put, 2)),
        pytest.raises(OSError, match="cut"),
    ):
        operator.upload(_repository(world))
    cut = operator._published_timestamp()
    with pytest.raises(NotYet, match="fleet release"):
        operator.release(_repository(world), Ring.MAIN, "1.3.0")
    operator.upload(_repository(world))

    assert (before, cut) == (before, before)
    assert operator.release(_repository(world), Ring.MAIN, "1.3.0").version == "1.3.0"


def _fails_at(put: Callable[..., Any], number: int) -> Callable[..., Any]:
    calls = iter(range(1, 100))

    def act(**options: Any) -> Any:
        if next(calls) == number:
            raise OSError("the network is cut")
        return put(**options)

    return act


def test_an_older_copy_of_the_repository_is_not_uploaded_over_a_newer(operator: Operator, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.release("1.2.0")
    operator.upload(_repository(world))
    timestamp = world.metadata / "timestamp.json"
    old = json.loads(timestamp.read_text())
    old["signed"]["version"] -= 1
    timestamp.write_text(json.dumps(old))

    with pytest.raises(NotYet, match="another copy"):
        operator.upload(_repository(world))


def test_other_bytes_under_an_immutable_name_are_refused(fleet: Fleet, operator: Operator, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.release("1.2.0")
    name = _repository(world).files_to_publish()[0].name
    fleet.target.s3.put_object(Bucket=fleet.outputs["Releases"], Key=name, Body=b"others", Metadata={"sha256": "00"})

    with pytest.raises(NotYet, match="other bytes"):
        operator.upload(_repository(world))


def test_what_a_job_document_offers_is_what_a_unit_can_verify_and_fetch(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    """By the unit's own trust, from the root of its image, over the URLs of its own job."""
    world = World(tmp_path)
    release = _ready(operator, world, "1.2.0")
    operator.move(Ring.MAIN, [pool[0].serial])
    operator.start_update(Ring.MAIN, release, _plan(), _now())
    with connected(fleet, pool[0]) as device:
        job = device.next_job()

    assert job is not None
    document = job["jobDocument"]
    _, asked = parse(document, "picket")
    assert isinstance(asked, Update)
    trust = Trust(
        root=world.root,
        metadata=tmp_path / "unit/tuf",
        floor=tmp_path / "unit/floor.json",
        product="picket",
        serial=pool[0].serial,
        now=_now,
    )
    (tmp_path / "unit").mkdir()
    target = trust.check(asked.target, asked.metadata, Running("1.0.0", 1, ("picket,simulated",)))
    status, body = fetch(asked.urls[asked.target])
    assert (status, len(body), target.version) == (200, release.length, "1.2.0")


# --- rings ---------------------------------------------------------------------------------------------------------


def test_a_unit_is_in_one_ring_at_a_time(operator: Operator, pool: list[Unit]) -> None:
    serials = _serials(pool[:3])
    operator.move(Ring.MAIN, serials)

    operator.move(Ring.CANARY, serials[:1])
    operator.move(Ring.CANARY, serials[:1])

    assert operator.members(Ring.CANARY) == (serials[0],)
    assert operator.members(Ring.MAIN) == tuple(serials[1:])


def test_a_unit_that_nobody_made_joins_no_ring_and_those_beside_it_stay(operator: Operator, pool: list[Unit]) -> None:
    operator.move(Ring.MAIN, _serials(pool[:1]))

    with pytest.raises(NoSuchName, match="no unit is called PK-NOBODY"):
        operator.move(Ring.CANARY, [pool[0].serial, "PK-NOBODY"])

    assert pool[0].serial in operator.members(Ring.MAIN)


def test_the_units_are_listed_with_what_they_said_last(fleet: Fleet, operator: Operator, pool: list[Unit]) -> None:
    operator.move(Ring.MAIN, _serials(pool[:2]))
    with connected(fleet, pool[0]) as device:
        device.publish_data("hello", hello(agent="1.1.0", image="picket 1.0.0"))

        def heard() -> Any:
            found = {unit.serial: unit for unit in operator.units()}
            return found if found[pool[0].serial].version == "1.1.0" else None

        found = eventually(heard)

    said, silent = found[pool[0].serial], found[pool[1].serial]
    assert (said.ring, said.image, said.last_seen is not None) == (Ring.MAIN, "picket 1.0.0", True)
    assert (silent.version, silent.last_seen) == (None, None)


# --- rollouts ------------------------------------------------------------------------------------------------------


def test_a_release_goes_from_the_canaries_to_all_units(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    world = World(tmp_path)
    canaries, others = pool[:2], pool[2:6]
    operator.move(Ring.CANARY, _serials(canaries))
    operator.move(Ring.MAIN, _serials(others))
    for_canaries = _ready(operator, world, "1.2.0", Ring.CANARY)
    with pytest.raises(NotYet, match="fleet promote 1\\.2\\.0"):
        operator.release(_repository(world), Ring.MAIN, "1.2.0")
    world.repository.promote("1.2.0")
    world.publish()
    operator.upload(_repository(world))
    for_all = operator.release(_repository(world), Ring.MAIN, "1.2.0")

    def soak(wanted: timedelta = timedelta()) -> rollout.Soak:
        return operator.soak(_repository(world), "1.2.0", wanted, _now())

    with working(fleet, [*canaries, *others], says_hello=True):
        before = soak()
        first = operator.start_update(Ring.CANARY, for_canaries, _plan(), _now())
        eventually(lambda: _counts(operator, first.job) == {Status.SUCCEEDED: 2})
        eventually(lambda: soak().ready)
        too_early = soak(timedelta(hours=1))
        second = operator.start_update(Ring.MAIN, for_all, _plan(), _now())
        eventually(lambda: _counts(operator, second.job) == {Status.SUCCEEDED: 4})
        rings = eventually(lambda: _all_run(operator, "1.2.0"))

    assert (before.ready, too_early.ready) == (False, False)
    assert "soak for" in too_early.sentence
    assert [(ring.ring, dict(ring.versions)) for ring in rings] == [
        (Ring.CANARY, {"1.2.0": 2}),
        (Ring.MAIN, {"1.2.0": 4}),
    ]


def test_an_image_goes_the_same_way_beside_a_release_of_the_agent_that_has_its_version(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    world, os = World(tmp_path), Kind.OS
    canaries, others = pool[:2], pool[2:4]
    operator.move(Ring.CANARY, _serials(canaries))
    operator.move(Ring.MAIN, _serials(others))
    agent = _ready(operator, world, "1.2.0")
    world.release("1.2.0", "canary", kind="os", security_version=3)
    world.repository.promote("1.2.0", os)
    world.publish()
    operator.upload(_repository(world))
    agent = operator.release(_repository(world), Ring.MAIN, "1.2.0")
    images = [operator.release(_repository(world), ring, "1.2.0", os) for ring in Ring]

    with working(fleet, [*canaries, *others], says_hello=True):
        beside = operator.start_update(Ring.MAIN, agent, _plan(), _now())
        first = operator.start_update(Ring.CANARY, images[0], _plan(), _now())
        eventually(lambda: operator.soak(_repository(world), "1.2.0", timedelta(), _now(), os).ready)
        second = operator.start_update(Ring.MAIN, images[1], _plan(), _now())
        rings = eventually(lambda: _all_have(operator, "1.2.0"))
        eventually(lambda: operator.lowest(_repository(world), Ring.MAIN, os) == 3)

    assert (first.replaced, second.replaced) == ((), ())  # the agent's rollout goes on
    assert {job.name for job in operator.active_updates(Ring.MAIN)} == {beside.job, second.job}
    assert [(update.job, update.version) for update in rings[1].updates] == [
        (beside.job, "1.2.0"),
        (second.job, "image 1.2.0"),
    ]
    assert {unit.runs(os) for unit in operator.units()} == {"1.2.0"}
    assert operator.document(images[1])["operation"] == "os-update"


def _all_have(operator: Operator, image: str) -> Any:
    rings = operator.status()
    return rings if all(set(ring.images) == {image} for ring in rings) else None


def _all_run(operator: Operator, version: str) -> Any:
    rings = operator.status()
    return rings if all(set(ring.versions) == {version} for ring in rings) else None


def test_a_canary_that_went_back_keeps_the_release_from_all_units(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    world = World(tmp_path)
    release = _ready(operator, world, "1.2.0", Ring.CANARY)
    world.repository.promote("1.2.0")
    world.publish()
    operator.move(Ring.CANARY, _serials(pool[:1]))
    with working(fleet, pool[:1], says_hello=True) as (worker,):
        job = operator.start_update(Ring.CANARY, release, _plan(), _now()).job
        eventually(lambda: _counts(operator, job) == {Status.SUCCEEDED: 1})
        eventually(lambda: operator.soak(_repository(world), "1.2.0", timedelta(), _now()).ready)
        worker.say_hello("1.1.0")
        verdict = eventually(lambda: _unready(operator, world))

    assert "now reports 1.1.0" in verdict.sentence


def _unready(operator: Operator, world: World) -> rollout.Soak | None:
    verdict = operator.soak(_repository(world), "1.2.0", timedelta(), _now())
    return None if verdict.ready else verdict


def test_thirty_units_are_told_slowly_at_first_and_faster_as_they_succeed(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    release = _ready(operator, World(tmp_path), "1.2.0")
    units = pool[:30]
    operator.move(Ring.MAIN, _serials(units))
    may_finish = threading.Event()

    def once_allowed(*_: Any) -> Outcome:
        may_finish.wait()
        return GOOD

    told: list[int] = []

    def look(until: int) -> bool:
        summary = operator.progress(job, operator.members(Ring.MAIN)).summary
        told.append(30 - summary.waiting)
        return told[-1] >= until

    with working(fleet, units, once_allowed):
        try:
            rate = Rate(base=2, factor=3.0, step=4, maximum=20)
            job = operator.start_update(Ring.MAIN, release, _plan(rate=rate), _now()).job
            eventually(lambda: look(6))
            slow = sorted(set(told))
        finally:
            may_finish.set()
        eventually(lambda: look(30))
        eventually(lambda: _counts(operator, job) == {Status.SUCCEEDED: 30})

    fast = sorted(set(told))
    assert slow == [2, 4, 6]  # nobody succeeded, so nothing sped up
    assert max(later - sooner for sooner, later in itertools.pairwise(fast)) >= 6


def test_a_rollout_stops_by_itself_when_too_many_of_thirty_units_fail(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    release = _ready(operator, World(tmp_path), "1.2.0")
    units = pool[:30]
    operator.move(Ring.MAIN, _serials(units))
    bad = set(_serials(units[::3]))
    plan = _plan(rate=Rate(base=6, factor=1.1, step=100, maximum=6), abort=Abort(25, 10))

    with working(fleet, units, lambda serial, _: UNHEALTHY if serial in bad else GOOD):
        job = operator.start_update(Ring.MAIN, release, plan, _now()).job
        eventually(lambda: operator.progress(job).status == "CANCELED")
        progress = eventually(lambda: _rests(operator, job))

    summary = progress.summary
    (failure,) = summary.failures
    assert "Abort criteria" in progress.comment
    assert (failure.status, failure.code, failure.reason) == (Status.FAILED, *UNHEALTHY[1].values())
    assert set(failure.units) <= bad
    assert 10 <= summary.total < 30  # judged after ten, and the rest was never told
    assert summary.counts[Status.SUCCEEDED] == summary.total - len(failure.units) - summary.counts.get(
        Status.CANCELED, 0
    )


def _rests(operator: Operator, job: str) -> Any:
    progress = operator.progress(job)
    return progress if not progress.summary.open else None


def test_a_unit_that_failed_once_tries_again_and_is_counted_once(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    release = _ready(operator, World(tmp_path), "1.2.0")
    operator.move(Ring.MAIN, _serials(pool[:1]))
    answers = iter([("FAILED", {"code": "download", "reason": "the connection was cut"}), GOOD])

    with working(fleet, pool[:1], lambda *_: next(answers)):
        job = operator.start_update(Ring.MAIN, release, _plan(retries=1), _now()).job
        eventually(lambda: _counts(operator, job) == {Status.SUCCEEDED: 1})

    attempts = operator.executions(job)
    assert sorted((each.number, each.status, each.code) for each in attempts) == [
        (1, Status.FAILED, "download"),
        (2, Status.SUCCEEDED, "-"),
    ]
    assert operator.progress(job).summary.failures == ()


def test_the_same_rollout_twice_is_one_job_and_a_newer_one_takes_its_place(
    operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    world = World(tmp_path)
    old = _ready(operator, world, "1.2.0")
    new = _ready(operator, world, "1.3.0")
    operator.move(Ring.MAIN, _serials(pool[:2]))

    first = operator.start_update(Ring.MAIN, old, _plan(), _now())
    again = operator.start_update(Ring.MAIN, old, _plan(), _now())
    newer = operator.start_update(Ring.MAIN, new, _plan(), _now())
    back = operator.start_update(Ring.MAIN, old, _plan(), _now())

    assert (first.found, again.found, again.job) == (False, True, first.job)
    assert (newer.replaced, back.replaced) == ((first.job,), (newer.job,))
    assert (back.found, back.job) == (False, first.job.removesuffix("1") + "2")
    assert [job.name for job in operator.active_updates(Ring.MAIN)] == [back.job]
    assert _counts(operator, first.job) == {Status.CANCELED: 2}


def test_a_unit_that_joins_the_ring_later_gets_the_rings_release(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    release = _ready(operator, World(tmp_path), "1.2.0")
    operator.move(Ring.MAIN, _serials(pool[:1]))

    with working(fleet, pool[:2]):
        job = operator.start_update(Ring.MAIN, release, _plan(), _now()).job
        eventually(lambda: _counts(operator, job) == {Status.SUCCEEDED: 1})
        operator.move(Ring.MAIN, _serials(pool[1:2]))
        eventually(lambda: _counts(operator, job) == {Status.SUCCEEDED: 2})


def test_an_abort_lets_units_finish_and_by_force_it_does_not(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    world = World(tmp_path)
    release = _ready(operator, world, "1.2.0")
    operator.move(Ring.MAIN, _serials(pool[:2]))
    job = operator.start_update(Ring.MAIN, release, _plan(), _now()).job
    with connected(fleet, pool[0]) as device:
        device.start()
        operator.cancel(job)
        gently = _counts(operator, job)
        finished, _ = device.update(job, "SUCCEEDED")

        forced = operator.start_update(Ring.MAIN, release, _plan(), _now()).job
        device.start()
        operator.cancel(forced, force=True)
        kind, answer = device.update(forced, "SUCCEEDED")

    assert gently == {Status.IN_PROGRESS: 1, Status.CANCELED: 1}
    assert (finished, kind, answer["code"]) == ("accepted", "rejected", "InvalidStateTransition")
    assert _counts(operator, forced) == {Status.CANCELED: 2}


def test_a_rollback_goes_no_lower_than_what_the_ring_runs_allows(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    world = World(tmp_path)
    _ready(operator, world, "1.1.0", security_version=1)
    _ready(operator, world, "1.2.0", security_version=1)
    _ready(operator, world, "1.3.0", security_version=2)
    operator.move(Ring.MAIN, _serials(pool[:2]))

    with connected(fleet, pool[0]) as device:
        device.publish_data("hello", hello(agent="1.2.0"))
        eventually(lambda: operator.lowest(_repository(world), Ring.MAIN) == 1)
        device.publish_data("hello", hello(agent="1.3.0"))
        eventually(lambda: operator.lowest(_repository(world), Ring.MAIN) == 2)


# --- single things -------------------------------------------------------------------------------------------------


def test_one_unit_is_asked_and_asked_again_when_it_has_answered(
    fleet: Fleet, operator: Operator, pool: list[Unit]
) -> None:
    serial = pool[0].serial
    first = operator.start_operation(rollout.Operation.SELF_TEST, serial, _plan(), _now())
    same = operator.start_operation(rollout.Operation.SELF_TEST, serial, _plan(), _now())
    with working(fleet, pool[:1]) as (worker,):
        eventually(lambda: operator.progress(first.job).status == "COMPLETED")
        second = operator.start_operation(rollout.Operation.SELF_TEST, serial, _plan(), _now())
        eventually(lambda: operator.progress(second.job).status == "COMPLETED")

    assert (first.found, same.found, same.job, second.found) == (False, True, first.job, False)
    assert (first.job, second.job) == (f"picket-self-test-{serial}-1", f"picket-self-test-{serial}-2")
    assert worker.done == ["self-test", "self-test"]


@pytest.mark.parametrize("operation", list(rollout.Operation))
def test_every_document_is_one_that_the_agent_takes(
    fleet: Fleet, operator: Operator, pool: list[Unit], operation: rollout.Operation
) -> None:
    tuning = {"quiet_seconds": 60} if operation is rollout.Operation.CONFIGURE else None
    operator.start_operation(operation, pool[0].serial, _plan(), _now(), tuning)

    with connected(fleet, pool[0]) as device:
        job = device.next_job()

    assert job is not None
    name, asked = parse(job["jobDocument"], "picket")
    assert name == operation
    assert isinstance(asked, CollectLogs) == (operation is rollout.Operation.COLLECT_LOGS)


def test_a_units_logs_come_by_its_own_url_and_are_fetched_once(
    fleet: Fleet, operator: Operator, pool: list[Unit], tmp_path: Path
) -> None:
    job = operator.start_operation(rollout.Operation.COLLECT_LOGS, pool[0].serial, _plan(), _now()).job
    with connected(fleet, pool[0]) as device:
        asked = device.next_job()
        assert asked is not None
        uploaded, _ = fetch(asked["jobDocument"]["upload"], "PUT", b"what happened")

    fetched = operator.logs(pool[0].serial, tmp_path)
    again = operator.logs(pool[0].serial, tmp_path)

    assert (uploaded, fetched, again) == (200, [tmp_path / f"{job}-1.txt.gz"], fetched)
    assert fetched[0].read_bytes() == b"what happened"
    assert operator.logs(pool[1].serial, tmp_path) == []
    with pytest.raises(NoSuchName, match="no unit is called PK-NOBODY"):
        operator.logs("PK-NOBODY", tmp_path)


def test_a_whole_ring_is_asked_as_it_is_now(fleet: Fleet, operator: Operator, pool: list[Unit]) -> None:
    operator.move(Ring.CANARY, _serials(pool[:3]))

    with working(fleet, pool[:3]):
        job = operator.start_operation(rollout.Operation.REBOOT, Ring.CANARY, _plan(), _now()).job
        eventually(lambda: operator.progress(job).status == "COMPLETED")

    assert _counts(operator, job) == {Status.SUCCEEDED: 3}


def test_a_unit_that_nobody_made_is_asked_for_nothing(operator: Operator) -> None:
    with pytest.raises(NoSuchName, match="no unit is called PK-NOBODY"):
        operator.start_operation(rollout.Operation.REBOOT, "PK-NOBODY", _plan(), _now())


# --- the way to AWS ------------------------------------------------------------------------------------------------


def test_a_throttled_call_is_tried_again_and_long_lists_are_read_to_their_end() -> None:
    answers: list[tuple[int, dict[str, Any]]] = [
        (429, {"__type": "ThrottlingException", "message": "Rate exceeded"}),
        (200, {"things": ["PK-2", "PK-3"], "nextToken": "more"}),
        (200, {"things": ["PK-1"]}),
    ]

    class Aws(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.pop(0)
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("x-amzn-ErrorType", str(body.get("__type", "")))
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Aws) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        session = boto3.Session(aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1")
        target = Target("aws", "us-east-1", session, f"http://127.0.0.1:{server.server_address[1]}")
        try:
            members = Operator(target).members(Ring.MAIN)
        finally:
            server.shutdown()
            thread.join()

    assert (members, answers) == (("PK-1", "PK-2", "PK-3"), [])
