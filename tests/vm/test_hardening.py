"""How tightly each service of the built image is held, and what keeps a unit running for years: read, not booted.

`systemd-analyze security` adds up what a service could do if it were taken over, from 0 (nothing) to 10.
"""

import configparser
import gzip
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from image.firmware import read_file
from image.manifest import ImageManifest
from tests.vm.conftest import Root

pytestmark = pytest.mark.vm

#: The most that each service may be exposed. What root must do bounds it from below: a service that mounts, or changes
#: the user of a session, cannot be brought to 1. The numbers are those of systemd 252; newer ones judge alike.
CEILINGS = {
    "nftables.service": 2.0,
    "picket-agent.service": 1.5,
    "picket-clock.service": 2.2,
    "picket-factory.service": 1.6,
    "picket-grow.service": 2.0,
    "picket-hostkey.service": 1.8,
    "picket-reboot.service": 1.6,
    "picket-seal.service": 2.2,
    "picket-slots-check.service": 1.8,
    "picket-slots@.service": 1.9,
    "picket-trial.service": 1.9,
    "picket-vtpm.service": 1.6,
    "picket-zram.service": 2.1,
    "ssh.service": 3.0,
    "systemd-networkd.service": 3.2,
    "systemd-resolved.service": 2.6,
    "systemd-timesyncd.service": 2.5,
}


@pytest.fixture(scope="session")
def unpacked(root: Root, folder: Path) -> Path:
    """The image's unit files and systemd's settings."""
    place = folder / "root"
    wanted = ["etc/systemd", "usr/lib/systemd/system", "etc/fstab", "etc/sysctl.d", "etc/machine-id"]
    subprocess.run(["unsquashfs", "-q", "-n", "-d", place, root.file, *wanted], check=True, capture_output=True)
    return place


def settings(file: Path) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(file.read_text())
    return parsed


@pytest.mark.parametrize(("service", "ceiling"), CEILINGS.items())
def test_a_service_that_is_taken_over_can_do_little(unpacked: Path, service: str, ceiling: float) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (package systemd)")
    said = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--root={unpacked}", "--no-pager",
         service.replace("@.", "@1.")], check=False, capture_output=True, text=True,
    )  # fmt: skip
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said.stdout)

    assert found is not None, said.stderr
    assert float(found[1]) <= ceiling, said.stdout


def test_every_service_of_ours_has_a_ceiling(root: Root) -> None:
    ours = {name for name in root.names("/usr/lib/systemd/system") if re.fullmatch(r"picket-.*\.service", name)}

    assert ours <= set(CEILINGS)


def test_the_agent_cannot_be_connected_to_whoever_has_it(unpacked: Path) -> None:
    text = (unpacked / "usr/lib/systemd/system/picket-agent.service").read_text()

    assert "SystemCallFilter=~listen accept accept4\n" in text


def test_a_board_that_hangs_is_restarted_by_its_watchdog(unpacked: Path) -> None:
    manager = settings(unpacked / "etc/systemd/system.conf.d/picket.conf")["Manager"]

    assert 0 < int(manager["RuntimeWatchdogSec"]) < 16, "bcm2835_wdt counts no further"


def test_the_journal_is_in_memory_and_bounded(unpacked: Path) -> None:
    journal = settings(unpacked / "etc/systemd/journald.conf.d/picket.conf")["Journal"]

    assert journal["Storage"] == "volatile"
    assert journal["RuntimeMaxUse"].endswith("M")
    assert int(journal["RuntimeMaxUse"].removesuffix("M")) <= 32
    assert int(journal["RateLimitBurst"]) > 0


@pytest.mark.parametrize("place", ["/tmp", "/var/tmp"])  # noqa: S108
def test_temporary_files_are_in_memory_bounded_and_no_way_to_raise_a_user(image: ImageManifest, place: str) -> None:
    initramfs = gzip.decompress(read_file(image.image_path, "initrd.img", 2)).decode(errors="replace")
    found = re.search(rf"mount -t tmpfs -o (\S+) \S+ /root{place}\n", initramfs)

    assert found is not None
    assert {"nosuid", "nodev"} <= set(found[1].split(","))
    assert "size=" in found[1]


def test_memory_is_swapped_into_memory_and_never_on_to_the_medium(root: Root, unpacked: Path) -> None:
    assert " swap " not in (unpacked / "etc/fstab").read_text()
    assert "/dev/zram0" in root.text("/usr/lib/systemd/system/picket-zram.service")
    assert "picket-zram.service" in root.names("/etc/systemd/system/multi-user.target.wants")


def test_nobody_at_the_console_pins_has_the_kernels_magic_keys(unpacked: Path) -> None:
    assert "kernel.sysrq = 0\n" in (unpacked / "etc/sysctl.d/90-picket.conf").read_text()
