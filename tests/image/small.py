"""A small image, whole and good: every kind of partition is in it, made by the build's own functions in a second."""

import datetime as dt
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from image import bmap, disk
from image.disk import FAT32_LBA, LINUX, MEBIBYTE
from image.layout import autoboot_txt
from image.manifest import ImageManifest, Origin, Package, Partition, Support, shipped
from tests.image.firmware.cards import SYSTEM

SIGNATURE = 0x1234ABCD
EPOCH = 1_735_689_600
PACKAGES = (Package("debian", "systemd", "257.9-1"), Package("python", "tuf", "6.0.0"))

CONTROL, BOOT_A, BOOT_B, ROOT_A, ROOT_B, DATA = 1, 2, 3, 5, 6, 7
PRIMARY = [(FAT32_LBA, 36 * MEBIBYTE)] * 3
LOGICAL = [(LINUX, 4 * MEBIBYTE), (LINUX, 4 * MEBIBYTE), (LINUX, 32 * MEBIBYTE)]
FILLED = {CONTROL: "control", BOOT_A: "boot", ROOT_A: "root", DATA: "data"}

_TOOLS = ("mksquashfs", "unsquashfs", "veritysetup", "mkfs.vfat", "mcopy", "mke2fs", "zstd")
needs_tools = pytest.mark.skipif(
    not all(shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") for name in _TOOLS),
    reason=f"one of {', '.join(_TOOLS)} is not installed",
)

#: A root file system: paths and content.
ROOT: Mapping[str, str] = {
    "etc/hostname": "small\n",
    "etc/machine-id": "",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\npicket:x:900:900::/var/lib/picket:/bin/sh\n",
    "etc/shadow": "root:*:20000::::::\npicket:*:20000::::::\n",
    "usr/bin/agent": "#!/bin/sh\n",
    # As in a program that reads keys: the line alone.
    "usr/lib/libkeys.so": "-----BEGIN PRIVATE KEY-----\0-----END PRIVATE KEY-----\0",
}

Change = Callable[[Path], object]


def build(
    folder: Path,
    *,
    root: Change = lambda _: None,
    boot: Change = lambda _: None,
    control: Change = lambda _: None,
    version: str = "1.0",
    packages: tuple[Package, ...] = PACKAGES,
) -> ImageManifest:
    """Make an image with its description in a folder; the changes are made to the trees before they are packed."""
    folder.mkdir(parents=True)
    slices = {part.number: part for part in disk.lay_out(PRIMARY, LOGICAL)}
    trees = {name: folder / f"tree-{name}" for name in ("root", "boot", "control")}
    _write(trees["root"], {name: text.encode() for name, text in ROOT.items()})
    (trees["root"] / "usr/bin/agent").chmod(0o755)
    (trees["root"] / "bin").symlink_to("usr/bin")
    root(trees["root"])
    disk.make_squashfs(trees["root"], folder / "root", EPOCH)
    verity = disk.add_verity(folder / "root", b"salt" * 8)
    command_line = f"picket.disk={SIGNATURE:08x} picket.verity={verity} ro\n"
    _write(trees["boot"], {**SYSTEM, "cmdline.txt": command_line.encode()})
    boot(trees["boot"])
    _write(trees["control"], {"autoboot.txt": autoboot_txt(BOOT_A, BOOT_B)})
    control(trees["control"])
    for number in (CONTROL, BOOT_A):
        name = FILLED[number]
        disk.make_fat(trees[name], folder / name, slices[number].size, name.upper(), number, EPOCH)
    disk.make_data(folder / "data", slices[DATA].size, "data", disk.identifier("small"), EPOCH)
    image = folder / f"small-{version}.img"
    disk.assemble(image, SIGNATURE, [*slices.values()], {number: folder / name for number, name in FILLED.items()})
    (folder / f"small-{version}.bmap").write_text(bmap.write(bmap.create(image)))
    kinds = {"control": "vfat", "boot": "vfat", "root": "squashfs", "data": "ext4"}
    manifest = ImageManifest(
        name="small",
        version=version,
        agent="0.1.0",
        kernel="6.12",
        security_version=1,
        epoch=EPOCH,
        base=Origin("debian", "trixie", "arm64", "1" * 64),
        boards=("bcm2711-rpi-4-b", "bcm2712-rpi-5-b"),
        hardware=("raspberrypi,4-model-b",),
        control="autoboot",
        verity=verity,
        support=Support(dt.date(9999, 12, 31), "https://example.com/security"),
        factory_key=None,
        image=shipped(image),
        compressed=None,
        bmap=shipped(folder / f"small-{version}.bmap"),
        bundle=None,
        partitions=tuple(
            Partition(
                part.number,
                kinds.get(FILLED.get(part.number, ""), "none"),
                FILLED.get(part.number, "none").upper(),
                part.start,
                part.size,
                "none",
                disk.partuuid(SIGNATURE, part.number),
            )
            for part in slices.values()
            if part.type != disk.EXTENDED_LBA
        ),
        packages=packages,
        directory=folder,
    )
    (folder / f"small-{version}.json").write_text(manifest.dump())
    return manifest


def _write(tree: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
