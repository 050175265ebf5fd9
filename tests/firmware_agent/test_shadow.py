"""The unit and its shadows come to the same, whoever changed what and in whatever order it is heard of."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from firmware_agent import shadow, tuning
from firmware_agent.arming import ArmingStore
from firmware_agent.board import ClockReading
from firmware_agent.shadow import AlarmTwin, Document, SettingsTwin, Shadows, difference, judge
from firmware_agent.tuning import Tuning
from tests.firmware_agent.linking import Running, permit
from tests.firmware_agent.shadow_service import LIMIT, ShadowService, _merge
from tests.firmware_agent.support import SERIAL, Broker, Ca, Unit, wait_for

DEFAULTS = Tuning()


@dataclass
class Whole:
    """A unit's shadows, its link, a broker and the cloud's service."""

    running: Running
    service: ShadowService
    shadows: Shadows
    store: ArmingStore
    alarm: AlarmTwin
    tuning: list[Tuning]
    broker: Broker

    def reported(self, name: str = "alarm") -> dict[str, Any]:
        return self.service.reported(SERIAL, name)

    def desire(self, name: str = "alarm", **desired: Any) -> int:
        """As the owner's app does."""
        return self.service.desire(SERIAL, name, **desired)

    def here(self, armed: bool, at: float = 2e9, quality: Any = "ntp") -> None:
        self.store.here(armed=armed, by="keypad", clock=ClockReading(at, quality))
        self.shadows.changed()

    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.service.requests]


Begin = Callable[[], Whole]


@pytest.fixture
def begin(unit: Unit, ca: Ca, broker: Broker) -> Iterator[Begin]:
    """Starts the unit's side; the cloud's side is there before."""
    permit(broker)
    broker.start()
    service = ShadowService(ca, broker)
    service.start()
    with ExitStack() as opened:
        opened.callback(service.stop)

        def start() -> Whole:
            running = opened.enter_context(Running.of(unit, ca, broker.port))
            paths = unit.settings.paths
            store = ArmingStore(paths.arming)
            now = [tuning.load(paths.tuning, DEFAULTS)]

            def apply(new: Tuning) -> None:
                tuning.save(paths.tuning, new, DEFAULTS)
                now.append(new)

            alarm = AlarmTwin(store)
            settings = SettingsTwin(paths.shadows, lambda: now[-1], DEFAULTS, apply)
            shadows = Shadows(running.link, alarm, settings)
            stop = threading.Event()
            thread = threading.Thread(target=shadows.run, args=(stop,))
            thread.start()
            opened.callback(thread.join)
            opened.callback(shadows.changed)
            opened.callback(stop.set)
            return Whole(running, service, shadows, store, alarm, now, broker)

        yield start


# --- the alarm ----------------------------------------------------------------------------------------------------


def test_a_unit_without_a_shadow_makes_one_and_is_armed(begin: Begin) -> None:
    whole = begin()

    wait_for(lambda: whole.reported().get("armed") is True)
    wait_for(lambda: whole.reported("settings").get("sensitivity") == "normal")
    assert whole.service.desired(SERIAL, "alarm") == {}
    assert whole.reported("settings")["quiet_seconds"] == DEFAULTS.quiet_seconds


def test_the_owner_disarms_from_afar_and_it_survives_a_restart(begin: Begin, unit: Unit) -> None:
    whole = begin()
    wait_for(lambda: whole.reported().get("armed") is True)

    whole.desire(armed=False)

    wait_for(lambda: whole.reported().get("armed") is False)
    assert whole.reported()["armed_by"] == "cloud"
    assert not ArmingStore(unit.settings.paths.arming).now.armed


def test_a_wish_made_while_the_unit_was_away_is_followed_at_the_next_connect(begin: Begin, ca: Ca) -> None:
    whole = begin()
    wait_for(lambda: whole.reported().get("armed") is True)
    whole.service.stop()
    whole.broker.stop()
    wait_for(lambda: not whole.running.link.connected())
    whole.service.desire(SERIAL, "alarm", armed=False)
    whole.broker.start()
    again = ShadowService(ca, whole.broker)
    again._shadows = whole.service._shadows
    again.start()

    wait_for(lambda: again.reported(SERIAL, "alarm").get("armed") is False)
    wait_for(lambda: not whole.shadows.busy)
    again.stop()
    whole.service._stopped = again._stopped
    whole.service._client = again._client


def test_arming_at_the_unit_is_written_as_a_wish_with_its_version(begin: Begin) -> None:
    whole = begin()
    wait_for(lambda: whole.reported().get("armed") is True)
    whole.desire(armed=False)
    wait_for(lambda: whole.reported().get("armed") is False)

    whole.here(armed=True)

    wait_for(lambda: whole.service.desired(SERIAL, "alarm") == {"armed": True})
    wait_for(lambda: not whole.store.now.pending)
    body = next(body for verb, body in reversed(whole.service.requests) if verb == "update")
    assert body["state"]["desired"] == {"armed": True}
    assert body["state"]["reported"] == {"armed": True, "armed_by": "keypad", "armed_at": "2033-05-18T03:33:20.000Z"}
    assert isinstance(body["version"], int)
    assert whole.store.now.version == whole.service.version(SERIAL, "alarm")


def test_a_conflict_is_resolved_by_looking_again_and_arming_here_wins(begin: Begin) -> None:
    whole = begin()
    wait_for(lambda: whole.reported().get("armed") is True)
    whole.desire(armed=False)
    wait_for(lambda: whole.reported().get("armed") is False)
    wait_for(lambda: whole.store.now.version > 0)
    # Twice somebody is faster than the unit.
    whole.service.before_update += [lambda: whole.desire(armed=False, note=1)]
    whole.service.before_update += [lambda: whole.desire(armed=False, note=2)]

    whole.here(armed=True)

    wait_for(lambda: whole.service.desired(SERIAL, "alarm").get("armed") is True)
    wait_for(lambda: whole.reported().get("armed") is True)
    wait_for(lambda: not whole.store.now.pending)


def test_disarming_here_gives_way_to_arming_from_afar_that_came_later(begin: Begin) -> None:
    whole = begin()
    wait_for(lambda: whole.reported().get("armed") is True)
    whole.service.before_update.append(lambda: whole.desire(armed=True))

    whole.here(armed=False, at=1.0)

    wait_for(lambda: whole.service.desired(SERIAL, "alarm") == {"armed": True})
    wait_for(lambda: not whole.store.now.pending)
    assert whole.store.now.armed


def test_an_alarm_is_told_and_stays_told_over_a_restart(begin: Begin) -> None:
    whole = begin()
    wait_for(lambda: whole.reported().get("armed") is True)
    whole.alarm.alarm(kind="motion", event_id="e-1", at=0.0, quality="estimated")
    whole.shadows.changed()

    last = {"kind": "motion", "event_id": "e-1", "at": "1970-01-01T00:00:00.000Z", "quality": "estimated"}
    wait_for(lambda: whole.reported().get("last_alarm") == last)
    restarted = AlarmTwin(whole.store)
    restarted.take(Document(1, {}, whole.reported(), {}))
    assert restarted.reported(brief=False)["last_alarm"] == last


def test_late_and_repeated_bells_cost_nothing(begin: Begin) -> None:
    whole = begin()
    wait_for(lambda: whole.reported().get("armed") is True)
    version = whole.desire(armed=False)
    wait_for(lambda: whole.reported().get("armed") is False)
    wait_for(lambda: whole.reported("settings") != {})
    seen = len(whole.service.requests)

    for late in range(1, version + 1):
        whole.service.ring(SERIAL, "alarm", late, {"armed": True})
    whole.desire("settings", quiet_seconds=33)  # comes after them

    wait_for(lambda: whole.reported("settings")["quiet_seconds"] == 33)
    assert not whole.store.now.armed
    assert [body for verb, body in whole.service.requests[seen:] if verb == "update" and "armed" in str(body)] == []
    assert whole.verbs()[seen:].count("get") == 1


def test_a_shadow_that_was_deleted_and_made_anew_is_followed_though_its_versions_start_again(begin: Begin) -> None:
    whole = begin()
    for armed in (False, True, False):
        whole.desire(armed=armed)
        wait_for(lambda armed=armed: whole.reported().get("armed") is armed)  # type: ignore[misc]
    whole.service.delete(SERIAL, "alarm")
    whole.desire(armed=True)
    whole.shadows._on_connect()

    wait_for(lambda: whole.store.now.armed)
    wait_for(lambda: whole.reported().get("armed") is True)


@pytest.mark.parametrize("wish", ["yes", 0, 1, {"now": True}, [True]])
def test_a_wish_that_makes_no_sense_is_answered_and_not_followed(begin: Begin, wish: Any) -> None:
    whole = begin()
    whole.desire(armed=wish)

    wait_for(lambda: whole.reported().get("rejected") == {"armed": "must be true or false"})
    assert whole.store.now.armed
    whole.desire(armed=False)
    wait_for(lambda: whole.reported().get("armed") is False)
    wait_for(lambda: "rejected" not in whole.reported())


# --- the settings -------------------------------------------------------------------------------------------------


def test_good_settings_are_taken_and_bad_ones_answered_one_by_one(begin: Begin, unit: Unit) -> None:
    whole = begin()
    whole.desire("settings", sensitivity="high", quiet_seconds=-1, colour="red")

    wait_for(lambda: set(whole.reported("settings").get("rejected", {})) == {"quiet_seconds", "colour"})
    reported = whole.reported("settings")
    assert (reported["sensitivity"], reported["quiet_seconds"]) == ("high", DEFAULTS.quiet_seconds)
    assert "a number from 0 to 3600" in reported["rejected"]["quiet_seconds"]
    assert tuning.load(unit.settings.paths.tuning, DEFAULTS).sensitivity == "high"

    whole.desire("settings", quiet_seconds=None, colour=None)
    wait_for(lambda: "rejected" not in whole.reported("settings"))


def test_a_wish_is_taken_once_so_that_what_a_job_configured_later_stays(begin: Begin) -> None:
    whole = begin()
    whole.desire("settings", quiet_seconds=33)
    wait_for(lambda: whole.reported("settings").get("quiet_seconds") == 33)
    whole.tuning.append(Tuning(quiet_seconds=44))  # a `configure` job

    whole.shadows._on_connect()

    wait_for(lambda: whole.reported("settings")["quiet_seconds"] == 44)
    whole.desire("settings", quiet_seconds=55)
    wait_for(lambda: whole.reported("settings")["quiet_seconds"] == 55)


def test_a_disk_that_takes_no_settings_is_told(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    whole = begin()
    wait_for(lambda: whole.reported("settings") != {})
    monkeypatch.setattr("firmware_agent.files.write_atomic", full)
    whole.desire("settings", quiet_seconds=33)

    wait_for(lambda: "No space left" in whole.reported("settings").get("rejected", {}).get("settings", ""))


def test_a_cloud_that_has_no_room_is_told_the_short_form(begin: Begin) -> None:
    whole = begin()
    whole.desire(**{f"junk-{number}": "x" * 990 for number in range(8)})

    wait_for(lambda: whole.reported().get("armed") is True)
    assert "rejected" not in whole.reported()


def test_a_cloud_that_refuses_is_named_and_asked_again(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firmware_agent.backoff.delay", lambda _: 0.05)
    whole = begin()
    wait_for(lambda: whole.reported().get("armed") is True)
    whole.service.refuse += [("get", 500), ("update", 429)]

    whole.desire(armed=False)

    wait_for(lambda: whole.reported().get("armed") is False)
    wait_for(lambda: not whole.shadows.faults)
    assert whole.service.refuse == []


# --- pure parts ---------------------------------------------------------------------------------------------------

LEAVES = st.booleans() | st.integers(-5, 5) | st.text("ab", max_size=2)
TREES = st.recursive(
    LEAVES, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3), max_leaves=6
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


@given(OBJECTS, OBJECTS)
@example({"a": {"b": False}}, {"a": {"b": 0}})
def test_a_difference_makes_the_one_into_the_other_as_the_cloud_merges(known: Any, new: Any) -> None:
    merged = json.loads(json.dumps(known))
    metadata: dict[str, Any] = {}
    _merge(merged, _stamped(known, metadata), difference(known, new), 1)

    assert merged == new
    assert (difference(known, new) == {}) == (json.dumps(known, sort_keys=True) == json.dumps(new, sort_keys=True))


def _stamped(tree: Any, into: dict[str, Any]) -> dict[str, Any]:
    for key, value in tree.items():
        into[key] = _stamped(value, {}) if isinstance(value, dict) else {"timestamp": 0}
    return into


JSON = st.recursive(
    st.none() | LEAVES | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from(["state", "metadata", "version", "desired"]),
        st.dictionaries(st.sampled_from(["desired", "reported"]), JSON) | JSON,
    )
)
def test_any_answer_is_a_document_or_is_refused(answer: Any) -> None:
    try:
        document = shadow.parse(answer)
    except ValueError:
        return
    assert isinstance(document.version, int)
    judge(document.desired, DEFAULTS)


@settings(deadline=None, max_examples=50)  # it writes files
@given(st.dictionaries(st.text(min_size=1, max_size=300), JSON, max_size=60))
def test_what_is_reported_leaves_room_whatever_is_desired(
    tmp_path_factory: pytest.TempPathFactory, desired: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("shadow")
    settings = SettingsTwin(folder / "s", lambda: DEFAULTS, DEFAULTS, lambda _: None)
    alarm = AlarmTwin(ArmingStore(folder / "a"))
    for twin in (settings, alarm):
        twin.take(Document(1, desired, {}, {}))

        assert len(json.dumps(twin.reported(brief=False)).encode()) < LIMIT / 2
        assert len(json.dumps(twin.reported(brief=True)).encode()) < 1024


@given(st.binary(max_size=60))
def test_no_bell_can_do_harm(payload: bytes) -> None:
    assert shadow._rung(payload) is None or isinstance(shadow._rung(payload), int)
