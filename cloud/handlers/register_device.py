"""A device says hello: its row is written, and it gets a ring. A certificate appears: it is activated if it is known.

The second half is just-in-time registration, for a signing CA without a provisioning template. The factory's own
records decide: a certificate's id is the SHA-256 of all of it, so to know the id is to know the certificate.
"""

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import boto3
from aws_lambda_powertools import Logger

from . import table
from .events import CertificateRegistered, Hello, MalformedEventError, parse_registration

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_iot import IoTClient
    from mypy_boto3_sns import SNSClient

log = Logger()


@dataclass(frozen=True)
class Activate:
    """The factory made this certificate: let it in as this thing."""

    serial: str
    board: str
    batch: str


@dataclass(frozen=True)
class Refuse:
    """Leave the certificate as it is, and say why."""

    reason: str


def decide(
    event: CertificateRegistered, certificate_row: dict[str, Any] | None, unit_row: dict[str, Any] | None
) -> Activate | Refuse:
    """Whether the factory's records know this certificate, and as whose.

    Args:
        event: AWS's notice.
        certificate_row: the factory's item for the certificate's id.
        unit_row: the factory's item for the serial that `certificate_row` names.
    """
    serial = table.text(certificate_row, "serial")
    if serial is None:
        return Refuse("the factory's records do not know this certificate")
    if unit_row is None:
        return Refuse(f"the factory's records do not know the serial {serial}")
    if table.text(unit_row, "certificate_id") != event.certificate_id:
        return Refuse(f"the factory has since issued another certificate to {serial}")
    if table.text(unit_row, "retired_at"):
        return Refuse(f"the factory has retired {serial}")
    return Activate(serial, table.text(unit_row, "board") or "", table.text(unit_row, "batch") or "")


@dataclass(frozen=True)
class Clients:
    """What the function talks to."""

    dynamodb: "DynamoDBClient"
    iot: "IoTClient"
    sns: "SNSClient"
    table: str
    policy: str
    operations: str
    rings: tuple[str, ...]  # the first is where a new unit goes


def register(event: Hello, clients: Clients) -> str:
    """Write the device's row, and give it a ring where it has none.

    When it was first seen stays, everything else is as of its latest hello.
    """
    values: dict[str, str | float | None] = {
        "thing": event.thing,
        "certificate_id": event.certificate_id,
        "mode": event.mode,
        "nonce": event.nonce,
        "boot_id": event.boot_id,
        "agent": event.agent,
        "image": event.image,
        "batch": event.batch,
        "board": event.board,
        "key": event.key,
        "device_clock": event.at,
        "last_seen": event.received_ms,
    }
    try:
        answer = clients.dynamodb.update_item(
            TableName=clients.table,
            Key=table.unit_key(event.thing, table.DEVICE),
            ReturnValues="ALL_NEW",
            UpdateExpression="SET first_seen = if_not_exists(first_seen, :now), "
            + ", ".join(f"#{index} = :{index}" for index in range(len(values))),
            # a call that was retried late must not overwrite what the device said since
            ConditionExpression="attribute_not_exists(last_seen) OR last_seen <= :now",
            ExpressionAttributeNames={f"#{index}": name for index, name in enumerate(values)},
            ExpressionAttributeValues={
                ":now": table.typed(event.received_ms),
                **{f":{index}": table.typed(value) for index, value in enumerate(values.values())},
            },
        )
    except clients.dynamodb.exceptions.ConditionalCheckFailedException:
        return "superseded"
    if table.text(answer.get("Attributes"), "ring_given_at") is None:
        give_ring(event.thing, event.at, clients)
    log.info("device seen", thing=event.thing, mode=event.mode, boot_id=event.boot_id)
    return "registered"


def give_ring(thing: str, at: str, clients: Clients) -> None:
    """Put a unit that is in no ring into the first one, and remember that this was looked after.

    Only the first hello asks AWS IoT: a fleet that comes back after an outage says hello all at once.
    """
    groups = clients.iot.list_thing_groups_for_thing(thingName=thing, maxResults=100)["thingGroups"]
    if not {group.get("groupName") for group in groups} & set(clients.rings):
        clients.iot.add_thing_to_thing_group(thingName=thing, thingGroupName=clients.rings[0])
        log.info("joined a ring", thing=thing, ring=clients.rings[0])
    clients.dynamodb.update_item(
        TableName=clients.table,
        Key=table.unit_key(thing, table.DEVICE),
        UpdateExpression="SET ring_given_at = :at",
        ExpressionAttributeValues={":at": table.typed(at)},
    )


def admit(event: CertificateRegistered, clients: Clients) -> str:
    """Activate a certificate that the factory knows, and give it its thing and policy; leave any other alone.

    Safe to repeat: a device that keeps knocking causes one event per knock.
    """
    certificate_row = _factory_row(clients, table.certificate_key(event.certificate_id))
    serial = table.text(certificate_row, "serial")
    unit_row = _factory_row(clients, table.unit_key(serial, table.FACTORY)) if serial else None
    verdict = decide(event, certificate_row, unit_row)
    if isinstance(verdict, Refuse):
        log.warning("certificate stays inactive", certificate_id=event.certificate_id, reason=verdict.reason)
        clients.sns.publish(
            TopicArn=clients.operations,
            Subject="Picket: a certificate was not activated",
            Message=f"Certificate {event.certificate_id} under CA {event.ca_certificate_id} stays inactive:"
            f" {verdict.reason}.",
        )
        return "refused"
    description = clients.iot.describe_certificate(certificateId=event.certificate_id)["certificateDescription"]
    if description["status"] in {"REVOKED", "INACTIVE"}:  # somebody decided since the event was sent
        return "refused"
    arn = description["certificateArn"]
    attributes = {"board": verdict.board, "batch": verdict.batch}
    try:
        clients.iot.create_thing(thingName=verdict.serial, attributePayload={"attributes": attributes})
    except clients.iot.exceptions.ResourceAlreadyExistsException:
        clients.iot.update_thing(thingName=verdict.serial, attributePayload={"attributes": attributes})
    clients.iot.attach_thing_principal(thingName=verdict.serial, principal=arn)
    clients.iot.attach_policy(policyName=clients.policy, target=arn)
    # last: an active certificate always has its thing and its policy
    clients.iot.update_certificate(certificateId=event.certificate_id, newStatus="ACTIVE")
    log.info("certificate activated", certificate_id=event.certificate_id, thing=verdict.serial)
    return "activated"


def _factory_row(clients: Clients, key: table.Key) -> dict[str, Any] | None:
    return clients.dynamodb.get_item(TableName=clients.table, Key=key, ConsistentRead=True).get("Item")


@functools.cache
def _clients() -> Clients:
    """Made once per instance, on its first event."""
    return Clients(
        boto3.client("dynamodb"),
        boto3.client("iot"),
        boto3.client("sns"),
        os.environ["TABLE"],
        os.environ["POLICY"],
        os.environ["OPERATIONS"],
        tuple(os.environ["RINGS"].split()),
    )


def handler(event: object, context: object) -> dict[str, str]:  # noqa: ARG001 - Lambda's signature
    """Lambda's entry: a hello from the hello rule, or a certificate from the registered rule."""
    try:
        parsed = parse_registration(event)
    except MalformedEventError as error:
        log.warning("malformed registration", reason=str(error))
        raise
    match parsed:
        case Hello():
            return {"outcome": register(parsed, _clients())}
        case CertificateRegistered():
            return {"outcome": admit(parsed, _clients())}
