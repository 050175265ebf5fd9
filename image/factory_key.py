"""The SSH key with which the factory reaches units in factory mode; its public half goes into the image."""

import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from image.errors import ImageError

#: Where the station and the image's build look for it.
DEFAULT_PATH = Path("build/keys/factory")


def ensure(path: Path = DEFAULT_PATH) -> Path:
    """Make the key at `path` (and `path`.pub) if there is none; return `path`.

    Two who come at the same time end up with one key: the private half is linked into place, and the loser reads it.

    Raises:
        ImageError: there is a file and it is not an Ed25519 key in OpenSSH's form.
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
    line = public_line(path)
    if not public.exists() or public.read_text() != line:
        new = public.with_name(f".{public.name}.{secrets.token_hex(4)}")
        _write(new, line.encode(), 0o644)
        new.replace(public)
    return path


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def public_line(path: Path) -> str:
    """The public half of the key at `path`, as a line of authorized_keys.

    Raises:
        OSError: it cannot be read.
        ImageError: it is not an Ed25519 key in OpenSSH's form, or has a passphrase.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ImageError(f"{path} is no SSH key without a passphrase ({error}); move it away") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ImageError(f"{path} is not an Ed25519 key; move it away and one will be made")
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line.decode() + " factory\n"
