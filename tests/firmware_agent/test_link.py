"""The link: who is refused waits, alarms go on; answers find who asked; the spool is drained in order and fast."""

import json
import logging
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_agent import topics
from firmware_agent.backoff import Pace
from firmware_agent.link import NotAllowedError, NotDeliveredError, Refused
from firmware_agent.link import _Arrivals as Arrivals
from firmware_agent.quarantine import Operation, Quarantine
from tests.firmware_agent.linking import Running, permit
from tests.firmware_agent.strict_broker import StrictBroker, Verdict
from tests.firmware_agent.support import SERIAL, Broker, Ca, Unit, wait_for

JOBS = f"$aws/things/{SERIAL}/jobs"


@pytest.fixture
def strict(ca: Ca, tmp_path: Path) -> Iterator[StrictBroker]:
    broker = StrictBroker(ca, tmp_path / "strict")
    yield broker
    broker.close()


def ignore(_topic: str, _payload: bytes) -> None:
    """A listener for what does not matter."""


def sequences(strict: StrictBroker) -> list[int]:
    return [body["sequence"] for topic, body in strict.published if topic.endswith("/alarm")]


# --- what outlives a connection -----------------------------------------------------------------------------------


def test_subscriptions_are_made_again_and_everybody_is_told_after_them(unit: Unit, ca: Ca, broker: Broker) -> None:
    permit(broker)
    broker.start()
    got: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    connects: list[int] = []
    with Running.of(unit, ca, broker.port) as running:
        running.link.subscribe("jobs", [f"{JOBS}/notify-next"], lambda _, payload: got.put(payload))
        running.link.on_connect(lambda: connects.append(1))
        wait_for(lambda: len(connects) == 1)
        running.link.publish(f"{JOBS}/notify-next", b"1").result(10)
        assert got.get(timeout=10) == b"1"
        assert running.link.status().state == "connected"

        broker.stop()
        wait_for(lambda: running.link.status().state != "connected")
        assert not running.link.connected()
        broker.start()

        wait_for(lambda: len(connects) == 2)
        running.link.publish(f"{JOBS}/notify-next", b"2").result(10)
        assert got.get(timeout=10) == b"2"


def test_who_subscribes_or_listens_late_is_served_at_once(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    with Running.of(unit, ca, strict.port) as running:
        running.wait_connected()
        told = threading.Event()
        got: queue.SimpleQueue[str] = queue.SimpleQueue()
        running.link.on_connect(told.set)
        assert told.wait(10)
        told.clear()
        running.link.subscribe("jobs", [f"{JOBS}/+/x"], lambda topic, _: got.put(topic))
        assert told.wait(10)

        strict.say(f"{JOBS}/1/x", b"")
        assert got.get(timeout=10) == f"{JOBS}/1/x"


def test_at_most_eight_filters_are_asked_for_at_once(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    with Running.of(unit, ca, strict.port) as running:
        running.link.subscribe("jobs", [f"{JOBS}/{number}" for number in range(20)], ignore)

        wait_for(lambda: len(strict.subscribed) == 20)


# --- questions ----------------------------------------------------------------------------------------------------


def answering(strict: StrictBroker, answer: Any) -> None:
    """The cloud's side of a request: `answer` makes the messages, from topic and body."""

    def react(topic: str, body: dict[str, Any]) -> None:
        if topic.startswith("$aws"):
            for suffix, reply in answer(topic, body):
                strict.say(topic + suffix, reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    strict.react = react


def test_an_answer_finds_who_asked(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    answering(strict, lambda topic, body: [("/accepted", {"echo": body["n"], "clientToken": body["clientToken"]})])
    with Running.of(unit, ca, strict.port) as running:
        running.wait_connected()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: running.link.ask(f"{JOBS}/{n % 3}/get", {"n": n}), range(24)))

    assert [answer["echo"] for answer in answers] == list(range(24))


def test_a_rejection_is_raised_with_its_code(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    answering(
        strict,
        lambda _, body: [
            ("/rejected", {"code": 409, "message": "Version conflict", "clientToken": body["clientToken"]})
        ],
    )
    with Running.of(unit, ca, strict.port) as running:
        running.wait_connected()
        with pytest.raises(Refused, match="409: Version conflict") as refused:
            running.link.ask(f"{JOBS}/x/get", {})

    assert (refused.value.code, refused.value.body["code"]) == ("409", 409)


def test_others_answers_and_nonsense_are_not_mistaken_for_ones_own(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    answering(
        strict,
        lambda _, body: [
            ("/accepted", b"\xff"),
            ("/accepted", b"[]"),
            ("/accepted", {"mine": False}),
            ("/accepted", {"mine": False, "clientToken": "somebody"}),
            ("/accepted", {"mine": True, "clientToken": body["clientToken"]}),
        ],
    )
    with Running.of(unit, ca, strict.port) as running:
        running.wait_connected()

        assert running.link.ask(f"{JOBS}/x/get", {})["mine"] is True


def test_nobody_waits_longer_than_asked_nor_for_a_link_that_is_gone(
    unit: Unit, ca: Ca, strict: StrictBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Running.of(unit, ca, strict.port) as running:
        with pytest.raises(NotDeliveredError, match="there is no link"):
            running.link.ask(f"{JOBS}/x/get", {})
        running.wait_connected()
        with pytest.raises(NotDeliveredError, match="no answer in time"):
            running.link.ask(f"{JOBS}/x/get", {}, timeout=0.2)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(running.link.ask, f"{JOBS}/x/get", {})
            wait_for(lambda: len([1 for topic, _ in strict.published if "jobs" in topic]) == 2)
            strict.judge = lambda what, topic: "hang up" if topic.endswith("/hang-up") else "fine"
            running.link.publish("a/b/c/hang-up", b"{}")
            with pytest.raises(NotDeliveredError, match="the link went down"):
                asked.result(10)


def test_old_answers_topics_are_let_go_of_but_never_a_features_own(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    answering(strict, lambda _, body: [("/accepted", {"clientToken": body["clientToken"]})])
    with Running.of(unit, ca, strict.port) as running:
        running.link.subscribe("jobs", [f"{JOBS}/0/get/accepted"], ignore)
        wait_for(lambda: strict.subscribed != [])
        for number in range(20):
            running.link.ask(f"{JOBS}/{number}/get", {})

    assert f"{JOBS}/0/get/accepted" not in strict.unsubscribed
    assert f"{JOBS}/0/get/rejected" in strict.unsubscribed
    assert len(set(strict.subscribed) - set(strict.unsubscribed)) == 24 + 1


# --- what the broker refuses --------------------------------------------------------------------------------------


def test_a_refused_subscription_is_put_on_hold_and_alarms_go_on(
    unit: Unit, ca: Ca, strict: StrictBroker, caplog: pytest.LogCaptureFixture
) -> None:
    strict.judge = lambda what, topic: "refuse" if what == "subscribe" and "jobs" in topic else "fine"
    with Running.of(unit, ca, strict.port) as running:
        running.link.subscribe("jobs", [f"{JOBS}/notify-next"], ignore)
        running.link.subscribe("shadow", ["$aws/things/x/shadow/#"], ignore)
        running.alarm(3)

        running.wait_drained()
        wait_for(lambda: strict.subscribed == ["$aws/things/x/shadow/#"])
        held = running.link.status().held
        assert held == {"jobs": f"{JOBS}/notify-next: the broker refused it: NOT_AUTHORIZED"}
        with pytest.raises(NotDeliveredError, match="jobs is on hold"):
            running.link.ask(f"{JOBS}/x/get", {})
        with pytest.raises(NotDeliveredError, match="jobs is on hold"):
            running.link.publish(f"{JOBS}/x/get", b"{}").result()

    assert len(strict.connects) == 1
    assert sequences(strict) == [1, 2, 3]


def test_a_feature_that_the_broker_hangs_up_on_is_left_alone_after_the_second_time(
    unit: Unit, ca: Ca, strict: StrictBroker
) -> None:
    strict.judge = lambda what, topic: "hang up" if what == "subscribe" and "jobs" in topic else "fine"
    with Running.of(unit, ca, strict.port) as running:
        running.link.subscribe("shadow", ["$aws/things/x/shadow/#"], ignore)
        running.link.subscribe("jobs", [f"{JOBS}/notify-next"], ignore)

        wait_for(lambda: "jobs" in running.link.status().held)
        running.wait_connected()
        running.alarm(2)
        running.wait_drained()
        wait_for(lambda: len(strict.subscribed) == 3)  # the shadow's, on each connection
        assert "hangs up" in running.link.status().held["jobs"]
        assert running.link.connected()

    assert len(strict.connects) == 3
    assert sequences(strict) == [1, 2]


def test_a_publish_that_the_broker_hangs_up_on_is_held_though_its_subscription_is_fine(
    unit: Unit, ca: Ca, strict: StrictBroker
) -> None:
    strict.judge = lambda what, topic: "hang up" if what == "publish" and "jobs" in topic else "fine"
    with Running.of(unit, ca, strict.port) as running:
        for _ in range(2):
            running.wait_connected()
            with pytest.raises(NotDeliveredError, match=r"went down|AWS_"):
                running.link.ask(f"{JOBS}/x/get", {})
            wait_for(lambda: not running.link.connected())
        running.wait_connected()

        assert "jobs" in running.link.status().held


def test_a_hold_ends_and_the_feature_works_once_the_policy_is_mended(
    unit: Unit, ca: Ca, strict: StrictBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firmware_agent.quarantine.FIRST_SECONDS", 0.3)
    strict.judge = lambda what, topic: "refuse" if what == "subscribe" else "fine"
    with Running.of(unit, ca, strict.port) as running:
        running.link.subscribe("jobs", [f"{JOBS}/notify-next"], ignore)
        wait_for(lambda: "jobs" in running.link.status().held)
        strict.judge = lambda _, __: "fine"

        wait_for(lambda: strict.subscribed == [f"{JOBS}/notify-next"])
        wait_for(lambda: running.link.status().held == {})


def test_heartbeats_that_are_refused_do_not_hold_up_alarms(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    strict.judge = lambda _, topic: "refuse" if topic.endswith("heartbeat") else "fine"
    with Running.of(unit, ca, strict.port) as running:
        for number in range(300):
            running.spool.heartbeat(json.dumps({"n": number}).encode())
        running.alarm(5)

        wait_for(lambda: sequences(strict) == [1, 2, 3, 4, 5])
        assert "heartbeat" in running.link.status().held
        wait_for(lambda: len(running.spool) == 300)


@pytest.mark.parametrize("verdict", ["refuse", "hang up", "ignore"])
def test_a_refused_hello_does_not_hold_up_alarms(
    unit: Unit, ca: Ca, strict: StrictBroker, monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    monkeypatch.setattr("firmware_agent.mqtt.ACK_SECONDS", 1)
    strict.judge = lambda _, topic: verdict if topic.endswith("hello") else "fine"
    with Running.of(unit, ca, strict.port) as running:
        running.alarm()
        running.wait_drained()


def test_a_refused_alarm_is_kept_and_tried_again(
    unit: Unit, ca: Ca, strict: StrictBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firmware_agent.delivery.RETRY_SECONDS", 0.2)
    refusals: Iterator[Verdict] = iter(["refuse"] * 3)
    strict.judge = lambda _, topic: next(refusals, "fine") if topic.endswith("alarm") else "fine"
    with Running.of(unit, ca, strict.port) as running:
        running.alarm(4)
        running.wait_drained()
        assert running.link.status().held == {}

    assert set(sequences(strict)) == {1, 2, 3, 4}
    assert len(strict.connects) == 1


def test_connects_are_a_second_apart_whatever_happens(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    strict.judge = lambda _, topic: "hang up"
    with Running.of(unit, ca, strict.port) as running:
        end = time.monotonic() + 6
        while time.monotonic() < end and len(strict.connects) < 4:
            running.alarm()  # somebody walks about
            time.sleep(0.1)

    gaps = [later - earlier for earlier, later in zip(strict.connects, strict.connects[1:], strict=False)]
    assert len(gaps) >= 2
    assert min(gaps) > 0.5  # as the broker sees it: a busy machine hears the first of two later than the second


def test_a_broker_that_hangs_up_on_alarms_is_tried_ever_more_rarely(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    strict.judge = lambda _, topic: "hang up" if topic.endswith("alarm") else "fine"
    with Running.of(unit, ca, strict.port) as running:
        running.alarm()
        wait_for(lambda: len(strict.connects) >= 3)
        wait_for(lambda: running.link.status().failures >= 3)

        assert running.link.status().held == {}
        strict.judge = lambda _, __: "fine"
        running.wait_drained()


def test_a_broker_that_is_silent_is_left_for_a_new_connection(
    unit: Unit, ca: Ca, strict: StrictBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firmware_agent.mqtt.ACK_SECONDS", 1)
    monkeypatch.setattr("firmware_agent.delivery.RETRY_SECONDS", 0.2)
    strict.judge = lambda _, topic: "ignore" if topic.endswith("alarm") and len(strict.connects) == 1 else "fine"
    with Running.of(unit, ca, strict.port) as running:
        running.alarm(3)
        running.wait_drained()

    assert len(strict.connects) == 2
    assert sequences(strict) == [1, 2, 3]


# --- what comes in ------------------------------------------------------------------------------------------------


def test_a_flood_is_bounded_and_everybody_then_looks_again(caplog: pytest.LogCaptureFixture) -> None:
    arrivals = Arrivals()

    kept = sum(arrivals.put("t", b"x" * 100_000) for _ in range(50))

    assert kept == 10
    assert [arrivals.get()[2] for _ in range(10)] == [True] + [False] * 9
    kept = sum(arrivals.put("t", b"") for _ in range(1000))
    assert kept == 256


def test_a_listener_hears_only_what_it_asked_for(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    got: queue.SimpleQueue[str] = queue.SimpleQueue()
    with Running.of(unit, ca, strict.port) as running:
        running.link.subscribe("jobs", [f"{JOBS}/notify-next"], lambda topic, _: got.put(topic))
        wait_for(lambda: strict.subscribed != [])
        strict.say("something/else", b"{}")
        strict.say(f"{JOBS}/notify-next", b"{}")

        assert got.get(timeout=10) == f"{JOBS}/notify-next"


# --- the spool ----------------------------------------------------------------------------------------------------


def test_thousands_of_alarms_go_out_in_order(unit: Unit, ca: Ca, broker: Broker) -> None:
    permit(broker)
    count = 3_000
    with Running.of(unit, ca, broker.port) as running:
        began = time.monotonic()
        running.alarm(count)
        spooled = time.monotonic()
        broker.start()
        running.link.wake(urgent=True)
        seen = [broker.next("alarm", 120)["sequence"] for _ in range(count)]
        drained = time.monotonic()
        running.wait_drained()

    logging.getLogger(__name__).info(
        "%d alarms spooled in %.1f s, drained in %.1f s", count, spooled - began, drained - spooled
    )
    assert seen == list(range(1, count + 1))


def test_the_pace_is_kept(unit: Unit, ca: Ca, strict: StrictBroker) -> None:
    with Running.of(unit, ca, strict.port, rate=20.0) as running:
        running.alarm(20)
        running.wait_drained()
        first = time.monotonic()
        running.alarm(20)
        running.wait_drained()

        assert time.monotonic() - first > 0.7  # it can only be slower


@given(st.floats(1, 1000), st.lists(st.floats(0, 0.5), min_size=1, max_size=300))
def test_no_second_has_more_than_the_rate_and_a_burst(rate: float, waits: list[float]) -> None:
    pace, now, sent = Pace(rate), 1000.0, []
    for wait in waits:
        now += wait
        while pace.wait(now) == 0:
            pace.spend(now)
            sent.append(now)

    for start in sent:
        assert len([one for one in sent if start <= one < start + 1.0]) <= rate * 1.1 + 2


# --- pure parts ---------------------------------------------------------------------------------------------------


def test_holds_double_from_a_minute_to_an_hour_and_are_forgotten_after_a_quiet_hour() -> None:
    quarantine, now, lengths = Quarantine(), 0.0, []
    for _ in range(9):
        quarantine.refused("jobs", "no", now)
        quarantine.refused("jobs", "no", now + 1)  # the same trouble, told twice
        length = next(seconds for seconds in range(1, 4000) if quarantine.held("jobs", now + seconds) is None)
        lengths.append(length)
        now += length
    quarantine.refused("jobs", "no", now + 3601)

    assert lengths == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    assert quarantine.held("jobs", now + 3601 + 59) == "no"
    assert quarantine.held("jobs", now + 3601 + 61) is None


def test_one_hang_up_is_chance_and_two_with_a_success_between_are_two_chances() -> None:
    quarantine, one = Quarantine(), Operation("jobs", "t")
    quarantine.hung_up([one], "gone", 0.0)
    quarantine.proved(one)
    quarantine.hung_up([one], "gone", 1.0)
    assert quarantine.all(1.0) == {}

    quarantine.proved(Operation("jobs", "another"))
    quarantine.hung_up([one, Operation("shadow", "t")], "gone", 2.0)
    assert quarantine.all(2.0) == {"jobs": "the broker hangs up on t (gone)"}


@pytest.mark.parametrize(
    ("wanted", "topic", "match"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("#", "$aws/x", False),
        ("+/x", "$aws/x", False),
        ("$aws/#", "$aws/x", True),
        ("a/b/c", "a/b", False),
        ("a", "a/b", False),
    ],
)
def test_filters_match_as_mqtt_says(wanted: str, topic: str, match: bool) -> None:
    assert topics.matches(wanted, topic) is match


def test_a_topic_names_its_feature() -> None:
    assert topics.feature(topics.jobs_topic(SERIAL, "notify")) == "jobs"
    assert topics.feature(topics.shadow_topic(SERIAL, "alarm", "get")) == "shadow"
    assert topics.feature(topics.defender_topic(SERIAL)) == "defender"
    assert topics.feature(topics.data_topic(SERIAL, topics.ALARM)) == "alarm"
    assert topics.feature("other") == "other"


def test_a_refusal_is_also_a_message_not_delivered() -> None:
    assert issubclass(NotAllowedError, NotDeliveredError)
