"""Burn in: put chain, trust and endpoint on the unit, read them back, and have the unit prove its key."""

import base64
import binascii
import hashlib
import secrets

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from factory.answers import Answer
from factory.authority import public_key
from factory.bench import Agent, Endpoint, Unit
from factory.certify import DeviceCertificate
from factory.enrol import Enrolment
from factory.errors import UnitFault
from factory.record import Step
from firmware_agent.wire import PROOF_CONTEXT

_ADVICE = (
    "Run the unit again. If it happens twice, put it on the repair shelf: its medium does not keep what is written."
)


def burn_in(
    agent: Agent,
    unit: Unit,
    enrolment: Enrolment,
    certificate: DeviceCertificate,
    endpoint: Endpoint,
    trust: str,
    step: Step,
) -> None:
    """Write the identity on to the unit and prove that it is there.

    Raises:
        UnitFault: what is read back differs, or the unit cannot sign with the certified key.
    """
    agent.ask(
        "burn-in",
        {
            "serial": unit.serial,
            "chain": certificate.chain,
            "trust": trust,
            "endpoint": {"host": endpoint.host, "port": endpoint.port},
            "batch": unit.batch,
        },
        seconds=60,
    )
    installed = Answer("installed", agent.ask("installed"))
    where = installed.inner("endpoint")
    for what, found, expected in (
        ("certificate chain", installed.text("chain"), certificate.chain),
        ("trust bundle", installed.text("trust_sha256"), hashlib.sha256(trust.encode()).hexdigest()),
        ("endpoint", f"{where.text('host')}:{where.number('port'):.0f}", f"{endpoint.host}:{endpoint.port}"),
        ("batch", installed.text("batch"), unit.batch),
    ):
        if found != expected:
            raise UnitFault(f"the {what} read back from the unit is not the one that was written", advice=_ADVICE)
    step.note("endpoint", f"{endpoint.host}:{endpoint.port}")
    step.note("read_back", value=True)
    prove(agent, enrolment)
    step.note("proved_key", value=True)


def prove(agent: Agent, enrolment: Enrolment) -> None:
    """Have the unit sign a fresh nonce with the key of its certificate.

    Raises:
        UnitFault: the signature does not verify.
    """
    nonce = secrets.token_bytes(32)
    answer = Answer("prove", agent.ask("prove", {"nonce": base64.b64encode(nonce).decode()}, seconds=60))
    try:
        signature = base64.b64decode(answer.text("signature"), validate=True)
        public_key(enrolment.request).verify(signature, PROOF_CONTEXT + nonce, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error) as error:
        raise UnitFault(
            "the unit cannot sign with the key that was certified: another key is installed",
            advice="Run the unit again. If it happens twice, put it on the repair shelf.",
        ) from error
