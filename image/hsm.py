"""Keys that never leave a token (an HSM, a smart card), found by their `pkcs11:` URI (RFC 7512).

    pkcs11:token=line-a;object=image?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/picket/pin

The PIN comes from the file that `pin-source` names. A `pin-value` in the URI is refused: arguments are seen by
everybody on the machine and stay in the shell's history.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from image.errors import SigningError

_KNOWN = ("token", "object", "id", "module-path", "pin-source", "type")
_EXAMPLE = "pkcs11:token=NAME;object=NAME?module-path=/usr/lib/MODULE.so&pin-source=file:/PATH"

#: What RSA signs by PKCS#1 v1.5 before the 32 bytes of a SHA-256 (RFC 8017, 9.2, note 1).
_SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


@dataclass(frozen=True)
class TokenUri:
    """A key on a token: label of the token, label or id of the key, the module that reaches it, the PIN's file."""

    token: str
    object: str
    id: bytes
    module: Path
    pin_file: Path | None

    def __str__(self) -> str:
        return f"{self.object or self.id.hex()} on the token {self.token}"


def parse(uri: str) -> TokenUri:
    """The parts of a `pkcs11:` URI.

    Raises:
        SigningError: it is none, or says too little or too much; the message has an example.
    """
    path, _, query = uri.removeprefix("pkcs11:").partition("?")
    if not uri.startswith("pkcs11:"):
        raise SigningError(f"{uri!r} is no pkcs11: URI; an example: {_EXAMPLE}")
    found: dict[str, str] = {}
    for attribute in [*path.split(";"), *query.split("&")]:
        name, equals, value = attribute.partition("=")
        if not attribute:
            continue
        if name == "pin-value":
            raise SigningError(
                "a pin-value in a URI is seen by everybody on the machine; name a file: pin-source=file:"
            )
        if not equals or name not in _KNOWN or name in found:
            raise SigningError(f"{name!r} is unknown, empty or twice in a pkcs11: URI; an example: {_EXAMPLE}")
        found[name] = value
    if not found.get("token") or not (found.get("object") or found.get("id")) or not found.get("module-path"):
        raise SigningError(f"a pkcs11: URI needs token, object (or id) and module-path: {_EXAMPLE}")
    source = found.get("pin-source", "")
    if source and not re.fullmatch(r"(file:)?/?[^:]+", source):
        raise SigningError(f"pin-source={source} is no file; write pin-source=file:/PATH")
    return TokenUri(
        token=unquote(found["token"]),
        object=unquote(found.get("object", "")),
        id=unquote(found.get("id", ""), encoding="latin-1").encode("latin-1"),
        module=Path(unquote(found["module-path"])),
        pin_file=Path(unquote(source.removeprefix("file:").removeprefix("//"))) if source else None,
    )


def public_key(uri: TokenUri) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    """The public half of a key pair on a token.

    Raises:
        SigningError: token or key cannot be reached, or it is of another kind.
    """
    import pkcs11  # noqa: PLC0415 - loads a C module; only where a token is used
    from pkcs11.util.ec import encode_ec_public_key  # noqa: PLC0415
    from pkcs11.util.rsa import encode_rsa_public_key  # noqa: PLC0415

    with _session(uri) as session:
        key = _find(session, uri, pkcs11.ObjectClass.PUBLIC_KEY)
        if key.key_type == pkcs11.KeyType.EC:
            public = serialization.load_der_public_key(encode_ec_public_key(key))
        elif key.key_type == pkcs11.KeyType.RSA:
            public = serialization.load_der_public_key(encode_rsa_public_key(key))
        else:
            raise SigningError(f"{uri} is neither an EC nor an RSA key")
    if not isinstance(public, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey)):
        raise SigningError(f"{uri} is neither an EC nor an RSA key")
    return public


def ecdsa(uri: TokenUri, digest: bytes) -> bytes:
    """ECDSA over a digest, in DER."""
    import pkcs11  # noqa: PLC0415

    raw = _sign(uri, digest, pkcs11.Mechanism.ECDSA)
    half = len(raw) // 2
    return utils.encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))


def rsa_sha256(uri: TokenUri, digest: bytes) -> bytes:
    """RSA PKCS#1 v1.5 over a SHA-256 digest."""
    import pkcs11  # noqa: PLC0415

    return _sign(uri, _SHA256_INFO + digest, pkcs11.Mechanism.RSA_PKCS)


def _sign(uri: TokenUri, data: bytes, mechanism: Any) -> bytes:
    import pkcs11  # noqa: PLC0415

    with _session(uri) as session:
        key = _find(session, uri, pkcs11.ObjectClass.PRIVATE_KEY)
        return bytes(key.sign(data, mechanism=mechanism))


@contextmanager
def _session(uri: TokenUri) -> Iterator[Any]:
    """A session for one operation. Tokens count logins per process, so none is left open for the next to trip over."""
    import pkcs11  # noqa: PLC0415

    pin = _read_pin(uri)
    with _told(uri, pkcs11), pkcs11.lib(str(uri.module)).get_token(token_label=uri.token).open(user_pin=pin) as session:
        yield session


@contextmanager
def _told(uri: TokenUri, pkcs11: Any) -> Iterator[None]:
    """PKCS#11's errors in words."""
    try:
        yield
    except pkcs11.exceptions.NoSuchToken as error:
        raise SigningError(
            f"no token is called {uri.token}; is it plugged in, and is {uri.module} its module?"
        ) from error
    except (pkcs11.exceptions.PinIncorrect, pkcs11.exceptions.PinLenRange) as error:
        raise SigningError(f"the token {uri.token} refuses the PIN in {uri.pin_file}; few tries are left") from error
    except pkcs11.exceptions.PinLocked as error:
        raise SigningError(f"the token {uri.token} has locked its PIN; unlock it with the SO PIN") from error
    except pkcs11.exceptions.NoSuchKey as error:
        raise SigningError(f"there is no key {uri}; list them with `pkcs11-tool --list-objects --login`") from error
    except pkcs11.exceptions.MultipleObjectsReturned as error:
        raise SigningError(f"there are several keys {uri}; add id= to the URI") from error
    except (pkcs11.exceptions.PKCS11Error, RuntimeError) as error:
        raise SigningError(f"{uri} cannot be used: {type(error).__name__} {error}".rstrip()) from error


def _find(session: Any, uri: TokenUri, kind: Any) -> Any:
    wanted: dict[str, Any] = {"object_class": kind}
    if uri.object:
        wanted["label"] = uri.object
    if uri.id:
        wanted["id"] = uri.id
    return session.get_key(**wanted)


def _read_pin(uri: TokenUri) -> str | None:
    if uri.pin_file is None:
        return None
    try:
        return uri.pin_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SigningError(f"the PIN of {uri.token} cannot be read from {uri.pin_file}: {error}") from error
