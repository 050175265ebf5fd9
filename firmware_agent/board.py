"""What the agent can learn about the board it runs on: one protocol, and the Raspberry Pi behind it.

Everything is read from files of the kernel, never from a tool's output: a tool may be missing, and starting one costs a
second on a slow board. What a board cannot tell is None, not zero. Only the standard library is imported here, because
the banner needs this module early in the boot.
"""

import fcntl
import os
import platform
import shutil
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar

_Number = TypeVar("_Number", int, float)

Quality = Literal["ntp", "https", "rtc", "estimated"]


@dataclass(frozen=True)
class Facts:
    """What stays the same while the board runs.

    Attributes:
        serial: the SoC's serial, 16 lower-case hex digits.
        revision: the board's revision code in hex, e.g. `a02082` (a Pi 3B).
        model: what a person calls it.
        macs: interface name to MAC, lower case with colons.
        medium_cid: the card's or eMMC's CID register in hex, None for media without one.
        medium_bytes: capacity of the medium that the root file system lies on.
        memory_bytes: memory that Linux has.
        boot_id: changes with each boot.
        kernel: its release.
        compatible: what the device tree says the board is, the most specific first, e.g. `raspberrypi,3-model-b`,
            `brcm,bcm2837`. A release names the boards that it is for by these.
    """

    serial: str
    revision: str
    model: str
    macs: Mapping[str, str]
    medium_cid: str | None
    medium_bytes: int
    memory_bytes: int
    boot_id: str
    kernel: str
    compatible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Health:
    """What changes from minute to minute.

    Attributes:
        temperature_c: of the SoC, in degrees Celsius.
        throttled: the firmware's bits: 0 under-voltage, 1 frequency capped, 2 throttled, 3 soft limit; 16 to 19 the
            same since boot. None where the kernel does not pass them on (Debian's does not).
        disk_free_bytes: where the agent keeps its state.
        memory_free_bytes: what programs could still get.
        disk_wear_percent: how much of its guaranteed life the medium has used, at most; None for media that do not tell
            (SD cards do not, eMMCs do).
        radio_dbm: how strongly the access point is heard; None on a cable.
    """

    temperature_c: float | None
    throttled: int | None
    disk_free_bytes: int
    memory_free_bytes: int
    disk_wear_percent: int | None = None
    radio_dbm: int | None = None


@dataclass(frozen=True)
class ClockReading:
    """The wall clock, and how far to trust it.

    Attributes:
        unix: seconds since 1970, UTC.
        quality: `ntp` when a server has set it since boot, `https` when the cloud's endpoint did, `rtc` when a battery
            clock did, else `estimated`: a Pi without any starts at the last time that it remembers.
    """

    unix: float
    quality: Quality


class Board(Protocol):
    """A board, as far as the agent can see it from inside."""

    def facts(self) -> Facts:
        """What stays the same while the board runs."""
        ...

    def health(self, state: Path) -> Health:
        """What changes; `state` is the directory whose free space counts."""
        ...

    def clock(self) -> ClockReading:
        """The wall clock now."""
        ...

    def uptime(self) -> float:
        """Seconds since the board's power came, sleep included."""
        ...


#: ioctl numbers of <linux/sockios.h> and <linux/rtnetlink.h>'s scope byte in /proc/net/if_inet6.
_SIOCGIFADDR: Final = 0x8915
_SCOPE_GLOBAL: Final = "00"
_NET_ADDR_RANDOM: Final = "1"


def _read(path: Path) -> str | None:
    """A kernel file's text without trailing NULs and blanks, or None when there is none."""
    try:
        return path.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return None


def _number(text: str | None, parse: Callable[[str], _Number]) -> _Number | None:
    """What a kernel file says, or None when it is missing or says something else than its documentation."""
    try:
        return None if text is None else parse(text)
    except (ValueError, IndexError):
        return None


class RaspberryPi:
    """A Raspberry Pi, or whatever else describes itself by a Pi's device tree (the virtual Pi does).

    Args:
        root: where /proc, /sys and /run hang; tests give a directory of their own.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._began = self._first_process()

    def facts(self) -> Facts:
        """What stays the same while the board runs."""
        tree = self._root / "proc/device-tree"
        cid, size = self._medium()
        return Facts(
            serial=(_read(tree / "serial-number") or "").lower().rjust(16, "0"),
            revision=self._revision(tree / "system/linux,revision"),
            model=_read(tree / "model") or "unknown",
            macs=self._macs(),
            medium_cid=cid,
            medium_bytes=size,
            memory_bytes=self._meminfo("MemTotal"),
            boot_id=_read(self._root / "proc/sys/kernel/random/boot_id") or "",
            kernel=_read(self._root / "proc/sys/kernel/osrelease") or platform.release(),
            compatible=tuple(filter(None, (_read(tree / "compatible") or "").split("\0"))),
        )

    def health(self, state: Path) -> Health:
        """What changes from minute to minute."""
        celsius = _read(self._root / "sys/class/thermal/thermal_zone0/temp")
        throttled = _read(self._root / "sys/devices/platform/soc/soc:firmware/get_throttled")
        return Health(
            temperature_c=_number(celsius, lambda text: int(text) / 1000),  # millidegrees
            throttled=_number(throttled, lambda text: int(text, 16)),
            disk_free_bytes=shutil.disk_usage(state).free,
            memory_free_bytes=self._meminfo("MemAvailable"),
            disk_wear_percent=self._wear(),
            radio_dbm=self._radio(),
        )

    def clock(self) -> ClockReading:
        """The wall clock: systemd-timesyncd leaves a file once a server has answered."""
        if (self._root / "run/systemd/timesync/synchronized").exists():
            return ClockReading(time.time(), "ntp")
        if (self._root / "run/picket/clock-https").exists():  # picket-clock.service has set it
            return ClockReading(time.time(), "https")
        # The kernel sets the system clock from the RTC that says so here, when it has one.
        if _read(self._root / "sys/class/rtc/rtc0/hctosys") == "1":
            return ClockReading(time.time(), "rtc")
        return ClockReading(time.time(), "estimated")

    def uptime(self) -> float:
        """Seconds since the board's first process began, counted on through suspend."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self._began

    def _first_process(self) -> float:
        """When process 1 began, in seconds of CLOCK_BOOTTIME: field 22 of proc_pid_stat(5); 0 where it is hidden."""
        stat = _read(self._root / "proc/1/stat") or ""
        fields = stat.rpartition(")")[2].split()  # the second field, in parentheses, may hold anything
        return int(fields[19]) / os.sysconf("SC_CLK_TCK") if len(fields) > 19 else 0.0

    def _revision(self, path: Path) -> str:
        try:
            (code,) = struct.unpack(">I", path.read_bytes())
        except (OSError, struct.error):
            return "unknown"
        return f"{code:x}"

    def _macs(self) -> dict[str, str]:
        """Of interfaces with hardware behind them whose address was not made up at boot."""
        macs = {}
        for interface in sorted((self._root / "sys/class/net").glob("*")):
            mac = _read(interface / "address")
            made_up = _read(interface / "addr_assign_type") == _NET_ADDR_RANDOM
            if mac and (interface / "device").exists() and not made_up:
                macs[interface.name] = mac.lower()
        return macs

    def _medium(self) -> tuple[str | None, int]:
        """CID and size of the disk under the root file system."""
        device = self._root_disk()
        if device is None:
            return None, 0
        sectors = _read(device / "size")
        return _read(device / "device/cid"), int(sectors or 0) * 512  # sysfs counts in 512 bytes, whatever the disk

    def _wear(self) -> int | None:
        """JESD84-B51, EXT_CSD 268 and 269: tenths of the life of each kind of cell; 0 says nothing, 11 is over."""
        device = self._root_disk()
        if device is None:
            return None
        used = _number(_read(device / "device/life_time"), lambda text: max(int(word, 16) for word in text.split()))
        return min(used * 10, 100) if used else None

    def _radio(self) -> int | None:
        """The level in the first interface's line of /proc/net/wireless: name, status, link, level, noise, ..."""
        for line in (_read(self._root / "proc/net/wireless") or "").splitlines()[2:]:  # two lines of heading
            level = _number(line, lambda text: int(float(text.split()[3])))
            if level is not None and level < 0:  # otherwise not in dBm
                return level
        return None

    def _root_disk(self) -> Path | None:
        """Where sysfs describes the whole disk that the root file system lies on."""
        number = self._root_device()
        if number is None:
            return None
        device = (self._root / "sys/dev/block" / number).resolve()
        return device.parent if (device / "partition").exists() else device

    def _root_device(self) -> str | None:
        for line in (_read(self._root / "proc/self/mountinfo") or "").splitlines():
            words = line.split()
            if words[4] == "/":  # proc(5): id, parent, major:minor, root, mount point
                return words[2]
        return None

    def _meminfo(self, name: str) -> int:
        for line in (_read(self._root / "proc/meminfo") or "").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) * 1024
        return 0


def addresses(interfaces: Path = Path("/proc/net/if_inet6")) -> tuple[str, ...]:
    """The addresses that somebody else may reach this board at: IPv4 first, then global IPv6."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            if name == "lo":
                continue
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", os.fsencode(name)[:15]))
            except OSError:
                continue  # no IPv4 address (yet)
            found.append(socket.inet_ntoa(answer[20:24]))  # struct ifreq: name, then sockaddr_in
    for line in (_read(interfaces) or "").splitlines():
        packed, _, _, scope, _, name = line.split()
        if scope == _SCOPE_GLOBAL and name != "lo":
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(packed)))
    return tuple(found)
