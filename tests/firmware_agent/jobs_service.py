"""AWS IoT Jobs' data plane in memory: versions, transitions, refusals with their codes, retries, cancelling, timers.

Sources: the AWS IoT developer guide, "Jobs device MQTT API operations", "Job execution states", "Job timeout
configuration", "Job execution retry configuration"; the constraints of botocore's iot-jobs-data model.

Three ways in: as the cloud (`create`, `cancel`, `delete`, `pass_time`), as a device over messages (`handle`), and as a
device behind the link's interface (`LocalLink`). `Bridge` serves the same over a real broker.
"""

import json
import queue
import re
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from awscrt import io, mqtt5
from cryptography.hazmat.primitives.asymmetric import ec

from firmware_agent import topics
from firmware_agent.link import Answer, Refused
from firmware_agent.mqtt import NotDeliveredError
from tests.firmware_agent.support import Ca, pem, pem_key

TERMINAL = frozenset({"SUCCEEDED", "FAILED", "REJECTED", "TIMED_OUT", "CANCELED", "REMOVED"})
STATUSES = TERMINAL | {"QUEUED", "IN_PROGRESS"}
FROM_DEVICE = frozenset({"IN_PROGRESS", "SUCCEEDED", "FAILED", "REJECTED"})
_KEY = re.compile(r"[a-zA-Z0-9:_-]{1,128}")
_JOB = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MAX_DOCUMENT = 32_768
_UPDATE_FIELDS = {
    "status",
    "statusDetails",
    "expectedVersion",
    "executionNumber",
    "includeJobExecutionState",
    "includeJobDocument",
    "stepTimeoutInMinutes",
    "clientToken",
}
_DESCRIBE_FIELDS = {"executionNumber", "includeJobDocument", "clientToken"}
_START_FIELDS = {"statusDetails", "stepTimeoutInMinutes", "clientToken"}


class _No(Exception):
    def __init__(self, code: str, message: str, state: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.state = code, message, state


class CannotDo(Exception):
    """The control plane refuses."""


@dataclass
class Execution:
    """One execution of a job on one thing."""

    thing: str
    job: str
    number: int
    queued_at: float
    status: str = "QUEUED"
    version: int = 1
    details: dict[str, str] = field(default_factory=dict)
    started_at: float | None = None
    updated_at: float = 0.0
    step_ends: float | None = None
    ends: float | None = None

    @property
    def open(self) -> bool:
        return self.status not in TERMINAL

    def state(self) -> dict[str, Any]:
        return {"status": self.status, "statusDetails": self.details, "versionNumber": self.version}


@dataclass
class Job:
    """A job, with its document as it is now: a callable gives a fresh one each time, as presigned URLs are."""

    document: Callable[[], Mapping[str, Any]]
    retries: Mapping[str, int]
    minutes: int | None


@dataclass(frozen=True)
class Told:
    """An update that counted."""

    job: str
    number: int
    status: str
    details: Mapping[str, str]
    minutes: int | None

    @property
    def short(self) -> str:
        """`IN_PROGRESS check`, `FAILED unhealthy`, `SUCCEEDED`."""
        word = self.details.get("phase") if self.status == "IN_PROGRESS" else self.details.get("code")
        return f"{self.status} {word}" if word else self.status


class JobsService:
    """The jobs of all things."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.jobs: dict[str, Job] = {}
        self.executions: list[Execution] = []
        #: Every update that a device made and the service took.
        self.told: list[Told] = []
        #: Every refusal: topic and code.
        self.refused: list[tuple[str, str]] = []
        #: Where notifications go.
        self.publish: Callable[[str, bytes], None] = lambda _topic, _payload: None
        self._next: dict[str, tuple[str, int] | None] = {}
        self._lock = threading.RLock()

    # --- the control plane -----------------------------------------------------------------------------------------

    def create(
        self,
        job: str,
        document: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        *things: str,
        retries: Mapping[str, int] | None = None,
        minutes: int | None = None,
    ) -> None:
        """CreateJob; `retries` by FAILED, TIMED_OUT or ALL, `minutes` is inProgressTimeoutInMinutes."""
        assert _JOB.fullmatch(job), job
        make = document if callable(document) else lambda: document
        assert len(json.dumps(make())) <= _MAX_DOCUMENT
        with self._lock:
            self.jobs[job] = Job(make, retries or {}, minutes)
            for thing in things:
                self.executions.append(Execution(thing, job, 1, self.now))
                self._notify(thing, changed=True)

    def cancel(self, job: str, thing: str, *, force: bool = False) -> None:
        """CancelJobExecution: one in progress only by force."""
        with self._lock:
            execution = self.latest(job, thing)
            if execution is None:
                raise CannotDo("ResourceNotFound")
            if not execution.open or (execution.status == "IN_PROGRESS" and not force):
                raise CannotDo("InvalidStateTransition")
            self._end(execution, "CANCELED")

    def delete(self, job: str, thing: str, *, force: bool = False) -> None:
        """DeleteJobExecution: one in progress only by force."""
        with self._lock:
            execution = self.latest(job, thing)
            if execution is None:
                raise CannotDo("ResourceNotFound")
            if execution.status == "IN_PROGRESS" and not force:
                raise CannotDo("InvalidStateTransition")
            self.executions.remove(execution)
            self._notify(thing, changed=execution.open)

    def pass_time(self, minutes: float) -> None:
        """Time goes by, and timers run out."""
        with self._lock:
            self.now += minutes * 60
            for execution in list(self.executions):
                ends = [end for end in (execution.ends, execution.step_ends) if end is not None]
                if execution.status == "IN_PROGRESS" and ends and self.now >= min(ends):
                    self._end(execution, "TIMED_OUT")

    def latest(self, job: str, thing: str) -> Execution | None:
        """The execution with the highest number."""
        found = [one for one in self.executions if (one.job, one.thing) == (job, thing)]
        return max(found, key=lambda one: one.number, default=None)

    def status(self, job: str, thing: str) -> str | None:
        """DescribeJobExecution's status; None if there is none."""
        found = self.latest(job, thing)
        return None if found is None else found.status

    # --- the data plane ----------------------------------------------------------------------------------------------

    def handle(self, topic: str, payload: bytes) -> tuple[str, bytes] | None:
        """What a device published: the topic and payload of the answer; None for what is no request."""
        parts = topic.split("/")
        if parts[:2] != ["$aws", "things"] or len(parts) < 5 or parts[3] != "jobs":
            return None
        if parts[-1] in {"accepted", "rejected", "notify", "notify-next"}:
            return None
        with self._lock:
            body: Any = {}
            try:
                try:
                    body = json.loads(payload or b"{}")
                except ValueError:
                    raise _No("InvalidJson", "the payload is no JSON") from None
                if not isinstance(body, dict):
                    raise _No("InvalidJson", "the payload is no object")
                answer = self._answer(parts[2], parts[4:], body)
            except _No as no:
                self.refused.append((topic, no.code))
                answer = {"code": no.code, "message": no.message}
                if no.state is not None:
                    answer["executionState"] = dict(no.state)
                verdict = "rejected"
            else:
                verdict = "accepted"
            answer["timestamp"] = int(self.now)
            if isinstance(body, dict) and "clientToken" in body:
                answer["clientToken"] = body["clientToken"]
            return f"{topic}/{verdict}", json.dumps(answer).encode()

    def _answer(self, thing: str, rest: Sequence[str], body: dict[str, Any]) -> dict[str, Any]:
        match list(rest):
            case ["get"]:
                return self._pending(thing)
            case ["start-next"]:
                return self._start_next(thing, body)
            case [job, "get"]:
                return self._describe(thing, job, body)
            case [job, "update"]:
                return self._update(thing, job, body)
        raise _No("InvalidTopic", "no such operation")

    def _pending(self, thing: str) -> dict[str, Any]:
        def summaries(status: str) -> list[dict[str, Any]]:
            return [self._summary(one) for one in self._open(thing) if one.status == status]

        return {"inProgressJobs": summaries("IN_PROGRESS"), "queuedJobs": summaries("QUEUED")}

    def _start_next(self, thing: str, body: dict[str, Any]) -> dict[str, Any]:
        _known(body, _START_FIELDS)
        execution = self._first(thing)
        if execution is None:
            return {}
        if execution.status == "QUEUED":
            self._set(execution, "IN_PROGRESS", _details(body), _minutes(body))
        return {"execution": self._described(execution, document=True)}

    def _describe(self, thing: str, job: str, body: dict[str, Any]) -> dict[str, Any]:
        _known(body, _DESCRIBE_FIELDS)
        document = body.get("includeJobDocument", True)
        if job == "$next":
            first = self._first(thing)
            return {} if first is None else {"execution": self._described(first, document=document)}
        execution = self._find(thing, job, body)
        if not execution.open:
            raise _No("TerminalStateReached", f"the execution is {execution.status}")
        return {"execution": self._described(execution, document=document)}

    def _update(self, thing: str, job: str, body: dict[str, Any]) -> dict[str, Any]:
        _known(body, _UPDATE_FIELDS)
        status, details, minutes = body.get("status"), _details(body), _minutes(body)
        if status not in STATUSES:
            raise _No("InvalidRequest", f"there is no status {status}")
        execution = self._find(thing, job, body)
        if status not in FROM_DEVICE:
            raise _No("InvalidStateTransition", f"a device cannot set {status}", execution.state())
        expected = body.get("expectedVersion")
        if expected is not None and type(expected) is not int:
            raise _No("InvalidRequest", "expectedVersion is no integer")
        if expected is not None and expected != execution.version:  # also when it is over
            raise _No("VersionMismatch", f"expected {expected}, is {execution.version}", execution.state())
        if not execution.open:
            raise _No("InvalidStateTransition", f"{execution.status} cannot become {status}", execution.state())
        self._set(execution, status, details, minutes)
        self.told.append(Told(job, execution.number, status, details or {}, minutes))
        answer: dict[str, Any] = {}
        if body.get("includeJobExecutionState"):
            answer["executionState"] = execution.state()
        if body.get("includeJobDocument"):
            answer["jobDocument"] = dict(self.jobs[job].document())
        return answer

    def _find(self, thing: str, job: str, body: Mapping[str, Any]) -> Execution:
        number = body.get("executionNumber")
        if number is None:
            found = self.latest(job, thing)
        else:
            found = next(
                (one for one in self.executions if (one.job, one.thing, one.number) == (job, thing, number)), None
            )
        if found is None:
            raise _No("ResourceNotFound", f"no execution {number} of {job} on {thing}")
        return found

    def _set(self, execution: Execution, status: str, details: dict[str, str] | None, minutes: int | None) -> None:
        if execution.status == "QUEUED" and status == "IN_PROGRESS":
            execution.started_at = self.now
            limit = self.jobs[execution.job].minutes
            execution.ends = None if limit is None else self.now + limit * 60
        if details is not None:
            execution.details = details
        if minutes is not None:
            execution.step_ends = None if minutes == -1 else self.now + minutes * 60
        if status in TERMINAL:
            self._end(execution, status)
            return
        execution.status = status
        execution.version += 1
        execution.updated_at = self.now
        self._notify(execution.thing, changed=False)

    def _end(self, execution: Execution, status: str) -> None:
        execution.status = status
        execution.version += 1
        execution.updated_at = self.now
        execution.step_ends = execution.ends = None
        if status in {"FAILED", "TIMED_OUT"}:
            self._retry(execution, status)
        self._notify(execution.thing, changed=True)

    def _retry(self, execution: Execution, status: str) -> None:
        job = self.jobs[execution.job]
        allowed = job.retries.get(status, 0) + job.retries.get("ALL", 0)
        before = [one for one in self.executions if (one.job, one.thing) == (execution.job, execution.thing)]
        if len(before) <= allowed:
            self.executions.append(Execution(execution.thing, execution.job, execution.number + 1, self.now))

    def _open(self, thing: str) -> list[Execution]:
        """In progress first, then as they were queued."""
        found = [one for one in self.executions if one.thing == thing and one.open]
        return sorted(found, key=lambda one: (one.status != "IN_PROGRESS", one.queued_at))

    def _first(self, thing: str) -> Execution | None:
        return next(iter(self._open(thing)), None)

    def _summary(self, execution: Execution) -> dict[str, Any]:
        shown = {
            "jobId": execution.job,
            "queuedAt": int(execution.queued_at),
            "lastUpdatedAt": int(execution.updated_at or execution.queued_at),
            "versionNumber": execution.version,
            "executionNumber": execution.number,
        }
        return shown | ({"startedAt": int(execution.started_at)} if execution.started_at is not None else {})

    def _described(self, execution: Execution, *, document: bool) -> dict[str, Any]:
        shown = self._summary(execution) | {"status": execution.status}
        if execution.details:
            shown["statusDetails"] = execution.details
        if document:
            shown["jobDocument"] = dict(self.jobs[execution.job].document())
        return shown

    def _notify(self, thing: str, *, changed: bool) -> None:
        """`notify` when an execution came into or left the list; `notify-next` when another one is next."""
        if changed:
            jobs = {
                status: found
                for status in ("IN_PROGRESS", "QUEUED")
                if (found := [self._summary(one) for one in self._open(thing) if one.status == status][:10])
            }
            self._publish(thing, "notify", {"jobs": jobs})
        first = self._first(thing)
        now = None if first is None else (first.job, first.number)
        if now != self._next.get(thing):
            self._next[thing] = now
            described = {} if first is None else {"execution": self._described(first, document=True)}
            self._publish(thing, "notify-next", described)

    def _publish(self, thing: str, name: str, body: Mapping[str, Any]) -> None:
        self.publish(topics.jobs_topic(thing, name), json.dumps({"timestamp": int(self.now), **body}).encode())


def _known(body: Mapping[str, Any], fields: set[str]) -> None:
    if unknown := set(body) - fields:
        raise _No("InvalidRequest", f"unknown fields: {', '.join(sorted(unknown))}")


def _details(body: Mapping[str, Any]) -> dict[str, str] | None:
    details = body.get("statusDetails")
    if details is None:
        return None
    if not isinstance(details, dict) or len(details) > 10:
        raise _No("InvalidRequest", "statusDetails: at most ten pairs")
    for key, value in details.items():
        if not _KEY.fullmatch(key) or not isinstance(value, str) or not 1 <= len(value) <= 1024:
            raise _No("InvalidRequest", f"statusDetails: {key} is not usable")
        if any(unicodedata.category(one).startswith("C") for one in value):
            raise _No("InvalidRequest", f"statusDetails: {key} has control characters")
    return details


def _minutes(body: Mapping[str, Any]) -> int | None:
    minutes = body.get("stepTimeoutInMinutes")
    if minutes is not None and not (type(minutes) is int and (minutes == -1 or 1 <= minutes <= 10_080)):
        raise _No("InvalidRequest", "stepTimeoutInMinutes: 1 to 10080, or -1")
    return minutes


class LocalLink:
    """The link's interface to a service in the same process, with a plug to pull.

    Attributes:
        before: called with each request's topic and body before it is sent.
        after: ... after the service has taken it, before its answer is heard.
        lose_requests: so many of the next updates never arrive.
        lose_answers: so many of the next updates arrive, and their answers do not.
        idle: called when the device asks for the next job, and there is none.
    """

    def __init__(self, service: JobsService, thing: str) -> None:
        self._service = service
        self.serial = thing
        self.up = True
        self.before: Callable[[str, Mapping[str, Any]], None] = lambda _topic, _body: None
        self.after: Callable[[str, Mapping[str, Any]], None] = lambda _topic, _body: None
        self.lose_requests = 0
        self.lose_answers = 0
        self.idle: Callable[[], None] = lambda: None
        self._listeners: list[Callable[[], None]] = []
        self._subscribed: list[tuple[str, Callable[[str, bytes], None]]] = []
        service.publish = self._arrived

    def connected(self) -> bool:
        return self.up

    def go_up(self) -> None:
        """Connect."""
        self.up = True
        for listener in self._listeners:
            listener()

    def on_connect(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)
        if self.up:
            listener()

    def subscribe(self, feature: str, filters: Sequence[str], listener: Callable[[str, bytes], None]) -> None:
        assert feature == "jobs"
        self._subscribed += [(one, listener) for one in filters]

    def publish(self, topic: str, payload: bytes) -> "Future[None]":
        done: Future[None] = Future()
        self._service.handle(topic, payload)
        done.set_result(None)
        return done

    def ask(self, topic: str, body: Mapping[str, Any], *, timeout: float = 30.0) -> Answer:
        if not self.up:
            raise NotDeliveredError("there is no link")
        self.before(topic, body)
        update = topic.endswith("/update")
        if update and self.lose_requests:
            self.lose_requests -= 1
            self.go_up()  # the link was broken, and comes back
            raise NotDeliveredError("no answer")
        answered = self._service.handle(topic, json.dumps({**body, "clientToken": "t"}).encode())
        assert answered is not None
        self.after(topic, body)
        verdict, answer = answered[0], json.loads(answered[1])
        if update and self.lose_answers:
            self.lose_answers -= 1
            self.go_up()
            raise NotDeliveredError("no answer")
        if verdict.endswith("/rejected"):
            raise Refused(answer["code"], answer["message"], answer)
        if topic.endswith("/$next/get") and "execution" not in answer:
            self.idle()
        return dict(answer)

    def _arrived(self, topic: str, payload: bytes) -> None:
        for topic_filter, listener in self._subscribed:
            if self.up and topics.matches(topic_filter, topic):
                listener(topic, payload)


class Served(Protocol):
    """A service of the cloud."""

    #: Where notifications go.
    publish: Callable[[str, bytes], None]

    def handle(self, topic: str, payload: bytes) -> tuple[str, bytes] | None:
        """What a device published: the topic and payload of the answer; None for what is no request."""
        ...


REQUESTS = tuple(f"$aws/things/+/jobs/{request}" for request in ("get", "start-next", "+/get", "+/update"))


class Bridge:
    """Serves a service to the clients of a real broker, as the user `service` of tests/firmware_agent/linking.py.

    Args:
        service: the jobs, or another.
        ca: who the broker trusts.
        port: the broker's, on localhost.
        requests: filters of the topics that the service handles.
    """

    def __init__(self, service: Served, ca: Ca, port: int, requests: Sequence[str] = REQUESTS) -> None:
        self._service = service
        self._requests = requests
        self._inbox: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()
        self._up: Future[None] = Future()
        #: Set while the service hears what is asked.
        self.listens = threading.Event()
        self._stopped: Future[None] = Future()
        key = ec.generate_private_key(ec.SECP256R1())
        tls = io.TlsContextOptions.create_client_with_mtls(
            pem(ca.leaf(key.public_key(), "service")).encode(), pem_key(key).encode()
        )
        tls.override_default_trust_store(pem(ca.certificate).encode())
        self._client = mqtt5.Client(
            mqtt5.ClientOptions(
                host_name="localhost",
                port=port,
                tls_ctx=io.ClientTlsContext(tls),
                connect_options=mqtt5.ConnectPacket(client_id=f"service-{id(self)}"),
                min_reconnect_delay_ms=50,
                max_reconnect_delay_ms=200,
                on_publish_callback_fn=self._on_publish,
                on_lifecycle_event_connection_success_fn=self._connected,
                on_lifecycle_event_disconnection_fn=lambda _: self.listens.clear(),
                on_lifecycle_event_stopped_fn=lambda _: self._stopped.set_result(None),
            )
        )
        self._thread = threading.Thread(target=self._serve, name="service")

    def __enter__(self) -> Self:
        self._client.start()
        self._up.result(20)
        self._service.publish = self._publish
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._service.publish = lambda _topic, _payload: None
        self._inbox.put(None)
        self._thread.join()
        self._client.stop()
        self._stopped.result(20)

    def _connected(self, _: Any) -> None:
        wanted = [mqtt5.Subscription(request, mqtt5.QoS.AT_LEAST_ONCE) for request in self._requests]
        self._client.subscribe(mqtt5.SubscribePacket(wanted)).add_done_callback(self._subscribed)

    def _subscribed(self, done: "Future[Any]") -> None:
        error = done.exception()
        if error is None:
            self.listens.set()
        if not self._up.done():  # else it is a reconnect
            self._up.set_exception(error) if error is not None else self._up.set_result(None)

    def _on_publish(self, data: Any) -> None:
        self._inbox.put((data.publish_packet.topic, data.publish_packet.payload))

    def _publish(self, topic: str, payload: bytes) -> None:
        self._client.publish(mqtt5.PublishPacket(topic=topic, payload=payload, qos=mqtt5.QoS.AT_LEAST_ONCE))

    def _serve(self) -> None:
        while (arrived := self._inbox.get()) is not None:
            answer = self._service.handle(*arrived)
            if answer is not None:
                self._publish(*answer)
