"""The thread that watches: edges become decisions, decisions become durable, and the link is told to look.

It does nothing else, so that neither a slow network nor a job delays an alarm. Each edge is stamped where it is seen,
on the pin factory's thread. Once a second it looks at the time: for faults of the sensor, for an edge that was lost on
the way, and for the clock, which may have been set meanwhile.
"""

import logging
import math
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from firmware_agent import messages, sensing
from firmware_agent.board import Board, ClockReading
from firmware_agent.errors import PirFault
from firmware_agent.messages import Alarm
from firmware_agent.pins import Pir
from firmware_agent.sensing import Arm, Case, Decision, Rules, State, Stimulus, Tick
from firmware_agent.spool import Spool
from firmware_agent.tuning import Tuning

_log = logging.getLogger(__name__)

_TICK_SECONDS: Final = 1.0

#: A level that differs from the last edge for so many looks in a row: the edge was lost.
_LOST_EDGE_LOOKS: Final = 2

#: A clock that was set by less than this is not worth an event.
_CLOCK_STEP_SECONDS: Final = 2.0


@dataclass(frozen=True)
class _Seen:
    """Something that happened, stamped where it was seen."""

    what: Stimulus
    clock: ClockReading
    uptime: float


@dataclass(frozen=True)
class _Say:
    """Something to tell that the sensor has no part in."""

    decision: Decision


@dataclass(frozen=True)
class _Tune:
    """Other settings from now on."""

    tuning: Tuning


class Told(Protocol):
    """Whoever wants to know what was kept."""

    def __call__(self, message: Alarm, clock: ClockReading, *, alarm: bool) -> None:
        """This alarm or event was kept, by that clock."""
        ...


class Keeper:
    """Watches the sensor and the case.

    Args:
        board: clock and uptime.
        rules: by what edges are judged.
        spool: where alarms and events go.
        told: called after each of them is kept; must not block.
        believable: whether a clock that claims to be set can be right; asked only when its time is news.
    """

    def __init__(
        self,
        board: Board,
        rules: Rules,
        spool: Spool,
        *,
        told: "Told",
        believable: Callable[[float], bool] = lambda _: True,
    ) -> None:
        self._board = board
        self._boot_id = board.facts().boot_id
        self._rules = rules
        self._spool = spool
        self._told = told
        self._believable = believable
        self._seen: queue.SimpleQueue[_Seen | _Tune | _Say | None] = queue.SimpleQueue()
        self._pir: Pir | None = None
        self._case: Pir | None = None
        self._odd_looks = 0
        self._began: float | None = None
        self._estimated: float | None = None
        self._state: State | None = None
        #: Why the sensor cannot be read, if it cannot.
        self.fault: str | None = None

    def watch(
        self, pir: Pir, case: Pir | None, *, armed: bool, heard_at: float | None = None, was_low: bool = False
    ) -> None:
        """Begin; from now on no edge is lost.

        Args:
            pir: the sensor.
            case: the loop through the case, if there is one.
            armed: as it was left.
            heard_at: uptime of the sensor's last edge, if an earlier run in this boot saw it.
            was_low: an earlier run in this boot saw the sensor low: if it is high now, it rose while nobody watched.
        """
        self._pir, self._case = pir, case
        pir.watch(lambda rising: self.happened(sensing.Pir(rising)))
        if case is not None:
            case.watch(lambda closed: self.happened(Case(closed)))
        closed = case is None or bool(case.level())
        high = bool(pir.level())
        if high and was_low:
            high = False
            self.happened(sensing.Pir(rising=True))
        self._state, decisions = sensing.begin(
            self._board.uptime(), armed=armed, high=high, closed=closed, heard_at=heard_at
        )
        for decision in decisions:
            self._keep(decision, self._board.clock(), self._board.uptime())

    @property
    def has_case(self) -> bool:
        """Whether a loop through the case is watched."""
        return self._case is not None

    @property
    def state(self) -> State:
        """What is remembered now."""
        assert self._state is not None, "watch comes first"  # noqa: S101 - a mistake of the caller
        return self._state

    # --- for other threads ------------------------------------------------------------------------------------------

    def happened(self, what: Stimulus) -> None:
        """Take this in, stamped now."""
        self._seen.put(_Seen(what, self._board.clock(), self._board.uptime()))

    def arm(self, *, armed: bool) -> None:
        """The unit was armed or disarmed."""
        self.happened(Arm(armed))

    def tune(self, tuning: Tuning) -> None:
        """Judge by these settings from now on."""
        self._seen.put(_Tune(tuning))

    def say(self, decision: Decision) -> None:
        """Keep this as well."""
        self._seen.put(_Say(decision))

    def wake(self) -> None:
        """Look whether the end has come."""
        self._seen.put(None)

    # --- the thread -------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event, beat: Callable[[], None]) -> None:
        """Until `stop` is set and `wake` called; what came before is kept, also while the end was asked for."""
        tick_at = -math.inf
        while not stop.is_set() or not self._seen.empty():
            beat()
            try:
                seen = self._seen.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                seen = None
            if isinstance(seen, _Seen):
                self._take(seen.what, seen.clock, seen.uptime)
            elif isinstance(seen, _Tune):
                self._rules = replace(self._rules, tuning=seen.tuning)
            elif isinstance(seen, _Say):
                self._keep(seen.decision, self._board.clock(), self._board.uptime())
            uptime = self._board.uptime()
            # Not before all edges that have come are taken in: the next may be the fall of a level that looks stuck.
            if self._seen.empty() and not 0 <= uptime - tick_at < _TICK_SECONDS:
                tick_at = uptime
                self._tick(uptime)

    def _tick(self, uptime: float) -> None:
        clock = self._board.clock()
        self._watch_clock(clock, uptime)
        self._look(clock, uptime)
        self._take(Tick(), clock, uptime)

    def _take(self, what: Stimulus, clock: ClockReading, uptime: float) -> None:
        self._state, decisions = sensing.step(self.state, uptime, what, self._rules)
        for decision in decisions:
            self._keep(decision, clock, uptime)

    def _keep(self, decision: Decision, clock: ClockReading, uptime: float) -> None:
        made: list[Alarm] = []

        def body(sequence: int) -> bytes:
            made.append(
                messages.alarm(
                    sequence,
                    clock=clock,
                    uptime=uptime,
                    boot_id=self._boot_id,
                    kind=decision.kind,
                    detail=decision.detail,
                )
            )
            return made[-1].payload()

        (self._spool.alarm if decision.alarm else self._spool.event)(body)
        self._told(made[-1], clock, alarm=decision.alarm)

    # --- looks ------------------------------------------------------------------------------------------------------

    def _look(self, clock: ClockReading, uptime: float) -> None:
        """Is the sensor still there, and was no edge lost on the way?"""
        assert self._pir is not None  # noqa: S101 - as above
        try:
            high = bool(self._pir.level())
        except PirFault as fault:
            if self.fault is None:
                self._keep(Decision("sensor-lost", detail=str(fault)), clock, uptime)
            self.fault = str(fault)
            return
        if self.fault is not None:
            self.fault = None
            self._keep(Decision("sensor-lost-over"), clock, uptime)
        self._odd_looks = self._odd_looks + 1 if high != self.state.high and self._seen.empty() else 0
        if self._odd_looks >= _LOST_EDGE_LOOKS:
            self._odd_looks = 0
            _log.warning("an edge was lost: the sensor is %s", "high" if high else "low")
            self._take(sensing.Pir(high), clock, uptime)

    def _watch_clock(self, clock: ClockReading, uptime: float) -> None:
        """When did this boot begin? Once that is certain, the moments of its messages can be put right."""
        began = clock.unix - uptime
        trusted = clock.quality != "estimated"
        if trusted and (self._began is None or abs(began - self._began) > _CLOCK_STEP_SECONDS / 2):
            trusted = self._believable(clock.unix)
        if not trusted:
            self._estimated = began
            self._began = None
            return
        self._began = began
        moved = self._spool.learn(self._boot_id, began)
        if self._estimated is not None:  # it was set in this run: by how much, whether that is news or not
            moved, self._estimated = began - self._estimated, None
        if moved is not None and abs(moved) >= _CLOCK_STEP_SECONDS:
            self._keep(Decision("clock-set", detail=f"by {moved:+.0f} s ({clock.quality})"), clock, uptime)
