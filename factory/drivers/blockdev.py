"""A real medium behind a block device: an SD card in a reader, named by the reader's USB path.

Everything is written and read with O_DIRECT. So a write that returned is on the device and not in this station's
page cache, progress is honest, and what is read back came over the cable. (A card's own controller cannot be looked
behind by any means; for that the unit boots from it.)

The wrong disk is the one mistake of a station that nobody forgives. What is refused is therefore decided from /sys
and /proc before the device is opened at all; then the kernel is asked once more, by O_EXCL, which fails on anything
that is mounted, swapped on or held by another driver, in any mount namespace.
"""

import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Never

from factory.errors import FactoryError, LinkFault, StationFault, UnitFault, UserMistake

# linux/fs.h; the same numbers on x86 and ARM
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F

#: The largest single transfer. Large enough that a card is kept busy, small enough that progress moves.
CHUNK = 4 * 2**20
#: One request to zero. A large medium takes several, so that Ctrl-C and a pulled card are noticed in between.
_ZERO_SPAN = 2**30
#: How many places of a medium are looked at where the kernel promised that all of it is zero.
_SPOTS = 64
_SPOT = 2**20

#: How long a card may take from the operator's hand until it can be opened: readers are slow, udev looks first.
APPEAR_SECONDS = 15.0

#: os.preadv or os.pwritev
_Move = Callable[[int, list[memoryview], int], int]

_ZEROS = bytes(CHUNK)

_SYSTEM_PLACES = frozenset({"/", "/boot", "/boot/firmware", "/boot/efi", "/efi", "/usr", "/var", "/home"})
_SWAP = "swap"
#: What a device reports when there is no medium in it any more.
_GONE = frozenset({errno.ENOMEDIUM, errno.ENODEV, errno.ENXIO})

_OTHER_DISK = "Name the card reader: `ls -l /dev/disk/by-path` before and after plugging it in shows which it is."
_NO_CARD = "Check that the card is in the reader and the reader in its USB port; then run the unit again."
_BAD_CARD = "Put in a new medium. If that fails too, the reader or its cable is faulty."


# --- which disk it is, from /sys and /proc alone ------------------------------------------------------------------


@dataclass(frozen=True)
class _Disk:
    """A block device as sysfs describes it; nothing of it has been opened."""

    path: str
    device: int
    sysfs: Path

    @classmethod
    def look(cls, path: str) -> "_Disk | None":
        """The device behind `path`, or None if there is nothing by that name.

        Raises:
            UserMistake: there is something, but no block device.
        """
        try:
            found = os.stat(path)  # noqa: PTH116  (the text as the bench file has it: Path would drop its details)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISBLK(found.st_mode):
            raise UserMistake(f"{path} is not a block device", advice=_OTHER_DISK)
        return cls(path, found.st_rdev, Path("/sys/dev/block") / _number(found.st_rdev))

    @property
    def node(self) -> str:
        """The kernel's name, e.g. `sdb`."""
        return self.sysfs.resolve().name

    @property
    def size(self) -> int:
        """Capacity in bytes; sysfs counts in units of 512 whatever the sector is."""
        return 512 * int(self._attribute("size") or 0)

    @property
    def name(self) -> str:
        """What an operator would call it, e.g. `/dev/sdb (Generic STORAGE DEVICE, 31.9 GB)`."""
        words = " ".join(filter(None, (self._attribute(f"device/{one}") for one in ("vendor", "model", "name"))))
        return f"/dev/{self.node} ({', '.join(filter(None, [words, f'{self.size / 1e9:,.1f} GB']))})"

    @property
    def is_partition(self) -> bool:
        """Whether it is a part of a disk only."""
        return (self.sysfs / "partition").exists()

    @property
    def is_read_only(self) -> bool:
        """Whether the kernel would refuse writes, e.g. for the switch on an SD card's edge."""
        return self._attribute("ro") == "1"

    @property
    def is_removable(self) -> bool:
        """Whether it is made to be taken out: a removable medium, anything on USB, an SD card in a native slot."""
        if self._attribute("removable") == "1" or self._attribute("device/type") == "SD":
            return True
        place = self.sysfs.resolve()
        return any(_bus(parent) == "usb" for parent in place.parents)

    @property
    def can_zero(self) -> bool:
        """Whether the device itself makes zeros of a range (then it is fast), and promises that they read as such."""
        return int(self._attribute("queue/write_zeroes_max_bytes") or 0) > 0

    @property
    def can_discard(self) -> bool:
        """Whether it takes a hint that its content is not needed. What it then reads as is anybody's guess."""
        return int(self._attribute("queue/discard_max_bytes") or 0) > 0

    def everything_on_it(self) -> Iterator[tuple[str, Path]]:
        """Number and sysfs folder of the disk, its partitions, and all that is built on them: LVM, RAID, encryption."""
        waiting, seen = [self.sysfs.resolve()], set()
        while waiting:
            place = waiting.pop()
            number = _text(place / "dev")
            if number is None or number in seen:
                continue
            seen.add(number)
            yield number, place
            waiting += [part.parent for part in place.glob("*/partition")]
            waiting += [holder.resolve() for holder in place.glob("holders/*")]

    def _attribute(self, name: str) -> str | None:
        return _text(self.sysfs / name)


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _bus(device: Path) -> str | None:
    link = device / "subsystem"
    return link.resolve().name if link.is_symlink() else None


def _uses() -> dict[str, set[str]]:
    """What this station uses block devices for: device number to mount points and `swap`."""
    uses: dict[str, set[str]] = {}
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        # proc_pid_mountinfo(5): id parent major:minor root mount-point options... - type source super-options
        before, _, after = line.partition(" - ")
        fields, source = before.split(), after.split()[1:2]
        place = _unescaped(fields[4])
        uses.setdefault(fields[2], set()).add(place)
        if source and source[0].startswith("/"):  # btrfs shows an anonymous number; its source is the device
            _add_node(uses, _unescaped(source[0]), place)
    for line in (_text(Path("/proc/swaps")) or "").splitlines()[1:]:
        _add_node(uses, _unescaped(line.split()[0]), _SWAP)
    return uses


def _add_node(uses: dict[str, set[str]], node: str, use: str) -> None:
    try:
        found = Path(node).stat()
    except OSError:
        return
    if stat.S_ISBLK(found.st_mode):
        uses.setdefault(_number(found.st_rdev), set()).add(use)


def _unescaped(field: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def _refuse_used(disk: _Disk) -> None:
    """Refuse a disk that this station uses for anything, the system's own first."""
    uses, on_it = _uses(), list(disk.everything_on_it())
    places = {place for number, _ in on_it for place in uses.get(number, ())}
    system = sorted(places & {*_SYSTEM_PLACES, _SWAP})
    if system:
        raise UserMistake(
            f"{disk.path} is this station's system disk: it holds {', '.join(system)}", advice=_OTHER_DISK
        )
    if places:
        raise UserMistake(
            f"{disk.path} is mounted at {', '.join(sorted(places))}",
            advice="If it really is the unit's medium, unmount it, and switch off the desktop's automatic mounting. "
            + _OTHER_DISK,
        )
    held = [place.name for _, place in on_it if any(place.glob("holders/*"))]
    if held:
        raise UserMistake(
            f"{disk.path} is in use: a RAID, LVM or encrypted volume is built on {held[0]}", advice=_OTHER_DISK
        )


def moves(path: str) -> bool:
    """Whether a path may mean another disk after the next plug or boot, as /dev/sdb does."""
    return not path.startswith("/dev/disk/by-path/")


def lasting_path(path: str) -> str | None:
    """The name by port of the device that `path` names now, or None if it has none."""
    target = Path(path).resolve()
    links = sorted(Path("/dev/disk/by-path").glob("*"))
    return next((str(link) for link in links if link.resolve() == target), None)


# --- the storage --------------------------------------------------------------------------------------------------


class BlockStorage:
    """The block device at `path`, best under /dev/disk/by-path: that names the port, so the slot, whatever is in it.

    `named_again` says that the operator names the device a second time: only so is one used that does not look
    removable. Nothing makes a mounted disk or the system disk acceptable. `how_again` is what to add for it, where that
    is not the bench file's `storage_again`.
    """

    def __init__(
        self, path: str, *, named_again: bool = False, how_again: str = "", appear_seconds: float = APPEAR_SECONDS
    ) -> None:
        self.path = path
        self._named_again = named_again
        self._how_again = how_again or f'storage_again = "block:{path}"'
        self._appear_seconds = appear_seconds

    def check(self) -> None:
        """Refuse what must never be written. Opens nothing; a medium that is not there yet is none of its business.

        Raises:
            UserMistake: not a whole disk, in use, read-only, or not removable.
        """
        disk = _Disk.look(self.path)
        if disk is not None:
            self._refuse(disk)

    @contextmanager
    def attach(self) -> Iterator["BlockMedium"]:
        """The medium, opened exclusively; waits a little for a card that was just put in.

        Raises:
            UserMistake: not a whole disk, in use, read-only, or not removable.
            StationFault: there is no medium, or it cannot be opened.
        """
        deadline = time.monotonic() + self._appear_seconds
        disk = self._appeared(deadline)
        self._refuse(disk)
        descriptor = self._open(disk)
        try:
            self._lock(descriptor, deadline)
            yield BlockMedium(disk, descriptor)
        finally:
            os.close(descriptor)

    def _appeared(self, deadline: float) -> _Disk:
        while True:
            disk = _Disk.look(self.path)
            if disk is not None and disk.size:
                return disk
            if time.monotonic() >= deadline:
                what = f"there is no {self.path}" if disk is None else f"there is no card in {self.path}"
                raise StationFault(what, advice=_NO_CARD)
            time.sleep(0.2)

    def _refuse(self, disk: _Disk) -> None:
        if disk.is_partition:
            raise UserMistake(
                f"{self.path} is a partition; a unit's medium is written as a whole",
                advice="Name the whole disk: the same path without -partN.",
            )
        _refuse_used(disk)
        if not disk.is_removable and not self._named_again:
            raise UserMistake(
                f"{self.path} is not removable: {disk.name} looks like a disk that belongs to this station",
                advice=f"If it is the unit's medium, name it twice: add {self._how_again}.",
            )
        if disk.is_read_only:
            raise UserMistake(
                f"{self.path} is read-only",
                advice="Slide the lock on the card's or the adapter's edge; put it in again.",
            )

    def _open(self, disk: _Disk) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise UserMistake(
                    f"{self.path} is in use by another program",
                    advice=f"`fuser -v {self.path}` and `lsblk` show what holds it.",
                ) from error
            if error.errno in _GONE:
                raise StationFault(f"there is no card in {self.path}", advice=_NO_CARD) from error
            advice = "Run as root, or join the group that owns it (disk)." if isinstance(error, PermissionError) else ""
            raise StationFault(f"{self.path} cannot be opened: {error.strerror}", advice=advice or _NO_CARD) from error
        if os.fstat(descriptor).st_rdev != disk.device:
            os.close(descriptor)
            raise StationFault(f"{self.path} became another device while it was opened", advice=_NO_CARD)
        return descriptor

    def _lock(self, descriptor: int, deadline: float) -> None:
        """Take the lock that keeps udev from probing (systemd, BLOCK_DEVICE_LOCKING); udev may hold it at first."""
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise StationFault(
                        f"{self.path} is locked by another program", advice=f"`fuser -v {self.path}` shows which."
                    ) from error
                time.sleep(0.2)
            else:
                return


class BlockMedium:
    """A block device, opened exclusively and with O_DIRECT. Offsets and lengths may be any; aligned ones are fast."""

    def __init__(self, disk: _Disk, descriptor: int) -> None:
        self._disk = disk
        self._descriptor = descriptor
        self.name = disk.name
        self.size = os.lseek(descriptor, 0, os.SEEK_END)
        self._free: list[memoryview] = []
        self._sector: int
        (self._sector,) = struct.unpack("i", fcntl.ioctl(descriptor, _BLKSSZGET, b"\0" * 4))

    def discard(self) -> None:
        """Make every byte zero, by the fastest way that may be believed.

        A discard alone is a hint: a card may go on showing the old bytes, or ones. So where the device can make zeros
        itself that is asked for and looked at in places; where it cannot, as with most USB readers, all of it is read
        and only what is not zero is written. That spares a new card's cells and is faster than to write all of it.

        Raises:
            UnitFault: the medium does not take zeros.
            LinkFault: it went away.
        """
        if self._disk.can_discard:
            self._forget()
        if self._disk.can_zero:
            self._zero(0, self.size)
            if self._nonzero_spot() is None:
                return
        for offset in range(0, self.size, CHUNK):
            length = min(CHUNK, self.size - offset)
            if not self._is_zero(offset, length):
                self._zero(offset, length)
        self._sync()
        spot = self._nonzero_spot()
        if spot is not None:
            raise UnitFault(f"{self.name} does not take zeros: old data stands at byte {spot:,}", advice=_BAD_CARD)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at `offset`. When it returns, the device has it.

        Raises:
            UnitFault: the medium refuses.
            LinkFault: it went away.
        """
        view = memoryview(data)
        if offset < 0 or offset + len(view) > self.size:
            raise StationFault(f"{self.name}: a write past its end at byte {offset:,}")
        with self._buffer(CHUNK) as buffer:
            while view:
                start = offset - offset % self._sector
                before = offset - start
                taken = min(len(view), CHUNK - before)
                span = self._rounded_up(before + taken)
                if span != taken:
                    buffer[:span] = self.read(start, span)
                buffer[before : before + taken] = view[:taken]
                self._transfer(os.pwritev, buffer[:span], start, "written")
                offset, view = offset + taken, view[taken:]

    def flush(self) -> None:
        """Have the device empty its own write cache. There is no cache of ours to forget: see `read`.

        Raises:
            UnitFault: the medium reports that something could not be kept.
            LinkFault: it went away.
        """
        self._sync()

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` from the device, past this station's page cache.

        Raises:
            UnitFault: the medium cannot be read there.
            LinkFault: it went away.
        """
        if offset < 0 or offset + length > self.size:
            raise StationFault(f"{self.name}: a read past its end at byte {offset:,}")
        start = offset - offset % self._sector
        span = self._rounded_up(offset + length - start)
        with self._buffer(span) as buffer:
            self._transfer(os.preadv, buffer[:span], start, "read")
            return bytes(buffer[offset - start : offset - start + length])

    @contextmanager
    def _buffer(self, length: int) -> Iterator[memoryview]:
        """At least `length` bytes of whole pages, as O_DIRECT needs them; kept, for to map new ones costs a copy."""
        try:
            pages = self._free.pop() if length <= CHUNK else _pages(length)
        except IndexError:
            pages = _pages(CHUNK)
        yield pages
        if len(pages) == CHUNK:
            self._free.append(pages)

    def _rounded_up(self, length: int) -> int:
        return -(-length // self._sector) * self._sector

    def _transfer(self, move: _Move, buffer: memoryview, offset: int, verb: str) -> None:
        """Move all of an aligned buffer; the kernel may do it in parts, each of whole sectors."""
        done = 0
        while done < len(buffer):
            try:
                moved = move(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                self._fail(error, f"byte {offset + done:,} cannot be {verb}")
            if not moved:
                self._fail(OSError(errno.EIO, "it ends early"), f"byte {offset + done:,} cannot be {verb}")
            done += moved

    def _forget(self) -> None:
        try:
            fcntl.ioctl(self._descriptor, _BLKDISCARD, struct.pack("QQ", 0, self.size))
        except OSError as error:
            # A card may announce discards and refuse them; then it is as one that does not announce them.
            if error.errno in _GONE or not self._disk.size:
                self._fail(error, "it cannot be discarded")

    def _zero(self, offset: int, length: int) -> None:
        """Have the kernel make zeros of whole sectors: by the device where it can, by writing them where not."""
        end = offset + length
        while offset < end:
            span = min(_ZERO_SPAN, end - offset)
            try:
                fcntl.ioctl(self._descriptor, _BLKZEROOUT, struct.pack("QQ", offset, span))
            except OSError as error:
                self._fail(error, f"byte {offset:,} and following cannot be zeroed")
            offset += span

    def _is_zero(self, offset: int, length: int) -> bool:
        return self.read(offset, length) == _ZEROS[:length]

    def _nonzero_spot(self) -> int | None:
        """The first of some places, spread over the medium with both its ends, that is not zero; None if all are."""
        last = max(0, self.size - _SPOT)
        for spot in range(_SPOTS):
            offset = last * spot // (_SPOTS - 1)
            if not self._is_zero(offset, min(_SPOT, self.size - offset)):
                return offset
        return None

    def _sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._fail(error, "it cannot keep what was written")

    def _fail(self, error: OSError, what: str) -> Never:
        """Tell a medium that is bad from one that was pulled out."""
        fault: FactoryError
        if error.errno in _GONE or not self._disk.size:
            fault = LinkFault(f"{self.name} went away in the middle of the work", advice=_NO_CARD)
        else:
            fault = UnitFault(f"the medium {self.name} is bad: {what} ({error.strerror})", advice=_BAD_CARD)
        raise fault from error


def _pages(length: int) -> memoryview:
    """Whole pages of memory; a page is a multiple of every sector's size."""
    return memoryview(mmap.mmap(-1, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE))
