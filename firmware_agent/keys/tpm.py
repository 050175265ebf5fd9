"""A few words of TPM 2.0 spoken directly: is one there, and which one is it.

The device key itself is used through PKCS#11 (`tpm_key`). Here are only the few commands that answer before any token
exists, as bytes of the "TPM 2.0 Library, Part 3: Commands", so that looking for a TPM needs no C library at all.
"""

import os
import socket
import struct
from collections.abc import Mapping
from typing import Final, Protocol

from firmware_agent.digests import digest
from firmware_agent.settings import Settings

_HEADER: Final = struct.Struct(">HII")  # tag, size of the whole message, command or response code
_NO_SESSIONS: Final = 0x8001
_SESSIONS: Final = 0x8002
_SUCCESS: Final = 0

_GET_CAPABILITY: Final = 0x17A
_CREATE_PRIMARY: Final = 0x131
_FLUSH_CONTEXT: Final = 0x165
_DICTIONARY_ATTACK_PARAMETERS: Final = 0x13A

_TPM_PROPERTIES: Final = 6
_MANUFACTURER: Final = 0x105
_PERMANENT: Final = 0x200
_LOCKOUT_AUTH_SET: Final = 1 << 2  # in TPMA_PERMANENT
_LOCKOUT_INTERVAL: Final = 0x210
_LOCKOUT: Final = 0x4000000A
_ENDORSEMENT: Final = 0x4000000B
_EMPTY_PASSWORD: Final = struct.pack(">IHBH", 0x40000009, 0, 0, 0)

#: Default EK template L-2 (ECC P-256) of the "TCG EK Credential Profile", B.3.4: the same TPM makes the same key from
#: it every time.
_EK_TEMPLATE: Final = (
    struct.pack(">HHI", 0x0023, 0x000B, 0x000300B2)
    + struct.pack(">H", 32)
    + bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
    + struct.pack(">HHHHHH", 0x0006, 128, 0x0043, 0x0010, 0x0003, 0x0010)
    + struct.pack(">H", 32)
    + bytes(32)
    + struct.pack(">H", 32)
    + bytes(32)
)

#: SubjectPublicKeyInfo of an uncompressed P-256 point, up to the coordinates (RFC 5480).
_P256_INFO: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")

_TIMEOUT_SECONDS: Final = 20.0


class TpmError(OSError):
    """No TPM answers, or it answers with an error."""


class _Channel(Protocol):
    def exchange(self, command: bytes) -> bytes: ...

    def close(self) -> None: ...


class _Device:
    """A kernel device: one write is one command, one read its response."""

    def __init__(self, path: str) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def exchange(self, command: bytes) -> bytes:
        os.write(self._handle, command)
        return os.read(self._handle, 4096)

    def close(self) -> None:
        os.close(self._handle)


class _Socket:
    """swtpm's data socket: the same bytes, the response's own size says where it ends."""

    def __init__(self, options: dict[str, str]) -> None:
        if "path" in options:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(_TIMEOUT_SECONDS)
            self._socket.connect(options["path"])
        else:
            address = (options.get("host", "127.0.0.1"), int(options.get("port", "2321")))
            self._socket = socket.create_connection(address, timeout=_TIMEOUT_SECONDS)

    def exchange(self, command: bytes) -> bytes:
        self._socket.sendall(command)
        response = self._receive(_HEADER.size)
        _, size, _ = _HEADER.unpack(response)
        return response + self._receive(size - _HEADER.size)

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise TpmError("the TPM simulator hung up")
            data += part
        return data

    def close(self) -> None:
        self._socket.close()


def _open(tcti: str) -> _Channel:
    """The channel that a TCTI string of tpm2-tss names: `device:PATH`, `swtpm:host=H,port=P` or `swtpm:path=P`."""
    kind, _, rest = tcti.partition(":")
    if kind == "device":
        return _Device(rest or "/dev/tpmrm0")
    if kind == "swtpm":
        return _Socket(dict(option.split("=", 1) for option in rest.split(",") if option))
    raise TpmError(f"no TPM can be reached by {tcti!r}")


def _command(channel: _Channel, tag: int, code: int, body: bytes) -> bytes:
    response = channel.exchange(_HEADER.pack(tag, _HEADER.size + len(body), code) + body)
    try:
        _, size, answer = _HEADER.unpack_from(response)
    except struct.error as error:
        raise TpmError("the TPM answered with less than a header") from error
    if size != len(response) or answer != _SUCCESS:
        raise TpmError(f"the TPM answered command {code:#x} with error {answer:#x}")
    return response[_HEADER.size :]


def fitted(tcti: str) -> bool:
    """Whether the kernel has made a device for a TPM there, usable or not."""
    kind, _, path = tcti.partition(":")
    return kind == "device" and os.path.exists(path)  # noqa: PTH110 - a string of tpm2-tss, not a path of ours


def present(tcti: str) -> bool:
    """Whether a TPM 2.0 answers there."""
    if not tcti:
        return False
    try:
        channel = _open(tcti)
        try:
            _command(channel, _NO_SESSIONS, _GET_CAPABILITY, struct.pack(">III", _TPM_PROPERTIES, _MANUFACTURER, 1))
        finally:
            channel.close()
    except OSError:
        return False
    return True


def survive_power_cuts(tcti: str) -> None:
    """Have the TPM not count power cuts as guesses of a password.

    After a few of them (Part 1, "Dictionary Attack Protection": a restart without TPM2_Shutdown counts as a failure) it
    would refuse every use of the device key for minutes to hours, and a thief with a hand on the plug could silence the
    alarm. What the protection is for, passwords that people choose, is not here: the token's PINs are random. A TPM
    whose owner has set a lockout password is left as it is.

    Raises:
        TpmError: it refuses.
        OSError: it does not answer.
    """
    channel = _open(tcti)
    try:
        if _property(channel, _PERMANENT) & _LOCKOUT_AUTH_SET or not _property(channel, _LOCKOUT_INTERVAL):
            return
        # 32 tries; an interval of 0 ends both the counting's effect and a lockout that is on; a day for lockoutAuth
        body = struct.pack(">II", _LOCKOUT, len(_EMPTY_PASSWORD)) + _EMPTY_PASSWORD + struct.pack(">III", 32, 0, 86400)
        _command(channel, _SESSIONS, _DICTIONARY_ATTACK_PARAMETERS, body)
    finally:
        channel.close()


def _property(channel: _Channel, number: int) -> int:
    query = struct.pack(">III", _TPM_PROPERTIES, number, 1)
    answer = _command(channel, _NO_SESSIONS, _GET_CAPABILITY, query)
    try:
        _, _, count, found, value = struct.unpack_from(">BIIII", answer)  # more to come?, capability, list of pairs
    except struct.error as error:
        raise TpmError("the TPM's answer is cut short") from error
    if (count, found) != (1, number):
        raise TpmError(f"the TPM does not know its property {number:#x}")
    return int(value)


def ek_sha256(tcti: str) -> str:
    """Hex SHA-256 of the endorsement key's SubjectPublicKeyInfo (DER, P-256): names this very TPM, for ever.

    Raises:
        TpmError: the TPM has no P-256, or its owner has set a password on the endorsement hierarchy.
        OSError: it does not answer.
    """
    body = (
        struct.pack(">I", _ENDORSEMENT)
        + struct.pack(">I", len(_EMPTY_PASSWORD))
        + _EMPTY_PASSWORD
        + struct.pack(">HHH", 4, 0, 0)  # no password, no data for the new object
        + struct.pack(">H", len(_EK_TEMPLATE))
        + _EK_TEMPLATE
        + struct.pack(">HI", 0, 0)  # no outside info, no PCRs
    )
    channel = _open(tcti)
    try:
        response = _command(channel, _SESSIONS, _CREATE_PRIMARY, body)
        (handle,) = struct.unpack_from(">I", response)
        try:
            return digest(_P256_INFO + _point(response[8:]))  # behind handle and parameter size
        finally:
            _command(channel, _NO_SESSIONS, _FLUSH_CONTEXT, struct.pack(">I", handle))
    finally:
        channel.close()


def _point(public: bytes) -> bytes:
    """The two coordinates at the end of a TPM2B_PUBLIC, each padded to 32 bytes."""
    try:
        (size,) = struct.unpack_from(">H", public)
        # The template is echoed; only the coordinates behind the fixed part are new.
        unique = public[2 + len(_EK_TEMPLATE) - 68 : 2 + size]
        (x_size,) = struct.unpack_from(">H", unique)
        x = unique[2 : 2 + x_size]
        (y_size,) = struct.unpack_from(">H", unique, 2 + x_size)
        y = unique[4 + x_size : 4 + x_size + y_size]
    except struct.error as error:
        raise TpmError("the TPM's endorsement key is cut short") from error
    return x.rjust(32, b"\0") + y.rjust(32, b"\0")


def environment(settings: Settings) -> Mapping[str, str]:
    """What libtpm2_pkcs11 must find in the environment when it is loaded."""
    return {
        "TPM2_PKCS11_STORE": str(settings.paths.tpm_store),
        "TPM2_PKCS11_TCTI": settings.tpm.tcti,
        "TPM2_PKCS11_BACKEND": "esysdb",  # the store above; not FAPI's system-wide one, where that is compiled in
        "TPM2_PKCS11_LOG_LEVEL": "0",  # errors only: a store that is new is nothing to warn about
    }
