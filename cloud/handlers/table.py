"""The one table: its keys, and how values get in and out. Shared by the functions and the station's registry.

| pk | sk | written by | holds |
| --- | --- | --- | --- |
| UNIT#<serial> | FACTORY | registry.announce | certificate_id, batch, board, announced_at, retired_at |
| CERTIFICATE#<id> | FACTORY | registry.announce | serial: from a certificate back to its unit |
| UNIT#<serial> | DEVICE | register_device | what the device said last, first_seen, last_seen |
| UNIT#<serial> | OWNER | registry.owner | phone, timezone |
| UNIT#<serial> | EVENT#<at>#<event id> | process_alarm | the alarm as the device sent it |
| ROTATIONS | <serial> | rotate_certificate | the unit's latest change of its certificate: how far it has come |
| UNIT#<serial> | SMS#<event id> | process_alarm | who sends the text, where it went: once per event |
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_dynamodb.type_defs import AttributeValueTypeDef

FACTORY = "FACTORY"
DEVICE = "DEVICE"
OWNER = "OWNER"

#: All rotations of the fleet under one key: the daily look for abandoned ones is one query. They are rare.
ROTATIONS = "ROTATIONS"

Key = dict[str, "AttributeValueTypeDef"]


def unit_key(serial: str, sort: str) -> Key:
    """The key of one of a unit's items."""
    return {"pk": {"S": f"UNIT#{serial}"}, "sk": {"S": sort}}


def certificate_key(certificate_id: str) -> Key:
    """The key of the item that leads from a certificate to its unit."""
    return {"pk": {"S": f"CERTIFICATE#{certificate_id}"}, "sk": {"S": FACTORY}}


def rotation_key(serial: str) -> Key:
    """The key of a unit's latest rotation."""
    return {"pk": {"S": ROTATIONS}, "sk": {"S": serial}}


def event_sort(at: str, event_id: str) -> str:
    """Sorts a unit's events by time."""
    return f"EVENT#{at}#{event_id}"


def sms_sort(event_id: str) -> str:
    """One per event, whatever time the device gives it when it sends it again."""
    return f"SMS#{event_id}"


def typed(value: str | float | None) -> "AttributeValueTypeDef":
    """A value in DynamoDB's own notation."""
    match value:
        case None:
            return {"NULL": True}
        case str():
            return {"S": value}
        case int() | float():
            return {"N": str(value)}


def item(values: Mapping[str, str | float | None]) -> Key:
    """A row in DynamoDB's own notation."""
    return {name: typed(value) for name, value in values.items()}


def text(row: Mapping[str, Any] | None, name: str) -> str | None:
    """A string of a row, or None where it is absent."""
    value = (row or {}).get(name, {}).get("S")
    return value if isinstance(value, str) else None


def number(row: Mapping[str, Any] | None, name: str) -> float | None:
    """A number of a row, or None where it is absent."""
    value = (row or {}).get(name, {}).get("N")
    return None if value is None else float(value)
