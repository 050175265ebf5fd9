"""What the functions accept from a rule, and what they decide; no cloud needed."""

import contextlib
import string
import zoneinfo
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.handlers import clock, register_device, table
from cloud.handlers.events import (
    Alarm,
    CertificateRegistered,
    Hello,
    MalformedEventError,
    parse_alarm,
    parse_registration,
)
from cloud.handlers.process_alarm import Duty, Owner, compose, judge
from cloud.handlers.register_device import Activate, Refuse
from tests.cloud.conftest import alarm, hello

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


@given(JSON)
def test_any_json_is_an_alarm_or_is_called_malformed(event: Any) -> None:
    with contextlib.suppress(MalformedEventError):
        parse_alarm(event)
    with contextlib.suppress(MalformedEventError):
        parse_registration(event)


@given(st.sampled_from([*alarm(), "thing"]), JSON)
def test_an_alarm_with_one_field_changed_is_an_alarm_or_is_called_malformed(name: str, value: Any) -> None:
    event = alarm() | {"thing": "PK-1"} | {name: value}

    with contextlib.suppress(MalformedEventError):
        parsed = parse_alarm(event)
        assert parsed.at.tzinfo is not None
        assert parsed.sequence >= 0


@pytest.mark.parametrize("name", [name for name in alarm() if name != "monotonic_ms"])
def test_an_alarm_without_a_field_names_it(name: str) -> None:
    event = alarm() | {"thing": "PK-1"}
    del event[name]

    with pytest.raises(MalformedEventError, match=name):
        parse_alarm(event)


@pytest.mark.parametrize("at", ["2026-11-21T05:53:35", "2026-11-21", "21.11.2026", "", "2026-13-01T00:00:00Z"])
def test_a_time_without_a_zone_is_no_time(at: str) -> None:
    with pytest.raises(MalformedEventError, match="at"):
        parse_alarm(alarm(at=at) | {"thing": "PK-1"})


def test_a_hello_and_a_new_certificate_are_told_apart() -> None:
    said = parse_registration(hello() | {"thing": "PK-1", "received_ms": 5, "principal": "a" * 64})
    registered = parse_registration({"certificateId": "a" * 64, "caCertificateId": "b" * 64})

    assert isinstance(said, Hello)
    assert said.certificate_id == "a" * 64
    assert registered == CertificateRegistered("a" * 64, "b" * 64)


def _alarm(at: datetime) -> Alarm:
    return Alarm("PK-1", "e", 1, at, at.isoformat(), "ntp", "b", "motion")


@pytest.mark.parametrize(
    ("at", "zone", "local"),
    [
        (datetime(2026, 7, 1, 12, 0, 0, tzinfo=UTC), "Europe/Berlin", "2026-07-01 14:00:00"),
        (datetime(2026, 10, 25, 0, 30, 0, tzinfo=UTC), "Europe/Berlin", "2026-10-25 02:30:00"),
        (datetime(2026, 10, 25, 1, 30, 0, tzinfo=UTC), "Europe/Berlin", "2026-10-25 02:30:00"),
        (datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC), "Asia/Kathmandu", "2027-01-01 05:44:59"),
        (datetime(2026, 1, 1, 0, 0, 0, tzinfo=UTC), "UTC", "2026-01-01 00:00:00"),
    ],
)
def test_the_text_shows_the_owners_local_time(at: datetime, zone: str, local: str) -> None:
    message = compose(_alarm(at), Owner("+491", zone))

    assert message.text == f"Your security system just detected motion at: {local}"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("motion", "just detected motion"),
        ("tamper", "reports that somebody tampers with it"),
        ("a kind of tomorrow", "raised an alarm"),
    ],
)
def test_the_text_says_what_kind_of_alarm_it_is(kind: str, words: str) -> None:
    event = parse_alarm(alarm(kind=kind, at="2026-11-21T05:53:35Z") | {"thing": "PK-1"})

    assert compose(event, Owner("+49170", "UTC")).text == f"Your security system {words} at: 2026-11-21 05:53:35"


def test_time_zones_are_found_where_the_system_has_none() -> None:
    zoneinfo.reset_tzpath(to=[])
    ZoneInfo.clear_cache()
    clock.zone.cache_clear()
    try:
        assert clock.local(datetime(2026, 7, 1, tzinfo=UTC), "America/New_York") == "2026-06-30 20:00:00"
        with pytest.raises(clock.UnknownZoneError, match="Mars/Olympus"):
            clock.zone("Mars/Olympus")
        with pytest.raises(clock.UnknownZoneError, match="METADATA"):
            clock.zone("METADATA")
    finally:
        zoneinfo.reset_tzpath()
        clock.zone.cache_clear()


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../../etc/passwd", "Europe", string.printable])
def test_what_is_no_zone_name_is_refused(name: str) -> None:
    with pytest.raises(clock.UnknownZoneError):
        clock.zone(name)


@pytest.mark.parametrize(
    ("row", "duty"),
    [
        ({}, Duty.MINE),
        ({"leased_until": 99}, Duty.MINE),
        ({"leased_until": 101}, Duty.ANOTHER),
        ({"leased_until": 101, "outcome": "sent"}, Duty.DONE),
        ({"leased_until": 0, "outcome": "no owner"}, Duty.DONE),
    ],
)
def test_whose_duty_a_text_is(row: dict[str, Any], duty: Duty) -> None:
    assert judge(table.item(row), now=100) is duty


EVENT = CertificateRegistered("a" * 64, "b" * 64)
KNOWN = table.item({"serial": "PK-1"})


@pytest.mark.parametrize(
    ("certificate_row", "unit_row", "reason"),
    [
        (None, None, "do not know this certificate"),
        (KNOWN, None, "do not know the serial PK-1"),
        (KNOWN, table.item({"certificate_id": "c" * 64}), "another certificate"),
        (KNOWN, table.item({"certificate_id": "a" * 64, "retired_at": "2026"}), "retired"),
    ],
)
def test_a_certificate_is_refused_unless_every_record_knows_it(
    certificate_row: dict[str, Any] | None, unit_row: dict[str, Any] | None, reason: str
) -> None:
    verdict = register_device.decide(EVENT, certificate_row, unit_row)

    assert isinstance(verdict, Refuse)
    assert reason in verdict.reason


def test_a_certificate_that_the_factory_knows_is_activated() -> None:
    unit = table.item({"certificate_id": "a" * 64, "board": "cafe", "batch": "WO-1"})

    assert register_device.decide(EVENT, KNOWN, unit) == Activate("PK-1", "cafe", "WO-1")
