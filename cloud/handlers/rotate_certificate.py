"""A unit changes its key: a certificate for the new one, and the end of the old one once the new one has proved itself.

    unit, by its old certificate    begin (CSR)  ──▶ signed by AWS, attached, ACTIVE          PENDING
    unit, by its new certificate    commit       ──▶ every other certificate of it retired    COMMITTED
    unit, by its old certificate    abort        ──▶ the new one deleted                      ABORTED
    nobody, for a week              (schedule)   ──▶ the new one deleted                      ABORTED

Who speaks is what the connection proved, not what the message says: the rule passes the thing, which the device policy
ties to the client id, and `principal()`, which is the id of the certificate that the connection was made with. So a
commit that arrives has proved the new pair; nothing else makes the old one end.

COMMITTED and ABORTED exclude each other by a conditional write, so the unit has a certificate that works at each
moment: until COMMITTED the old one, from PENDING to ABORTED the new one. Every operation can be repeated, and is: the
unit asks again until it has an answer, and AWS may deliver twice.
"""

import functools
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import boto3
from aws_lambda_powertools import Logger

from . import table

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_iot import IoTClient
    from mypy_boto3_iot_data import IoTDataPlaneClient

log = Logger()

#: A unit that has been away for so long in the middle of a rotation goes on with its old certificate.
ABANDONED_SECONDS = 7 * 86400

#: How long a finished rotation is remembered, for answers that were lost.
REMEMBERED_SECONDS = 90 * 86400

#: AWS takes CSRs of at most 4096 characters (API CreateCertificateFromCsr).
LONGEST_CSR = 4096

Operation = Literal["begin", "commit", "abort"]
State = Literal["PENDING", "COMMITTED", "ABORTED"]

_THING = re.compile(r"[A-Z0-9][A-Z0-9-]{2,30}[A-Z0-9]")
_CERTIFICATE = re.compile(r"[0-9a-f]{64}")
_ROTATION = re.compile(r"[A-Za-z0-9_-]{1,64}#[0-9]{1,10}")
_TOKEN = re.compile(r"[A-Za-z0-9-]{1,64}")
_CSR = re.compile(r"-----BEGIN CERTIFICATE REQUEST-----[A-Za-z0-9+/=\r\n]+-----END CERTIFICATE REQUEST-----\s*")


class MalformedRequestError(ValueError):
    """The message is no request that a unit of ours could have sent."""


class LostRaceError(Exception):
    """Somebody else has changed the rotation in between; Lambda tries again, and decides anew."""


@dataclass(frozen=True)
class Request:
    """What the unit asks for.

    Attributes:
        operation: what.
        rotation: the unit's name for this rotation: its job and execution number.
        thing: the unit, as its connection proved.
        principal: the id of the certificate of that connection.
        token: comes back in the answer.
        csr: PEM, for `begin`.
        received: seconds since 1970, the cloud's clock.
    """

    operation: Operation
    rotation: str
    thing: str
    principal: str
    token: str
    csr: str | None
    received: int


@dataclass(frozen=True)
class Row:
    """What is remembered of a unit's latest rotation."""

    rotation: str
    state: State
    certificate_id: str
    csr_sha256: str


# --- the decision -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Issue:
    """Have a new certificate signed; `instead` is a pending one of an earlier rotation, to be given up before."""

    instead: str | None


@dataclass(frozen=True)
class Reissue:
    """Answer with the certificate that this rotation has got already."""

    certificate_id: str


@dataclass(frozen=True)
class Retire:
    """The new certificate has proved itself: end all others."""

    certificate_id: str


@dataclass(frozen=True)
class GiveUp:
    """End the new certificate, if one was signed."""

    certificate_id: str | None


@dataclass(frozen=True)
class Refuse:
    """Change nothing, and say why."""

    code: str
    reason: str


Decision = Issue | Reissue | Retire | GiveUp | Refuse


def decide(request: Request, row: Row | None, attached: frozenset[str]) -> Decision:
    """What a request leads to.

    Args:
        request: from the unit.
        row: its latest rotation, if there was one.
        attached: ids of the certificates that belong to the thing.
    """
    if request.principal not in attached:
        return Refuse("not-yours", f"the certificate of this connection does not belong to {request.thing}")
    own = row if row is not None and row.rotation == request.rotation else None
    match request.operation:
        case "begin":
            return _begin(request, row) if own is None else _begin_again(request, own)
        case "commit":
            return _commit(request, own)
        case "abort":
            return _abort(request, own)


def _begin(request: Request, other: Row | None) -> Decision:
    if other is None or other.state != "PENDING":
        return Issue(instead=None)
    if request.principal == other.certificate_id:
        return Refuse("pending", f"the rotation {other.rotation} is to be committed before")
    return Issue(instead=other.certificate_id)


def _begin_again(request: Request, row: Row) -> Decision:
    if row.state != "PENDING":
        return Refuse("over", f"this rotation is {row.state.lower()}")
    if row.csr_sha256 != _digest(request.csr or ""):
        return Refuse("over", "this rotation has its certificate, for another key")
    return Reissue(row.certificate_id)


def _commit(request: Request, row: Row | None) -> Decision:
    if row is None:
        return Refuse("unknown", "no such rotation")
    if row.state == "ABORTED":
        return Refuse("aborted", "this rotation was given up")
    if request.principal != row.certificate_id:
        return Refuse("not-proved", "a commit counts only over a connection with the new certificate")
    return Retire(row.certificate_id)


def _abort(request: Request, row: Row | None) -> Decision:
    if row is None:
        return GiveUp(None)
    if row.state == "COMMITTED":
        return Refuse("committed", "the new certificate is in force")
    if request.principal == row.certificate_id:
        return Refuse("not-yours", "a certificate does not end itself")
    return GiveUp(row.certificate_id or None)


def _digest(csr: str) -> str:
    return hashlib.sha256(csr.encode()).hexdigest()


def parse(event: object) -> Request:
    """The rule's event.

    Raises:
        MalformedRequestError: it is none that a unit of ours could have caused.
    """
    if not isinstance(event, dict):
        raise MalformedRequestError("the event is no object")
    operation = event.get("operation")
    if operation not in ("begin", "commit", "abort"):
        raise MalformedRequestError("no such operation")
    csr = _matching(event, "csr", _CSR) if operation == "begin" else None
    if csr is not None and len(csr) > LONGEST_CSR:
        raise MalformedRequestError("the CSR is too long")
    received = event.get("received_ms")
    if not isinstance(received, int):
        raise MalformedRequestError("received_ms is missing")
    return Request(
        operation=operation,
        rotation=_matching(event, "rotation", _ROTATION),
        thing=_matching(event, "thing", _THING),
        principal=_matching(event, "principal", _CERTIFICATE),
        token=_matching(event, "clientToken", _TOKEN),
        csr=csr,
        received=received // 1000,
    )


def _matching(event: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = event.get(name)
    if not isinstance(value, str) or len(value) > LONGEST_CSR or not pattern.fullmatch(value):
        raise MalformedRequestError(f"{name} is missing or malformed")
    return value


# --- what is done -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clients:
    """What the function talks to."""

    dynamodb: "DynamoDBClient"
    iot: "IoTClient"
    data: "IoTDataPlaneClient"
    table: str
    policy: str


def rotate(request: Request, clients: Clients) -> str:
    """Do what the unit asks for, and answer it; the outcome in a word.

    Raises:
        LostRaceError: another invocation was quicker.
    """
    principals = clients.iot.list_thing_principals(thingName=request.thing)["principals"]
    attached = frozenset(arn.rpartition("cert/")[2] for arn in principals if ":cert/" in arn)
    decision = decide(request, _read(request.thing, clients), attached)
    log.info(
        "rotation", thing=request.thing, rotation=request.rotation, operation=request.operation, done=str(decision)
    )
    match decision:
        case Issue(instead):
            if instead is not None:
                _end_pending(request.thing, instead, request.received, clients)
            answer = _describe(_admit(request.thing, _issue(request, clients), clients), clients)
        case Reissue(certificate_id):
            answer = _describe(_admit(request.thing, certificate_id, clients), clients)
        case Retire(certificate_id):
            _write(request, "COMMITTED", certificate_id, clients)
            for other in sorted(attached - {certificate_id}):
                _retire(request.thing, other, clients)
            answer = {}
        case GiveUp(certificate_id):
            _write(request, "ABORTED", certificate_id or "", clients)
            if certificate_id is not None:
                _retire(request.thing, certificate_id, clients)
            answer = {}
        case Refuse(code, reason):
            _answer(request, "rejected", {"code": code, "message": reason}, clients)
            return code
    _answer(request, "accepted", answer, clients)
    return type(decision).__name__.lower()


def _issue(request: Request, clients: Clients) -> str:
    """Have a certificate signed. It is INACTIVE and belongs to nobody until the rotation is remembered."""
    signed = clients.iot.create_certificate_from_csr(certificateSigningRequest=request.csr or "", setAsActive=False)
    certificate_id = signed["certificateId"]
    try:
        _write(request, "PENDING", certificate_id, clients)
    except LostRaceError:
        clients.iot.delete_certificate(certificateId=certificate_id)
        raise
    return certificate_id


def _admit(thing: str, certificate_id: str, clients: Clients) -> str:
    arn = _description(certificate_id, clients)["certificateArn"]
    clients.iot.attach_policy(policyName=clients.policy, target=arn)
    clients.iot.attach_thing_principal(thingName=thing, principal=arn)
    # last: an active certificate always has its thing and its policy
    clients.iot.update_certificate(certificateId=certificate_id, newStatus="ACTIVE")
    return certificate_id


def _describe(certificate_id: str, clients: Clients) -> dict[str, str]:
    pem = _description(certificate_id, clients)["certificatePem"]
    return {"certificateId": certificate_id, "certificatePem": pem}


def _retire(thing: str, certificate_id: str, clients: Clients) -> None:
    """End a certificate for good; nothing when it is gone.

    One of our signing CA's is kept, REVOKED: a deleted one would be provisioned anew, just in time, when somebody
    connects with it. One of AWS's own cannot come back, and is deleted.
    """
    try:
        description = _description(certificate_id, clients)
    except clients.iot.exceptions.ResourceNotFoundException:
        return
    arn, ours = description["certificateArn"], bool(description.get("caCertificateId"))
    clients.iot.update_certificate(certificateId=certificate_id, newStatus="REVOKED" if ours else "INACTIVE")
    clients.iot.detach_policy(policyName=clients.policy, target=arn)
    clients.iot.detach_thing_principal(thingName=thing, principal=arn)
    if not ours:
        clients.iot.delete_certificate(certificateId=certificate_id, forceDelete=True)  # whatever policy is left on it


def _description(certificate_id: str, clients: Clients) -> Any:
    return clients.iot.describe_certificate(certificateId=certificate_id)["certificateDescription"]


def sweep(now: int, clients: Clients) -> int:
    """Give up the rotations that nobody has gone on with; how many."""
    pages = clients.dynamodb.get_paginator("query").paginate(
        TableName=clients.table,
        KeyConditionExpression="pk = :pk",
        FilterExpression="#state = :pending AND since < :before",
        ExpressionAttributeNames={"#state": "state"},
        ExpressionAttributeValues={
            ":pk": {"S": table.ROTATIONS},
            ":pending": {"S": "PENDING"},
            ":before": table.typed(now - ABANDONED_SECONDS),
        },
    )
    count = 0
    for row in (row for page in pages for row in page["Items"]):
        thing, certificate_id = row["sk"]["S"], row["certificate_id"]["S"]
        try:
            _end_pending(thing, certificate_id, now, clients)
        except LostRaceError:  # the unit has come back this very moment
            continue
        log.warning("rotation abandoned", thing=thing, certificate_id=certificate_id)
        count += 1
    return count


def _end_pending(thing: str, certificate_id: str, now: int, clients: Clients) -> None:
    """Give up a pending rotation by its certificate."""
    try:
        clients.dynamodb.update_item(
            TableName=clients.table,
            Key=table.rotation_key(thing),
            UpdateExpression="SET #state = :aborted, expires = :expires",
            ConditionExpression="certificate_id = :id AND #state IN (:pending, :aborted)",
            ExpressionAttributeNames={"#state": "state"},
            ExpressionAttributeValues={
                ":id": {"S": certificate_id},
                ":pending": {"S": "PENDING"},
                ":aborted": {"S": "ABORTED"},
                ":expires": table.typed(now + REMEMBERED_SECONDS),
            },
        )
    except clients.dynamodb.exceptions.ConditionalCheckFailedException as error:
        raise LostRaceError(thing) from error
    _retire(thing, certificate_id, clients)


# --- what is remembered -------------------------------------------------------------------------------------------

#: What may be written over: never the end of a rotation by its other end.
_CONDITIONS: dict[State, str] = {
    "PENDING": "attribute_not_exists(pk) OR (#state <> :pending AND rotation <> :rotation)",
    "COMMITTED": "rotation = :rotation AND certificate_id = :id AND #state IN (:pending, :committed)",
    "ABORTED": (
        "attribute_not_exists(pk) OR (rotation = :rotation AND #state <> :committed)"
        " OR (rotation <> :rotation AND #state <> :pending)"
    ),
}


def _write(request: Request, state: State, certificate_id: str, clients: Clients) -> None:
    values = {
        **table.rotation_key(request.thing),
        **table.item(
            {
                "rotation": request.rotation,
                "state": state,
                "certificate_id": certificate_id,
                "csr_sha256": _digest(request.csr or ""),
                "since": request.received,
            }
        ),
    }
    if state != "PENDING":
        values["expires"] = table.typed(request.received + REMEMBERED_SECONDS)
    condition = _CONDITIONS[state]
    placeholders = {
        ":pending": {"S": "PENDING"},
        ":committed": {"S": "COMMITTED"},
        ":rotation": {"S": request.rotation},
        ":id": {"S": certificate_id},
    }
    try:
        clients.dynamodb.put_item(
            TableName=clients.table,
            Item=values,
            ConditionExpression=condition,
            ExpressionAttributeNames={"#state": "state"},
            ExpressionAttributeValues={name: value for name, value in placeholders.items() if name in condition},
        )
    except clients.dynamodb.exceptions.ConditionalCheckFailedException as error:
        raise LostRaceError(request.thing) from error


def _read(thing: str, clients: Clients) -> Row | None:
    row = clients.dynamodb.get_item(TableName=clients.table, Key=table.rotation_key(thing), ConsistentRead=True).get(
        "Item"
    )
    if row is None:
        return None
    state = table.text(row, "state") or ""
    if state not in _CONDITIONS:
        raise ValueError(f"the rotation of {thing} is in no known state: {state!r}")
    return Row(
        table.text(row, "rotation") or "",
        state,
        table.text(row, "certificate_id") or "",
        table.text(row, "csr_sha256") or "",
    )


def _answer(request: Request, verdict: Literal["accepted", "rejected"], body: dict[str, str], clients: Clients) -> None:
    message = {"operation": request.operation, "rotation": request.rotation, "clientToken": request.token, **body}
    clients.data.publish(topic=f"cmd/picket/{request.thing}/rotate/{verdict}", qos=1, payload=json.dumps(message))


@functools.cache
def _clients() -> Clients:
    """Made once per instance, on its first event."""
    return Clients(
        boto3.client("dynamodb"),
        boto3.client("iot"),
        boto3.client("iot-data"),
        os.environ["TABLE"],
        os.environ["POLICY"],
    )


def handler(event: object, context: object) -> dict[str, str | int]:  # noqa: ARG001 - Lambda's signature
    """Lambda's entry: a unit's request from the rule, or the daily look for abandoned rotations."""
    if isinstance(event, dict) and event.get("source") == "aws.events":
        return {"abandoned": sweep(int(time.time()), _clients())}
    try:
        request = parse(event)
    except MalformedRequestError as error:
        log.warning("malformed request for a rotation", reason=str(error))
        raise
    return {"outcome": rotate(request, _clients())}
