"""Named shadows on the local cloud, spoken by a real device: what the agent's shadow code relies on."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cloud.conftest import Fleet, Unit
from tests.cloud.device import Device, connected


@pytest.fixture(scope="module")
def unit(fleet: Fleet) -> Unit:
    return fleet.unit()


@pytest.fixture
def device(fleet: Fleet, unit: Unit) -> Iterator[Device]:
    with connected(fleet, unit) as made:
        yield made
        made.ask("shadow/name/alarm/delete")


def _owner_wants(fleet: Fleet, unit: Unit, **desired: Any) -> None:
    """What the owner's page does."""
    data = fleet.target.session.client("iot-data", endpoint_url=fleet.target.endpoint_url)
    body = json.dumps({"state": {"desired": desired}}).encode()
    data.update_thing_shadow(thingName=unit.serial, shadowName="alarm", payload=body)
    data.close()


def test_a_shadow_that_nobody_wrote_is_not_found(device: Device) -> None:
    kind, answer = device.ask("shadow/name/alarm/get")

    assert (kind, answer["code"]) == ("rejected", 404)


def test_what_the_owner_wants_comes_as_a_delta_with_a_version(fleet: Fleet, unit: Unit, device: Device) -> None:
    device.ask("shadow/name/alarm/update", {"state": {"reported": {"armed": False}}})
    _owner_wants(fleet, unit, armed=True)

    delta = device.next("shadow/name/alarm/update/delta")
    _, reported = device.ask("shadow/name/alarm/update", {"state": {"reported": {"armed": True}}})
    _, found = device.ask("shadow/name/alarm/get")

    assert delta["state"] == {"armed": True}
    assert reported["version"] == delta["version"] + 1
    assert "delta" not in found["state"]


def test_a_wish_made_while_the_device_was_away_is_in_the_answer_to_get(fleet: Fleet, unit: Unit) -> None:
    _owner_wants(fleet, unit, armed=True)

    with connected(fleet, unit) as device:
        _, found = device.ask("shadow/name/alarm/get")
        device.ask("shadow/name/alarm/delete")

    assert found["state"] == {"desired": {"armed": True}, "delta": {"armed": True}}


def test_an_update_that_names_an_old_version_is_a_conflict(device: Device) -> None:
    _, first = device.ask("shadow/name/alarm/update", {"state": {"reported": {"armed": False}}})
    device.ask("shadow/name/alarm/update", {"state": {"reported": {"armed": True}}})

    kind, answer = device.ask(
        "shadow/name/alarm/update", {"state": {"reported": {"armed": False}}, "version": first["version"]}
    )

    assert (kind, answer["code"]) == ("rejected", 409)


def test_null_takes_a_key_away_and_both_halves_can_be_written_at_once(device: Device) -> None:
    both = {"armed": True, "by": "keypad"}
    device.ask("shadow/name/alarm/update", {"state": {"desired": both, "reported": both}})
    device.ask("shadow/name/alarm/update", {"state": {"desired": {"by": None}, "reported": {"by": None}}})

    _, found = device.ask("shadow/name/alarm/get")

    assert found["state"] == {"desired": {"armed": True}, "reported": {"armed": True}}


def test_a_deleted_shadow_keeps_counting_its_versions(device: Device) -> None:
    _, first = device.ask("shadow/name/alarm/update", {"state": {"reported": {"armed": True}}})
    device.ask("shadow/name/alarm/delete")

    _, second = device.ask("shadow/name/alarm/update", {"state": {"reported": {"armed": True}}})

    assert second["version"] > first["version"]


def test_the_two_shadows_know_nothing_of_each_other(device: Device) -> None:
    device.ask("shadow/name/settings/update", {"state": {"reported": {"quiet_seconds": 60}}})

    _, alarm = device.ask("shadow/name/alarm/update", {"state": {"reported": {"armed": True}}})
    _, settings = device.ask("shadow/name/settings/get")

    assert alarm["state"] == {"reported": {"armed": True}}
    assert settings["state"] == {"reported": {"quiet_seconds": 60}}


def test_what_is_no_json_is_refused(device: Device) -> None:
    device.publish("shadow/name/alarm/update", b"{not json")

    assert device.next("shadow/name/alarm/update/rejected")["code"] == 400
