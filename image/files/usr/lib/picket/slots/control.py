"""Where the choice of the slot is kept, and how one try of the other is made. Each unit has one of either.

    kept in     autoboot.txt              the firmware reads a boot partition's number from it (Pi 4 and later)
                slot.txt, tryslot.txt     config.txt and tryboot.txt include them; they say os_prefix (any Pi)

    one try by  the reboot's argument     "0 tryboot"; the kernel of Raspberry Pi OS tells the firmware
                the emulator's mailbox    a virtio port that stands for the firmware's own
                counting                  no kernel of Debian's can ask for a try: the other slot is made the chosen one
                                          at once, and made the unchosen one again after some boots without `keep`

Every file is one sector, changed in place on the partition's device: after a power cut it is the old one or the new
one, and nothing else of the file system was ever in danger.
"""

import contextlib
import os
import re
import select
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from . import fat, medium
from .board import SLOTS, Board, Partition, Places, opposite
from .faults import Fault

#: The first bootloader of the Pi 4 that knows `tryboot_a_b` (rpi-eeprom, 2022-11-25), in seconds since 1970.
_KNOWS_TRYBOOT_A_B: Final = 1669334400

_PORT: Final = "picket.firmware"
_MAILBOX_SECONDS: Final = 10.0


class Place(Protocol):
    """Where the choice is kept."""

    def kept(self) -> str | None:
        """The slot that an ordinary boot takes; None if that cannot be read."""
        ...

    def keep(self, slot: str) -> None:
        """Let an ordinary boot take this slot, durably; one sector is written, or none if it does already."""
        ...

    def aim(self, slot: str) -> None:
        """Let a try boot this slot, durably; an ordinary boot stays as it is."""
        ...


class OneTry(Protocol):
    """How the next boot becomes a try."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def counted(self) -> bool:
        """Whether there is no such thing, and boots are counted instead."""
        ...

    def arm(self) -> None:
        """The next reboot is a try."""
        ...

    def disarm(self) -> None:
        """It is none."""
        ...


def in_one_sector(text: str) -> bytes:
    """A file that fills its sector."""
    return text.encode().ljust(medium.SECTOR, b"\n")


@dataclass(frozen=True)
class _File:
    """A file of one sector."""

    partition: Partition
    name: str

    def read(self) -> bytes:
        return self._read()[1]

    def write(self, data: bytes) -> None:
        offset, found = self._read()
        if found != data:
            medium.write_sector(self.partition, data, offset)

    def _read(self) -> tuple[int, bytes]:
        """Where its sector is, and what that holds."""
        try:
            offset = fat.find(partial(medium.read, self.partition), self.name)
            return offset, medium.read(self.partition, medium.SECTOR, offset)
        except OSError as error:
            raise Fault("control", f"{self.name} cannot be read: {error}") from error


# --- where ---------------------------------------------------------------------------------------------------------

_AUTOBOOT: Final = re.compile(rb"\[all\]\ntryboot_a_b=1\nboot_partition=(\d+)\n\[tryboot\]\nboot_partition=(\d+)\n+")


def autoboot_text(kept: int, tried: int) -> bytes:
    """autoboot.txt (https://www.raspberrypi.com/documentation/computers/config_txt.html#autoboot-txt)."""
    return in_one_sector(f"[all]\ntryboot_a_b=1\nboot_partition={kept}\n[tryboot]\nboot_partition={tried}\n")


class Autoboot:
    """autoboot.txt in a FAT of its own."""

    def __init__(self, control: Partition, boot_a: int, boot_b: int) -> None:
        self._file = _File(control, "autoboot.txt")
        self._numbers = dict(zip(SLOTS, (boot_a, boot_b), strict=True))

    def kept(self) -> str | None:
        """The slot in [all]."""
        with contextlib.suppress(Fault):
            if match := _AUTOBOOT.fullmatch(self._file.read()):
                return next((slot for slot, number in self._numbers.items() if number == int(match[1])), None)
        return None

    def keep(self, slot: str) -> None:
        """This slot in [all], the other one in [tryboot]."""
        self._file.write(autoboot_text(self._numbers[slot], self._numbers[opposite(slot)]))

    def aim(self, slot: str) -> None:
        """This slot in [tryboot], the other one in [all]."""
        self.keep(opposite(slot))


_PREFIX: Final = re.compile(rb"os_prefix=([ab])/\n+")


def prefix_text(slot: str) -> bytes:
    """slot.txt and tryslot.txt."""
    return in_one_sector(f"os_prefix={slot}/\n")


class Prefix:
    """slot.txt and tryslot.txt beside the firmware's own files."""

    def __init__(self, boot: Partition) -> None:
        self._slot = _File(boot, "slot.txt")
        self._try = _File(boot, "tryslot.txt")

    def kept(self) -> str | None:
        """The slot in slot.txt."""
        with contextlib.suppress(Fault):
            if match := _PREFIX.fullmatch(self._slot.read()):
                return match[1].decode()
        return None

    def keep(self, slot: str) -> None:
        """slot.txt; tryslot.txt waits for the next try."""
        self._slot.write(prefix_text(slot))

    def aim(self, slot: str) -> None:
        """tryslot.txt."""
        self._try.write(prefix_text(slot))


# --- how -----------------------------------------------------------------------------------------------------------


class RebootArgument:
    """The kernel of Raspberry Pi OS looks for ` tryboot` in the argument of the reboot, and tells the firmware.

    systemd hands the content of /run/systemd/reboot-param to the kernel with an ordinary reboot. `SuccessAction=reboot`
    without `RebootArgument=` leaves that file alone (`update_reboot_parameter_and_warn(NULL, true)`).
    """

    name = "reboot argument"
    counted = False

    def __init__(self, path: Path) -> None:
        self._path = path

    def arm(self) -> None:
        """With the next reboot, and only if it is an ordinary one: a reset boots the chosen slot."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("0 tryboot")

    def disarm(self) -> None:
        """Without an argument."""
        self._path.unlink(missing_ok=True)


class Mailbox:
    """The virtual Pi's firmware behind a virtio port: a line for a line."""

    name = "emulator's mailbox"
    counted = False

    def __init__(self, port: Path) -> None:
        self._port = port

    def arm(self) -> None:
        """The flag is set at once."""
        self._say(b"tryboot 1\n")

    def disarm(self) -> None:
        """The flag is cleared."""
        self._say(b"tryboot 0\n")

    def _say(self, line: bytes) -> None:
        try:
            handle = os.open(self._port, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.write(handle, line)
                answer = b""
                while not answer.endswith(b"\n"):
                    if not select.select([handle], [], [], _MAILBOX_SECONDS)[0]:
                        raise Fault("control", "the emulator's mailbox does not answer")
                    piece = os.read(handle, 64)
                    if not piece:
                        raise Fault("control", "nobody is behind the emulator's mailbox")
                    answer += piece
            finally:
                os.close(handle)
        except OSError as error:
            raise Fault("control", f"the emulator's mailbox cannot be used: {error}") from error
        if answer != b"ok\n":
            raise Fault("control", f"the emulator's mailbox answers {answer[:40]!r}")


class Counting:
    """There is no such thing as a try: boots are counted in slots.json."""

    name = "counting"
    counted = True

    def arm(self) -> None:
        """Nothing to tell anybody."""

    def disarm(self) -> None:
        """Nothing to tell anybody."""


def pick(board: Board, places: Places) -> tuple[Place, OneTry]:
    """What this unit has."""
    layout = board.layout
    if layout.control == "autoboot":
        numbers = (layout.partitions["boot-a"], layout.partitions["boot-b"])
        return Autoboot(board.partition("control"), *numbers), one_try(places, autoboot=True)
    return Prefix(board.partition("boot")), one_try(places, autoboot=False)


def one_try(places: Places, *, autoboot: bool) -> OneTry:
    """By what is there: the emulator's port, or the driver that only Raspberry Pi's kernels have.

    Args:
        places: where to look.
        autoboot: the firmware must know `tryboot_a_b`; else any that knows tryboot.txt will do, and all do.
    """
    for entry in sorted(places.ports.iterdir()) if places.ports.is_dir() else ():
        with contextlib.suppress(OSError):
            if (entry / "name").read_text().strip() == _PORT:
                return Mailbox(places.devices / entry.name)
    if not (places.devices / "vcio").exists():
        return Counting()
    if autoboot and _built(places) < _KNOWS_TRYBOOT_A_B:
        return Counting()
    return RebootArgument(places.reboot)


def _built(places: Places) -> int:
    """When the board's bootloader was built; 0 for boards without one, and for one that does not say."""
    try:
        data = (places.device_tree / "chosen/bootloader/build-timestamp").read_bytes()
        return int(struct.unpack(">I", data)[0])
    except (OSError, struct.error):
        return 0
