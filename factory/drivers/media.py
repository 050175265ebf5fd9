"""Media that the station writes: files here; block devices in `blockdev`."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from factory.errors import StationFault


class FileMedium:
    """A file that stands for a medium: the virtual Pi's SD card, the simulated board's."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    @property
    def name(self) -> str:
        """Its path, seen from the folder that the station runs in."""
        return os.path.relpath(self._path)

    def discard(self) -> None:
        """Make all of it a hole."""
        os.ftruncate(self._descriptor, 0)
        os.ftruncate(self._descriptor, self.size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at `offset`."""
        view = memoryview(data)
        if offset + len(view) > self.size:
            raise StationFault(f"{self._path}: a write past its end at byte {offset}")
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            offset, view = offset + written, view[written:]

    def flush(self) -> None:
        """Write back, and forget what the page cache holds of it."""
        os.fsync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset`."""
        parts = []
        while length:
            part = os.pread(self._descriptor, length, offset)
            if not part:
                raise StationFault(f"{self._path}: the medium ends at byte {offset}")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)


class FileStorage:
    """A file of a given size in the place of a medium; made when it is first attached."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size

    @contextmanager
    def attach(self) -> Iterator[FileMedium]:
        """The file, locked against a second writer.

        Raises:
            StationFault: another process holds it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StationFault(
                    f"{self._path} is in use by another process", advice="Wait for it, or use another bench."
                ) from error
            os.ftruncate(descriptor, self._size)
            yield FileMedium(self._path, descriptor)
        finally:
            os.close(descriptor)
