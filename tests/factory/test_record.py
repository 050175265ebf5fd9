"""Records: every attempt is kept, whatever kills it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.errors import CloudFault, StationFault, UnitFault, UserMistake
from factory.record import (
    Limits,
    Measurement,
    NoWatcher,
    Outcome,
    Records,
    RunFacts,
    open_run,
    outcome_of,
    refuse_passed,
)

FACTS = RunFacts("PK-000001", "WO-1", "station", "bench", "picket 1", "ab" * 32, "abc1234")


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    opened = Records(f"sqlite:///{tmp_path}/records.db")
    yield opened
    opened.close()


def test_a_run_that_ends_well_has_passed(records: Records) -> None:
    with open_run(records, FACTS, NoWatcher()) as journal, journal.step("flash") as step:
        step.measure("speed", 2, "MB/s", Limits(low=1))
        step.note("medium", "card")

    (run,) = records.runs("PK-000001")
    assert (run.outcome, run.reason, run.image_sha256, run.code_version) == ("pass", None, "ab" * 32, "abc1234")
    assert run.steps[0].notes == {"medium": "card"}
    assert run.steps[0].measurements == (Measurement("speed", 2, "MB/s", Limits(low=1)),)
    assert records.passed("PK-000001")


def test_all_readings_out_of_limits_are_named(records: Records) -> None:
    with (
        pytest.raises(UnitFault, match=r"heat 97 °C.*rail 4 V"),
        open_run(records, FACTS, NoWatcher()) as journal,
        journal.step("self-test") as step,
    ):
        step.measure("heat", 97, "°C", Limits(high=75))
        step.measure("good", 1, "", Limits())
        step.measure("rail", 4, "V", Limits(4.8, 5.2))

    (run,) = records.runs("PK-000001")
    assert run.outcome == "fail"
    assert [m.ok for m in run.steps[0].measurements] == [False, True, False]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UnitFault("bad"), Outcome.FAIL),
        (StationFault("bad"), Outcome.ERROR),
        (CloudFault("bad"), Outcome.ERROR),
        (RuntimeError("a defect of ours"), Outcome.ERROR),
        (KeyboardInterrupt(), Outcome.ABORTED),
    ],
)
def test_an_error_is_recorded_by_whose_fault_it_is(records: Records, error: BaseException, outcome: Outcome) -> None:
    with (
        pytest.raises(type(error)),
        open_run(records, FACTS, NoWatcher()) as journal,
        journal.step("boot"),
    ):
        raise error

    (run,) = records.runs("PK-000001")
    assert (run.outcome, run.steps[0].outcome) == (outcome, outcome)
    assert outcome_of(error) is outcome


def test_every_attempt_is_kept(records: Records) -> None:
    with pytest.raises(UnitFault), open_run(records, FACTS, NoWatcher()):
        raise UnitFault("no banner", advice="look")
    with open_run(records, FACTS, NoWatcher()):
        pass

    assert [run.outcome for run in records.runs("PK-000001")] == ["fail", "pass"]
    assert records.runs("PK-000001")[0].advice == "look"


def test_a_passed_unit_is_refused(records: Records) -> None:
    with open_run(records, FACTS, NoWatcher()):
        pass

    with pytest.raises(UserMistake, match="already passed"):
        refuse_passed(records, "PK-000001")


def test_a_board_is_made_into_one_unit(records: Records) -> None:
    with open_run(records, FACTS, NoWatcher()):
        records.bind_board("PK-000001", "1000")

    assert records.unit_of_board("1000") == "PK-000001"
    assert records.board_of("PK-000001") == "1000"
    assert records.unit_of_board("2000") is None


def test_records_that_cannot_be_opened_are_the_stations_fault() -> None:
    with pytest.raises(StationFault, match="cannot be opened"):
        Records("sqlite:////nowhere/records.db")
    with pytest.raises(StationFault, match="cannot be opened"):
        Records("no url")


KILLED = """
import os, signal, sys
from factory.record import *
records = Records(sys.argv[1])
facts = RunFacts("PK-000001", "WO-1", "station", "bench", "picket 1", "ab" * 32, "abc1234")
with open_run(records, facts, NoWatcher()) as journal:
    with journal.step("flash") as step:
        step.note("medium", "card")
    with journal.step("boot") as step:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_station_loses_no_more_than_the_step_in_hand(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/records.db"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, url], check=False, env=os.environ | {"PYTHONPATH": str(Path.cwd())}
    )
    assert killed.returncode == -signal.SIGKILL

    records = Records(url)
    with open_run(records, FACTS, NoWatcher()):
        pass

    first, second = records.runs("PK-000001")
    records.close()
    assert (first.outcome, first.reason) == ("aborted", "the station stopped in step boot")
    assert [(step.name, step.outcome) for step in first.steps] == [("flash", "pass"), ("boot", "aborted")]
    assert first.steps[0].notes == {"medium": "card"}
    assert second.outcome == "pass"


@given(st.one_of(st.none(), st.floats(-10, 10)), st.one_of(st.none(), st.floats(-10, 10)), st.floats(-20, 20))
def test_limits_hold_what_lies_between_them(low: float | None, high: float | None, value: float) -> None:
    assert (value in Limits(low, high)) == (
        not (low is not None and value < low) and not (high is not None and value > high)
    )
