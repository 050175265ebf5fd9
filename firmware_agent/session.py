"""One accepted connection, as the agent's threads use it: publish, subscribe, ask. It is over when the link goes down.

A request and its answer are two publishes. The cloud answers on the request's topic with `/accepted` or `/rejected`
after it, and puts the request's `clientToken` into the answer
(https://docs.aws.amazon.com/iot/latest/developerguide/reserved-topics.html).
"""

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from firmware_agent import topics
from firmware_agent.backoff import Pace
from firmware_agent.mqtt import Connection, NotAllowedError, NotDeliveredError
from firmware_agent.quarantine import Operation, Quarantine

_log = logging.getLogger(__name__)

#: The parsed JSON object of an answer: each asker makes its own frozen value of it at once.
Answer = Mapping[str, Any]

_T = TypeVar("_T")

_ANSWERED_TOPICS: Final = 12  # AWS IoT allows 50 subscriptions on one connection; each of these needs two
_ACCEPTED: Final = "/accepted"
_REJECTED: Final = "/rejected"


class Refused(Exception):
    """The cloud answered a request with `rejected`.

    Attributes:
        code: its word or number for it, e.g. `VersionMismatch`, `409`.
        message: its reason, for a person.
        body: the whole answer.
    """

    def __init__(self, code: str, message: str, body: Answer) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.body = body


@dataclass(frozen=True, eq=False)
class _Question:
    topic: str
    token: bool
    answer: "Future[Answer]"


class Session:
    """What can be done while a connection is up.

    Args:
        connection: which is up.
        quarantine: learns what the broker refuses.
        pace: learns what was sent.
    """

    def __init__(self, connection: Connection, quarantine: Quarantine, pace: Pace) -> None:
        self._connection = connection
        self._quarantine = quarantine
        self._pace = pace
        self._lock = threading.Lock()
        self._over: str | None = None
        self._waiting: dict[Operation, int] = {}
        self._kept: set[str] = set()
        self._answers: OrderedDict[str, Future[None]] = OrderedDict()
        self._questions: dict[str, _Question] = {}

    def publish(self, topic: str, payload: bytes) -> "Future[None]":
        """Send at QoS 1; done on the PUBACK, or holds `NotDeliveredError`."""
        with self._lock:
            self._pace.spend(time.monotonic())
        return self._watched(Operation(topics.feature(topic), topic), self._connection.publish(topic, payload))

    def subscribe(self, feature: str, filters: Sequence[str]) -> "Future[None]":
        """Ask for what matches `filters`; done when the broker has agreed, or holds `NotDeliveredError`."""
        with self._lock:
            self._kept.update(filters)
        return self._asked_for(feature, filters)

    def _asked_for(self, feature: str, filters: Sequence[str]) -> "Future[None]":
        return self._watched(Operation(feature, filters[0]), self._connection.subscribe(filters))

    def ask(self, topic: str, body: Mapping[str, Any], *, timeout: float, token: bool) -> Answer:
        """Publish a request and wait for its answer; see `Link.ask`."""
        end = time.monotonic() + timeout
        _wait(self._subscribed(topic), end)
        name = os.urandom(8).hex()
        question = _Question(topic, token, Future())
        with self._lock:
            if self._over is not None:
                raise NotDeliveredError(self._over)
            self._questions[name] = question
        try:
            request = {**body, "clientToken": name} if token else body
            _wait(self.publish(topic, json.dumps(request, separators=(",", ":")).encode()), end)
            return _wait(question.answer, end)
        except NotDeliveredError as error:
            raise NotDeliveredError(self._over or str(error)) from error
        finally:
            with self._lock:
                self._questions.pop(name, None)

    def answered(self, topic: str, payload: bytes) -> bool:
        """Whether this message is the answer to a question, which then has it."""
        asked = topic.removesuffix(_ACCEPTED).removesuffix(_REJECTED)
        if asked == topic:
            return False
        try:
            body = json.loads(payload)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            _log.warning("an answer on %s is no JSON object", topic)
            return True
        question = self._question(asked, body.get("clientToken"))
        if question is None:
            return False
        if topic.endswith(_ACCEPTED):
            question.answer.set_result(body)
        else:
            code, message = str(body.get("code", "")), str(body.get("message", ""))
            question.answer.set_exception(Refused(code, message, body))
        return True

    def end(self, reason: str, *, hung_up: bool) -> None:
        """The connection is gone: whoever waits for an answer is told so; a hang-up makes the waiting ones suspect."""
        with self._lock:
            self._over = f"the link went down: {reason}"
            questions, self._questions = list(self._questions.values()), {}
            waiting = [operation for operation, count in self._waiting.items() if count > 0]
        if hung_up:
            # Alarms are what the link is for: they are never put on hold.
            suspects = [operation for operation in waiting if operation.feature != topics.ALARM]
            self._quarantine.hung_up(suspects, reason, time.monotonic())
        for question in questions:
            question.answer.set_exception(NotDeliveredError(self._over))

    # ---------------------------------------------------------------------------------------------------------------

    def _question(self, topic: str, token: object) -> _Question | None:
        """Takes out who asked: by the token, or the first on this topic that asks a service without tokens.

        Others' requests are answered on the same topic, and need not have a token.
        """
        with self._lock:
            if isinstance(token, str):
                return self._questions.pop(token, None)
            for name, question in self._questions.items():
                if question.topic == topic and not question.token:
                    return self._questions.pop(name)
            return None

    def _subscribed(self, topic: str) -> "Future[None]":
        """The subscription to a topic's answers: made once in a session, the longest unused ones let go."""
        with self._lock:
            known = self._answers.get(topic)
            if known is not None and not (known.done() and known.exception() is not None):
                self._answers.move_to_end(topic)
                return known
        made = self._asked_for(topics.feature(topic), [topic + _ACCEPTED, topic + _REJECTED])
        with self._lock:
            self._answers[topic] = made
            old = self._answers.popitem(last=False)[0] if len(self._answers) > _ANSWERED_TOPICS else None
            unused = [old + end for end in (_ACCEPTED, _REJECTED) if old + end not in self._kept] if old else []
        if unused:
            self._connection.unsubscribe(unused)
        return made

    def _watched(self, operation: Operation, future: "Future[None]") -> "Future[None]":
        """Keep in mind what is under way, and learn from what comes of it."""
        with self._lock:
            self._waiting[operation] = self._waiting.get(operation, 0) + 1

        def settled(done: "Future[None]") -> None:
            error = done.exception()
            if error is not None and not isinstance(error, NotAllowedError) and "TIMEOUT" not in str(error):
                return  # the link went down with it; `end` asks what was waiting
            with self._lock:
                self._waiting[operation] -= 1
                if not self._waiting[operation]:
                    del self._waiting[operation]
            if error is None:
                self._quarantine.proved(operation)
            elif isinstance(error, NotAllowedError) and operation.feature != topics.ALARM:
                self._quarantine.refused(operation.feature, f"{operation.topic}: {error}", time.monotonic())

        future.add_done_callback(settled)
        return future


def _wait(future: "Future[_T]", end: float) -> _T:
    """What `future` holds, by the monotonic time `end`.

    Raises:
        NotDeliveredError: it holds that, or nothing in time.
        Refused: it holds that.
    """
    try:
        return future.result(timeout=max(0.0, end - time.monotonic()))
    except FutureTimeoutError:
        raise NotDeliveredError("no answer in time") from None
