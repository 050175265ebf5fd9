"""An official image, opened: what lies in its FAT and its ext4 as two trees, without loop devices and mounts.

Known is the layout of Raspberry Pi OS: an MBR with one FAT (boot) and one Linux partition (root). mtools copies the
one. debugfs copies the other's files; what its `rdump` loses is read from its listings and put right here: owners of
links, set-id bits, hard links, device nodes, extended attributes (capabilities among them) and exact times.
"""

import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from image.errors import SourceError
from image.recipe import BaseSettings
from image.run import run, tool

_SECTOR: Final = 512
_FAT_TYPES: Final = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E})
_LINUX: Final = 0x83
_STRANGERS: Final = {
    0xEE: "a GPT",
    0x8E: "LVM",
    0xFD: "Linux RAID",
    0x05: "an extended partition",
    0x0F: "an extended partition",
}
_WAY_OUT: Final = "fetch it again, or name another one as base.source"

_ENTRY: Final = re.compile(rb"/(\d+)/(\d+)/(\d+)/(\d+)/([^/]+)/(\d*)/")
_TIME: Final = re.compile(rb"^ ?(atime|mtime): 0x([0-9a-f]+)(?::([0-9a-f]+))? --", re.MULTILINE)
_DEVICE: Final = re.compile(rb"^(?:\(New-style\) )?Device major/minor number: (\d+):(\d+)", re.MULTILINE)
_ATTRIBUTES: Final = re.compile(rb"^Extended attributes:\n((?:  \S+ \(\d+\).*\n)+)", re.MULTILINE)
_ATTRIBUTE: Final = re.compile(rb"^  (\S+) \(\d+\)", re.MULTILINE)


@dataclass(frozen=True)
class Slice:
    """A partition, in bytes of the image."""

    number: int
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class Entry:
    """A name in the root file system."""

    path: Path
    inode: int
    mode: int
    owner: int
    group: int
    size: int


@dataclass(frozen=True)
class Details:
    """What an inode says of itself: times in ns, a device's number, names of extended attributes."""

    accessed: int
    modified: int
    device: int
    attributes: tuple[str, ...]


def open_image(base: BaseSettings, root: Path, boot: Path, working: Path) -> None:
    """Open the image that a recipe names.

    Args:
        base: `source` and `source_sha256` say which.
        root: where its root file system goes; must not exist.
        boot: where the content of its FAT goes; must not exist.
        working: a directory for what is only needed meanwhile.

    Raises:
        SourceError: the image is truncated, no image, of another layout, damaged, or not the one of the digest.
    """
    source = base.source
    if source is None:
        raise SourceError("base.source is missing; name an .img or .img.xz file")
    check_digest(source, base.source_sha256)
    image = working / "source.img"
    if source.suffix == ".xz":
        decompress(source, image)
    else:
        image.symlink_to(source.resolve())
    size = image.stat().st_size
    with image.open("rb") as file:
        fat, linux = boot_and_root(read_slices(file.read(2 * _SECTOR), size, source), source)
        check_file_systems(file.fileno(), fat, linux, source)
    boot.mkdir()
    run("mcopy", "-s", "-m", "-n", "-Q", "-i", f"{image}@@{fat.start}", "::/", boot, env={"MTOOLS_SKIP_CHECK": "1"})
    copy_root(f"{image}?offset={linux.start}", root, source)
    image.unlink()


def check_digest(source: Path, expected: str) -> None:
    """That a file is the one that the recipe means.

    Raises:
        SourceError: it is not.
    """
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SourceError(f"{source} has the SHA-256 {found}, the recipe says {expected}; {_WAY_OUT}")


def decompress(source: Path, image: Path) -> None:
    """An .xz, unpacked with its holes.

    Raises:
        SourceError: it is truncated, or no .xz.
    """
    try:
        with lzma.open(source) as packed, image.open("wb") as file:
            while piece := packed.read(1 << 20):
                if piece.count(0) == len(piece):
                    file.seek(len(piece), os.SEEK_CUR)
                else:
                    file.write(piece)
            file.truncate()
    except EOFError as error:
        raise SourceError(f"{source} is truncated: it ends within its compressed data; {_WAY_OUT}") from error
    except lzma.LZMAError as error:
        raise SourceError(f"{source} is no .xz, or damaged ({error}); {_WAY_OUT}") from error


def read_slices(head: bytes, size: int, source: Path) -> list[Slice]:
    """The partitions that an image's MBR names.

    Args:
        head: its first two sectors.
        size: of the whole image in bytes.
        source: whose name stands in messages.

    Raises:
        SourceError: there is no partition table, it is a GPT, or a partition lies beyond the end.
    """
    if len(head) < _SECTOR or head[510:512] != b"\x55\xaa":
        raise SourceError(f"{source} is no disk image: it has no partition table; {_WAY_OUT}")
    slices = []
    for number in range(1, 5):
        kind, start, sectors = struct.unpack_from("<4xB3xII", head, 446 + 16 * (number - 1))
        if kind:
            slices.append(Slice(number, kind, start * _SECTOR, sectors * _SECTOR))
    if head[_SECTOR : _SECTOR + 8] == b"EFI PART" or any(part.kind == 0xEE for part in slices):
        raise SourceError(
            f"{source} has an unknown layout: a GPT; only an MBR with a FAT and a Linux partition is known"
        )
    for part in slices:
        if part.start + part.size > size:
            raise SourceError(
                f"{source} is truncated: its partition {part.number} ends at byte {part.start + part.size},"
                f" the file at {size}; {_WAY_OUT}"
            )
    return slices


def boot_and_root(slices: Sequence[Slice], source: Path) -> tuple[Slice, Slice]:
    """The FAT and the Linux partition, of which there must be one each and nothing else.

    Raises:
        SourceError: the layout is another one.
    """
    fats = [part for part in slices if part.kind in _FAT_TYPES]
    linuxes = [part for part in slices if part.kind == _LINUX]
    if len(slices) != 2 or len(fats) != 1 or len(linuxes) != 1:
        kinds = ", ".join(
            "a FAT" if part in fats else "a Linux partition" if part in linuxes
            else _STRANGERS.get(part.kind, f"a partition of type {part.kind:#04x}")
            for part in slices
        )  # fmt: skip
        raise SourceError(
            f"{source} has an unknown layout: {kinds or 'no partition'}; only a FAT and a Linux partition are known"
        )
    first, second = sorted(slices, key=lambda part: part.start)
    if first.start < _SECTOR or first.start + first.size > second.start:
        raise SourceError(f"{source} has an unknown layout: its partitions lie over one another; {_WAY_OUT}")
    return fats[0], linuxes[0]


def check_file_systems(image: int, fat: Slice, linux: Slice, source: Path) -> None:
    """That the partitions hold what their types say, by their first bytes; `image` is a descriptor.

    Raises:
        SourceError: one does not, or its journal must be replayed first.
    """
    sector = os.pread(image, _SECTOR, fat.start)
    if sector[510:512] != b"\x55\xaa" or b"FAT" not in sector[0x36:0x5A]:
        raise SourceError(f"{source}: its partition {fat.number} holds no FAT file system; {_WAY_OUT}")
    block = os.pread(image, 1024, linux.start + 1024)
    if block[0x38:0x3A] != b"\x53\xef":
        raise SourceError(f"{source}: its partition {linux.number} holds no ext4 file system; {_WAY_OUT}")
    (incompatible,) = struct.unpack_from("<I", block, 0x60)
    if incompatible & 0x4:
        raise SourceError(
            f"{source}: its root file system was in use when it was copied; run e2fsck on a copy of it, or take another"
        )
    count_low, log_size = struct.unpack_from("<I", block, 0x4)[0], struct.unpack_from("<I", block, 0x18)[0]
    if log_size > 6 or count_low << (10 + log_size) > linux.size:
        raise SourceError(f"{source}: its root file system is larger than its partition; {_WAY_OUT}")


# --- the root -----------------------------------------------------------------------------------------------------


def copy_root(device: str, root: Path, source: Path) -> None:
    """Copy an ext2, 3 or 4 with everything that it says about its files.

    Args:
        device: as debugfs names it: the image's file, and `?offset=`.
        root: where to; made here.
        source: whose name stands in messages.

    Raises:
        SourceError: the file system is damaged.
    """
    entries = list_entries(device, source)
    root.mkdir()
    said = _debugfs(device, ["rdump / ."], cwd=root)[1]
    shutil.rmtree(root / "lost+found", ignore_errors=True)
    details = _read_details(device, {entry.inode for entry in entries}, source)
    first: dict[int, Path] = {}
    for entry in entries:
        place = root / entry.path
        if entry.inode in first and not stat.S_ISDIR(entry.mode):
            place.unlink(missing_ok=True)
            place.hardlink_to(first[entry.inode])
            continue
        first[entry.inode] = place
        _check_copied(entry, place, details[entry.inode], source, said)
    _copy_attributes(device, {inode: details[inode].attributes for inode in first}, first, root, source)
    for entry in reversed(entries):  # what is in a directory before the directory, whose times it would change
        moment = details[entry.inode]
        if not stat.S_ISSOCK(entry.mode):
            os.utime(root / entry.path, ns=(moment.accessed, moment.modified), follow_symlinks=False)


def _check_copied(entry: Entry, place: Path, details: Details, source: Path, said: bytes) -> None:
    """Give a copied file its owner and mode; make what rdump passes over."""
    kind = stat.S_IFMT(entry.mode)
    if kind in {stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO}:
        os.mknod(place, entry.mode, details.device)
    if kind == stat.S_IFSOCK:
        return
    if not os.path.lexists(place) or (kind == stat.S_IFREG and place.lstat().st_size != entry.size):
        words = said.decode(errors="replace").strip().splitlines()
        raise SourceError(f"{source}: its root file system is damaged at /{entry.path} ({words[-1:]}); {_WAY_OUT}")
    os.chown(place, entry.owner, entry.group, follow_symlinks=False)
    if kind != stat.S_IFLNK:
        place.chmod(stat.S_IMODE(entry.mode))  # after the owner, whose change takes set-id bits away


def list_entries(device: str, source: Path) -> list[Entry]:
    """Everything in a file system, directories before what is in them.

    Raises:
        SourceError: it is damaged.
    """
    entries = [Entry(Path(), 2, stat.S_IFDIR | 0o755, 0, 0, 0)]
    seen = {2}
    wave = list(entries)
    while wave:
        answers = _ask(device, [f"ls -p <{entry.inode}>" for entry in wave])
        below: list[Entry] = []
        for directory, answer in zip(wave, answers, strict=True):
            for line in filter(None, answer.split(b"\n")):
                found = _ENTRY.fullmatch(line)
                if found is None:
                    raise SourceError(f"{source}: its root file system is damaged at /{directory.path}; {_WAY_OUT}")
                entry = _entry(found, directory)
                if found[5] == b"." and directory.inode == 2:
                    entries[0] = Entry(Path(), 2, entry.mode, entry.owner, entry.group, 0)
                if found[5] in {b".", b".."} or (directory.inode == 2 and found[5] == b"lost+found"):
                    continue
                if stat.S_ISDIR(entry.mode):
                    if entry.inode in seen:
                        raise SourceError(f"{source}: its root file system is damaged at /{entry.path}; {_WAY_OUT}")
                    seen.add(entry.inode)
                    below.append(entry)
                entries.append(entry)
        wave = below
    return entries


def _entry(found: re.Match[bytes], directory: Entry) -> Entry:
    path = directory.path / os.fsdecode(found[5])
    return Entry(path, int(found[1]), int(found[2], 8), int(found[3]), int(found[4]), int(found[6] or 0))


def _read_details(device: str, inodes: Iterable[int], source: Path) -> dict[int, Details]:
    ordered = sorted(inodes)
    details = {}
    for inode, answer in zip(ordered, _ask(device, [f"stat <{inode}>" for inode in ordered]), strict=True):
        times = {name: _nanoseconds(seconds, extra) for name, seconds, extra in _TIME.findall(answer)}
        if set(times) != {b"atime", b"mtime"}:
            raise SourceError(f"{source}: its root file system is damaged at inode {inode}; {_WAY_OUT}")
        device_number = _DEVICE.search(answer)
        attributes = _ATTRIBUTES.search(answer)
        details[inode] = Details(
            times[b"atime"],
            times[b"mtime"],
            os.makedev(int(device_number[1]), int(device_number[2])) if device_number else 0,
            tuple(name.decode() for name in _ATTRIBUTE.findall(attributes[1])) if attributes else (),
        )
    return details


def _nanoseconds(seconds: bytes, extra: bytes) -> int:
    """ext4's time: 32 bits with a sign, two more on top of them, and the nanoseconds."""
    low, high = int(seconds, 16), int(extra or b"0", 16)
    signed = low - (1 << 32) if low & 0x80000000 else low
    return (signed + ((high & 3) << 32)) * 10**9 + (high >> 2)


def _copy_attributes(
    device: str, attributes: dict[int, tuple[str, ...]], places: dict[int, Path], root: Path, source: Path
) -> None:
    wanted = [(inode, name) for inode, names in sorted(attributes.items()) for name in names]
    if not wanted:
        return
    values = root.with_name(f"{root.name}.attributes")
    values.mkdir()
    _debugfs(
        device, [f"ea_get -f {number} <{inode}> {name}" for number, (inode, name) in enumerate(wanted)], cwd=values
    )
    for number, (inode, name) in enumerate(wanted):
        value = values / str(number)
        if not value.exists():
            raise SourceError(f"{source}: {name} of /{places[inode].relative_to(root)} cannot be read; {_WAY_OUT}")
        os.setxattr(places[inode], name, value.read_bytes(), follow_symlinks=False)
    shutil.rmtree(values)


def _ask(device: str, requests: Sequence[str]) -> list[bytes]:
    """The answers to a list of debugfs's requests."""
    said = _debugfs(device, requests)[0]
    answers: list[bytes] = []
    place = 0
    for request in requests:
        echo = f"debugfs: {request}\n".encode()
        found = said.index(echo, place)
        if answers:
            answers[-1] = said[place:found]
        place = found + len(echo)
        answers.append(b"")
    answers[-1] = said[place:]
    return answers


def _debugfs(device: str, requests: Sequence[str], cwd: Path | None = None) -> tuple[bytes, bytes]:
    done = subprocess.run(
        [tool("debugfs"), "-f", "-", device], input="".join(f"{request}\n" for request in requests).encode(),
        cwd=cwd, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"}, umask=0o022,
    )  # fmt: skip
    return done.stdout, done.stderr
