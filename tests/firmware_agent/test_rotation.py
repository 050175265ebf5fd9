"""A rotation that is disturbed at any moment ends with one pair that works, and has had one all along.

Real are the kind, the runner, its journal, the sets, the keys, and the cloud's decision (`cloud.handlers`). Ours are
the jobs service, the link, and what the decision's effects are on a cloud in memory.
"""

import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloud.handlers import rotate_certificate as function
from cloud.handlers.rotate_certificate import GiveUp, Issue, Refuse, Reissue, Retire, Row
from firmware_agent import files, identity, mqtt, rotation
from firmware_agent.errors import AgentFault, BadCertificate, KeyFault, KeyMismatch, WrongState, WrongSubject
from firmware_agent.identity import Identity
from firmware_agent.jobs import runner as jobs_runner
from firmware_agent.jobs.kind import Done
from firmware_agent.jobs.runner import Runner
from firmware_agent.keys import DeviceKey, KeyStore, open_store, tpm_key, valid_slot
from firmware_agent.keys.file_key import FileKeys
from firmware_agent.mqtt import NotDeliveredError
from firmware_agent.rotation import Exchange, KeyInForce, Rotation
from tests.firmware_agent.jobs.world import Cut, Disks, Plug, Watched, plugged
from tests.firmware_agent.jobs_service import JobsService, LocalLink
from tests.firmware_agent.support import BOARD, PKCS11_MODULES, SERIAL, Broker, Ca, pem, swtpm, tpm_parts_missing
from tests.firmware_agent.support import Unit as AgentUnit

JOB = "rotate-1"
DOCUMENT = {"picket": 1, "operation": "rotate-certificate", "product": "picket"}


class Cloud(LocalLink):
    """Link and cloud in one: connects whoever shows a certificate that is ACTIVE, by its key.

    Attributes:
        active: the certificates that may connect.
        row: the unit's latest rotation.
        bad: what is wrong with the next certificate that is signed.
        deaf: certificates that are ACTIVE and do not connect all the same.
        lost: so many of the next answers of the function are lost, by operation.
        at: called with a moment of the exchange: `ask <operation>` and `done <operation>`.
    """

    def __init__(self, service: JobsService) -> None:
        super().__init__(service, SERIAL)
        self.ca = Ca("AWS")
        self.active: set[str] = set()
        self.revoked: set[str] = set()
        self.pems: dict[str, str] = {}
        self.row: Row | None = None
        self.bad = ""
        self.deaf: Callable[[str], bool] = lambda _: False
        self.lost: dict[str, int] = {}
        self.at: Callable[[str], None] = lambda _: None
        self._pair: tuple[Identity, DeviceKey] | None = None
        self._answers: Callable[[str, bytes], None] = lambda _topic, _payload: None

    # --- the link ------------------------------------------------------------------------------------------------

    def use(self, found: Identity, key: DeviceKey) -> None:
        self._pair = (found, key)

    def connected_as(self) -> str | None:
        if not self.up or self._pair is None:
            return None
        found, key = self._pair
        certificate = found.certificate_sha256
        proves = found.leaf.public_key() == key.public_key()
        return certificate if proves and certificate in self.active and not self.deaf(certificate) else None

    def connected(self) -> bool:
        return self.connected_as() is not None

    def ask(self, topic: str, body: Mapping[str, Any], *, timeout: float = 30.0) -> Any:
        if not self.connected():
            raise NotDeliveredError("there is no link")
        return super().ask(topic, body, timeout=timeout)

    def subscribe(self, feature: str, filters: Any, listener: Callable[[str, bytes], None]) -> None:
        if feature == "rotate":
            assert filters == [f"cmd/picket/{SERIAL}/rotate/+"]
            self._answers = listener
        else:
            super().subscribe(feature, filters, listener)

    def publish(self, topic: str, payload: bytes) -> "Future[None]":
        sent: Future[None] = Future()
        principal = self.connected_as()
        if topic != f"dt/picket/{SERIAL}/rotate":
            return super().publish(topic, payload)
        if principal is None:
            sent.set_exception(NotDeliveredError("there is no link"))
            return sent
        body = json.loads(payload)
        self.at(f"ask {body['operation']}")
        verdict, answer = self._function({**body, "thing": SERIAL, "principal": principal, "received_ms": 1000})
        self.at(f"done {body['operation']}")
        sent.set_result(None)
        if self.lost.get(body["operation"], 0) > 0:
            self.lost[body["operation"]] -= 1
        else:
            answer = {**answer, "clientToken": body["clientToken"]}
            self._answers(f"cmd/picket/{SERIAL}/rotate/{verdict}", json.dumps(answer).encode())
        return sent

    # --- the function ----------------------------------------------------------------------------------------------

    def _function(self, event: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        request = function.parse(event)
        match function.decide(request, self.row, frozenset(self.active)):
            case Issue(instead):
                self._end(instead)
                assert request.csr is not None
                certificate = self._sign(request.csr)
                digest = hashlib.sha256(request.csr.encode()).hexdigest()
                self.row = Row(request.rotation, "PENDING", certificate, digest)
                return "accepted", {"certificatePem": self.pems[certificate]}
            case Reissue(certificate):
                return "accepted", {"certificatePem": self.pems[certificate]}
            case Retire(certificate):
                assert self.row is not None
                self.row = replace(self.row, state="COMMITTED")
                self.active = {certificate}
                return "accepted", {}
            case GiveUp(certificate):
                self.row = Row(request.rotation, "ABORTED", certificate or "", "")
                self._end(certificate)
                return "accepted", {}
            case Refuse(code, reason):
                return "rejected", {"code": code, "message": reason}

    def _end(self, certificate: str | None) -> None:
        self.active.discard(certificate or "")

    def _sign(self, text: str) -> str:
        csr = x509.load_pem_x509_csr(text.encode())
        assert csr.is_signature_valid
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        if self.bad == "another key":
            key = ec.generate_private_key(ec.SECP256R1()).public_key()
        leaf = self.ca.leaf(key, "PK-000002" if self.bad == "another unit" else SERIAL)
        text = "no certificate" if self.bad == "garbage" else pem(leaf)
        certificate = Identity(SERIAL, pem(leaf), "", "", 1, "").certificate_sha256
        self.pems[certificate] = text
        self.active.add(certificate)
        return certificate


class Unit:
    """A unit's disk, and processes on it."""

    def __init__(self, root: Path, cloud: Cloud, factory: Ca, store: KeyStore | None = None) -> None:
        self.root = root
        self.cloud = cloud
        self.state = root / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.store = store or FileKeys(self.state / "key.pem")
        key = self.store.ensure()
        found = Identity(
            SERIAL,
            pem(factory.leaf(key.public_key())) + pem(factory.certificate),
            pem(factory.certificate),
            "h",
            1,
            "WO",
        )
        identity.install(self.link, found)
        cloud.active.add(found.certificate_sha256)
        self.factory = found.certificate_sha256
        self.boots = 0
        self.runner: Runner | None = None
        self.hook: Callable[[str, str], None] = lambda _moment, _phase: None

    @property
    def link(self) -> Path:
        return self.state / "identity"

    def start(self) -> Identity:
        """What the product does first; a unit that fails here never starts again."""
        found = identity.load(self.link)
        key = self.store.load(found.slot)
        identity.check(found, key.public_key(), BOARD)
        self.cloud.use(found, key)
        return found

    def process(self, stop: threading.Event) -> None:
        """One process of the agent, until there is nothing to do."""
        self.boots += 1
        self.start()
        kind = Rotation(
            self.cloud, self.store, self.link, BOARD, exchange=Exchange(self.cloud, seconds=0.02), connect_seconds=0.0
        )
        self.runner = Runner(
            self.cloud, self.state / "jobs", [Watched(kind, self.hook)], product="picket", leave=lambda: None
        )
        self.runner.run(stop)

    def rest(self, stop: threading.Event) -> None:
        stop.set()
        assert self.runner is not None
        self.runner.wake()

    def run(self) -> None:
        """A process, undisturbed."""
        stop = threading.Event()
        self.cloud.idle = lambda: self.rest(stop)
        self.process(stop)

    def play(self, plug: Plug, disks: Disks | None) -> None:
        """Process after process, until one has nothing to do; with `disks`, each death is a power cut."""
        while True:
            assert self.boots < 40, "it does not come to rest"
            plug.dead, stop = False, threading.Event()
            self.cloud.idle = partial(self.rest, stop)
            try:
                self.process(stop)
            except Cut:
                plug.left = None
                if disks is not None:
                    disks.lose()
                assert self.pairs(), "no pair works"
                continue
            return

    def pairs(self) -> list[str]:
        """The certificates on the disk that work: ACTIVE in the cloud, with the key beside them."""
        found = []
        for name in (identity.in_force(self.link), *identity.others(self.link)):
            try:
                one = identity.load(self.link, name)
                if self.store.load(one.slot).public_key() == one.leaf.public_key():
                    found.append(one.certificate_sha256)
            except AgentFault:
                continue
        return [one for one in found if one in self.cloud.active]

    def left_over(self) -> set[str]:
        """What lies about on the disk that belongs to nothing."""
        now = identity.load(self.link)
        key = f"key-{now.slot}.pem" if now.slot else "key.pem"
        wanted = {"identity", "identity.d", f"identity.d/{identity.in_force(self.link)}", key, "jobs"}
        wanted |= {
            f"identity.d/{identity.in_force(self.link)}/{name}" for name in ("chain.pem", "trust.pem", "endpoint.json")
        }
        wanted |= {"jobs/journal.json"}
        return {path.relative_to(self.state).as_posix() for path in self.state.rglob("*")} - wanted


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(jobs_runner, "_RETRY_SECONDS", 0.001)


@pytest.fixture
def service() -> JobsService:
    return JobsService()


@pytest.fixture
def unit(tmp_path: Path, service: JobsService, ca: Ca) -> Unit:
    made = Unit(tmp_path / "disk", Cloud(service), ca)
    service.create(JOB, DOCUMENT, SERIAL)
    return made


def reports(service: JobsService) -> list[str]:
    return [told.short for told in service.told]


def settled(unit: Unit) -> str:
    """The one certificate that the unit is left with: it connects, and nothing else lies about."""
    found = unit.start()
    assert unit.cloud.connected_as() == found.certificate_sha256
    assert unit.left_over() == set()
    return found.certificate_sha256


# --- undisturbed --------------------------------------------------------------------------------------------------


def test_a_unit_gets_a_new_key_and_a_new_certificate(unit: Unit, service: JobsService) -> None:
    before = unit.store.load().public_key()
    unit.run()
    now = settled(unit)

    assert reports(service) == [f"IN_PROGRESS {phase}" for phase in ("key", "request", "prove", "prove")] + [
        "SUCCEEDED"
    ]
    assert service.told[-1].details["certificate"] == now
    assert unit.cloud.active == {now}
    assert now != unit.factory
    assert unit.start().leaf.public_key() != before


def test_rotations_follow_one_another(unit: Unit, service: JobsService) -> None:
    unit.run()
    first = settled(unit)
    service.create("rotate-2", DOCUMENT, SERIAL)
    unit.run()
    second = settled(unit)

    assert unit.cloud.active == {second}
    assert len({unit.factory, first, second}) == 3
    assert service.status("rotate-2", SERIAL) == "SUCCEEDED"


def test_a_clock_that_jumps_by_years_changes_nothing(
    unit: Unit, service: JobsService, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([0.0, 4e9, 1e9])
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(jumps))
        unit.run()

    assert unit.cloud.active == {settled(unit)}
    assert service.status(JOB, SERIAL) == "SUCCEEDED"


def test_who_tries_the_key_tries_the_one_in_force(unit: Unit) -> None:
    tried = KeyInForce(unit.store, unit.link)
    before = tried.public_key()
    unit.run()

    assert tried.public_key() == unit.start().leaf.public_key() != before
    tried.public_key().verify(tried.sign(b"data"), b"data", ec.ECDSA(hashes.SHA256()))


def test_the_endpoint_and_the_roots_stay(unit: Unit) -> None:
    before = unit.start()
    unit.run()
    after = unit.start()

    assert (after.host, after.port, after.trust, after.batch) == (before.host, before.port, before.trust, before.batch)


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_certificate_that_does_not_connect_is_given_up(unit: Unit, service: JobsService) -> None:
    unit.cloud.deaf = lambda certificate: certificate != unit.factory
    unit.run()

    assert settled(unit) == unit.factory
    assert unit.cloud.active == {unit.factory}
    assert service.status(JOB, SERIAL) == "FAILED"
    assert service.told[-1].details["code"] == "rotation"
    assert "did not connect" in service.told[-1].details["reason"]


@pytest.mark.parametrize("bad", ["another key", "another unit", "garbage"])
def test_a_certificate_that_is_not_for_this_unit_is_not_tried(unit: Unit, service: JobsService, bad: str) -> None:
    unit.cloud.bad = bad
    unit.run()

    assert settled(unit) == unit.factory
    assert unit.cloud.active == {unit.factory}
    assert service.told[-1].short == "FAILED rotation"


@pytest.mark.parametrize("operation", ["begin", "commit"])
def test_answers_that_are_lost_are_asked_for_again(unit: Unit, service: JobsService, operation: str) -> None:
    unit.cloud.lost[operation] = 3
    unit.run()

    assert unit.cloud.active == {settled(unit)}
    assert service.status(JOB, SERIAL) == "SUCCEEDED"


def test_a_cloud_without_the_function_fails_the_job_and_changes_nothing(unit: Unit, service: JobsService) -> None:
    unit.cloud.lost = {"begin": 99, "abort": 99}
    unit.run()

    assert settled(unit) == unit.factory
    assert service.told[-1].short == "FAILED rotation"
    assert "no answer" in service.told[-1].details["reason"]


def test_a_pair_that_dies_between_proof_and_commit_is_given_up(unit: Unit, service: JobsService) -> None:
    def die(moment: str, phase: str) -> None:
        if (moment, phase) == ("begin", "commit"):
            unit.cloud.deaf = lambda certificate: certificate != unit.factory

    unit.hook = die
    unit.run()

    assert settled(unit) == unit.factory
    assert unit.cloud.active == {unit.factory}
    assert service.told[-1].short == "FAILED rotation"


def test_a_commit_whose_answer_never_comes_and_whose_old_certificate_is_dead_ends_with_the_new_one(
    unit: Unit, service: JobsService
) -> None:
    unit.cloud.lost["commit"] = 6
    calls = []

    def flicker(certificate: str) -> bool:
        """Just after the commit, the new certificate does not connect for a while."""
        committed = unit.cloud.row is not None and unit.cloud.row.state == "COMMITTED"
        calls.append(committed)
        return committed and certificate != unit.factory and calls.count(True) < 12

    unit.cloud.deaf = flicker
    unit.run()

    assert unit.cloud.active == {settled(unit)} != {unit.factory}
    assert service.told[-1].short == "FAILED rotation"
    assert "is in force all the same" in service.told[-1].details["reason"]


def test_a_rotation_that_the_cloud_gave_up_for_its_age_ends_with_the_old_certificate(
    unit: Unit, service: JobsService
) -> None:
    def sweep(moment: str, phase: str) -> None:
        if (moment, phase) == ("begin", "commit"):
            assert unit.cloud.row is not None
            unit.cloud._end(unit.cloud.row.certificate_id)
            unit.cloud.row = replace(unit.cloud.row, state="ABORTED")

    unit.hook = sweep
    unit.run()

    assert settled(unit) == unit.factory
    assert service.told[-1].short == "FAILED rotation"


@pytest.mark.parametrize("phase", ["key", "request"])
def test_a_job_that_is_cancelled_before_the_new_pair_is_tried_is_dropped(
    unit: Unit, service: JobsService, phase: str
) -> None:
    def cancel(moment: str, now: str) -> None:
        if (moment, now) == ("end", phase):
            service.cancel(JOB, SERIAL, force=True)

    unit.hook = cancel
    unit.run()

    assert settled(unit) == unit.factory
    assert unit.cloud.active == {unit.factory}


@pytest.mark.parametrize("phase", ["prove", "commit"])
def test_a_job_that_is_cancelled_later_is_carried_to_its_end(unit: Unit, service: JobsService, phase: str) -> None:
    def cancel(moment: str, now: str) -> None:
        if (moment, now) == ("begin", phase):
            service.cancel(JOB, SERIAL, force=True)

    unit.hook = cancel
    unit.run()

    assert unit.cloud.active == {settled(unit)} != {unit.factory}
    assert service.status(JOB, SERIAL) == "CANCELED"


def test_a_full_disk_fails_the_job_and_changes_nothing(
    unit: Unit, service: JobsService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_directory", full)
        unit.run()

    assert settled(unit) == unit.factory
    assert service.told[-1].short == "FAILED no-space"


def test_a_lost_journal_does_not_leave_two_pairs(unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off between the switch and the commit, and the notes are gone: the sets say what is to be done."""

    def stop_here(moment: str, phase: str) -> None:
        if (moment, phase) == ("begin", "commit"):
            plug.pull()

    unit.hook = stop_here
    with plugged(unit.root, monkeypatch) as plug, pytest.raises(Cut):
        unit.run()
    shutil.rmtree(unit.state / "jobs")
    unit.hook = lambda _moment, _phase: None
    both = unit.pairs()
    unit.run()

    assert len(both) == 2
    assert unit.cloud.active == {settled(unit)} != {unit.factory}


def test_a_new_rotation_first_ends_one_that_was_left(unit: Unit, service: JobsService) -> None:
    """As after a clean-up that could not be done."""

    class Half(Rotation):
        def _commit(self, context: Any) -> Any:
            return Done()

    stop = threading.Event()
    unit.cloud.idle = lambda: unit.rest(stop)
    unit.start()
    kind = Half(unit.cloud, unit.store, unit.link, BOARD, exchange=Exchange(unit.cloud, seconds=0.02))
    kind.phases = (*kind.phases[:3], replace(kind.phases[3], run=kind._commit))
    unit.runner = Runner(unit.cloud, unit.state / "jobs", [kind], product="picket", leave=lambda: None)
    unit.runner.run(stop)
    left = unit.pairs()
    service.create("rotate-2", DOCUMENT, SERIAL)
    unit.run()

    assert len(left) == 2
    assert unit.cloud.active == {settled(unit)}
    assert service.status("rotate-2", SERIAL) == "SUCCEEDED"


# --- killed and cut off -------------------------------------------------------------------------------------------

PHASES = ("key", "request", "prove", "commit", "settle", "clean-up")
SITUATIONS: Mapping[str, Callable[[Unit], Callable[[str], bool]]] = {
    "good": lambda _: lambda _certificate: False,
    "deaf": lambda unit: lambda certificate: certificate != unit.factory,
}


def expect_whole(unit: Unit, service: JobsService) -> None:
    now = settled(unit)
    status = service.status(JOB, SERIAL)
    assert status in {"SUCCEEDED", "FAILED"}
    assert (now != unit.factory) == (status == "SUCCEEDED")
    assert unit.cloud.active == {now}


def count_changes(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often an undisturbed rotation changes the disk."""
    with plugged(unit.root, monkeypatch) as plug:
        unit.run()
    return plug.count


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("how", ["kill", "power cut"])
def test_at_each_change_of_the_disk_a_unit_may_die_and_comes_back(
    situation: str, how: str, tmp_path: Path, ca: Ca, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh(place: str) -> tuple[Unit, JobsService]:
        service = JobsService()
        unit = Unit(tmp_path / place, Cloud(service), ca)
        unit.cloud.deaf = SITUATIONS[situation](unit)
        service.create(JOB, DOCUMENT, SERIAL)
        return unit, service

    changes = count_changes(fresh("undisturbed")[0], monkeypatch)
    assert changes > 50
    for point in range(changes):
        unit, service = fresh(f"at-{point}")
        with plugged(unit.root, monkeypatch) as plug:
            disks = Disks(unit.root, plug) if how == "power cut" else None
            plug.left = point
            unit.play(plug, disks)
        assert unit.boots >= 2, f"{point}: was not struck"
        expect_whole(unit, service)
        shutil.rmtree(unit.root)


MOMENTS = ("ask begin", "done begin", "ask commit", "done commit", "ask abort", "done abort")


@pytest.mark.parametrize("how", ["kill", "power cut"])
@pytest.mark.parametrize("moment", [*MOMENTS, *(f"{edge} {phase}" for phase in PHASES for edge in ("begin", "end"))])
@pytest.mark.parametrize("times", [1, 3])
def test_at_each_step_a_unit_may_die_more_than_once_and_comes_back(
    moment: str, how: str, times: int, unit: Unit, service: JobsService, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "abort" in moment or "settle" in moment:
        unit.cloud.deaf = SITUATIONS["deaf"](unit)
    struck: list[str] = []

    def strike(now: str) -> None:
        if now == moment and len(struck) < times:
            struck.append(now)
            plug.pull()

    unit.cloud.at = strike
    unit.hook = lambda edge, phase: strike(f"{edge} {phase}")
    with plugged(unit.root, monkeypatch) as plug:
        unit.play(plug, Disks(unit.root, plug) if how == "power cut" else None)

    assert len(struck) == times
    unit.run()  # the next start sweeps what three deaths in the clean-up have left of it
    now = settled(unit)
    assert unit.cloud.active == {now}
    if times == 1:
        expect_whole(unit, service)


# --- what may be put in force ---------------------------------------------------------------------------------------


@pytest.fixture
def rotated(ca: Ca) -> tuple[Identity, ec.EllipticCurvePublicKey]:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    found = Identity(SERIAL, pem(ca.leaf(key)), pem(ca.certificate), "h", 1, "WO", "a1", "job#1", "old")
    return found, key


def test_a_certificate_without_its_issuer_is_taken_from_a_rotation_only(
    rotated: tuple[Identity, ec.EllipticCurvePublicKey],
) -> None:
    found, key = rotated
    identity.check(found, key, BOARD)

    with pytest.raises(BadCertificate, match="one certificate"):
        identity.check(replace(found, slot=""), key, BOARD)


def test_a_rotated_certificate_must_be_for_this_key_and_no_other_unit(
    rotated: tuple[Identity, ec.EllipticCurvePublicKey], ca: Ca
) -> None:
    found, key = rotated
    with pytest.raises(KeyMismatch):
        identity.check(found, ec.generate_private_key(ec.SECP256R1()).public_key(), BOARD)
    with pytest.raises(WrongSubject):
        identity.check(replace(found, chain=pem(ca.leaf(key, "PK-000002"))), key, BOARD)
    with pytest.raises(WrongSubject):
        identity.check(replace(found, chain=pem(ca.leaf(key, board="another"))), key, BOARD)


def test_the_name_that_aws_gives_to_the_nameless_is_no_other_units(
    rotated: tuple[Identity, ec.EllipticCurvePublicKey], ca: Ca
) -> None:
    found, key = rotated
    now = datetime.now(UTC)
    nameless = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "AWS IoT Certificate")]))
        .issuer_name(ca.name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(ca.key, hashes.SHA256())
    )
    identity.check(replace(found, chain=pem(nameless)), key, BOARD)

    with pytest.raises(BadCertificate):
        identity.check(replace(found, chain=pem(nameless), slot=""), key, BOARD)


# --- keys in a TPM --------------------------------------------------------------------------------------------------


@pytest.fixture
def with_tpm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentUnit]:
    if missing := tpm_parts_missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    for name in ("TPM2_PKCS11_STORE", "TPM2_PKCS11_TCTI", "TPM2_PKCS11_BACKEND"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("TSS2_LOG", "all+NONE")
    with swtpm(tmp_path / "tpm") as tcti:
        made = AgentUnit.make(tmp_path / "disk", store="tpm", tcti=tcti, module=str(PKCS11_MODULES[0]))
        made.settings.paths.state.mkdir(parents=True)
        tpm_key.use(made.settings)
        yield made


def test_in_a_tpm_the_new_key_takes_the_place_of_the_old_one_and_connects(
    with_tpm: AgentUnit, service: JobsService, broker: Broker, ca: Ca
) -> None:
    store = open_store(with_tpm.settings)
    cloud = Cloud(service)
    cloud.ca = ca
    unit = Unit(with_tpm.root, cloud, ca, store)
    store.close()  # here is no resource manager, and a bare TPM has no room for the key just made and another
    service.create(JOB, DOCUMENT, SERIAL)
    unit.run()
    found = unit.start()
    store.close()
    broker.start()
    attempt = mqtt.attempt(
        replace(found, host="localhost", port=broker.port),
        store.load(found.slot),
        f"dt/picket/{SERIAL}/hello",
        b"{}",
        keep_alive_seconds=45,
        now=time.time(),
    )
    slots = store.slots()
    store.close()

    assert service.status(JOB, SERIAL) == "SUCCEEDED"
    assert attempt.outcome == "held", attempt.detail
    assert found.slot
    assert slots == (found.slot,)


# --- keys in files --------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> FileKeys:
    return FileKeys(tmp_path / "key.pem")


def test_files_hold_keys_in_slots_of_their_own(store: FileKeys, tmp_path: Path) -> None:
    first, second = store.ensure().public_key(), store.ensure("a1").public_key()
    both = store.slots()
    again = store.ensure("a1").public_key()
    store.remove("")
    store.remove("")

    assert first != second == again
    assert both == ("", "a1")
    assert store.slots() == ("a1",)
    assert (tmp_path / "key-a1.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(WrongState):
        store.load()


def test_a_key_that_cannot_be_removed_is_a_fault(store: FileKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    store.ensure("a1")
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", refuse)
        with pytest.raises(KeyFault, match="cannot be removed"):
            store.remove("a1")


@pytest.mark.parametrize("name", ["../x", "A", "a-b", "a" * 33, "a/b", "a.b", " "])
def test_a_slots_name_cannot_lead_out_of_its_folder(name: str) -> None:
    assert not valid_slot(name)
    assert valid_slot("")
    assert valid_slot("0af3")
