"""A real local cloud for the whole session, on free ports, with the real stack in it."""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cloud import doctor, stack
from cloud.doctor import Credentials, ThrowAwayAuthority
from cloud.local import launcher
from cloud.local.endpoint import LocalEndpoint
from cloud.registry import Endpoint, Registry
from cloud.target import Target, local_target

T = TypeVar("T")

#: Short, but long enough that a device's second connection can come too early.
JITP_DELAY = (0.2, 0.3)


def eventually(look: Callable[[], T | None], seconds: float = 15.0) -> T:
    """What `look` sees once it sees something."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@dataclass(frozen=True)
class Unit:
    """A unit with its own key and certificate."""

    serial: str
    leaf: Credentials


@dataclass
class Fleet:
    """Everything that a test of the cloud's behaviour needs to be a factory and a device."""

    cloud: LocalEndpoint
    target: Target
    registry: Registry
    authority: ThrowAwayAuthority
    outputs: dict[str, str]
    endpoint: Endpoint
    trust: str
    state: Path
    sqs: Any
    operations_queue: str
    _told: list[str] = field(default_factory=list)
    _count: int = field(default=0)

    def unit(self, *, join: bool = True, **subject: str | None) -> Unit:
        """A new unit, already provisioned unless told otherwise."""
        self._count += 1
        serial = f"PK-{self._count:06d}"
        made = Unit(serial, self.authority.leaf(serial, **subject))
        if join:
            assert not self.attempt(made).accepted
            self.active(made)
        return made

    def admitted(self, **subject: str | None) -> Unit:
        """A new unit that the cloud knows already, for tests that need many and not how they joined."""
        made = self.unit(join=False, **subject)
        iot = self.target.iot
        arn = iot.register_certificate(certificatePem=made.leaf.certificate, status="ACTIVE")["certificateArn"]
        iot.create_thing(thingName=made.serial)
        iot.attach_thing_principal(thingName=made.serial, principal=arn)
        iot.attach_policy(policyName=self.outputs["DevicePolicy"], target=arn)
        iot.close()
        return made

    def attempt(self, unit: Unit, client_id: str | None = None) -> doctor.Attempt:
        return doctor.attempt(self.endpoint, self.trust, client_id or unit.serial, unit.leaf)

    def active(self, unit: Unit) -> None:
        eventually(lambda: self.status(unit) == "ACTIVE")

    def status(self, unit: Unit) -> str | None:
        found = self.registry.certificate(unit.leaf.certificate_id)
        return found.status if found else None

    def publish(self, unit: Unit, kind: str, payload: object) -> None:
        """As the unit itself, over MQTT."""
        with doctor.connection(self.endpoint, self.trust, unit.serial, unit.leaf) as (link, result):
            assert result.accepted, result.detail
            text = payload if isinstance(payload, str) else json.dumps(payload)
            assert link.publish(f"dt/picket/{unit.serial}/{kind}", text)

    def rows(self, serial: str, prefix: str = "") -> list[dict[str, Any]]:
        """A unit's items whose sort key begins with `prefix`, oldest first, without DynamoDB's type marks."""
        found = self.target.dynamodb.query(
            TableName=self.outputs["Table"],
            KeyConditionExpression="pk = :pk AND begins_with(sk, :sk)",
            ExpressionAttributeValues={":pk": {"S": f"UNIT#{serial}"}, ":sk": {"S": prefix}},
        )["Items"]
        return [{name: next(iter(value.values())) for name, value in row.items()} for row in found]

    def texts(self, phone: str) -> list[launcher.Sms]:
        return [message for message in launcher.sms(self.cloud) if message.to == phone]

    def operations(self, about: str) -> list[str]:
        """What the operations topic was told that mentions `about`."""
        self._told += [letter["Message"] for letter in self._letters(self.operations_queue)]
        return [text for text in self._told if about in text]

    def dead_letters(self) -> list[dict[str, Any]]:
        """What ended in the dead-letter queue since it was last asked."""
        return self._letters(self.outputs["DeadLetters"])

    def _letters(self, queue: str) -> list[dict[str, Any]]:
        letters = self.sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages", [])
        for letter in letters:
            self.sqs.delete_message(QueueUrl=queue, ReceiptHandle=letter["ReceiptHandle"])
        return [json.loads(letter["Body"]) for letter in letters]


def alarm(**changes: Any) -> dict[str, Any]:
    """What the agent sends when its PIR sees motion."""
    return {
        "event_id": str(uuid.uuid4()),
        "sequence": 1,
        "at": "2026-11-21T05:53:35.123Z",
        "at_quality": "ntp",
        "boot_id": "b0075eed-0000-4000-8000-000000000000",
        "monotonic_ms": 12345,
        "kind": "motion",
    } | changes


def hello(**changes: Any) -> dict[str, Any]:
    """What the agent sends on each connection."""
    return {
        "mode": "factory",
        "nonce": "n-1",
        "boot_id": "b0075eed-0000-4000-8000-000000000000",
        "agent": "0.1.0",
        "image": "picket 0.1.0",
        "batch": "DOCTOR",
        "board": "00000000deadbeef",
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "key": "file",
    } | changes


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with deployed(tmp_path_factory.mktemp("cloud")) as made:
        yield made


@contextmanager
def deployed(base: Path, state: Path | None = None) -> Iterator[Fleet]:
    """A local cloud of its own, with the stack and a signing CA in it."""
    state = state or base / "state"
    with launcher.running(state, jitp_delay=JITP_DELAY, retry_seconds=0.2, minute_seconds=1.0) as endpoint:
        target = local_target(state)
        outputs = dict(stack.deploy(target, build=base / "code").outputs)
        registry = Registry(target)
        authority = ThrowAwayAuthority("Picket test signing CA")
        registry.register_signing_ca(authority.pem, authority.verification)
        sqs = target.sqs
        queue = sqs.create_queue(QueueName="told")["QueueUrl"]
        arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        allowed = {"Effect": "Allow", "Principal": "*", "Action": "sqs:SendMessage", "Resource": arn}
        sqs.set_queue_attributes(QueueUrl=queue, Attributes={"Policy": json.dumps({"Statement": [allowed]})})
        sns = target.sns
        sns.subscribe(TopicArn=outputs["Operations"], Protocol="sqs", Endpoint=arn)
        sns.close()
        yield Fleet(
            cloud=endpoint,
            target=target,
            registry=registry,
            authority=authority,
            outputs=outputs,
            endpoint=registry.endpoint(),
            trust=registry.trust_bundle(),
            state=state,
            sqs=sqs,
            operations_queue=queue,
        )
        sqs.close()
