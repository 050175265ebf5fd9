"""Which image runs, on which board, and where its partitions are."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .faults import Fault

SLOTS: Final = ("a", "b")


@dataclass(frozen=True)
class Places:
    """Where things lie on a unit.

    Attributes:
        layout: what the build wrote about the image.
        signers: who may sign bundles.
        booted: directory in which the initramfs says what it found: `slot`, `disk`.
        data: root's own directory on the data partition.
        lock: held by whoever changes something.
        reboot: what systemd passes to the kernel with the next reboot (reboot(2), RESTART2).
        device_tree: as the firmware gave it to the kernel.
        ports: virtio ports by name.
        devices: device nodes.
        mount: where the boot files' file system is mounted while it is written (control "os-prefix").
        clocks: files whose time of change has passed, whatever the clock says: the image's, and the last one known.
    """

    layout: Path
    signers: Path
    booted: Path
    data: Path
    lock: Path
    reboot: Path
    device_tree: Path
    ports: Path
    devices: Path
    mount: Path
    clocks: tuple[Path, ...]

    @classmethod
    def under(cls, root: Path) -> "Places":
        """Those of a unit whose file system hangs at `root`."""
        return cls(
            layout=root / "usr/lib/picket/layout.json",
            signers=root / "usr/share/picket/os-signers",
            booted=root / "run/picket-system",
            data=root / "data/system",
            lock=root / "run/picket-slots.lock",
            reboot=root / "run/systemd/reboot-param",
            device_tree=root / "proc/device-tree",
            ports=root / "sys/class/virtio-ports",
            devices=root / "dev",
            mount=root / "run/picket-slots",
            clocks=(root / "usr/lib/clock-epoch", root / "var/lib/systemd/timesync/clock"),
        )


@dataclass(frozen=True)
class Partition:
    """A stretch of a medium; on a unit it is a device of its own and begins at 0. In bytes."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class Layout:
    """What the build says about the image that runs.

    Attributes:
        name, version, security_version: of the image.
        control: `autoboot` or `os-prefix`.
        disk: the medium's signature, 8 hex digits.
        partitions: name → number.
    """

    name: str
    version: str
    security_version: int
    control: str
    disk: str
    partitions: Mapping[str, int]


def parse_layout(data: bytes) -> Layout:
    """The layout in layout.json.

    Raises:
        Fault: io; the image is broken.
    """
    try:
        value = json.loads(data)
        if value["format"] != 1 or value["control"] not in {"autoboot", "os-prefix"}:
            raise ValueError("an unknown format or control")
        partitions = {str(name): int(number) for name, number in value["partitions"].items()}
        needed = {"root-a", "root-b"} | (
            {"control", "boot-a", "boot-b"} if value["control"] == "autoboot" else {"boot"}
        )
        if not needed <= set(partitions):
            raise ValueError("partitions are missing")
        security = int(value["security_version"])
        name, version, disk = str(value["name"]), str(value["version"]), str(value["disk"])
        return Layout(name, version, security, value["control"], disk, partitions)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Fault("io", f"the image's layout cannot be used: {error}") from None


@dataclass(frozen=True)
class Board:
    """The board and what it has booted.

    Attributes:
        layout: of the image that runs.
        slot: `a` or `b`, which runs.
        disk: the medium's device.
        compatible: the board's device-tree strings.
    """

    layout: Layout
    slot: str
    disk: Path
    compatible: tuple[str, ...]

    @classmethod
    def read(cls, places: Places) -> "Board":
        """What runs now.

        Raises:
            Fault: io; this boot was not one from a slot.
        """
        try:
            layout = parse_layout(places.layout.read_bytes())
            slot = (places.booted / "slot").read_text().strip()
            disk = Path((places.booted / "disk").read_text().strip())
            compatible = (places.device_tree / "compatible").read_bytes()
        except (OSError, ValueError) as error:
            raise Fault("io", f"what was booted is not known: {error}") from error
        if slot not in SLOTS:
            raise Fault("io", f"no slot is called {slot[:20]!r}")
        return cls(
            layout, slot, disk, tuple(name.decode("ascii", "replace") for name in compatible.split(b"\0") if name)
        )

    @property
    def other(self) -> str:
        """The slot that does not run."""
        return opposite(self.slot)

    def partition(self, name: str) -> Partition:
        """The partition that the layout calls so.

        Raises:
            Fault: io; it is not there.
        """
        number = self.layout.partitions[name]
        path = self.disk.with_name(f"{self.disk.name}{'p' if self.disk.name[-1:].isdigit() else ''}{number}")
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return Partition(path, 0, os.lseek(handle, 0, os.SEEK_END))
            finally:
                os.close(handle)
        except OSError as error:
            raise Fault("io", f"the partition {name} cannot be opened: {error}") from error


def opposite(slot: str) -> str:
    """The other one of two."""
    return "b" if slot == "a" else "a"
