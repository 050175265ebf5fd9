"""What the sensor's edges mean: pure decisions from edges, time, tuning and whether the unit is armed.

    edge, arming, tick ──▶ step(state, at, what, rules) ──▶ new state, decisions

An HC-SR501 (escol.com.my data sheet; the elegoo manual) is taken as it is:

- in its first minute under power it may go high by itself, so nothing is believed before that;
- after its output has fallen it is blind for 2.5 to 3 s: what rises in that time is a glitch, not motion;
- it holds its output high for 0.3 to 300 s, so one person in a room makes many pulses: a *movement* is a row of pulses
  without a quiet time between them, and is told once. Told again when it lasts ten minutes, so that neither a burglar
  who keeps busy nor a broken sensor keeps the unit silent;
- more pulses a minute than the blind time allows are chatter; a level that stays high is stuck; a cut wire reads low
  for ever, which cannot be told from an empty house but by its length.

The case's loop is simpler: high while closed. Opening it is an alarm whether the unit is armed or not, and so is a case
that is open when the agent starts.

All times are seconds since the board's power came, from a clock that nobody sets.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

from firmware_agent.tuning import Tuning

Kind = Literal[
    "motion",
    "tamper",
    "tamper-over",
    "stuck",
    "stuck-over",
    "sensor-silent",
    "sensor-silent-over",
    "chatter",
    "chatter-over",
    "sensor-lost",
    "sensor-lost-over",
    "armed",
    "disarmed",
    "clock-set",
    "part-broken",
]

#: How close together two pulses must be for low sensitivity, from the end of the first one.
PAIR_SECONDS: Final = 30.0
#: A movement that goes on is told again after so long.
LONGEST_MOVEMENT_SECONDS: Final = 600.0
#: A switch bounces; a case that was closed for less was not closed.
BOUNCE_SECONDS: Final = 1.0

_MINUTE: Final = 60.0


@dataclass(frozen=True)
class Rules:
    """By what the edges are judged.

    Attributes:
        warm_up_seconds: how long after power-up the sensor lies.
        blocked_seconds: how long after a falling edge it is blind.
        tuning: what the owner has set.
    """

    warm_up_seconds: float
    blocked_seconds: float
    tuning: Tuning

    @property
    def most_pulses_a_minute(self) -> float:
        """More than a sensor can make whose every pulse is followed by a blind time."""
        return math.floor(_MINUTE / self.blocked_seconds) + 1 if self.blocked_seconds > 0 else math.inf


@dataclass(frozen=True)
class Pir:
    """An edge of the motion sensor."""

    rising: bool


@dataclass(frozen=True)
class Case:
    """An edge of the loop through the case."""

    closed: bool


@dataclass(frozen=True)
class Arm:
    """The unit was armed or disarmed."""

    armed: bool


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Stimulus = Pir | Case | Arm | Tick


@dataclass(frozen=True)
class Decision:
    """Something to tell the cloud.

    Attributes:
        kind: what has happened.
        alarm: whether it is an alarm, else an event for the log.
        detail: more about it in words; may be empty.
    """

    kind: Kind
    alarm: bool = False
    detail: str = ""


@dataclass(frozen=True)
class State:
    """What is remembered from edge to edge.

    Attributes:
        armed: whether motion is an alarm.
        high: the sensor's level.
        since: when the level last changed.
        heard_at: the sensor's last edge, or when the watch began.
        believed: whether the pulse that is high, or was last, counts.
        fell_at: the end of the last believed pulse.
        moved_at: the last edge of a believed pulse since the unit was armed or disarmed.
        told: whether the present movement was told.
        told_at: when.
        rises: the last rising edges within a minute, believed or not.
        stuck, silent, chattering: which faults were told and last.
        closed: the case's loop.
        case_since: when it last changed.
        opened: whether an opening was told and is not over.
        pulses, glitches: since the watch began; what was believed and what was not.
    """

    armed: bool
    high: bool
    since: float
    heard_at: float
    believed: bool = False
    fell_at: float = -math.inf
    moved_at: float = -math.inf
    told: bool = False
    told_at: float = -math.inf
    rises: tuple[float, ...] = ()
    stuck: bool = False
    silent: bool = False
    chattering: bool = False
    closed: bool = True
    case_since: float = -math.inf
    opened: bool = False
    pulses: int = 0
    glitches: int = 0


Step = tuple[State, tuple[Decision, ...]]


def begin(at: float, *, armed: bool, high: bool, closed: bool = True, heard_at: float | None = None) -> Step:
    """The watch begins.

    Args:
        at: now.
        armed: as it was left.
        high: the sensor's level. A level that is high already is nobody's motion yet.
        closed: the case's loop; open at the start is an alarm.
        heard_at: the sensor's last edge, where an earlier run of the agent in this boot saw it.
    """
    state = State(armed=armed, high=high, since=at, heard_at=at if heard_at is None else min(heard_at, at))
    return (state, ()) if closed else _opened(state, at)


def step(state: State, at: float, what: Stimulus, rules: Rules) -> Step:
    """What `what` means at the time `at`."""
    match what:
        case Pir(rising=True):
            return _risen(state, at, rules)
        case Pir():
            return _fallen(state, at)
        case Case(closed):
            return (replace(state, closed=True, case_since=at), ()) if closed else _opened(state, at)
        case Arm(armed):
            return _armed(state, armed)
        case Tick():
            return _ticked(state, at, rules)


def _risen(state: State, at: float, rules: Rules) -> Step:
    warm = at >= rules.warm_up_seconds
    glitch = at - state.fell_at < rules.blocked_seconds
    rises = tuple(one for one in state.rises if at - one <= _MINUTE)
    if warm and not math.isinf(rules.most_pulses_a_minute):
        rises = (*rises, at)[-(int(rules.most_pulses_a_minute) + 1) :]
    decisions = []
    if state.silent:
        decisions.append(Decision("sensor-silent-over"))
    chatter = len(rises) > rules.most_pulses_a_minute
    if chatter and not state.chattering:
        decisions.append(Decision("chatter", detail=f"{len(rises)} pulses in a minute; check the sensor and its wires"))
    state = replace(
        state,
        high=True,
        since=at,
        heard_at=at,
        rises=rises,
        silent=False,
        chattering=state.chattering or chatter,
        believed=warm and not glitch,
        pulses=state.pulses + (warm and not glitch),
        glitches=state.glitches + (warm and glitch),
    )
    if state.believed:
        state, motion = _moved(state, at, rules.tuning)
        decisions += motion
    return state, tuple(decisions)


def _moved(state: State, at: float, tuning: Tuning) -> Step:
    """A believed pulse has begun: is it to be told?"""
    still = at - state.moved_at
    again = tuning.quiet_seconds if tuning.sensitivity == "high" else LONGEST_MOVEMENT_SECONDS
    told = state.told and still < tuning.quiet_seconds and at - state.told_at < again
    enough = tuning.sensitivity != "low" or still <= PAIR_SECONDS
    state = replace(state, moved_at=at, told=told)
    if told or not enough:
        return state, ()
    return replace(state, told=True, told_at=at), (Decision("motion", alarm=state.armed),)


def _fallen(state: State, at: float) -> Step:
    decisions = (Decision("stuck-over", detail=_lasted(at - state.since)),) if state.stuck else ()
    state = replace(state, high=False, since=at, heard_at=at, stuck=False)
    if state.believed:
        # A glitch's end does not make the sensor blind again: chatter must not hide motion for ever.
        moved_at = at if state.moved_at > -math.inf else state.moved_at
        state = replace(state, fell_at=at, moved_at=moved_at)
    return state, decisions


def _armed(state: State, armed: bool) -> Step:
    if armed == state.armed:
        return state, ()
    # What moved before does not count: the next pulse is told whatever the quiet time says.
    state = replace(state, armed=armed, told=False, moved_at=-math.inf)
    return state, (Decision("armed" if armed else "disarmed"),)


def _opened(state: State, at: float) -> Step:
    bounced = state.opened and (not state.closed or at - state.case_since < BOUNCE_SECONDS)
    state = replace(state, closed=False, case_since=at, opened=True)
    return state, () if bounced else (Decision("tamper", alarm=True, detail="the case is open"),)


def _ticked(state: State, at: float, rules: Rules) -> Step:
    decisions = []
    lasted = at - state.since
    if state.high and not state.stuck and lasted >= rules.tuning.stuck_seconds:
        decisions.append(Decision("stuck", detail=f"the sensor is high {_lasted(lasted)}"))
        state = replace(state, stuck=True)
    silent_seconds = rules.tuning.silent_hours * 3600
    if silent_seconds and not state.high and not state.silent and at - state.heard_at >= silent_seconds:
        decisions.append(Decision("sensor-silent", detail=f"no pulse {_lasted(at - state.heard_at)}; is its wire cut?"))
        state = replace(state, silent=True)
    if state.chattering and sum(at - one <= _MINUTE for one in state.rises) <= rules.most_pulses_a_minute / 2:
        decisions.append(Decision("chatter-over"))
        state = replace(state, chattering=False)
    if state.opened and state.closed and at - state.case_since >= BOUNCE_SECONDS:
        decisions.append(Decision("tamper-over", detail="the case is closed"))
        state = replace(state, opened=False)
    return state, tuple(decisions)


def _lasted(seconds: float) -> str:
    """How long, for people."""
    if seconds < 2 * _MINUTE:
        return f"for {seconds:.0f} s"
    if seconds < 7200:
        return f"for {seconds / 60:.0f} min"
    return f"for {seconds / 3600:.0f} h"
