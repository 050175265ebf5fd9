"""What a Raspberry Pi says about itself, read from a kernel's tree made by hand."""

import fcntl
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from firmware_agent import pins
from firmware_agent.board import RaspberryPi, addresses
from firmware_agent.errors import PirFault


def put(root: Path, path: str, content: str | bytes) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "proc/device-tree/serial-number", b"10000000C0FFEE01\0")
    put(tmp_path, "proc/device-tree/system/linux,revision", bytes.fromhex("00a02082"))
    put(tmp_path, "proc/device-tree/model", b"Raspberry Pi 3 Model B Rev 1.2\0")
    put(tmp_path, "proc/device-tree/compatible", b"raspberrypi,3-model-b\0brcm,bcm2837\0")
    put(tmp_path, "proc/sys/kernel/random/boot_id", "7d3f0d4e-0000-4000-8000-000000000001\n")
    put(tmp_path, "proc/sys/kernel/osrelease", "6.12.48-arm64\n")
    put(tmp_path, "proc/meminfo", "MemTotal:  927696 kB\nMemFree: 1 kB\nMemAvailable: 500000 kB\n")
    put(tmp_path, "proc/self/mountinfo", "21 1 0:20 / /proc rw - proc proc rw\n22 1 179:2 / / rw - ext4 /dev/root rw\n")
    disk = "sys/devices/mmc0/block/mmcblk0"
    put(tmp_path, f"{disk}/size", "15523840\n")
    put(tmp_path, f"{disk}/device/cid", "1b534d3030303030\n")
    put(tmp_path, f"{disk}/mmcblk0p2/partition", "2\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/179:2").symlink_to(tmp_path / disk / "mmcblk0p2")
    for name, mac, kind, real in (
        ("eth0", "B8:27:EB:00:00:01", "0", True),
        ("usb0", "02:00:00:00:00:01", "1", True),  # made up at boot
        ("lo", "00:00:00:00:00:00", "0", False),
    ):
        put(tmp_path, f"sys/class/net/{name}/address", f"{mac}\n")
        put(tmp_path, f"sys/class/net/{name}/addr_assign_type", f"{kind}\n")
        if real:
            (tmp_path / f"sys/class/net/{name}/device").mkdir()
    return tmp_path


def test_a_pi_says_what_it_is(root: Path) -> None:
    facts = RaspberryPi(root).facts()

    assert facts.serial == "10000000c0ffee01"
    assert facts.revision == "a02082"
    assert facts.model == "Raspberry Pi 3 Model B Rev 1.2"
    assert facts.macs == {"eth0": "b8:27:eb:00:00:01"}
    assert (facts.medium_cid, facts.medium_bytes) == ("1b534d3030303030", 15523840 * 512)
    assert facts.memory_bytes == 927696 * 1024
    assert facts.boot_id == "7d3f0d4e-0000-4000-8000-000000000001"
    assert facts.kernel == "6.12.48-arm64"
    assert facts.compatible == ("raspberrypi,3-model-b", "brcm,bcm2837")


def test_what_a_board_cannot_tell_is_none_not_zero(tmp_path: Path) -> None:
    board = RaspberryPi(tmp_path)

    health = board.health(tmp_path)

    assert (health.temperature_c, health.throttled, health.disk_wear_percent, health.radio_dbm) == (None,) * 4
    assert board.facts().revision == "unknown"
    assert board.facts().compatible == ()
    assert board.facts().medium_cid is None


def test_health_is_read_in_the_units_that_it_is_reported_in(root: Path) -> None:
    put(root, "sys/class/thermal/thermal_zone0/temp", "45223\n")
    put(root, "sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n")

    health = RaspberryPi(root).health(root)

    assert health.temperature_c == 45.223
    assert health.throttled == 0x50005
    assert health.memory_free_bytes == 500000 * 1024


@pytest.mark.parametrize(
    ("life_time", "percent"), [("0x01 0x02\n", 20), ("0x0b 0x01\n", 100), ("0x00 0x00\n", None), ("nonsense\n", None)]
)
def test_an_emmc_tells_how_much_of_its_life_is_used(root: Path, life_time: str, percent: int | None) -> None:
    put(root, "sys/devices/mmc0/block/mmcblk0/device/life_time", life_time)

    assert RaspberryPi(root).health(root).disk_wear_percent == percent


@pytest.mark.parametrize(("level", "dbm"), [("-58.", -58), ("58.", None), ("none", None)])
def test_the_radio_is_heard_in_dbm(root: Path, level: str, dbm: int | None) -> None:
    heading = "Inter-| sta-|   Quality        |   Discarded packets\n face | tus | link level noise |  nwid  crypt\n"
    put(root, "proc/net/wireless", f"{heading} wlan0: 0000   52.  {level}  -256        0      0\n")

    assert RaspberryPi(root).health(root).radio_dbm == dbm


def test_the_clock_says_how_far_to_trust_it(root: Path) -> None:
    board = RaspberryPi(root)

    assert board.clock().quality == "estimated"
    put(root, "sys/class/rtc/rtc0/hctosys", "1\n")
    assert board.clock().quality == "rtc"
    put(root, "run/systemd/timesync/synchronized", "")
    assert board.clock().quality == "ntp"


def test_addresses_leave_out_the_loop_and_the_link(tmp_path: Path) -> None:
    put(
        tmp_path,
        "if_inet6",
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fe80000000000000ba27ebfffe000001 02 40 20 80     eth0\n"
        "20010db8000000000000000000000001 02 40 00 80     eth0\n",
    )

    found = addresses(tmp_path / "if_inet6")

    assert "2001:db8::1" in found
    assert not any(address.startswith(("127.", "fe80", "::1")) for address in found)


# --- the PIR's chip -----------------------------------------------------------------------------------------------


def test_the_chip_is_found_by_its_label_in_the_settings_order() -> None:
    labels = {0: "raspberrypi-exp-gpio", 1: "pinctrl-bcm2835", 2: "9030000.pl061"}

    assert pins.choose_chip(labels, {"pinctrl-bcm2835": 17, "9030000.pl061": 5}) == (1, 17)
    assert pins.choose_chip(labels, {"9030000.pl061": 5}) == (2, 5)


def test_a_board_without_the_chip_is_told_what_it_has() -> None:
    with pytest.raises(PirFault, match="labelled pinctrl-rp1; this board has some-chip"):
        pins.choose_chip({0: "some-chip"}, {"pinctrl-rp1": 17})


def test_labels_are_asked_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpiochip0").touch()
    (tmp_path / "gpiochip11").touch()

    def ioctl(handle: int, request: int, argument: bytes) -> bytes:
        assert (request, len(argument)) == (0x8044B401, 68)
        label = b"pinctrl-bcm2711" if Path(f"/proc/self/fd/{handle}").readlink().name == "gpiochip11" else b"other"
        return struct.pack("32s32sI", b"gpiochip", label, 58)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)

    assert pins.chip_labels(tmp_path) == {0: "other", 11: "pinctrl-bcm2711"}


def test_a_file_that_is_no_chip_has_no_label(tmp_path: Path) -> None:
    (tmp_path / "gpiochip0").touch()

    assert pins.chip_labels(tmp_path) == {}


def test_an_edge_while_a_pin_is_watched_is_not_lost(unit: Any) -> None:
    edges: list[bool] = []
    with unit.pins.pir() as pir:
        assert pir.level() == 0
        pir.watch(edges.append)
        for _ in range(20):
            unit.pir.drive_high()
            unit.pir.drive_low()

    assert edges == [True, False] * 20
    unit.pir.drive_high()
    assert len(edges) == 40


def test_the_uptime_counts_from_the_boards_first_process(root: Path) -> None:
    before = boottime()
    began = round((before - 2.5) * os.sysconf("SC_CLK_TCK"))
    put(root, "proc/1/stat", f"1 (odd ) name) S {'0 ' * 18}{began} 0 0\n")

    uptime = RaspberryPi(root).uptime()

    assert 2.4 <= uptime <= boottime() - before + 2.6


def test_the_uptime_is_the_kernels_where_the_first_process_is_hidden(root: Path) -> None:
    before = boottime()

    assert before <= RaspberryPi(root).uptime() <= boottime()
