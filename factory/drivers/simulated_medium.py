"""The simulated board's medium: in the station's reader a file with bytes; in the board, what it boots from.

The image is shaped as `image.sample` makes it: a partition table, and in its first partition a tar with the root file
system. Unpacked into a folder, that is what the running board keeps its files in.
"""

import io
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from factory.drivers.media import FileMedium, FileStorage
from factory.errors import StationFault

SECTOR = 512


class NoBootError(Exception):
    """The medium holds nothing that boots."""


def unpack(image: Path, root: Path) -> None:
    """Unpack the root file system of an image into `root`, unless it lies there already.

    Raises:
        NoBootError: the medium holds no such thing.
    """
    if root.exists():
        return
    try:
        content = _first_partition(image)
        unfinished = root.with_name(f"{root.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                _put(archive, member, unfinished)
    except (OSError, tarfile.TarError) as error:
        raise NoBootError(f"the first partition holds no system: {error}") from error
    unfinished.rename(root)


def _put(archive: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    path = root / member.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        path.symlink_to(member.linkname)
    elif (content := archive.extractfile(member)) is not None:
        path.write_bytes(content.read())
        path.chmod(member.mode)


def _first_partition(image: Path) -> bytes:
    with image.open("rb") as medium:
        record = medium.read(SECTOR)
        if len(record) < SECTOR or record[510:] != b"\x55\xaa":
            raise NoBootError("no partition table: no bootable medium")
        start, sectors = struct.unpack_from("<II", record, 446 + 8)
        medium.seek(start * SECTOR)
        return medium.read(sectors * SECTOR)


class SimulatedStorage:
    """The board's medium while it is in the station's reader.

    Args:
        path: the file with its bytes.
        size: its capacity.
        in_use: whether the board has power.
        erased: called when all is erased.
        bit_flips: whether a bit changes after the write.
    """

    def __init__(
        self, path: Path, size: int, *, in_use: Callable[[], bool], erased: Callable[[], None], bit_flips: bool
    ) -> None:
        self._file = FileStorage(path, size)
        self._in_use = in_use
        self._erased = erased
        self._bit_flips = bit_flips
        self.path = path

    @contextmanager
    def attach(self) -> Iterator["_SimulatedMedium"]:
        """The medium.

        Raises:
            StationFault: the board has power: its medium is in use.
        """
        if self._in_use():
            raise StationFault("the board has power: its medium cannot be written", advice="Cut the power first.")
        with self._file.attach() as medium:
            yield _SimulatedMedium(medium, self._erased, bit_flips=self._bit_flips)


class _SimulatedMedium:
    """A medium that can lose a bit once it is flushed."""

    def __init__(self, medium: FileMedium, erased: Callable[[], None], *, bit_flips: bool) -> None:
        self._medium = medium
        self._erased = erased
        self._bit_flips = bit_flips
        self.name = medium.name
        self.size = medium.size

    def discard(self) -> None:
        self._medium.discard()
        self._erased()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._medium.write(offset, data)

    def flush(self) -> None:
        self._medium.flush()
        if self._bit_flips:
            self._bit_flips = False
            where = 2**20 + 700
            (byte,) = self._medium.read(where, 1)
            self._medium.write(where, bytes([byte ^ 1]))
            self._medium.flush()

    def read(self, offset: int, length: int) -> bytes:
        return self._medium.read(offset, length)
