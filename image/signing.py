"""Detached signatures in OpenSSH's form (PROTOCOL.sshsig), which `ssh-keygen -Y verify` checks.

The signed bytes name a namespace, so that a signature over one kind of thing never counts for another.
"""

import base64
import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from image import factory_key, hsm
from image.errors import SigningError

#: Where a build that names no key looks for one, and makes one for trying out.
DEFAULT_PATH = Path("build/keys/image")

BUNDLE: Final = "picket-os-bundle"
IMAGE: Final = "picket-image"
FACTORY_MODE: Final = "picket-factory-mode"

_MAGIC = b"SSHSIG"
_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_P256 = b"ecdsa-sha2-nistp256"
_ED25519 = b"ssh-ed25519"

PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Signer:
    """A key that signs, or only the public half of one.

    Attributes:
        public: its public half.
        raw: signs bytes: an Ed25519 key gives 64 bytes, a P-256 key ECDSA with SHA-256 in DER. None where the private
            half is somewhere else.
    """

    public: PublicKey
    raw: Callable[[bytes], bytes] | None

    @property
    def public_line(self) -> str:
        """The public half as OpenSSH writes it, without a comment."""
        return public_line(self.public)

    def sign(self, data: bytes, namespace: str) -> bytes:
        """An armored signature over `data`, for one namespace.

        Raises:
            SigningError: the key cannot be reached.
        """
        if self.raw is None:
            raise SigningError("only the public half of the key is here, which signs nothing: name the private one")
        signature = self.raw(_signed(data, namespace, b"sha512"))
        if isinstance(self.public, Ed25519PublicKey):
            inner = _string(_ED25519) + _string(signature)
        else:
            numbers = utils.decode_dss_signature(signature)
            inner = _string(_P256) + _string(b"".join(_mpint(number) for number in numbers))
        key = base64.b64decode(self.public_line.split()[1])
        blob = _MAGIC + struct.pack(">I", 1)
        blob += b"".join(map(_string, (key, namespace.encode(), b"", b"sha512", inner)))
        text = base64.b64encode(blob).decode()
        lines = [text[start : start + 70] for start in range(0, len(text), 70)]
        return "\n".join([_BEGIN, *lines, _END, ""]).encode()


def open_signer(uri: str) -> Signer:
    """The signer behind a URI.

    `file:PATH`, `file:PATH?passphrase-file=PATH`, `pkcs11:...` (see `image.hsm`), or `public:PATH` (signs nothing).

    Raises:
        SigningError: no such key, or one of another kind than Ed25519 and P-256.
    """
    if uri.startswith("file:"):
        path, _, query = uri.removeprefix("file:").partition("?")
        return _file_signer(Path(unquote(path)), query)
    if uri.startswith("pkcs11:"):
        token = hsm.parse(uri)
        public = hsm.public_key(token)
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
            raise SigningError(f"{token} is no P-256 key, which is what signs images")
        return Signer(public, lambda data: hsm.ecdsa(token, hashlib.sha256(data).digest()))
    if uri.startswith("public:"):
        return _only_public(Path(unquote(uri.removeprefix("public:"))))
    raise SigningError(f"the key {uri!r} begins with none of file:, pkcs11: and public:")


def ensure(path: Path = DEFAULT_PATH) -> Path:
    """Make an Ed25519 key for trying out at `path` (and `path`.pub) if there is none; another is left alone."""
    return path if path.exists() else factory_key.ensure(path, "image")


def public_line(key: PublicKey) -> str:
    """A public key as OpenSSH writes it, without a comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def fingerprint(line: str) -> str:
    """How `ssh-keygen -l` names the key of a public line: `SHA256:...`."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def allowed_signers(public_lines: Iterable[str], namespaces: Iterable[str]) -> str:
    """The text of an allowed-signers file; everybody in it goes by the name `image`."""
    names = ",".join(namespaces)
    return "".join(f'image namespaces="{names}" {" ".join(line.split()[:2])}\n' for line in public_lines)


def check(signature: bytes, data: bytes, namespace: str) -> str:
    """The public line of the key that made a signature over `data`; whether it is trusted is the caller's to say.

    Raises:
        SigningError: it is no signature over these bytes for this namespace by an Ed25519 or a P-256 key.
    """
    key, named, reserved, algorithm, inner = _unpack(signature)
    if named != namespace.encode():
        raise SigningError(f"the signature is for {named.decode(errors='replace')!r:.60}, not for {namespace!r}")
    if algorithm not in {b"sha256", b"sha512"} or reserved:
        raise SigningError("the signature uses what this version does not know")
    signed = _signed(data, namespace, algorithm)
    try:
        kind, raw = _strings(inner, 2)
        public = serialization.load_ssh_public_key(_strings(key, 1, rest=True)[0] + b" " + base64.b64encode(key))
        if isinstance(public, Ed25519PublicKey) and kind == _ED25519:
            public.verify(raw, signed)
            return public_line(public)
        if isinstance(public, ec.EllipticCurvePublicKey) and kind == _P256:
            r, s = (int.from_bytes(number, "big") for number in _strings(raw, 2))
            public.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
            return public_line(public)
    except InvalidSignature as error:
        raise SigningError("the signature does not fit what was signed: one of the two was changed") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningError(f"the signature is malformed: {error}") from error
    raise SigningError("the signature is by a key that is neither Ed25519 nor P-256")


def _only_public(path: Path) -> Signer:
    key = serialization.load_ssh_public_key(factory_key.read_public(path).encode())
    if isinstance(key, Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    ):
        return Signer(key, None)
    raise SigningError(f"{path} is neither an Ed25519 nor a P-256 key")


def _file_signer(path: Path, query: str) -> Signer:
    passphrase = None
    name, _, value = query.partition("=")
    if query and name != "passphrase-file":
        raise SigningError(f"file: takes passphrase-file= and nothing else, not {name!r}")
    try:
        if value:
            passphrase = Path(unquote(value)).read_bytes().rstrip(b"\r\n")
        key = serialization.load_ssh_private_key(path.read_bytes(), passphrase)
    except OSError as error:
        raise SigningError(f"the signing key cannot be read: {error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SigningError(f"{path} cannot be opened as an OpenSSH key ({error}); has it a passphrase?") from error
    if isinstance(key, Ed25519PrivateKey):
        return Signer(key.public_key(), key.sign)
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        private = key
        return Signer(key.public_key(), lambda data: private.sign(data, ec.ECDSA(hashes.SHA256())))
    raise SigningError(f"{path} is neither an Ed25519 nor a P-256 key")


def _signed(data: bytes, namespace: str, algorithm: bytes) -> bytes:
    digest = hashlib.new(algorithm.decode(), data).digest()
    return _MAGIC + b"".join(map(_string, (namespace.encode(), b"", algorithm, digest)))


def _unpack(signature: bytes) -> list[bytes]:
    lines = signature.decode("ascii", errors="replace").split()
    text = "".join(lines[3:-3])
    if " ".join(lines[:3]) != _BEGIN or " ".join(lines[-3:]) != _END:
        raise SigningError("this is no SSH signature")
    try:
        blob = base64.b64decode(text, validate=True)
        if blob[:10] != _MAGIC + struct.pack(">I", 1):
            raise SigningError("this is no SSH signature of version 1")
        return _strings(blob[10:], 5)
    except ValueError as error:
        raise SigningError(f"the signature is malformed: {error}") from error


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _mpint(number: int) -> bytes:
    return _string(number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _strings(data: bytes, count: int, *, rest: bool = False) -> list[bytes]:
    found = []
    for _ in range(count):
        end = 4 + int.from_bytes(data[:4], "big")
        if len(data) < max(end, 4):
            raise ValueError("it ends too early")
        found.append(data[4:end])
        data = data[end:]
    if data and not rest:
        raise ValueError("it goes on behind its end")
    return found
