"""Reads files out of a FAT12, FAT16 or FAT32, as the firmware does: by name, whatever its case.

Written after Microsoft's "FAT: General Overview of On-Disk Format" (fatgen103). It only reads, starts no program and
trusts no number that it reads: a damaged file system gives a NoBootError, never another exception or an endless loop.
A power-cut test calls it thousands of times.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from image.firmware.errors import NoBootError
from image.firmware.medium import Medium, Partition

_BLOCK = 65536
_ENTRY = 32
_DIRECTORY_BYTES = 65536 * _ENTRY  # a directory may not be larger
_VOLUME, _FOLDER, _LONG = 0x08, 0x10, 0x0F
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10


@dataclass(frozen=True)
class Entry:
    """A file or folder: its name (the long one, if it has one), first cluster, size in bytes."""

    name: str
    short: str
    folder: bool
    cluster: int
    size: int


class Fat:
    """A FAT file system in a window of a medium.

    Args:
        medium: where it lies.
        start: its first byte there.
        size: what the partition leaves it, in bytes.

    Raises:
        NoBootError: there is no FAT file system, or its first sector is damaged.
    """

    def __init__(self, medium: Medium, start: int, size: int) -> None:
        self._medium = medium
        self._start = start
        sector = medium.read(start, 512)
        if len(sector) < 512 or sector[510:] != b"\x55\xaa":
            raise NoBootError("the partition holds no FAT file system")
        (unit, per_cluster, reserved, tables, roots, total16, fat16) = struct.unpack_from("<HBHBHHxH", sector, 11)
        (total32, fat32) = struct.unpack_from("<II", sector, 32)
        total, length = total16 or total32, fat16 or fat32
        if (
            unit not in {512, 1024, 2048, 4096}
            or not per_cluster
            or per_cluster & (per_cluster - 1)
            or not (reserved and tables and length)
            or total * unit > size
        ):
            raise NoBootError("the partition holds no FAT file system")
        self._table = reserved * unit
        self._root = self._table + tables * length * unit
        self._root_bytes = roots * _ENTRY
        self._data = self._root + -(-self._root_bytes // unit) * unit
        self._cluster = unit * per_cluster
        clusters = (total * unit - self._data) // self._cluster
        if clusters < 1:
            raise NoBootError("the FAT file system has no room for a file")
        self._bits = 32 if not fat16 else 16 if clusters > 4084 else 12
        self._last = min(clusters + 1, length * unit * 8 // self._bits - 1)
        (self._root_cluster,) = struct.unpack_from("<I", sector, 44) if self._bits == 32 else (0,)
        self._blocks: dict[int, bytes] = {}
        self._listings: dict[int, list[Entry]] = {}

    @classmethod
    def of(cls, medium: Medium, partition: Partition) -> "Fat":
        """The file system of a partition."""
        return cls(medium, partition.start, partition.size)

    def find(self, path: str) -> Entry | None:
        """The file or folder at a path from the root, with slashes; None where there is none.

        Raises:
            NoBootError: a folder on the way is damaged.
        """
        here = self._top
        for part in path.split("/"):
            if part in {"", "."}:
                continue
            if not here.folder:
                return None
            wanted = part.casefold()
            for entry in self._list(here):
                if wanted in {entry.name.casefold(), entry.short.casefold()}:
                    here = entry
                    break
            else:
                return None
        return here

    def has(self, path: str) -> bool:
        """Whether there is a file (no folder) of that name."""
        entry = self.find(path)
        return entry is not None and not entry.folder

    def names(self, path: str = "") -> list[str]:
        """Names in a folder, as they are written; empty where there is none."""
        entry = self.find(path)
        return [one.name for one in self._list(entry)] if entry is not None and entry.folder else []

    def walk(self) -> Iterator[tuple[str, Entry]]:
        """Every file and folder by its path; a folder that is linked into itself is entered once."""
        waiting, seen = [("", self._top)], {self._top.cluster}
        while waiting:
            prefix, folder = waiting.pop()
            for entry in self._list(folder):
                path = f"{prefix}{entry.name}"
                yield path, entry
                if entry.folder and entry.cluster not in seen:
                    seen.add(entry.cluster)
                    waiting.append((f"{path}/", entry))

    def read(self, path: str, limit: int | None = None) -> bytes | None:
        """A file's bytes, or its first `limit`; None where there is no such file.

        Raises:
            NoBootError: the file is damaged.
        """
        entry = self.find(path)
        if entry is None or entry.folder:
            return None
        length = entry.size if limit is None else min(entry.size, limit)
        parts, missing = [], length
        for offset, run in self._runs(entry, length):
            part = self._medium.read(self._start + offset, min(run, missing))
            parts.append(part)
            missing -= len(part)
        if missing:
            raise NoBootError(f"{path} reaches behind the end of the medium")
        return b"".join(parts)

    def check(self, path: str) -> None:
        """Follow a file's clusters to its end, without reading it.

        Raises:
            NoBootError: they do not lead there.
        """
        entry = self.find(path)
        if entry is not None and not entry.folder:
            for _ in self._runs(entry, entry.size):
                pass

    # --- inside ----------------------------------------------------------------------------------------------------

    @cached_property
    def _top(self) -> Entry:
        return Entry("", "", True, self._root_cluster, 0)

    def _runs(self, entry: Entry, length: int) -> Iterator[tuple[int, int]]:
        """Where `length` bytes of a file lie, as (offset, bytes) in pieces that hang together."""
        left, cluster = -(-length // self._cluster), entry.cluster
        if left > self._last:
            raise NoBootError(f"{entry.name} is damaged: it is larger than its file system")
        while left > 0:
            first = cluster
            count = 0
            while True:
                if not 2 <= cluster <= self._last:
                    raise NoBootError(f"{entry.name} is damaged: its clusters end early")
                count += 1
                left -= 1
                if not left:
                    break
                following = self._next(cluster)
                if following != cluster + 1:
                    cluster = following
                    break
                cluster = following
            yield self._data + (first - 2) * self._cluster, count * self._cluster

    def _next(self, cluster: int) -> int:
        """The cluster behind one; out of range where a chain ends or is damaged."""
        bit = cluster * self._bits
        block, where = divmod(bit // 8, _BLOCK)
        if block not in self._blocks:
            # Four bytes more: an entry of FAT12 may lie across the border of two blocks.
            self._blocks[block] = self._medium.read(self._start + self._table + block * _BLOCK, _BLOCK + 4)
        raw = int.from_bytes(self._blocks[block][where : where + 4], "little")
        if self._bits == 12:
            return raw >> 4 & 0xFFF if bit % 8 else raw & 0xFFF
        return raw & 0xFFFF if self._bits == 16 else raw & 0x0FFFFFFF

    def _folder_bytes(self, folder: Entry) -> Iterator[bytes]:
        """A folder cluster by cluster: it has no size, its chain ends."""
        if not folder.cluster:  # of FAT12 and FAT16 the root lies at its own place; ".." of FAT32 is not followed
            yield self._medium.read(self._start + self._root, self._root_bytes)
            return
        cluster, seen = folder.cluster, set[int]()
        while 2 <= cluster <= self._last and cluster not in seen and len(seen) * self._cluster < _DIRECTORY_BYTES:
            seen.add(cluster)
            yield self._medium.read(self._start + self._data + (cluster - 2) * self._cluster, self._cluster)
            cluster = self._next(cluster)

    def _list(self, folder: Entry) -> list[Entry]:
        if folder.cluster not in self._listings:
            self._listings[folder.cluster] = list(self._entries(folder))
        return self._listings[folder.cluster]

    def _entries(self, folder: Entry) -> Iterator[Entry]:
        long: list[bytes] = []
        for block in self._folder_bytes(folder):
            for offset in range(0, len(block) - _ENTRY + 1, _ENTRY):
                raw = block[offset : offset + _ENTRY]
                if raw[0] == 0:
                    return
                if raw[0] == 0xE5:
                    long.clear()
                elif raw[11] & 0x3F == _LONG:
                    if raw[0] & 0x40:
                        long.clear()
                    long.append(raw)
                else:
                    if not raw[11] & _VOLUME and raw[0] != ord("."):
                        yield self._entry(raw, long)
                    long.clear()

    def _entry(self, raw: bytes, long: list[bytes]) -> Entry:
        high, low, size = struct.unpack_from("<H4xHI", raw, 20)
        cluster = low | (high << 16 if self._bits == 32 else 0)
        short = _short_name(raw)
        return Entry(_long_name(raw, long) or short, short, bool(raw[11] & _FOLDER), cluster, size)


def _short_name(raw: bytes) -> str:
    """The name of 8 and 3 letters; Windows NT keeps in byte 12 which half is in small letters."""
    base, extension = (part.decode("cp437").rstrip(" ") for part in (raw[:8], raw[8:11]))
    if raw[0] == 0x05:
        base = "\u03c3" + base[1:]  # 0xE5 in code page 437, which at this place would mean "deleted"
    base = base.lower() if raw[12] & _LOWER_BASE else base
    extension = extension.lower() if raw[12] & _LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base


def _long_name(raw: bytes, long: list[bytes]) -> str:
    """The long name in the entries before a short one; empty where they do not belong to it or are damaged."""
    checksum = 0
    for letter in raw[:11]:
        checksum = ((checksum & 1) << 7 | checksum >> 1) + letter & 0xFF
    count = len(long)
    if [one[0] & 0x3F for one in long] != list(range(count, 0, -1)) or any(one[13] != checksum for one in long):
        return ""
    data = b"".join(one[1:11] + one[14:26] + one[28:32] for one in reversed(long))
    text = data.decode("utf-16-le", errors="replace")
    return text.partition("\0")[0]
