"""AWS IoT's device shadow service as its documentation tells, on a real broker, for the tests.

https://docs.aws.amazon.com/iot/latest/developerguide/device-shadow-mqtt.html and .../device-shadow-document.html
"""

import json
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from awscrt import io, mqtt5
from cryptography.hazmat.primitives.asymmetric import ec

from tests.firmware_agent.support import Broker, Ca, pem, pem_key

LIMIT = 8192


@dataclass
class _Shadow:
    version: int = 0
    exists: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


class Refusal(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ShadowService:
    """Serves all shadows of all things. Tests act as the owner's app by `desire`."""

    def __init__(self, ca: Ca, broker: Broker) -> None:
        self._lock = threading.RLock()
        self._shadows: dict[tuple[str, str], _Shadow] = {}
        #: Every request, as (verb, body).
        self.requests: list[tuple[str, dict[str, Any]]] = []
        #: What the next requests of a verb are refused with.
        self.refuse: list[tuple[str, int]] = []
        #: Called before an update is looked at; a test may be the somebody else who changes it first.
        self.before_update: list[Any] = []
        #: The cloud's clock.
        self.clock = time.time
        key = ec.generate_private_key(ec.SECP256R1())
        tls = io.TlsContextOptions.create_client_with_mtls(
            pem(ca.leaf(key.public_key(), "service")).encode(), pem_key(key).encode()
        )
        tls.override_default_trust_store(pem(ca.certificate).encode())
        self._up: Future[None] = Future()
        self._stopped: Future[None] = Future()
        #: Set while the service hears what is asked.
        self.listens = threading.Event()
        self._client = mqtt5.Client(
            mqtt5.ClientOptions(
                host_name="localhost",
                port=broker.port,
                tls_ctx=io.ClientTlsContext(tls),
                connect_options=mqtt5.ConnectPacket(client_id="service"),
                min_reconnect_delay_ms=50,
                max_reconnect_delay_ms=200,
                on_publish_callback_fn=lambda data: self._on_publish(data.publish_packet),
                on_lifecycle_event_connection_success_fn=self._connected,
                on_lifecycle_event_disconnection_fn=lambda _: self.listens.clear(),
                on_lifecycle_event_stopped_fn=lambda _: self._stopped.set_result(None),
            )
        )

    def start(self) -> None:
        self._client.start()
        self._up.result(20)

    def stop(self) -> None:
        self._client.stop()
        self._stopped.result(20)

    # --- what tests do and see --------------------------------------------------------------------------------------

    def desire(self, thing: str, name: str, **desired: Any) -> int:
        """The owner's app writes."""
        with self._lock:
            answer = self._update((thing, name), {"state": {"desired": desired}})
            self._publish(f"$aws/things/{thing}/shadow/name/{name}/update/accepted", answer)
            return int(answer["version"])

    def delete(self, thing: str, name: str) -> None:
        """The shadow is made anew later, with versions from the start, as after 48 hours."""
        with self._lock:
            self._shadows.pop((thing, name), None)

    def reported(self, thing: str, name: str) -> dict[str, Any]:
        with self._lock:
            found = self._shadows.get((thing, name), _Shadow()).state.get("reported", {})
            return dict(found)

    def desired(self, thing: str, name: str) -> dict[str, Any]:
        with self._lock:
            return dict(self._shadows.get((thing, name), _Shadow()).state.get("desired", {}))

    def version(self, thing: str, name: str) -> int:
        with self._lock:
            return self._shadows.get((thing, name), _Shadow()).version

    def ring(self, thing: str, name: str, version: int, state: dict[str, Any]) -> None:
        """A delta message that is late, or a repetition."""
        self._publish(
            f"$aws/things/{thing}/shadow/name/{name}/update/delta", {"version": version, "timestamp": 1, "state": state}
        )

    def _connected(self, _: object) -> None:
        wanted = [
            mqtt5.Subscription(f"$aws/things/+/shadow/name/+/{verb}", mqtt5.QoS.AT_LEAST_ONCE)
            for verb in ("get", "update")
        ]
        self._client.subscribe(mqtt5.SubscribePacket(wanted)).add_done_callback(self._subscribed)

    def _subscribed(self, done: "Future[Any]") -> None:
        error = done.exception()
        if error is None:
            self.listens.set()
        if not self._up.done():  # else it is a reconnect
            self._up.set_exception(error) if error is not None else self._up.set_result(None)

    # --- the service ------------------------------------------------------------------------------------------------

    def _on_publish(self, packet: Any) -> None:
        _, _, thing, _, _, name, verb = packet.topic.split("/")
        token = None
        try:
            with self._lock:
                body = json.loads(packet.payload or b"{}")
                token = body.get("clientToken")
                self.requests.append((verb, body))
                for index, (refused, code) in enumerate(self.refuse):
                    if refused == verb:
                        del self.refuse[index]
                        raise Refusal(code, "as the test wants it")
                answer = self._get((thing, name)) if verb == "get" else self._update((thing, name), body, hooks=True)
            self._publish(f"{packet.topic}/accepted", {**answer, "clientToken": token})
        except Refusal as refusal:
            answer = {"code": refusal.code, "message": str(refusal), "clientToken": token}
            self._publish(f"{packet.topic}/rejected", answer)

    def _publish(self, topic: str, body: dict[str, Any]) -> None:
        packet = mqtt5.PublishPacket(topic=topic, payload=json.dumps(body).encode(), qos=mqtt5.QoS.AT_LEAST_ONCE)
        self._client.publish(packet)

    def _get(self, key: tuple[str, str]) -> dict[str, Any]:
        shadow = self._shadows.get(key)
        if shadow is None:
            raise Refusal(404, f"No shadow exists with name: '{key[0]}'")
        return {
            "state": shadow.state,
            "metadata": shadow.metadata,
            "version": shadow.version,
            "timestamp": int(self.clock()),
        }

    def _update(self, key: tuple[str, str], body: dict[str, Any], *, hooks: bool = False) -> dict[str, Any]:
        while hooks and self.before_update:
            self.before_update.pop(0)()
        shadow = self._shadows.get(key, _Shadow())
        if "version" in body and body["version"] != shadow.version:
            raise Refusal(409, "Version conflict")
        now = int(self.clock())
        state, metadata = json.loads(json.dumps(shadow.state)), json.loads(json.dumps(shadow.metadata))
        told: dict[str, Any] = {}
        for half in body["state"]:
            if half not in {"desired", "reported"}:
                raise Refusal(400, f"Invalid attribute: {half}")
            told[half] = _merge(state.setdefault(half, {}), metadata.setdefault(half, {}), body["state"][half], now)
            if not state[half]:
                del state[half], metadata[half]
        if len(json.dumps(state)) > LIMIT:
            raise Refusal(413, "The payload exceeds the maximum size allowed")
        self._shadows[key] = _Shadow(shadow.version + 1, exists=True, state=state, metadata=metadata)
        delta = _delta(state.get("desired", {}), state.get("reported", {}))
        if delta:
            self.ring(*key, shadow.version + 1, delta)
        return {"state": body["state"], "metadata": told, "version": shadow.version + 1, "timestamp": now}


def _merge(into: dict[str, Any], metadata: dict[str, Any], change: dict[str, Any], now: int) -> dict[str, Any]:
    """Merges, null deletes; gives the metadata of what was written."""
    written: dict[str, Any] = {}
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
            metadata.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key], metadata[key] = {}, {}
            written[key] = _merge(into[key], metadata[key], value, now)
            if not into[key]:
                del into[key], metadata[key]
        else:
            into[key] = value
            metadata[key] = written[key] = {"timestamp": now}
    return written


def _delta(desired: dict[str, Any], reported: dict[str, Any]) -> dict[str, Any]:
    delta = {}
    for key, value in desired.items():
        if isinstance(value, dict) and isinstance(reported.get(key), dict):
            if inner := _delta(value, reported[key]):
                delta[key] = inner
        elif reported.get(key) != value:
            delta[key] = value
    return delta
