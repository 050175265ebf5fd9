"""The jobs service as a unit sees it: what is next, how is this one, and what is told about it.

AWS IoT Jobs over MQTT: https://docs.aws.amazon.com/iot/latest/developerguide/jobs-mqtt-api.html. Every answer is parsed
here into frozen values; what the service says no to becomes one of two things: `Closed` (this execution wants no more
updates: cancelled, deleted, timed out, or reported already) or NotDeliveredError (try again later).
"""

import logging
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from firmware_agent import topics
from firmware_agent.jobs.kind import Key
from firmware_agent.jobs.redact import redact
from firmware_agent.link import Answer, Refused
from firmware_agent.mqtt import NotDeliveredError

_log = logging.getLogger(__name__)

FEATURE: Final = "jobs"

#: What an execution can still be worked on in; all other statuses are final.
OPEN: Final = frozenset({"QUEUED", "IN_PROGRESS"})

_TRY_LATER: Final = frozenset({"InternalError", "RequestThrottled", "ServiceUnavailable"})
_OVER: Final = frozenset({"ResourceNotFound", "InvalidStateTransition", "TerminalStateReached"})

#: How often an update is sent again because somebody else (or our own lost update) has changed the version.
_MISMATCHES: Final = 3

#: AWS IoT Jobs quotas: pairs in statusDetails, characters in a value.
MAX_DETAILS: Final = 10
MAX_VALUE: Final = 1024


class Asker(Protocol):
    """The part of the link that the service needs."""

    @property
    def serial(self) -> str:
        """The unit's name in the cloud."""
        ...

    def ask(self, topic: str, body: Mapping[str, Any], *, timeout: float = 30.0) -> Answer:
        """Send a request, and wait for the answer."""
        ...


@dataclass(frozen=True)
class Offer:
    """An execution as the service describes it.

    Attributes:
        key: which.
        status: AWS's word.
        version: rises with each update.
        document: as JSON gave it; None if it was not asked for.
    """

    key: Key
    status: str
    version: int
    document: object

    @property
    def open(self) -> bool:
        """Whether it can still be worked on."""
        return self.status in OPEN


@dataclass(frozen=True)
class Accepted:
    """The update counts."""


@dataclass(frozen=True)
class Closed:
    """The execution takes no more updates."""

    why: str


def clean(text: str, limit: int = MAX_VALUE) -> str:
    """`text` as statusDetails take it: no control characters, no secrets, 1 to 1024 characters."""
    shown = "".join(" " if unicodedata.category(one).startswith("C") else one for one in redact(text))
    shown = " ".join(shown.split())
    return (shown if len(shown) <= limit else shown[: limit - 1] + "…") or "-"


def clean_all(details: Mapping[str, str]) -> dict[str, str]:
    """Details that the service will not refuse; the pairs beyond the tenth are left out."""
    return {key: clean(value) for key, value in list(details.items())[:MAX_DETAILS]}


class Service:
    """The jobs of one thing.

    Args:
        link: the connection.
        seconds: how long one request may take.
    """

    def __init__(self, link: Asker, *, seconds: float = 30.0) -> None:
        self._link = link
        self._seconds = seconds
        self._versions: dict[Key, int] = {}

    def next(self) -> Offer | None:
        """The execution to work on: one in progress before one that is queued; None when there is none.

        Raises:
            NotDeliveredError: no link, no answer, or the service is busy.
        """
        try:
            return self._describe("$next", {})
        except Refused as refused:
            self._judge(refused)
            return None

    def describe(self, key: Key, *, document: bool = True) -> Offer | None:
        """This execution now, its document with fresh presigned URLs; None if it is gone.

        Raises:
            NotDeliveredError: as `next`.
        """
        try:
            return self._describe(key.job, {"executionNumber": key.number, "includeJobDocument": document})
        except Refused as refused:
            self._judge(refused)
            return None

    def update(
        self,
        key: Key,
        status: Literal["IN_PROGRESS", "SUCCEEDED", "FAILED", "REJECTED"],
        details: Mapping[str, str],
        minutes: int | None = None,
    ) -> Accepted | Closed:
        """Tell how it goes.

        Args:
            key: which execution.
            status: the new status.
            details: replaces what was told before.
            minutes: sets the step timer anew.

        Raises:
            NotDeliveredError: as `next`; the update may have been made nevertheless.
        """
        body: dict[str, Any] = {
            "status": status,
            "statusDetails": clean_all(details),
            "executionNumber": key.number,
            "includeJobExecutionState": True,
        }
        if minutes is not None:
            body["stepTimeoutInMinutes"] = minutes
        for _ in range(1 + _MISMATCHES):
            if key in self._versions:
                body["expectedVersion"] = self._versions[key]
            try:
                answer = self._link.ask(self._topic(key.job, "update"), body, timeout=self._seconds)
            except Refused as refused:
                verdict = self._refused(key, refused)
                if verdict is not None:
                    return verdict
                continue
            self._note(key, answer.get("executionState"))
            return Accepted()
        raise NotDeliveredError("the job's version changes with every try")

    def _describe(self, job: str, body: Mapping[str, Any]) -> Offer | None:
        answer = self._link.ask(self._topic(job, "get"), body, timeout=self._seconds)
        execution = answer.get("execution")
        if not isinstance(execution, Mapping) or not execution:
            return None
        try:
            offer = _offer(execution)
        except (KeyError, TypeError, ValueError) as error:
            raise NotDeliveredError(f"the service's answer makes no sense: {error!r}") from error
        self._versions = {offer.key: offer.version}
        return offer

    def _refused(self, key: Key, refused: Refused) -> Closed | None:
        """What an update's refusal means; None: try at once again, the version is known now."""
        state = refused.body.get("executionState")
        status = state.get("status") if isinstance(state, Mapping) else None
        if refused.code == "VersionMismatch":
            if isinstance(status, str) and status not in OPEN:
                return Closed(f"it is {status}")
            if not self._note(key, state):
                self._versions.pop(key, None)
            return None
        self._judge(refused)
        return Closed(f"it is {status}" if isinstance(status, str) else str(refused))

    def _judge(self, refused: Refused) -> None:
        """Raise what may go better later; the rest means that there is no such job for us."""
        if refused.code in _TRY_LATER:
            raise NotDeliveredError(str(refused)) from refused
        if refused.code not in _OVER:
            _log.error("the jobs service refuses what this agent says: %s", refused)

    def _note(self, key: Key, state: object) -> bool:
        version = state.get("versionNumber") if isinstance(state, Mapping) else None
        if type(version) is not int:
            return False
        self._versions = {key: version}
        return True

    def _topic(self, *parts: str) -> str:
        return topics.jobs_topic(self._link.serial, *parts)


def _offer(execution: Mapping[str, Any]) -> Offer:
    job, number, status = execution["jobId"], execution["executionNumber"], execution["status"]
    version = execution["versionNumber"]
    if not isinstance(job, str) or type(number) is not int or not isinstance(status, str) or type(version) is not int:
        raise ValueError("fields of the wrong type")
    return Offer(Key(job, number), status, version, execution.get("jobDocument"))
