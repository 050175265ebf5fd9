"""Prove by real connections what the cloud lets in and what it keeps out.

The doctor makes a signing CA of its own, registers it, lets a throw-away unit join by it, then tries what must not
work: no certificate, a foreign CA, another unit's client id, a foreign topic, a certificate switched off. Everything it
made is removed in the end. A refusal counts only beside the good unit's acceptance, or a dead server would pass.
"""

import contextlib
import functools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import botocore.exceptions
from awscrt import io as crt_io
from awscrt import mqtt5
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud.registry import Endpoint, Registry, certificate_id
from cloud.target import Target, translated
from firmware_agent.topics import data_topic, defender_topic, jobs_topic, shadow_topic

CONNECT_SECONDS = 10.0
JITP_SECONDS = 20.0

#: A connection counts as held when it lasts this long and a message through it was acknowledged.
HOLD_SECONDS = 0.3

#: The kind of message that no rule listens to.
KIND = "doctor"


@dataclass(frozen=True)
class Check:
    """One thing proved or disproved, in a sentence."""

    name: str
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Credentials:
    """What a unit connects with: its chain and its key, in PEM."""

    certificate: str
    chain: str
    key: str

    @property
    def certificate_id(self) -> str:
        """The certificate's id in the cloud."""
        return certificate_id(self.certificate)


@dataclass(frozen=True)
class Attempt:
    """How a connection went: whether the broker accepted it, and the client's own words if not."""

    accepted: bool
    detail: str


class ThrowAwayAuthority:
    """A signing CA that lives as long as the check: P-256, a day, never written to disk."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> str:
        """The CA's certificate."""
        return self._certificate.public_bytes(Encoding.PEM).decode()

    def verification(self, code: str) -> str:
        """The certificate that proves to the cloud that this CA's key is at hand."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, code)])
        signed = self._builder(subject, key.public_key()).sign(self._key, hashes.SHA256())
        return signed.public_bytes(Encoding.PEM).decode()

    def leaf(self, serial: str, *, board: str | None = "00000000deadbeef", batch: str | None = "DOCTOR") -> Credentials:
        """A unit's key and certificate with the subject that the line gives; None leaves an attribute out."""
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Picket"),
            x509.NameAttribute(NameOID.COMMON_NAME, serial),
        ]
        if board is not None:
            attributes.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, board))
        if batch is not None:
            attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, batch))
        signed = (
            self._builder(x509.Name(attributes), key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = signed.public_bytes(Encoding.PEM).decode()
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return Credentials(pem, pem + self.pem, secret)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
        )


class Connection:
    """One MQTT 5 connection; after the first success or failure its verdict stands."""

    def __init__(self, endpoint: Endpoint, trust: str, client_id: str, credentials: Credentials | None) -> None:
        self._settled = threading.Event()
        self._lost = threading.Event()
        self._stopped = threading.Event()
        self._verdict = Attempt(accepted=False, detail=f"no answer in {CONNECT_SECONDS:.0f} s")
        if credentials is None:
            options = crt_io.TlsContextOptions()
        else:
            options = crt_io.TlsContextOptions.create_client_with_mtls(
                credentials.chain.encode(), credentials.key.encode()
            )
        options.override_default_trust_store(trust.encode())
        self._client = mqtt5.Client(
            mqtt5.ClientOptions(
                host_name=endpoint.host,
                port=endpoint.port,
                tls_ctx=crt_io.ClientTlsContext(options),
                connect_options=mqtt5.ConnectPacket(client_id=client_id, keep_alive_interval_sec=30),
                ack_timeout_sec=5,
                connack_timeout_ms=int(CONNECT_SECONDS * 1000),
                min_reconnect_delay_ms=60_000,
                max_reconnect_delay_ms=60_000,
                on_lifecycle_event_connection_success_fn=self._on_success,
                on_lifecycle_event_connection_failure_fn=self._on_failure,
                on_lifecycle_event_disconnection_fn=self._on_lost,
                on_lifecycle_event_stopped_fn=self._on_stopped,
            )
        )

    def _on_success(self, _: mqtt5.LifecycleConnectSuccessData) -> None:
        self._settle(Attempt(accepted=True, detail="accepted"))

    def _on_failure(self, data: mqtt5.LifecycleConnectFailureData) -> None:
        self._settle(Attempt(accepted=False, detail=str(data.exception)))

    def _on_lost(self, _: mqtt5.LifecycleDisconnectData) -> None:
        self._lost.set()

    def _on_stopped(self, _: mqtt5.LifecycleStoppedData) -> None:
        self._stopped.set()

    def _settle(self, verdict: Attempt) -> None:
        if not self._settled.is_set():
            self._verdict = verdict
            self._settled.set()

    def open(self) -> Attempt:
        """Connect, and say how it went."""
        self._client.start()
        self._settled.wait(CONNECT_SECONDS)
        return self._verdict

    def publish(self, topic: str, payload: str = "{}") -> bool:
        """Whether the broker acknowledged the message and kept the connection."""
        future = self._client.publish(
            mqtt5.PublishPacket(topic=topic, payload=payload.encode(), qos=mqtt5.QoS.AT_LEAST_ONCE)
        )
        return self._granted(
            lambda: future.result(CONNECT_SECONDS).puback.reason_code == mqtt5.PubackReasonCode.SUCCESS
        )

    def subscribe(self, *filters: str) -> bool:
        """Whether the broker granted the subscriptions and kept the connection."""
        future = self._client.subscribe(
            mqtt5.SubscribePacket([mqtt5.Subscription(each, qos=mqtt5.QoS.AT_LEAST_ONCE) for each in filters])
        )
        return self._granted(lambda: all(code < 0x80 for code in future.result(CONNECT_SECONDS).reason_codes))

    def _granted(self, answer: Callable[[], bool]) -> bool:
        try:
            granted = answer()
        except Exception:  # noqa: BLE001 - awscrt raises a bare Exception for a lost link, a timeout and a refusal
            return False
        return granted and not self.lost(HOLD_SECONDS)

    def lost(self, seconds: float) -> bool:
        """Whether the broker hangs up within that time."""
        return self._lost.wait(seconds)

    def close(self) -> None:
        """Disconnect and wait until the client is quiet."""
        self._client.stop()
        self._stopped.wait(CONNECT_SECONDS)


@contextlib.contextmanager
def connection(
    endpoint: Endpoint, trust: str, client_id: str, credentials: Credentials | None
) -> Iterator[tuple[Connection, Attempt]]:
    """An attempt to connect, and the connection for as long as the block lasts."""
    opened = Connection(endpoint, trust, client_id, credentials)
    try:
        yield opened, opened.open()
    finally:
        opened.close()


def attempt(endpoint: Endpoint, trust: str, client_id: str, credentials: Credentials | None) -> Attempt:
    """Connect, publish a message about oneself, see that both hold; then disconnect."""
    with connection(endpoint, trust, client_id, credentials) as (opened, result):
        if not result.accepted:
            return result
        if not opened.publish(data_topic(client_id, KIND)):
            return Attempt(accepted=False, detail="accepted, then hung up on its first message")
        return result


@dataclass(frozen=True)
class Case:
    """What every check works with: the cloud, and the doctor's own good unit."""

    target: Target
    registry: Registry
    endpoint: Endpoint
    trust: str
    serial: str
    leaf: Credentials
    foreigner: Credentials

    def attempt(self, credentials: Credentials | None, client_id: str | None = None) -> Attempt:
        """Connect as the good unit would, but with these credentials, or under another client id."""
        return attempt(self.endpoint, self.trust, client_id or self.serial, credentials)


def foreign_authority() -> ThrowAwayAuthority:
    """A CA that the cloud has never heard of."""
    return ThrowAwayAuthority("Picket doctor, nobody's CA")


def examine(target: Target, progress: Callable[[str], None] = lambda _: None) -> list[Check]:
    """Run every check against the target's stack.

    Raises:
        CloudError: the cloud cannot be asked at all, or the stack is not there.
    """
    registry = Registry(target)
    serial = f"DOCTOR-{secrets.token_hex(4).upper()}"
    authority = ThrowAwayAuthority(f"Picket doctor {serial}")
    case = Case(
        target=target,
        registry=registry,
        endpoint=registry.endpoint(),
        trust=registry.trust_bundle(),
        serial=serial,
        leaf=authority.leaf(serial),
        foreigner=foreign_authority().leaf(serial),
    )
    progress("registering a throw-away signing CA")
    ca_id = registry.register_signing_ca(authority.pem, authority.verification)
    try:
        progress("letting a throw-away unit join")
        good = _joins(case)
        if not good.passed:
            unjudged = "cannot be judged while a good unit is not let in"
            return [good, *(Check(name, passed=False, sentence=unjudged) for name in _CHECKS)]
        progress("trying what must work, and what must not")
        return [good, *(Check(name, *check(case)) for name, check in _CHECKS.items())]
    finally:
        progress("removing what the doctor made")
        _remove(case, ca_id)


def _joins(case: Case) -> Check:
    name = "a good unit joins"
    first = case.attempt(case.leaf)
    if first.accepted:
        return Check(name, passed=False, sentence="its first connection was accepted: JITP hangs up the first one")
    deadline = time.monotonic() + JITP_SECONDS
    while (found := case.registry.certificate(case.leaf.certificate_id)) is None or found.status != "ACTIVE":
        if time.monotonic() > deadline:
            why = case.registry.diagnose(case.leaf.certificate) or f"its first connection ended with: {first.detail}"
            state = found.status if found else "unknown to the cloud"
            return Check(name, passed=False, sentence=f"its certificate is still {state}: {why}")
        time.sleep(0.2)
    thing = case.registry.thing(case.serial)
    if thing is None or case.leaf.certificate_id not in thing.certificate_ids:
        return Check(name, passed=False, sentence="its certificate is ACTIVE but there is no thing for it")
    second = case.attempt(case.leaf)
    if not second.accepted:
        return Check(name, passed=False, sentence=f"its certificate is ACTIVE, yet it is refused: {second.detail}")
    return Check(name, passed=True, sentence="the first connection was hung up, the next one held")


Verdict = tuple[bool, str]


def _refused(result: Attempt, what: str) -> Verdict:
    return (False, f"{what} was let in") if result.accepted else (True, f"{what} was refused ({result.detail})")


def _no_certificate(case: Case) -> Verdict:
    return _refused(case.attempt(None), "a client without a certificate")


def _unknown_ca(case: Case) -> Verdict:
    result = case.attempt(case.foreigner)
    if case.registry.certificate(case.foreigner.certificate_id) is not None:  # a hang-up alone could be JITP at work
        return False, "a certificate of an unknown CA was registered"
    return _refused(result, "a certificate of an unknown CA")


def _wrong_client_id(case: Case) -> Verdict:
    return _refused(case.attempt(case.leaf, case.serial + "-X"), "a unit under another's name")


def _foreign_topic(case: Case) -> Verdict:
    acts: tuple[tuple[str, Callable[[Connection], bool]], ...] = (
        ("a message on another unit's topic", lambda link: link.publish(data_topic(case.serial + "-X", KIND))),
        ("a subscription to other units' data", lambda link: link.subscribe("dt/picket/#")),
    )
    return _all_refused(case, acts) or (True, "messages and subscriptions about other units were refused")


def _all_refused(case: Case, acts: tuple[tuple[str, Callable[[Connection], bool]], ...]) -> Verdict | None:
    """None when each act, on a connection of its own, was refused; else what was not."""
    for what, act in acts:
        with connection(case.endpoint, case.trust, case.serial, case.leaf) as (link, result):
            if not result.accepted:
                return False, f"the good unit did not get in again: {result.detail}"
            if act(link):
                return False, f"{what} was accepted"
    return None


def _own_reserved(case: Case) -> Verdict:
    """What the agent needs besides its data: its jobs, its two shadows, its metrics."""
    with connection(case.endpoint, case.trust, case.serial, case.leaf) as (link, result):
        if not result.accepted:
            return False, f"the good unit did not get in again: {result.detail}"
        if not link.subscribe(
            jobs_topic(case.serial, "notify-next"),
            jobs_topic(case.serial, "+", "update", "accepted"),
            shadow_topic(case.serial, "alarm", "update", "delta"),
            shadow_topic(case.serial, "settings", "update", "delta"),
            f"{defender_topic(case.serial)}/accepted",
        ):
            return False, "the subscriptions to its own jobs, shadows and metrics were refused"
        for topic in (
            jobs_topic(case.serial, "$next", "get"),
            shadow_topic(case.serial, "alarm", "get"),
            shadow_topic(case.serial, "settings", "get"),
            defender_topic(case.serial),
        ):
            if not link.publish(topic):
                return False, f"a message on {topic} was refused"
    return True, "it may use its own jobs, shadows and metrics"


def _foreign_reserved(case: Case) -> Verdict:
    other = case.serial + "-X"
    acts: tuple[tuple[str, Callable[[Connection], bool]], ...] = (
        ("a question about another unit's job", lambda link: link.publish(jobs_topic(other, "$next", "get"))),
        ("a subscription to another unit's jobs", lambda link: link.subscribe(jobs_topic(other, "notify-next"))),
        ("an update of another unit's shadow", lambda link: link.publish(shadow_topic(other, "alarm", "update"))),
        ("a subscription to another unit's shadow", lambda link: link.subscribe(shadow_topic(other, "alarm", "#"))),
        ("a shadow of no agreed name", lambda link: link.publish(shadow_topic(case.serial, "other", "get"))),
        ("another unit's metrics", lambda link: link.publish(defender_topic(other))),
    )
    return _all_refused(case, acts) or (True, "other units' jobs, shadows and metrics were refused")


def _inactive(case: Case) -> Verdict:
    with translated(case.target, "switching the doctor's certificate off"):
        case.target.iot.update_certificate(certificateId=case.leaf.certificate_id, newStatus="INACTIVE")
    return _refused(case.attempt(case.leaf), "a certificate switched off")


#: In this order: the last one switches the good unit off.
_CHECKS: dict[str, Callable[[Case], Verdict]] = {
    "no client certificate": _no_certificate,
    "unknown CA": _unknown_ca,
    "wrong client id": _wrong_client_id,
    "topic outside the policy": _foreign_topic,
    "own jobs, shadows, metrics": _own_reserved,
    "other units' jobs, shadows, metrics": _foreign_reserved,
    "inactive certificate": _inactive,
}


def _remove(case: Case, ca_id: str) -> None:
    """Take everything away again; AWS detaches in its own time, so deletions are tried for a while."""
    iot = case.target.iot
    with translated(case.target, "removing what the doctor made"):
        iot.update_ca_certificate(certificateId=ca_id, newStatus="INACTIVE", newAutoRegistrationStatus="DISABLE")
        for credentials in (case.leaf, case.foreigner):
            if case.registry.certificate(credentials.certificate_id) is not None:
                case.registry.retire(credentials.certificate, credentials.certificate_id)
                _eventually(
                    functools.partial(
                        iot.delete_certificate, certificateId=credentials.certificate_id, forceDelete=True
                    )
                )
        with contextlib.suppress(iot.exceptions.ResourceNotFoundException):
            _eventually(lambda: iot.delete_thing(thingName=case.serial))
        _eventually(lambda: iot.delete_ca_certificate(certificateId=ca_id))


def _eventually(act: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            act()
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] == "ResourceNotFoundException" or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return
