"""A disk that loses all it may when the power goes: records what a program does to files, and deals out the remains.

`Recorder` stands in for `os` in the modules under test and notes every call that changes the disk. `Disk` replays these
calls on a model, and `Disk.remains` gives the trees that a power cut may leave at that point, by the rules of POSIX and
no kinder ones:

- What was written to a file since its last fsync may be there, be missing, be cut off anywhere, or be zeros.
- Names that were created, renamed or removed in a directory since its last fsync may have changed or not, each by
  itself and in any order. A rename within a directory is one change.
- fsync of a file says nothing about its name; fsync of a directory says nothing about the files in it.
- A device is a file that is only ever overwritten: of what was written since its last fsync, any sector may be there or
  not, each by itself; a sector is never half there.

Journalling file systems are kinder; who survives this survives them.
"""

import itertools
import os
import random
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

#: One recorded call: its name, and what matters of its arguments.
Call = tuple[Any, ...]

#: A tree on the disk: path → ("file", content, mode), ("link", target) or ("folder",).
Tree = dict[str, tuple[Any, ...]]


class Recorder:
    """`os`, but every call that changes something under `root` is noted in `calls`."""

    def __init__(self, root: Path) -> None:
        self.calls: list[Call] = []
        self._root = root

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mark(self, words: str) -> None:
        """Note that the program has come this far."""
        self.calls.append(("mark", words))

    def open(self, path: Path | str, flags: int, mode: int = 0o777) -> int:
        there = os.path.lexists(path)
        handle = os.open(path, flags, mode)
        created = bool(flags & os.O_CREAT) and not there
        assert created or not flags & os.O_TRUNC, "the model knows no truncation"
        self.calls.append(("open", handle, self._inside(path), created, mode))
        return handle

    def close(self, handle: int) -> None:
        os.close(handle)
        self.calls.append(("close", handle))

    def write(self, handle: int, data: bytes) -> int:
        count = os.write(handle, data)
        self.calls.append(("write", handle, bytes(data[:count]), None))
        return count

    def pwrite(self, handle: int, data: bytes, position: int) -> int:
        count = os.pwrite(handle, data, position)
        self.calls.append(("write", handle, bytes(data[:count]), position))
        return count

    def ftruncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)
        self.calls.append(("truncate", handle, size))

    def fchmod(self, handle: int, mode: int) -> None:
        os.fchmod(handle, mode)
        self.calls.append(("fchmod", handle, mode))

    def fsync(self, handle: int) -> None:
        os.fsync(handle)
        self.calls.append(("fsync", handle))

    def mkdir(self, path: Path | str, mode: int = 0o777) -> None:
        os.mkdir(path, mode)  # noqa: PTH102
        self.calls.append(("mkdir", self._inside(path)))

    def symlink(self, target: str, path: Path | str) -> None:
        os.symlink(target, path)  # noqa: PTH211
        self.calls.append(("symlink", target, self._inside(path)))

    def rename(self, path: Path | str, to: Path | str) -> None:
        os.rename(path, to)  # noqa: PTH104
        self.calls.append(("rename", self._inside(path), self._inside(to)))

    def replace(self, path: Path | str, to: Path | str) -> None:
        os.replace(path, to)  # noqa: PTH105
        self.calls.append(("rename", self._inside(path), self._inside(to)))

    def unlink(self, path: Path | str) -> None:
        os.unlink(path)  # noqa: PTH108
        self.calls.append(("unlink", self._inside(path)))

    def rmdir(self, path: Path | str) -> None:
        os.rmdir(path)  # noqa: PTH106
        self.calls.append(("unlink", self._inside(path)))

    def _inside(self, path: Path | str) -> str:
        inside = Path(path).relative_to(self._root).as_posix()
        return "" if inside == "." else inside


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class File:
    """`now` is what a program reads, `safe` what no power cut takes away."""

    safe: bytes = b""
    now: bytes = b""
    safe_mode: int = 0o644
    mode: int = 0o644

    def variants(self, draw: random.Random) -> list[tuple[bytes, int]]:
        """What may be left of it."""
        if self.now == self.safe:
            return list(dict.fromkeys([(self.safe, self.safe_mode), (self.now, self.mode)]))
        same = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.safe, self.now, strict=False))
        )
        cut = self.now[: draw.randint(same, len(self.now))]
        holes = self.now[:same] + bytes(len(self.now) - same)
        return list(
            dict.fromkeys([(self.safe, self.safe_mode), (self.now, self.mode), (cut, self.mode), (holes, self.mode)])
        )


@dataclass(eq=False)
class Device(File):
    """A block device; `pending` are the writes since the last fsync, oldest first."""

    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def variants(self, draw: random.Random) -> list[tuple[bytes, int]]:
        found = [self.safe, self.now]
        for count in range(1, len(self.pending) + 1):
            *whole, torn = self.pending[:count]
            found += [self._after(whole), self._after([*whole, *self._sectors([torn], draw)])]
        found += [self._after(self._sectors(self.pending, draw)) for _ in range(3 if self.pending else 0)]
        return [(data, self.mode) for data in dict.fromkeys(found)]

    @staticmethod
    def _sectors(writes: Sequence[tuple[int, bytes]], draw: random.Random) -> list[tuple[int, bytes]]:
        """Some sectors of these writes."""
        pieces = [(at + start, data[start : start + 512]) for at, data in writes for start in range(0, len(data), 512)]
        likely = draw.random()
        return [piece for piece in pieces if draw.random() < likely]

    def _after(self, writes: Sequence[tuple[int, bytes]]) -> bytes:
        data = bytearray(self.safe)
        for at, piece in writes:
            data[at : at + len(piece)] = piece
        return bytes(data)


@dataclass(eq=False)
class Link:
    target: str


@dataclass(eq=False)
class Folder:
    """`pending` are the changes of names since the last fsync, oldest first."""

    safe: "dict[str, Node]" = field(default_factory=dict)
    pending: "list[Change]" = field(default_factory=list)

    def after(self, changes: "Sequence[Change]") -> "dict[str, Node]":
        entries: dict[str, Node | None] = dict(self.safe)
        for change in changes:
            entries |= change
        return {name: node for name, node in entries.items() if node is not None}

    @property
    def now(self) -> "dict[str, Node]":
        return self.after(self.pending)

    def variants(self) -> "Iterator[tuple[Change, ...]]":
        """All sets of changes that may have come through, in the order of time."""
        for count in range(len(self.pending) + 1):
            yield from itertools.combinations(self.pending, count)


Node = File | Link | Folder

#: What one call does to the names of a directory: name → node, or None for a removal.
Change = dict[str, Node | None]


class Disk:
    """The model of a disk, beginning with what is in a real directory now, all of it safe.

    Files whose names are among `devices` are block devices.
    """

    def __init__(self, root: Path, devices: Sequence[str] = ()) -> None:
        self._devices = devices
        self.root = self._load(root)
        self._open: dict[int, File | Folder] = {}

    def _load(self, path: Path) -> Folder:
        folder = Folder()
        for entry in path.iterdir():
            if entry.is_symlink():
                folder.safe[entry.name] = Link(str(entry.readlink()))
            elif entry.is_dir():
                folder.safe[entry.name] = self._load(entry)
            else:
                data, mode = entry.read_bytes(), stat.S_IMODE(entry.stat().st_mode)
                kind = Device if entry.name in self._devices else File
                folder.safe[entry.name] = kind(data, data, mode, mode)
        return folder

    def apply(self, call: Call) -> None:
        """Let a recorded call happen."""
        match call:
            case ("open", handle, path, created, mode):
                if created:
                    self._change(path, File(safe_mode=mode, mode=mode))
                node = self._node(path)
                assert isinstance(node, (File, Folder))
                self._open[handle] = node
            case ("close", handle):
                del self._open[handle]
            case ("write", handle, data, position):
                file = self._file(handle)
                start = len(file.now) if position is None else position
                if isinstance(file, Device):
                    assert start + len(data) <= len(file.now), "a device does not grow"
                    file.pending.append((start, data))
                file.now = file.now[:start].ljust(start, b"\0") + data + file.now[start + len(data) :]
            case ("truncate", handle, size):
                file = self._file(handle)
                file.now = file.now[:size].ljust(size, b"\0")
            case ("fchmod", handle, mode):
                self._file(handle).mode = mode
            case ("fsync", handle):
                node = self._open[handle]
                if isinstance(node, File):
                    node.safe, node.safe_mode = node.now, node.mode
                    if isinstance(node, Device):
                        node.pending = []
                else:
                    node.safe, node.pending = node.now, []
            case ("mkdir", path):
                self._change(path, Folder())
            case ("symlink", target, path):
                self._change(path, Link(target))
            case ("unlink", path):
                self._change(path, None)
            case ("rename", path, to):
                folder, name = self._place(path)
                other, new = self._place(to)
                assert folder is other, "the model knows no rename between directories"
                folder.pending.append({name: None, new: folder.now[name]})
            case _:
                assert call[0] == "mark", call

    def remains(self, draw: random.Random, most: int) -> Iterator[Tree]:
        """Trees that a power cut may leave now: all of them, or a sample of `most` if there are more."""
        nodes = list(self._reachable(self.root))
        folders = [node for node in nodes if isinstance(node, Folder) and node.pending]
        contents = [node for node in nodes if isinstance(node, File) and len(node.variants(draw)) > 1]
        options = [file.variants(draw) for file in contents]
        if prod(2 ** len(folder.pending) for folder in folders) * prod(map(len, options)) <= most:
            for names in itertools.product(*(list(folder.variants()) for folder in folders)):
                for chosen in itertools.product(*options):
                    yield self._tree(dict(zip(folders, names, strict=True)), dict(zip(contents, chosen, strict=True)))
            return
        yield self._tree(dict.fromkeys(folders, ()), {file: (file.safe, file.safe_mode) for file in contents})
        yield self._tree({folder: folder.pending for folder in folders}, {})
        for _ in range(most - 2):
            likely = draw.random()
            picked = {folder: [c for c in folder.pending if draw.random() < likely] for folder in folders}
            for changes in picked.values():
                if draw.random() < 0.3:
                    draw.shuffle(changes)
            yield self._tree(picked, {file: draw.choice(file.variants(draw)) for file in contents})

    def _tree(self, changes: Mapping[Folder, Sequence[Change]], contents: dict[File, tuple[bytes, int]]) -> Tree:
        tree: Tree = {}

        def visit(folder: Folder, path: str) -> None:
            for name, node in folder.after(changes.get(folder, ())).items():
                where = f"{path}{name}"
                if isinstance(node, Folder):
                    tree[where] = ("folder",)
                    visit(node, f"{where}/")
                elif isinstance(node, Link):
                    tree[where] = ("link", node.target)
                else:
                    tree[where] = ("file", *contents.get(node, (node.now, node.mode)))

        visit(self.root, "")
        return tree

    def _reachable(self, folder: Folder) -> Iterator[Node]:
        """All nodes that have a name, or had one that a power cut could bring back."""
        yield folder
        seen = dict.fromkeys(
            node for node in itertools.chain(folder.safe.values(), *(c.values() for c in folder.pending)) if node
        )
        for node in seen:
            yield from self._reachable(node) if isinstance(node, Folder) else (node,)

    def _node(self, path: str) -> Node:
        node: Node = self.root
        for part in Path(path).parts:
            assert isinstance(node, Folder)
            node = node.now[part]
        return node

    def _place(self, path: str) -> tuple[Folder, str]:
        folder = self._node(str(Path(path).parent))
        assert isinstance(folder, Folder)
        return folder, Path(path).name

    def _change(self, path: str, node: Node | None) -> None:
        folder, name = self._place(path)
        folder.pending.append({name: node})

    def _file(self, handle: int) -> File:
        file = self._open[handle]
        assert isinstance(file, File)
        return file


def materialise(tree: Tree, root: Path) -> None:
    """Put a tree on the real disk, into the empty directory `root`."""
    for path, what in tree.items():
        where = root / path
        match what:
            case ("folder",):
                where.mkdir()
            case ("link", target):
                where.symlink_to(target)
            case ("file", data, mode):
                where.write_bytes(data)
                where.chmod(mode)
