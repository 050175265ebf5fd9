"""The device key in a file: mode 0600, complete and durable before anything refers to it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from firmware_agent import files
from firmware_agent.errors import KeyFault, WrongState

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec


class FileKey:
    """A P-256 key held in memory, as the file has it: a connection needs no more than its text.

    Args:
        pem: the file's content.
        path: where it came from, for messages.

    Raises:
        KeyFault: by each method but `tls`, which leaves it to the SDK: it is no P-256 key.
    """

    def __init__(self, pem: bytes, path: Path) -> None:
        self._pem = pem
        self._path = path
        self._parsed: ec.EllipticCurvePrivateKey | None = None

    def public_key(self) -> "ec.EllipticCurvePublicKey":
        """The public half."""
        return self.private_key().public_key()

    def private_key(self) -> "ec.EllipticCurvePrivateKey":
        """The key itself, for builders."""
        if self._parsed is None:
            self._parsed = _parse(self._pem, self._path)
        return self._parsed

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over `data`, as DER."""
        from cryptography.hazmat.primitives import hashes  # noqa: PLC0415 - ten megabytes that the running agent does without
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

        return self.private_key().sign(data, ec.ECDSA(hashes.SHA256()))

    def tls(self, chain: str) -> Any:
        """TLS client options with this key and `chain`."""
        from awscrt.io import TlsContextOptions  # noqa: PLC0415 - 12 MB of native code, only when a connection is made

        return TlsContextOptions.create_client_with_mtls(chain.encode(), self._pem)


class FileKeys:
    """The files that keys are in: `key.pem` the factory's, `key-<slot>.pem` those that followed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ensure(self, slot: str = "") -> FileKey:
        """The key, made now if there was none."""
        try:
            return self.load(slot)
        except WrongState:
            files.write_atomic(self._file(slot), _generate(), 0o600)
            return self.load(slot)

    def load(self, slot: str = "") -> FileKey:
        """The key that was made before, looked at."""
        key = self.vetted(slot)
        key.private_key()
        return key

    def vetted(self, slot: str = "") -> FileKey:
        """The key that was made before, and that somebody else has just looked at."""
        path = self._file(slot)
        try:
            pem = path.read_bytes()
        except FileNotFoundError as error:
            raise WrongState("this unit has no key yet; run enrol first") from error
        return FileKey(pem, path)

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


def _parse(pem: bytes, path: Path) -> "ec.EllipticCurvePrivateKey":
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - ten megabytes that the running agent does without
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise KeyFault(f"{path} holds no key: {error}; this unit must be flashed again") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KeyFault(f"{path} holds no P-256 key; this unit must be flashed again")
    return key


def _generate() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - ten megabytes that the running agent does without
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    # SEC 1 ("EC PRIVATE KEY"): what aws-c-cal reads for sure; PKCS#8 EC is newer there.
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
