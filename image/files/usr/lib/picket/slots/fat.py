"""Finds a file of one sector in the root directory of a FAT file system, so that it can be changed in place.

Read-only and pure but for `read`. Layout after Microsoft's "FAT: General Overview of On-Disk Format" 1.03.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final

from .faults import Fault

SECTOR: Final = 512
_ENTRY: Final = 32
_LONG_NAME: Final = 0x0F
_NO_FILE: Final = 0x08 | 0x10
_END_FAT32: Final = 0x0FFFFFF8

Read = Callable[[int, int], bytes]


def find(read: Read, name: str) -> int:
    """Where the only sector of a file begins, in bytes from the start of the file system.

    Args:
        read: so many bytes, at an offset.
        name: 8.3, for example `autoboot.txt`.

    Raises:
        Fault: control; no FAT, no such file, or one that has not exactly 512 bytes.
    """
    boot = read(SECTOR, 0)
    if len(boot) < SECTOR or boot[510:] != b"\x55\xaa":
        raise Fault("control", "there is no FAT file system")
    per_sector, per_cluster, reserved, fats, entries = struct.unpack_from("<HBHBH", boot, 11)
    fat_sectors, root = struct.unpack_from("<H", boot, 22)[0], 0
    sectors = struct.unpack_from("<H", boot, 19)[0] or struct.unpack_from("<I", boot, 32)[0]
    if not fat_sectors:
        fat_sectors, root = struct.unpack_from("<I", boot, 36)[0], struct.unpack_from("<I", boot, 44)[0]
    if per_sector != SECTOR or not per_cluster or not fats or not fat_sectors:
        raise Fault("control", "there is no FAT file system with sectors of 512 bytes")
    directory = (reserved + fats * fat_sectors) * SECTOR
    data = directory + -(-entries * _ENTRY // SECTOR) * SECTOR
    clusters = (sectors - data // SECTOR) // per_cluster

    def place(cluster: int) -> int:
        if not 2 <= cluster < clusters + 2:
            raise Fault("control", "the FAT file system is damaged")
        return int(data + (cluster - 2) * per_cluster * SECTOR)

    def pieces() -> Iterator[bytes]:
        """The root directory."""
        if not root:  # FAT12 and FAT16 have it in one piece before the clusters
            yield read(entries * _ENTRY, directory)
            return
        cluster, left = root, 4096
        while cluster < _END_FAT32 and left:
            yield read(per_cluster * SECTOR, place(cluster))
            cluster = struct.unpack("<I", read(4, reserved * SECTOR + cluster * 4))[0] & 0x0FFFFFFF
            left -= 1

    first, size = _search(pieces(), name)
    if size != SECTOR:
        raise Fault("control", f"{name} has {size} bytes, and only {SECTOR} are changed in one go")
    return place(first)


def _search(directory: Iterator[bytes], name: str) -> tuple[int, int]:
    """First cluster and size of a file."""
    stem, _, suffix = name.upper().partition(".")
    wanted = stem.encode().ljust(8) + suffix.encode().ljust(3)
    for piece in directory:
        for start in range(0, len(piece) - _ENTRY + 1, _ENTRY):
            entry = piece[start : start + _ENTRY]
            if not entry[0]:
                break
            if entry[:11] == wanted and entry[11] != _LONG_NAME and not entry[11] & _NO_FILE:
                high, low, size = (*struct.unpack_from("<H", entry, 20), *struct.unpack_from("<HI", entry, 26))
                return (high << 16) | low, size
    raise Fault("control", f"there is no {name}")
