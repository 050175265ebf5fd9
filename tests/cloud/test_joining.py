"""How a unit gets in: provisioned just in time, registered just in time, retired for good."""

import contextlib
import socket
import ssl
from pathlib import Path

import pytest

from cloud import doctor
from cloud.doctor import ThrowAwayAuthority
from cloud.errors import CloudMisconfigured
from cloud.registry import Registry, certificate_id
from tests.cloud.conftest import Fleet, Unit, eventually, hello


def test_the_first_connection_is_hung_up_and_the_retry_holds(fleet: Fleet) -> None:
    unit = fleet.unit(join=False)

    first = fleet.attempt(unit)
    status_after_first = fleet.status(unit)
    fleet.active(unit)
    second = fleet.attempt(unit)

    assert (first.accepted, status_after_first, second.accepted) == (False, "PENDING_ACTIVATION", True)


def test_a_provisioned_unit_has_its_thing_its_attributes_and_its_policy(fleet: Fleet) -> None:
    unit = fleet.unit(board="00000000cafe0001", batch="WO-7")

    thing = fleet.registry.thing(unit.serial)
    description = fleet.target.iot.describe_certificate(certificateId=unit.leaf.certificate_id)
    policies = fleet.target.iot.list_attached_policies(target=description["certificateDescription"]["certificateArn"])

    assert thing is not None
    assert dict(thing.attributes) == {"board": "00000000cafe0001", "batch": "WO-7"}
    assert thing.certificate_ids == (unit.leaf.certificate_id,)
    assert [policy["policyName"] for policy in policies["policies"]] == [fleet.outputs["DevicePolicy"]]


@pytest.mark.parametrize(("attribute", "parameter"), [("batch", "OrganizationalUnit"), ("board", "SerialNumber")])
def test_a_leaf_without_a_subject_attribute_stays_pending_and_the_diagnosis_names_it(
    fleet: Fleet, attribute: str, parameter: str
) -> None:
    unit = fleet.unit(join=False, **{attribute: None})

    fleet.attempt(unit)
    eventually(lambda: "stays PENDING_ACTIVATION: no value for" in _log(fleet, unit))

    assert fleet.status(unit) == "PENDING_ACTIVATION"
    assert parameter in (fleet.registry.diagnose(unit.leaf.chain) or "")


def _log(fleet: Fleet, unit: Unit) -> str:
    lines = (fleet.state / "log").read_text().splitlines()
    return "\n".join(line for line in lines if unit.leaf.certificate_id in line)


def test_a_good_leaf_has_nothing_to_diagnose(fleet: Fleet) -> None:
    unit = fleet.unit(join=False)

    assert fleet.registry.diagnose(unit.leaf.chain) is None


def test_a_retired_unit_cannot_connect_again(fleet: Fleet) -> None:
    unit = fleet.unit()

    fleet.registry.retire(unit.leaf.certificate, unit.leaf.certificate_id)

    assert not fleet.attempt(unit).accepted
    assert fleet.status(unit) == "REVOKED"
    thing = fleet.registry.thing(unit.serial)
    assert thing is not None
    assert thing.certificate_ids == ()


def test_retiring_ends_the_connection_that_is_open(fleet: Fleet) -> None:
    unit = fleet.unit()

    with doctor.connection(fleet.endpoint, fleet.trust, unit.serial, unit.leaf) as (link, result):
        assert result.accepted
        fleet.registry.retire(unit.leaf.certificate, unit.leaf.certificate_id)

        assert link.lost(10)


def test_a_certificate_retired_before_it_ever_connected_is_never_registered(fleet: Fleet) -> None:
    unit = fleet.unit(join=False)

    fleet.registry.retire(unit.leaf.certificate, unit.leaf.certificate_id)
    fleet.registry.retire(unit.leaf.certificate, unit.leaf.certificate_id)
    attempts = [fleet.attempt(unit).accepted for _ in range(2)]

    assert attempts == [False, False]
    assert fleet.status(unit) == "REVOKED"
    assert "REVOKED" in (fleet.registry.diagnose(unit.leaf.certificate) or "")


def test_a_certificate_can_be_retired_whose_ca_the_cloud_does_not_know(fleet: Fleet) -> None:
    leaf = ThrowAwayAuthority("nobody").leaf("PK-STRANGER")

    fleet.registry.retire(leaf.certificate, leaf.certificate_id)

    found = fleet.registry.certificate(leaf.certificate_id)
    assert found is not None
    assert found.status == "REVOKED"


def test_registering_the_signing_ca_twice_changes_nothing(fleet: Fleet) -> None:
    def never(_: str) -> str:
        raise AssertionError("a registered CA has proved itself already")

    assert fleet.registry.register_signing_ca(fleet.authority.pem, never) == certificate_id(fleet.authority.pem)
    assert fleet.registry.signing_ca_active(fleet.authority.pem)


def test_a_signing_ca_that_was_switched_off_is_switched_on_by_registering_it_again(fleet: Fleet) -> None:
    authority = ThrowAwayAuthority("Picket test CA, off and on")
    ca_id = fleet.registry.register_signing_ca(authority.pem, authority.verification)
    fleet.target.iot.update_ca_certificate(
        certificateId=ca_id, newStatus="INACTIVE", newAutoRegistrationStatus="DISABLE"
    )
    off = fleet.registry.signing_ca_active(authority.pem)

    fleet.registry.register_signing_ca(authority.pem, authority.verification)

    assert (off, fleet.registry.signing_ca_active(authority.pem)) == (False, True)


def test_a_signing_ca_whose_proof_is_for_another_code_is_refused(fleet: Fleet) -> None:
    authority = ThrowAwayAuthority("Picket test CA, wrong proof")

    with pytest.raises(CloudMisconfigured, match="registering the signing CA"):
        fleet.registry.register_signing_ca(authority.pem, lambda _: authority.verification("another code"))


@pytest.fixture(scope="module")
def jitr(fleet: Fleet) -> ThrowAwayAuthority:
    """A signing CA without a provisioning template: its certificates go through the function."""
    authority = ThrowAwayAuthority("Picket test CA, JITR")
    code = fleet.target.iot.get_registration_code()["registrationCode"]
    fleet.target.iot.register_ca_certificate(
        caCertificate=authority.pem,
        verificationCertificate=authority.verification(code),
        setAsActive=True,
        allowAutoRegistration=True,
    )
    return authority


def test_registration_just_in_time_activates_what_the_factory_announced(fleet: Fleet, jitr: ThrowAwayAuthority) -> None:
    unit = Unit("PK-JITR-1", jitr.leaf("PK-JITR-1", board="00000000cafe0002", batch="WO-8"))
    fleet.registry.announce(unit.serial, unit.leaf.certificate_id, unit.leaf.chain, "WO-8")

    first = fleet.attempt(unit)
    fleet.active(unit)

    assert (first.accepted, fleet.attempt(unit).accepted) == (False, True)
    thing = fleet.registry.thing(unit.serial)
    assert thing is not None
    assert dict(thing.attributes) == {"board": "00000000cafe0002", "batch": "WO-8"}


def test_registration_just_in_time_leaves_a_stranger_inactive_and_tells_operations(
    fleet: Fleet, jitr: ThrowAwayAuthority
) -> None:
    stranger = Unit("PK-JITR-2", jitr.leaf("PK-JITR-2"))

    fleet.attempt(stranger)
    told = eventually(lambda: fleet.operations(stranger.leaf.certificate_id))

    assert "do not know this certificate" in told[0]
    assert fleet.status(stranger) == "PENDING_ACTIVATION"
    assert not fleet.attempt(stranger).accepted


def test_registration_just_in_time_refuses_a_second_certificate_for_a_known_serial(
    fleet: Fleet, jitr: ThrowAwayAuthority
) -> None:
    known, forged = jitr.leaf("PK-JITR-3"), jitr.leaf("PK-JITR-3")
    fleet.registry.announce("PK-JITR-3", known.certificate_id, known.certificate, "WO-8")

    fleet.attempt(Unit("PK-JITR-3", forged))
    eventually(lambda: fleet.operations(forged.certificate_id))

    assert fleet.status(Unit("PK-JITR-3", forged)) == "PENDING_ACTIVATION"


def test_a_hello_writes_the_devices_row(fleet: Fleet) -> None:
    unit = fleet.unit()

    fleet.publish(unit, "hello", hello(nonce="n-42", agent="0.1.0"))
    device = eventually(lambda: fleet.registry.device(unit.serial))

    assert device.certificate_id == unit.leaf.certificate_id
    assert (device.nonce, device.agent, device.mode, device.batch) == ("n-42", "0.1.0", "factory", "DOCTOR")


def test_a_later_hello_updates_the_row_and_keeps_when_it_was_first_seen(fleet: Fleet) -> None:
    unit = fleet.unit()
    fleet.publish(unit, "hello", hello())
    first = eventually(lambda: fleet.registry.device(unit.serial))

    fleet.publish(unit, "hello", hello(mode="product", nonce=None, agent="0.2.0"))

    def updated() -> bool:
        device = fleet.registry.device(unit.serial)
        return device is not None and device.mode == "product"

    eventually(updated)
    second = fleet.registry.device(unit.serial)
    assert second is not None
    assert (second.agent, second.nonce, second.first_seen) == ("0.2.0", None, first.first_seen)
    assert second.last_seen > first.last_seen


def test_nothing_is_known_of_a_unit_that_never_was(fleet: Fleet) -> None:
    registry: Registry = fleet.registry

    assert registry.device("PK-NOBODY") is None
    assert registry.thing("PK-NOBODY") is None
    assert registry.certificate("0" * 64) is None


@pytest.mark.parametrize("name", ["local", "guest", None])
def test_a_device_must_say_which_server_it_wants_and_two_names_are_right(
    fleet: Fleet, tmp_path: Path, name: str | None
) -> None:
    leaf = fleet.authority.leaf("PK-SNI")
    (tmp_path / "chain").write_text(leaf.chain)
    (tmp_path / "key").write_text(leaf.key)
    context = ssl.create_default_context(cadata=fleet.trust)
    context.load_cert_chain(tmp_path / "chain", tmp_path / "key")
    hosts = {"local": fleet.registry.endpoint().host, "guest": fleet.registry.guest_endpoint().host}
    context.check_hostname = name is not None

    with (
        contextlib.nullcontext() if name else pytest.raises((ssl.SSLError, ConnectionError)),
        socket.create_connection(("127.0.0.1", fleet.endpoint.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=hosts[name] if name else None) as secured,
    ):
        assert secured.version() in {"TLSv1.2", "TLSv1.3"}


def _rings(fleet: Fleet, unit: Unit) -> set[str]:
    return {
        group["groupName"]
        for group in fleet.target.iot.list_thing_groups_for_thing(thingName=unit.serial)["thingGroups"]
    }


def test_a_unit_that_says_hello_for_the_first_time_joins_the_main_ring(fleet: Fleet) -> None:
    unit = fleet.unit()
    before = _rings(fleet, unit)

    fleet.publish(unit, "hello", hello())

    assert before == set()
    assert eventually(lambda: _rings(fleet, unit)) == {"picket-main"}


def test_a_canary_stays_one_whatever_it_says(fleet: Fleet) -> None:
    unit = fleet.unit()
    fleet.target.iot.add_thing_to_thing_group(thingName=unit.serial, thingGroupName="picket-canary")

    fleet.publish(unit, "hello", hello())
    eventually(lambda: fleet.rows(unit.serial, "DEVICE") and "ring_given_at" in fleet.rows(unit.serial, "DEVICE")[0])

    assert _rings(fleet, unit) == {"picket-canary"}
