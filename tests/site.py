"""A factory site for tests: a real local cloud with the real stack, an authority, the sample image, and bench files."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud import stack
from cloud.local import launcher
from cloud.local.endpoint import LocalEndpoint
from cloud.registry import Registry
from cloud.target import Target, local_target
from factory import authority
from factory.record import Records, RunView
from image import factory_key, sample
from station import Attempt, Station, register

ROOT = Path(__file__).parent.parent
PASSPHRASE = b"correct horse battery staple"

BENCH = """\
name = "{name}"
station = "test"
product = "Picket motion alarm"
batch = "WO-0001"
image = "{image}"
records = "sqlite:///{base}/records.db"
labels = "{base}/labels"
factory_key = "{key}"
[board]
uri = "{board}:{base}/boards/{{serial}}"
faults = {faults}
{options}
[authority]
directory = "{authority}"
passphrase_file = "{passphrase}"
[cloud]
target = "local"
state = "{cloud}"
guest = {guest}
"""


#: A process may open more sites than one.
_SERIALS = itertools.count(1)


@dataclass
class Site:
    """One site; every test makes units with serials of its own on it."""

    base: Path
    target: Target
    cloud: LocalEndpoint
    registry: Registry
    _benches: int = field(default=0)

    @staticmethod
    def serial() -> str:
        """A serial that no other test has, of this worker or another: the station locks units for all of a checkout."""
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        return f"PK-{worker:02}{next(_SERIALS):04}"

    def bench(self, *faults: str, **changes: str) -> Path:
        """A bench file for a simulated board with `faults`; `changes` are values of the file."""
        self._benches += 1
        settings = {
            "base": str(self.base),
            "image": str(self.base / "image/picket-sample.json"),
            "authority": str(self.base / "ca"),
            "passphrase": str(self.base / "ca.passphrase"),
            "cloud": str(self.base / "cloud"),
            "key": str(self.base / "keys/factory"),
            "board": "simulated",
            "options": "tpm = false",
            "guest": "false",
            "name": f"test-{os.getpid()}-{self._benches}",
        } | changes
        path = self.base / f"bench-{self._benches}.toml"
        path.write_text(BENCH.format(faults=json.dumps(list(faults)), **settings))
        return path

    def virtual(self) -> dict[str, str]:
        """What changes in a bench file for a virtual Pi with the image that `make image` built."""
        return {
            "board": "virtual",
            "options": "tpm = true",
            "guest": "true",
            "image": str(ROOT / "build/image/picket.json"),
            "key": str(ROOT / "build/keys/factory"),
        }

    def run(self, serial: str, *faults: str, **changes: str) -> tuple[Attempt, RunView]:
        """Run a unit in this process; how it ended, and its latest run."""
        with Station.opened(self.bench(*faults, **changes), serial) as station:
            attempt = station.run(as_json=False)
        return attempt, self.record(serial)[-1]

    def rework(self, serial: str) -> tuple[Attempt, RunView]:
        """Make a unit again that has passed."""
        with Station.opened(self.bench(), serial, rework=True) as station:
            attempt = station.run(as_json=False)
        return attempt, self.record(serial)[-1]

    def record(self, serial: str) -> tuple[RunView, ...]:
        """All runs of a unit."""
        records = self.records()
        try:
            return records.runs(serial)
        finally:
            records.close()

    def records(self) -> Records:
        """The site's database."""
        return Records(f"sqlite:///{self.base}/records.db")

    def live_certificates(self, serial: str) -> list[str]:
        """The unit's certificates that could connect."""
        records = self.records()
        try:
            issued = records.certificates(serial)
        finally:
            records.close()
        found = [(one.sha256, self.registry.certificate(one.sha256)) for one in issued]
        return [sha256 for sha256, known in found if known is None or known.status in {"ACTIVE", "PENDING_ACTIVATION"}]

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`station.py` as a user calls it."""
        return subprocess.run(
            [sys.executable, str(ROOT / "station.py"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | environment,
        )


@contextmanager
def open_site(base: Path) -> Iterator[Site]:
    """Set a site up, and tear its cloud down."""
    with launcher.running(base / "cloud", jitp_delay=(0.2, 0.3), retry_seconds=0.2) as endpoint:
        target = local_target(base / "cloud")
        stack.deploy(target, build=base / "code")
        (base / "ca.passphrase").write_bytes(PASSPHRASE)
        (base / "ca.passphrase").chmod(0o600)
        signing = authority.create_authority(base / "ca", PASSPHRASE)
        registry = Registry(target)
        register(registry, signing)
        factory_key.ensure(base / "keys/factory")
        sample.build(base / "image/picket-sample.json")
        yield Site(base, target, endpoint, registry)


def last_json(text: str) -> Any:
    """The last line of a `--json` command."""
    return json.loads(text.strip().splitlines()[-1])


def fresh_checkout(place: Path) -> Path:
    """The tree as it stands, without what was built, but with this environment's Python packages."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        check=True,
        cwd=ROOT,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / ".venv").symlink_to(sys.prefix)
    return place


def plain_environment() -> dict[str, str]:
    """The environment without what pytest or a user's AWS settings put there."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "AWS", "MAKE", "MFLAGS"))
    }


def as_a_user(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a checkout, in a plain environment."""
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=plain_environment())
