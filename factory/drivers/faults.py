"""Faults that a simulated board can have, by name, and the unit that lies on the wire.

Each is one that a real line meets. The tests and the demo inject them through the bench file
(`faults = ["flipped-bit"]`), to see that the line stops in the step where it should.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from factory.bench import Agent, Shell
from factory.drivers.pir import PirFault
from factory.errors import UserMistake
from firmware_agent.wire import Banner

SMALL_MEDIUM = "small-medium"  # smaller than the image
FLIPPED_BIT = "flipped-bit"  # one bit of the medium changes after the write
NO_BANNER = "no-banner"  # the unit boots, but its console is dead
WRONG_HOST_KEY = "wrong-host-key"  # SSH shows another host key than the console
HOT = "hot"  # the SoC is at 97 degrees
WRONG_KEY = "wrong-key"  # the key that is installed is not the one that was enrolled
CSR_UNSIGNED = "csr-unsigned"  # the CSR is not signed by its own key
CSR_RSA = "csr-rsa-1024"  # the CSR holds an RSA-1024 key
CSR_OTHER = "csr-other-subject"  # the CSR speaks for another unit

KNOWN = frozenset(
    {SMALL_MEDIUM, FLIPPED_BIT, NO_BANNER, WRONG_HOST_KEY, HOT, WRONG_KEY, CSR_UNSIGNED, CSR_RSA, CSR_OTHER, *PirFault}
)


_Change = Callable[[dict[str, Any]], dict[str, Any]]


def chosen(options: Mapping[str, Any], known: Iterable[str]) -> frozenset[str]:
    """The faults that a board's options name.

    Raises:
        UserMistake: they are no list of known faults.
    """
    named = options.get("faults", [])
    advice = f"Faults: {', '.join(sorted(known))}."
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise UserMistake('board.faults must be a list of names, e.g. ["hot"]', advice=advice)
    if unknown := sorted(set(named) - set(known)):
        raise UserMistake(f"board.faults: no fault is called {', '.join(unknown)}", advice=advice)
    return frozenset(named)


def tpm_wanted(options: Mapping[str, Any]) -> bool | None:
    """Whether a board's options ask for a TPM; None if they leave it open.

    Raises:
        UserMistake: `tpm` is neither true nor false.
    """
    wanted = options.get("tpm")
    if wanted is not None and not isinstance(wanted, bool):
        raise UserMistake(f"board.tpm must be true or false, not {wanted!r}")
    return wanted


def tampered(shell: Shell, faults: frozenset[str]) -> Shell:
    """The way into a unit whose answers are what its faults make of the agent's."""
    made = [change for name, change in _CHANGES.items() if name in faults]
    return _TamperedShell(shell, made) if made else shell


class _TamperedShell:
    """Somebody sits on the wire and changes the unit's CSR."""

    def __init__(self, shell: Shell, changes: list[_Change]) -> None:
        self._shell = shell
        self._changes = changes

    @contextmanager
    def open(self, banner: Banner) -> Iterator[Agent]:
        with self._shell.open(banner) as agent:
            yield _TamperedAgent(agent, self._changes)

    def closed(self, banner: Banner) -> bool:
        return self._shell.closed(banner)


class _TamperedAgent:
    def __init__(self, agent: Agent, changes: list[_Change]) -> None:
        self._agent = agent
        self._changes = changes

    def ask(
        self,
        verb: str,
        params: Mapping[str, Any] | None = None,
        *,
        seconds: float = 30.0,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        result = self._agent.ask(verb, params, seconds=seconds, on_event=on_event)
        if verb == "enrol":
            for change in self._changes:
                result = change(result)
        return result


def _subject(result: dict[str, Any]) -> x509.Name:
    return x509.load_pem_x509_csr(result["csr"].encode()).subject


def _unsigned(result: dict[str, Any]) -> dict[str, Any]:
    request = x509.load_pem_x509_csr(result["csr"].encode())
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der))
    return result | {"csr": broken.public_bytes(serialization.Encoding.PEM).decode()}


def _rsa(result: dict[str, Any]) -> dict[str, Any]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505  (weak on purpose)
    return result | {"csr": _csr(_subject(result), key)}


def _other_subject(result: dict[str, Any]) -> dict[str, Any]:
    name = x509.Name(
        [
            x509.NameAttribute(one.oid, "PK-999999") if one.oid == NameOID.COMMON_NAME else one
            for one in _subject(result)
        ]
    )
    return result | {"csr": _csr(name, ec.generate_private_key(ec.SECP256R1()))}


def _other_key(result: dict[str, Any]) -> dict[str, Any]:
    return result | {"csr": _csr(_subject(result), ec.generate_private_key(ec.SECP256R1()))}


def _csr(name: x509.Name, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


_CHANGES: dict[str, _Change] = {
    CSR_UNSIGNED: _unsigned,
    CSR_RSA: _rsa,
    CSR_OTHER: _other_subject,
    WRONG_KEY: _other_key,
}

#: Faults of what travels between unit and station: any board can have them.
WIRE = frozenset(_CHANGES)
