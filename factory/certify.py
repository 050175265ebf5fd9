"""Certify: decide on the CSR, sign it, write the certificate down, and tell the cloud which unit it belongs to.

A unit never holds two live certificates: one that an earlier run issued for another key is retired in the cloud before
a new one is signed, whether or not it ever connected. Asked again for the same key, the same certificate is given.
"""

from dataclasses import dataclass

from cryptography import x509

from factory.authority import CertificateAuthority, certificate_id, make_leaf, public_key, to_pem
from factory.bench import Cloud, Unit
from factory.enrol import Enrolment
from factory.errors import UnitFault
from factory.identify import Identity
from factory.record import IssuedCertificate, Journal, Step


@dataclass(frozen=True)
class DeviceCertificate:
    """A unit's certificate with its chain. `id` is the SHA-256 of its DER, which is also AWS IoT's id of it."""

    id: str
    pem: str
    chain: str
    certificate: x509.Certificate


def certify(
    signing: CertificateAuthority,
    cloud: Cloud,
    journal: Journal,
    unit: Unit,
    identity: Identity,
    enrolment: Enrolment,
    step: Step,
) -> DeviceCertificate:
    """The unit's certificate: the one on record for this key, or a new one.

    Raises:
        UnitFault: the key was issued to another unit.
        CloudFault: an older certificate cannot be retired, or the unit cannot be announced.
    """
    records = journal.records
    known = records.certificate_of_key(enrolment.public_key_id)
    if known is not None and known.serial != unit.serial:
        raise UnitFault(
            f"the key of {unit.serial} was already issued to {known.serial}: a cloned medium or TPM",
            advice=f"Take both units aside; revoke {known.serial} if its key may have been copied.",
        )
    for old in records.certificates(unit.serial):
        if old.retired is None and old != known:
            cloud.retire(old.pem, old.sha256)
            records.retire(old.sha256)
            step.note("retired", old.sha256)
    certificate = _issue(signing, journal, unit, identity, enrolment) if _unusable(known, signing) else _load(known)
    issued = DeviceCertificate(
        id=certificate_id(certificate),
        pem=to_pem(certificate),
        chain=to_pem(certificate) + signing.pem,
        certificate=certificate,
    )
    cloud.announce(unit.serial, issued.id, issued.pem, unit.batch)
    step.note("certificate", issued.id)
    step.note("issuer", certificate.issuer.rfc4514_string())
    step.note("not_after", certificate.not_valid_after_utc.isoformat())
    return issued


def _unusable(known: IssuedCertificate | None, signing: CertificateAuthority) -> bool:
    return known is None or known.retired is not None or _load(known).issuer != signing.certificate.subject


def _load(known: IssuedCertificate | None) -> x509.Certificate:
    if known is None:
        raise ValueError("no certificate on record")
    return x509.load_pem_x509_certificate(known.pem.encode())


def _issue(
    signing: CertificateAuthority, journal: Journal, unit: Unit, identity: Identity, enrolment: Enrolment
) -> x509.Certificate:
    certificate = make_leaf(
        signing, public_key(enrolment.request), serial=unit.serial, board=identity.board, batch=unit.batch
    )
    journal.records.issue(
        journal.run_id,
        unit.serial,
        sha256=certificate_id(certificate),
        public_key_sha256=enrolment.public_key_id,
        pem=to_pem(certificate),
    )
    return certificate
