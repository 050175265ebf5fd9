"""What the firmware reads from: a medium as a file or as bytes, and the partitions of its table (MBR).

Raspberry Pi's boot loaders read GPT, too; this one says that it does not. Partition types count: what is not marked as
FAT is not looked into.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from image.firmware.errors import NoBootError

SECTOR = 512
FAT_TYPES = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E})
_EXTENDED_TYPES = frozenset({0x05, 0x0F, 0x85})
_GPT = 0xEE
#: The partition walk ends at 8 and a reboot argument at 31, so no chain of logical partitions need be longer.
_LAST = 31


class Medium(Protocol):
    """Bytes at an offset; fewer than asked for at the end."""

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on.

        Raises:
            NoBootError: they cannot be read.
        """
        ...


class FileMedium:
    """A raw image file or a block device; a context manager that closes it.

    Raises:
        NoBootError: there is none, or it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NoBootError("there is no medium") from error
        except OSError as error:
            raise NoBootError(f"the medium cannot be opened: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on."""
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise NoBootError(f"the medium cannot be read at byte {offset}: {error.strerror}") from error


class BytesMedium:
    """A medium in memory: for tests that cut the power thousands of times, and for boot.img."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on."""
        return bytes(self._data[offset : offset + length])


@dataclass(frozen=True)
class Partition:
    """One partition: its number as Linux counts (primary 1 to 4, logical from 5), MBR type, start and size in bytes."""

    number: int
    type: int
    start: int
    size: int

    @property
    def fat(self) -> bool:
        """Whether the table says that it holds a FAT."""
        return self.type in FAT_TYPES


def partitions(medium: Medium) -> dict[int, Partition]:
    """The partitions of a medium by number. A chain of logical partitions ends where it is damaged.

    Raises:
        NoBootError: the medium has no partition table, or a GPT.
    """
    entries = _entries(medium, 0)
    if entries is None:
        raise NoBootError("no partition table: no bootable medium")
    found: dict[int, Partition] = {}
    for number, (kind, start, count) in enumerate(entries, 1):
        if kind == _GPT:
            raise NoBootError("the medium has a GPT, which this firmware does not read")
        if kind in _EXTENDED_TYPES:
            found |= {part.number: part for part in _logical(medium, start)}
        elif kind and start and count:
            found[number] = Partition(number, kind, start * SECTOR, count * SECTOR)
    return dict(sorted(found.items()))


def _logical(medium: Medium, extended: int) -> list[Partition]:
    """The logical partitions of an extended one that begins at this sector."""
    found: list[Partition] = []
    record, seen = extended, set[int]()
    while len(found) < _LAST - 4 and record not in seen:
        seen.add(record)
        entries = _entries(medium, record)
        if entries is None:
            break
        kind, start, count = entries[0]
        if kind and count:
            found.append(Partition(5 + len(found), kind, (record + start) * SECTOR, count * SECTOR))
        kind, following, _ = entries[1]
        if kind not in _EXTENDED_TYPES or not following:
            break
        record = extended + following
    return found


def _entries(medium: Medium, sector: int) -> list[tuple[int, int, int]] | None:
    """Type, first sector and sectors of a boot record's four entries; None if it is none."""
    record = medium.read(sector * SECTOR, SECTOR)
    if len(record) < SECTOR or record[510:] != b"\x55\xaa":
        return None
    return [struct.unpack_from("<4xB3xII", record, 446 + 16 * index) for index in range(4)]
