"""A broker that behaves as AWS IoT does to what its policy forbids: it refuses by a reason code, or it hangs up.

mosquitto does neither for subscriptions. This one speaks as much MQTT 5 as the agent does, over TLS, and tells what
it got. https://docs.oasis-open.org/mqtt/mqtt/v5.0/mqtt-v5.0.html
"""

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tests.firmware_agent.support import Ca, pem

Verdict = Literal["fine", "refuse", "hang up", "ignore"]

_NOT_AUTHORIZED = 0x87


class StrictBroker:
    """One client at a time is enough.

    Args:
        ca: signs its certificate, and the units'.
        directory: for its files.
        judge: what to do about an operation ("publish" or "subscribe") on a topic.
    """

    def __init__(self, ca: Ca, directory: Path, judge: Callable[[str, str], Verdict] = lambda _, __: "fine") -> None:
        directory.mkdir(exist_ok=True)
        certificate, key = ca.server()
        for name, text in (("c", certificate), ("k", key), ("t", pem(ca.certificate))):
            (directory / name).write_text(text)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "c", directory / "k")
        self._context.load_verify_locations(directory / "t")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self.judge = judge
        #: Connections that were accepted: when.
        self.connects: list[float] = []
        self.published: list[tuple[str, dict[str, Any]]] = []
        self.subscribed: list[str] = []
        self.unsubscribed: list[str] = []
        #: Called with what was published, after it was acknowledged.
        self.react: Callable[[str, dict[str, Any]], None] = lambda _topic, _body: None
        self._send: Callable[[bytes], None] = lambda _: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = True
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._open = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def say(self, topic: str, payload: bytes) -> None:
        """Publish to the client, at QoS 0."""
        self._send(_packet(0x30, _string(topic) + b"\0" + payload))

    def _serve(self) -> None:
        while self._open:
            try:
                plain = self._listener.accept()[0]
            except OSError:
                return
            with plain, contextlib.suppress(ssl.SSLError, OSError, EOFError):
                plain.settimeout(60)
                with self._context.wrap_socket(plain, server_side=True) as secure:
                    self._client(secure)

    def _client(self, secure: ssl.SSLSocket) -> None:
        lock = threading.Lock()

        def send(data: bytes) -> None:
            with lock:
                secure.sendall(data)

        while True:
            kind, body = _read(secure)
            match kind >> 4:
                case 1:  # CONNECT
                    self.connects.append(time.monotonic())
                    send(_packet(0x20, b"\0\0\0"))  # no session, success, no properties
                    self._send = send
                case 3:
                    self._on_publish(kind, body, send)
                case 8 | 10:
                    self._on_filters(kind >> 4, body, send)
                case 12:
                    send(b"\xd0\0")
                case _:  # DISCONNECT
                    return

    def _on_publish(self, kind: int, body: bytes, send: Callable[[bytes], None]) -> None:
        topic, rest = _take(body)
        number, rest = rest[:2], rest[2:]
        payload = rest[1 + rest[0] :]  # properties of less than 128 bytes
        assert kind >> 1 & 3 == 1, "QoS 1"
        verdict = self.judge("publish", topic)
        if verdict == "hang up":
            raise EOFError
        if verdict != "ignore":
            send(_packet(0x40, number + (bytes([_NOT_AUTHORIZED, 0]) if verdict == "refuse" else b"")))
        if verdict == "fine":
            self.published.append((topic, json.loads(payload)))
            self.react(*self.published[-1])

    def _on_filters(self, kind: int, body: bytes, send: Callable[[bytes], None]) -> None:
        number, rest = body[:2], body[3 + body[2] :]
        codes = []
        while rest:
            topic, rest = _take(rest)
            if kind == 10:
                self.unsubscribed.append(topic)
                codes.append(0)
                continue
            rest = rest[1:]  # options
            verdict = self.judge("subscribe", topic)
            if verdict == "hang up":
                raise EOFError
            if verdict == "fine":
                self.subscribed.append(topic)
            codes.append(_NOT_AUTHORIZED if verdict == "refuse" else 1)
        send(_packet(0xB0 if kind == 10 else 0x90, number + b"\0" + bytes(codes)))


def _string(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


def _take(body: bytes) -> tuple[str, bytes]:
    length = int.from_bytes(body[:2], "big")
    return body[2 : 2 + length].decode(), body[2 + length :]


def _packet(kind: int, body: bytes) -> bytes:
    length, digits = len(body), b""
    while True:
        length, digit = divmod(length, 128)
        digits += bytes([digit | (0x80 if length else 0)])
        if not length:
            return bytes([kind]) + digits + body


def _exactly(secure: ssl.SSLSocket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = secure.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _read(secure: ssl.SSLSocket) -> tuple[int, bytes]:
    kind = _exactly(secure, 1)[0]
    length, shift = 0, 0
    while True:
        digit = _exactly(secure, 1)[0]
        length |= (digit & 0x7F) << shift
        shift += 7
        if not digit & 0x80:
            return kind, _exactly(secure, length)
