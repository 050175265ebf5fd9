"""Whole units through the line, and what an alarm takes from the sensor to the owner's phone."""

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from bench import boards
from bench.bare import BareDevice, alarm, connected
from bench.clock import alternating, median, parts, seconds, spread
from bench.figures import Place, Reading
from bench.shop import Shop, open_shop
from bench.tools import ROOT, built_image, need
from cloud.local import launcher
from factory.record import RunView
from factory.self_test import BASELINE_SECONDS
from firmware_agent.topics import ALARM, data_topic

UNITS = 5
ALARMS = 20

#: The one that `make image` puts on the image.
FACTORY_KEY = ROOT / "build/keys/factory"

_ZONE = "America/New_York"
_UNIT_PHONE, _BARE_PHONE = "+15555550101", "+15555550102"  # 555-0100 to 555-0199 are kept for fiction
_SMS_SECONDS = 10.0
_BACK_SECONDS = 300.0
#: Between two questions to the cloud, which is on this machine and would take the board's time.
_LOOK_SECONDS = 1.0
#: The sensor's hold time and the blind time after it (factory/drivers/pir.py), with some room.
_WAVE_EVERY_SECONDS = 1.2


class NotBackError(Exception):
    """A unit that was powered is not heard of."""


class NoSmsError(Exception):
    """No text message came."""


def simulated(place: Place) -> Reading:
    """Units on the simulated board, against the waits that no line can avoid.

    Those are: just-in-time provisioning as a bare device meets it, which tries again all the time; the PIR's quiet
    baseline; the PIR's hold time, as the unit measured it.
    """
    runs: list[RunView] = []
    with open_shop(place.scratch, "simulated") as shop:

        def ours() -> float:
            place.say(f"unit {len(runs) + 1} of {UNITS}")
            took, run = _make(shop, f"PK-B{len(runs) + 1:05}")
            runs.append(run)
            return took

        def peer() -> float:
            joining = seconds(lambda: _join(shop.bare_device(f"PK-C{len(runs):05}")))
            return joining + BASELINE_SECONDS + _measured(runs[-1], "pir_hold_s")

        mine, theirs = alternating(UNITS, ours, peer)
    note = f"{spread(mine)} in {UNITS} units against {spread(theirs)}; medians: {parts(_steps(runs), least=0.1)}"
    return Reading(median(mine), median(theirs), note)


def virtual(place: Place) -> Reading:
    """A unit on the virtual Pi, against two boots of the same image: it boots once as a blank and once as a product."""
    need(*boards.TOOLS)
    image, _, _ = built_image(place.image)
    with open_shop(place.scratch, "virtual", image=place.image.absolute(), key=FACTORY_KEY) as shop:
        place.say("a unit on the virtual Pi")
        took, run = _make(shop, "PK-B00001")
    place.say("two boots")
    first, second = boards.boot_twice(place.scratch / "twice", FACTORY_KEY, image)
    note = f"{parts(_steps([run]), least=1.0)}; boots {first:.1f} and {second:.1f}"
    return Reading(took, first + second, note)


def ready(place: Place) -> Reading:
    """A sealed unit from power-on until its cloud hears from its agent, against a blank one to its banner."""
    need(*boards.TOOLS)
    image, _, _ = built_image(place.image)
    with open_shop(place.scratch, "virtual", image=place.image.absolute(), key=FACTORY_KEY) as shop:
        place.say("a unit on the virtual Pi")
        with shop.unit("PK-B00001") as (opened, _):

            def ours() -> float:
                place.say("power-on to the cloud")
                before = _boot_id(shop, "PK-B00001")
                opened.bench.power.off()
                since = datetime.now(UTC)
                opened.bench.power.on()
                return (_heard(shop, "PK-B00001", before) - since).total_seconds()

            mine = [ours() for _ in range(boards.ROUNDS)]
    place.say("two boots to the banner")
    first, second = boards.boot_twice(place.scratch / "twice", FACTORY_KEY, image)
    return Reading(median(mine), second, f"{spread(mine)}; banners after {first:.1f} and {second:.1f}")


def _boot_id(shop: Shop, serial: str) -> str | None:
    device = shop.registry.device(serial)
    return device.boot_id if device is not None else None


def _heard(shop: Shop, serial: str, before: str | None) -> datetime:
    """When a unit spoke in another boot than `before`, by the cloud's own stamp: this machine's clock.

    Raises:
        NotBackError: it does not.
    """
    end = time.monotonic() + _BACK_SECONDS
    while (device := shop.registry.device(serial)) is None or device.boot_id == before:
        if time.monotonic() > end:
            raise NotBackError(f"{serial} does not connect within {_BACK_SECONDS:.0f} s of its power-on")
        time.sleep(_LOOK_SECONDS)
    return device.last_seen


def edge_to_sms(place: Place) -> Reading:
    """From the PIR's edge to the text message in the outbox, against a bare device that publishes the same payload."""
    with open_shop(place.scratch, "simulated") as shop:
        bare = shop.bare_device("PK-C00001")
        shop.registry.owner("PK-B00001", _UNIT_PHONE, _ZONE)
        shop.registry.owner(bare.serial, _BARE_PHONE, _ZONE)
        with shop.unit("PK-B00001") as (opened, _), connected(bare) as link:
            topic, rounds = data_topic(bare.serial, ALARM), iter(range(1, ALARMS + 2))

            def ours() -> float:
                since = datetime.now(UTC)
                opened.bench.stimulus.wave()
                return _until_sms(shop, _UNIT_PHONE, since)

            def peer() -> float:
                number = next(rounds)
                place.say(f"alarm {number} of {ALARMS}")
                payload, since = alarm(number), datetime.now(UTC)
                link.publish(topic, payload)
                took = _until_sms(shop, _BARE_PHONE, since)
                time.sleep(max(0.0, _WAVE_EVERY_SECONDS - took))
                return took

            _wake(shop, opened.bench.stimulus.wave)
            mine, theirs = alternating(ALARMS, ours, peer)
    note = f"worst {max(mine):.3f} of {ALARMS}, which is what the target is held against; bare worst {max(theirs):.3f}"
    return Reading(median(mine), median(theirs), note, judged=max(mine))


def _make(shop: Shop, serial: str) -> tuple[float, RunView]:
    """How long a unit takes from the command's checks to its record, without Python's own start."""
    began = time.monotonic()
    with shop.unit(serial) as (_, run):
        return time.monotonic() - began, run


def _join(device: BareDevice) -> None:
    with connected(device):
        pass


def _measured(run: RunView, name: str) -> float:
    return next(one.value for step in run.steps for one in step.measurements if one.name == name)


def _steps(runs: Iterable[RunView]) -> dict[str, float]:
    """The median of each step."""
    times: dict[str, list[float]] = {}
    for run in runs:
        for step in run.steps:
            times.setdefault(step.name, []).append(step.seconds or 0.0)
    return {name: median(values) for name, values in times.items()}


def _wake(shop: Shop, wave: Callable[[], None]) -> None:
    """Wave until the first text message comes: the agent does not trust a PIR that has just got its supply.

    Raises:
        NoSmsError: none came.
    """
    for _ in range(10):
        since = datetime.now(UTC)
        wave()
        time.sleep(_WAVE_EVERY_SECONDS)
        if any(message.to == _UNIT_PHONE for message in launcher.sms(shop.cloud, since)):
            return
    raise NoSmsError("the unit raises no alarm")


def _until_sms(shop: Shop, phone: str, since: datetime) -> float:
    """Seconds from `since` to the text message, by the outbox's own stamp: this machine's clock, as `since` is.

    Raises:
        NoSmsError: none came.
    """
    deadline = time.monotonic() + _SMS_SECONDS
    while time.monotonic() < deadline:
        for message in launcher.sms(shop.cloud, since):
            if message.to == phone:
                return (message.at - since).total_seconds()
        time.sleep(0.02)
    raise NoSmsError(f"no text message within {_SMS_SECONDS:.0f} s")
