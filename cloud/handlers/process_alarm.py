"""An alarm becomes a record, then a text message, then a record of the text message; each event once.

AWS delivers an event at least once: a device sends again what was not acknowledged, a function is called again when it
failed. So the event's `SMS#<event id>` row is a lock with a memory. Whoever creates it, or finds it without a result
and with an expired lease, sends the text and then writes the result into it. If a sender dies between the two, nobody
can know whether the text went out; we send again, for a second text is better than none.
"""

import functools
import os
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import boto3
from aws_lambda_powertools import Logger

from . import clock, table
from .events import Alarm, MalformedEventError, parse_alarm

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_sns import SNSClient

log = Logger()

#: Longer than the function may run, so a lease never ends under a living sender; shorter than AWS's first retry (60 s).
LEASE_SECONDS = 20

#: How long events are kept.
KEEP_SECONDS = 400 * 24 * 3600


class Duty(StrEnum):
    """Who has to send the text of an event."""

    MINE = "mine"
    DONE = "done"
    ANOTHER = "another"


class InProgressError(Exception):
    """Another call is at it. Raised so that Lambda asks again later, in case that call dies."""


@dataclass(frozen=True)
class Owner:
    """Who is told. The phone number is in E.164, the time zone an IANA name."""

    phone: str
    timezone: str


@dataclass(frozen=True)
class Message:
    """A text to send."""

    to: str
    text: str


#: What the owner reads about each kind of alarm, before the time. A kind that this code does not know is still told.
WORDS = {"motion": "just detected motion", "tamper": "reports that somebody tampers with it"}
OTHER_WORDS = "raised an alarm"


def compose(alarm: Alarm, owner: Owner) -> Message:
    """What the owner reads.

    Raises:
        UnknownZoneError: the owner's time zone is no time zone.
    """
    moment = clock.local(alarm.at, owner.timezone)
    return Message(owner.phone, f"Your security system {WORDS.get(alarm.kind, OTHER_WORDS)} at: {moment}")


def judge(row: dict[str, Any], now: float) -> Duty:
    """Whose duty the text is, given the SMS row that is already there."""
    if table.text(row, "outcome"):
        return Duty.DONE
    return Duty.ANOTHER if (table.number(row, "leased_until") or 0) > now else Duty.MINE


class Ledger:
    """The alarm's rows in the table."""

    def __init__(self, dynamodb: "DynamoDBClient", name: str) -> None:
        self._dynamodb = dynamodb
        self._table = name

    def record(self, alarm: Alarm, now: float) -> Duty:
        """Write the event down and say whose duty its text is. Both rows appear together or not at all."""
        expires = int(now) + KEEP_SECONDS
        event = table.unit_key(alarm.thing, table.event_sort(alarm.at_text, alarm.event_id)) | table.item(
            {
                "event_id": alarm.event_id,
                "sequence": alarm.sequence,
                "at": alarm.at_text,
                "at_quality": alarm.at_quality,
                "boot_id": alarm.boot_id,
                "kind": alarm.kind,
                "recorded_at": now,
                "expires": expires,
            }
        )
        sms = table.unit_key(alarm.thing, table.sms_sort(alarm.event_id)) | table.item(
            {
                "leased_until": now + LEASE_SECONDS,
                "event": table.event_sort(alarm.at_text, alarm.event_id),
                "expires": expires,
            }
        )
        absent = "attribute_not_exists(pk)"
        try:
            self._dynamodb.transact_write_items(
                TransactItems=[
                    {"Put": {"TableName": self._table, "Item": sms, "ConditionExpression": absent}},
                    {"Put": {"TableName": self._table, "Item": event}},
                ]
            )
        except self._dynamodb.exceptions.TransactionCanceledException as error:
            reasons = [reason.get("Code") for reason in error.response.get("CancellationReasons", [])]
            if "ConditionalCheckFailed" not in reasons:
                raise  # throttled or in conflict: Lambda asks again
        else:
            return Duty.MINE
        return self._take_over(alarm, now)

    def _take_over(self, alarm: Alarm, now: float) -> Duty:
        key = table.unit_key(alarm.thing, table.sms_sort(alarm.event_id))
        found = self._dynamodb.get_item(TableName=self._table, Key=key, ConsistentRead=True).get("Item", {})
        duty = judge(found, now)
        if duty is not Duty.MINE:
            return duty
        try:
            self._dynamodb.update_item(
                TableName=self._table,
                Key=key,
                UpdateExpression="SET leased_until = :until",
                ConditionExpression="attribute_not_exists(outcome) AND leased_until = :seen",
                ExpressionAttributeValues={
                    ":until": table.typed(now + LEASE_SECONDS),
                    ":seen": found.get("leased_until", {"N": "0"}),
                },
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return Duty.ANOTHER
        return Duty.MINE

    def owner(self, thing: str) -> Owner | None:
        """Who is told about this unit, or None when nobody claimed it."""
        key = table.unit_key(thing, table.OWNER)
        row = self._dynamodb.get_item(TableName=self._table, Key=key, ConsistentRead=True).get("Item")
        phone, timezone = table.text(row, "phone"), table.text(row, "timezone")
        return Owner(phone, timezone) if phone and timezone else None

    def close(self, alarm: Alarm, outcome: str, message: Message | None = None, message_id: str | None = None) -> None:
        """Write down what became of the text. After this nobody sends it again."""
        values: dict[str, str | float | None] = {"outcome": outcome, "sent_at": time.time()}
        if message is not None:
            values |= {"to": message.to, "text": message.text, "message_id": message_id}
        self._update(alarm, values)

    def release(self, alarm: Alarm, reason: str) -> None:
        """The text did not go out: let the next call try at once."""
        self._update(alarm, {"leased_until": 0, "last_error": reason[:500]})

    def _update(self, alarm: Alarm, values: dict[str, str | float | None]) -> None:
        names = {f"#{index}": name for index, name in enumerate(values)}
        self._dynamodb.update_item(
            TableName=self._table,
            Key=table.unit_key(alarm.thing, table.sms_sort(alarm.event_id)),
            UpdateExpression="SET " + ", ".join(f"#{index} = :{index}" for index in range(len(values))),
            ExpressionAttributeNames=names,
            ExpressionAttributeValues={f":{index}": table.typed(value) for index, value in enumerate(values.values())},
        )


def process(alarm: Alarm, ledger: Ledger, sns: "SNSClient", now: float) -> str:
    """Take one alarm through; the answer says what became of its text.

    Raises:
        InProgressError: another call is sending it right now.
        Exception: DynamoDB or SNS refused; Lambda tries again, and in the end the event is a dead letter.
    """
    duty = ledger.record(alarm, now)
    if duty is Duty.DONE:
        return "already done"
    if duty is Duty.ANOTHER:
        raise InProgressError(f"event {alarm.event_id} is in another call's hands")
    owner = ledger.owner(alarm.thing)
    if owner is None:
        ledger.close(alarm, "no owner")
        log.info("recorded without a text: nobody has claimed this unit", thing=alarm.thing, event_id=alarm.event_id)
        return "no owner"
    try:
        message = compose(alarm, owner)
        message_id = sns.publish(
            PhoneNumber=message.to,
            Message=message.text,
            MessageAttributes={"AWS.SNS.SMS.SMSType": {"DataType": "String", "StringValue": "Transactional"}},
        )["MessageId"]
    except Exception as error:
        ledger.release(alarm, repr(error))
        raise
    ledger.close(alarm, "sent", message, message_id)
    log.info("texted the owner", thing=alarm.thing, event_id=alarm.event_id, message_id=message_id)
    return "sent"


@functools.cache
def _clients() -> "tuple[Ledger, SNSClient]":
    """Made once per instance, on its first event."""
    return Ledger(boto3.client("dynamodb"), os.environ["TABLE"]), boto3.client("sns")


def handler(event: object, context: object) -> dict[str, str]:  # noqa: ARG001 - Lambda's signature
    """Lambda's entry: one alarm from the alarm rule."""
    try:
        alarm = parse_alarm(event)
    except MalformedEventError as error:
        log.warning("malformed alarm", reason=str(error))
        raise
    ledger, sns = _clients()
    return {"outcome": process(alarm, ledger, sns, time.time())}
