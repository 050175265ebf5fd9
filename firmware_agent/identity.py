"""The certificates in force: checked as a whole, installed as a whole.

A set is one directory that is never changed after it is complete; `identity` is a symlink to the set in force. So a
reader sees one set or the other, never a new leaf beside an old endpoint, and a plug pulled at any moment leaves the
old set or the new one.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from firmware_agent import files
from firmware_agent.errors import BadCertificate, KeyMismatch, WrongState, WrongSubject

_CHAIN: Final = "chain.pem"
_TRUST: Final = "trust.pem"
_ENDPOINT: Final = "endpoint.json"


@dataclass(frozen=True)
class Identity:
    """What burn-in brings: the unit's certificate and where it is to be used.

    Attributes:
        serial: the unit's; also the leaf's CN, the thing name and the client id.
        chain: PEM, the leaf first, then its issuer.
        trust: PEM, the roots that the endpoint's certificate must chain to.
        host: the endpoint's name, also the TLS server name.
        port: its TCP port.
        batch: the work order.
    """

    serial: str
    chain: str
    trust: str
    host: str
    port: int
    batch: str

    @property
    def leaf(self) -> x509.Certificate:
        """The unit's own certificate."""
        return x509.load_pem_x509_certificates(self.chain.encode())[0]

    @property
    def certificate_sha256(self) -> str:
        """Hex digest of the leaf's DER, which is the certificate's id in AWS IoT."""
        return hashlib.sha256(self.leaf.public_bytes(Encoding.DER)).hexdigest()

    @property
    def trust_sha256(self) -> str:
        """Hex digest of the trust bundle's text."""
        return hashlib.sha256(self.trust.encode()).hexdigest()


def _certificates(pem: str, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except ValueError as error:
        raise BadCertificate(f"the {what} is no PEM with certificates: {error}") from error


def _subject(leaf: x509.Certificate, oid: x509.ObjectIdentifier) -> list[str]:
    return [str(attribute.value) for attribute in leaf.subject.get_attributes_for_oid(oid)]


def check(identity: Identity, key: ec.EllipticCurvePublicKey, board: str) -> None:
    """Refuse certificates that are not this unit's.

    The validity dates are left to the TLS handshake: a unit fresh from the flasher may not know the time.

    Raises:
        BadCertificate: they do not parse, or the second did not issue the first.
        KeyMismatch: the leaf is for another key than `key`.
        WrongSubject: the leaf names another serial, or another board than `board`.
    """
    chain = _certificates(identity.chain, "chain")
    _certificates(identity.trust, "trust bundle")
    if len(chain) < 2:
        raise BadCertificate("the chain has one certificate; the leaf and its signing CA are needed")
    leaf, issuer = chain[:2]
    try:
        leaf.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise BadCertificate("the second certificate of the chain did not issue the first") from error
    if leaf.public_key() != key:
        raise KeyMismatch("the certificate is for another key than this unit's; enrol again and certify the new CSR")
    if _subject(leaf, NameOID.COMMON_NAME) != [identity.serial]:
        raise WrongSubject(f"the certificate names {_subject(leaf, NameOID.COMMON_NAME)}, not {identity.serial}")
    boards = _subject(leaf, NameOID.SERIAL_NUMBER)
    if boards and boards != [board]:
        raise WrongSubject(f"the certificate is for the board {boards}, not {board}")


def install(link: Path, identity: Identity) -> None:
    """Put `identity` in force behind the symlink `link`; the same set again changes nothing."""
    endpoint = {"host": identity.host, "port": identity.port, "batch": identity.batch, "serial": identity.serial}
    contents = {
        _CHAIN: identity.chain.encode(),
        _TRUST: identity.trust.encode(),
        _ENDPOINT: json.dumps(endpoint).encode(),
    }
    digest = hashlib.sha256(b"\0".join(contents[name] for name in sorted(contents))).hexdigest()[:16]
    sets = link.with_name(link.name + ".d")
    sets.mkdir(mode=0o700, exist_ok=True)
    new = sets / digest
    if not new.exists():
        files.write_directory(new, contents)
    files.point(link, f"{sets.name}/{digest}")
    for old in sets.iterdir():
        if old.name != digest:  # an older set, or what a crash left behind
            shutil.rmtree(old, ignore_errors=True)


def load(link: Path) -> Identity:
    """The identity in force, read from the disk.

    Raises:
        WrongState: nothing was burnt in yet.
    """
    try:
        directory = link.resolve(strict=True)
        endpoint = json.loads((directory / _ENDPOINT).read_bytes())
        return Identity(
            serial=endpoint["serial"],
            chain=(directory / _CHAIN).read_text(),
            trust=(directory / _TRUST).read_text(),
            host=endpoint["host"],
            port=endpoint["port"],
            batch=endpoint["batch"],
        )
    except FileNotFoundError as error:
        raise WrongState("nothing is burnt in yet; run burn-in first") from error
