"""Partitions and the disk, as plain files: no loop device, no mount, no privilege."""

import os
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.errors import ImageError
from image.run import run

SECTOR = 512
MEBIBYTE = 1024 * 1024

#: Partitions begin at multiples of this: SD cards erase in groups of 4 MiB.
ALIGNMENT = 4 * MEBIBYTE

FAT32_LBA = 0x0C
LINUX = 0x83

#: Names of ours hang below this one, so that every identifier follows from what it belongs to.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "image.picket")


def identifier(*names: str) -> uuid.UUID:
    """The UUID of something of this image: the same names, the same UUID."""
    return uuid.uuid5(_NAMESPACE, "/".join(names))


@dataclass(frozen=True)
class Slice:
    """A partition's place on the disk, in bytes, and its MBR type."""

    type: int
    start: int
    size: int


def lay_out(sizes: Sequence[tuple[int, int]]) -> list[Slice]:
    """Places for partitions of (type, size), one behind the other, each aligned."""
    slices = []
    start = ALIGNMENT
    for kind, size in sizes:
        whole = _aligned(size)
        slices.append(Slice(kind, start, whole))
        start += whole
    return slices


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def partuuid(signature: int, index: int) -> str:
    """How Linux names a partition of an MBR disk, counted from 1 (block/partitions/msdos.c)."""
    return f"{signature:08x}-{index:02x}"


def mbr(signature: int, slices: Sequence[Slice]) -> bytes:
    """A master boot record with up to four primary partitions.

    Addresses by cylinder, head and sector are given as "too large", as every tool writes them for LBA disks.
    """
    if not 1 <= len(slices) <= 4:
        raise ImageError(f"an MBR holds one to four primary partitions, not {len(slices)}")
    if not 0 < signature < 1 << 32:
        raise ImageError(f"a disk signature has 32 bits and is not 0: {signature:#x}")
    table = b""
    for part in slices:
        if part.start % SECTOR or part.size % SECTOR or not part.size:
            raise ImageError(f"a partition must begin and end on a sector: {part}")
        if (part.start + part.size) // SECTOR >= 1 << 32:
            raise ImageError(f"a partition ends behind what an MBR can address: {part}")
        beyond = b"\xfe\xff\xff"
        table += struct.pack("<B3sB3sII", 0, beyond, part.type, beyond, part.start // SECTOR, part.size // SECTOR)
    return bytes(440) + struct.pack("<IH", signature, 0) + table.ljust(64, b"\0") + b"\x55\xaa"


def read_mbr(sector: bytes) -> tuple[int, list[Slice]]:
    """Disk signature and partitions of a master boot record.

    Raises:
        ImageError: it is none.
    """
    if len(sector) < SECTOR or sector[510:512] != b"\x55\xaa":
        raise ImageError("the disk does not begin with a master boot record")
    (signature,) = struct.unpack_from("<I", sector, 440)
    slices = []
    for index in range(4):
        _, _, kind, _, start, count = struct.unpack_from("<B3sB3sII", sector, 446 + 16 * index)
        if kind:
            slices.append(Slice(kind, start * SECTOR, count * SECTOR))
    return signature, slices


def make_fat(tree: Path, output: Path, size: int, label: str, serial: int, epoch: int) -> None:
    """A FAT32 file system with the files of `tree`."""
    output.unlink(missing_ok=True)
    with output.open("wb") as file:
        file.truncate(size)
    # --invariant first: behind -i it would overrule it.
    run("mkfs.vfat", "--invariant", "-F", "32", "-i", f"{serial:08X}", "-n", label, output)
    run("mcopy", "-s", "-m", "-i", output, *sorted(tree.iterdir()), "::", env={"SOURCE_DATE_EPOCH": str(epoch)})


def make_ext4(tree: Path, output: Path, spare: int, label: str, name: uuid.UUID, epoch: int) -> int:
    """An ext4 file system with the files of `tree` and `spare` free bytes; returns its size.

    Inode tables and the journal are written out: a flashed medium keeps old data where the image has holes.
    """
    entries, blocks = _measure(tree)
    inodes = entries + 16384
    journal = 8
    size = _aligned(int(blocks * 4096 * 1.02) + inodes * 256 + journal * MEBIBYTE + spare)
    output.unlink(missing_ok=True)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", inodes, "-m", "1", "-L", label,
        "-U", name, "-J", f"size={journal}",
        "-E", f"hash_seed={name},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0",
        "-d", tree, output, f"{size // 1024}k",
        env={"E2FSPROGS_FAKE_TIME": str(epoch), "SOURCE_DATE_EPOCH": str(epoch)})  # fmt: skip
    return size


def _measure(tree: Path) -> tuple[int, int]:
    """Entries below `tree`, and the 4 KiB blocks that they take."""
    entries = blocks = 0
    stack = [tree]
    while stack:
        with os.scandir(stack.pop()) as found:
            for entry in found:
                entries += 1
                if entry.is_dir(follow_symlinks=False):
                    blocks += 1
                    stack.append(Path(entry.path))
                elif not entry.is_symlink():
                    blocks += -(-entry.stat(follow_symlinks=False).st_size // 4096)
    return entries, blocks


def assemble(output: Path, signature: int, slices: Sequence[Slice], files: Sequence[Path]) -> None:
    """The disk: boot record and partitions, holes kept as holes."""
    with output.open("wb") as disk:
        disk.truncate(slices[-1].start + slices[-1].size)
        disk.write(mbr(signature, slices))
        for part, path in zip(slices, files, strict=True):
            if path.stat().st_size > part.size:
                raise ImageError(f"{path.name} is larger than its partition")
            with path.open("rb") as source:
                for start, end in data_ranges(source.fileno()):
                    source.seek(start)
                    disk.seek(part.start + start)
                    remaining = end - start
                    while remaining:
                        block = source.read(min(remaining, MEBIBYTE))
                        disk.write(block)
                        remaining -= len(block)
        disk.flush()
        os.fsync(disk.fileno())


def data_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data: pairs of start and end."""
    size = os.fstat(descriptor).st_size
    offset = 0
    while offset < size:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: nothing but a hole behind this offset
        offset = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, offset
