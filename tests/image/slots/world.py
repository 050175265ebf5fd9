"""A unit on paper: one medium with two slots, an image in slot a, an older one in b, and a firmware that chooses.

The medium is one file with the partitions of the real disk, made small. Where the real unit has device nodes, the
board here has stretches of that file.
"""

import hashlib
import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from image import boot as boot_files
from image import bundle as host
from image import firmware, layout, recipe
from image.files.usr.lib.picket.slots import control, medium
from image.files.usr.lib.picket.slots.board import Board, Layout, Partition, Places, opposite
from image.files.usr.lib.picket.slots.bundle import NAMESPACE, Manifest, read_files
from image.files.usr.lib.picket.slots.slots import Slots

SECTOR = medium.SECTOR
PRODUCT = "picket"
HARDWARE = "raspberrypi,4-model-b"
#: The medium's signature.
DISK = "1234abcd"
KIB = 1024

#: What the firmware of that board looks for.
TREE = "bcm2711-rpi-4-b.dtb"
FIRMWARE = {"start4.elf": b"elf", "fixup4.dat": b"dat"}

AUTOBOOT = {"control": 64 * KIB, "boot-a": 48 * KIB, "boot-b": 48 * KIB, "root-a": 24 * KIB, "root-b": 24 * KIB}
PREFIX = {"boot": 96 * KIB, "root-a": 24 * KIB, "root-b": 24 * KIB}


def run(*words: str | Path, **options: Any) -> bytes:
    done: bytes = subprocess.run(words, check=True, capture_output=True, **options).stdout
    return done


def fat(path: Path, size: int, files: Mapping[str, bytes], bits: int = 12, entries: int = 16) -> bytes:
    """A FAT image as the build makes it."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    run("/usr/sbin/mkfs.fat", "-F", str(bits), "-s", "1", "-r", str(entries), "-i", "0badcafe", path)
    for name, data in files.items():
        source = path.with_name("source")
        source.write_bytes(data)
        folder, slash, _ = name.rpartition("/")
        if slash and subprocess.run(["mdir", "-i", path, f"::{folder}"], capture_output=True, check=False).returncode:
            run("mmd", "-i", path, f"::{folder}")
        run("mcopy", "-i", path, source, f"::{name}")
    return path.read_bytes()


@dataclass(frozen=True)
class Keys:
    """Whoever may sign images, and somebody else."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Keys":
        for name in ("vendor", "stranger"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name)
        words = (folder / "vendor.pub").read_text().split()
        allowed = f'image namespaces="{NAMESPACE}" {words[0]} {words[1]}\n'
        (folder / "signers").write_text(allowed)
        return cls(folder)

    @property
    def signers(self) -> Path:
        return self.folder / "signers"

    def sign(self, data: bytes, namespace: str, key: str = "vendor") -> bytes:
        return run("ssh-keygen", "-q", "-Y", "sign", "-f", self.folder / key, "-n", namespace, input=data)


@dataclass(frozen=True)
class Image:
    """What a slot may hold."""

    version: str
    security_version: int
    boot: bytes
    root: bytes
    bundle: bytes
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.version


def configs(how: str) -> dict[str, bytes]:
    """config.txt as the build writes it."""
    product = recipe.Recipe(PRODUCT, "1.0.0", (), (), (HARDWARE,), boot=recipe.BootSettings(how))
    return {name: text.encode() for name, text in boot_files.config_files(product, upstream=True).items()}


def make_image(folder: Path, keys: Keys, version: str, how: str, security_version: int = 1) -> Image:
    """An image and its bundle."""
    draw = random.Random(f"{version} {how}")
    folder.mkdir(parents=True)
    files = {"cmdline.txt": f"picket.verity={version}\n".encode(), "vmlinuz": draw.randbytes(9000),
             "initrd.img": b"initramfs", TREE: b"dtb"}  # fmt: skip
    if how == "autoboot":
        files |= FIRMWARE | configs(how)
        boot = fat(folder / "boot", AUTOBOOT["boot-a"], files)
    else:
        boot = host.pack_files([*files.items(), ("overlays/README", b"")])
        (folder / "boot").write_bytes(boot)
    root = draw.randbytes(20 * KIB)
    (folder / "root").write_bytes(root)
    fields = host.Fields(PRODUCT, version, security_version, 1, (HARDWARE,), how, DISK)
    built = host.build(folder / "boot", folder / "root", fields, keys.sign, folder / "out")
    return Image(version, security_version, boot, root, built.bundle.read_bytes(), built.manifest)


@dataclass(frozen=True)
class Kit:
    """What is made once for all tests."""

    keys: Keys
    images: Mapping[tuple[str, str], Image]
    controls: Mapping[str, bytes]

    @classmethod
    def make(cls, folder: Path) -> "Kit":
        keys = Keys.make(folder)
        images = {
            (how, version): make_image(folder / how / version, keys, version, how, security)
            for how in ("autoboot", "os-prefix")
            for version, security in (("0.9.0", 1), ("1.0.0", 1), ("1.1.0", 2), ("1.2.0", 2))
        }
        texts = layout.Layout.of(1, 1, 1, 1, 0, "autoboot").control_files()
        controls = {"autoboot": fat(folder / "control", AUTOBOOT["control"], texts)}
        texts = layout.Layout.of(1, 1, 1, 1, 0, "os-prefix").control_files() | configs("os-prefix") | FIRMWARE
        for slot in ("a", "b"):  # what a firmware looks for; what updates write is beside the medium, see World
            texts |= {f"{slot}/{name}": slot.encode() for name in ("vmlinuz", "initrd.img", "cmdline.txt", TREE)}
        controls["os-prefix"] = fat(folder / "control", PREFIX["boot"], texts)
        return cls(keys, images, controls)


@dataclass(frozen=True)
class MediumBoard(Board):
    """A board whose partitions are stretches of one file."""

    stretches: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def partition(self, name: str) -> Partition:
        return Partition(self.disk, *self.stretches[name])


class Flag:
    """A firmware's one-shot flag; a power cut clears it."""

    name = "flag"
    counted = False

    def __init__(self) -> None:
        self.armed = False

    def arm(self) -> None:
        self.armed = True

    def disarm(self) -> None:
        self.armed = False


class World:
    """The unit. `root` holds what a power cut may harm: `medium`, `data/system`, the boot files' FAT as a folder."""

    def __init__(self, root: Path, kit: Kit, how: str, *, counted: bool) -> None:
        self.root, self.kit, self.how = root, kit, how
        self.flag: control.OneTry = control.Counting() if counted else Flag()
        self.booted = "a"
        self.other_places = root.with_name(f"{root.name}-rest")
        self.other_places.mkdir(parents=True, exist_ok=True)
        self.places = replace(
            Places.under(self.other_places),
            data=root / "data/system",
            signers=kit.keys.signers,
            lock=self.other_places / "lock",
            reboot=self.other_places / "reboot-param",
        )
        sizes, at = AUTOBOOT if how == "autoboot" else PREFIX, 4096
        self.stretches = {}
        for name, size in sizes.items():
            self.stretches[name] = (at, size)
            at += size
        self.size = at

    @classmethod
    def make(cls, root: Path, kit: Kit, how: str, *, counted: bool) -> "World":
        world = cls(root, kit, how, counted=counted)
        (root / "data/system").mkdir(parents=True)
        content = bytearray(world.size)
        content[:SECTOR] = world.boot_record()

        def put(name: str, data: bytes) -> None:
            start = world.stretches[name][0]
            content[start : start + len(data)] = data

        put("control" if how == "autoboot" else "boot", kit.controls[how])
        (root / "fat").mkdir()
        for slot, version in (("a", "1.0.0"), ("b", "0.9.0")):
            image = kit.images[how, version]
            put(f"root-{slot}", image.root)
            if how == "autoboot":
                put(f"boot-{slot}", image.boot)
            else:
                unpack(image.boot, root / "fat" / slot)
        (root / "medium").write_bytes(content)
        return world

    def boot_record(self) -> bytes:
        """The partition table (MBR): the FATs are primary partitions, as on the real disk."""
        record = bytearray(SECTOR)
        fats = [self.stretches[name] for name in self.stretches if not name.startswith("root")]
        for index, (start, size) in enumerate(fats):
            struct.pack_into("<4xB3xII", record, 446 + 16 * index, 0x01, start // SECTOR, size // SECTOR)
        record[510:] = b"\x55\xaa"
        return bytes(record)

    # --- what runs

    def image(self, version: str) -> Image:
        return self.kit.images[self.how, version]

    def running(self) -> Image:
        """What is in the booted slot."""
        found = self.holds(self.booted)
        assert found is not None, f"slot {self.booted} boots and is not whole"
        return found

    def holds(self, slot: str) -> Image | None:
        """The image that is whole in a slot, boot files and root of the same one."""
        for (how, _), image in self.kit.images.items():
            if how == self.how and self.stretch(f"root-{slot}").startswith(image.root) and self._boots(slot, image):
                return image
        return None

    def _boots(self, slot: str, image: Image) -> bool:
        if self.how == "autoboot":
            return self.stretch(f"boot-{slot}").startswith(image.boot[: image.manifest.boot.size])
        folder = self.root / "fat" / slot
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return bool(names) and host.pack_files([(name, (folder / name).read_bytes()) for name in names]) == image.boot

    def stretch(self, name: str) -> bytes:
        start, size = self.stretches[name]
        with (self.root / "medium").open("rb") as file:
            return os.pread(file.fileno(), size, start)

    def slots(self) -> Slots:
        """As root's helper sees the unit."""
        image = self.running()
        partitions = {"control": 1, "boot-a": 2, "boot-b": 3, "root-a": 5, "root-b": 6}
        if self.how == "os-prefix":
            partitions = {"boot": 1, "root-a": 2, "root-b": 3}
        layout = Layout(PRODUCT, image.version, image.security_version, self.how, DISK, partitions)
        board = MediumBoard(layout, self.booted, self.root / "medium", (HARDWARE,), self.stretches)
        place = control.pick(board, self.places)[0]
        return Slots(self.places, board, place, self.flag, self._mounted, lambda _: None)

    @contextmanager
    def _mounted(self, partition: Partition) -> Iterator[Path]:
        assert partition.start == self.stretches["boot"][0]
        yield self.root / "fat"

    def install(self, version: str, progress: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
        """Hand a bundle over."""
        path = self.other_places / "bundle"
        path.write_bytes(self.image(version).bundle)
        with path.open("rb") as file:
            return self.slots().install(file.fileno(), progress)

    # --- the firmware

    def chosen(self) -> str:
        """The slot that an ordinary boot takes. Reads the text anywhere in the control file system, as no code does."""
        content = self.stretch("control" if self.how == "autoboot" else "boot")
        if self.how == "autoboot":
            found = re.findall(rb"\[all\]\ntryboot_a_b=1\nboot_partition=([23])\n", content)
            assert len(found) == 1, found
            return {b"2": "a", b"3": "b"}[found[0]]
        # slot.txt was copied before tryslot.txt, so it lies first
        found = re.findall(rb"os_prefix=([ab])/\n", content)
        assert len(found) == 2, found
        return str(found[0], "ascii")

    def tried(self) -> str:
        """The slot that a try takes."""
        if self.how == "autoboot":
            return opposite(self.chosen())
        return str(re.findall(rb"os_prefix=([ab])/\n", self.stretch("boot"))[1], "ascii")

    def firmware_says(self, *, tryboot: bool = False) -> str:
        """The slot that Raspberry Pi's firmware takes, as the virtual Pi's emulator has it."""
        with firmware.FileMedium(self.root / "medium") as card:
            choice = firmware.look(card, firmware.PI_4, firmware.Reset(tryboot=tryboot))
        if self.how == "autoboot":
            return {2: "a", 3: "b"}[choice.partition]
        return choice.os_prefix.strip("/")

    def boot(self, *, power_cut: bool = False) -> bool:
        """The board comes up; whether root's check wants it to restart."""
        armed = isinstance(self.flag, Flag) and self.flag.armed and not power_cut
        if isinstance(self.flag, Flag):
            self.flag.armed = False
        self.booted = self.tried() if armed else self.chosen()
        return self.slots().check()


def unpack(tar: bytes, folder: Path) -> None:
    """The files of an `os-prefix` boot member."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, start, size in read_files(lambda length, at: tar[at : at + length], 0, len(tar)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar[start : start + size])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
