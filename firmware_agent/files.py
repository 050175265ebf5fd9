"""Files that survive a pulled plug: after a crash at any instruction there is the old content or the new, never half.

The order is always the same: write under a temporary name, fsync the file, rename over the old name, fsync the
directory. rename(2) is atomic on ext4, but without the first fsync the new name may show an empty file after a power
cut, and without the second the rename itself may be lost.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def create(path: Path, pieces: Iterable[bytes], mode: int, *, durable: bool = False) -> None:
    """Create the file `path`; with `durable` its content survives a power cut, though not yet its name."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(handle, mode)  # whatever the umask
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(handle, view) :]
        if durable:
            os.fsync(handle)
    finally:
        os.close(handle)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    create(path, [data], mode, durable=True)


def make_directory(path: Path, mode: int = 0o755) -> None:
    """Create the directory `path`, not yet durably."""
    os.mkdir(path, mode)  # noqa: PTH102


def sync_tree(path: Path) -> None:
    """Make all that lies under the directory `path` durable, and `path` itself, though not yet its name.

    To be called once, after everything was written: the first fsync then takes most of the data along, and the others
    find little to do. (One fsync per file while writing costs a commit of the file system's journal each.)
    """
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                sync_tree(Path(entry.path))
            else:
                handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
    sync_directory(path)


def move(path: Path, to: Path) -> None:
    """Give a file or directory another name in the same directory, durably; what had that name is gone."""
    os.rename(path, to)  # noqa: PTH104
    sync_directory(to.parent)


def remove(path: Path) -> None:
    """Remove a file or link, or a directory with all that is in it; not durably. It is no fault if it is not there."""
    if path.is_dir() and not path.is_symlink():
        with os.scandir(path) as entries:
            inside = [Path(entry.path) for entry in entries]
        for member in inside:
            remove(member)
        os.rmdir(path)  # noqa: PTH106
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace the file `path` by `data`, durably.

    Raises:
        OSError: the disk is full or the directory is not ours; the old file is untouched.
    """
    temporary = _temporary(path)
    try:
        _write_new(temporary, data, mode)
        os.replace(temporary, path)  # noqa: PTH105 - beside its fsyncs, so that all three are seen together
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise
    sync_directory(path.parent)


def write_directory(path: Path, contents: dict[str, bytes], mode: int = 0o700) -> None:
    """Create the directory `path` with `contents`, whole and durable; `path` must not exist yet."""
    temporary = _temporary(path)
    os.mkdir(temporary, mode)  # noqa: PTH102 - the same family of calls
    for name, data in contents.items():
        _write_new(temporary / name, data, 0o600)
    sync_directory(temporary)
    os.rename(temporary, path)  # noqa: PTH104
    sync_directory(path.parent)


def point(link: Path, target: str) -> None:
    """Make the symlink `link` point to `target`, atomically and durably."""
    temporary = _temporary(link)
    os.symlink(target, temporary)  # noqa: PTH211
    os.replace(temporary, link)  # noqa: PTH105
    sync_directory(link.parent)


def read_json(path: Path) -> Any:
    """The JSON value in `path`, or None when there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
