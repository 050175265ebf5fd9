"""Connect: the unit's first connections to the cloud, seen from the cloud's side.

The first connection of a new certificate is dropped: that is just-in-time provisioning at work (AWS IoT developer
guide, "Just-in-time provisioning"). The next one holds. Then the station looks where the fleet looks: the certificate
is ACTIVE, the thing stands with the right attributes and this certificate, and the unit's message has arrived.
"""

import secrets
import time
from collections.abc import Callable
from typing import Any

from factory.answers import Answer
from factory.bench import Agent, Cloud, Unit
from factory.certify import DeviceCertificate
from factory.errors import CloudFault, UnitFault
from factory.identify import Identity
from factory.limits import ProductLimits
from factory.record import Step

ATTEMPTS = 8
#: AWS IoT takes one CONNECT a second from a client id.
WAIT_SECONDS = 1.0
SEEN_SECONDS = 20.0


def connect(
    agent: Agent,
    cloud: Cloud,
    unit: Unit,
    identity: Identity,
    certificate: DeviceCertificate,
    limits: ProductLimits,
    step: Step,
) -> None:
    """Have the unit connect, and look at it from the cloud's side.

    Raises:
        UnitFault: the unit cannot connect although nothing is wrong with the cloud.
        CloudFault: the cloud did not provision it; the message names why, where that can be told.
    """
    fresh = cloud.certificate(certificate.id) is None
    nonce = secrets.token_hex(16)
    outcomes: list[str] = []

    def attempt(event: dict[str, Any]) -> None:
        outcomes.append(str(event.get("outcome")))
        step.progress(len(outcomes), ATTEMPTS, f"attempt {len(outcomes)}: {outcomes[-1]}")

    answer = Answer(
        "connect",
        agent.ask(
            "connect",
            {"nonce": nonce, "attempts": ATTEMPTS, "wait_seconds": WAIT_SECONDS},
            seconds=ATTEMPTS * (WAIT_SECONDS + 45),
            on_event=attempt,
        ),
    )
    attempts = answer.each("attempts")
    outcomes = [one.text("outcome") for one in attempts]
    step.note("attempts", ", ".join(outcomes))
    if not answer.flag("held"):
        raise _why_not(cloud, certificate, attempts)
    if fresh and outcomes[0] == "held":
        raise CloudFault(
            "the first connection of a new certificate held: it was not provisioned just in time",
            advice="Check that the signing CA is registered with the JITP template: ./station.py cloud register",
        )
    step.measure("connect_attempts", len(attempts), "attempts", limits.connect_attempts)
    _seen_by_cloud(cloud, unit, identity, certificate, nonce, step)


def _seen_by_cloud(
    cloud: Cloud, unit: Unit, identity: Identity, certificate: DeviceCertificate, nonce: str, step: Step
) -> None:
    known = cloud.certificate(certificate.id)
    status = None if known is None else known.status
    step.note("certificate_status", status)
    if status != "ACTIVE":
        raise CloudFault(f"the unit is connected, but its certificate is {status}", advice=_LOOK)
    thing = cloud.thing(unit.serial)
    if thing is None:
        raise CloudFault(f"the unit is connected, but there is no thing {unit.serial}", advice=_LOOK)
    expected = {"board": identity.board, "batch": unit.batch}
    found = {name: thing.attributes.get(name) for name in expected}
    step.note("thing", unit.serial)
    if found != expected:
        raise CloudFault(f"thing {unit.serial} has attributes {found}, not {expected}", advice=_LOOK)
    if certificate.id not in thing.certificate_ids:
        raise CloudFault(f"thing {unit.serial} does not hold this certificate", advice=_LOOK)
    others = [other for other in thing.certificate_ids if other != certificate.id and _live(cloud, other)]
    if others:
        raise CloudFault(
            f"thing {unit.serial} holds another live certificate: {', '.join(others)}",
            advice="Find out who holds it, revoke it, then run the unit again.",
        )

    def arrived() -> bool:
        device = cloud.device(unit.serial)
        return device is not None and device.nonce == nonce and device.certificate_id == certificate.id

    if not wait_until(arrived, SEEN_SECONDS):
        raise CloudFault(
            f"the unit's message was acknowledged, but did not arrive in the fleet's table within {SEEN_SECONDS:.0f} s",
            advice="Check the hello rule and the register_device function: `make cloud` deploys both.",
        )
    step.note("message_seen", value=True)


def _live(cloud: Cloud, certificate_id: str) -> bool:
    known = cloud.certificate(certificate_id)
    return known is not None and known.status in {"ACTIVE", "PENDING_ACTIVATION"}


_LOOK = "Deploy the cloud stack again (`make cloud`), then run the unit again."


def _why_not(cloud: Cloud, certificate: DeviceCertificate, attempts: list[Answer]) -> UnitFault | CloudFault:
    last = attempts[-1].text("outcome") if attempts else "none"
    detail = attempts[-1].text("detail") if attempts else ""
    reason = cloud.diagnose(certificate.pem)
    if reason is not None:
        return CloudFault(f"the cloud did not provision the unit: {reason}", advice=_LOOK)
    if last == "unreachable":
        return UnitFault(
            f"the unit cannot reach the cloud: {detail}",
            advice="Check the unit's network cable and the factory's network; then run the unit again.",
        )
    return UnitFault(
        f"no connection held in {len(attempts)} attempts; the last was {last}: {detail}",
        advice="Run the unit again. If the next unit fails too, run `python -m cloud doctor`.",
    )


def wait_until(condition: Callable[[], bool], seconds: float, every: float = 0.1) -> bool:
    """Ask `condition` until it holds or `seconds` are over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True
