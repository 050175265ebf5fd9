"""The key that signs boot images: RSA with 2048 bits, the only kind that Raspberry Pi's bootloader knows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

from image import hsm
from image.errors import SigningError

#: Bytes that are read of a key's file.
_LONGEST_KEY: Final = 1 << 16


@dataclass(frozen=True)
class BootSigner:
    """An RSA-2048 key: its public half, and what signs a SHA-256 digest with it."""

    public: rsa.RSAPublicKey
    raw: Callable[[bytes], bytes]


def open_boot_signer(uri: str) -> BootSigner:
    """The key behind `file:PATH` (PEM) or `pkcs11:...` (see `image.hsm`).

    Raises:
        SigningError: no such key, or it is not RSA with 2048 bits, the only kind that the bootloader knows.
    """
    if uri.startswith("pkcs11:"):
        token = hsm.parse(uri)
        public = hsm.public_key(token)
        if isinstance(public, rsa.RSAPublicKey) and public.key_size == 2048:
            return BootSigner(public, lambda digest: hsm.rsa_sha256(token, digest))
        raise SigningError(f"{token} is no RSA key of 2048 bits, which is what the bootloader takes")
    if not uri.startswith("file:"):
        raise SigningError(f"the boot key {uri!r} begins with neither file: nor pkcs11:")
    path = Path(unquote(uri.removeprefix("file:")))
    try:
        with path.open("rb") as file:
            key = serialization.load_pem_private_key(file.read(_LONGEST_KEY), None)
    except OSError as error:
        raise SigningError(f"the boot key {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SigningError(f"{path} is no PEM key without a passphrase; name an RSA-2048 key in that form") from error
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size != 2048:
        raise SigningError(f"{path} is no RSA key of 2048 bits, which is what the bootloader takes")
    private = key
    return BootSigner(
        key.public_key(),
        lambda digest: private.sign(digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256())),
    )
