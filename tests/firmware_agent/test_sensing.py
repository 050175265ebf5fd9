"""What the sensor's edges come to: every movement is told, once, and no fault of the sensor keeps the unit silent."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_agent import sensing
from firmware_agent.sensing import LONGEST_MOVEMENT_SECONDS, Arm, Case, Decision, Pir, Rules, State, Stimulus, Tick
from firmware_agent.tuning import Tuning

TUNING = Tuning(quiet_seconds=10, stuck_seconds=900, silent_hours=24)
RULES = Rules(60, 2.5, TUNING)


class Watch:
    """A unit's sensing, driven by hand."""

    def __init__(self, rules: Rules = RULES, *, at: float = 100.0, armed: bool = True, high: bool = False) -> None:
        self.rules = rules
        self.state, decisions = sensing.begin(at, armed=armed, high=high)
        self.said: list[tuple[float, Decision]] = [(at, one) for one in decisions]

    def do(self, at: float, what: Stimulus) -> list[str]:
        self.state, decisions = sensing.step(self.state, at, what, self.rules)
        self.said += [(at, one) for one in decisions]
        return [one.kind for one in decisions]

    def pulse(self, at: float, seconds: float = 3.0) -> list[str]:
        return self.do(at, Pir(True)) + self.do(at + seconds, Pir(False))

    def times(self, kind: str) -> list[float]:
        return [at for at, one in self.said if one.kind == kind]


def tuned(**changes: object) -> Rules:
    return replace(RULES, tuning=replace(TUNING, **changes))  # type: ignore[arg-type]


# --- motion -------------------------------------------------------------------------------------------------------


def test_motion_is_an_alarm_at_its_first_edge_while_armed_and_an_event_while_not() -> None:
    assert Watch().do(200, Pir(True)) == ["motion"]
    for armed in (True, False):
        watch = Watch(armed=armed)
        watch.pulse(200)
        assert watch.said == [(200, Decision("motion", alarm=armed))]


def test_nothing_is_believed_in_the_first_minute_after_power_up() -> None:
    watch = Watch(at=5.0)

    assert [watch.pulse(at) for at in (10, 30, 58)] == [[], [], []]
    assert watch.pulse(70) == ["motion"]


def test_an_agent_that_starts_anew_on_a_warm_sensor_believes_at_once() -> None:
    assert Watch(at=3600).pulse(3600.1) == ["motion"]


def test_what_rises_in_the_blind_time_is_a_glitch() -> None:
    watch = Watch(tuned(quiet_seconds=0))
    watch.pulse(200, 3.0)

    assert watch.pulse(205.0, 0.1) == []
    assert watch.pulse(205.6) == ["motion"]
    assert (watch.state.pulses, watch.state.glitches) == (2, 1)


def test_a_row_of_pulses_is_one_movement() -> None:
    watch = Watch()
    for at in range(200, 260, 6):
        watch.pulse(at)

    assert watch.times("motion") == [200]
    assert watch.pulse(266) == []  # 9 s after the last fall
    assert watch.pulse(282) == ["motion"]


def test_a_long_hold_is_part_of_its_movement() -> None:
    watch = Watch()
    watch.pulse(200, seconds=120)

    assert watch.pulse(325) == []
    assert watch.pulse(340) == ["motion"]


def test_a_movement_that_does_not_end_is_told_again_after_ten_minutes() -> None:
    watch = Watch()
    for at in range(200, 200 + 1300, 6):
        watch.pulse(at)

    assert watch.times("motion") == [200, 800, 1400]


def test_high_sensitivity_tells_a_long_movement_again_after_each_quiet_time() -> None:
    watch = Watch(tuned(sensitivity="high"))
    for at in range(200, 260, 6):
        watch.pulse(at)

    assert watch.times("motion") == [200, 212, 224, 236, 248]


def test_low_sensitivity_wants_two_pulses_close_together() -> None:
    watch = Watch(tuned(sensitivity="low"))

    assert watch.pulse(200) == []
    assert watch.pulse(240) == []
    assert watch.pulse(250) == ["motion"]
    assert watch.pulse(256) == []


def test_arming_makes_the_next_pulse_tell_whatever_moved_before() -> None:
    watch = Watch(armed=False)
    watch.pulse(200)
    assert watch.do(204, Arm(True)) == ["armed"]
    assert watch.do(204, Arm(True)) == []

    assert watch.pulse(206) == ["motion"]
    assert watch.said[-1] == (206, Decision("motion", alarm=True))


def test_a_level_that_is_high_at_the_start_is_nobodys_motion() -> None:
    watch = Watch(high=True)

    assert watch.do(101, Pir(False)) == []
    assert watch.do(102, Pir(True)) == ["motion"]


# --- faults -------------------------------------------------------------------------------------------------------


def test_a_sensor_that_stays_high_is_stuck_until_it_falls() -> None:
    watch = Watch()
    watch.do(200, Pir(True))

    assert watch.do(1099, Tick()) == []
    assert watch.do(1100, Tick()) == ["stuck"]
    assert watch.do(1101, Tick()) == []
    assert watch.do(5000, Pir(False)) == ["stuck-over"]
    assert watch.said[1][1].detail == "the sensor is high for 15 min"


def test_a_sensor_that_is_high_from_the_start_is_stuck_too() -> None:
    watch = Watch(high=True)

    assert watch.do(1000, Tick()) == ["stuck"]


def test_a_sensor_without_a_pulse_is_named_once_and_welcomed_back() -> None:
    watch = Watch()
    day = 24 * 3600

    assert watch.do(100 + day - 1, Tick()) == []
    assert watch.do(100 + day, Tick()) == ["sensor-silent"]
    assert watch.do(100 + 3 * day, Tick()) == []
    assert watch.do(100 + 3 * day, Pir(True)) == ["sensor-silent-over", "motion"]


def test_a_restart_of_the_agent_does_not_begin_the_silence_anew() -> None:
    state, _ = sensing.begin(90_000, armed=True, high=False, heard_at=500)

    _, decisions = sensing.step(state, 90_001, Tick(), RULES)

    assert [one.kind for one in decisions] == ["sensor-silent"]


def test_silence_is_never_named_when_it_is_set_to_zero() -> None:
    assert Watch(tuned(silent_hours=0)).do(1e9, Tick()) == []


def test_more_pulses_than_a_sensor_can_make_are_chatter_and_do_not_hide_motion() -> None:
    watch = Watch()
    for number in range(1500):
        watch.pulse(200 + number, seconds=0.2)

    assert len(watch.times("chatter")) == 1
    assert watch.times("motion") == pytest.approx([200, 801, 1402], abs=5)
    assert watch.do(1800, Tick()) == ["chatter-over"]


# --- the case -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("armed", [True, False])
def test_an_open_case_is_an_alarm_armed_or_not(armed: bool) -> None:
    watch = Watch(armed=armed)

    assert watch.do(200, Case(False)) == ["tamper"]
    assert watch.said[0][1].alarm
    assert watch.do(300, Case(True)) == []
    assert watch.do(300.5, Tick()) == []
    assert watch.do(301, Tick()) == ["tamper-over"]
    assert watch.do(302, Case(False)) == ["tamper"]


def test_a_switch_that_bounces_opens_once() -> None:
    watch = Watch()
    for number in range(20):
        watch.do(200 + number * 0.05, Case(bool(number % 2)))

    assert watch.times("tamper") == [200]


def test_an_opening_after_a_second_is_a_new_one_also_between_two_ticks() -> None:
    watch = Watch()
    watch.do(200, Case(False))
    watch.do(201, Case(True))

    assert watch.do(202.5, Case(False)) == ["tamper"]


def test_a_case_that_is_open_at_the_start_is_an_alarm_even_on_a_cold_board() -> None:
    _, decisions = sensing.begin(3.0, armed=False, high=False, closed=False)

    assert decisions == (Decision("tamper", alarm=True, detail="the case is open"),)


# --- whatever comes -----------------------------------------------------------------------------------------------

stimuli = st.one_of(
    st.builds(Pir, st.booleans()),
    st.builds(Pir, st.booleans()),
    st.builds(Case, st.booleans()),
    st.builds(Arm, st.booleans()),
    st.just(Tick()),
)
days = st.lists(st.tuples(st.one_of(st.floats(0, 5), st.floats(0, 1000), st.just(90_000.0)), stimuli), max_size=60)
tunings = st.builds(
    Tuning,
    sensitivity=st.sampled_from(["low", "normal", "high"]),
    quiet_seconds=st.sampled_from([0.0, 10.0, 60.0]),
    stuck_seconds=st.sampled_from([10.0, 900.0]),
    silent_hours=st.sampled_from([0.0, 1.0, 24.0]),
)


def lived(day: list[tuple[float, Stimulus]], rules: Rules) -> tuple[Watch, list[tuple[float, Stimulus, State]]]:
    watch = Watch(rules, at=0.0)
    at, seen = 0.0, []
    for pause, what in day:
        at += pause
        watch.do(at, what)
        seen.append((at, what, watch.state))
    return watch, seen


@given(days, tunings)
def test_motions_keep_the_quiet_time_and_the_warm_up(day: list[tuple[float, Stimulus]], tuning: Tuning) -> None:
    watch, _ = lived(day, replace(RULES, tuning=tuning))

    last = None
    for at, said in watch.said:
        if said.kind == "motion":
            assert at >= RULES.warm_up_seconds
            assert last is None or at - last >= min(tuning.quiet_seconds, LONGEST_MOVEMENT_SECONDS)
            last = at
        elif said.kind in {"armed", "disarmed"}:
            last = None


@given(days, tunings)
def test_no_believed_pulse_while_armed_goes_untold_for_long(day: list[tuple[float, Stimulus]], tuning: Tuning) -> None:
    rules = replace(RULES, tuning=replace(tuning, sensitivity="normal"))
    watch, seen = lived(day, rules)

    armed_at, pulses = 0.0, 0
    for at, what, state in seen:
        if isinstance(what, Arm):
            armed_at = max([t for t, said in watch.said if said.kind == "armed" and t <= at], default=0.0)
        if state.pulses > pulses and state.armed:
            told = [t for t, said in watch.said if said.kind == "motion" and said.alarm and armed_at <= t <= at]
            assert told
            assert at - told[-1] < LONGEST_MOVEMENT_SECONDS
        pulses = state.pulses


@given(days, tunings)
def test_motion_is_an_alarm_exactly_while_armed_and_faults_begin_and_end_in_turn(
    day: list[tuple[float, Stimulus]], tuning: Tuning
) -> None:
    watch, _ = lived(day, replace(RULES, tuning=tuning))

    armed = True
    for _, said in watch.said:
        armed = {"armed": True, "disarmed": False}.get(said.kind, armed)
        assert said.alarm == ((said.kind == "motion" and armed) or said.kind == "tamper")
    for fault in ("stuck", "sensor-silent", "chatter"):
        told = [said.kind for _, said in watch.said if said.kind in {fault, fault + "-over"}]
        assert all(
            kind == wanted for kind, wanted in zip(told, itertools.cycle([fault, fault + "-over"]), strict=False)
        )


@given(days)
def test_an_opened_case_is_always_told(day: list[tuple[float, Stimulus]]) -> None:
    watch, seen = lived(day, RULES)

    openings = [at for at, what, _ in seen if what == Case(False)]
    assert bool(watch.times("tamper")) == bool(openings)
    assert watch.times("tamper")[:1] == openings[:1]
