"""A device that does nothing but speak MQTT 5 over TLS: the least that anything between a unit and the cloud can take.

Hand-made packets on a blocking socket (OASIS MQTT 5.0, sections 3.1 to 3.4): no agent, no spool, no SDK.
"""

import json
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from factory.authority import CertificateAuthority, certificate_id, make_leaf, to_pem
from factory.bench import Cloud, Endpoint

_CONNECT, _CONNACK, _PUBLISH_QOS_1, _PUBACK, _DISCONNECT = 0x10, 0x20, 0x32, 0x40, 0xE0
_REFUSED = 0x80
_SECONDS = 10.0
#: Between two tries to connect. The agent keeps to AWS IoT's one CONNECT a second; the peer shows what that costs.
_RETRY_SECONDS = 0.05


class RefusedError(Exception):
    """The cloud does not want this device; another try would change nothing."""


@dataclass(frozen=True)
class BareDevice:
    """A certificate with its key, and where it connects."""

    serial: str
    host: str
    port: int
    context: ssl.SSLContext


def make_device(
    serial: str, batch: str, signing: CertificateAuthority, cloud: Cloud, endpoint: Endpoint, folder: Path
) -> BareDevice:
    """A device with a certificate of its own that the cloud has not seen yet, known to the fleet's table."""
    folder.mkdir(parents=True)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = make_leaf(signing, key.public_key(), serial=serial, board=uuid.uuid4().hex[:16], batch=batch)
    chain, private = folder / "chain.pem", folder / "key.pem"
    chain.write_text(to_pem(leaf) + signing.pem)
    private.touch(mode=0o600)
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    cloud.announce(serial, certificate_id(leaf), to_pem(leaf), batch)
    context = ssl.create_default_context(cadata=cloud.trust_bundle())
    context.load_cert_chain(chain, private)
    return BareDevice(serial, endpoint.host, endpoint.port, context)


class Link:
    """An accepted connection."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._connection = connection
        self._packet = 0

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish at QoS 1; returns when it is acknowledged.

        Raises:
            RefusedError: it is refused.
        """
        self._packet += 1
        identifier = self._packet.to_bytes(2, "big")
        self._connection.sendall(_packet(_PUBLISH_QOS_1, _text(topic) + identifier + b"\0" + payload))
        body = _receive(self._connection, _PUBACK)
        if len(body) > 2 and body[2] >= _REFUSED:
            raise RefusedError(f"PUBACK {body[2]:#x} on {topic}")


@contextmanager
def connected(device: BareDevice, seconds: float = 30.0) -> Iterator[Link]:
    """A link, as soon as one holds: the cloud hangs up on a new certificate until it has provisioned it.

    Raises:
        RefusedError: the cloud refuses, or none held within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = _connect(device)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RefusedError(f"no connection of {device.serial} held in {seconds:.0f} s: {error}") from error
            time.sleep(_RETRY_SECONDS)
    with connection:
        yield Link(connection)
        connection.sendall(_packet(_DISCONNECT, b""))


def _connect(device: BareDevice) -> ssl.SSLSocket:
    plain = socket.create_connection((device.host, device.port), timeout=_SECONDS)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = device.context.wrap_socket(plain, server_hostname=device.host)
    except BaseException:
        plain.close()
        raise
    try:
        clean_start, keep_alive = b"\x02", (60).to_bytes(2, "big")
        connection.sendall(
            _packet(_CONNECT, _text("MQTT") + b"\x05" + clean_start + keep_alive + b"\0" + _text(device.serial))
        )
        reason = _receive(connection, _CONNACK)[1]
        if reason:
            raise RefusedError(f"CONNACK {reason:#x} for {device.serial}")
    except BaseException:
        connection.close()
        raise
    return connection


def _packet(kind: int, body: bytes) -> bytes:
    length, encoded = len(body), bytearray()
    while True:
        length, digit = length >> 7, length & 0x7F
        encoded.append(digit | (0x80 if length else 0))
        if not length:
            return bytes([kind, *encoded]) + body


def _text(value: str) -> bytes:
    raw = value.encode()
    return len(raw).to_bytes(2, "big") + raw


def _receive(connection: ssl.SSLSocket, kind: int) -> bytes:
    """The body of the next packet of a kind; others (there are none that we asked for) are passed over.

    Raises:
        ConnectionError: the cloud hung up.
    """
    while True:
        first = _exactly(connection, 1)[0]
        length = shift = 0
        while True:
            digit = _exactly(connection, 1)[0]
            length |= (digit & 0x7F) << shift
            shift += 7
            if not digit & 0x80:
                break
        body = _exactly(connection, length)
        if first & 0xF0 == kind:
            return body


def _exactly(connection: ssl.SSLSocket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise ConnectionError("the cloud hung up")
        data += part
    return data


def alarm(sequence: int) -> bytes:
    """An alarm as the agent's: the same fields, the same size."""
    moment = datetime.now(UTC)
    return json.dumps(
        {
            "event_id": str(uuid.uuid4()),
            "sequence": sequence,
            "at": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "at_quality": "ntp",
            "boot_id": str(uuid.UUID(int=sequence)),
            "monotonic_ms": round(time.monotonic() * 1000),
            "kind": "motion",
        },
        separators=(",", ":"),
    ).encode()
