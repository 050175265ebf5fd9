"""What an attempt to connect came to is named rightly, by real servers that misbehave."""

import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from firmware_agent import backoff, mqtt
from firmware_agent.identity import Identity
from firmware_agent.keys import DeviceKey, open_store
from tests.firmware_agent.support import Broker, Ca, Unit, free_port, pem, provision


@pytest.fixture
def identity(unit: Unit, ca: Ca) -> Identity:
    return provision(unit, ca)


@pytest.fixture
def key(unit: Unit, identity: Identity) -> DeviceKey:
    assert identity
    return open_store(unit.settings).load()


def attempt(identity: Identity, key: DeviceKey) -> mqtt.Attempt:
    return mqtt.attempt(
        identity, key, f"dt/picket/{identity.serial}/hello", b"{}", keep_alive_seconds=45, now=time.time()
    )


class Rude:
    """A server that takes one connection and treats it badly."""

    def __init__(self, directory: Path, ca: Ca, behave: Callable[[ssl.SSLSocket], None] | None, trust: Ca) -> None:
        certificate, key = ca.server()
        for name, text in (("c", certificate), ("k", key), ("t", pem(trust.certificate))):
            (directory / name).write_text(text)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "c", directory / "k")
        self._context.load_verify_locations(directory / "t")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._behave = behave
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as connection:
            if self._behave is None:
                return
            try:
                with self._context.wrap_socket(connection, server_side=True) as secure:
                    self._behave(secure)
            except (ssl.SSLError, OSError):
                return

    def join(self) -> None:
        self._thread.join()


def close(_: ssl.SSLSocket) -> None:
    """Hang up right after the handshake."""


def read_and_close(secure: ssl.SSLSocket) -> None:
    """What AWS does at a certificate's first connection: take the CONNECT, then hang up."""
    secure.recv(1024)


@pytest.mark.parametrize("behave", [None, close, read_and_close])
def test_a_hang_up_is_a_drop(
    identity: Identity,
    key: DeviceKey,
    ca: Ca,
    tmp_path: Path,
    behave: Callable[[ssl.SSLSocket], None] | None,
) -> None:
    server = Rude(tmp_path, ca, behave, ca)

    assert attempt(replace(identity, port=server.port), key).outcome == "dropped"
    server.join()


def test_a_server_that_does_not_know_our_ca_is_a_tls_failure(
    identity: Identity, key: DeviceKey, ca: Ca, tmp_path: Path
) -> None:
    server = Rude(tmp_path, ca, close, Ca("Another"))

    assert attempt(replace(identity, port=server.port), key).outcome == "tls"
    server.join()


def test_a_closed_port_and_an_unknown_name_are_unreachable(identity: Identity, key: DeviceKey) -> None:
    assert attempt(replace(identity, port=free_port()), key).outcome == "unreachable"
    assert attempt(replace(identity, host="nowhere.invalid"), key).outcome == "unreachable"


def test_a_broker_that_acknowledges_is_held(identity: Identity, key: DeviceKey, broker: Broker) -> None:
    broker.start()

    found = attempt(replace(identity, port=broker.port), key)

    assert found.outcome == "held", found


def test_a_broker_that_refuses_the_message_does_not_hold(identity: Identity, key: DeviceKey, broker: Broker) -> None:
    (broker._directory / "acl").write_text("user observer\ntopic read #\n")
    broker.start()

    found = attempt(replace(identity, port=broker.port), key)

    assert (found.outcome, found.detail) == ("dropped", "connected, then: the broker refused it: NOT_AUTHORIZED")


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED", "refused"),
        ("AWS_IO_SOCKET_CONNECTION_REFUSED", "unreachable"),
        ("AWS_IO_DNS_QUERY_FAILED", "unreachable"),
        ("AWS_IO_SOCKET_TIMEOUT", "unreachable"),
        ("AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE", "tls"),
        ("AWS_IO_TLS_NEGOTIATION_TIMEOUT", "tls"),
        ("AWS_ERROR_PKCS11_CKR_DEVICE_ERROR", "tls"),
        ("AWS_IO_SOCKET_CLOSED", "dropped"),
        ("AWS_ERROR_MQTT_UNEXPECTED_HANGUP", "dropped"),
        ("AWS_ERROR_MQTT5_CONNACK_TIMEOUT", "dropped"),
    ],
)
def test_the_sdks_errors_have_one_meaning_each(name: str, outcome: str) -> None:
    assert mqtt.classify(name) == outcome


def test_waiting_grows_to_a_minute_and_never_to_nothing() -> None:
    longest = [backoff.delay(failures, lambda: 1.0) for failures in range(8)]
    shortest = [backoff.delay(failures, lambda: 0.0) for failures in range(8)]

    assert longest == [1, 2, 4, 8, 16, 32, 60, 60]
    assert shortest == [delay / 2 for delay in longest]
    assert backoff.delay(10_000) <= 60
