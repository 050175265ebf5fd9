"""The certificates in force: checked as a whole, installed as a whole.

A set is one directory that is never changed after it is complete; `identity` is a symlink to the set in force. So a
reader sees one set or the other, never a new leaf beside an old endpoint, and a plug pulled at any moment leaves the
old set or the new one. The set also names the slot of its key, so that one rename switches the pair.

While a certificate is rotated there are two sets, each known by its name: `write` adds one, `use` puts one in force,
and `keep_only_in_force` ends it. All three can be repeated.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firmware_agent import certificate, files
from firmware_agent.digests import digest
from firmware_agent.errors import BadCertificate, KeyMismatch, WrongState, WrongSubject

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

_CHAIN: Final = "chain.pem"
_TRUST: Final = "trust.pem"
_ENDPOINT: Final = "endpoint.json"

#: Whom AWS names in a certificate that it made from a CSR without a name.
_NAMELESS: Final = "AWS IoT Certificate"


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
        slot: of the key that the leaf is for (`firmware_agent.keys`); "" is the factory's.
        rotation: which rotation brought it; "" for the factory's.
        replaces: the name of the set that it replaced; "" for the factory's.
    """

    serial: str
    chain: str
    trust: str
    host: str
    port: int
    batch: str
    slot: str = ""
    rotation: str = ""
    replaces: str = ""

    @property
    def leaf(self) -> "x509.Certificate":
        """The unit's own certificate."""
        from cryptography import x509  # noqa: PLC0415 - ten megabytes that the running agent does without

        return x509.load_pem_x509_certificates(self.chain.encode())[0]

    @property
    def certificate_sha256(self) -> str:
        """Hex digest of the leaf's DER, which is the certificate's id in AWS IoT."""
        return certificate.sha256(self.chain)

    @property
    def validity(self) -> certificate.Validity:
        """When the leaf is good."""
        return certificate.validity(self.chain)

    @property
    def trust_sha256(self) -> str:
        """Hex digest of the trust bundle's text."""
        return digest(self.trust.encode())


def _certificates(pem: str, what: str) -> "list[x509.Certificate]":
    from cryptography import x509  # noqa: PLC0415 - ten megabytes that the running agent does without

    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except ValueError as error:
        raise BadCertificate(f"the {what} is no PEM with certificates: {error}") from error


def _subject(leaf: "x509.Certificate", oid: "x509.ObjectIdentifier") -> list[str]:
    return [str(attribute.value) for attribute in leaf.subject.get_attributes_for_oid(oid)]


def check(identity: Identity, key: "ec.EllipticCurvePublicKey", board: str) -> None:
    """Refuse certificates that are not this unit's.

    The validity dates are left to the TLS handshake: a unit fresh from the flasher may not know the time.

    A certificate that came by rotation stands alone and may name nobody: AWS signs it with a CA of its own, which is in
    no chain of ours, and only its key says whose it is (docs/adr/0058). What the factory burns in must have both.

    Raises:
        BadCertificate: they do not parse, or the second did not issue the first.
        KeyMismatch: the leaf is for another key than `key`.
        WrongSubject: the leaf names another serial, or another board than `board`.
    """
    from cryptography.x509.oid import NameOID  # noqa: PLC0415 - ten megabytes that the running agent does without

    chain = _certificates(identity.chain, "chain")
    _certificates(identity.trust, "trust bundle")
    leaf = chain[0]
    if not identity.slot:
        _check_issuer(chain)
    if leaf.public_key() != key:
        raise KeyMismatch("the certificate is for another key than this unit's; enrol again and certify the new CSR")
    names, boards = _subject(leaf, NameOID.COMMON_NAME), _subject(leaf, NameOID.SERIAL_NUMBER)
    if names != [identity.serial] and not (identity.slot and names in ([], [_NAMELESS])):
        raise WrongSubject(f"the certificate names {names}, not {identity.serial}")
    if boards and boards != [board]:
        raise WrongSubject(f"the certificate is for the board {boards}, not {board}")


def _check_issuer(chain: "list[x509.Certificate]") -> None:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - ten megabytes that the running agent does without

    if len(chain) < 2:
        raise BadCertificate("the chain has one certificate; the leaf and its signing CA are needed")
    try:
        chain[0].verify_directly_issued_by(chain[1])
    except (ValueError, TypeError, InvalidSignature) as error:
        raise BadCertificate("the second certificate of the chain did not issue the first") from error


def install(link: Path, identity: Identity) -> None:
    """Put `identity` in force behind the symlink `link`, and no other; the same set again changes nothing."""
    use(link, write(link, identity))
    keep_only_in_force(link)


def write(link: Path, identity: Identity) -> str:
    """Keep `identity` beside the one in force, whole and durable; the name of its set, which its content decides."""
    endpoint: dict[str, str | int] = {
        "host": identity.host,
        "port": identity.port,
        "batch": identity.batch,
        "serial": identity.serial,
    }
    if identity.slot:
        endpoint |= {"slot": identity.slot, "rotation": identity.rotation, "replaces": identity.replaces}
    contents = {
        _CHAIN: identity.chain.encode(),
        _TRUST: identity.trust.encode(),
        _ENDPOINT: json.dumps(endpoint).encode(),
    }
    name = digest(b"\0".join(contents[name] for name in sorted(contents)))[:16]
    sets = _sets(link)
    if not sets.is_dir():
        files.make_directory(sets, 0o700)
        files.sync_directory(sets.parent)
    if (sets / name).exists():
        files.sync_directory(sets)  # a process that was killed may have left this undone
    else:
        files.write_directory(sets / name, contents)
    return name


def use(link: Path, name: str) -> None:
    """Put the set `name` in force, atomically and durably."""
    files.point(link, f"{_sets(link).name}/{name}")


def in_force(link: Path) -> str:
    """The name of the set in force.

    Raises:
        WrongState: nothing was burnt in yet.
    """
    try:
        return link.readlink().name
    except FileNotFoundError as error:
        raise WrongState("nothing is burnt in yet; run burn-in first") from error


def others(link: Path) -> tuple[str, ...]:
    """The names of the sets that are not in force; none is half a set."""
    now = in_force(link)
    return tuple(sorted(one.name for one in _sets(link).iterdir() if one.name != now and not one.name.startswith(".")))


def keep_only_in_force(link: Path) -> None:
    """Remove all other sets, and what crashes left behind; durably.

    Raises:
        OSError: something cannot be removed.
    """
    now = in_force(link)
    for old in sorted(_sets(link).iterdir()):
        if old.name != now:
            files.remove(old)
    for half in link.parent.glob(f".{link.name}.*.new"):
        files.remove(half)
    files.sync_directory(_sets(link))


def load(link: Path, name: str | None = None) -> Identity:
    """An identity, read from the disk: the one in force, or the set `name`.

    Raises:
        WrongState: nothing was burnt in yet, or there is no such set.
    """
    try:
        directory = link.resolve(strict=True) if name is None else _sets(link) / name
        endpoint = json.loads((directory / _ENDPOINT).read_bytes())
        return Identity(
            serial=endpoint["serial"],
            chain=(directory / _CHAIN).read_text(),
            trust=(directory / _TRUST).read_text(),
            host=endpoint["host"],
            port=endpoint["port"],
            batch=endpoint["batch"],
            slot=endpoint.get("slot", ""),
            rotation=endpoint.get("rotation", ""),
            replaces=endpoint.get("replaces", ""),
        )
    except FileNotFoundError as error:
        raise WrongState("nothing is burnt in yet; run burn-in first") from error


def _sets(link: Path) -> Path:
    return link.with_name(link.name + ".d")
