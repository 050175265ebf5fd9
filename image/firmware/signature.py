"""boot.sig: the digest of boot.img and, signed with the customer's key, who says so.

The format is that of raspberrypi/rpi-eeprom, rpi-eeprom-digest: a line with the SHA-256 in hexadecimal, then lines
`name: value`, of which `rsa2048` is a PKCS #1 v1.5 signature over the image in hexadecimal. The key has 2048 bits.
"""

import hashlib
import re

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from image.firmware.errors import NoBootError

_LIMIT = 4096


def public_key(pem: bytes) -> rsa.RSAPublicKey:
    """The customer's public key, as its digest is burnt into a board.

    Raises:
        ValueError: it is no RSA key of 2048 bits; nothing else can be fused.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except UnsupportedAlgorithm as error:
        raise ValueError(f"the customer's key cannot be read: {error}") from error
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != 2048:
        raise ValueError("a board can be fused with an RSA key of 2048 bits only")
    return key


def verify(image: bytes, sig: bytes | None, key: rsa.RSAPublicKey, name: str) -> None:
    """Let a signed image pass.

    Args:
        image: boot.img.
        sig: boot.sig; None where it is absent.
        key: the customer's.
        name: the image's, for the message.

    Raises:
        NoBootError: the signature is absent, damaged, or another key's or image's.
    """
    if sig is None:
        raise NoBootError(f"{name} is not signed, and this board starts nothing else")
    lines = sig[:_LIMIT].decode("latin-1").splitlines()
    digest = lines[0].strip().lower() if lines else ""
    values = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    signature = values.get("rsa2048", "").strip()
    if digest != hashlib.sha256(image).hexdigest():
        raise NoBootError(f"{name} is not what its signature is for")
    if not re.fullmatch(r"[0-9a-fA-F]{512}", signature):
        raise NoBootError(f"{name} has a digest but no signature, and this board wants one")
    try:
        key.verify(bytes.fromhex(signature), image, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature as error:
        raise NoBootError(f"{name} is signed with another key than this board's") from error
