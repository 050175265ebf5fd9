"""Who wins when the unit and the phone disagree, and that doubt means armed."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_agent import arming
from firmware_agent.arming import Arming, ArmingStore, Wanted
from firmware_agent.board import ClockReading

NTP = ClockReading(1000.0, "ntp")
GUESS = ClockReading(1000.0, "estimated")


def test_a_unit_without_a_record_is_armed(tmp_path: Path) -> None:
    assert arming.load(tmp_path / "arming.json") == Arming(armed=True, by="default")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"armed": false}',
        b'{"format": 2, "armed": false}',
        b"\xff",
        b'{"format":1,"armed":0}',
    ],
)
def test_a_damaged_record_means_armed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "arming.json").write_bytes(content)

    assert arming.load(tmp_path / "arming.json").armed


ARMINGS = st.builds(
    Arming,
    armed=st.booleans(),
    by=st.text(max_size=20),
    at=st.none() | st.floats(0, 4e9),
    quality=st.sampled_from(["ntp", "rtc", "estimated"]),
    pending=st.booleans(),
    cloud_at=st.integers(0, 4_000_000_000).map(float),
    version=st.integers(0, 1_000_000),
)
WISHES = st.builds(
    Wanted, armed=st.booleans(), at=st.integers(1, 4_000_000_000).map(float), version=st.integers(1, 1_000_000)
)


@settings(deadline=None, max_examples=50)  # it writes files
@given(ARMINGS)
def test_what_is_kept_comes_back(tmp_path_factory: pytest.TempPathFactory, one: Arming) -> None:
    path = tmp_path_factory.mktemp("arming") / "arming.json"
    arming.save(path, one)

    assert arming.load(path) == one


@settings(deadline=None, max_examples=50)  # it writes files
@given(st.binary(max_size=200))
def test_no_content_of_the_file_stops_the_unit(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("arming") / "arming.json"
    path.write_bytes(content)

    assert arming.load(path).armed


@given(ARMINGS, WISHES)
def test_the_same_wish_twice_changes_nothing_more(one: Arming, wish: Wanted) -> None:
    once = arming.decide_by_cloud(one, wish)

    assert arming.decide_by_cloud(once, wish) == once


@given(ARMINGS, WISHES)
def test_arming_here_is_never_undone_by_a_cloud_that_has_not_seen_it(one: Arming, wish: Wanted) -> None:
    here = arming.decide_here(one, armed=True, by="keypad", clock=NTP)

    assert arming.decide_by_cloud(here, wish).armed


@given(ARMINGS, WISHES)
def test_a_wish_that_is_not_followed_stays_to_be_answered(one: Arming, wish: Wanted) -> None:
    after = arming.decide_by_cloud(one, wish)

    assert after.armed == wish.armed or after.pending


def test_the_cloud_decides_when_nobody_did_here() -> None:
    after = arming.decide_by_cloud(Arming(), Wanted(armed=False, at=500.0, version=7))

    assert (after.armed, after.by, after.at, after.version, after.pending) == (False, "cloud", 500.0, 7, False)


@pytest.mark.parametrize(
    ("clock", "cloud_at", "armed"),
    [
        (NTP, 900.0, False),  # disarmed here after it was armed on the phone
        (NTP, 1100.0, True),  # ... before
        (GUESS, 900.0, True),  # nobody knows: rather armed
    ],
)
def test_disarming_here_wins_only_if_it_was_later(clock: ClockReading, cloud_at: float, armed: bool) -> None:
    here = arming.decide_here(Arming(cloud_at=100.0), armed=False, by="keypad", clock=clock)

    after = arming.decide_by_cloud(here, Wanted(armed=True, at=cloud_at, version=9))

    assert (after.armed, after.pending) == (armed, not armed)


def test_disarming_here_wins_over_a_wish_that_was_known_before_whatever_the_clock() -> None:
    known = arming.decide_by_cloud(Arming(), Wanted(armed=True, at=5000.0, version=9))
    here = arming.decide_here(known, armed=False, by="keypad", clock=GUESS)

    after = arming.decide_by_cloud(here, Wanted(armed=True, at=5000.0, version=10))

    assert (after.armed, after.pending) == (False, True)


def test_a_decision_survives_a_restart(tmp_path: Path) -> None:
    changes: list[bool] = []
    store = ArmingStore(tmp_path / "a", lambda now: changes.append(now.armed))
    store.here(armed=False, by="keypad", clock=NTP)
    store.here(armed=False, by="keypad", clock=NTP)

    again = ArmingStore(tmp_path / "a").now

    assert (again.armed, again.by, again.pending) == (False, "keypad", True)
    assert changes == [False]


def test_what_was_decided_while_the_cloud_was_told_is_still_to_be_told(tmp_path: Path) -> None:
    store = ArmingStore(tmp_path / "a")
    first = store.here(armed=False, by="keypad", clock=ClockReading(1.0, "ntp"))
    store.here(armed=True, by="keypad", clock=ClockReading(2.0, "ntp"))

    store.told(first, at=3.0, version=4)

    assert store.now.pending
    store.told(store.now, at=4.0, version=5)
    assert not store.now.pending


def test_arming_that_cannot_be_kept_leaves_no_record_that_disarms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a"
    store = ArmingStore(path)
    store.here(armed=False, by="keypad", clock=NTP)
    assert json.loads(path.read_bytes())["armed"] is False

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("firmware_agent.files.write_atomic", full)
    store.here(armed=True, by="keypad", clock=NTP)

    assert store.now.armed
    assert ArmingStore(path).now.armed
    assert "cannot be kept" in caplog.text
