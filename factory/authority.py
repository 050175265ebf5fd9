"""The authority: root CA, signing CA, and the decision to sign a unit's CSR.

Profiles follow RFC 5280 and IEEE 802.1AR; a device certificate takes nothing from the CSR but its public key. The
decision (`check_request`) and the profiles are pure; `Authority` holds the signing key and writes every certificate
down before it hands it out.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from factory.errors import SignerFault, UnitFault, UserMistake
from factory.files import write_whole

ORGANISATION = "Picket"

#: IEEE 802.1AR-2018 and RFC 5280 4.1.2.5: a device identity has no well-defined end.
NO_END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)

#: An authority's files, in the order in which they are written.
FILES = ("root.key", "signing.key", "root.pem", "signing.pem")

ROOT_YEARS = 20
SIGNING_YEARS = 3

_MISCREATED = "Put the unit on the repair shelf and report it: this does not happen by wear."


@dataclass(frozen=True)
class CertificateAuthority:
    """A CA's certificate with its key in memory."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        """The certificate in PEM."""
        return to_pem(self.certificate)


def to_pem(certificate: x509.Certificate) -> str:
    """A certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def certificate_id(certificate: x509.Certificate) -> str:
    """AWS IoT's id of a certificate: SHA-256 of its DER, in hex."""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def public_key_id(key: x509.CertificateSigningRequest | x509.Certificate) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, in hex: names a key whatever certificate it sits in."""
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


# --- profiles -----------------------------------------------------------------------------------------------------


def _name(common_name: str, **more: str) -> x509.Name:
    oids = {"unit": NameOID.ORGANIZATIONAL_UNIT_NAME, "serial": NameOID.SERIAL_NUMBER}
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
            *(x509.NameAttribute(oids[kind], value) for kind, value in more.items()),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, sign: bool = False, certify: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        key_cert_sign=certify,
        crl_sign=certify,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def make_root(start: datetime) -> CertificateAuthority:
    """A root CA: P-384, self-signed, one CA below it."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"{ORGANISATION} Root {secrets.token_hex(4)}")
    certificate = (
        _builder(name, name, key.public_key(), start, start + timedelta(days=365 * ROOT_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_usage(certify=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return CertificateAuthority(certificate, key)


def make_signing(root: CertificateAuthority, start: datetime, years: float = SIGNING_YEARS) -> CertificateAuthority:
    """A signing CA below `root`: P-256, signs devices only. Its CN is its own, for AWS takes ten CAs of one subject."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(
            _name(f"{ORGANISATION} Signing {secrets.token_hex(4)}"),
            root.certificate.subject,
            key.public_key(),
            start,
            start + timedelta(days=365 * years),
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certify=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key()), critical=False)
        .sign(root.key, hashes.SHA384())
    )
    return CertificateAuthority(certificate, key)


def make_leaf(
    signing: CertificateAuthority,
    key: ec.EllipticCurvePublicKey,
    *,
    serial: str,
    board: str,
    batch: str,
) -> x509.Certificate:
    """A device certificate (an 802.1AR IDevID): CN = serial, serialNumber = board, OU = batch; for TLS clients only.

    It is valid from the signing CA's own beginning, for a Pi has no clock until it has seen a network.
    """
    return (
        _builder(
            _name(serial, unit=batch, serial=board),
            signing.certificate.subject,
            key,
            signing.certificate.not_valid_before_utc,
            NO_END,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.key.public_key()), critical=False)
        .sign(signing.key, hashes.SHA256())
    )


def make_verification(signing: CertificateAuthority, registration_code: str) -> x509.Certificate:
    """AWS IoT's proof that we hold the signing key: a certificate whose CN is the account's registration code."""
    key = ec.generate_private_key(ec.SECP256R1())
    start = datetime.now(UTC) - timedelta(hours=1)
    return (
        _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, registration_code)]),
            signing.certificate.subject,
            key.public_key(),
            start,
            start + timedelta(days=2),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(signing.key, hashes.SHA256())
    )


# --- the decision -------------------------------------------------------------------------------------------------


def check_request(pem: str, *, serial: str, board: str) -> x509.CertificateSigningRequest:
    """A unit's CSR, if we may sign it: a P-256 key that the unit holds, asked for by this unit under its own name.

    Raises:
        UnitFault: we may not; the message says why.
    """
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        key = request.public_key()
        held = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise UnitFault(f"the CSR of {serial} cannot be read: {error}", advice=_MISCREATED) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        kind = f"RSA-{key.key_size}" if isinstance(key, rsa.RSAPublicKey) else type(key).__name__
        if isinstance(key, ec.EllipticCurvePublicKey):
            kind = key.curve.name
        raise UnitFault(f"the CSR of {serial} holds a key of kind {kind}, not P-256", advice=_MISCREATED)
    if not held:
        raise UnitFault(
            f"the CSR of {serial} is not signed by its own key: the unit does not prove that it holds the private key",
            advice=_MISCREATED,
        )
    for what, oid, expected in (
        ("CN", NameOID.COMMON_NAME, serial),
        ("serialNumber", NameOID.SERIAL_NUMBER, board),
    ):
        found = [str(attribute.value) for attribute in request.subject.get_attributes_for_oid(oid)]
        if found != [expected]:
            raise UnitFault(
                f"the CSR's {what} is {' + '.join(found) or 'missing'}, not {expected}: it speaks for another unit",
                advice="Check that the label belongs to this board, then run it again.",
            )
    return request


def public_key(request: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    """The P-256 key of a request that `check_request` has passed."""
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError("not an elliptic-curve key")
    return key


# --- the authority's files ----------------------------------------------------------------------------------------


def create_authority(directory: Path, passphrase: bytes) -> CertificateAuthority:
    """Make root and signing CA in `directory`, keys encrypted with `passphrase`. Never overwrites.

    Raises:
        UserMistake: there is an authority, or a part of one, already; the passphrase is too short; or nothing can be
            written there.
    """
    if len(passphrase) < 12:
        raise UserMistake("the passphrase is shorter than 12 characters", advice="Choose a longer one.")
    found = [name for name in FILES if (directory / name).exists()]
    if set(found) >= {"signing.pem", "signing.key"}:
        raise UserMistake(
            f"{directory} holds an authority already",
            advice="Use it, or name another directory. An authority is never overwritten: its devices live on it.",
        )
    if found:
        raise UserMistake(
            f"{directory} holds a part of an authority already: {', '.join(found)}",
            advice="Restore the rest from its backup, or move the folder away: an authority is never overwritten.",
        )
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    root = make_root(start)
    signing = make_signing(root, start)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, authority in (("root", root), ("signing", signing)):
            write_whole(directory / f"{name}.key", _encrypted(authority.key, passphrase))
        write_whole(directory / "root.pem", root.pem.encode(), mode=0o644)
        write_whole(directory / "signing.pem", signing.pem.encode(), mode=0o644)
    except OSError as error:
        raise UserMistake(
            f"an authority cannot be written to {directory}: {error.strerror}", advice="Name another directory."
        ) from error
    return signing


def load_signing(directory: Path, passphrase: bytes) -> CertificateAuthority:
    """The signing CA, ready to sign.

    Raises:
        UserMistake: there is none, or the passphrase is wrong.
        SignerFault: its files are damaged, do not belong together, or it has expired.
    """
    certificate = load_signing_certificate(directory)
    try:
        key = serialization.load_pem_private_key((directory / "signing.key").read_bytes(), passphrase)
    except FileNotFoundError as error:
        raise SignerFault(f"{directory}/signing.key is missing", advice="Restore it from its backup.") from error
    except OSError as error:
        raise SignerFault(
            f"{directory}/signing.key cannot be read: {error.strerror}", advice="Check `authority` in the bench file."
        ) from error
    except (ValueError, TypeError) as error:
        raise UserMistake(
            f"the passphrase does not open {directory}/signing.key", advice="Check the passphrase file."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise SignerFault(
            f"{directory}: signing.key is not the key of signing.pem", advice="Restore both from one backup."
        )
    return CertificateAuthority(certificate, key)


def load_signing_certificate(directory: Path) -> x509.Certificate:
    """The signing CA's certificate, checked for its dates.

    Raises:
        UserMistake: there is none.
        SignerFault: it cannot be read, or its time is over or has not come.
    """
    path = directory / "signing.pem"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError as error:
        raise UserMistake(
            f"there is no signing CA in {directory}", advice=f"Make one: ./station.py ca init --directory {directory}"
        ) from error
    except OSError as error:
        raise SignerFault(
            f"{path} cannot be read: {error.strerror}", advice="Check `authority` in the bench file."
        ) from error
    except ValueError as error:
        raise SignerFault(f"{path} is damaged: {error}", advice="Restore it from its backup.") from error
    moment = datetime.now(UTC)
    if moment > certificate.not_valid_after_utc:
        raise SignerFault(
            f"the signing CA in {directory} expired on {certificate.not_valid_after_utc:%Y-%m-%d}",
            advice="Make a new signing CA and register it with the cloud before the next unit.",
        )
    if moment < certificate.not_valid_before_utc:
        raise SignerFault(
            f"the signing CA in {directory} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d}",
            advice="Check the station's clock.",
        )
    return certificate


def _encrypted(key: ec.EllipticCurvePrivateKey, passphrase: bytes) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase),
    )
