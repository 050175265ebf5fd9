"""What a release engineer and a fleet operator do, for the virtual Pi: build releases, sign them, bring them out."""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloud.fleet import Fleet
from cloud.rollout import Execution, Kind, Ring, Status, update_prefix
from cloud.showcase import Updates
from factory.errors import ExitCode
from station import Station
from tests.site import ROOT, Site, fresh_checkout, open_site, plain_environment

#: An emulated Pi takes its time, and a cut costs it a boot or two. An image is downloaded, written, and read again.
SECONDS = 400.0
IMAGE_SECONDS = 900.0

#: When the plug is pulled, as parts of the time that an update takes. Two units share them, as a cut costs most of a
#: minute: two files, so that two workers may take one each.
CUTS = 20
_DRAW = random.Random(20261121)
MOMENTS = [_DRAW.random() for _ in range(CUTS)]


@dataclass
class Shipping:
    """A copy of the update repository whose root the built image trusts, with all keys in one hand."""

    base: Path
    site: Site

    @classmethod
    def open(cls, site: Site) -> "Shipping":
        base = site.base / "updates"
        shutil.copytree(ROOT / "build/updates", base)
        return cls(base, site)

    @property
    def fleet(self) -> Fleet:
        return Fleet(self.site.target)

    @property
    def updates(self) -> Updates:
        return Updates(self.base, self.site.base / "cloud", self.base / "releases")

    def name_canary(self, serial: str) -> None:
        """One unit is the canary, for the fleet and by two signatures."""
        self.updates.command("fleet", "ring", "canary", serial)
        self.updates.command("keys", "canaries", serial)
        for holder in ("holder-1", "holder-2"):
            self.updates.command("keys", "sign", "--keys", self.updates.keys(holder))

    def build(self, version: str, *older: Path, change: tuple[str, str, str] | None = None) -> Path:
        """A release for devices from the tree as it stands; `change` replaces words in a file first. Its archive."""
        tree = self._tree(version, change)
        output = self.base / "releases" / version
        subprocess.run(
            [sys.executable, "-m", "image", "release", "--version", version, "--output", output, "--json",
             "--cache", ROOT / "build/cache", *(word for old in older for word in ("--from", old))],
            check=True, cwd=tree, env=plain_environment(), stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (archive,) = output.glob("*.tar.zst")
        return archive

    def build_image(self, version: str, settings: str = "", change: tuple[str, str, str] | None = None) -> None:
        """An image from the tree as it stands, by a recipe that extends the product's by `settings`."""
        tree, recipe = self._tree(f"image-{version}", change), self.base / "recipes" / f"{version}.toml"
        recipe.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "image/recipes/picket.lock", recipe.with_suffix(".lock"))
        recipe.write_text(f'extends = "{tree / "image/recipes/picket.toml"}"\nversion = "{version}"\n{settings}\n')
        subprocess.run(
            [sys.executable, "-m", "image", "build", "--recipe", recipe, "--output", self.images, "--json",
             "--cache", ROOT / "build/cache", "--key", ROOT / "build/keys/factory",
             "--update-root", self.updates.root, "--signing-key", f"file:{ROOT / 'build/keys/image'}"],
            check=True, cwd=tree, env=plain_environment(), stdout=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def images(self) -> Path:
        """Where images are built."""
        return self.base / "images"

    def _tree(self, name: str, change: tuple[str, str, str] | None) -> Path:
        """The tree as it stands, or a copy of it with words of a file replaced."""
        if change is None:
            return ROOT
        tree = fresh_checkout(self.base / f"tree-{name}")
        file, right, wrong = change
        text = (tree / file).read_text()
        assert text.count(right) == 1, f"{file} has no {right!r} any more"
        (tree / file).write_text(text.replace(right, wrong))
        return tree

    def publish(self, version: str, kind: Kind = Kind.AGENT) -> None:
        """Sign a release for the canaries, and put it where units fetch it."""
        keys = [word for name in ("builder", "online") for word in ("--keys", self.updates.keys(name))]
        described = self.images / f"picket-{version}" / "release.json"
        where: list[str | Path] = ["--os", "--description", described] if kind is Kind.OS else []
        self.updates.command("fleet", "release", version, *keys, *where)

    def start(self, version: str, kind: Kind = Kind.AGENT) -> str:
        """Bring a release to the canary ring; the job."""
        self.updates.command("fleet", "canary", version, *(["--os"] if kind is Kind.OS else []))
        kinds = update_prefix(self.fleet.target.stack, Ring.CANARY, kind)
        (job,) = [each for each in self.fleet.active_updates(Ring.CANARY) if each.name.startswith(kinds)]
        return job.name

    def execution(self, job: str, serial: str) -> Execution | None:
        """The unit's newest attempt at a job."""
        found = [each for each in self.fleet.executions(job) if each.thing == serial]
        return max(found, key=lambda each: each.number, default=None)

    def finished(self, job: str, serial: str, seconds: float = SECONDS) -> Execution:
        """... once it is over."""
        found: list[Execution] = []

        def over() -> bool:
            execution = self.execution(job, serial)
            found[:] = [execution] if execution else []
            return execution is not None and execution.status not in {Status.QUEUED, Status.IN_PROGRESS}

        wait(over, f"{job} on {serial} is not over", seconds)
        return found[0]

    def version(self, serial: str) -> str | None:
        """What the unit said that it runs when it last connected."""
        device = self.site.registry.device(serial)
        return device.agent if device is not None else None


def wait(condition: Callable[[], bool], complaint: str, seconds: float = SECONDS) -> None:
    """Until it holds; the limit only ends a test that would hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.3)


@dataclass
class Fielded:
    """A sealed unit on a virtual Pi that is a canary, and the releases that there are for it by version."""

    serial: str
    station: Station
    shipping: Shipping
    archives: dict[str, Path]

    @classmethod
    @contextmanager
    def made(cls, base: Path) -> Iterator["Fielded"]:
        """Take a new unit through a line of its own; it stays powered until the context ends.

        Its cloud is its own too: of two units in the canary ring of one, each would be offered the other's releases.
        """
        with open_site(base) as site, cls._made(site) as made:
            yield made

    @classmethod
    @contextmanager
    def _made(cls, site: Site) -> Iterator["Fielded"]:
        serial = site.serial()
        shipping = Shipping.open(site)
        with Station.opened(site.bench(**site.virtual()), serial) as station:
            attempt = station.run(as_json=False)
            assert attempt.code is ExitCode.PASS, site.record(serial)[-1].reason
            shipping.name_canary(serial)
            first = shipping.version(serial)
            assert first is not None
            yield cls(serial, station, shipping, {first: shipping.build(first)})

    def build(self, version: str, *older: str) -> None:
        """Build a release with deltas from older ones, and publish it."""
        self.archives[version] = self.shipping.build(version, *(self.archives[one] for one in older))
        self.shipping.publish(version)

    def update(self, version: str) -> tuple[Status, str]:
        """Bring a release out to the unit; how that ended, and why."""
        job = self.shipping.start(version)
        execution = self.shipping.finished(job, self.serial)
        return execution.status, " ".join(execution.details.values())

    def runs(self, version: str) -> None:
        """Wait until the unit says that it runs this."""
        wait(lambda: self.shipping.version(self.serial) == version, f"{self.serial} does not come back as {version}")

    def build_image(self, version: str, settings: str = "", change: tuple[str, str, str] | None = None) -> None:
        """Build an image, and publish it."""
        self.shipping.build_image(version, settings, change)
        self.shipping.publish(version, Kind.OS)

    def update_image(self, version: str) -> tuple[Status, str]:
        """Bring an image out to the unit; how that ended, and why."""
        return self.image_ended(self.shipping.start(version, Kind.OS))

    def image_ended(self, job: str) -> tuple[Status, str]:
        """How a job with an image ended, and why."""
        execution = self.shipping.finished(job, self.serial, IMAGE_SECONDS)
        return execution.status, " ".join(execution.details.values())

    def boots(self, version: str) -> None:
        """Wait until the unit says that it runs this image."""

        def says_so() -> bool:
            device = self.shipping.site.registry.device(self.serial)
            return device is not None and device.image == f"picket {version}"

        wait(says_so, f"{self.serial} does not come back with image {version}")

    def boot_id(self) -> str | None:
        """Which boot the unit last spoke in."""
        device = self.shipping.site.registry.device(self.serial)
        return device.boot_id if device is not None else None

    def comes_back(self, before: str | None) -> None:
        """Wait until the unit speaks in another boot than `before`."""
        wait(lambda: self.boot_id() != before, f"{self.serial} does not come back")

    def power_cycle(self) -> None:
        """Pull the plug, and put it back."""
        self.station.bench.power.off()
        self.station.bench.power.on()

    def cut_updates(self, one: str, other: str, moments: Sequence[float]) -> list[Status]:
        """Update from one release to the other and back, and pull the plug at a moment of each; how they ended.

        After each cut the unit must come back, as what the fleet was told that it is.
        """
        began = time.monotonic()
        assert self.update(one)[0] is Status.SUCCEEDED
        takes = time.monotonic() - began
        running, ended = one, list[Status]()
        for moment in moments:
            wanted = other if running == one else one
            job = self.shipping.start(wanted)
            time.sleep(moment * takes)
            self.power_cycle()
            execution = self.shipping.finished(job, self.serial)
            ended.append(execution.status)
            running = wanted if execution.status is Status.SUCCEEDED else running
            self.runs(running)
        return ended
