"""What the factory asks the cloud and tells it: the signing CA, certificates, things, the unit's records.

Every method talks to the cloud at once and raises one of two errors: `CloudUnreachable` (nobody answers) or
`CloudMisconfigured` (it refuses; the message says what to change).
"""

import functools
import hashlib
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloud import stack
from cloud.errors import CloudMisconfigured
from cloud.handlers import clock, table
from cloud.jitp import SUBJECT_ATTRIBUTES, missing_parameters, subject_parameters
from cloud.local import launcher
from cloud.target import Target, translated

#: The roots that AWS IoT's data endpoints chain to: RSA and ECC.
#: https://docs.aws.amazon.com/iot/latest/developerguide/server-authentication.html
AMAZON_ROOTS = ("Amazon Root CA 1", "Amazon Root CA 3")

#: As many items as one BatchGetItem takes.
BATCH = 100

_E164 = re.compile(r"\+[1-9][0-9]{6,14}")


@dataclass(frozen=True)
class Endpoint:
    """Where a device connects by MQTT over mutual TLS."""

    host: str
    port: int


@dataclass(frozen=True)
class Certificate:
    """A device certificate in the cloud's registry: ACTIVE, PENDING_ACTIVATION, INACTIVE, REVOKED."""

    certificate_id: str
    status: str
    ca_certificate_id: str | None


@dataclass(frozen=True)
class Thing:
    """A thing with its attributes and the certificates attached to it."""

    name: str
    attributes: Mapping[str, str]
    certificate_ids: tuple[str, ...]


@dataclass(frozen=True)
class Device:
    """What the device said last. `first_seen` and `last_seen` are the cloud's clock."""

    thing: str
    certificate_id: str | None
    batch: str
    board: str
    agent: str
    image: str
    key: str
    mode: str
    boot_id: str
    nonce: str | None
    first_seen: datetime
    last_seen: datetime


def certificate_id(certificate_pem: str) -> str:
    """AWS IoT's id of a certificate: the SHA-256 of its DER form."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(_first(certificate_pem))).hexdigest()


def _first(pem: str) -> str:
    """The first certificate of a chain."""
    head, end, _ = pem.partition("-----END CERTIFICATE-----")
    return head[head.find("-----BEGIN CERTIFICATE-----") :] + end + "\n"


class Registry:
    """The cloud as the factory sees it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._iot = target.iot
        self._dynamodb = target.dynamodb

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        return stack.outputs(self.target)

    # -- where devices go

    def endpoint(self) -> Endpoint:
        """Where a device on the station's network connects."""
        if self.target.local is not None:
            return Endpoint(self.target.local.mqtt_host, self.target.local.mqtt_port)
        with translated(self.target, "asking for the device endpoint"):
            address = self._iot.describe_endpoint(endpointType="iot:Data-ATS")["endpointAddress"]
        return Endpoint(address, 8883)

    def guest_endpoint(self) -> Endpoint:
        """Where a device in a network namespace of its own (the virtual Pi) connects.

        At AWS the same as `endpoint`. The local cloud has a name for it that its certificate carries too; the guest
        has to resolve that name to the address under which it sees this machine's loopback.
        """
        if self.target.local is not None:
            return Endpoint(self.target.local.device_host, self.target.local.mqtt_port)
        return self.endpoint()

    def trust_bundle(self) -> str:
        """The PEM certificates by which a device knows the endpoint."""
        if self.target.local is None:
            return amazon_roots()
        return launcher.fetch(self.target.local, "/_ministack/iot/ca.pem")

    # -- the signing CA

    def register_signing_ca(self, certificate_pem: str, verification: Callable[[str], str]) -> str:
        """Make the cloud accept devices whose certificates this CA signed. Safe to repeat.

        Args:
            certificate_pem: the CA that signs leaves itself, not one above it.
            verification: given the registration code, returns a certificate in PEM with that code as its common name,
                signed by the CA: the proof that we hold its key.

        Returns:
            The CA's id in the cloud.
        """
        ca_id = certificate_id(certificate_pem)
        template = self._names["JitpTemplate"]
        with translated(self.target, "registering the signing CA"):
            try:
                known = self._iot.describe_ca_certificate(certificateId=ca_id)
            except self._iot.exceptions.ResourceNotFoundException:
                code = self._iot.get_registration_code()["registrationCode"]
                self._iot.register_ca_certificate(
                    caCertificate=_first(certificate_pem),
                    verificationCertificate=verification(code),
                    setAsActive=True,
                    allowAutoRegistration=True,
                    registrationConfig={"templateName": template},
                    tags=[{"Key": "product", "Value": "picket"}],
                )
                return ca_id
            description = known["certificateDescription"]
            if (
                description.get("status") != "ACTIVE"
                or description.get("autoRegistrationStatus") != "ENABLE"
                or known.get("registrationConfig", {}).get("templateName") != template
            ):
                self._iot.update_ca_certificate(
                    certificateId=ca_id,
                    newStatus="ACTIVE",
                    newAutoRegistrationStatus="ENABLE",
                    registrationConfig={"templateName": template},
                )
        return ca_id

    def signing_ca_active(self, certificate_pem: str) -> bool:
        """Whether the cloud lets devices of this CA in by themselves."""
        with translated(self.target, "asking for the signing CA"):
            try:
                known = self._iot.describe_ca_certificate(certificateId=certificate_id(certificate_pem))
            except self._iot.exceptions.ResourceNotFoundException:
                return False
        description = known["certificateDescription"]
        return description.get("status") == "ACTIVE" and description.get("autoRegistrationStatus") == "ENABLE"

    # -- the factory's records

    def announce(self, serial: str, certificate_id: str, certificate_pem: str, batch: str) -> None:
        """Put the unit into the factory's records, so that registration just in time may activate its certificate."""
        subject = subject_parameters(_first(certificate_pem))
        unit = table.unit_key(serial, table.FACTORY) | table.item(
            {
                "certificate_id": certificate_id,
                "certificate_pem": _first(certificate_pem),
                "batch": batch,
                "board": subject.get("AWS::IoT::Certificate::SerialNumber", ""),
                "announced_at": _now(),
            }
        )
        certificate = table.certificate_key(certificate_id) | table.item({"serial": serial})
        name = self._names["Table"]
        with translated(self.target, "writing the factory's record"):
            self._dynamodb.transact_write_items(
                TransactItems=[
                    {"Put": {"TableName": name, "Item": unit}},
                    {"Put": {"TableName": name, "Item": certificate}},
                ]
            )

    def owner(self, serial: str, phone: str, timezone: str) -> None:
        """Claim the unit for an owner, who is texted about its alarms from now on.

        Args:
            serial: the unit's.
            phone: in E.164, e.g. +14155550123.
            timezone: an IANA name, e.g. Europe/Berlin.

        Raises:
            ValueError: the phone number or the time zone is none.
        """
        if not _E164.fullmatch(phone):
            raise ValueError(f"{phone!r} is no phone number in international form, like +14155550123")
        clock.zone(timezone)
        row = table.unit_key(serial, table.OWNER) | table.item(
            {"phone": phone, "timezone": timezone, "claimed_at": _now()}
        )
        with translated(self.target, "writing the unit's owner"):
            self._dynamodb.put_item(TableName=self._names["Table"], Item=row)

    # -- what the cloud knows

    def certificate(self, certificate_id: str) -> Certificate | None:
        """The certificate as the cloud has it, or None when it has never seen it."""
        with translated(self.target, "asking for a certificate"):
            try:
                found = self._iot.describe_certificate(certificateId=certificate_id)["certificateDescription"]
            except self._iot.exceptions.ResourceNotFoundException:
                return None
        return Certificate(certificate_id, found["status"], found.get("caCertificateId"))

    def thing(self, serial: str) -> Thing | None:
        """The unit's thing, or None when there is none."""
        with translated(self.target, "asking for a thing"):
            try:
                found = self._iot.describe_thing(thingName=serial)
                principals = self._iot.list_thing_principals(thingName=serial)["principals"]
            except self._iot.exceptions.ResourceNotFoundException:
                return None
        ids = tuple(arn.rpartition("cert/")[2] for arn in principals if ":cert/" in arn)
        return Thing(serial, dict(found.get("attributes", {})), ids)

    def device(self, serial: str) -> Device | None:
        """What the device said on its last connection, or None when it was never heard of."""
        row = self._row(table.unit_key(serial, table.DEVICE))
        return None if row is None else _device(serial, row)

    def devices(self, serials: Sequence[str]) -> dict[str, Device]:
        """What each of these devices said on its last connection; who was never heard of is left out."""
        name, found = self._names["Table"], dict[str, Device]()
        with translated(self.target, "reading the table"):
            for begin in range(0, len(serials), BATCH):
                keys = [table.unit_key(serial, table.DEVICE) for serial in serials[begin : begin + BATCH]]
                while keys:  # DynamoDB hands back what it had no time for
                    answer: Any = self._dynamodb.batch_get_item(RequestItems={name: {"Keys": keys}})
                    for row in answer["Responses"].get(name, []):
                        serial = row["pk"]["S"].removeprefix("UNIT#")
                        found[serial] = _device(serial, row)
                    keys = answer.get("UnprocessedKeys", {}).get(name, {}).get("Keys", [])
        return found

    # -- trouble

    def retire(self, certificate_pem: str, certificate_id: str) -> None:
        """See to it that this certificate never connects again. Safe to repeat.

        A certificate that the cloud has not seen yet is registered first, for REVOKED is the only state that keeps it
        from being registered just in time at its next connection; merely deleting it would not.
        """
        with translated(self.target, "retiring a certificate"):
            try:
                found = self._iot.describe_certificate(certificateId=certificate_id)["certificateDescription"]
            except self._iot.exceptions.ResourceNotFoundException:
                self._register_inactive(_first(certificate_pem))
                found = self._iot.describe_certificate(certificateId=certificate_id)["certificateDescription"]
            self._iot.update_certificate(certificateId=certificate_id, newStatus="REVOKED")
            arn = found["certificateArn"]
            for thing in self._iot.list_principal_things(principal=arn)["things"]:
                self._iot.detach_thing_principal(thingName=thing, principal=arn)
            for policy in self._iot.list_attached_policies(target=arn)["policies"]:
                self._iot.detach_policy(policyName=policy["policyName"], target=arn)
        self._mark_retired(certificate_id)

    def _register_inactive(self, certificate_pem: str) -> None:
        try:
            self._iot.register_certificate(certificatePem=certificate_pem, status="INACTIVE")
        except (
            self._iot.exceptions.CertificateValidationException,
            self._iot.exceptions.CertificateStateException,
            self._iot.exceptions.InvalidRequestException,
        ):  # its CA is not registered, or not active: hold the certificate's id all the same
            self._iot.register_certificate_without_ca(certificatePem=certificate_pem, status="INACTIVE")

    def _mark_retired(self, certificate_id: str) -> None:
        serial = table.text(self._row(table.certificate_key(certificate_id)), "serial")
        if serial is None:
            return
        with translated(self.target, "marking the factory's record"):
            try:
                self._dynamodb.update_item(
                    TableName=self._names["Table"],
                    Key=table.unit_key(serial, table.FACTORY),
                    UpdateExpression="SET retired_at = if_not_exists(retired_at, :now)",
                    ConditionExpression="certificate_id = :id",
                    ExpressionAttributeValues={":now": {"S": _now()}, ":id": {"S": certificate_id}},
                )
            except self._dynamodb.exceptions.ConditionalCheckFailedException:
                return  # the unit has a newer certificate, which stays

    def diagnose(self, certificate_pem: str) -> str | None:
        """Why this certificate does not become ACTIVE, or None when nothing stands in its way.

        AWS keeps the reason to itself: a leaf that lacks a subject attribute stays PENDING_ACTIVATION without a word.
        """
        leaf = _first(certificate_pem)
        name = self._names["JitpTemplate"]
        with translated(self.target, "asking why a certificate stays pending"):
            try:
                template = self._iot.describe_provisioning_template(templateName=name)
            except self._iot.exceptions.ResourceNotFoundException:
                return f"the provisioning template {name} is gone: deploy the stack again"
            known = self.certificate(certificate_id(leaf))
            authority = self._authority(known.ca_certificate_id) if known and known.ca_certificate_id else None
        reasons = (
            f"the certificate is {known.status}" if known and known.status in {"REVOKED", "INACTIVE"} else None,
            None if template.get("enabled") else f"the provisioning template {name} is disabled",
            _missing(name, missing_parameters(template["templateBody"], leaf)),
            _authority_trouble(authority, name) if authority else None,
        )
        return next((reason for reason in reasons if reason), None)

    def _authority(self, ca_id: str) -> Any:
        try:
            return self._iot.describe_ca_certificate(certificateId=ca_id)
        except self._iot.exceptions.ResourceNotFoundException:
            return None

    def _row(self, key: table.Key) -> dict[str, Any] | None:
        with translated(self.target, "reading the table"):
            answer = self._dynamodb.get_item(TableName=self._names["Table"], Key=key, ConsistentRead=True)
        return answer.get("Item")


def _device(serial: str, row: Mapping[str, Any]) -> Device:
    return Device(
        thing=serial,
        certificate_id=table.text(row, "certificate_id"),
        nonce=table.text(row, "nonce"),
        first_seen=_moment(row, "first_seen"),
        last_seen=_moment(row, "last_seen"),
        **{
            name: table.text(row, name) or "" for name in ("batch", "board", "agent", "image", "key", "mode", "boot_id")
        },
    )


def _authority_trouble(authority: Mapping[str, Any], template: str) -> str | None:
    used = authority.get("registrationConfig", {}).get("templateName")
    if used != template:
        return f"the signing CA is registered with the template {used!r}, not with {template!r}: register it again"
    if authority["certificateDescription"].get("status") != "ACTIVE":
        return "the signing CA is not ACTIVE in the cloud: register it again"
    return None


def _missing(template: str, missing: list[str]) -> str | None:
    if not missing:
        return None
    names = ", ".join(
        f"{parameter.rpartition('::')[2]} ({SUBJECT_ATTRIBUTES[parameter].dotted_string})"
        if parameter in SUBJECT_ATTRIBUTES
        else parameter
        for parameter in missing
    )
    return (
        f"the provisioning template {template} asks for {names}, which the certificate's subject lacks:"
        " it stays PENDING_ACTIVATION; correct the certificate profile or the template"
    )


def amazon_roots() -> str:
    """Amazon's roots in PEM, from the certificate bundle that botocore carries.

    Raises:
        CloudMisconfigured: the bundle lacks one of them.
    """
    bundle = resources.files("botocore").joinpath("cacert.pem").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for name in AMAZON_ROOTS:
        _, _, after = bundle.partition(f'# Label: "{name}"\n')
        if not after:
            continue
        certificate = x509.load_pem_x509_certificate(_first(after).encode())
        if certificate.subject.rfc4514_string().startswith(f"CN={name},"):
            found[name] = certificate.public_bytes(Encoding.PEM).decode()
    lacking = [name for name in AMAZON_ROOTS if name not in found]
    if lacking:
        raise CloudMisconfigured(
            f"botocore's certificate bundle lacks {', '.join(lacking)}: install the locked botocore"
        )
    return "".join(found[name] for name in AMAZON_ROOTS)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _moment(row: Mapping[str, Any], name: str) -> datetime:
    return datetime.fromtimestamp((table.number(row, name) or 0) / 1000, UTC)
