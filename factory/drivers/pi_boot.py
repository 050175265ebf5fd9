"""What a Pi's firmware does before the kernel: read the FAT partition and find kernel, initramfs and command line.

Only what our image needs of it, and nothing is forgiven that the firmware would not forgive. Documented under
raspberrypi.com/documentation/computers/config_txt.html.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from factory.drivers import qemu
from factory.errors import StationFault

_SECTOR = 512
_FAT_TYPES = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E})
_FILTER = re.compile(r"\[(?P<name>[^\]]*)\]")
_NAME = re.compile(r"[A-Za-z0-9._+/-]+")


class NoBootError(Exception):
    """The medium does not boot; the message is what the firmware would blink if it could."""


@dataclass(frozen=True)
class BootFiles:
    """What the firmware hands to the board's processor.

    Attributes:
        kernel: the kernel's file, copied off the medium.
        initramfs: the initramfs, copied off the medium; None where config.txt names none.
        command_line: from cmdline.txt.
    """

    kernel: Path
    initramfs: Path | None
    command_line: str


def read_boot_files(medium: Path, into: Path, board: str = "pi3") -> BootFiles:
    """Do what the firmware of a board (as config.txt's filters name it) does with a medium.

    Raises:
        NoBootError: the medium does not boot.
        StationFault: mtools is not installed.
    """
    qemu.program("mcopy")
    offset = _boot_partition(medium)
    config = parse_config(_copy(medium, offset, "config.txt", into).read_text(errors="replace"), board)
    prefix = config.get("os_prefix", "")
    kernel = _copy(medium, offset, prefix + config.get("kernel", "kernel8.img"), into)
    initramfs = None
    if "initramfs" in config:
        initramfs = _copy(medium, offset, prefix + config["initramfs"].split()[0], into)
    command_line = _copy(medium, offset, prefix + config.get("cmdline", "cmdline.txt"), into).read_text(
        errors="replace"
    )
    return BootFiles(kernel, initramfs, command_line.partition("\n")[0].strip())


def copy_file(medium: Path, name: str, into: Path) -> Path:
    """One file of the boot partition, by its name there.

    Raises:
        NoBootError: it is not there, or there is no such partition.
    """
    return _copy(medium, _boot_partition(medium), name, into)


def parse_config(text: str, board: str) -> Mapping[str, str]:
    """The settings of a config.txt that count for a board; a later line overrules an earlier one.

    `initramfs` is the one setting without an equals sign. Filters other than the board's name, `all` and `none` are
    taken as not met.
    """
    config: dict[str, str] = {}
    for line in _lines_for(text, board):
        name, sign, value = line.partition("=")
        if not sign and line.startswith("initramfs "):
            name, value = "initramfs", line.removeprefix("initramfs ")
        config[name.strip()] = value.strip()
    return config


def _lines_for(text: str, board: str) -> Iterator[str]:
    met = True
    for raw in text.splitlines():
        line = raw.strip()
        section = _FILTER.fullmatch(line)
        if section:
            met = section["name"].lower() in {"all", board}
        elif met and line and not line.startswith("#"):
            yield line


def _boot_partition(medium: Path) -> int:
    """Where the first FAT partition begins, in bytes."""
    try:
        with medium.open("rb") as file:
            record = file.read(_SECTOR)
    except FileNotFoundError as error:
        raise NoBootError("there is no medium") from error
    if len(record) < _SECTOR or record[510:] != b"\x55\xaa":
        raise NoBootError("no partition table: no bootable medium")
    for index in range(4):
        kind, start = struct.unpack_from("<4xB3xI4x", record, 446 + 16 * index)
        if kind in _FAT_TYPES:
            return int(start) * _SECTOR
    raise NoBootError("the medium has no FAT partition to boot from")


def _copy(medium: Path, offset: int, name: str, into: Path) -> Path:
    if not _NAME.fullmatch(name) or ".." in name:
        raise NoBootError(f"config.txt names a file that cannot be: {name!r}")
    target = into / name.rpartition("/")[2]
    target.unlink(missing_ok=True)
    try:
        qemu.run("mcopy", "-n", "-i", f"{medium}@@{offset}", f"::{name}", target)
    except StationFault as error:
        raise NoBootError(f"the boot partition has no {name}") from error
    return target
