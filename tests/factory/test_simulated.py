"""The simulated board with a unit on it that has passed the line: the real product, as a process, through its life."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import station
from cloud.showcase import raise_alarm
from factory.connect import wait_until
from factory.drivers.simulated import SimulatedBoard
from factory.errors import StationFault
from firmware_agent.update.archive import Manifest, write_tree
from firmware_agent.update.releases import Expected, Releases
from tests.site import Site

SECONDS = 30.0


@dataclass
class Sealed:
    """A unit in product mode, on a board that has power."""

    site: Site
    opened: station.Station
    board: SimulatedBoard

    @property
    def state(self) -> Path:
        return self.board.root / "var/lib/picket"

    @property
    def releases(self) -> Releases:
        return Releases(self.board.root / "opt/picket", self.state)

    def boot_id(self) -> str:
        """The boot of its last hello."""
        device = self.site.registry.device(self.opened.unit.serial)
        return "" if device is None else device.boot_id

    def agents(self) -> list[int]:
        """The process ids of the board's product."""
        return [
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if str(self.board.settings_file) in _arguments(path) and "firmware_agent" in _arguments(path)
        ]

    def said(self, words: str) -> int:
        """How many lines of the board's log have `words`."""
        return sum(words in line for line in (self.board.place / "log").read_text().splitlines())

    def wait(self, condition: Callable[[], bool]) -> None:
        assert wait_until(condition, SECONDS, 0.02), (self.board.place / "log").read_text()

    def alarms(self) -> str:
        """Wave until the owner gets an SMS; its text."""
        return raise_alarm(self.opened.unit.serial, self.board, self.site.cloud, station.out).text


def _arguments(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_text().split("\0")
    except OSError:
        return []


@pytest.fixture
def sealed(site: Site) -> Iterator[Sealed]:
    with station.Station.opened(site.bench(), site.serial()) as opened:
        assert opened.run(as_json=False).code == 0
        assert isinstance(opened.bench.power, SimulatedBoard)
        opened.registry.owner(opened.unit.serial, station.DEMO_PHONE, station.DEMO_ZONE)
        yield Sealed(site, opened, opened.bench.power)


def test_a_sealed_unit_runs_the_images_release_as_a_process(sealed: Sealed) -> None:
    (pid,) = sealed.agents()

    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")

    assert pid != os.getpid()
    assert f"PICKET_RELEASE={sealed.releases.current()}" in environment
    assert "detected motion" in sealed.alarms()


def test_a_product_that_is_killed_comes_back_and_raises_alarms(sealed: Sealed) -> None:
    before = sealed.said("is ready")
    os.kill(sealed.agents()[0], signal.SIGKILL)

    sealed.wait(lambda: sealed.said("is ready") > before)

    assert sealed.said("SIGKILL") == 1
    assert "detected motion" in sealed.alarms()


def test_a_power_cut_ends_the_product_and_the_next_boot_is_another(sealed: Sealed) -> None:
    boot = sealed.boot_id()
    sealed.board.off()

    assert sealed.agents() == []

    sealed.board.on()
    sealed.wait(lambda: sealed.boot_id() not in {boot, ""})
    assert len(sealed.agents()) == 1


def test_a_medium_is_not_written_while_the_board_has_power(sealed: Sealed) -> None:
    with pytest.raises(StationFault, match="has power"), sealed.opened.bench.storage.attach():
        pass


def test_a_unit_that_asks_for_a_reboot_boots_again(sealed: Sealed) -> None:
    boot = sealed.boot_id()

    (sealed.state / "reboot-request").touch()

    sealed.wait(lambda: sealed.boot_id() not in {boot, ""})
    assert not (sealed.state / "reboot-request").exists()
    assert len(sealed.agents()) == 1


def test_a_release_that_cannot_even_start_is_given_up_by_the_launcher(sealed: Sealed, tmp_path: Path) -> None:
    releases, good = sealed.releases, sealed.releases.current()
    assert good is not None
    tree = tmp_path / "tree"
    (tree / "firmware_agent").mkdir(parents=True)
    (tree / "firmware_agent/__main__.py").write_text("raise SystemExit('no release at all')\n")
    (tree / "firmware_agent/__init__.py").touch()
    (tree / "manifest.json").write_bytes(Manifest("picket", "99.0", 1, ("picket,simulated",)).to_bytes())
    tar = io.BytesIO()
    digest = write_tree(tree, tar)
    tar.seek(0)
    bad = releases.install(tar, Expected("99.0", digest))
    ready = sealed.said("is ready")

    releases.begin_trial(bad, job="test", limit=2)
    releases.switch()
    os.kill(sealed.agents()[0], signal.SIGTERM)

    sealed.wait(lambda: sealed.said("is ready") > ready)
    given_up = sealed.releases.rolled_back()
    assert given_up is not None
    assert (given_up.release, given_up.to, given_up.attempts) == (bad, good, 2)
    assert sealed.releases.current() == good
    assert sealed.said("no release at all") == 2
