"""Which partition is what: the one table that the build, the initramfs and the unit's root helper go by.

With control `autoboot`, for boards whose boot loader chooses a partition:

    1 control    FAT: autoboot.txt, which says the slot to boot, and the factory's mark
    2 boot-a     FAT: a slot's kernel, initramfs, device trees and firmware
    3 boot-b
    5 root-a     a slot's root: squashfs with the hash tree of dm-verity behind it
    6 root-b
    7 data       ext4: what a unit keeps; grows to the end of the medium at the first boot

With control `os-prefix`, for those whose firmware knows directories only (Pi 3, Zero 2 W):

    1 boot       FAT: firmware, config.txt and what it includes; a slot's kernel, initramfs and device trees in a/ or b/
    2 root-a
    3 root-b
    4 data

The FAT partitions come first, and in an MBR, because that is what every Pi's firmware boots from. A new image has slot
`a`; `b` is empty until the first update. The two are alike to the bit: what is in them never names the slot.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from image import disk
from image.disk import MEBIBYTE, Slice

FORMAT: Final = 1
AUTOBOOT: Final = "autoboot"
OS_PREFIX: Final = "os-prefix"

#: What chooses the slot is on the first partition, whatever the control.
CONTROL: Final = 1

_NUMBERS: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType({
    AUTOBOOT: {"control": CONTROL, "boot-a": 2, "boot-b": 3, "root-a": 5, "root-b": 6, "data": 7},
    OS_PREFIX: {"boot": CONTROL, "root-a": 2, "root-b": 3, "data": 4},
})  # fmt: skip

#: FAT32 begins at 65525 clusters, of one sector here.
CONTROL_BYTES = 36 * MEBIBYTE

#: What chooses the slot has one size for ever: a slot is switched by writing this one sector anew, in place.
SECTOR_BYTES = 512

#: A medium carries it until its unit is sealed.
FACTORY_MARK = b"This image starts in factory mode until it is sealed.\n"


@dataclass(frozen=True)
class Layout:
    """The partitions of an image.

    Attributes:
        control: `autoboot` or `os-prefix`.
        signature: of the disk; the kernel's command line names it.
        slices: by number.
        agent: numeric user of the agent, who owns its releases.
    """

    control: str
    signature: int
    slices: tuple[Slice, ...]
    agent: int

    @classmethod
    def of(
        cls, signature: int, boot_bytes: int, root_bytes: int, data_bytes: int, agent: int, control: str = AUTOBOOT
    ) -> "Layout":
        """Lay the partitions out; `boot_bytes` and `root_bytes` are for one slot."""
        roots = [(disk.LINUX, size) for size in (root_bytes, root_bytes, data_bytes)]
        if control == OS_PREFIX:
            return cls(control, signature, tuple(disk.lay_out([(disk.FAT32_LBA, 2 * boot_bytes), *roots])), agent)
        boots = [(disk.FAT32_LBA, size) for size in (CONTROL_BYTES, boot_bytes, boot_bytes)]
        return cls(control, signature, tuple(disk.lay_out(boots, roots)), agent)

    @property
    def numbers(self) -> Mapping[str, int]:
        """The partitions' numbers by name."""
        return _NUMBERS[self.control]

    @property
    def holds_control(self) -> str:
        """The name of the partition with the choice of the slot and the factory's mark."""
        return "boot" if self.control == OS_PREFIX else "control"

    @property
    def holds_boot(self) -> str:
        """The name of the partition with the boot files of slot a."""
        return "boot" if self.control == OS_PREFIX else "boot-a"

    @property
    def disk_signature(self) -> str:
        """The disk's signature, as units and bundles write it."""
        return f"{self.signature:08x}"

    def part(self, name: str) -> Slice:
        """A partition by its name."""
        (found,) = (each for each in self.slices if each.number == self.numbers[name])
        return found

    def name(self, number: int) -> str | None:
        """The name of a partition; None for one that only holds others."""
        return next((name for name, each in self.numbers.items() if each == number), None)

    def variables(self) -> dict[str, object]:
        """What /init of the initramfs is told: `-` is no letter of a shell's variable."""
        named = {name.replace("-", "_"): number for name, number in self.numbers.items() if name != "control"}
        return {
            "control": self.control,
            "control_part": self.numbers[self.holds_control],
            **named,
            "agent": self.agent,
        }

    def description(self, name: str, version: str, security_version: int, hardware: tuple[str, ...]) -> str:
        """layout.json, for root's helper on the unit."""
        value = {
            "format": FORMAT,
            "name": name,
            "version": version,
            "security_version": security_version,
            "control": self.control,
            "disk": self.disk_signature,
            "hardware": list(hardware),
            "partitions": dict(self.numbers),
        }
        return json.dumps(value, indent=1) + "\n"

    def control_files(self) -> dict[str, bytes]:
        """What chooses slot a on a new medium, and the factory's mark, by name."""
        if self.control == OS_PREFIX:
            return {"slot.txt": slot_txt("a"), "tryslot.txt": slot_txt("b"), "factory": FACTORY_MARK}
        return {
            "autoboot.txt": autoboot_txt(self.numbers["boot-a"], self.numbers["boot-b"]),
            "factory": FACTORY_MARK,
        }


def autoboot_txt(boot: int, other: int) -> bytes:
    """autoboot.txt, exactly one sector (raspberrypi.com/documentation/computers/config_txt.html#autoboottxt).

    Args:
        boot: the partition to boot.
        other: ... once, when the firmware is asked to try (`tryboot`).
    """
    text = f"[all]\ntryboot_a_b=1\nboot_partition={boot}\n[tryboot]\nboot_partition={other}\n"
    return text.encode().ljust(SECTOR_BYTES, b"\n")


def slot_txt(slot: str) -> bytes:
    """What config.txt includes, and tryboot.txt with the slot to try: exactly one sector."""
    return f"os_prefix={slot}/\n".encode().ljust(SECTOR_BYTES, b"\n")
