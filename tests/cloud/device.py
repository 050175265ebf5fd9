"""A unit's MQTT side for the cloud's tests: one connection, what arrived on it, and a question with its answer."""

import contextlib
import itertools
import json
import queue
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

from awscrt import http, io, mqtt5

from tests.cloud.conftest import Fleet, Unit

SECONDS = 20.0


class Device:
    """Connected as the unit, subscribed to its jobs, its shadows and its metrics' answers."""

    def __init__(self, fleet: Fleet, unit: Unit, proxy: int | None = None) -> None:
        self.serial = unit.serial
        self.root = f"$aws/things/{unit.serial}"
        self._arrived: dict[str, queue.Queue[dict[str, Any]]] = defaultdict(queue.Queue)
        self._connected, self._stopped = threading.Event(), threading.Event()
        self._tokens = itertools.count()
        self._asked: dict[str | None, queue.Queue[tuple[str, dict[str, Any]]]] = {}
        options = io.TlsContextOptions.create_client_with_mtls(unit.leaf.chain.encode(), unit.leaf.key.encode())
        options.override_default_trust_store(fleet.trust.encode())
        self._client = mqtt5.Client(
            mqtt5.ClientOptions(
                host_name=fleet.endpoint.host if proxy is None else fleet.registry.guest_endpoint().host,
                port=fleet.endpoint.port,
                http_proxy_options=None if proxy is None else http.HttpProxyOptions("127.0.0.1", proxy),
                tls_ctx=io.ClientTlsContext(options),
                connect_options=mqtt5.ConnectPacket(client_id=unit.serial, keep_alive_interval_sec=30),
                on_publish_callback_fn=self._on_message,
                on_lifecycle_event_connection_success_fn=lambda _: self._connected.set(),
                on_lifecycle_event_stopped_fn=lambda _: self._stopped.set(),
            )
        )

    def _on_message(self, data: mqtt5.PublishReceivedData) -> None:
        packet = data.publish_packet
        with contextlib.suppress(ValueError):  # the filters bring back what we publish, broken JSON too
            body = json.loads(packet.payload or b"{}")
            topic = str(packet.topic).removeprefix(self.root + "/")
            asked = self._asked.get(body.get("clientToken"))
            if asked is not None and topic.endswith(("/accepted", "/rejected")):
                asked.put((topic.rpartition("/")[2], body))
            self._arrived[topic].put(body)

    def wake(self, topic: str) -> None:
        """Let whoever waits on `topic` go, with an empty message."""
        self._arrived[topic].put({})

    def open(self) -> None:
        self._client.start()
        assert self._connected.wait(SECONDS)
        filters = ("jobs/#", "shadow/name/alarm/#", "shadow/name/settings/#", "defender/metrics/json/+")
        subscriptions = [mqtt5.Subscription(f"{self.root}/{each}", qos=mqtt5.QoS.AT_LEAST_ONCE) for each in filters]
        answer = self._client.subscribe(mqtt5.SubscribePacket(subscriptions)).result(SECONDS)
        assert all(code < 0x80 for code in answer.reason_codes)

    def close(self) -> None:
        self._client.stop()
        self._stopped.wait(SECONDS)

    def publish(self, topic: str, body: object) -> None:
        """A message about itself, on one of its reserved topics."""
        self._publish(f"{self.root}/{topic}", body)

    def publish_data(self, kind: str, body: object) -> None:
        """A message of the product's own, e.g. its hello."""
        self._publish(f"dt/picket/{self.serial}/{kind}", body)

    def _publish(self, topic: str, body: object) -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        packet = mqtt5.PublishPacket(topic=topic, payload=payload, qos=mqtt5.QoS.AT_LEAST_ONCE)
        self._client.publish(packet).result(SECONDS)

    def ask(self, topic: str, body: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """`accepted` or `rejected`, and what the answer says."""
        token = f"{self.serial}-{next(self._tokens)}"
        answers = self._asked[token] = queue.Queue()
        try:
            self.publish(topic, {**(body or {}), "clientToken": token})
            return answers.get(timeout=SECONDS)
        finally:
            del self._asked[token]

    def next(
        self, topic: str, when: Callable[[dict[str, Any]], bool] = lambda _: True, seconds: float = SECONDS
    ) -> dict[str, Any]:
        """The next message on `topic` for which `when` holds; those before it are dropped."""
        deadline = time.monotonic() + seconds
        while True:
            message = self._arrived[topic].get(timeout=max(0.01, deadline - time.monotonic()))
            if when(message):
                return message

    # -- jobs, as the agent does them

    def next_job(self) -> dict[str, Any] | None:
        kind, answer = self.ask("jobs/$next/get", {"includeJobDocument": True})
        assert kind == "accepted"
        found: dict[str, Any] | None = answer.get("execution")
        return found

    def start(self, **more: Any) -> dict[str, Any] | None:
        kind, answer = self.ask("jobs/start-next", more)
        assert kind == "accepted"
        found: dict[str, Any] | None = answer.get("execution")
        return found

    def update(self, job: str, status: str, **more: Any) -> tuple[str, dict[str, Any]]:
        return self.ask(f"jobs/{job}/update", {"status": status, **more})


@contextmanager
def connected(fleet: Fleet, unit: Unit) -> Iterator[Device]:
    device = Device(fleet, unit)
    try:
        device.open()
        yield device
    finally:
        device.close()


@contextmanager
def connected_as_guest(fleet: Fleet, unit: Unit) -> Iterator[Device]:
    """A device that dials the guest's name, which a proxy resolves to this machine as a guest's network does."""
    with ThreadingTCPServer(("127.0.0.1", 0), _Tunnel) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        device = Device(fleet, unit, proxy.server_address[1])
        try:
            device.open()
            yield device
        finally:
            device.close()
            proxy.shutdown()


class _Tunnel(StreamRequestHandler):
    """HTTP CONNECT (RFC 9110, 9.3.6) to any name, which is always this machine."""

    def handle(self) -> None:
        port = int(self.rfile.readline().split()[1].rpartition(b":")[2])
        while self.rfile.readline().strip():
            pass
        with socket.create_connection(("127.0.0.1", port)) as onward:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=_pump, args=(onward, self.request), daemon=True)
            back.start()
            _pump(self.request, onward)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
