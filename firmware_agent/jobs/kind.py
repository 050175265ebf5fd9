"""What a kind of job is: named phases in order, what undoes them, and what they may ask of the runner.

    forward   check ─▶ download ─▶ install ─▶ switch ═▶ prove ═▶ commit ──▶ clean up ─▶ report
                                              (bound)      │ failed
    undo                                                   └──▶ roll-back ═▶ back ──▶ clean up ─▶ report

A phase runs on the runner's thread and may block. It is entered only after the journal has durably noted that it is, so
after a crash, a kill or a power cut it is *entered again*: every phase must either be idempotent or recognise that it
was interrupted and say so by its result. `Phase.attempts` bounds how often.

Phases before the first `bound` one run only while the cloud still wants the job: before each, IN_PROGRESS is reported
and has to be accepted. A job that is cancelled there is dropped and cleaned up. From the first entry into a `bound`
phase on, the job is carried to its end whatever the cloud says and whether or not the unit is online; a failure there
leads through the kind's `undo` phases before anything is reported. `clean_up` runs at the end of every execution.

A phase ends by returning one of

    Next(memo)              on to the next phase (from the last one: SUCCEEDED)
    Done(details)           SUCCEEDED now, whatever phases are left
    Failed(code, reason)    FAILED: the cloud may try again
    Rejected(code, reason)  REJECTED: the cloud never tries again
    Restart(memo)           the agent's process ends now (exit code 5); the next phase is entered by the next process

`memo` is merged into what the execution remembers across restarts (JSON values only; never a secret, never a URL); it
is durable when the next phase is entered. The job document is *not* remembered: it may hold presigned URLs. In unbound
phases `context.document` is always there (it is fetched again after a restart); in bound and undo phases it may be
None, so keep in the memo what those need.

What may leave `Phase.run` as an exception, beside bugs:

    Dropped, Stopping       raised by the context's methods: let them pass
    Ended(result)           the same as returning `result`
    mqtt.NotDeliveredError  no link: the phase is entered again after the next connect, which counts as an attempt
    OSError, AgentFault, …  Failed with the error's words as the reason, and its `code` if a failure's, else the
                            phase's (ENOSPC: `no-space`)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

from firmware_agent.jobs.document import Document

#: Why a job is not for this unit, now and for ever. AWS never retries REJECTED.
REJECTED_CODES: Final = frozenset(
    {
        "wrong-product",
        "wrong-hardware",
        "bad-signature",
        "downgrade",
        "bad-document",
        "unknown-operation",
        "not-possible",
        "loop",
    },
)

#: Why a job did not work out this time. AWS retries FAILED as often as the job says.
FAILED_CODES: Final = frozenset(
    {"download", "no-space", "install", "unhealthy", "crashed", "interrupted", "upload", "rotation"},
)


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Key:
    """Which execution of which job: a retry has the same job and another number."""

    job: str
    number: int

    def __str__(self) -> str:
        return f"{self.job}#{self.number}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        """The key that was printed as `text`; job ids hold no `#`.

        Raises:
            ValueError: it is none.
        """
        job, _, number = text.rpartition("#")
        if not job:
            raise ValueError(f"no key of a job: {text!r}")
        return cls(job, int(number))


@dataclass(frozen=True)
class Next:
    """The phase has done its work."""

    memo: Mapping[str, Any] = field(default_factory=_nothing)


@dataclass(frozen=True)
class Done:
    """The job has succeeded; `details` go into the report's statusDetails."""

    details: Mapping[str, str] = field(default_factory=_nothing)


@dataclass(frozen=True)
class Failed:
    """It did not work out this time."""

    code: str
    reason: str
    details: Mapping[str, str] = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        if self.code not in FAILED_CODES:
            raise ValueError(f"{self.code!r} is no code of a failure")


@dataclass(frozen=True)
class Rejected:
    """It never will."""

    code: str
    reason: str
    details: Mapping[str, str] = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        if self.code not in REJECTED_CODES:
            raise ValueError(f"{self.code!r} is no code of a rejection")


@dataclass(frozen=True)
class Restart:
    """The phase has done its work, and another process is to go on."""

    memo: Mapping[str, Any] = field(default_factory=_nothing)


Result = Next | Done | Failed | Rejected | Restart


class Dropped(Exception):
    """The cloud does not want this job any more (cancelled, deleted, timed out); only while it is not bound."""


class Stopping(Exception):
    """The agent is asked to end; the phase will be entered again by the next process."""


class Ended(Exception):
    """The phase ends with `result`, said from the depths."""

    def __init__(self, result: Result) -> None:
        super().__init__(repr(result))
        self.result = result


class Context(Protocol):
    """What a phase may ask of the runner. Not for other threads."""

    @property
    def key(self) -> Key:
        """Which execution this is."""
        ...

    @property
    def document(self) -> Document | None:
        """What the cloud asks for; None in a bound or undo phase of a process that has not been told."""
        ...

    @property
    def memo(self) -> Mapping[str, Any]:
        """What the phases before have kept."""
        ...

    @property
    def reason(self) -> str:
        """Why it is being undone; empty before that."""
        ...

    @property
    def scratch(self) -> Path:
        """A directory for this execution alone; it exists, survives restarts, and goes with the clean-up."""
        ...

    def progress(self, fraction: float | None = None) -> None:
        """Say that the phase is alive, as often as it likes; at most every 30 s or 10 % one report goes out.

        Renews the step timer. While the unit is offline nothing happens.

        Raises:
            Dropped: the job is not wanted any more (never in a bound phase).
            Stopping: the agent is to end.
        """
        ...

    def confirm(self) -> bool:
        """Report IN_PROGRESS now; whether the jobs service gave any answer within some seconds.

        A refusal is an answer: it proves the connection as well as an acceptance does.
        """
        ...

    def refresh(self) -> Document:
        """The document once more, with fresh presigned URLs.

        Raises:
            Dropped: there is no such job any more.
            NotDeliveredError: no link.
        """
        ...

    def wait(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Dropped, Stopping: as `progress`.
        """
        ...


@dataclass(frozen=True)
class Phase:
    """One step of a kind.

    Attributes:
        name: shown to the operator in statusDetails; lower case and hyphens.
        run: does it.
        code: of the failure when `run` ends by an error that it did not foresee.
        bound: from the first entry on there is no dropping the job any more.
        attempts: how often it may be entered; one more is FAILED `interrupted`.
        minutes: the step timer that is set when it begins and at each progress; after so long without a sign of life
            the cloud calls the job timed out. A phase that ends by Restart includes the restart and the time until
            the clock is right.
    """

    name: str
    run: Callable[[Context], Result]
    code: str = "install"
    bound: bool = False
    attempts: int = 3
    minutes: int = 15


class Kind(Protocol):
    """One kind of job."""

    @property
    def operation(self) -> str:
        """As in the job document."""
        ...

    @property
    def phases(self) -> Sequence[Phase]:
        """In order; at least one."""
        ...

    @property
    def undo(self) -> Sequence[Phase]:
        """What follows a failure after the first bound phase was entered, in order; may be empty.

        Each is entered whatever became of the one before; a failure here is added to the reason that is reported.
        """
        ...

    def clean_up(self, context: Context) -> None:
        """Leave nothing lying about; called at the end of every execution, again if interrupted.

        The scratch directory is removed by the runner.
        """
        ...

    def orphan(self) -> "Orphan | None":
        """What an execution of this kind has begun that cannot be left alone, though the journal has lost it."""
        ...


@dataclass(frozen=True)
class Orphan:
    """A bound execution found without a journal: it goes on at `phase`."""

    key: Key
    phase: str
    memo: Mapping[str, Any] = field(default_factory=_nothing)
