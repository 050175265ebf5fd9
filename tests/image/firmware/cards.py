"""Small cards for the firmware, made by mkfs.vfat and mcopy."""

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

SBIN = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
needs_mtools = pytest.mark.skipif(
    shutil.which("mcopy") is None or shutil.which("mkfs.vfat", path=SBIN) is None,
    reason="mtools or dosfstools is not installed",
)
FAT32, LINUX, EXTENDED = 0x0C, 0x83, 0x05
SECTOR = 512

_NAMES = """
bootcode.bin start.elf start4.elf vmlinuz initrd.img
bcm2837-rpi-3-b.dtb bcm2837-rpi-3-b-plus.dtb bcm2837-rpi-3-a-plus.dtb bcm2837-rpi-cm3-io3.dtb
bcm2837-rpi-zero-2-w.dtb bcm2711-rpi-4-b.dtb bcm2711-rpi-400.dtb bcm2711-rpi-cm4.dtb bcm2711-rpi-cm4s.dtb
bcm2712-rpi-5-b.dtb bcm2712-rpi-cm5-cm5io.dtb bcm2712-rpi-500.dtb
"""
#: What makes a partition start on every board, each file with its name as content.
SYSTEM = {name: name.encode() for name in _NAMES.split()} | {
    "config.txt": b"arm_64bit=1\nupstream_kernel=1\nkernel=vmlinuz\ninitramfs initrd.img followkernel\n",
    "cmdline.txt": b"root=/dev/x quiet\nsecond line\n",
}


def fat(files: Mapping[str, bytes], *, kibibytes: int = 512, bits: int = 12, cluster: int = 1) -> bytes:
    """A FAT file system with these files; folders by slashes."""
    return _fat(tuple(files.items()), kibibytes, bits, cluster)


@functools.lru_cache(maxsize=64)
def _fat(files: tuple[tuple[str, bytes], ...], kibibytes: int, bits: int, cluster: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        image, tree = Path(folder, "fat"), Path(folder, "tree")
        with image.open("wb") as file:
            file.truncate(kibibytes * 1024)
        mkfs = shutil.which("mkfs.vfat", path=SBIN) or ""
        subprocess.run([mkfs, "-F", str(bits), "-s", str(cluster), image], check=True, capture_output=True)
        tree.mkdir()
        for name, data in files:
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if files:
            subprocess.run(["mcopy", "-s", "-i", image, *sorted(tree.iterdir()), "::"], check=True)
        return image.read_bytes()


def disk(primary: Sequence[tuple[int, bytes]], logical: Sequence[tuple[int, bytes]] = ()) -> bytearray:
    """A disk with up to three primary partitions and, in the fourth, any number of logical ones."""
    image = bytearray(SECTOR)
    entries = []
    for kind, data in primary:
        entries.append((kind, len(image) // SECTOR, len(data) // SECTOR))
        image += data
    if logical:
        extended = len(image) // SECTOR
        entries.append((EXTENDED, extended, sum(len(data) // SECTOR + 1 for _, data in logical)))
        for index, (kind, data) in enumerate(logical):
            here = len(image) // SECTOR
            links = [(kind, 1, len(data) // SECTOR)]
            if index + 1 < len(logical):
                following = here + 1 + len(data) // SECTOR
                links.append((EXTENDED, following - extended, len(logical[index + 1][1]) // SECTOR + 1))
            image += _record(links) + data
    image[:SECTOR] = _record(entries)
    return image


def _record(entries: Sequence[tuple[int, int, int]]) -> bytes:
    table = b"".join(struct.pack("<4xB3xII", *entry) for entry in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def autoboot(text: str) -> bytes:
    """An autoboot.txt as the product writes it: one sector."""
    return text.encode().ljust(SECTOR, b"\n")
