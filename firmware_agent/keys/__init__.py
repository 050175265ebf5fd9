"""Where the device key lives, and what can be done with it there.

One file per place: `file_key` keeps it in a file that the agent alone may read, `tpm_key` in the TPM. Which one a unit
uses is fixed by its image or, with `probe-once`, by what the unit found when it was first asked: that finding is
written down before a key exists and never changes, so a TPM that breaks later stops the unit instead of making a weaker
key.

A unit has one key, but while its certificate is rotated two: each lies in a slot of its own, whose name its certificate
set carries (`identity.Identity.slot`). The key of the factory is in the slot "".
"""

import re
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from firmware_agent import files
from firmware_agent.errors import KeyFault, NoTpm
from firmware_agent.keys import tpm
from firmware_agent.settings import Settings

if TYPE_CHECKING:  # ten megabytes that the running agent does without, as far as it can
    from cryptography.hazmat.primitives.asymmetric import ec

Grade = Literal["file", "tpm"]

#: What a slot may be called; it becomes part of a file's name, or of a label in the TPM.
_SLOT: Final = re.compile(r"(?:[0-9a-z]{1,32})?")


def valid_slot(name: str) -> bool:
    """Whether a slot can be called so."""
    return _SLOT.fullmatch(name) is not None


class DeviceKey(Protocol):
    """The unit's P-256 key. It signs where it lives; the private half is never handed out."""

    def public_key(self) -> "ec.EllipticCurvePublicKey":
        """The public half."""
        ...

    def private_key(self) -> "ec.EllipticCurvePrivateKey":
        """A handle with which `cryptography`'s builders can sign; for a TPM key it holds no secret."""
        ...

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over `data`, as DER (RFC 3279 2.2.3)."""
        ...

    def tls(self, chain: str) -> Any:
        """`awscrt.io.TlsContextOptions` for a client that proves itself by this key and the PEM `chain`."""
        ...


class KeyStore(Protocol):
    """A place for the device key, in slots that are `valid_slot`s."""

    def ensure(self, slot: str = "") -> DeviceKey:
        """The key in `slot`, made now if there was none; durable before this returns.

        Raises:
            NoTpm: the place is a TPM and none is usable.
            KeyFault: what is there cannot be used.
        """
        ...

    def load(self, slot: str = "") -> DeviceKey:
        """The key that was made before.

        Raises:
            WrongState: there is none yet.
            NoTpm: the place is a TPM and none is usable.
            KeyFault: what is there cannot be used.
        """
        ...

    def vetted(self, slot: str = "") -> DeviceKey:
        """As `load`, of a key that was just looked at (`firmware_agent.vetting`): not once more, if that can be saved.

        Raises:
            WrongState, NoTpm, KeyFault: as `load`.
        """
        ...

    def remove(self, slot: str) -> None:
        """Destroy the key in `slot`, for good; nothing when there is none.

        Raises:
            NoTpm: the place is a TPM and none is usable.
            KeyFault: it cannot be removed.
        """
        ...

    def slots(self) -> tuple[str, ...]:
        """The slots that hold a key, or what is left of one.

        Raises:
            NoTpm: the place is a TPM and none is usable.
            KeyFault: the place cannot be looked at.
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
        from firmware_agent.keys.tpm_key import TpmKeys  # noqa: PLC0415 - each unit needs one of the two

        return TpmKeys(settings.tpm, pin=settings.paths.tpm_pin, store=settings.paths.tpm_store)
    from firmware_agent.keys.file_key import FileKeys  # noqa: PLC0415

    return FileKeys(settings.paths.key_file)
