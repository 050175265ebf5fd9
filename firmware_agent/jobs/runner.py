"""The one thread that works on jobs: it asks what is next, drives the state machine, and does what the machine says.

    connect, notify-next ──▶ wake ──▶ $next ──▶ machine.step ──▶ journal ──▶ run phase / report / clean up ──┐
                                                    ▲                                                        │
                                                    └────────────────────────────────────────────────────────┘

All decisions are in `machine`, all work is in the kinds, all that is durable is in `journal`. What is left here is the
order: what grew the execution's `stores` is written before it is done.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from firmware_agent import files, topics
from firmware_agent.errors import AgentFault
from firmware_agent.jobs import document, machine
from firmware_agent.jobs.document import BadDocument, Document
from firmware_agent.jobs.journal import Journal
from firmware_agent.jobs.kind import (
    FAILED_CODES,
    Context,
    Dropped,
    Ended,
    Failed,
    Key,
    Kind,
    Phase,
    Rejected,
    Result,
    Stopping,
)
from firmware_agent.jobs.machine import (
    AskConsent,
    CleanUp,
    Event,
    Execution,
    Gone,
    Granted,
    Leave,
    Outcome,
    Ran,
    Report,
    Rest,
    Run,
    Stage,
)
from firmware_agent.jobs.service import FEATURE, Accepted, Asker, Offer, Service, clean
from firmware_agent.mqtt import NotDeliveredError

_log = logging.getLogger(__name__)

#: Progress is reported when so long has passed, or so much has been done, since the last report.
PROGRESS_SECONDS: Final = 30.0
PROGRESS_FRACTION: Final = 0.1

_RETRY_SECONDS: Final = 60.0  # without an answer though connected; a connect or a notification wakes sooner
_POLL_SECONDS: Final = 3600.0  # if a notification should ever be lost
_REPEATS: Final = 3  # of one report in one process; whoever asks for it again and again waits for the next poll
_TICK_SECONDS: Final = 1.0


class Link(Asker, Protocol):
    """The part of the link that the runner needs."""

    def connected(self) -> bool:
        """Whether there is a connection."""
        ...

    def on_connect(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each connect."""
        ...

    def subscribe(self, feature: str, filters: Sequence[str], listener: Callable[[str, bytes], None]) -> None:
        """Give what is published on `filters` to `listener`."""
        ...


def due(since: float, moved: float) -> bool:
    """Whether progress is worth a report.

    Args:
        since: seconds since the last report.
        moved: what part of the whole was done since then, 0 to 1.
    """
    return since >= PROGRESS_SECONDS or moved >= PROGRESS_FRACTION


class Runner:
    """Works on the unit's jobs, one after the other.

    Args:
        link: the connection.
        directory: the jobs' own (settings: `paths.jobs`): journal and scratch directories.
        kinds: what this unit can do.
        product: what it is; jobs for another product are refused.
        leave: asked to end this process so that the release in force is started (exit code 5); must not block.
        safe_mode: only the operations in `kinds` are done; jobs of others fail, and may be tried again.
        seconds: how long one request may take.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        link: Link,
        directory: Path,
        kinds: Sequence[Kind],
        *,
        product: str,
        leave: Callable[[], None],
        safe_mode: bool = False,
        seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._journal = Journal(directory / "journal.json")
        self._work = directory / "work"
        self._kinds: Mapping[str, Kind] = {kind.operation: kind for kind in kinds}
        self._product = product
        self._leave = leave
        self._safe_mode = safe_mode
        self._clock = clock
        self.service = Service(link, seconds=seconds)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._changed = threading.Event()
        self._document: tuple[Key, Document] | None = None
        self._left = False
        self._listens = False
        self._repeats = 0
        self._gone = False
        #: The execution in hand or the last one, for `picket-agent status`.
        self.execution: Execution | None = None

    # --- for other threads -----------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look for work now; also after `stop` was set."""
        self._wake.set()

    def _on_change(self) -> None:
        self._changed.set()
        self._wake.set()

    # --- the thread ------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set and `wake` called, or until this process is to end for another release's sake."""
        self._stop = stop
        if not self._listens:  # once, however often this part is begun again
            self._listens = True
            self._link.on_connect(self._on_change)
            self._link.subscribe(
                FEATURE,
                [topics.jobs_topic(self._link.serial, "notify-next")],
                lambda _topic, _payload: self._on_change(),
            )
        self._resume()
        while not self._ended():
            self._wake.clear()
            try:
                if not self._take_next():
                    self._wake.wait(_POLL_SECONDS)
            except NotDeliveredError as error:
                _log.info("jobs: %s", error)
                self._wake.wait(_RETRY_SECONDS)

    def _ended(self) -> bool:
        return self._left or self._stop.is_set()

    def _resume(self) -> None:
        """Go on where the last process ended."""
        execution = self.execution = self._journal.load()
        if execution is None or execution.stage is Stage.CLOSED:
            self._adopt(execution)
            return
        self._sweep(execution.key)
        kind = self._kinds.get(execution.operation)
        if kind is None:
            outcome = Outcome("FAILED", "interrupted", f"the running release cannot do {execution.operation}")
            self._drive(_Unknown(execution.operation), *machine.refuse(execution.key, execution.operation, outcome))
        else:
            self._drive(kind, *machine.step(execution, kind, machine.Resumed()))

    def _adopt(self, last: Execution | None) -> None:
        """Go on with what is under way without a journal."""
        self._sweep(None)
        for kind in self._kinds.values():
            orphan = kind.orphan()
            # One that was ended here stays ended, unless it was refused: by a process in safe mode, say.
            if orphan is not None and (last is None or orphan.key != last.key or not last.phase):
                _log.warning("%s of job %s goes on without its journal", kind.operation, orphan.key)
                self._drive(kind, *machine.adopt(orphan.key, kind, orphan.phase, orphan.memo))
                return

    def _take_next(self) -> bool:
        """Do the next job to its end; whether there was one.

        Raises:
            NotDeliveredError: nobody answers.
        """
        self._changed.clear()
        offer = self.service.next()
        if offer is None or not offer.open:
            return False
        last = self.execution
        if last is None or last.key != offer.key:
            self._repeats = 0
            self._begin(offer)
            return True
        self._repeats += 1
        if self._repeats > _REPEATS:
            _log.error("job %s is offered again and again though it was reported", offer.key)
            return False
        kind = self._kinds.get(last.operation) or _Unknown(last.operation)
        self._drive(kind, *machine.repeat(last))
        return True

    def _begin(self, offer: Offer) -> None:
        try:
            operation, wanted = document.parse(offer.document, self._product)
        except BadDocument as bad:
            self._refuse(offer.key, "", Outcome("REJECTED", bad.code, str(bad)))
            return
        kind = self._kinds.get(operation)
        if kind is None and self._safe_mode:
            reason = f"the unit is in safe mode and does no {operation}"
            self._refuse(offer.key, operation, Outcome("FAILED", "interrupted", reason))
        elif kind is None:
            self._refuse(offer.key, operation, Outcome("REJECTED", "not-possible", f"this unit does no {operation}"))
        elif offer.status == "IN_PROGRESS":
            reason = "the unit has lost its notes about this job; it was begun, nobody knows how far"
            self._refuse(offer.key, operation, Outcome("FAILED", "interrupted", reason))
        else:
            _log.info("job %s: %s", offer.key, operation)
            self._document = (offer.key, wanted)
            self._drive(kind, *machine.begin(offer.key, kind))

    def _refuse(self, key: Key, operation: str, outcome: Outcome) -> None:
        self._drive(_Unknown(operation), *machine.refuse(key, operation, outcome))

    # --- driving the machine -----------------------------------------------------------------------------------------

    def _drive(self, kind: Kind, execution: Execution, action: machine.Action) -> None:
        """Do what the machine says until the execution is closed or this process ends."""
        before = replace(execution, stores=-1)
        while True:
            execution, action = self._note(kind, before, execution, action)
            self.execution = before = execution
            if isinstance(action, Rest):
                self._document = None
                return
            self._gone = execution.gone
            event = self._do(kind, execution, action)
            if event is None:
                return
            execution, action = machine.step(replace(execution, gone=self._gone), kind, event)

    def _note(
        self, kind: Kind, before: Execution, execution: Execution, action: machine.Action
    ) -> tuple[Execution, machine.Action]:
        """Write what has to be durable before `action`; if that cannot be, the machine decides what then."""
        if execution.stores == before.stores:
            return execution, action
        try:
            self._journal.store(execution)
        except OSError as error:
            _log.error("the jobs' journal cannot be written: %s", error)
            if before.stage is Stage.FORWARD and not before.bound and isinstance(action, Run | AskConsent):
                return machine.step(before, kind, machine.Unwritable(error.strerror or str(error)))
        return execution, action

    def _do(self, kind: Kind, execution: Execution, action: machine.Action) -> Event | None:
        """Do one action; None when this process is not to go on."""
        match action:
            case AskConsent(phase):
                return self._until_answered(lambda: self._ask_consent(execution, phase))
            case Run(phase):
                return self._run(execution, phase)
            case CleanUp():
                self._clean_up(kind, execution)
                return machine.Cleaned()
            case Report(outcome):
                return self._until_answered(lambda: self._report(execution.key, outcome))
            case Leave():
                _log.info("job %s: this process makes room for the next", execution.key)
                self._left = True
                self._leave()
                return None
            case Rest():
                return None

    def _until_answered(self, ask: Callable[[], Event]) -> Event | None:
        """Ask until the cloud has answered; None when the agent is to end."""
        while not self._ended():
            self._wake.clear()
            try:
                return ask()
            except NotDeliveredError as error:
                _log.info("jobs: %s", error)
            self._wake.wait(_RETRY_SECONDS)
        return None

    def _ask_consent(self, execution: Execution, phase: Phase) -> Event:
        if self._document is None or self._document[0] != execution.key:
            offer = self.service.describe(execution.key)
            if offer is None or not offer.open:
                return Gone()
            try:
                self._document = (execution.key, document.parse(offer.document, self._product)[1])
            except BadDocument as bad:
                return Ran(Rejected(bad.code, str(bad)))
        answer = self.service.update(execution.key, "IN_PROGRESS", _details(phase, execution), phase.minutes)
        return Granted() if isinstance(answer, Accepted) else self._closed(execution.key, answer.why)

    def _closed(self, key: Key, why: str) -> Gone:
        _log.info("job %s is not wanted any more: %s", key, why)
        return Gone()

    def _report(self, key: Key, outcome: Outcome) -> Event:
        details = {
            name: value for name, value in (("code", outcome.code), ("reason", outcome.reason)) if value is not None
        }
        answer = self.service.update(key, outcome.status, details | dict(outcome.details))
        _log.info("job %s: %s %s", key, outcome.status, clean(" ".join(details.values())) if details else "")
        return machine.Told() if isinstance(answer, Accepted) else self._closed(key, answer.why)

    def _run(self, execution: Execution, phase: Phase) -> Event | None:
        work = _Work(self, execution, phase)
        try:
            self._make_scratch(execution.key)
            result = phase.run(work)
        except Ended as ended:
            event: Event = Ran(ended.result)
        except Dropped:
            event = Gone()
        except Stopping:
            return None
        except NotDeliveredError as error:
            _log.info("job %s, %s: %s", execution.key, phase.name, error)
            self._wake.clear()
            if execution.bound and not self._stop.is_set():
                self._wake.wait(_RETRY_SECONDS)  # an unbound one waits for the cloud's consent
            event = machine.Again()
        except Exception as error:  # noqa: BLE001 - whatever a phase does, the machine has an answer
            event = Ran(_failure(error, phase))
        else:
            event = Ran(result)
        self._gone = work.gone
        return None if isinstance(event, machine.Again) and self._stop.is_set() else event

    def _clean_up(self, kind: Kind, execution: Execution) -> None:
        try:
            kind.clean_up(_Work(self, execution, None))
        except Exception:  # noqa: BLE001 - what stays behind must not keep the report back
            _log.exception("the clean-up of job %s", execution.key)
        self._sweep(None)

    def _make_scratch(self, key: Key) -> None:
        for folder in (self._work.parent, self._work, self.scratch(key)):
            if not folder.is_dir():
                files.make_directory(folder, 0o700)

    def _sweep(self, keep: Key | None) -> None:
        """Remove the scratch directories of all executions but `keep`."""
        try:
            if keep is None:
                files.remove(self._work)
            else:
                for left in self._work.iterdir():
                    if left.name != str(keep):
                        files.remove(left)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("something stays behind in %s: %s", self._work, error)

    # --- for the work in hand -----------------------------------------------------------------------------------------

    def scratch(self, key: Key) -> Path:
        """The scratch directory of an execution."""
        return self._work / str(key)

    def known(self, key: Key) -> Document | None:
        """The document of an execution, if this process has been told."""
        return self._document[1] if self._document is not None and self._document[0] == key else None

    def fetch(self, key: Key) -> Document:
        """The document with fresh URLs."""
        offer = self.service.describe(key)
        if offer is None or not offer.open:
            raise Dropped
        try:
            wanted = document.parse(offer.document, self._product)[1]
        except BadDocument as bad:
            raise AgentFault(str(bad)) from bad
        self._document = (key, wanted)
        return wanted

    def pause(self, seconds: float) -> None:
        """Sleep, unless the agent is to end."""
        if self._stop.wait(max(0.0, seconds)):
            raise Stopping

    def stopping(self) -> bool:
        """Whether the agent is to end."""
        return self._stop.is_set()

    def changed(self) -> bool:
        """Whether the cloud has said something about jobs since this was asked last."""
        changed = self._changed.is_set()
        self._changed.clear()
        return changed

    def now(self) -> float:
        """Monotonic seconds."""
        return self._clock()

    @property
    def online(self) -> bool:
        """Whether there is a connection."""
        return self._link.connected()


class _Work(Context):
    """What one phase may ask of the runner."""

    def __init__(self, runner: Runner, execution: Execution, phase: Phase | None) -> None:
        self._runner = runner
        self._execution = execution
        self._phase = phase
        self._reported_at = runner.now()
        self._reported = 0.0
        #: The cloud does not want to hear of it any more.
        self.gone = execution.gone

    @property
    def key(self) -> Key:
        return self._execution.key

    @property
    def document(self) -> Document | None:
        return self._runner.known(self.key)

    @property
    def memo(self) -> Mapping[str, Any]:
        return self._execution.memo

    @property
    def reason(self) -> str:
        return (self._execution.outcome and self._execution.outcome.reason) or ""

    @property
    def scratch(self) -> Path:
        return self._runner.scratch(self.key)

    def progress(self, fraction: float | None = None) -> None:
        self._look_up()
        now, done = self._runner.now(), fraction or 0.0
        if not due(now - self._reported_at, done - self._reported):
            return
        self._reported_at, self._reported = now, done
        if self._runner.online:
            self._say(fraction)

    def confirm(self) -> bool:
        try:
            self._tell(None)
        except NotDeliveredError as error:
            _log.info("job %s is not confirmed: %s", self.key, error)
            return False
        return True

    def refresh(self) -> Document:
        return self._runner.fetch(self.key)

    def wait(self, seconds: float) -> None:
        end = self._runner.now() + seconds
        while (left := end - self._runner.now()) > 0:
            self._runner.pause(min(left, _TICK_SECONDS))
            self.progress(self._reported)

    def _look_up(self) -> None:
        """End if the agent is to end, or if the cloud has withdrawn the job and it can still be dropped."""
        if self._runner.stopping():
            raise Stopping
        if not self._execution.bound and self._runner.changed() and self._runner.online:
            try:
                offer = self._runner.service.describe(self.key, document=False)
            except NotDeliveredError:
                return  # the next report or the next phase's consent will tell
            if offer is None or not offer.open:
                raise Dropped

    def _say(self, fraction: float | None) -> None:
        try:
            self._tell(fraction)
        except NotDeliveredError as error:
            _log.info("job %s: progress is not told: %s", self.key, error)

    def _tell(self, fraction: float | None) -> None:
        if self._phase is None:
            return
        details = _details(self._phase, self._execution)
        if fraction is not None:
            details["progress"] = f"{min(max(fraction, 0.0), 1.0):.0%}"
        answer = self._runner.service.update(self.key, "IN_PROGRESS", details, self._phase.minutes)
        if isinstance(answer, Accepted):
            return
        self.gone = True
        if not self._execution.bound:
            raise Dropped


class _Unknown:
    """Stands for a kind where there is only something to report."""

    phases: Sequence[Phase] = ()
    undo: Sequence[Phase] = ()

    def __init__(self, operation: str) -> None:
        self.operation = operation

    def clean_up(self, _: Context) -> None:
        """Nothing was begun."""

    def orphan(self) -> None:
        """Nothing can be under way."""
        return


def _details(phase: Phase, execution: Execution) -> dict[str, str]:
    release = execution.memo.get("release")
    return {"phase": phase.name} | ({"release": release} if isinstance(release, str) else {})


def _failure(error: Exception, phase: Phase) -> Result:
    """What an error that a phase did not foresee comes to."""
    code = phase.code
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        code = "no-space"
    elif isinstance(error, AgentFault) and error.code in FAILED_CODES:
        code = error.code
    elif not isinstance(error, AgentFault | OSError):
        _log.error("%s has failed", phase.name, exc_info=error)
    return Failed(code, clean(f"{phase.name}: {str(error) or type(error).__name__}"))
