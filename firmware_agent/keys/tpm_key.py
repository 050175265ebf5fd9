"""The device key in the TPM, used through the PKCS#11 module of tpm2-pkcs11.

The module keeps the key as a blob that only this TPM can open, in a small database (`TPM2_PKCS11_STORE`) beside the
agent's other state. The PINs that PKCS#11 insists on lie next to it, random and readable by the agent alone: they guard
nothing that the file's owner does not have, for the key is bound to the TPM, not to the PIN.

The module reads its environment when it is loaded, once per process: see `use`. It must also never be logged out while
a TLS connection wants to sign, and logging in is per token, not per session; so `TpmKeys` holds one session from its
first use to `close`.
"""

import ctypes
import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from firmware_agent import files
from firmware_agent.errors import KeyFault, NoTpm, WrongState
from firmware_agent.keys import tpm
from firmware_agent.keys.tpm import environment
from firmware_agent.settings import Settings, Tpm

_FIELD_BYTES: Final = 32  # of P-256
_OK: Final = 0  # CKR_OK


def use(settings: Settings) -> None:
    """Make this process use the TPM and the store of `settings`, letting go of those of another board.

    The module knows one store per process. A program with several boards (the tests, a station with simulated ones)
    calls this before each board's first key operation, and never has two boards with a TPM at work at once.
    """
    wanted = environment(settings)
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        import pkcs11  # noqa: PLC0415 - only where a TPM is used

        pkcs11.unload(str(settings.tpm.module))
        os.environ.update(wanted)


class TpmPrivateKey(ec.EllipticCurvePrivateKey):
    """A P-256 key that signs in the TPM; for `cryptography`'s builders. It holds no secret."""

    def __init__(self, key: "TpmKey") -> None:
        self._key = key

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """ECDSA over `data`; SHA-256 only."""
        if not isinstance(signature_algorithm, ec.ECDSA) or not isinstance(
            signature_algorithm.algorithm, hashes.SHA256
        ):
            raise UnsupportedAlgorithm("this key signs by ECDSA with SHA-256 only")
        return self._key.sign(bytes(data))

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half."""
        return self._key.public_key()

    @property
    def curve(self) -> ec.EllipticCurve:
        """P-256."""
        return ec.SECP256R1()

    @property
    def key_size(self) -> int:
        """In bits."""
        return 256

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        """Not with this key."""
        raise NotImplementedError("the device key signs, nothing else")

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        """Never leaves the TPM."""
        raise NotImplementedError("the device key never leaves the TPM")

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,  # noqa: A002 - the base class's name
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> bytes:
        """Never leaves the TPM."""
        raise NotImplementedError("the device key never leaves the TPM")

    def __copy__(self) -> "TpmPrivateKey":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TpmPrivateKey":
        return self


class TpmKey:
    """A key pair in the TPM, behind an open session."""

    def __init__(self, settings: Tpm, label: str, pin: str, public: ec.EllipticCurvePublicKey, private: Any) -> None:
        self._settings = settings
        self._label = label
        self._pin = pin
        self._public = public
        self._private = private

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half."""
        return self._public

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """A handle for builders."""
        return TpmPrivateKey(self)

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over `data`, as DER; the TPM gives r and s side by side (PKCS#11 v3.0, 2.3.1)."""
        import pkcs11  # noqa: PLC0415 - only where a TPM is used

        digest = hashes.Hash(hashes.SHA256())
        digest.update(data)
        try:
            raw = self._private.sign(digest.finalize(), mechanism=pkcs11.Mechanism.ECDSA)
        except pkcs11.PKCS11Error as error:
            raise KeyFault(f"the TPM does not sign: {_name(error)}") from error
        return utils.encode_dss_signature(
            int.from_bytes(raw[:_FIELD_BYTES], "big"),
            int.from_bytes(raw[_FIELD_BYTES:], "big"),
        )

    def tls(self, chain: str) -> Any:
        """TLS client options with this key and `chain`. awscrt speaks TLS 1.2 with such keys, not 1.3."""
        from awscrt.io import Pkcs11Lib, TlsContextOptions  # noqa: PLC0415 - only when a connection is made

        return TlsContextOptions.create_client_with_mtls_pkcs11(
            # DEFAULT: "already initialised" (by python-pkcs11) is fine, and C_Finalize is left to who initialised.
            pkcs11_lib=Pkcs11Lib(
                file=str(self._settings.module), behavior=Pkcs11Lib.InitializeFinalizeBehavior.DEFAULT
            ),
            user_pin=self._pin,
            token_label=self._settings.token,
            private_key_label=self._label,
            cert_file_contents=chain,
        )


class TpmKeys:
    """The TPM as a key store. A slot is a label of its own in the one token: the connection selects by label."""

    def __init__(self, settings: Tpm, *, pin: Path, store: Path) -> None:
        self._settings = settings
        self._pin_file = pin
        self._store = store
        self._session: Any = None
        self._keys: dict[str, TpmKey] = {}
        self._lock = threading.RLock()  # one session, and a job may make a key while the product proves its own

    def ensure(self, slot: str = "") -> TpmKey:
        """The key, made now if there was none."""
        return self._open(slot, create=True)

    def load(self, slot: str = "") -> TpmKey:
        """The key that was made before."""
        return self._open(slot, create=False)

    def vetted(self, slot: str = "") -> TpmKey:
        """The same: whoever opens the token looks."""
        return self.load(slot)

    def remove(self, slot: str) -> None:
        """Destroy the objects labelled so: both halves, or the one that a crash has left."""
        with self._opened(create=False) as session:
            if session is None:
                return
            self._keys.pop(slot, None)
            private, public = self._halves(session, slot)
            for one in (*private, *public):
                one.destroy()

    def slots(self) -> tuple[str, ...]:
        """By the labels of the private keys and of lone public ones."""
        from pkcs11 import Attribute, ObjectClass  # noqa: PLC0415 - only where a TPM is used

        with self._opened(create=False) as session:
            if session is None:
                return ()
            labels = {
                str(one[Attribute.LABEL])
                for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY)
                for one in session.get_objects({Attribute.CLASS: kind})
            }
        first = self._settings.key
        found = [label.removeprefix(f"{first}-") for label in labels if label.startswith(f"{first}-")]
        return tuple(sorted([*found, *([""] if first in labels else [])]))

    def close(self) -> None:
        """Log out."""
        if self._session is not None:
            self._session.close()
        self._session = None
        self._keys.clear()

    def _open(self, slot: str, *, create: bool) -> TpmKey:
        with self._lock:
            if slot in self._keys:
                return self._keys[slot]
        with self._opened(create=create) as session:
            found = self._keys.get(slot)
            if session is not None and found is None:
                found = self._find(session, slot) or (self._generate(session, slot) if create else None)
        if found is None:
            raise WrongState("this unit has no key yet; run enrol first")
        self._keys[slot] = found
        return found

    @contextmanager
    def _opened(self, *, create: bool) -> Iterator[Any]:
        """The session on our token, opened at the first use; None when there is no token and none is to be made."""
        with self._lock:
            yield from self._open_session(create=create)

    def _open_session(self, *, create: bool) -> Iterator[Any]:
        if not tpm.present(self._settings.tcti):
            raise NoTpm(
                f"this unit is configured for a TPM and none answers at {self._settings.tcti}; "
                "check the module's seat and the boot log, or take the unit out of the line",
            )
        with suppress(OSError):  # a TPM that refuses still signs, as long as it is not locked
            tpm.survive_power_cuts(self._settings.tcti)
        import pkcs11  # noqa: PLC0415 - only where a TPM is used

        try:
            self._store.mkdir(mode=0o700, parents=True, exist_ok=True)
            library = pkcs11.lib(str(self._settings.module))
            if self._session is None:
                self._session = self._login(library, create=create)
            yield self._session
        except (pkcs11.PKCS11Error, RuntimeError) as error:
            self.close()
            raise KeyFault(f"the TPM's token {self._settings.token!r} cannot be used: {_name(error)}") from error

    def _pins(self) -> dict[str, str]:
        """User and security officer PIN, made before the token that they open."""
        pins = files.read_json(self._pin_file)
        if pins is None:
            pins = {"user": secrets.token_hex(16), "officer": secrets.token_hex(16)}
            files.write_atomic(self._pin_file, json.dumps(pins).encode(), 0o600)
        return {"user": str(pins["user"]), "officer": str(pins["officer"])}

    def _label(self, slot: str) -> str:
        return f"{self._settings.key}-{slot}" if slot else self._settings.key

    def _login(self, library: Any, *, create: bool) -> Any:
        """An open session on our token, which is initialised where `create` allows it, else None without a token."""
        import pkcs11  # noqa: PLC0415 - only where a TPM is used

        token = self._token(library)
        if token is None:
            if not create:
                return None
            self._initialise(library)
            token = self._token(library)
            if token is None:
                raise KeyFault("the PKCS#11 module initialised a token and does not show it")
        pins = self._pins()
        try:
            return token.open(rw=True, user_pin=pins["user"])
        except pkcs11.UserAlreadyLoggedIn:
            return token.open(rw=True)  # by another session of this process, and a login counts for all of them
        except (pkcs11.PinIncorrect, pkcs11.UserPinNotInitialized):
            # A crash between C_InitToken and C_InitPIN: the token is ours, its user has no PIN yet.
            with token.open(rw=True, so_pin=pins["officer"]) as officer:
                officer.init_pin(pins["user"])
            return token.open(rw=True, user_pin=pins["user"])

    def _token(self, library: Any) -> Any:
        import pkcs11  # noqa: PLC0415 - only where a TPM is used

        for slot in library.get_slots(token_present=True):
            try:
                token = slot.get_token()
            except pkcs11.TokenNotRecognised:
                continue
            if token.label.rstrip("\0 ") == self._settings.token:
                return token
        return None

    def _initialise(self, library: Any) -> None:
        """Make a token in the free slot. python-pkcs11 has no C_InitToken, so this one call goes by ctypes."""
        pins = self._pins()
        slot = library.get_slots(token_present=True)[-1].slot_id  # the module's last slot is always a free one
        officer = pins["officer"].encode()
        label = self._settings.token.encode().ljust(32)
        module = ctypes.CDLL(str(self._settings.module))
        answer = module.C_InitToken(ctypes.c_ulong(slot), officer, ctypes.c_ulong(len(officer)), label)
        if answer != _OK:
            raise KeyFault(f"the TPM's token cannot be initialised: C_InitToken answered {answer:#x}")
        with self._token(library).open(rw=True, so_pin=pins["officer"]) as session:
            session.init_pin(pins["user"])

    def _halves(self, session: Any, slot: str) -> tuple[list[Any], list[Any]]:
        """The private and the public objects of a slot."""
        from pkcs11 import Attribute, ObjectClass  # noqa: PLC0415 - only where a TPM is used

        def objects(kind: Any) -> list[Any]:
            return list(session.get_objects({Attribute.CLASS: kind, Attribute.LABEL: self._label(slot)}))

        return objects(ObjectClass.PRIVATE_KEY), objects(ObjectClass.PUBLIC_KEY)

    def _find(self, session: Any, slot: str) -> TpmKey | None:
        from pkcs11 import Attribute  # noqa: PLC0415 - only where a TPM is used

        private, public = self._halves(session, slot)
        if not private:
            return None
        if len(private) != 1 or len(public) != 1:
            raise KeyFault(
                f"the TPM's token holds {len(private)} private and {len(public)} public keys labelled "
                f"{self._label(slot)!r}, not one of each; the connection selects by label only",
            )
        point = bytes(public[0][Attribute.EC_POINT])
        point = point[2:] if point[:2] == b"\x04\x41" else point  # an OCTET STRING around the point, in most modules
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        return TpmKey(self._settings, self._label(slot), self._pins()["user"], key, private[0])

    def _generate(self, session: Any, slot: str) -> TpmKey | None:
        from pkcs11 import Attribute, KeyType  # noqa: PLC0415 - only where a TPM is used
        from pkcs11.constants import DEFAULT  # noqa: PLC0415
        from pkcs11.util.ec import encode_named_curve_parameters  # noqa: PLC0415

        parameters = session.create_domain_parameters(
            KeyType.EC,
            {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")},
            local=True,
        )
        # tpm2-pkcs11 refuses attributes that it does not know for a key of this kind, even when they are false, so
        # python-pkcs11's own templates are emptied of them.
        parameters.generate_keypair(
            store=True,
            label=self._label(slot),
            id=self._label(slot).encode(),
            capabilities=0,
            public_template={Attribute.ENCRYPT: DEFAULT, Attribute.WRAP: DEFAULT, Attribute.VERIFY: True},
            private_template={
                Attribute.DECRYPT: DEFAULT,
                Attribute.UNWRAP: DEFAULT,
                Attribute.DERIVE: DEFAULT,
                Attribute.SIGN: True,
                Attribute.SENSITIVE: True,
                Attribute.EXTRACTABLE: False,
            },
        )
        return self._find(session, slot)


def _name(error: Exception) -> str:
    """python-pkcs11's errors say what happened by their class, and often nothing else."""
    return f"{type(error).__name__} {error}".strip()
