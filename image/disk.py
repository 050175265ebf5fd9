"""Partitions and the disk, as plain files: no loop device, no mount, no privilege.

An MBR holds four partitions; the fourth may be extended, and then holds logical ones, numbered from 5. Each logical
partition has a boot record of its own before it, and that names the next (EBR; Linux block/partitions/msdos.c).
"""

import math
import os
import re
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO

from image.errors import ImageError
from image.run import run

SECTOR = 512
MEBIBYTE = 1024 * 1024

VERITY_BLOCK = 4096

#: Partitions begin at multiples of this: SD cards erase in groups of 4 MiB.
ALIGNMENT = 4 * MEBIBYTE

FAT32_LBA = 0x0C
EXTENDED_LBA = 0x0F
LINUX = 0x83

_PRIMARIES = 4

#: Names of ours hang below this one, so that every identifier follows from what it belongs to.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "image.picket")


def identifier(*names: str) -> uuid.UUID:
    """The UUID of something of this image: the same names, the same UUID."""
    return uuid.uuid5(_NAMESPACE, "/".join(names))


@dataclass(frozen=True)
class Slice:
    """A partition's number, its MBR type, and its place on the disk in bytes."""

    number: int
    type: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.size


def lay_out(primary: Sequence[tuple[int, int]], logical: Sequence[tuple[int, int]] = ()) -> list[Slice]:
    """Places for partitions of (type, size), one behind the other, each aligned.

    Logical ones come behind the primary ones, each with room for its boot record before it, inside an extended
    partition, which is in the list as well.

    Raises:
        ImageError: an MBR does not hold that many.
    """
    if not 1 <= len(primary) + bool(logical) <= _PRIMARIES:
        raise ImageError(f"an MBR holds one to four primary partitions, not {len(primary) + bool(logical)}")
    slices = []
    start = ALIGNMENT
    for number, (kind, size) in enumerate(primary, start=1):
        slices.append(Slice(number, kind, start, aligned(size)))
        start = slices[-1].end
    inner = []
    end = start
    for number, (kind, size) in enumerate(logical, start=_PRIMARIES + 1):
        inner.append(Slice(number, kind, end + ALIGNMENT, aligned(size)))
        end = inner[-1].end
    if inner:
        slices.append(Slice(len(primary) + 1, EXTENDED_LBA, start, end - start))
    return [*slices, *inner]


def aligned(size: int) -> int:
    """The size rounded up to whole units of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def partuuid(signature: int, index: int) -> str:
    """How Linux names a partition of an MBR disk, counted from 1 (block/partitions/msdos.c)."""
    return f"{signature:08x}-{index:02x}"


def records(signature: int, slices: Sequence[Slice]) -> dict[int, bytes]:
    """The disk's boot records by their place in bytes: the master's at 0, and one before each logical partition.

    Addresses by cylinder, head and sector are given as "too large", as every tool writes them for LBA disks.

    Raises:
        ImageError: this cannot be said in an MBR.
    """
    if not 0 < signature < 1 << 32:
        raise ImageError(f"a disk signature has 32 bits and is not 0: {signature:#x}")
    primary = [part for part in slices if part.number <= _PRIMARIES]
    logical = [part for part in slices if part.number > _PRIMARIES]
    extended = [part for part in primary if part.type == EXTENDED_LBA]
    if not primary or len(extended) != bool(logical):
        raise ImageError("logical partitions need one extended partition around them, and it needs them")
    for part in slices:
        if part.start % SECTOR or part.size % SECTOR or not part.size:
            raise ImageError(f"a partition must begin and end on a sector: {part}")
        if part.end // SECTOR >= 1 << 32:
            raise ImageError(f"a partition ends behind what an MBR can address: {part}")
    found = {0: _record(signature, {part.number - 1: _entry(part.type, part.start, part.size) for part in primary})}
    for part, following in zip_longest(logical, logical[1:]):
        place = part.start - ALIGNMENT
        entries = {0: _entry(part.type, ALIGNMENT, part.size)}
        if following is not None:  # counted from the beginning of the extended partition
            behind = following.start - ALIGNMENT
            entries[1] = _entry(EXTENDED_LBA, behind - extended[0].start, following.end - behind)
        found[place] = _record(0, entries)
    return found


def _record(signature: int, entries: Mapping[int, bytes]) -> bytes:
    table = b"".join(entries.get(index, bytes(16)) for index in range(4))
    return bytes(440) + struct.pack("<IH", signature, 0) + table + b"\x55\xaa"


def _entry(kind: int, start: int, size: int) -> bytes:
    beyond = b"\xfe\xff\xff"
    return struct.pack("<B3sB3sII", 0, beyond, kind, beyond, start // SECTOR, size // SECTOR)


def read_table(read: Callable[[int], bytes]) -> tuple[int, list[Slice]]:
    """Disk signature and partitions of a disk, logical ones included.

    Args:
        read: the sector at a place in bytes.

    Raises:
        ImageError: there is no master boot record, or the chain of logical partitions is damaged.
    """
    sector = read(0)
    (signature,) = struct.unpack_from("<I", sector.ljust(SECTOR, b"\0"), 440)
    slices = [Slice(index + 1, kind, start, size) for index, kind, start, size in _entries(sector)]
    extended = next((part for part in slices if part.type in _EXTENDED), None)
    place = extended.start if extended else None
    number = _PRIMARIES + 1
    while extended is not None and place is not None:
        if number > _MOST or not extended.start <= place < extended.end:
            raise ImageError("the chain of logical partitions leaves its extended partition, or does not end")
        following = None
        for _, kind, start, size in _entries(read(place)):
            if kind in _EXTENDED:
                following = extended.start + start
            else:
                slices.append(Slice(number, kind, place + start, size))
                number += 1
        if following is not None and following <= place:
            raise ImageError("the chain of logical partitions turns back")
        place = following
    return signature, slices


#: Types that say "extended" (Linux block/partitions/msdos.c), and the most partitions that are looked for.
_EXTENDED = frozenset({0x05, EXTENDED_LBA, 0x85})
_MOST = 60


def _entries(sector: bytes) -> Iterator[tuple[int, int, int, int]]:
    if len(sector) < SECTOR or sector[510:512] != b"\x55\xaa":
        raise ImageError("the disk does not begin with a master boot record, or its table is damaged")
    for index in range(4):
        _, _, kind, _, start, count = struct.unpack_from("<B3sB3sII", sector, 446 + 16 * index)
        if kind:
            yield index, kind, start * SECTOR, count * SECTOR


# --- file systems -------------------------------------------------------------------------------------------------


def make_fat(tree: Path, output: Path, size: int, label: str, serial: int, epoch: int) -> None:
    """A FAT32 file system with the files of `tree`."""
    output.unlink(missing_ok=True)
    with output.open("wb") as file:
        file.truncate(size)
    # --invariant first: behind -i it would overrule it. One sector for a cluster keeps a small one a FAT32.
    run("mkfs.vfat", "--invariant", "-F", "32", "-s", "1", "-i", f"{serial:08X}", "-n", label, output)
    entries = sorted(tree.rglob("*"))
    for path in (tree, *entries):
        os.utime(path, (epoch, epoch))
    # One directory after the other: `mcopy -s` takes what is in one in the order in which this machine's disk has it.
    times = {"SOURCE_DATE_EPOCH": str(epoch), "TZ": "UTC"}
    for folder in (tree, *(path for path in entries if path.is_dir())):
        place = f"::/{folder.relative_to(tree)}" if folder != tree else "::"
        if folder != tree:
            run("mmd", "-i", output, place, env=times)
        if files := sorted(path for path in folder.iterdir() if not path.is_dir()):
            run("mcopy", "-m", "-i", output, *files, place, env=times)


def fat_size(tree: Path) -> int:
    """Bytes of a FAT32 file system that surely holds these files: whole clusters, both tables, and some more."""
    clusters = sum(-(-path.stat().st_size // SECTOR) + 1 for path in tree.rglob("*"))
    return clusters * (SECTOR + 2 * 4) + MEBIBYTE


def make_data(output: Path, size: int, label: str, name: uuid.UUID, epoch: int) -> None:
    """An empty ext4 file system that can grow to 256 GiB while it is in use.

    Inode tables and the journal are written out: a flashed medium keeps old data where the image has holes.
    """
    output.unlink(missing_ok=True)
    features = f"hash_seed={name},resize={1 << 26},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-T", "default", "-b", "4096", "-I", "256", "-m", "1", "-L", label,
        "-U", name, "-J", "size=8", "-E", features, output, f"{size // 1024}k",
        env={"E2FSPROGS_FAKE_TIME": str(epoch), "SOURCE_DATE_EPOCH": str(epoch)})  # fmt: skip


def make_squashfs(tree: Path, output: Path, epoch: int) -> int:
    """A squashfs (zstd) of `tree` with its owners, modes and extended attributes; returns its size.

    Every time in it is `epoch`, and in `tree` from now on: what a checkout, a copy or a machine's clock says is no part
    of it, and the same tree gives the same bytes.
    """
    output.unlink(missing_ok=True)
    for path in (tree, *tree.rglob("*")):
        os.utime(path, (epoch, epoch), follow_symlinks=False)
    run("mksquashfs", tree, output, "-comp", "zstd", "-Xcompression-level", "9", "-noappend", "-quiet", "-no-progress",
        env={"SOURCE_DATE_EPOCH": str(epoch), "TZ": "UTC"})  # fmt: skip
    return output.stat().st_size


@dataclass(frozen=True)
class Verity:
    """How the kernel checks every block of a file system that it reads (Linux admin-guide/device-mapper/verity).

    Attributes:
        root_hash: SHA-256 over all, by the tree of hashes behind the data.
        salt: of each hash.
        blocks: of 4096 bytes each that hold data; the tree follows.
    """

    root_hash: str
    salt: str
    blocks: int

    def __str__(self) -> str:
        return f"{self.root_hash}:{self.salt}:{self.blocks}"


def add_verity(image: Path, salt: bytes) -> Verity:
    """Append the tree of hashes to a file system's file."""
    size = image.stat().st_size
    blocks = math.ceil(size / VERITY_BLOCK)
    os.truncate(image, blocks * VERITY_BLOCK)
    said = run("veritysetup", "format", "--no-superblock", "--hash", "sha256", "--data-block-size", VERITY_BLOCK,
               "--hash-block-size", VERITY_BLOCK, "--data-blocks", blocks, "--hash-offset", blocks * VERITY_BLOCK,
               "--salt", salt.hex(), image, image)  # fmt: skip
    found = re.search(r"^Root hash:\s+([0-9a-f]{64})$", said, re.MULTILINE)
    if found is None:
        raise ImageError(f"veritysetup names no root hash: {said!r:.200}")
    whole = image.stat().st_size
    os.truncate(image, -(-whole // VERITY_BLOCK) * VERITY_BLOCK)
    return Verity(found[1], salt.hex(), blocks)


# --- the disk -----------------------------------------------------------------------------------------------------


def assemble(output: Path, signature: int, slices: Sequence[Slice], files: Mapping[int, Path]) -> None:
    """The disk: boot records and the partitions that have a file (by number), holes kept as holes."""
    with output.open("wb") as disk:
        disk.truncate(max(part.end for part in slices))
        for place, record in records(signature, slices).items():
            disk.seek(place)
            disk.write(record)
        for part in slices:
            if part.number in files:
                _copy(files[part.number], disk, part)
        disk.flush()
        os.fsync(disk.fileno())


def _copy(path: Path, disk: IO[bytes], part: Slice) -> None:
    if path.stat().st_size > part.size:
        raise ImageError(
            f"{path.name} has {path.stat().st_size >> 20} MiB and its partition {part.size >> 20}: give it more in the"
            " recipe's [disk]"
        )
    with path.open("rb") as source:
        for start, end in data_ranges(source.fileno()):
            source.seek(start)
            disk.seek(part.start + start)
            remaining = end - start
            while remaining:
                block = source.read(min(remaining, MEBIBYTE))
                disk.write(block)
                remaining -= len(block)


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
