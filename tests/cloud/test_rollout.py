"""What a rollout decides, without a cloud: rates, aborts, windows, soaking, names, and how it looks."""

import contextlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud import rollout
from cloud.fleet_screen import bar, shares, words
from cloud.local.schedule import parse_window as read_window
from cloud.rollout import (
    Abort,
    Execution,
    Job,
    Kind,
    Operation,
    Plan,
    Rate,
    Ring,
    Status,
    Window,
    choose,
    default_abort,
    default_rate,
    operation_stem,
    parse_duration,
    parse_window,
    soaked,
    summarise,
    update_prefix,
    update_stem,
)

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
DAY = timedelta(hours=24)

executions = st.builds(
    Execution,
    thing=st.sampled_from(["PK-1", "PK-2", "PK-3", "PK-4"]),
    number=st.integers(1, 3),
    status=st.sampled_from(Status),
    updated_at=st.integers(0, 10**6).map(lambda seconds: NOW - timedelta(seconds=seconds)),
    details=st.sampled_from([{}, {"code": "download"}, {"code": "unhealthy", "reason": "the PIR line does not open"}]),
)
rates = st.builds(
    Rate,
    base=st.integers(1, 1000),
    factor=st.integers(11, 50).map(lambda tenths: tenths / 10),
    step=st.integers(1, 1000),
    maximum=st.integers(1, 1000),
)


@given(st.lists(executions, max_size=12), st.sets(st.sampled_from(["PK-1", "PK-2", "PK-3", "PK-4", "PK-5"])))
def test_every_unit_is_counted_once_by_its_newest_attempt(found: list[Execution], members: set[str]) -> None:
    summary = summarise(found, members)

    assert summary.total == len({each.thing for each in found} | members)
    named = [unit for failure in summary.failures for unit in failure.units]
    assert len(named) == len(set(named))
    assert len(named) == sum(summary.counts.get(status, 0) for status in rollout.FAILURES)


def test_failures_are_grouped_by_code_and_the_widest_comes_first() -> None:
    def failed(thing: str, code: str, minutes: int) -> Execution:
        said = {"code": code, "reason": f"{code} {minutes}"}
        return Execution(thing, 1, Status.FAILED, NOW + timedelta(minutes=minutes), said)

    found = [failed("PK-1", "download", 1), failed("PK-2", "unhealthy", 2), failed("PK-3", "unhealthy", 3)]

    failures = summarise(found, ()).failures

    assert [(each.code, each.units, each.reason) for each in failures] == [
        ("unhealthy", ("PK-2", "PK-3"), "unhealthy 3"),
        ("download", ("PK-1",), "download 1"),
    ]


@given(rates, st.integers(0, 5000), st.integers(0, 5000))
def test_a_rate_never_shrinks_with_success_and_never_passes_its_maximum(rate: Rate, one: int, other: int) -> None:
    slow, fast = sorted((rate.per_minute(one), rate.per_minute(other)), key=int)

    assert rate.per_minute(min(one, other)) == slow
    assert rate.per_minute(max(one, other)) == fast
    assert 1 <= fast <= rate.maximum


def test_a_rate_grows_as_awss_own_example() -> None:
    """50 a minute, doubled for each 1000: developerguide/jobs-configurations-details."""
    rate = Rate(base=50, factor=2.0, step=1000, maximum=1000)

    assert [rate.per_minute(done) for done in (0, 999, 1000, 2000, 3000)] == [50, 50, 100, 200, 400]


@given(st.integers(0, 100_000))
def test_the_usual_rate_and_abort_are_ones_that_aws_takes_for_any_fleet(units: int) -> None:
    plan = Plan(default_rate(units), default_abort(Ring.MAIN, units), retries=1, timeout=timedelta(hours=12))

    options = plan.options(NOW)

    exponential = options["jobExecutionsRolloutConfig"]["exponentialRate"]
    assert 1 <= exponential["baseRatePerMinute"] <= options["jobExecutionsRolloutConfig"]["maximumPerMinute"] <= 1000
    assert options["abortConfig"]["criteriaList"][0]["minNumberOfExecutedThings"] <= max(units, 1)


def test_ten_thousand_homes_are_told_within_the_hour_if_all_goes_well() -> None:
    assert default_rate(10_000).minutes(10_000) <= 60


def test_a_canary_ring_stops_at_its_first_failure() -> None:
    criterion = Plan(None, default_abort(Ring.CANARY, 20), 0, DAY).options(NOW)["abortConfig"]["criteriaList"][0]

    assert (criterion["failureType"], criterion["thresholdPercentage"]) == ("ALL", 1.0)
    assert criterion["minNumberOfExecutedThings"] == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rate": Rate(0, 2.0, 1, 10)}, "rate is 1 to 1000"),
        ({"rate": Rate(1, 2.0, 1, 1001)}, "maximal rate is 1 to 1000"),
        ({"rate": Rate(1, 1.55, 1, 10)}, "one digit"),
        ({"abort": Abort(0, 1)}, "1 to 100 percent"),
        ({"timeout": timedelta(seconds=30)}, "1 to 10080"),
        ({"timeout": timedelta(days=8)}, "1 to 10080"),
        ({"retries": 11}, "0 to 10"),
        ({"start": NOW + timedelta(minutes=5)}, "30 minutes"),
    ],
)
def test_a_plan_that_aws_would_refuse_is_refused_before(change: dict[str, Any], complaint: str) -> None:
    good: dict[str, Any] = {"rate": None, "abort": Abort(10, 10), "retries": 1, "timeout": DAY}

    with pytest.raises(ValueError, match=complaint):
        Plan(**{**good, **change}).options(NOW)


@given(
    begin=st.integers(0, 1439),
    minutes=st.integers(1, 1430),
    days=st.sampled_from(["", "Mon-Fri ", "Sat,Sun ", "Fri-Mon "]),
)
def test_a_window_is_read_by_aws_as_the_operator_wrote_it(begin: int, minutes: int, days: str) -> None:
    end = (begin + minutes) % 1440
    text = f"{days}{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
    plan = Plan(None, Abort(10, 10), 0, DAY, windows=(parse_window(text),))

    schedule = plan.options(NOW)["schedulingConfig"]
    read = read_window(schedule["maintenanceWindows"][0])

    assert (read.hour * 60 + read.minute, read.duration) == (begin, timedelta(minutes=minutes))
    assert datetime.fromisoformat(schedule["startTime"]).replace(tzinfo=UTC) - NOW >= timedelta(minutes=30)


@pytest.mark.parametrize("text", ["", "2-5", "02:00", "02:00-02:00", "25:00-26:00", "Foo 02:00-03:00", "02:00-01:55"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"window|times of day|days of the week"):
        parse_window(text)


@pytest.mark.parametrize(
    ("text", "length"), [("0", 0), ("90s", 90), ("30m", 1800), ("24h", 86_400), ("2d", 172_800), (" 1h ", 3600)]
)
def test_a_length_of_time_is_written_as_people_do(text: str, length: int) -> None:
    assert parse_duration(text) == timedelta(seconds=length)


@given(st.text(max_size=8))
def test_any_text_is_a_length_of_time_or_is_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_duration(text) >= timedelta()


def _ran(thing: str, hours: float, status: Status = Status.SUCCEEDED, number: int = 1) -> Execution:
    return Execution(thing, number, status, NOW - timedelta(hours=hours))


@pytest.mark.parametrize(
    ("found", "running", "ready", "sentence"),
    [
        ([], {}, False, "nobody is in the canary ring"),
        ([], {"A": "1.0.0"}, False, "0 of 1 canaries run it"),
        ([_ran("A", 25)], {"A": "1.2.0"}, True, "1 of 1"),
        ([_ran("A", 23)], {"A": "1.2.0"}, False, "soak for 1 h 00 min more"),
        ([_ran("A", 25)], {"A": "1.1.0"}, False, "went away from it and now reports 1.1.0"),
        ([_ran("A", 25)], {"A": ""}, False, "reports nothing"),
        ([_ran("A", 25), _ran("B", 25, Status.FAILED)], {"A": "1.2.0", "B": "1.1.0"}, False, "failed on B"),
        ([_ran("A", 25), _ran("B", 1, Status.QUEUED)], {"A": "1.2.0", "B": "1.1.0"}, True, "1 of 2"),
        ([_ran("A", 25)], {"A": "1.2.0", "B": "", "C": ""}, False, "1 of 3 canaries run it, 2 must"),
        ([_ran("A", 25), _ran("B", 23)], {"A": "1.2.0", "B": "1.2.0"}, True, "2 of 2"),
        ([_ran("A", 30, Status.FAILED), _ran("A", 25, number=2)], {"A": "1.2.0"}, True, "1 of 1"),
        ([_ran("A", 25), _ran("LEFT", 25, Status.FAILED)], {"A": "1.2.0"}, True, "1 of 1"),
    ],
)
def test_a_release_leaves_the_canary_ring_only_when_it_ran_there_well_for_long_enough(
    found: list[Execution], running: Mapping[str, str], ready: bool, sentence: str
) -> None:
    verdict = soaked("1.2.0", found, running, wanted=DAY, now=NOW)

    assert (verdict.ready, sentence in verdict.sentence) == (ready, True), verdict.sentence


@given(st.lists(executions, max_size=12), st.dictionaries(st.sampled_from(["PK-1", "PK-2"]), st.just("1.2.0")))
def test_time_alone_never_makes_a_soaked_release_unready(found: list[Execution], running: dict[str, str]) -> None:
    now = soaked("1.2.0", found, running, wanted=DAY, now=NOW)
    later = soaked("1.2.0", found, running, wanted=DAY, now=NOW + DAY)

    assert later.ready or not now.ready


@given(
    st.dictionaries(st.sampled_from(["1.0.0", "1.1.0", "1.2.0"]), st.integers(1, 5)),
    st.lists(st.sampled_from(["1.0.0", "1.1.0", "1.2.0", "0.9.0", ""])),
)
def test_the_floor_is_the_highest_that_any_unit_runs(listed: dict[str, int], running: list[str]) -> None:
    floor = rollout.floor(listed, running)

    assert all(floor >= listed[version] for version in running if version in listed)
    assert floor == 0 or floor in {listed.get(version) for version in running}


@given(
    st.sampled_from(Ring),
    st.from_regex(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,40}", fullmatch=True),
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.integers(1, 9999),
    st.sampled_from(Kind),
)
def test_a_jobs_name_is_one_that_aws_takes(ring: Ring, version: str, digest: str, number: int, kind: Kind) -> None:
    name = f"{update_stem('picket', ring, version, digest, kind)}-{number}"

    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)
    found = [(each, of) for each in Ring for of in Kind if name.startswith(update_prefix("picket", each, of))]
    assert found == [(ring, kind)]


@given(st.sampled_from(Operation), st.from_regex(r"[A-Z0-9][A-Z0-9-]{2,30}[A-Z0-9]", fullmatch=True))
def test_so_is_an_operations(operation: Operation, serial: str) -> None:
    document = {"tuning": {"quiet_seconds": 60}} if operation is Operation.CONFIGURE else {}
    name, _ = choose(operation_stem("picket", operation, serial, document), [])

    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)


def _job(name: str, status: str) -> Job:
    return Job(name, status, NOW)


def test_the_same_command_twice_is_one_job_until_that_ends() -> None:
    first, none = choose("picket-main-update-1_2_0-abc", [])
    again, found = choose("picket-main-update-1_2_0-abc", [_job(first, "IN_PROGRESS")])
    after, gone = choose("picket-main-update-1_2_0-abc", [_job(first, "CANCELED")])

    assert (first, none) == ("picket-main-update-1_2_0-abc-1", None)
    assert (again, found is not None) == (first, True)
    assert (after, gone) == ("picket-main-update-1_2_0-abc-2", None)


def test_a_job_of_another_target_is_not_taken_for_ours() -> None:
    others = [_job("picket-reboot-PK-1-2", "IN_PROGRESS"), _job("picket-reboot-PK-1-2-x", "IN_PROGRESS")]

    assert choose("picket-reboot-PK", others) == ("picket-reboot-PK-1", None)


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=6), st.integers(6, 80))
def test_a_bar_is_as_wide_as_it_should_be_and_shows_whatever_there_is(counts: list[int], width: int) -> None:
    cells = shares(counts, width)

    assert sum(cells) == width
    assert all(cell >= 1 for cell, count in zip(cells, counts, strict=True) if count)
    if sum(counts):
        assert all(cell == 0 for cell, count in zip(cells, counts, strict=True) if not count)


def test_one_failure_among_thousands_is_seen() -> None:
    found = [Execution(f"PK-{number}", 1, Status.SUCCEEDED, NOW) for number in range(9999)]
    summary = summarise([*found, Execution("PK-X", 1, Status.REJECTED, NOW)], ["PK-WAITS"])

    assert any(str(span.style) == "red" for span in bar(summary).spans)
    assert words(summary) == "9999 done, 1 failed, 1 waiting"


def test_a_window_says_itself() -> None:
    assert parse_window("Mon-Fri 22:30-04:00") == Window(22, 30, 330, "MON-FRI")
