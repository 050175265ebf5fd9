"""What the agent takes of a unit, against a plain program on AWS's SDK that does a part of its work."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from bench.clock import median, seconds
from bench.field import Device, Site, open_site
from bench.figures import Place, Reading
from firmware_agent import messages
from firmware_agent.board import ClockReading
from firmware_agent.settings import Mqtt
from firmware_agent.spool import Spool

EDGES = 200
SPOOLED = 10_000
SETTLE_SECONDS = 10.0
IDLE_SECONDS = 60.0
#: Long enough to hold what comes every five minutes.
LONG_IDLE_SECONDS = 310.0
DAY_SECONDS = 86_400.0


def both(place: Place, measure: Callable[[Site, Device], float]) -> tuple[float, float]:
    """The same measurement of the agent and of the sample, one after the other at one broker."""
    found = []
    with open_site(place.scratch) as site:
        site.settings()
        one: AbstractContextManager[Device]
        for what, one in (("the agent", site.agent()), ("the SDK's sample", site.sample())):
            place.say(what)
            with one as device:
                found.append(measure(site, device))
    return found[0], found[1]


def memory(place: Place) -> Reading:
    """Resident memory, connected, after the first rush."""

    def measure(_: Site, device: Device) -> float:
        time.sleep(SETTLE_SECONDS)
        return device.memory()

    ours, peer = both(place, measure)
    return Reading(ours, peer, "Rss, shared pages included; spool, jobs, shadows and health are in ours only")


def idle_processor(place: Place) -> Reading:
    """Processor time of a connected agent to which nothing happens, in percent of a core."""

    def measure(_: Site, device: Device) -> float:
        time.sleep(SETTLE_SECONDS)
        before = device.processor_seconds()
        time.sleep(IDLE_SECONDS)
        return (device.processor_seconds() - before) / IDLE_SECONDS * 100

    ours, peer = both(place, measure)
    return Reading(ours, max(peer, 1e-3), f"over {IDLE_SECONDS:.0f} s; the kernel counts in ticks of 10 ms")


def edge_to_publish(place: Place) -> Reading:
    """From the edge to its PUBLISH on the wire: the alarm is on the disk by then."""
    spreads, disk = [], []

    def measure(_: Site, device: Device) -> float:
        taken = []
        time.sleep(SETTLE_SECONDS)  # what follows a connection is over, and a sensor that polls has seen the line low
        for _number in range(EDGES):
            taken.append(device.edge_to_wire())
            time.sleep(0.04)
            device.drive(high=False)
            # Longer than a polling sensor looks away, and in no rhythm that it could fall into step with.
            time.sleep(0.15 + 0.003 * (_number % 37))
            disk.append(seconds(lambda: sync(place.scratch / "probe")))
        taken.sort()
        spreads.append(f"median {median(taken) * 1000:.2f}, worst {taken[-1] * 1000:.2f}")
        return taken[int(len(taken) * 0.99)] * 1000

    ours, peer = both(place, measure)
    disk = sorted(disk)
    note = (
        f"p99 of {EDGES} edges; ours: {spreads[0]} ms, one fsync included, which alone takes this disk "
        f"{median(disk) * 1000:.2f}, p99 {disk[int(len(disk) * 0.99)] * 1000:.2f}; MotionSensor: {spreads[1]} ms"
    )
    return Reading(ours, peer, note)


def sync(path: Path) -> None:
    """Write a block and wait until it is durable."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.write(handle, bytes(4096))
        os.fdatasync(handle)
    finally:
        os.close(handle)


def drain(place: Place) -> Reading:
    """Alarms that waited in the spool, until the last has come through the broker; the peer has its own in memory."""
    with open_site(place.scratch) as site:
        settings = site.settings(rate=100_000)
        place.say(f"spooling {SPOOLED} alarms")
        with Spool(settings.paths.spool) as spool:
            for _ in range(SPOOLED):
                spool.alarm(
                    lambda sequence: messages.alarm(
                        sequence, clock=ClockReading(time.time(), "ntp"), uptime=1.0, boot_id="bench"
                    ).payload()
                )
        place.say("draining")
        with site.agent():
            began = time.monotonic()
            while site.broker.next("alarm", 120)["sequence"] < SPOOLED:
                pass
            ours = time.monotonic() - began
        place.say("the same by the SDK alone")
        with site.sample() as sample:
            peer = seconds(lambda: sample.flood(SPOOLED))
    note = (
        f"{SPOOLED / ours:.0f} a second with the brake off; as shipped {Mqtt().publishes_per_second:g}, because AWS "
        f"IoT takes 100 a second of one connection; the SDK brakes by itself ({SPOOLED / peer:.0f})"
    )
    return Reading(ours, peer, note)


def idle_bytes(place: Place) -> Reading:
    """Bytes on the wire in a day in which nothing happens: TLS records, without TCP's and IP's own headers."""

    def measure(site: Site, device: Device) -> float:
        time.sleep(SETTLE_SECONDS)
        since = time.monotonic()
        time.sleep(LONG_IDLE_SECONDS)
        assert device.process.poll() is None
        return sum(chunk.size for chunk in site.meter.chunks(since)) / LONG_IDLE_SECONDS * DAY_SECONDS / 1000

    ours, peer = both(place, measure)
    return Reading(
        ours, peer, f"from {LONG_IDLE_SECONDS:.0f} s; heartbeats and health in ours, pings only in the peer's"
    )
