"""The device key in a file: mode 0600, complete and durable before anything refers to it."""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from firmware_agent import files
from firmware_agent.errors import KeyFault, WrongState


class FileKey:
    """A P-256 key held in memory."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half."""
        return self._key.public_key()

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """The key itself, for builders."""
        return self._key

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over `data`, as DER."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))

    def tls(self, chain: str) -> Any:
        """TLS client options with this key and `chain`."""
        from awscrt.io import TlsContextOptions  # noqa: PLC0415 - 12 MB of native code, only when a connection is made

        return TlsContextOptions.create_client_with_mtls(chain.encode(), _pem(self._key))


class FileKeys:
    """The files that keys are in: `key.pem` the factory's, `key-<slot>.pem` those that followed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ensure(self, slot: str = "") -> FileKey:
        """The key, made now if there was none."""
        try:
            return self.load(slot)
        except WrongState:
            files.write_atomic(self._file(slot), _pem(ec.generate_private_key(ec.SECP256R1())), 0o600)
            return self.load(slot)

    def load(self, slot: str = "") -> FileKey:
        """The key that was made before."""
        path = self._file(slot)
        try:
            pem = path.read_bytes()
        except FileNotFoundError as error:
            raise WrongState("this unit has no key yet; run enrol first") from error
        try:
            key = load_pem_private_key(pem, None)
        except (ValueError, TypeError) as error:
            raise KeyFault(f"{path} holds no key: {error}; this unit must be flashed again") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise KeyFault(f"{path} holds no P-256 key; this unit must be flashed again")
        return FileKey(key)

    def remove(self, slot: str) -> None:
        """Unlink the key's file, and what a crash may have left of its making."""
        path = self._file(slot)
        try:
            for one in (path, *path.parent.glob(f".{path.name}.*.new")):
                files.remove(one)
            files.sync_directory(path.parent)
        except OSError as error:
            raise KeyFault(f"{path} cannot be removed: {error.strerror}") from error

    def slots(self) -> tuple[str, ...]:
        """By the names of the files."""
        stem, suffix = self._path.stem, self._path.suffix
        found = [""] if self._path.exists() else []
        found += [path.stem.removeprefix(f"{stem}-") for path in self._path.parent.glob(f"{stem}-*{suffix}")]
        return tuple(sorted(found))

    def close(self) -> None:
        """Nothing to let go of."""

    def _file(self, slot: str) -> Path:
        return self._path.with_name(f"{self._path.stem}-{slot}{self._path.suffix}") if slot else self._path


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    # SEC 1 ("EC PRIVATE KEY"): what aws-c-cal reads for sure; PKCS#8 EC is newer there.
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
