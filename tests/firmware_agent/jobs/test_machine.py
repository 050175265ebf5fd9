"""The state machine by itself: whatever happens in whatever order, an execution ends, once, within its bounds."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from firmware_agent.jobs import journal, machine
from firmware_agent.jobs.kind import Context, Done, Failed, Key, Next, Phase, Rejected, Restart, Result
from firmware_agent.jobs.machine import (
    CLEAN_ATTEMPTS,
    MAX_STORES,
    AskConsent,
    CleanUp,
    Execution,
    Leave,
    Outcome,
    Report,
    Rest,
    Run,
    Stage,
)
from firmware_agent.jobs.single import Single

KEY = Key("job-1", 1)


def _never(_: Context) -> Result:
    raise AssertionError


class Made(Single):
    """A kind of any shape; its phases are never run here."""

    operation = "made"

    def __init__(self, forward: list[Phase], undo: list[Phase]) -> None:
        self.phases = forward
        self.undo = undo


def phase(name: str, *, bound: bool = False, attempts: int = 3) -> Phase:
    return Phase(name, _never, bound=bound, attempts=attempts)


KINDS = st.builds(
    lambda forward, undo: Made(
        [phase(f"p{number}", bound=bound, attempts=attempts) for number, (bound, attempts) in enumerate(forward)],
        [phase(f"u{number}", attempts=attempts) for number, attempts in enumerate(undo)],
    ),
    st.lists(st.tuples(st.booleans(), st.integers(1, 12)), min_size=1, max_size=6),
    st.lists(st.integers(1, 4), max_size=3),
)
RESULTS: st.SearchStrategy[Result] = st.one_of(
    st.just(Next({"a": 1})),
    st.just(Done()),
    st.just(Failed("install", "no")),
    st.just(Rejected("downgrade", "never")),
    st.just(Restart({"b": 2})),
)


class Runs(RuleBasedStateMachine):
    """Plays the runner, with a process that dies whenever it likes, and a cloud that changes its mind."""

    @initialize(kind=KINDS)
    def offered(self, kind: Made) -> None:
        self.kind = kind
        self.execution, self.action = machine.begin(KEY, kind)
        self.durable = self.execution
        self.entered: dict[str, int] = {}
        self.reports: list[Outcome] = []
        self.was_bound = False

    def _step(self, event: machine.Event) -> None:
        before = self.execution
        self.execution, self.action = machine.step(before, self.kind, event)
        assert self.execution.stores >= before.stores
        if self.execution.stores > before.stores:
            self.durable = replace(self.execution, granted=False)
        assert not (before.bound and not self.execution.bound)
        if before.stage is Stage.CLOSED:
            assert self.execution == before

    @precondition(lambda self: isinstance(self.action, AskConsent))
    @rule()
    def granted(self) -> None:
        assert not self.execution.bound
        self._step(machine.Granted())

    @precondition(lambda self: isinstance(self.action, AskConsent | Report))
    @rule()
    def gone(self) -> None:
        self._step(machine.Gone())
        assert not isinstance(self.action, AskConsent | Run | Report)

    @precondition(lambda self: isinstance(self.action, Run))
    @rule(result=RESULTS)
    def ran(self, result: Result) -> None:
        assert isinstance(self.action, Run)
        assert self.durable.phase == self.action.phase.name  # it is noted before it is done
        was = self.execution
        self._step(machine.Ran(result))
        if isinstance(result, Failed | Rejected) and was.stage is Stage.FORWARD and was.bound and self.kind.undo:
            assert self.execution.stage is Stage.UNDOING

    @precondition(lambda self: isinstance(self.action, Run) and not self.execution.bound)
    @rule()
    def withdrawn_meanwhile(self) -> None:
        self._step(machine.Gone())
        assert isinstance(self.action, CleanUp)

    @precondition(lambda self: isinstance(self.action, Run))
    @rule()
    def no_link(self) -> None:
        self._step(machine.Again())

    @precondition(lambda self: isinstance(self.action, Run | AskConsent) and not self.was_bound)
    @rule()
    def unwritable(self) -> None:
        before = replace(self.execution, bound=False)
        if self.execution.stage is Stage.FORWARD:
            after, action = machine.step(before, self.kind, machine.Unwritable("disk full"))
            assert isinstance(action, CleanUp)
            assert after.outcome is not None
            assert after.outcome.code == "no-space"

    @precondition(lambda self: isinstance(self.action, CleanUp))
    @rule()
    def cleaned(self) -> None:
        self._step(machine.Cleaned())

    @precondition(lambda self: isinstance(self.action, Report))
    @rule()
    def told(self) -> None:
        assert isinstance(self.action, Report)
        self.reports.append(self.action.outcome)
        self._step(machine.Told())
        assert self.execution.stage is Stage.CLOSED

    @precondition(lambda self: not isinstance(self.action, Rest))
    @rule()
    def dies(self) -> None:
        """Killed, cut off, or left for another release: a new process reads the journal."""
        self.execution = journal.from_json(journal.to_json(self.durable))
        assert self.execution == self.durable
        self._step(machine.Resumed())
        assert not isinstance(self.action, Leave)

    @precondition(lambda self: isinstance(self.action, Rest))
    @rule()
    def nothing_more_happens(self) -> None:
        for event in (machine.Gone(), machine.Told(), machine.Resumed()):
            assert machine.step(self.execution, self.kind, event) == (self.execution, Rest())

    @invariant()
    def within_its_bounds(self) -> None:
        undo = sum(one.attempts for one in self.kind.undo)
        assert self.execution.stores <= MAX_STORES + undo + CLEAN_ATTEMPTS + 2
        assert len(self.reports) <= 1
        if isinstance(self.action, Run):
            assert self.execution.entered <= self.action.phase.attempts
            if not self.execution.bound:
                assert self.execution.granted

    @invariant()
    def ends_by_one_outcome(self) -> None:
        if isinstance(self.action, Rest):
            assert self.execution.gone or self.reports
        if self.execution.stage in {Stage.REPORTING, Stage.CLOSED} and not self.execution.gone:
            assert self.execution.outcome is not None


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@given(KINDS, st.data())
@settings(max_examples=200, deadline=None)
def test_an_execution_comes_to_its_end_whatever_dies(kind: Made, data: st.DataObject) -> None:
    """No sequence of crashes goes on for ever: the action is never done, only begun, until all attempts are used up."""
    execution, action = machine.begin(KEY, kind)
    for _ in range(4 * (MAX_STORES + 40)):
        if isinstance(action, Rest):
            return
        match action:
            case AskConsent():
                event: machine.Event = machine.Granted()
            case Report():
                event = machine.Told()
            case Leave():
                event = machine.Resumed()
            case CleanUp():
                ends: list[machine.Event] = [machine.Cleaned(), machine.Resumed()]
                event = data.draw(st.sampled_from(ends))
            case _:
                again: list[machine.Event] = [machine.Resumed(), machine.Again()]
                event = data.draw(st.one_of(st.sampled_from(again), RESULTS.map(machine.Ran)))
        execution, action = machine.step(execution, kind, event)
    raise AssertionError(f"it goes on for ever: {execution}")


def drive(kind: Made, *events: machine.Event) -> tuple[Execution, machine.Action]:
    execution, action = machine.begin(KEY, kind)
    for event in events:
        execution, action = machine.step(execution, kind, event)
    return execution, action


def test_a_phase_that_never_ends_fails_after_its_attempts() -> None:
    kind = Made([phase("work", attempts=2)], [])
    again = (machine.Resumed(), machine.Granted())

    execution, action = drive(kind, machine.Granted(), *again, *again)

    assert isinstance(action, CleanUp)
    assert execution.outcome == Outcome("FAILED", "interrupted", "work was begun 2 times and never ended")


def test_a_job_that_goes_in_circles_is_rejected_and_so_never_tried_again() -> None:
    kind = Made([phase("work", attempts=1000)], [])

    execution, action = drive(kind, machine.Granted(), *(machine.Resumed(), machine.Granted()) * (MAX_STORES - 2))
    assert isinstance(action, Run)
    execution, action = machine.step(execution, kind, machine.Resumed())

    assert isinstance(action, CleanUp)
    assert execution.outcome is not None
    assert (execution.outcome.status, execution.outcome.code) == ("REJECTED", "loop")


def test_a_bound_job_that_goes_in_circles_is_undone_first() -> None:
    kind = Made([phase("work", bound=True, attempts=1000)], [phase("back")])

    execution, action = drive(kind, machine.Granted(), *[machine.Resumed()] * MAX_STORES)

    assert isinstance(action, Run)
    assert action.phase.name == "back"
    assert execution.outcome is not None
    assert execution.outcome.code == "loop"


def test_a_failing_undo_is_added_to_the_reason_and_the_next_one_follows() -> None:
    kind = Made([phase("work", bound=True)], [phase("back"), phase("look")])

    execution, action = drive(
        kind,
        machine.Granted(),
        machine.Ran(Failed("unhealthy", "the sensor is deaf")),
        machine.Ran(Failed("install", "no way back")),
    )

    assert isinstance(action, Run)
    assert action.phase.name == "look"
    assert execution.outcome == Outcome("FAILED", "unhealthy", "the sensor is deaf; back failed: no way back")


def test_a_phase_of_another_release_is_undone_if_it_was_bound() -> None:
    kind = Made([phase("work", bound=True)], [phase("back")])
    found = Execution(KEY, "made", Stage.FORWARD, "levitate", bound=True)

    execution, action = machine.step(found, kind, machine.Resumed())

    assert isinstance(action, Run)
    assert action.phase.name == "back"
    assert execution.outcome is not None
    assert execution.outcome.code == "crashed"


@pytest.mark.parametrize("wrong", [{}, [], None, {"format": 1}, {"format": 1, "job": "a", "execution": True}])
def test_a_journal_that_makes_no_sense_is_damaged(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"missing|object"):
        journal.from_json(wrong)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner))
)
def test_any_json_is_a_journal_or_damaged(value: object) -> None:
    try:
        journal.from_json(value)
    except ValueError:
        return
    raise AssertionError(value)


def test_a_newer_journal_tells_at_least_whose_job_is_to_be_undone() -> None:
    found = journal.from_json({"format": 2, "job": "j", "execution": 3, "operation": "update", "stage": {"new": True}})

    assert (found.key, found.operation, found.bound) == (Key("j", 3), "update", True)
