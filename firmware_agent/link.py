"""The link to the cloud: the one owner of the connection and of the client id, and the only one that retries.

    spool ──▶ delivery ──▶ broker ──▶ PUBACK ──▶ deleted, many at a time
    jobs, shadow, metrics: subscribe, publish, ask ──▶ broker       a feature that is refused waits, the rest goes on

One thread (`run`) connects, says hello, makes the subscriptions again, one after the other, and drains the spool; other
threads may publish and ask at any time. What arrives waits in a bounded queue and is handed out by the link's thread: a
listener must only put it somewhere.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from firmware_agent import backoff, diagnosis, keys, messages, topics
from firmware_agent.backoff import Pace
from firmware_agent.board import Board
from firmware_agent.delivery import RETRY_SECONDS, Delivery
from firmware_agent.identity import Identity
from firmware_agent.mqtt import Change, Connection, Down, Failed, NotAllowedError, NotDeliveredError, Up
from firmware_agent.quarantine import Quarantine
from firmware_agent.session import Answer, Refused, Session
from firmware_agent.settings import Settings
from firmware_agent.spool import Spool, Spooled
from firmware_agent.systemd import Systemd
from firmware_agent.timekeeping import Timekeeper

__all__ = ["Answer", "Link", "LinkStatus", "NotAllowedError", "NotDeliveredError", "Refused"]

_log = logging.getLogger(__name__)

_TICK_SECONDS: Final = 1.0
_STEADY_SECONDS: Final = 30.0  # a link that lasted so long was no failure
_CONNECT_SECONDS: Final = 1.0  # AWS IoT takes one CONNECT a second from one client id
_URGENT_SECONDS: Final = 5.0  # an alarm shortens the wait for the next attempt, though not below this
_FILTERS: Final = 8  # in one SUBSCRIBE, for AWS IoT
_ARRIVED_MESSAGES: Final = 256
_ARRIVED_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class LinkStatus:
    """How the link is, for `picket-agent status`.

    Attributes:
        state: `connected`, `connecting` or `offline`.
        detail: where to, or why not.
        held: feature to reason, of those that the broker refuses.
        connected_at: when it was last connected, in seconds of the monotonic clock; None if never.
        failures: how many attempts in a row came to nothing.
    """

    state: Literal["connected", "connecting", "offline"]
    detail: str
    held: Mapping[str, str]
    connected_at: float | None
    failures: int


@dataclass(frozen=True, eq=False)
class _Subscription:
    feature: str
    filters: tuple[str, ...]
    listener: Callable[[str, bytes], None]


# --- what the link's thread is told -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wake:
    """Something is to be done. If it is urgent, it does not wait for the time of the next attempt to connect."""

    urgent: bool = False


@dataclass(frozen=True)
class _Changed:
    """The connection says so; what an older one says does not count."""

    connection: Connection
    change: Change


@dataclass(frozen=True)
class _Sent:
    """What came of a message of the spool; of the hello, when it is None."""

    session: Session
    message: Spooled | None
    error: BaseException | None


@dataclass(frozen=True)
class _Subscribed:
    """What came of a subscription."""

    session: Session
    subscription: _Subscription
    error: BaseException | None


@dataclass(frozen=True)
class _Arrived:
    """A message waits in the queue of those that came in."""


@dataclass(frozen=True)
class _Swap:
    """Use these from now on."""

    identity: Identity
    key: keys.DeviceKey


class Link:
    """The connection of one unit.

    Args:
        settings: the rhythm.
        board: the clock, and what hello says.
        identity: certificate, trust and endpoint.
        key: the key of that certificate.
        spool: what waits to be sent.
        notify: told in words how the link is.
        release, safe_mode: said in each hello.
    """

    def __init__(
        self,
        settings: Settings,
        board: Board,
        identity: Identity,
        key: keys.DeviceKey,
        spool: Spool,
        notify: Systemd,
        *,
        release: str | None = None,
        safe_mode: str | None = None,
    ) -> None:
        self._settings = settings
        self._board = board
        self._release = release
        self._safe_mode = safe_mode
        self._identity = identity
        self._key = key
        self._notify = notify
        #: Whether the time can be right; told the time by the cloud.
        self.timekeeper = Timekeeper(settings.paths, lambda: self._identity.validity)
        self._inbox: queue.SimpleQueue[_Wake | _Changed | _Sent | _Subscribed | _Arrived | _Swap] = queue.SimpleQueue()
        self._pace = Pace(settings.mqtt.publishes_per_second)
        self._quarantine = Quarantine()
        self._delivery = Delivery(
            spool,
            identity.serial,
            self._pace,
            self._quarantine,
            lambda session, message, error: self._inbox.put(_Sent(session, message, error)),
        )
        self._arrivals = _Arrivals()
        self._subscriptions: list[_Subscription] = []
        self._listeners: list[Callable[[], None]] = []

        # How far the connection has come; changed by the link's thread alone.
        self._state: Literal["connected", "connecting", "offline"] = "offline"
        self._detail = "not tried yet"
        self._failures = 0
        self._tried_at = -_URGENT_SECONDS
        self._connect_at = 0.0
        self._connected_at: float | None = None
        self._up_since = 0.0
        self._session: _Up | None = None

    # --- for everybody ---------------------------------------------------------------------------------------------

    @property
    def serial(self) -> str:
        """The unit's name in the cloud."""
        return self._identity.serial

    @property
    def identity(self) -> Identity:
        """What the next connection is made with."""
        return self._identity

    def connected(self) -> bool:
        """Whether hello has been said on a connection that is still up."""
        return self._greeted() is not None

    def status(self) -> LinkStatus:
        """How the link is now."""
        now = time.monotonic()
        up = self._state == "connected"
        held, at = self._quarantine.all(now), now if up else self._connected_at
        return LinkStatus(self._state, self._detail, held, at, 0 if up else self._failures)

    def wake(self, *, urgent: bool = False) -> None:
        """Look into the spool now; `urgent` also shortens the wait for the next attempt to connect."""
        self._inbox.put(_Wake(urgent))

    def connected_as(self) -> str | None:
        """The id of the certificate that the present connection was made with; None without one."""
        up = self._session
        return up.certificate_id if up is not None and up.greeted else None

    def use(self, identity: Identity, key: keys.DeviceKey) -> None:
        """Leave the connection, and make the next one with another certificate and its key."""
        self._inbox.put(_Swap(identity, key))

    def on_connect(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each connect, when the subscriptions are made, and when a message had to be dropped.

        It is called on the link's thread, and must only set an event or fill a queue.
        """
        self._listeners.append(listener)
        if self.connected():
            listener()

    def subscribe(self, feature: str, filters: Sequence[str], listener: Callable[[str, bytes], None]) -> None:
        """Give what is published on `filters` to `listener`: topic and payload, on the link's thread.

        The subscription is made again after each connect.

        Args:
            feature: the word after the thing's name in its topics; it goes on hold when the broker refuses it.
            filters: topic filters.
            listener: must only set an event or fill a queue.
        """
        for start in range(0, len(filters), _FILTERS):
            self._subscriptions.append(_Subscription(feature, tuple(filters[start : start + _FILTERS]), listener))
        self.wake()

    def publish(self, topic: str, payload: bytes) -> "Future[None]":
        """Send once at QoS 1; nothing is kept. The future is done on the PUBACK, or holds `NotDeliveredError`."""
        try:
            return self._usable(topic).publish(topic, payload)
        except NotDeliveredError as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

    def ask(self, topic: str, body: Mapping[str, Any], *, timeout: float = 30.0, token: bool = True) -> Answer:
        """Publish a request, and wait for its answer on `topic`/accepted or `topic`/rejected. Blocks.

        Args:
            topic: where the cloud takes the request.
            body: the request; a `clientToken` is added.
            timeout: seconds for all of it.
            token: False for the few services that know no `clientToken`.

        Raises:
            NotDeliveredError: there is no link, the feature is on hold, or no answer came in time.
            Refused: the cloud said no.
        """
        answer = self._usable(topic).ask(topic, body, timeout=timeout, token=token)
        told = answer.get("timestamp")
        if isinstance(told, int) and topics.feature(topic) in {"jobs", "shadow"}:  # whole seconds, AWS's own
            self.timekeeper.confirm(told)
        return answer

    def _greeted(self) -> Session | None:
        up = self._session
        return up.session if up is not None and up.greeted else None

    def _usable(self, topic: str) -> Session:
        session = self._greeted()
        if session is None:
            raise NotDeliveredError(f"there is no link: {self._detail}")
        feature = topics.feature(topic)
        reason = self._quarantine.held(feature, time.monotonic())
        if reason is not None:
            raise NotDeliveredError(f"{feature} is on hold: {reason}")
        return session

    # --- the link's thread -----------------------------------------------------------------------------------------

    def run(self, stop: threading.Event, beat: Callable[[], None]) -> None:
        """Until `stop` is set and `wake` called; `beat` is called at least every few seconds.

        Raises:
            KeyFault: the key does not fit the certificate.
        """
        connection: Connection | None = None
        try:
            while not stop.is_set():
                beat()
                self.timekeeper.tick()
                if self._state == "offline" and time.monotonic() >= self._connect_at and self._clock_allows():
                    connection = connection or self._new_connection()
                    self._state, self._tried_at = "connecting", time.monotonic()
                    connection.connect()
                for event in self._events():
                    connection = self._note(event, connection)
                if self._session is not None:
                    self._go_on(self._session)
        finally:
            self._end_session("the agent ends", hung_up=False)
            self._state, self._detail = "offline", "the agent ends"
            self.timekeeper.keep()  # before a planned reboot, too
            if connection is not None:
                connection.stop()

    def _new_connection(self) -> Connection:
        """A connection whose words carry its name, so that a late one of an older connection is known."""
        made: list[Connection] = []
        made.append(
            Connection(
                self._identity,
                self._key,
                keep_alive_seconds=self._settings.mqtt.keep_alive_seconds,
                on_change=lambda change: self._inbox.put(_Changed(made[0], change)),
                on_message=self._arrive,
            )
        )
        return made[0]

    def _clock_allows(self) -> bool:
        """Whether TLS can work; when it cannot, the next look at the clock is a moment later."""
        wrong = self.timekeeper.wrong(self._board.clock().unix)
        if wrong is not None:
            self._connect_at = time.monotonic() + _TICK_SECONDS
            self._offline(wrong)
        return wrong is None

    def _events(self) -> "list[_Wake | _Changed | _Sent | _Subscribed | _Arrived | _Swap]":
        """All that has happened, after a wait for the first of it."""
        events = []
        try:
            events.append(self._inbox.get(timeout=self._patience(time.monotonic())))
            while True:
                events.append(self._inbox.get_nowait())
        except queue.Empty:
            return events

    def _patience(self, now: float) -> float:
        """Seconds until there may be something to do without being told."""
        waits = [_TICK_SECONDS]
        if self._state == "offline":
            waits.append(self._connect_at - now)
        if self._greeted() is not None:
            waits.append(wait if (wait := self._delivery.patience(now)) is not None else _TICK_SECONDS)
        return max(0.0, min(waits))

    def _note(self, event: object, connection: Connection | None) -> Connection | None:
        """Take in one event; gives the connection to use from now on."""
        current = None if self._session is None else self._session.session
        match event:
            case _Changed(source, change) if source is connection:
                self._changed(change, source)
            case _Sent(session, None, error) if session is current and self._session is not None:
                self._said_hello(self._session, error)
            case _Sent(session, message, error) if session is current and message is not None:
                if not self._delivery.note(message, error) and connection is not None:
                    self._retry("nothing is acknowledged any more", connection)
            case _Subscribed(session, subscription, error) if session is current and self._session is not None:
                self._session.subscribed(subscription, error)
            case _Arrived():
                self._hand_out()
            case _Wake(urgent=True):
                self._connect_at = min(self._connect_at, self._tried_at + _URGENT_SECONDS)
            case _Swap(identity, key):
                self._identity, self._key = identity, key
                self._end_session("the certificate changes", hung_up=False)
                self._state, self._connect_at = "offline", self._tried_at + _CONNECT_SECONDS
                if connection is not None:
                    connection.stop()
                return None
            case _:
                pass
        return connection

    def _changed(self, change: Change, connection: Connection) -> None:
        match change:
            case Up():
                self._state, self._up_since = "connected", time.monotonic()
                session = Session(connection, self._quarantine, self._pace)
                self._session = _Up(session, self._identity.certificate_sha256)
                self._delivery.begin()
                self._detail = f"connected to {self._identity.host}"
                self._notify.status(self._detail)
            case Down(detail) if self._state == "connected":  # else it was let go of already
                self._retry(detail, connection)
            case Failed(outcome, detail) if self._state == "connecting":
                why = diagnosis.explain(self._identity) if outcome in {"tls", "unreachable", "dropped"} else None
                self._retry(f"{outcome}, {detail}" + (f" ({why})" if why else ""), connection)
            case _:
                pass

    def _retry(self, reason: str, connection: Connection) -> None:
        """After a failed attempt or a lost link: let go, and set the time of the next attempt."""
        now = time.monotonic()
        steady = self._state == "connected" and now - self._up_since >= _STEADY_SECONDS
        wait = backoff.delay(0 if steady else self._failures)
        self._failures = 1 if steady else self._failures + 1
        self._end_session(reason, hung_up=True)
        self._state, self._connect_at = "offline", max(now + wait, self._tried_at + _CONNECT_SECONDS)
        self._offline(reason)
        connection.stop()

    def _end_session(self, reason: str, *, hung_up: bool) -> None:
        if self._session is not None:
            self._connected_at = time.monotonic()
            self._session.session.end(reason, hung_up=hung_up)
            self._session = None

    def _offline(self, reason: str) -> None:
        if reason != self._detail:
            _log.info("offline: %s", reason)
        self._detail = reason
        self._notify.status(f"offline: {reason}")

    # --- while it is up --------------------------------------------------------------------------------------------

    def _go_on(self, up: "_Up") -> None:
        now = time.monotonic()
        if up.hello_at is not None and self._quarantine.held(topics.HELLO, now) is not None:
            up.hello_at, up.greeted = None, True  # the broker hangs up on it: alarms come first
        if up.hello_at is not None and now >= up.hello_at:
            up.hello_at = None
            sent = up.session.publish(topics.data_topic(self.serial, topics.HELLO), self._hello())
            sent.add_done_callback(partial(self._hello_told, up.session))
        if not up.greeted:
            return
        self._delivery.go_on(up.session)
        self._subscribe_next(up, now)
        if up.to_tell and up.subscribing is None:
            up.to_tell = False
            for listener in list(self._listeners):
                listener()

    def _subscribe_next(self, up: "_Up", now: float) -> None:
        """One at a time: if the broker hangs up, it is known on whom."""
        if up.subscribing is not None:
            return
        for subscription in list(self._subscriptions):
            if subscription in up.made or self._quarantine.held(subscription.feature, now) is not None:
                continue
            up.subscribing = subscription
            made = up.session.subscribe(subscription.feature, subscription.filters)
            made.add_done_callback(partial(self._subscription_told, up.session, subscription))
            return

    def _hello_told(self, session: Session, sent: "Future[None]") -> None:
        self._inbox.put(_Sent(session, None, sent.exception()))

    def _subscription_told(self, session: Session, subscription: _Subscription, made: "Future[None]") -> None:
        self._inbox.put(_Subscribed(session, subscription, made.exception()))

    def _said_hello(self, up: "_Up", error: BaseException | None) -> None:
        # Alarms wait neither for a policy without hello nor for an acknowledgement that does not come.
        refused = isinstance(error, NotAllowedError)
        up.greeted = up.greeted or error is None or refused or "TIMEOUT" in str(error)
        if error is not None and not refused:
            _log.warning("hello was not delivered: %s", error)
            up.hello_at = time.monotonic() + RETRY_SECONDS

    def _hello(self) -> bytes:
        return messages.hello(
            "product",
            nonce=None,
            facts=self._board.facts(),
            identity=self._identity,
            image=self._settings.image,
            clock=self._board.clock(),
            key=keys.grade(self._settings),
            release=self._release,
            safe_mode=self._safe_mode,
        ).payload()

    # --- what comes in ---------------------------------------------------------------------------------------------

    def _arrive(self, topic: str, payload: bytes) -> None:
        """On the SDK's thread."""
        if self._arrivals.put(topic, payload):
            self._inbox.put(_Arrived())

    def _hand_out(self) -> None:
        topic, payload, missed = self._arrivals.get()
        if missed and self._session is not None:
            _log.warning("more messages arrived than can be kept; some were dropped")
            self._session.to_tell = True  # so that everybody asks for the state again
        if self._session is not None and self._session.session.answered(topic, payload):
            return
        for subscription in list(self._subscriptions):
            if any(topics.matches(one, topic) for one in subscription.filters):
                subscription.listener(topic, payload)


class _Up:
    """How far a session has come; the link's thread changes it."""

    def __init__(self, session: Session, certificate_id: str) -> None:
        self.session = session
        self.certificate_id = certificate_id
        self.hello_at: float | None = 0.0  # when to say it; None when it is on its way or said
        self.greeted = False
        self.made: set[_Subscription] = set()
        self.subscribing: _Subscription | None = None
        self.to_tell = True

    def subscribed(self, subscription: _Subscription, error: BaseException | None) -> None:
        """A failed one is tried again, when its feature is no longer on hold."""
        self.subscribing = None
        if error is None:
            self.made.add(subscription)
            self.to_tell = True


class _Arrivals:
    """A bounded queue; when it is full, what comes is dropped, and that is told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._missed = False

    def put(self, topic: str, payload: bytes) -> bool:
        with self._lock:
            if len(self._messages) >= _ARRIVED_MESSAGES or self._bytes + len(payload) > _ARRIVED_BYTES:
                self._missed = True
                return False
            self._messages.append((topic, payload))
            self._bytes += len(payload)
            return True

    def get(self) -> tuple[str, bytes, bool]:
        """The oldest, and whether one was dropped since the last."""
        with self._lock:
            topic, payload = self._messages.popleft()
            self._bytes -= len(payload)
            missed, self._missed = self._missed, False
            return topic, payload, missed
