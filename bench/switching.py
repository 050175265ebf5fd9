"""For how long nobody watches the sensor while a unit changes from one release of its agent to another."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from bench.clock import median, spread
from bench.field import LINE, Site, open_site
from bench.figures import Place, Reading
from bench.shipping import RECIPE, Maker, Shelf, the_archive
from factory.drivers.gpio_server import GpioServer
from firmware_agent import files
from firmware_agent.update import archive
from firmware_agent.update.archive import Digest
from firmware_agent.update.releases import Expected, Releases
from image.recipe import load
from image.release import Built
from tests.firmware_agent.support import SERIAL
from tests.updates import World

UPDATES = 3
UPDATE_SECONDS = 120.0
#: Somebody moves in front of the sensor all the time; each pulse is an alarm of its own.
PULSE_SECONDS = 0.05
_LOOK_SECONDS = 0.002


def gap(place: Place) -> Reading:
    """The longest hole between the alarms that were kept, less the usual distance, in updates by the job service.

    Against the sample on AWS's SDK: from the order to end until its next process is connected.
    """
    folder = place.scratch
    place.say("releases")
    built = _releases(folder)
    world = World(folder / "world")
    for one in built[1:]:
        world.repository.add(one.description, "main")
    world.publish()
    with open_site(folder) as site:
        settings = site.settings(rate=100_000)
        (folder / "root.json").write_bytes(world.root.read_bytes())
        _begin_with(built[0], Releases(settings.paths.releases, settings.paths.state), settings.paths.releases)
        with Shelf(world) as shelf, site.launched() as gpio, _Watch(gpio) as watch:
            with _motion(gpio):
                for number, one in enumerate(built[1:], 1):
                    place.say(f"update {number} of {UPDATES}")
                    _update(site, world, shelf, one)
            free = watch.longest_free(UPDATES)
            holes = _longest_holes(site)
        place.say("the sample, ended and started")
        peer = [_restart(site) for _ in range(UPDATES)]
    note = (
        f"{spread(holes)} in {UPDATES} updates, worst held against the target; the line itself has no holder for "
        f"{median(free):.2f}; sample {spread(peer)}"
    )
    return Reading(median(holes), median(peer), note, judged=max(holes))


# --- releases -----------------------------------------------------------------------------------------------------


def _releases(folder: Path) -> list[Built]:
    """One to begin with, and as many more as there are updates."""
    maker = Maker(load(RECIPE), None)
    made: list[Built] = []
    for number in range(UPDATES + 1):
        version = f"1.{number}.0"
        older = [the_archive(made[-1])] if made else []
        made.append(maker.archive(folder / version, version, *older, changed=bool(number % 2)))
    return made


def _begin_with(built: Built, releases: Releases, directory: Path) -> None:
    """Put a release in force, as the image does."""
    (directory / "releases").mkdir(parents=True)
    version = built.release.partition("-")[0]
    with the_archive(built).open("rb") as file:
        name = releases.install(archive.decompress(file), Expected(version, Digest(built.tar_sha256, built.tar_size)))
    files.point(directory / "current", f"releases/{name}")


def _update(site: Site, world: World, shelf: Shelf, built: Built) -> None:
    """Have the unit do a job, to its end.

    Raises:
        RuntimeError: it does not succeed.
    """
    release = next(one for one in world.repository.releases() if one.tar_sha256 == built.tar_sha256)
    base = f"http://127.0.0.1:{shelf.port}"
    document = {
        "picket": 1,
        "operation": "update",
        "product": release.product,
        "target": release.path,
        "version": release.version,
        "metadata": f"{base}/metadata/",
        "urls": {path: f"{base}/{stored}" for path, stored in release.files.items()},
    }
    job = f"update-{release.version.replace('.', '_')}"
    site.jobs.create(job, document, SERIAL)
    end = time.monotonic() + UPDATE_SECONDS
    while (status := site.jobs.status(job, SERIAL)) in {"QUEUED", "IN_PROGRESS"} and time.monotonic() < end:
        time.sleep(0.05)
    if status != "SUCCEEDED":
        told = [one.short for one in site.jobs.told if one.job == job]
        log = (site.folder / "agent.log").read_text()[-800:]
        raise RuntimeError(f"the update to {release.version} ended with {status} ({', '.join(told)}): {log}")


# --- the sensor ---------------------------------------------------------------------------------------------------


@contextmanager
def _motion(gpio: GpioServer) -> Iterator[None]:
    """Pulses on the sensor's line, one after the other."""
    over = threading.Event()

    def move() -> None:
        while not over.wait(PULSE_SECONDS / 2):
            gpio.drive(LINE, high=True)
            over.wait(PULSE_SECONDS / 2)
            gpio.drive(LINE, high=False)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _longest_holes(site: Site) -> list[float]:
    """The longest times between the edges of two alarms, less the usual time: as many as there were updates."""
    time.sleep(1.0)  # what was kept last is still on its way
    stamps = sorted(seen.payload["monotonic_ms"] / 1000 for seen in _all_seen(site) if seen.topic.endswith("/alarm"))
    steps = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    return [step - median(steps) for step in sorted(steps)[-UPDATES:]]


def _all_seen(site: Site) -> Iterator[Any]:
    while not site.broker.seen.empty():
        yield site.broker.seen.get()


class _Watch:
    """Looks all the time whether somebody holds the line; a context manager."""

    def __init__(self, gpio: GpioServer) -> None:
        self._gpio = gpio
        self._over = threading.Event()
        self._changes: list[tuple[float, bool]] = [(time.monotonic(), gpio.held(LINE))]
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def longest_free(self, count: int) -> list[float]:
        """The longest times without a holder, in seconds."""
        free = [end - start for (start, held), (end, _) in itertools.pairwise(self._changes) if not held]
        return sorted(free)[-count:]

    def _look(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            if (held := self._gpio.held(LINE)) is not self._changes[-1][1]:
                self._changes.append((time.monotonic(), held))


# --- the peer -----------------------------------------------------------------------------------------------------


def _restart(site: Site) -> float:
    """Seconds from the order to end that the sample gets, until its next process is connected."""
    with ExitStack() as first:
        first.enter_context(site.sample())
        began = time.monotonic()
    with site.sample():
        return time.monotonic() - began
