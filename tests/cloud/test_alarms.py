"""From a motion to a text message, once."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cloud.handlers import table
from cloud.local import launcher
from tests.cloud.conftest import Fleet, Unit, alarm, eventually

BERLIN, LOS_ANGELES = "Europe/Berlin", "America/Los_Angeles"


@pytest.fixture(scope="module")
def unit(fleet: Fleet) -> Unit:
    return fleet.unit()


def _phone(fleet: Fleet, unit: Unit, zone: str = BERLIN) -> str:
    """A phone of its own for each test: the outbox is the whole session's."""
    _phone.count += 1  # type: ignore[attr-defined]
    number = f"+491701{_phone.count:06d}"  # type: ignore[attr-defined]
    fleet.registry.owner(unit.serial, number, zone)
    return number


_phone.count = 0  # type: ignore[attr-defined]


def _invoke(fleet: Fleet, event: dict[str, Any]) -> dict[str, Any]:
    """Call the function as Lambda does, and wait for its answer."""
    client = fleet.target.functions
    answer = client.invoke(FunctionName=fleet.outputs["ProcessAlarm"], Payload=json.dumps(event).encode())
    body: dict[str, Any] = json.load(answer["Payload"])
    client.close()
    return body


def _sms_row(fleet: Fleet, unit: Unit, event_id: str) -> dict[str, Any] | None:
    rows = fleet.rows(unit.serial, f"SMS#{event_id}")
    return rows[0] if rows and "outcome" in rows[0] else None


@pytest.mark.parametrize(("zone", "local"), [(BERLIN, "2026-11-21 06:53:35"), (LOS_ANGELES, "2026-11-20 21:53:35")])
def test_an_alarm_texts_the_owner_in_the_owners_time_zone(fleet: Fleet, unit: Unit, zone: str, local: str) -> None:
    phone = _phone(fleet, unit, zone)

    fleet.publish(unit, "alarm", alarm(at="2026-11-21T05:53:35.123Z"))
    texts = eventually(lambda: fleet.texts(phone))

    assert [text.text for text in texts] == [f"Your security system just detected motion at: {local}"]


def test_the_event_and_what_became_of_its_text_are_on_record(fleet: Fleet, unit: Unit) -> None:
    phone = _phone(fleet, unit)
    event = alarm(sequence=77)

    fleet.publish(unit, "alarm", event)
    sms = eventually(lambda: _sms_row(fleet, unit, event["event_id"]))

    recorded = fleet.rows(unit.serial, f"EVENT#{event['at']}#{event['event_id']}")
    assert [(row["sequence"], row["at_quality"], row["kind"]) for row in recorded] == [("77", "ntp", "motion")]
    assert (sms["outcome"], sms["to"], sms["message_id"]) == ("sent", phone, fleet.texts(phone)[0].message_id)
    assert sms["text"] == fleet.texts(phone)[0].text


def test_the_same_event_twice_is_one_text(fleet: Fleet, unit: Unit) -> None:
    phone = _phone(fleet, unit)
    event = alarm()

    fleet.publish(unit, "alarm", event)
    eventually(lambda: _sms_row(fleet, unit, event["event_id"]))
    again = _invoke(fleet, event | {"thing": unit.serial, "received_ms": 1})

    assert again == {"outcome": "already done"}
    assert len(fleet.texts(phone)) == 1


def test_an_event_whose_time_was_corrected_before_it_was_sent_again_is_still_one_event(
    fleet: Fleet, unit: Unit
) -> None:
    phone = _phone(fleet, unit)
    event = alarm(at="2026-11-21T05:00:00.000Z", at_quality="estimated") | {"thing": unit.serial, "received_ms": 1}

    _invoke(fleet, event)
    _invoke(fleet, event | {"at": "2026-11-21T05:00:09.000Z", "at_quality": "ntp"})

    assert len(fleet.texts(phone)) == 1
    assert len([row for row in fleet.rows(unit.serial, "EVENT#") if row["event_id"] == event["event_id"]]) == 1


def test_five_calls_at_once_for_one_event_are_one_text(fleet: Fleet, unit: Unit) -> None:
    phone = _phone(fleet, unit)
    event = alarm() | {"thing": unit.serial, "received_ms": 1}

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: _invoke(fleet, event), range(5)))

    assert len(fleet.texts(phone)) == 1
    assert [answer.get("outcome") for answer in answers].count("sent") == 1
    others = {answer.get("outcome", answer.get("errorType")) for answer in answers} - {"sent"}
    assert others <= {"already done", "InProgressError", "TransactionCanceledException", "Runtime.HandlerError"}


def test_a_crash_between_the_record_and_the_text_is_made_good_by_the_next_delivery(fleet: Fleet, unit: Unit) -> None:
    phone = _phone(fleet, unit)
    event = alarm() | {"thing": unit.serial, "received_ms": 1}
    _leave_lease(fleet, unit, event["event_id"], leased_until=1.0)

    answer = _invoke(fleet, event)

    assert answer == {"outcome": "sent"}
    assert len(fleet.texts(phone)) == 1


def test_while_another_call_may_still_be_sending_nobody_else_does(fleet: Fleet, unit: Unit) -> None:
    phone = _phone(fleet, unit)
    event = alarm() | {"thing": unit.serial, "received_ms": 1}
    _leave_lease(fleet, unit, event["event_id"], leased_until=4e9)

    answer = _invoke(fleet, event)

    assert "another call" in answer["errorMessage"]
    assert fleet.texts(phone) == []


def _leave_lease(fleet: Fleet, unit: Unit, event_id: str, leased_until: float) -> None:
    """As a call leaves it that died before it sent the text."""
    row = table.unit_key(unit.serial, table.sms_sort(event_id)) | table.item({"leased_until": leased_until})
    fleet.target.dynamodb.put_item(TableName=fleet.outputs["Table"], Item=row)


def test_an_alarm_of_a_unit_without_an_owner_is_recorded_and_texts_nobody(fleet: Fleet) -> None:
    orphan = fleet.unit()
    before = len(_all_texts(fleet))
    event = alarm()

    fleet.publish(orphan, "alarm", event)
    sms = eventually(lambda: _sms_row(fleet, orphan, event["event_id"]))

    assert sms["outcome"] == "no owner"
    assert len(fleet.rows(orphan.serial, "EVENT#")) == 1
    assert len(_all_texts(fleet)) == before


def _all_texts(fleet: Fleet) -> list[Any]:
    return list(launcher.sms(fleet.cloud))


@pytest.mark.parametrize("payload", ["not json", {"kind": "motion"}, alarm(at="yesterday"), alarm(sequence="1")])
def test_a_malformed_alarm_ends_among_the_dead_letters(fleet: Fleet, unit: Unit, payload: object) -> None:
    fleet.publish(unit, "alarm", payload)
    letters = eventually(fleet.dead_letters)

    assert [letter["requestPayload"]["thing"] for letter in letters] == [unit.serial]
    assert letters[0]["requestContext"]["condition"] == "RetriesExhausted"


def test_a_text_that_sns_refuses_is_tried_again_and_ends_among_the_dead_letters(fleet: Fleet, unit: Unit) -> None:
    row = table.unit_key(unit.serial, table.OWNER) | table.item({"phone": "+491709999999", "timezone": "Mars/Olympus"})
    fleet.target.dynamodb.put_item(TableName=fleet.outputs["Table"], Item=row)
    event = alarm()

    fleet.publish(unit, "alarm", event)
    letters = eventually(fleet.dead_letters)

    assert letters[0]["requestPayload"]["event_id"] == event["event_id"]
    assert "Mars/Olympus" in fleet.rows(unit.serial, f"SMS#{event['event_id']}")[0]["last_error"]


def test_a_function_may_do_no_more_than_its_role_says(fleet: Fleet, unit: Unit) -> None:
    role = fleet.target.cloudformation.describe_stack_resource(
        StackName=fleet.target.stack, LogicalResourceId="ProcessAlarmRole"
    )["StackResourceDetail"]["PhysicalResourceId"]
    iam = fleet.target.session.client("iam", endpoint_url=fleet.target.endpoint_url)
    granted = iam.get_role_policy(RoleName=role, PolicyName="process-alarm")["PolicyDocument"]
    phone = _phone(fleet, unit)
    textless = [each for each in granted["Statement"] if each["Action"] != "sns:Publish"]
    event = alarm() | {"thing": unit.serial, "received_ms": 1}
    try:
        _put(iam, role, {**granted, "Statement": textless})
        refused = _invoke(fleet, event)
    finally:
        _put(iam, role, granted)
    allowed = _invoke(fleet, event)
    iam.close()

    assert "not authorized to perform: sns:Publish" in refused["errorMessage"]
    assert allowed == {"outcome": "sent"}
    assert len(fleet.texts(phone)) == 1


def _put(iam: Any, role: str, document: dict[str, Any]) -> None:
    iam.put_role_policy(RoleName=role, PolicyName="process-alarm", PolicyDocument=json.dumps(document))


@pytest.mark.parametrize("phone", ["0170123", "+0123456789", "+49 170 1", "", "+49170123456789012"])
def test_an_owner_needs_a_phone_number_in_international_form(fleet: Fleet, unit: Unit, phone: str) -> None:
    with pytest.raises(ValueError, match="phone number"):
        fleet.registry.owner(unit.serial, phone, BERLIN)


def test_an_owner_needs_a_time_zone_that_exists(fleet: Fleet, unit: Unit) -> None:
    with pytest.raises(ValueError, match="Mars/Olympus"):
        fleet.registry.owner(unit.serial, "+491701234567", "Mars/Olympus")
