"""A sealed unit, looked at from its own network and from inside, and the one way back into factory mode."""

import gzip
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloud import rollout
from cloud.fleet import Fleet
from cloud.registry import certificate_id
from cloud.rollout import Operation, Plan, Ring, Status
from factory.drivers.virtual_pi import STATION_ADDRESS, VirtualPi
from factory.errors import ExitCode
from image import authorisation, factory_key, signing
from image.firmware import FileMedium, partitions
from station import Station
from tests.site import ROOT, Site
from tests.vm.conftest import Booted
from tests.vm.lan import knock
from tests.vm.shipping import wait

pytestmark = pytest.mark.vm

#: What systemd-networkd keeps open to be given an address, and nftables lets in from servers' ports alone.
DHCP = r"udp (10\.0\.2\.15:68|fe80:[0-9a-f:]+:546)|raw :::58"


@dataclass
class Sealed:
    """A unit that passed, in its own folder, without power until somebody supplies it."""

    site: Site
    serial: str
    host: str

    @property
    def place(self) -> Path:
        return self.site.base / "boards" / self.serial

    @property
    def medium(self) -> Path:
        return self.place / "medium.img"

    @property
    def board(self) -> str:
        return (self.place / "soc-serial").read_text().strip()

    @property
    def console(self) -> str:
        return (self.place / "console.log").read_text(errors="replace")

    @contextmanager
    def powered(self) -> Iterator[VirtualPi]:
        with VirtualPi(self.place, hosts={self.host: STATION_ADDRESS}, tapped=True) as pi:
            pi.on()
            yield pi

    def starts_as_product(self) -> None:
        """Wait until the cloud has heard of another start than before."""
        before = self.site.registry.device(self.serial)
        assert before is not None

        def again() -> bool:
            device = self.site.registry.device(self.serial)
            return device is not None and device.boot_id != before.boot_id and device.mode == "product"

        wait(again, "the unit does not connect as a product")

    def put(self, name: str, content: bytes) -> None:
        """A file on the control partition, by whoever holds the medium."""
        with FileMedium(self.medium) as opened:
            start = partitions(opened)[1].start
        source = self.site.base / "put"
        source.write_bytes(content)
        subprocess.run(["mcopy", "-o", "-i", f"{self.medium}@@{start}", source, f"::{name}"], check=True)

    def says(self, folder: Path) -> dict[str, str]:
        """Its own status, as the job that collects logs brings it."""
        fleet = Fleet(self.site.target)
        plan = Plan(None, rollout.default_abort(Ring.MAIN, 1), retries=0, timeout=timedelta(hours=1))
        job = fleet.start_operation(Operation.COLLECT_LOGS, self.serial, plan, datetime.now(UTC)).job

        def over() -> bool:
            return any(one.status is Status.SUCCEEDED for one in fleet.executions(job))

        wait(over, "the unit's logs do not come")
        text = gzip.decompress(fleet.logs(self.serial, folder)[-1].read_bytes()).decode()
        assert "picket-agent" in text.partition("==== log ====")[2], "the journal is readable from inside the sandbox"
        return dict(re.findall(r"^([a-z ]+): +(.*)$", text.partition("==== log ====")[0], re.MULTILINE))


@pytest.fixture(scope="module")
def unit(site: Site) -> Sealed:
    serial = site.serial()
    with Station.opened(site.bench(**site.virtual()), serial) as station:
        attempt = station.run(as_json=False)
        assert attempt.code is ExitCode.PASS, site.record(serial)[-1].reason
        return Sealed(site, serial, station.product.endpoint.host)


def test_a_product_answers_nobody_and_neither_a_mark_nor_a_strangers_word_opens_it(
    unit: Sealed, tmp_path: Path
) -> None:
    stranger = signing.open_signer(f"file:{factory_key.ensure(tmp_path / 'stranger', 'image')}")
    now = int(datetime.now(UTC).timestamp())
    unit.put("factory", b"so there\n")
    unit.put(authorisation.NAME, authorisation.compose("picket", unit.board, now, 7, stranger))

    with unit.powered() as pi:
        unit.starts_as_product()
        inside = unit.says(tmp_path)
        outside = knock(pi)

    assert "factory mode stays closed: " in unit.console
    assert outside.opened == set()
    assert outside.refused == set(), "not even that nobody is there is told"
    assert "product mode" in inside["agent"]
    assert inside["listening"]
    assert [each for each in inside["listening"].split(", ") if not re.fullmatch(DHCP, each)] == []


def test_the_stations_authorisation_opens_factory_mode_for_one_start_and_leaves_the_identity(
    unit: Sealed,
) -> None:
    wrote = unit.site.command(
        "authorise", "--board", unit.board, "--medium", str(unit.medium),
        "--signing-key", f"file:{ROOT / signing.DEFAULT_PATH}",
    )  # fmt: skip
    assert wrote.returncode == 0, wrote.stderr

    with unit.powered() as pi:
        booted = Booted(pi)
        outside = knock(pi)
        status = booted.ask("status")["status"]
        installed, identity = booted.ask("installed"), booted.ask("identify")

    assert outside.opened == {"tcp 22", "tcp6 22"}
    assert outside.refused == set()
    assert isinstance(status, dict)
    assert [each for each in status["listening"] if not re.fullmatch(DHCP, each)] == ["tcp 0.0.0.0:22", "tcp :::22"]
    assert identity["key_store"] == "tpm"
    (live,) = unit.site.live_certificates(unit.serial)
    assert live == certificate_id(str(installed["chain"]))

    # The same medium, with the same authorisation on it.
    with unit.powered() as pi:
        unit.starts_as_product()
        outside = knock(pi)

    assert outside.opened == set()
    assert "was used before" in unit.console
