"""The initramfs, made natively: a few programs, the modules that lead to the root file system, and our own /init.

Debian's kernel has its file systems and every disk driver as modules. Which ones a board needs on the way to its root
is read from its device tree: every module that drives a compatible device of a kind listed in `_ON_THE_WAY`.

/init is told what it must know by two small files: `layout` (shell variables: which partition is what) and `shared`
(which directories both slots share).
"""

import fnmatch
import gzip
import lzma
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.errors import ImageError
from image.run import run

#: What the kernel starts.
INIT = Path(__file__).with_name("init")

#: For any board, by name: the file systems with what they ask for by other ways than by a module's name (crc32c through
#: the crypto API, FAT's character sets).
_ALWAYS = (
    "crc32c_generic",
    "dm_verity",
    "ext4",
    "nls_ascii",
    "nls_cp437",
    "nls_utf8",
    "overlay",
    "squashfs",
    "vfat",
)

#: The disks of QEMU's machines, which Raspberry Pi's own kernels have no drivers for.
_VIRTUAL = ("virtio_blk", "virtio_mmio", "virtio_pci")

#: Faster SHA-256 for verity, the best last; a processor without the instructions refuses the module, which is no harm.
_FASTER = ("sha256_arm64", "sha2_ce")

#: Programs of the root that /init uses; their libraries come along.
_PROGRAMS = ("usr/sbin/dmsetup", "usr/sbin/e2fsck")
_LIBRARIES = "usr/lib/aarch64-linux-gnu"
_LOADER = "lib/ld-linux-aarch64.so.1"

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

    def has(self, name: str) -> bool:
        """Whether there is a loadable module of this name, or a built-in one."""
        return name in self._by_name or name in self._builtin

    def read(self, path: str) -> bytes:
        """A module's ELF file, unpacked."""
        data = (self._directory / path).read_bytes()
        return lzma.decompress(data) if path.endswith(".xz") else data


def module_name(path: str) -> str:
    """The kernel's name of the module in a file: `virtio-blk.ko.xz` is virtio_blk."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def build(
    root: Path, kernel: str, trees: Mapping[str, bytes], layout: Mapping[str, object], shared: Sequence[str]
) -> bytes:
    """The gzipped initramfs for a kernel of `root`, the boards of these device trees, and a disk.

    Args:
        root: where programs and modules come from.
        kernel: its version.
        trees: device trees by name.
        layout: variables for /init, by name.
        shared: directories that both slots share.
    """
    modules = Modules(root / "usr/lib/modules" / kernel)
    faster = [name for name in _FASTER if modules.has(name)]
    virtual = [name for name in _VIRTUAL if modules.has(name)]
    paths = modules.in_order({*_ALWAYS, *virtual, *modules.for_device_trees(trees.values())})
    paths += [path for path in modules.in_order(faster) if path not in paths]
    names = [module_name(path) + ".ko" for path in paths]
    busybox = root / "usr/bin/busybox"
    programs = [root / name for name in _PROGRAMS]
    for path in (busybox, *programs):
        if not path.is_file():
            raise ImageError(f"the root has no {path.relative_to(root)}, which the initramfs needs: add its package")
    entries = [
        *(directory(name) for name in _DIRECTORIES),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        file("bin/busybox", busybox.read_bytes(), executable=True),
        *(file(f"bin/{path.name}", path.read_bytes(), executable=True) for path in programs),
        file(_LOADER, (root / "usr" / _LOADER).resolve().read_bytes(), executable=True),
        *(
            file(f"lib/{name}", (root / _LIBRARIES / name).read_bytes())
            for name in libraries(root, [busybox, *programs])
        ),
        file("init", INIT.read_bytes(), executable=True),
        file("layout", "".join(f"{name}={value}\n" for name, value in layout.items()).encode()),
        file("shared", "".join(f"{path}\n" for path in shared).encode()),
        *(file(f"modules/{name}", modules.read(path)) for name, path in zip(names, paths, strict=True)),
        file("modules/order", "".join(f"{name}\n" for name in names).encode()),
    ]
    return gzip.compress(cpio(entries), compresslevel=6, mtime=0)


_DIRECTORIES = ("bin", "control", "dev", "lib", "modules", "proc", "root", "sys")


def libraries(root: Path, programs: Iterable[Path]) -> list[str]:
    """Names of the shared libraries that programs of `root` need, and that those need.

    Raises:
        ImageError: the root does not have one.
    """
    found: set[str] = set()
    waiting = list(programs)
    while waiting:
        for name in _needed(waiting.pop()):
            path = root / _LIBRARIES / name
            if name.startswith("ld-linux") or name in found:
                continue
            if not path.exists():
                raise ImageError(f"the root has no {name}, which a program of the initramfs needs")
            found.add(name)
            waiting.append(path)
    return sorted(found)


def _needed(program: Path) -> list[str]:
    said = run("readelf", "--dynamic", "--wide", program)
    return re.findall(r"\(NEEDED\)\s+Shared library: \[([^\]]+)\]", said)
