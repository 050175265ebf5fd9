"""The SSH key with which the factory reaches units in factory mode; its public half goes into the image."""

import os
import secrets
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from image.errors import SigningError

#: Where the station and the image's build look for it.
DEFAULT_PATH = Path("build/keys/factory")


def ensure(path: Path = DEFAULT_PATH, comment: str = "factory") -> Path:
    """Make the key at `path` (and `path`.pub) if there is none; return `path`.

    Two who come at the same time end up with one key: the private half is linked into place, and the loser reads it.

    Raises:
        SigningError: there is a file and it is not an Ed25519 key in OpenSSH's form.
    """
    public = path.with_name(path.name + ".pub")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        _write(new, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
                                      serialization.NoEncryption()), 0o600)  # fmt: skip
        try:
            os.link(new, path)
        except FileExistsError:
            pass
        finally:
            new.unlink()
    line = public_line(path, comment)
    if not public.exists() or public.read_text() != line:
        new = public.with_name(f".{public.name}.{secrets.token_hex(4)}")
        _write(new, line.encode(), 0o644)
        new.replace(public)
    return path


def read_public(path: Path) -> str:
    """The one line of a public key's file.

    Raises:
        SigningError: it cannot be read, or holds anything else; a private half stays where it is.
    """
    try:
        line = path.read_bytes().decode(errors="replace").strip()
    except OSError as error:
        raise SigningError(f"{path} cannot be read: {error.strerror}") from error
    if "PRIVATE KEY" in line:
        raise SigningError(f"{path} holds the private half, which stays with you: name the file of the public one")
    none = SigningError(f"{path} is no public key as OpenSSH writes it: one line like ssh-ed25519 AAAA…")
    if "\n" in line:
        raise none
    try:
        serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise none from error
    return line


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def public_line(path: Path, comment: str = "factory") -> str:
    """The public half of the key at `path`, as a line of authorized_keys.

    Raises:
        OSError: it cannot be read.
        SigningError: it is not an Ed25519 key in OpenSSH's form, or has a passphrase.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise SigningError(f"{path} is no SSH key without a passphrase ({error}); move it away") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(f"{path} is not an Ed25519 key; move it away and one will be made")
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return f"{line.decode()} {comment}\n"
