"""What a power cut leaves of a FAT32: clusters that are free and have a name, and clusters in use that have none."""

import struct
from collections.abc import Iterator
from pathlib import Path

SECTOR = 512
_END = 0x0FFFFFF8
_FOLDER = 0x10


class Fat32:
    """A FAT32 with clusters of one sector, in a stretch of a file; what is changed is written by `close`."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._path, self._start = path, start
        with path.open("rb") as file:
            file.seek(start)
            self._data = bytearray(file.read(size))
        assert self._data[13] == 1
        self._reserved, self._copies = struct.unpack_from("<HB", self._data, 14)
        self._sectors, self._root = struct.unpack_from("<I4xI", self._data, 36)[0], self._long(44)

    def close(self) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._start)
            file.write(self._data)

    def used(self) -> int:
        """Clusters that are not free."""
        table = self._data[self._reserved * SECTOR :][: self._sectors * SECTOR]
        return sum(1 for (value,) in struct.iter_unpack("<I", table) if value) - 2

    def names(self) -> set[str]:
        """The short names in the root directory."""
        return {bytes(entry[:11]).decode() for _, entry in self._entries(self._root) if entry[11] != 0x08}

    def set_dirty(self) -> None:
        """As it is while it is mounted."""
        self._data[65] |= 1

    def free(self, name: str) -> int:
        """Free all clusters of a folder of the root directory, whose name stays; how many."""
        return self._free_tree(self._cluster(self._find(name)[1]))

    def forget(self, name: str) -> None:
        """Take a folder's name from the root directory; its clusters stay in use."""
        self._data[self._find(name)[0]] = 0xE5

    def _find(self, name: str) -> tuple[int, bytes]:
        return next((at, entry) for at, entry in self._entries(self._root) if entry[:11] == name.encode().ljust(11))

    def _free_tree(self, first: int) -> int:
        inside = [entry for _, entry in self._entries(first) if entry[11] != 0x0F and entry[:1] != b"."]
        freed = sum(
            self._free_tree(self._cluster(entry)) if entry[11] & _FOLDER else self._free_chain(self._cluster(entry))
            for entry in inside
        )
        return freed + self._free_chain(first)

    def _free_chain(self, cluster: int) -> int:
        chain = list(self._chain(cluster))
        for number in chain:
            for copy in range(self._copies):
                at = (self._reserved + copy * self._sectors) * SECTOR + 4 * number
                struct.pack_into("<I", self._data, at, 0)
        return len(chain)

    def _entries(self, first: int) -> Iterator[tuple[int, bytes]]:
        for cluster in self._chain(first):
            start = (self._reserved + self._copies * self._sectors + cluster - 2) * SECTOR
            for at in range(start, start + SECTOR, 32):
                entry = bytes(self._data[at : at + 32])
                if entry[0] not in {0, 0xE5}:
                    yield at, entry

    def _chain(self, cluster: int) -> Iterator[int]:
        while 2 <= cluster < _END:
            yield cluster
            cluster = self._long(self._reserved * SECTOR + 4 * cluster) & 0x0FFFFFFF

    def _cluster(self, entry: bytes) -> int:
        high, low = struct.unpack_from("<H4xH", entry, 20)
        return int(high << 16 | low)

    def _long(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._data, at)[0])
