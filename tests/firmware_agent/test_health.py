"""How the unit is, in numbers."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from firmware_agent import health
from firmware_agent.board import Health
from firmware_agent.health import FALSE_SECONDS, Incidents

NOW = datetime(2027, 1, 1, tzinfo=UTC)


def metrics(one: Health, incidents: Incidents | None = None) -> dict[str, float]:
    return dict(
        health.metrics(
            one,
            uptime=90.7,
            spool=3,
            incidents=incidents or Incidents(),
            expires=NOW + timedelta(days=30, hours=1),
            now=NOW,
        )
    )


def test_what_is_not_known_is_left_out() -> None:
    assert metrics(Health(None, None, 2_500_000, 1_900_000)) == {
        "disk_free_mb": 2,
        "memory_free_mb": 1,
        "uptime_s": 90,
        "spool_depth": 3,
        "certificate_days": 30,
    }


def test_what_is_the_case_and_what_was_are_told_apart() -> None:
    found = metrics(Health(45.2, 0x50005, 0, 0, disk_wear_percent=20, radio_dbm=-58))

    assert (found["throttled"], found["throttled_since_boot"]) == (5, 5)
    assert metrics(Health(45.2, 0x50000, 0, 0))["throttled"] == 0
    assert (found["disk_wear_percent"], found["radio_dbm"], found["temperature_c"]) == (20, -58, 45.2)


def test_an_alarm_after_which_somebody_disarms_was_false() -> None:
    incidents = Incidents().alarm(0).alarm(100).disarmed(100 + FALSE_SECONDS - 1)
    incidents = incidents.alarm(10_000).disarmed(10_000 + FALSE_SECONDS)

    assert incidents.false == (True, False)
    assert incidents.rate == 0.5
    assert metrics(Health(None, None, 0, 0), incidents)["false_alarm_percent"] == 50


def test_disarming_without_an_alarm_counts_for_nothing() -> None:
    assert Incidents().disarmed(5.0).rate is None
    assert Incidents((False,)).disarmed(5.0).false == (False,)
    assert Incidents().alarm(0).disarmed(1).disarmed(2).false == (True,)


@given(st.lists(st.tuples(st.floats(0, 2000), st.booleans()), max_size=200))
def test_whatever_happens_the_rate_is_a_share_and_memory_is_bounded(steps: list[tuple[float, bool]]) -> None:
    incidents, now = Incidents(), 0.0
    for wait, alarm in steps:
        now += wait
        incidents = incidents.alarm(now) if alarm else incidents.disarmed(now)

        assert len(incidents.false) <= 50
        assert incidents.rate is None or 0 <= incidents.rate <= 1
