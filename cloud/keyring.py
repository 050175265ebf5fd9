"""The private keys of the update repository: one directory per holder, to be kept by that person and nobody else.

<directory>/<role>-<first 8 digits of the key id>.pem    PKCS #8, encrypted by the holder's passphrase
<directory>/public.json                                  what the others may know: holder and public keys
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from cloud.errors import RepositoryFault
from cloud.roles import HOLDER_FIELD

_PUBLIC = "public.json"


@dataclass(frozen=True)
class PublicKeys:
    """What everybody may know of a holder's keys."""

    holder: str
    keys: Mapping[str, Key]


def make_keys(directory: Path, holder: str, roles: Iterable[str], passphrase: bytes) -> list[CryptoSigner]:
    """Make a holder's keys, one for each role.

    Raises:
        RepositoryFault: the directory holds keys already; nothing is overwritten.
    """
    if (directory / _PUBLIC).exists():
        raise RepositoryFault(f"{directory} holds keys already; another person needs another directory")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [add_key(directory, holder, role, passphrase) for role in roles]


def add_key(directory: Path, holder: str, role: str, passphrase: bytes) -> CryptoSigner:
    """Make one more key in a holder's directory; a new key takes the old one's place in `public.json`."""
    private = Ed25519PrivateKey.generate()
    public = SSlibKey.from_crypto(private.public_key())
    public.unrecognized_fields[HOLDER_FIELD] = holder
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))
    _write_new(directory / f"{role}-{public.keyid[:8]}.pem", pem)
    keys = dict(read_public(directory).keys) if (directory / _PUBLIC).exists() else {}
    keys[role] = public
    value = {
        "format": 1,
        "holder": holder,
        "keys": {name: {"keyid": key.keyid, **key.to_dict()} for name, key in sorted(keys.items())},
    }
    new = directory / f".{_PUBLIC}.new"
    new.write_text(json.dumps(value, indent=1) + "\n")
    new.replace(directory / _PUBLIC)
    return CryptoSigner(private, public)


def read_public(directory: Path) -> PublicKeys:
    """The public half of a holder's keys.

    Raises:
        RepositoryFault: it is missing or damaged.
    """
    path = directory / _PUBLIC
    try:
        value: Any = json.loads(path.read_text())
        keys = {}
        for role, fields in value["keys"].items():
            keys[str(role)] = Key.from_dict(fields.pop("keyid"), fields)
        return PublicKeys(str(value["holder"]), keys)
    except FileNotFoundError:
        raise RepositoryFault(f"{directory} holds no keys ({_PUBLIC} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RepositoryFault(f"{path} is damaged: {error!r}") from error


def load_keys(directory: Path, passphrase: bytes) -> list[CryptoSigner]:
    """All keys in a holder's directory, those that were replaced included.

    Raises:
        RepositoryFault: there are none, or the passphrase is wrong.
    """
    files = sorted(directory.glob("*.pem"))
    if not files:
        raise RepositoryFault(f"{directory} holds no keys")
    return [_load(path, passphrase) for path in files]


def _load(path: Path, passphrase: bytes) -> CryptoSigner:
    try:
        private = load_pem_private_key(path.read_bytes(), passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RepositoryFault(f"{path} does not open with this passphrase") from error
    except OSError as error:
        raise RepositoryFault(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise RepositoryFault(f"{path} is no ed25519 key")
    return CryptoSigner(private)


def _write_new(path: Path, data: bytes) -> None:
    """A file that only its owner may read, durably."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
