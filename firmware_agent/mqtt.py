"""The connection to the cloud: MQTT 5 over mutual TLS, AWS's SDK behind one small class.

What the SDK's defaults would do to an alarm, and what is done here instead:

- it keeps unsent messages in memory, without limit, and loses them at exit: here a publish without a link fails at
  once, and the spool, which is durable, tries again;
- its reconnects wait anything up to a minute from the first one on: here the caller says when to try;
- its keep-alive is 20 minutes: here it is the setting's, under a minute;
- with a TPM's key it would accept TLS 1.1: here 1.2 is the least;
- an exception in its callbacks vanishes and a callback that waits stops all of its connections: here callbacks only
  put what they saw into the hands of somebody else.
"""

import contextlib
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, Final, Literal

from awscrt import exceptions, io, mqtt5

from firmware_agent import timekeeping
from firmware_agent.errors import KeyFault
from firmware_agent.identity import Identity
from firmware_agent.keys import DeviceKey

Outcome = Literal["held", "dropped", "refused", "unreachable", "tls"]

#: How long one attempt may take in all. aws-lc/s2n delays the report of a TLS failure by 10 to 30 s on purpose
#: ("blinding"), so anything shorter would call a TLS failure a timeout.
ATTEMPT_SECONDS: Final = 45.0

ACK_SECONDS: Final = 20
_CONNACK_MILLISECONDS: Final = 20_000
_PING_MILLISECONDS: Final = 20_000
_NEVER_MILLISECONDS: Final = 3_600_000
_STOP_SECONDS: Final = 5.0
_REFUSAL: Final = 0x80  # and above (MQTT 5, 2.4)
_LARGEST_PACKET: Final = 160 * 1024  # AWS IoT sends payloads of up to 128 KiB

#: On 443 AWS IoT tells MQTT from HTTPS by this name (AWS IoT developer guide, "Device communication protocols").
_HTTPS_PORT: Final = 443
_ALPN: Final = "x-amzn-mqtt-ca"


class NotDeliveredError(Exception):
    """The broker did not acknowledge a message; it may or may not have got it."""


class NotAllowedError(NotDeliveredError):
    """The broker has said no, by a reason code of 0x80 or above (MQTT 5, 2.4)."""


@dataclass(frozen=True)
class Up:
    """The broker has accepted the connection."""


@dataclass(frozen=True)
class Failed:
    """An attempt to connect came to nothing."""

    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Down:
    """An accepted connection has ended."""

    detail: str


@dataclass(frozen=True)
class Stopped:
    """The client has let go of everything, after `stop`."""


Change = Up | Failed | Down | Stopped


@dataclass(frozen=True)
class Attempt:
    """What one attempt to connect came to, and after how long."""

    outcome: Outcome
    seconds: float
    detail: str


class Connection:
    """One client: `connect`, then after `Failed` or `Down` always `stop`, and `connect` again when it is time.

    Args:
        identity: certificate, trust and endpoint; its serial is the client id.
        key: the key of that certificate.
        keep_alive_seconds: how soon a dead link is noticed.
        on_change: called from the SDK's thread: must neither block nor raise; put what it gets into a queue.
        on_message: the same, for each message that arrives on a subscription: topic and payload.

    Raises:
        KeyFault: the key does not fit the certificate, or its store does not let it be used.
    """

    def __init__(
        self,
        identity: Identity,
        key: DeviceKey,
        *,
        keep_alive_seconds: int,
        on_change: Callable[[Change], None],
        on_message: Callable[[str, bytes], None] = lambda _topic, _payload: None,
    ) -> None:
        self._on_change = on_change
        self._stopped: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._running = False
        try:
            tls = key.tls(identity.chain)
            tls.min_tls_ver = io.TlsVersion.TLSv1_2
            tls.override_default_trust_store(identity.trust.encode())
            if identity.port == _HTTPS_PORT:
                tls.alpn_list = [_ALPN]
            context = io.ClientTlsContext(tls)
        except exceptions.AwsCrtError as error:
            raise KeyFault(f"the device key cannot be used for TLS: {error}") from error
        self._client = mqtt5.Client(
            mqtt5.ClientOptions(
                host_name=identity.host,
                port=identity.port,
                tls_ctx=context,
                connect_options=mqtt5.ConnectPacket(
                    client_id=identity.serial,
                    keep_alive_interval_sec=keep_alive_seconds,
                    maximum_packet_size=_LARGEST_PACKET,
                ),
                session_behavior=mqtt5.ClientSessionBehaviorType.CLEAN,
                offline_queue_behavior=mqtt5.ClientOperationQueueBehaviorType.FAIL_ALL_ON_DISCONNECT,
                # No reconnects of its own: `connect` is called again when it is time.
                min_reconnect_delay_ms=_NEVER_MILLISECONDS,
                max_reconnect_delay_ms=_NEVER_MILLISECONDS,
                retry_jitter_mode=mqtt5.ExponentialBackoffJitterMode.NONE,
                ping_timeout_ms=_PING_MILLISECONDS,
                connack_timeout_ms=_CONNACK_MILLISECONDS,
                ack_timeout_sec=ACK_SECONDS,
                on_publish_callback_fn=lambda data: on_message(
                    data.publish_packet.topic, bytes(data.publish_packet.payload or b"")
                ),
                on_lifecycle_event_connection_success_fn=lambda _: self._on_change(Up()),
                on_lifecycle_event_connection_failure_fn=lambda data: self._on_change(_failure(data)),
                on_lifecycle_event_disconnection_fn=lambda data: self._on_change(Down(_ending(data))),
                on_lifecycle_event_stopped_fn=lambda _: self._has_stopped(),
                disable_metrics=True,  # the user name stays ours
            ),
        )

    def connect(self) -> None:
        """Start to connect; what comes of it is told to `on_change`: `Up` or `Failed`, and after `Up` once `Down`."""
        self._running = True
        self._client.start()

    def publish(self, topic: str, payload: bytes) -> "Future[None]":
        """Send at QoS 1. The future is done when the broker has acknowledged, or holds `NotDeliveredError`."""
        packet = mqtt5.PublishPacket(topic=topic, payload=payload, qos=mqtt5.QoS.AT_LEAST_ONCE)
        return _settled(self._client.publish(packet), lambda answer: [answer.puback.reason_code])

    def subscribe(self, filters: Sequence[str]) -> "Future[None]":
        """Ask for what matches `filters` (AWS IoT takes 8 at once), at QoS 1; for this connection only.

        The future is done when the broker has agreed to all, or holds `NotDeliveredError`.
        """
        wanted = [mqtt5.Subscription(topic_filter=one, qos=mqtt5.QoS.AT_LEAST_ONCE) for one in filters]
        packet = mqtt5.SubscribePacket(subscriptions=wanted)
        return _settled(self._client.subscribe(packet), lambda answer: answer.reason_codes)

    def unsubscribe(self, filters: Sequence[str]) -> "Future[None]":
        """Ask for no more of what matches `filters`."""
        packet = mqtt5.UnsubscribePacket(topic_filters=list(filters))
        return _settled(self._client.unsubscribe(packet), lambda answer: answer.reason_codes)

    def stop(self) -> None:
        """Disconnect, and wait until the SDK has let go of the connection; nothing when it has already."""
        if not self._running:  # the SDK would not tell of a stop that changes nothing
            return
        self._running = False
        self._client.stop()
        with contextlib.suppress(queue.Empty):
            self._stopped.get(timeout=_STOP_SECONDS)

    def _has_stopped(self) -> None:
        self._stopped.put(None)
        self._on_change(Stopped())


def _settled(sent: "Future[Any]", codes: Callable[[Any], Iterable[int]]) -> "Future[None]":
    """What becomes of an operation: done, or `NotDeliveredError`."""
    settled: Future[None] = Future()

    def settle(sent: "Future[Any]") -> None:
        try:
            refusals = [code for code in codes(sent.result()) if code >= _REFUSAL]
        except (exceptions.AwsCrtError, CancelledError) as error:
            settled.set_exception(NotDeliveredError(_name(error)))
            return
        if refusals:
            settled.set_exception(NotAllowedError(f"the broker refused it: {_reason(refusals[0])}"))
        else:
            settled.set_result(None)

    sent.add_done_callback(settle)
    return settled


def attempt(
    identity: Identity,
    key: DeviceKey,
    topic: str,
    payload: bytes,
    *,
    keep_alive_seconds: int,
    now: float,
) -> Attempt:
    """Try once to connect and to have one message acknowledged.

    The cloud hangs up on a unit's very first connection while it registers the certificate (JITP), so one attempt is
    one client: the line sees each by itself.
    """
    start = time.monotonic()

    def ended(outcome: Outcome, detail: str) -> Attempt:
        return Attempt(outcome, round(time.monotonic() - start, 3), detail)

    wrong = timekeeping.certainly_wrong(now, timekeeping.bounds(identity.validity))
    if wrong is not None:
        return ended("tls", wrong)
    changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
    connection = Connection(identity, key, keep_alive_seconds=keep_alive_seconds, on_change=changes.put)
    connection.connect()
    try:
        change = changes.get(timeout=ATTEMPT_SECONDS)
        if isinstance(change, Failed):
            return ended(change.outcome, change.detail)
        connection.publish(topic, payload).result(timeout=ATTEMPT_SECONDS)
        return ended("held", f"{identity.host}:{identity.port} acknowledged on {topic}")
    except queue.Empty:
        return ended("unreachable", f"{identity.host}:{identity.port} did not answer in {ATTEMPT_SECONDS:g} s")
    except (NotDeliveredError, TimeoutError) as error:
        return ended("dropped", f"connected, then: {error or 'no acknowledgement'}")
    finally:
        connection.stop()


# --- what the SDK's errors mean -----------------------------------------------------------------------------------

_OUTCOMES: Final[tuple[tuple[Outcome, tuple[str, ...]], ...]] = (
    ("refused", ("MQTT5_CONNACK_CONNECTION_REFUSED",)),
    # Before TLS is up: a name that does not resolve, a port that nobody listens on, no route.
    ("unreachable", ("_DNS_", "CONNECTION_REFUSED", "SOCKET_TIMEOUT", "NETWORK_DOWN", "NO_ROUTE", "CONNECT_ABORTED")),
    ("tls", ("_TLS_", "PKCS11")),
    # The other side closed, before it accepted.
    ("dropped", ("HANGUP", "SOCKET_CLOSED", "CONNECTION_CLOSED", "BROKEN_PIPE", "CONNACK_TIMEOUT", "CHANNEL")),
)


def classify(name: str) -> Outcome:
    """What an error of the SDK, by its name, says about an attempt to connect."""
    for outcome, marks in _OUTCOMES:
        if any(mark in name for mark in marks):
            return outcome
    return "dropped"


def _name(error: BaseException | None) -> str:
    return str(getattr(error, "name", None) or type(error).__name__)


def _reason(code: Any) -> str:
    """A reason code as MQTT names it; the SDK gives an int or an enum, depending on the packet."""
    return str(getattr(code, "name", code))


def _failure(data: Any) -> Failed:
    name = _name(data.exception)
    if data.connack_packet is not None:
        return Failed("refused", f"CONNACK {_reason(data.connack_packet.reason_code)}")
    return Failed(classify(name), name)


def _ending(data: Any) -> str:
    if data.disconnect_packet is not None:
        return f"DISCONNECT {_reason(data.disconnect_packet.reason_code)}"
    return _name(data.exception)
