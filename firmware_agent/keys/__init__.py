"""Where the device key lives, and what can be done with it there.

One file per place: `file_key` keeps it in a file that the agent alone may read, `tpm_key` in the TPM. Which one a unit
uses is fixed by its image or, with `probe-once`, by what the unit found when it was first asked: that finding is
written down before a key exists and never changes, so a TPM that breaks later stops the unit instead of making a weaker
key.
"""

from typing import Any, Literal, Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from firmware_agent import files
from firmware_agent.errors import KeyFault, NoTpm
from firmware_agent.keys import tpm
from firmware_agent.keys.file_key import FileKeys
from firmware_agent.keys.tpm_key import TpmKeys
from firmware_agent.settings import Settings

Grade = Literal["file", "tpm"]


class DeviceKey(Protocol):
    """The unit's P-256 key. It signs where it lives; the private half is never handed out."""

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half."""
        ...

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """A handle with which `cryptography`'s builders can sign; for a TPM key it holds no secret."""
        ...

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over `data`, as DER (RFC 3279 2.2.3)."""
        ...

    def tls(self, chain: str) -> Any:
        """`awscrt.io.TlsContextOptions` for a client that proves itself by this key and the PEM `chain`."""
        ...


class KeyStore(Protocol):
    """A place for the device key."""

    def ensure(self) -> DeviceKey:
        """The key, made now if there was none; durable before this returns.

        Raises:
            NoTpm: the place is a TPM and none is usable.
            KeyFault: what is there cannot be used.
        """
        ...

    def load(self) -> DeviceKey:
        """The key that was made before.

        Raises:
            WrongState: there is none yet.
            NoTpm: the place is a TPM and none is usable.
            KeyFault: what is there cannot be used.
        """
        ...

    def close(self) -> None:
        """Let go of the place; keys taken from it are of no use afterwards."""
        ...


def grade(settings: Settings) -> Grade:
    """Where this unit keeps its key; with `probe-once` the first call decides, durably, for ever.

    Raises:
        KeyFault: the recorded finding is unreadable. It is not looked for again: that would be the silent fallback.
        NoTpm: a TPM is there, but cannot be used; taking this for "no TPM" would be the silent fallback, too.
    """
    if settings.key.store in ("file", "tpm"):
        return "tpm" if settings.key.store == "tpm" else "file"
    record = settings.paths.key_store
    try:
        recorded = record.read_text().strip()
    except FileNotFoundError:
        recorded = _probe(settings.tpm.tcti)
        files.write_atomic(record, f"{recorded}\n".encode())
    if recorded not in ("file", "tpm"):
        raise KeyFault(f"{record} says {recorded!r}, which is no key store; this unit must go back to the factory")
    return "tpm" if recorded == "tpm" else "file"


def _probe(tcti: str) -> Grade:
    if tpm.present(tcti):
        return "tpm"
    if tpm.fitted(tcti):
        raise NoTpm(f"there is a TPM at {tcti}, but it does not answer; is the agent's user in the group tss?")
    return "file"


def open_store(settings: Settings) -> KeyStore:
    """The key store of this unit's grade."""
    if grade(settings) == "tpm":
        return TpmKeys(settings.tpm, pin=settings.paths.tpm_pin, store=settings.paths.tpm_store)
    return FileKeys(settings.paths.key_file)
