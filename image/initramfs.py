"""The initramfs, made natively: busybox, the modules that lead to the root file system, and our own /init.

Debian's kernel has ext4 and every disk driver as modules. Which ones a board needs on the way to its root is read from
its device tree: every module that drives a compatible device of a kind listed in `_ON_THE_WAY`.
"""

import fnmatch
import gzip
import lzma
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from image.errors import ImageError

_INIT = Path(__file__).with_name("init")

#: For any board, by name: the file system, and the disks of QEMU's machines. crc32c is asked for by ext4 through the
#: crypto API, which names no module.
_ALWAYS = ("crc32c_generic", "ext4", "virtio_blk", "virtio_mmio", "virtio_pci")

#: Kinds of drivers that can stand between the SoC and its SD card.
_ON_THE_WAY = tuple(
    f"kernel/drivers/{kind}/*"
    for kind in ("clk", "dma", "firmware", "gpio", "mailbox", "mmc", "pinctrl", "pmdomain", "regulator", "reset", "soc")
)


@dataclass(frozen=True)
class Entry:
    """One file of a cpio archive: its mode with the type bits, and its content (a symlink's target, or nothing)."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    """A directory that everybody may read."""
    return Entry(name, stat.S_IFDIR | 0o755)


def file(name: str, data: bytes, *, executable: bool = False) -> Entry:
    """A plain file of root's."""
    return Entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data)


def cpio(entries: Iterable[Entry]) -> bytes:
    """A `newc` archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst).

    The same entries give the same bytes: inode numbers count up, times and owners are 0.
    """
    parts: list[bytes] = []
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (
            0 if entry.mode == 0 else number,
            entry.mode,
            0,  # uid
            0,  # gid
            2 if stat.S_ISDIR(entry.mode) else 1,
            0,  # mtime
            len(entry.data),
            0,  # major and minor of the device that the archive lies on
            0,
            *entry.device,
            len(name),
            0,  # check: unused in this variant
        )
        header = b"070701" + "".join(f"{value:08X}" for value in fields).encode()
        parts += [header, name, _padding(len(header) + len(name)), entry.data, _padding(len(entry.data))]
    return b"".join(parts)


def _padding(size: int) -> bytes:
    return bytes(-size % 4)


class Modules:
    """The loadable modules of one kernel, as depmod describes them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._dependencies: dict[str, list[str]] = {}
        for line in (directory / "modules.dep").read_text().splitlines():
            path, _, needed = line.partition(":")
            self._dependencies[path] = needed.split()
        self._by_name = {module_name(path): path for path in self._dependencies}
        self._aliases = [
            (pattern, name)
            for keyword, pattern, name in (
                line.split(" ", 2) for line in (directory / "modules.alias").read_text().splitlines()
            )
            if keyword == "alias"
        ]
        self._builtin = {module_name(line) for line in (directory / "modules.builtin").read_text().split()}

    def for_device_trees(self, trees: Iterable[bytes]) -> set[str]:
        """Names of the modules that drive something in one of these device trees on the way to the root."""
        blobs = tuple(trees)
        found = set()
        for pattern, name in self._aliases:
            if not pattern.startswith("of:"):
                continue
            compatible = pattern.partition("C")[2].removesuffix("*").removesuffix("C").encode()
            path = self._by_name.get(name, "")
            on_the_way = any(fnmatch.fnmatch(path, kind + "*") for kind in _ON_THE_WAY)
            if on_the_way and any(compatible + b"\0" in blob for blob in blobs):
                found.add(name)
        return found

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Paths of the modules and of all that they need, each behind what it needs; built-in ones need no path."""
        ordered: list[str] = []
        for name in sorted(names):
            if name in self._builtin:
                continue
            path = self._by_name.get(name)
            if path is None:
                raise ImageError(f"the kernel has no module {name}; was it excluded by the recipe?")
            # depmod lists what a module needs with the deepest last.
            for needed in (*reversed(self._dependencies[path]), path):
                if needed not in ordered:
                    ordered.append(needed)
        return ordered

    def read(self, path: str) -> bytes:
        """A module's ELF file, unpacked."""
        data = (self._directory / path).read_bytes()
        return lzma.decompress(data) if path.endswith(".xz") else data


def module_name(path: str) -> str:
    """The kernel's name of the module in a file: `virtio-blk.ko.xz` is virtio_blk."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def build(root: Path, kernel: str, trees: Mapping[str, bytes]) -> bytes:
    """The gzipped initramfs for a kernel of `root` and the boards of these device trees."""
    modules = Modules(root / "usr/lib/modules" / kernel)
    paths = modules.in_order({*_ALWAYS, *modules.for_device_trees(trees.values())})
    names = [module_name(path) + ".ko" for path in paths]
    entries = [
        *(directory(name) for name in ("bin", "dev", "modules", "proc", "root", "sys")),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        file("bin/busybox", (root / "usr/bin/busybox").read_bytes(), executable=True),
        file("init", _INIT.read_bytes(), executable=True),
        *(file(f"modules/{name}", modules.read(path)) for name, path in zip(names, paths, strict=True)),
        file("modules/order", "".join(f"{name}\n" for name in names).encode()),
    ]
    return gzip.compress(cpio(entries), compresslevel=6, mtime=0)
