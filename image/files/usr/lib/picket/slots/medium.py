"""Every write that must survive a power cut, and nothing else that writes.

A medium may keep what was written since the last fsync, lose it, or keep any part of it in units of a sector. What
decides anything is therefore one sector, or one rename, between two fsyncs.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .board import Partition
from .faults import Fault

SECTOR: Final = 512
PIECE: Final = 1 << 20
#: So much is written between two fsyncs: a slow card keeps giving signs of life, and memory stays free.
_STRIDE: Final = 8 << 20


class Target:
    """A partition that is written."""

    def __init__(self, partition: Partition, handle: int) -> None:
        self._partition = partition
        self._handle = handle

    def write(self, data: bytes, offset: int) -> None:
        """Write there; not yet durably."""
        if offset + len(data) > self._partition.size:
            raise Fault("too-large", f"{self._partition.path} ends before {offset + len(data)}")
        view = memoryview(data)
        while view:
            done = os.pwrite(self._handle, view, self._partition.start + offset)
            view, offset = view[done:], offset + done

    def sync(self) -> None:
        """Make durable what was written."""
        os.fsync(self._handle)

    def read(self, size: int, offset: int) -> bytes:
        """Up to so many bytes."""
        return os.pread(self._handle, min(size, self._partition.size - offset), self._partition.start + offset)

    def digest(self, size: int, progress: Callable[[int], None]) -> str:
        """Hex SHA-256 of the first `size` bytes as they are on the medium, not in the cache."""
        os.posix_fadvise(self._handle, self._partition.start, size, os.POSIX_FADV_DONTNEED)
        found = hashlib.sha256()
        for offset in range(0, size, PIECE):
            piece = self.read(min(PIECE, size - offset), offset)
            found.update(piece)
            progress(len(piece))
        return found.hexdigest()


@contextmanager
def opened(partition: Partition, *, alone: bool) -> Iterator[Target]:
    """A partition to write.

    Args:
        partition: which one.
        alone: refuse one that is in use. The kernel holds what is mounted or under dm-verity, so whatever went wrong
            with telling the slots apart, the running one is not written.

    Raises:
        Fault: busy, io.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if alone else 0)
    try:
        handle = os.open(partition.path, flags)
    except OSError as error:
        raise Fault("busy" if error.errno == errno.EBUSY else "io", f"{partition.path}: {error}") from error
    try:
        yield Target(partition, handle)
    except OSError as error:
        raise Fault("io", f"{partition.path}: {error}") from error
    finally:
        os.close(handle)


def read(partition: Partition, size: int, offset: int) -> bytes:
    """Up to so many bytes of a partition."""
    handle = os.open(partition.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(handle, max(0, min(size, partition.size - offset)), partition.start + offset)
    finally:
        os.close(handle)


def write_sector(partition: Partition, data: bytes, offset: int) -> None:
    """Change one sector in one go: after a power cut it is the old one or the new one.

    Raises:
        Fault: io.
    """
    if len(data) != SECTOR or offset % SECTOR:
        raise ValueError(f"{len(data)} bytes at {offset} are not a sector")
    with opened(partition, alone=False) as target:
        target.write(data, offset)
        target.sync()


def copy(read_from: Callable[[int, int], bytes], span: tuple[int, int], write: Callable[[bytes, int], None],
         sync: Callable[[], None], progress: Callable[[int], None]) -> str:  # fmt: skip
    """Carry a stretch of a file somewhere, and say what its SHA-256 is.

    Raises:
        Fault: bad-bundle; the file got shorter meanwhile.
    """
    start, size = span
    found = hashlib.sha256()
    for offset in range(0, size, PIECE):
        length = min(PIECE, size - offset)
        piece = read_from(length, start + offset)
        if len(piece) != length:
            raise Fault("bad-bundle", "the bundle is cut off")
        found.update(piece)
        write(piece, offset)
        if (offset + PIECE) % _STRIDE == 0:
            sync()
        progress(length)
    sync()
    return found.hexdigest()


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file, durably: after a power cut there is the old one or the new one.

    Raises:
        OSError: the disk is full or read-only; the old one is untouched.
    """
    new = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)  # of a write that was cut off  # noqa: PTH108
    create_file(new, [data], mode)
    os.replace(new, path)  # noqa: PTH105 - beside its fsyncs, so that all are seen together
    sync_directory(path.parent)


def create_file(path: Path, pieces: Iterator[bytes] | list[bytes], mode: int) -> None:
    """Create a file whose content is durable, though not yet its name."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Create a directory, durably but for its parent."""
    os.mkdir(path, 0o755)  # noqa: PTH102
    sync_directory(path)


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it; not durably. It is no fault if it is not there."""
    if not path.is_dir():
        return
    with os.scandir(path) as entries:
        inside = sorted((entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for member, folder in inside:
        if folder:
            remove_tree(Path(member))
        else:
            os.unlink(member)  # noqa: PTH108
    os.rmdir(path)  # noqa: PTH106


def remove_file(path: Path) -> None:
    """Remove a file; not durably."""
    os.unlink(path)  # noqa: PTH108


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
