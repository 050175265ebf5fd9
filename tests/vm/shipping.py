"""What a release engineer and a fleet operator do, for the virtual Pi: build releases, sign them, bring them out."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cloud.fleet import Fleet
from cloud.rollout import Execution, Ring, Status
from cloud.showcase import Updates
from tests.site import ROOT, Site, fresh_checkout, plain_environment

#: An emulated Pi takes its time, and a cut costs it a boot or two.
SECONDS = 400.0


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
        tree = ROOT
        if change is not None:
            tree = fresh_checkout(self.base / f"tree-{version}")
            name, right, wrong = change
            text = (tree / name).read_text()
            assert text.count(right) == 1, f"{name} has no {right!r} any more"
            (tree / name).write_text(text.replace(right, wrong))
        output = self.base / "releases" / version
        subprocess.run(
            [sys.executable, "-m", "image", "release", "--version", version, "--output", output, "--json",
             "--cache", ROOT / "build/cache", *(word for old in older for word in ("--from", old))],
            check=True, cwd=tree, env=plain_environment(), stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (archive,) = output.glob("*.tar.zst")
        return archive

    def publish(self, version: str) -> None:
        """Sign a release for the canaries, and put it where units fetch it."""
        keys = [word for name in ("builder", "online") for word in ("--keys", self.updates.keys(name))]
        self.updates.command("fleet", "release", version, *keys)

    def start(self, version: str) -> str:
        """Bring a release to the canary ring; the job."""
        self.updates.command("fleet", "canary", version)
        (job,) = self.fleet.active_updates(Ring.CANARY)
        return job.name

    def execution(self, job: str, serial: str) -> Execution | None:
        """The unit's newest attempt at a job."""
        found = [each for each in self.fleet.executions(job) if each.thing == serial]
        return max(found, key=lambda each: each.number, default=None)

    def finished(self, job: str, serial: str) -> Execution:
        """... once it is over."""
        found: list[Execution] = []

        def over() -> bool:
            execution = self.execution(job, serial)
            found[:] = [execution] if execution else []
            return execution is not None and execution.status not in {Status.QUEUED, Status.IN_PROGRESS}

        wait(over, f"{job} on {serial} is not over")
        return found[0]

    def version(self, serial: str) -> str | None:
        """What the unit said that it runs when it last connected."""
        device = self.site.registry.device(serial)
        return device.agent if device is not None else None


def wait(condition: Callable[[], bool], complaint: str) -> None:
    """Until it holds; the limit only ends a test that would hang."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.3)
