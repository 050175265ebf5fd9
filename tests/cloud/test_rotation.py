"""A unit's certificate is changed by the cloud's function: real MQTT, real certificates, and nobody without one."""

import itertools
import json
import queue
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from awscrt import io, mqtt5
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from cloud.doctor import Credentials
from cloud.handlers import rotate_certificate as handler
from cloud.handlers.rotate_certificate import Clients, GiveUp, Issue, Refuse, Reissue, Request, Retire, Row, decide
from firmware_agent import identity, keys
from firmware_agent.identity import Identity
from firmware_agent.jobs.runner import Runner
from firmware_agent.link import Link
from firmware_agent.rotation import Rotation
from firmware_agent.settings import parse
from firmware_agent.spool import Spool
from firmware_agent.systemd import Systemd
from tests.cloud.conftest import Fleet, Unit, eventually
from tests.firmware_agent.support import BOARD, TestBoard

_numbers = itertools.count(1)


def rotation() -> str:
    return f"rotate-{uuid.uuid4().hex[:8]}#1"


class Speaker:
    """A unit on its connection, that asks and listens as the policy lets it."""

    def __init__(self, fleet: Fleet, unit: Unit) -> None:
        self._serial = unit.serial
        self._arrived: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._up: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._down: queue.SimpleQueue[None] = queue.SimpleQueue()
        options = io.TlsContextOptions.create_client_with_mtls(unit.leaf.chain.encode(), unit.leaf.key.encode())
        options.override_default_trust_store(fleet.trust.encode())
        self.client = mqtt5.Client(
            mqtt5.ClientOptions(
                host_name=fleet.endpoint.host,
                port=fleet.endpoint.port,
                tls_ctx=io.ClientTlsContext(options),
                connect_options=mqtt5.ConnectPacket(client_id=unit.serial, keep_alive_interval_sec=30),
                on_publish_callback_fn=self._take,
                on_lifecycle_event_connection_success_fn=lambda _: self._up.put(None),
                on_lifecycle_event_stopped_fn=lambda _: self._down.put(None),
            )
        )

    def _take(self, data: Any) -> None:
        packet = data.publish_packet
        self._arrived.put((packet.topic.rpartition("/")[2], json.loads(packet.payload)))

    def open(self) -> None:
        self.client.start()
        self._up.get(timeout=20)
        answers = mqtt5.Subscription(f"cmd/picket/{self._serial}/rotate/+", mqtt5.QoS.AT_LEAST_ONCE)
        self.client.subscribe(mqtt5.SubscribePacket([answers])).result(20)

    def close(self) -> None:
        self.client.stop()
        self._down.get(timeout=20)

    def ask(self, operation: str, name: str, **more: str) -> tuple[str, dict[str, Any]]:
        token = f"t-{next(_numbers)}"
        body = {"operation": operation, "rotation": name, "clientToken": token, **more}
        topic = f"dt/picket/{self._serial}/rotate"
        self.client.publish(
            mqtt5.PublishPacket(topic=topic, payload=json.dumps(body).encode(), qos=mqtt5.QoS.AT_LEAST_ONCE)
        ).result(20)
        while True:
            verdict, answer = self._arrived.get(timeout=20)
            if answer["clientToken"] == token:
                return verdict, answer


class Agent:
    """A unit's own side: what `Product` is made of, as far as a rotation needs it."""

    def __init__(self, fleet: Fleet, joined: Unit, root: Path) -> None:
        settings = parse(f'[image]\nname = "picket"\nversion = "0.1.0"\n[key]\nstore = "file"\n[tpm]\ntcti = ""\n'
                         f'[paths]\nstate = "{root}/state"\nrun = "{root}/run"\n')  # fmt: skip
        for directory in (settings.paths.state, settings.paths.run):
            directory.mkdir()
        settings.paths.key_file.write_text(joined.leaf.key)
        self.link_file = settings.paths.identity
        self.clock_file = settings.paths.clock
        endpoint = fleet.endpoint
        found = Identity(joined.serial, joined.leaf.chain, fleet.trust, endpoint.host, endpoint.port, "WO-1")
        identity.install(self.link_file, found)
        store = keys.open_store(settings)
        identity.check(found, store.load().public_key(), BOARD)
        self._spool = Spool(settings.paths.spool)
        self.link = Link(settings, TestBoard(), found, store.load(), self._spool, Systemd())
        rotation = Rotation(self.link, store, self.link_file, BOARD)
        self._jobs = Runner(self.link, settings.paths.jobs, [rotation], product="picket", leave=lambda: None)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self.link.run, args=(self._stop, lambda: None)),
            threading.Thread(target=self._jobs.run, args=(self._stop,)),
        ]

    def start(self) -> None:
        self._spool.__enter__()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.link.wake()
        self._jobs.wake()
        for thread in self._threads:
            thread.join()
        self._spool.__exit__(None, None, None)


@contextmanager
def speaking(fleet: Fleet, unit: Unit) -> Iterator[Speaker]:
    speaker = Speaker(fleet, unit)
    speaker.open()
    try:
        yield speaker
    finally:
        speaker.close()


@dataclass(frozen=True)
class Key:
    """A unit's new key and its CSR."""

    secret: str
    csr: str

    @classmethod
    def make(cls, serial: str) -> "Key":
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, serial)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return cls(secret, csr.public_bytes(Encoding.PEM).decode())

    def unit(self, old: Unit, answer: dict[str, Any]) -> Unit:
        pem = answer["certificatePem"]
        return replace(old, leaf=Credentials(certificate=pem, chain=pem, key=self.secret))


def begun(fleet: Fleet) -> tuple[Unit, Unit, str]:
    """A unit with its old certificate, the same with its new one, and the rotation's name."""
    old, name = fleet.unit(), rotation()
    key = Key.make(old.serial)
    with speaking(fleet, old) as speaker:
        verdict, answer = speaker.ask("begin", name, csr=key.csr)
    assert verdict == "accepted"
    return old, key.unit(old, answer), name


def commit(fleet: Fleet, unit: Unit, name: str) -> tuple[str, dict[str, Any]]:
    with speaking(fleet, unit) as speaker:
        return speaker.ask("commit", name)


def certificates(fleet: Fleet, unit: Unit) -> tuple[str, ...]:
    thing = fleet.registry.thing(unit.serial)
    assert thing is not None
    return thing.certificate_ids


# --- the way ------------------------------------------------------------------------------------------------------


def test_a_new_key_gets_a_certificate_that_connects_while_the_old_one_still_does(fleet: Fleet) -> None:
    old, new, _ = begun(fleet)

    assert fleet.attempt(new).accepted
    assert fleet.attempt(old).accepted
    assert set(certificates(fleet, old)) == {old.leaf.certificate_id, new.leaf.certificate_id}


def test_a_commit_over_the_new_certificate_ends_the_old_one_for_good(fleet: Fleet) -> None:
    old, new, name = begun(fleet)

    verdict, _ = commit(fleet, new, name)
    eventually(lambda: certificates(fleet, new) == (new.leaf.certificate_id,))

    assert verdict == "accepted"
    assert fleet.attempt(new).accepted
    assert not fleet.attempt(old).accepted
    # kept as revoked: a deleted one would be provisioned again at its next knock
    assert fleet.status(old) == "REVOKED"
    assert not fleet.attempt(old).accepted
    assert fleet.status(old) == "REVOKED"


def test_a_second_rotation_deletes_the_certificate_of_the_first(fleet: Fleet) -> None:
    _, new, name = begun(fleet)
    commit(fleet, new, name)
    second, key = rotation(), Key.make(new.serial)
    with speaking(fleet, new) as speaker:
        _, answer = speaker.ask("begin", second, csr=key.csr)
    newest = key.unit(new, answer)

    verdict, _ = commit(fleet, newest, second)
    eventually(lambda: fleet.registry.certificate(new.leaf.certificate_id) is None)

    assert verdict == "accepted"
    assert certificates(fleet, newest) == (newest.leaf.certificate_id,)
    assert not fleet.attempt(new).accepted
    assert fleet.attempt(newest).accepted


def test_a_commit_over_the_old_certificate_proves_nothing(fleet: Fleet) -> None:
    old, new, name = begun(fleet)

    verdict, answer = commit(fleet, old, name)

    assert (verdict, answer["code"]) == ("rejected", "not-proved")
    assert set(certificates(fleet, old)) == {old.leaf.certificate_id, new.leaf.certificate_id}


def test_a_question_asked_twice_has_the_same_answer(fleet: Fleet) -> None:
    old, name = fleet.unit(), rotation()
    key = Key.make(old.serial)
    with speaking(fleet, old) as speaker:
        first = speaker.ask("begin", name, csr=key.csr)[1]["certificatePem"]
        again = speaker.ask("begin", name, csr=key.csr)[1]["certificatePem"]
        new = key.unit(old, {"certificatePem": first})
    verdicts = [commit(fleet, new, name)[0] for _ in range(2)]

    assert first == again
    assert verdicts == ["accepted", "accepted"]
    assert certificates(fleet, new) == (new.leaf.certificate_id,)


def test_an_abort_deletes_the_new_certificate_and_then_there_is_no_commit(fleet: Fleet) -> None:
    old, new, name = begun(fleet)

    with speaking(fleet, old) as speaker:
        verdicts = [speaker.ask("abort", name)[0] for _ in range(2)]
        late = speaker.ask("commit", name)[1]["code"]
        begun_late = speaker.ask("begin", name, csr=Key.make(old.serial).csr)[1]["code"]

    assert (verdicts, late, begun_late) == (["accepted", "accepted"], "aborted", "over")
    assert fleet.registry.certificate(new.leaf.certificate_id) is None
    assert certificates(fleet, old) == (old.leaf.certificate_id,)
    assert not fleet.attempt(new).accepted
    assert fleet.attempt(old).accepted


def test_there_is_no_abort_after_the_commit(fleet: Fleet) -> None:
    _, new, name = begun(fleet)
    with speaking(fleet, new) as speaker:
        speaker.ask("commit", name)
        verdict, answer = speaker.ask("abort", name)

    assert (verdict, answer["code"]) == ("rejected", "committed")
    assert fleet.attempt(new).accepted


def test_a_begin_that_comes_after_its_abort_makes_no_certificate(fleet: Fleet) -> None:
    """MQTT and the function's retries keep no order."""
    old, name = fleet.unit(), rotation()
    with speaking(fleet, old) as speaker:
        first = speaker.ask("abort", name)[0]
        verdict, answer = speaker.ask("begin", name, csr=Key.make(old.serial).csr)

    assert (first, verdict, answer["code"]) == ("accepted", "rejected", "over")
    assert certificates(fleet, old) == (old.leaf.certificate_id,)


def test_a_rotation_begun_anew_ends_the_certificate_of_the_one_that_was_left(fleet: Fleet) -> None:
    old, left, _ = begun(fleet)
    key = Key.make(old.serial)
    with speaking(fleet, old) as speaker:
        verdict, answer = speaker.ask("begin", rotation(), csr=key.csr)
    new = key.unit(old, answer)

    assert verdict == "accepted"
    assert fleet.registry.certificate(left.leaf.certificate_id) is None
    assert set(certificates(fleet, old)) == {old.leaf.certificate_id, new.leaf.certificate_id}


def test_a_unit_cannot_rotate_another(fleet: Fleet) -> None:
    victim, thief, name = fleet.unit(), fleet.unit(), rotation()
    body = {"operation": "begin", "rotation": name, "clientToken": "t", "csr": Key.make(victim.serial).csr}
    speaker = Speaker(fleet, thief)
    speaker.open()
    try:
        packet = mqtt5.PublishPacket(
            topic=f"dt/picket/{victim.serial}/rotate",
            payload=json.dumps({**body, "thing": victim.serial, "principal": victim.leaf.certificate_id}).encode(),
            qos=mqtt5.QoS.AT_LEAST_ONCE,
        )
        answer = speaker.client.publish(packet).result(20).puback
        assert answer.reason_code >= 0x80
    finally:
        speaker.close()

    assert certificates(fleet, victim) == (victim.leaf.certificate_id,)


def test_what_the_message_says_about_its_sender_does_not_count(fleet: Fleet) -> None:
    old, new, name = begun(fleet)
    with speaking(fleet, old) as speaker:
        verdict, answer = speaker.ask("commit", name, principal=new.leaf.certificate_id)

    assert (verdict, answer["code"]) == ("rejected", "not-proved")


@pytest.mark.parametrize("csr", ["-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"])
def test_a_csr_that_is_none_changes_nothing_and_is_kept_for_a_person(fleet: Fleet, csr: str) -> None:
    old, name = fleet.unit(), rotation()
    body = {"operation": "begin", "rotation": name, "clientToken": "t", "csr": csr}
    fleet.publish(old, "rotate", body)

    assert eventually(lambda: [letter for letter in fleet.dead_letters() if name in json.dumps(letter)])
    assert certificates(fleet, old) == (old.leaf.certificate_id,)


@pytest.fixture
def clients(fleet: Fleet) -> Iterator[Clients]:
    """The function's clients, for what no unit asks."""
    target = fleet.target
    made = Clients(
        target.dynamodb,
        target.iot,
        target.session.client("iot-data", endpoint_url=target.endpoint_url),
        fleet.outputs["Table"],
        fleet.outputs["DevicePolicy"],
    )
    yield made
    for client in (made.dynamodb, made.iot, made.data):
        client.close()


def test_a_rotation_that_nobody_goes_on_with_is_given_up_after_a_week(fleet: Fleet, clients: Clients) -> None:
    left, (done_old, done, done_name) = begun(fleet), begun(fleet)
    commit(fleet, done, done_name)
    old, new, _ = left
    now = int(time.time())

    handler.sweep(now + handler.ABANDONED_SECONDS - 3600, clients)
    too_early = fleet.status(new)
    handler.sweep(now + handler.ABANDONED_SECONDS + 3600, clients)

    assert too_early == "ACTIVE"
    assert fleet.registry.certificate(new.leaf.certificate_id) is None
    assert fleet.attempt(old).accepted
    assert fleet.attempt(done).accepted
    assert not fleet.attempt(done_old).accepted


# --- the agent ----------------------------------------------------------------------------------------------------


@pytest.fixture
def agent(fleet: Fleet, tmp_path: Path) -> Iterator[tuple[Unit, Agent]]:
    """A unit in the field: the agent's link, its jobs, and the kind that rotates."""
    joined = fleet.unit(board=BOARD)
    unit = Agent(fleet, joined, tmp_path)
    unit.start()
    yield joined, unit
    unit.stop()


def test_a_job_of_the_fleet_changes_a_units_key_while_it_stays_in_service(
    fleet: Fleet, agent: tuple[Unit, Agent]
) -> None:
    old, unit = agent
    job = f"rotate-{uuid.uuid4().hex[:8]}"
    fleet.target.iot.create_job(
        jobId=job,
        targets=[fleet.target.iot.describe_thing(thingName=old.serial)["thingArn"]],
        document=json.dumps({"picket": 1, "operation": "rotate-certificate", "product": "picket"}),
    )

    def ended() -> str | None:
        execution = fleet.target.iot.describe_job_execution(jobId=job, thingName=old.serial)["execution"]
        return execution["status"] if execution["status"] not in {"QUEUED", "IN_PROGRESS"} else None

    status = eventually(ended, 60)
    now = identity.load(unit.link_file)

    assert status == "SUCCEEDED"
    assert certificates(fleet, old) == (now.certificate_sha256,) != (old.leaf.certificate_id,)
    assert unit.link.connected_as() == now.certificate_sha256
    assert not fleet.attempt(old).accepted
    assert [path.name for path in unit.link_file.parent.glob("key*.pem")] == [f"key-{now.slot}.pem"]
    device = eventually(
        lambda: [row for row in fleet.rows(old.serial, "DEVICE") if row["certificate_id"] == now.certificate_sha256]
    )
    assert device
    told = json.loads(unit.clock_file.read_bytes())["unix"]  # the jobs service tells the time in its answers
    assert abs(told - time.time()) < 3600


# --- the decision -------------------------------------------------------------------------------------------------

OLD, NEW, OTHER = "a" * 64, "b" * 64, "c" * 64


def request(operation: Any, principal: str = OLD, name: str = "job#1", csr: str = "csr") -> Request:
    return Request(operation, name, "PK-000001", principal, "t", csr, 1)


def row(state: Any, name: str = "job#1") -> Row:
    return Row(name, state, NEW, handler._digest("csr"))


@pytest.mark.parametrize(
    ("asked", "known", "expected"),
    [
        (request("begin"), None, Issue(None)),
        (request("begin"), row("COMMITTED", "job#0"), Issue(None)),
        (request("begin"), row("ABORTED", "job#0"), Issue(None)),
        (request("begin"), row("PENDING", "job#0"), Issue(NEW)),
        (request("begin", NEW), row("PENDING", "job#0"), "pending"),
        (request("begin"), row("PENDING"), Reissue(NEW)),
        (request("begin", csr="another"), row("PENDING"), "over"),
        (request("begin"), row("COMMITTED"), "over"),
        (request("begin"), row("ABORTED"), "over"),
        (request("commit", NEW), None, "unknown"),
        (request("commit", NEW), row("PENDING", "job#0"), "unknown"),
        (request("commit"), row("PENDING"), "not-proved"),
        (request("commit", NEW), row("PENDING"), Retire(NEW)),
        (request("commit", NEW), row("COMMITTED"), Retire(NEW)),
        (request("commit", NEW), row("ABORTED"), "aborted"),
        (request("abort"), None, GiveUp(None)),
        (request("abort"), row("PENDING", "job#0"), GiveUp(None)),
        (request("abort"), row("PENDING"), GiveUp(NEW)),
        (request("abort"), row("ABORTED"), GiveUp(NEW)),
        (request("abort", NEW), row("PENDING"), "not-yours"),
        (request("abort"), row("COMMITTED"), "committed"),
        (request("abort", OTHER), row("PENDING"), "not-yours"),
        (request("commit", OTHER), row("PENDING"), "not-yours"),
        (request("begin", OTHER), None, "not-yours"),
    ],
)
def test_each_request_in_each_state_has_its_answer(asked: Request, known: Row | None, expected: object) -> None:
    decision = decide(asked, known, frozenset({OLD, NEW}))

    assert (decision.code if isinstance(decision, Refuse) else decision) == expected


def event(**changes: Any) -> dict[str, Any]:
    return {
        "operation": "commit",
        "rotation": "job#1",
        "thing": "PK-000001",
        "principal": OLD,
        "clientToken": "t",
        "received_ms": 1,
    } | changes


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        event(operation="delete"),
        event(operation="begin"),
        event(operation="begin", csr="x" * 5000),
        event(rotation="job"),
        event(rotation="#1"),
        event(thing="../x"),
        event(principal="n/a"),
        event(principal=None),
        event(clientToken=""),
        event(received_ms="now"),
    ],
)
def test_a_malformed_request_is_refused(wrong: object) -> None:
    with pytest.raises(handler.MalformedRequestError):
        handler.parse(wrong)


values = st.none() | st.integers() | st.text(max_size=80) | st.sampled_from([OLD, "begin", "job#1", "PK-000001"])


@given(st.dictionaries(st.sampled_from(sorted(event(csr=""))), values))
def test_any_event_is_parsed_or_refused(raw: dict[str, Any]) -> None:
    try:
        parsed = handler.parse(raw)
    except handler.MalformedRequestError:
        return
    assert parsed.operation in {"begin", "commit", "abort"}
