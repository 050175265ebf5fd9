"""The one state machine of all jobs: state + event → state + action, without any effect.

The protocol that a kind of job fulfils, and what its phases may return, is in `kind`. Here is what follows from it:

    (offered) ─▶ forward ──────────────▶ cleaning ─▶ reporting ─▶ closed
                    │ failed while bound     ▲
                    └──▶ undoing ────────────┘

`step` takes an execution and what has happened, and gives the execution as it is now and what to do next. An execution
whose `stores` has grown must be in the journal before the action is done: that is the whole durability rule.

Bounds, so that no job can loop: a phase is entered at most `Phase.attempts` times; all forward phases of one execution
together at most `MAX_STORES` journal writes; undo phases and the clean-up have attempts of their own. So a whole
execution ends after at most `MAX_STORES + attempts of all undo phases + CLEAN_ATTEMPTS + 2` writes, whatever crashes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, Literal

from firmware_agent.jobs.kind import Done, Failed, Key, Kind, Next, Phase, Rejected, Restart, Result

#: Journal writes that forward phases may use up in one execution. A healthy update needs 10; Mender's bound is 28 too.
MAX_STORES: Final = 28

#: How often the clean-up is begun before the report goes out without it.
CLEAN_ATTEMPTS: Final = 3

Status = Literal["SUCCEEDED", "FAILED", "REJECTED"]


class Stage(StrEnum):
    """How far an execution is."""

    FORWARD = "forward"
    UNDOING = "undoing"
    CLEANING = "cleaning"
    REPORTING = "reporting"
    CLOSED = "closed"


@dataclass(frozen=True)
class Outcome:
    """How a job ended, as it is reported."""

    status: Status
    code: str | None = None
    reason: str | None = None
    details: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Execution:
    """One execution of one job, as the journal keeps it.

    Attributes:
        key: job and execution number.
        operation: which kind.
        stage: how far it is.
        phase: the phase in hand; of `phases` while forward, of `undo` while undoing.
        entered: how often that phase (or the clean-up) has been entered.
        bound: a bound phase has been entered.
        gone: the cloud does not want to hear of it any more.
        granted: the cloud has agreed to the phase in hand; known to this process only.
        outcome: once it is decided.
        memo: what phases keep for later ones.
        stores: how often it has been written to the journal.
    """

    key: Key
    operation: str
    stage: Stage
    phase: str
    entered: int = 0
    bound: bool = False
    gone: bool = False
    granted: bool = False
    outcome: Outcome | None = None
    memo: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    stores: int = 0


# --- events --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed:
    """A new process has found the execution in the journal."""


@dataclass(frozen=True)
class Granted:
    """The cloud has accepted the IN_PROGRESS of the phase in hand."""


@dataclass(frozen=True)
class Gone:
    """The cloud has cancelled, deleted or timed out the job."""


@dataclass(frozen=True)
class Ran:
    """The phase in hand has ended."""

    result: Result


@dataclass(frozen=True)
class Again:
    """The phase in hand could not be done for want of a link; it is to be entered again."""


@dataclass(frozen=True)
class Unwritable:
    """The journal could not be written before a phase."""

    reason: str


@dataclass(frozen=True)
class Cleaned:
    """The clean-up has ended, well or not."""


@dataclass(frozen=True)
class Told:
    """The cloud has the outcome."""


Event = Resumed | Granted | Gone | Ran | Again | Unwritable | Cleaned | Told


# --- actions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AskConsent:
    """Report IN_PROGRESS with `phase`, and go on only when that is accepted."""

    phase: Phase


@dataclass(frozen=True)
class Run:
    """Run `phase`."""

    phase: Phase


@dataclass(frozen=True)
class Leave:
    """End this process; the next one goes on."""


@dataclass(frozen=True)
class CleanUp:
    """Leave nothing lying about."""


@dataclass(frozen=True)
class Report:
    """Tell the cloud how it ended, until it has heard."""

    outcome: Outcome


@dataclass(frozen=True)
class Rest:
    """Nothing more to do for this execution."""


Action = AskConsent | Run | Leave | CleanUp | Report | Rest


# --- decisions -----------------------------------------------------------------------------------------------------


def begin(key: Key, kind: Kind) -> tuple[Execution, Action]:
    """A job that is for this unit: it is noted before the cloud hears IN_PROGRESS."""
    first = kind.phases[0]
    return Execution(key, kind.operation, Stage.FORWARD, first.name, stores=1), AskConsent(first)


def refuse(key: Key, operation: str, outcome: Outcome) -> tuple[Execution, Action]:
    """A job that is not even begun."""
    return Execution(key, operation, Stage.REPORTING, "", outcome=outcome, stores=1), Report(outcome)


def adopt(key: Key, kind: Kind, phase: str, memo: Mapping[str, Any]) -> tuple[Execution, Action]:
    """A bound execution that the journal has lost goes on at `phase`."""
    found = Execution(key, kind.operation, Stage.FORWARD, phase, bound=True, memo=memo)
    return _settle(found, kind)


def repeat(execution: Execution) -> tuple[Execution, Action]:
    """The cloud gives a job once more whose report it has lost: it is told the same again."""
    outcome = execution.outcome or Outcome("FAILED", "interrupted", "the job was dropped here before")
    again = replace(execution, stage=Stage.REPORTING, outcome=outcome, gone=False, stores=execution.stores + 1)
    return again, Report(outcome)


def step(execution: Execution, kind: Kind, event: Event) -> tuple[Execution, Action]:
    """What follows from `event`: the execution as it is now, and what to do."""
    match event:
        case Resumed() | Again():
            now = replace(execution, granted=False)
        case Granted():
            now = replace(execution, granted=True)
        case Gone():
            now = _gone(execution)
        case Ran(result):
            now = _ran(execution, kind, result)
            if isinstance(result, Restart) and now.stage is execution.stage:
                return replace(now, stores=now.stores + 1), Leave()
        case Unwritable(reason):
            now = _unwritable(execution, reason)
        case Cleaned():
            now = replace(execution, stage=Stage.REPORTING, entered=0)
            now = replace(now, stores=now.stores + 1)
        case Told():
            now = _close(execution)
    return _settle(now, kind)


def _gone(execution: Execution) -> Execution:
    match execution.stage:
        case Stage.FORWARD if not execution.bound:
            return replace(execution, gone=True, stage=Stage.CLEANING, entered=0)
        case Stage.REPORTING:
            return _close(replace(execution, gone=True))
        case Stage.CLOSED:
            return execution
        case _:
            return replace(execution, gone=True)


def _close(execution: Execution) -> Execution:
    if execution.stage is Stage.CLOSED:
        return execution
    return replace(execution, stage=Stage.CLOSED, granted=False, stores=execution.stores + 1)


def _unwritable(execution: Execution, reason: str) -> Execution:
    """Before anything is bound: do not begin what could not be found again. Later: go on without notes."""
    if execution.stage is not Stage.FORWARD or execution.bound:
        return execution
    return _fail(execution, Outcome("FAILED", "no-space", f"the journal cannot be written: {reason}"))


def _ran(execution: Execution, kind: Kind, result: Result) -> Execution:
    if execution.stage is Stage.UNDOING:
        return _undid(execution, kind, result)
    match result:
        case Next(memo) | Restart(memo):
            following = _after(kind.phases, execution.phase)
            now = replace(execution, memo={**execution.memo, **memo}, granted=False, entered=0)
            if following is None:
                return replace(now, stage=Stage.CLEANING, outcome=Outcome("SUCCEEDED"))
            return replace(now, phase=following.name)
        case Done(details):
            return replace(execution, stage=Stage.CLEANING, entered=0, outcome=Outcome("SUCCEEDED", details=details))
        case Failed(code, reason, details):
            return _fail(execution, Outcome("FAILED", code, reason, details))
        case Rejected(code, reason, details):
            return _fail(execution, Outcome("REJECTED", code, reason, details))


def _undid(execution: Execution, kind: Kind, result: Result) -> Execution:
    """One undo phase has ended; the next follows in any case."""
    now = execution
    match result:
        case Next(memo) | Restart(memo):
            now = replace(now, memo={**now.memo, **memo})
        case Done():
            return replace(now, stage=Stage.CLEANING, entered=0)
        case Failed(_, reason) | Rejected(_, reason):
            now = _worse(now, f"{now.phase} failed: {reason}")
    return _past_undo(now, kind)


def _past_undo(execution: Execution, kind: Kind) -> Execution:
    following = _after(kind.undo, execution.phase)
    if following is None:
        return replace(execution, stage=Stage.CLEANING, entered=0)
    return replace(execution, phase=following.name, entered=0)


def _worse(execution: Execution, reason: str) -> Execution:
    outcome = execution.outcome or Outcome("FAILED", "interrupted")
    said = "; ".join(part for part in (outcome.reason, reason) if part)
    return replace(execution, outcome=replace(outcome, reason=said))


def _fail(execution: Execution, outcome: Outcome) -> Execution:
    stage = Stage.UNDOING if execution.bound else Stage.CLEANING
    return replace(execution, stage=stage, phase="" if execution.bound else execution.phase, entered=0, outcome=outcome)


def _settle(execution: Execution, kind: Kind) -> tuple[Execution, Action]:
    """Apply what needs no event (limits), and find the action."""
    settle = {Stage.FORWARD: _settle_forward, Stage.UNDOING: _settle_undoing, Stage.CLEANING: _settle_cleaning}
    while execution.stage in settle:
        execution, action = settle[execution.stage](execution, kind)
        if action is not None:
            return execution, action
    if execution.stage is Stage.REPORTING and not execution.gone and execution.outcome is not None:
        return execution, Report(execution.outcome)
    return _close(execution), Rest()


def _settle_forward(execution: Execution, kind: Kind) -> tuple[Execution, Action | None]:
    phase = _named(kind.phases, execution.phase)
    if phase is None:
        reason = f"the phase {execution.phase!r} belongs to another release of the agent"
        return _fail(execution, Outcome("FAILED", "crashed", reason)), None
    if execution.stores >= MAX_STORES:
        reason = f"the job has gone in circles; it was given up in {phase.name}"
        return _fail(execution, Outcome("REJECTED", "loop", reason)), None
    if execution.entered >= phase.attempts:
        reason = f"{phase.name} was begun {execution.entered} times and never ended"
        return _fail(execution, Outcome("FAILED", "interrupted", reason)), None
    if execution.bound or execution.granted:
        return _enter(execution, phase), Run(phase)
    return execution, AskConsent(phase)


def _settle_undoing(execution: Execution, kind: Kind) -> tuple[Execution, Action | None]:
    if not execution.phase and kind.undo:
        execution = replace(execution, phase=kind.undo[0].name, entered=0)
    phase = _named(kind.undo, execution.phase)
    if phase is None:
        return replace(execution, stage=Stage.CLEANING, entered=0), None
    if execution.entered < phase.attempts:
        return _enter(execution, phase), Run(phase)
    return _past_undo(_worse(execution, f"{phase.name} was interrupted too often"), kind), None


def _settle_cleaning(execution: Execution, _: Kind) -> tuple[Execution, Action | None]:
    if execution.entered < CLEAN_ATTEMPTS:
        return replace(execution, entered=execution.entered + 1, stores=execution.stores + 1), CleanUp()
    return replace(execution, stage=Stage.REPORTING, entered=0, stores=execution.stores + 1), None


def _enter(execution: Execution, phase: Phase) -> Execution:
    return replace(
        execution,
        entered=execution.entered + 1,
        bound=execution.bound or phase.bound,
        stores=execution.stores + 1,
    )


def _named(phases: Sequence[Phase], name: str) -> Phase | None:
    return next((phase for phase in phases if phase.name == name), None)


def _after(phases: Sequence[Phase], name: str) -> Phase | None:
    names = [phase.name for phase in phases]
    return next((phase for phase, before in zip(phases[1:], names, strict=False) if before == name), None)
