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
    """The file that the key is in."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ensure(self) -> FileKey:
        """The key, made now if there was none."""
        try:
            return self.load()
        except WrongState:
            files.write_atomic(self._path, _pem(ec.generate_private_key(ec.SECP256R1())), 0o600)
            return self.load()

    def load(self) -> FileKey:
        """The key that was made before."""
        try:
            pem = self._path.read_bytes()
        except FileNotFoundError as error:
            raise WrongState("this unit has no key yet; run enrol first") from error
        try:
            key = load_pem_private_key(pem, None)
        except (ValueError, TypeError) as error:
            raise KeyFault(f"{self._path} holds no key: {error}; this unit must be flashed again") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise KeyFault(f"{self._path} holds no P-256 key; this unit must be flashed again")
        return FileKey(key)

    def close(self) -> None:
        """Nothing to let go of."""


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    # SEC 1 ("EC PRIVATE KEY"): what aws-c-cal reads for sure; PKCS#8 EC is newer there.
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
