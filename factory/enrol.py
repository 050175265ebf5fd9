"""Enrol: the unit makes its own key, where it can never leave it, and a CSR."""

from dataclasses import dataclass

from cryptography import x509

from factory.answers import Answer
from factory.authority import check_request, public_key_id
from factory.bench import Agent, Unit
from factory.errors import UnitFault
from factory.identify import Identity
from factory.record import Step


@dataclass(frozen=True)
class Enrolment:
    """A CSR that was checked, and where its key lives: `file` or `tpm`."""

    request: x509.CertificateSigningRequest
    key: str

    @property
    def public_key_id(self) -> str:
        """SHA-256 of the public key."""
        return public_key_id(self.request)


def enrol(agent: Agent, unit: Unit, identity: Identity, step: Step) -> Enrolment:
    """Have the unit make its key and CSR, and check them.

    Raises:
        UnitFault: the CSR may not be signed, or the key lives elsewhere than the unit said.
    """
    answer = Answer("enrol", agent.ask("enrol", {"serial": unit.serial}, seconds=90))
    key = answer.text("key")
    step.note("key", key)
    if key != identity.key_store:
        raise UnitFault(
            f"the unit is configured to keep its key in {identity.key_store}, but made it in {key}",
            advice="Put the unit on the repair shelf: a weaker key is never accepted silently.",
        )
    enrolment = Enrolment(check_request(answer.text("csr"), serial=unit.serial, board=identity.board), key)
    step.note("public_key_sha256", enrolment.public_key_id)
    return enrolment
