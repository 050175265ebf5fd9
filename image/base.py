"""The base root: Debian's packages, unpacked and configured; made once per lock and then taken from the cache.

Nothing but the .debs that the lock pins is installed, from a local archive and without a network, and what is left of
the moment and the machine is taken away: the same lock gives the same `root.tar` to the bit. A finished base is a
directory of the cache:

    base-<digest>/root.tar    the root file system, nothing of a build host and nothing of one unit in it
    base-<digest>/twin/       a root of the host's architecture with the same release's tools (see image.twins)
    base-<digest>/headers/    Python's headers for the target, for the one wheel that we compile ourselves
    base-<digest>/boot/       what lay in the FAT of an official image that was opened (base.kind = "image")
"""

import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from image import debs, lock, opened, resolve, space, twins
from image.debs import Shown
from image.errors import CommandFailedError, SourceError, ToolMissingError
from image.lock import Lock, Pin
from image.python import compile_python
from image.recipe import Recipe
from image.run import run

_HERE = Path(__file__).parent
_BINFMT = Path("/proc/sys/fs/binfmt_misc")

#: Times in a base that no package brings: 2026-01-01. A fixed one keeps builds alike.
EPOCH = 1767225600

_INSTALLED = re.compile(r"^Package: (\S+)\n(?:.+\n)*?Status: install ok installed$", re.MULTILINE)

#: What belongs to one machine or one build, not to the image (each is made again where it is needed).
_TRACES = (
    "boot/System.map-*",
    "dev/*",
    "etc/.pwd.lock",
    "etc/apt/sources.list",
    "etc/*-",
    "etc/hosts",
    "etc/kernel/postinst.d/*",
    "etc/kernel/postrm.d/*",
    "etc/ssh/ssh_host_*",
    "run/*",
    "tmp/*",
    "var/cache/apt/*",
    "var/cache/debconf/*-old",
    "var/cache/ldconfig/aux-cache",
    "var/lib/apt/*",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/*-old",
    "var/lib/systemd/random-seed",
    "usr/lib/binfmt.d/*",
    "var/log/*",
    "var/tmp/*",
)


@dataclass(frozen=True)
class Base:
    """A base in the cache."""

    directory: Path
    cached: bool

    @property
    def tar(self) -> Path:
        """The root file system."""
        return self.directory / "root.tar"

    @property
    def twin(self) -> Path:
        """Tools of the host's architecture."""
        return self.directory / "twin"

    @property
    def headers(self) -> Path:
        """The directory that holds the target's `usr/include`."""
        return self.directory / "headers"

    @property
    def boot(self) -> Path | None:
        """What lay in the FAT of an opened image; None for a base that was made of packages."""
        path = self.directory / "boot"
        return path if path.is_dir() else None

    def unpack(self, root: Path) -> None:
        """A fresh copy of the root file system in `root`, which must not exist."""
        root.mkdir(parents=True)
        run("tar", "--extract", "--file", self.tar, "--directory", root, "--numeric-owner", "--xattrs",
            "--xattrs-include=*", "--same-permissions")  # fmt: skip


def base_root(recipe: Recipe, cache: Path, shown: Shown = lambda _: None) -> Base:
    """The base for a recipe, from the cache or made now.

    Args:
        recipe: whose lock lies beside it.
        cache: held by the caller (image.cache).
        shown: told what goes on.

    Raises:
        LockError: the lock is missing or not the recipe's.
        ArchiveError: a package is not to be had, or has other bits than the lock pins.
        DiskFullError: the cache has no room.
    """
    pinned = resolve.locked(recipe)
    host = run("dpkg", "--print-architecture").strip()
    directory = cache / f"base-{_digest(recipe, pinned, host)}"
    if (directory / "root.tar").exists():
        shown("cached")
        return Base(directory, cached=True)
    with _unfinished(directory) as working, space.room({cache: space.BASE_BYTES}):
        _make(recipe, pinned, host, cache, working, shown)
    shown("made")
    return Base(directory, cached=False)


@contextmanager
def _unfinished(directory: Path) -> Iterator[Path]:
    """A directory that takes its name when it is whole, and goes when it will not be."""
    working = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        yield working
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)  # half a gigabyte; what went wrong is in the log
        raise
    run("sync", "--file-system", working)  # what has its name is whole, and is never looked at again
    working.rename(directory)


def _make(recipe: Recipe, pinned: Lock, host: str, cache: Path, working: Path, shown: Shown) -> None:
    root = working / "root"
    if recipe.base.kind == "image":  # before anything is fetched for it
        shown("opening the image")
        opened.open_image(recipe.base, root, working / "boot", working)
        _check_packages(recipe, root)
    sets = (lock.TARGET, lock.HEADERS, f"twin-{host}")
    files = debs.collect([pin for name in sets for pin in pinned.sets[name]], recipe.base, cache, shown)
    shown("unpacking tools")
    debs.unpack([files[pin] for pin in pinned.sets[f"twin-{host}"]], working / "twin")
    debs.unpack([files[pin] for pin in pinned.sets[lock.HEADERS]], working / "headers")
    if recipe.base.kind != "image":
        shown("installing packages")
        _bootstrap(recipe, {pin: files[pin] for pin in pinned.sets[lock.TARGET]}, root, working)
    _remove_traces(root)
    _compile_system(root, working / "twin")
    shown("packing")
    _pack(root, working / "root.tar")
    shutil.rmtree(root)


def _check_packages(recipe: Recipe, root: Path) -> None:
    """That an opened image has the packages of the recipe; none can be added to it."""
    status = root / "var/lib/dpkg/status"
    if not status.exists():
        raise SourceError(
            f"{recipe.base.source} is no Debian system: it has no {status.relative_to(root)}; name another"
        )
    there = set(_INSTALLED.findall(status.read_text(errors="replace")))
    absent = sorted(set(recipe.packages) - there)
    if absent:
        raise SourceError(
            f"{recipe.base.source} has no package {', '.join(absent)}: take that out of the recipe's packages, or take"
            " an image that has it"
        )


def enable_emulation(architecture: str) -> None:
    """Let this machine run programs of the target, by qemu-user and the kernel's binfmt_misc.

    The registration is Debian's own line for it and lasts until the next boot of this machine.

    Raises:
        ToolMissingError: qemu-user-static is not installed.
        CommandFailedError: the kernel refuses, as it does to anybody but root.
    """
    if not _foreign(architecture) or (_BINFMT / "qemu-aarch64").exists():
        return
    rule = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
    if not rule.exists():
        raise ToolMissingError(f"{rule} is not there (qemu-user-static); `make setup` installs it")
    if not (_BINFMT / "register").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", _BINFMT)
    if (_BINFMT / "qemu-aarch64").exists():
        return
    try:
        (_BINFMT / "register").write_text(rule.read_text().strip())
    except OSError as error:
        raise CommandFailedError(
            f"the kernel does not take the emulator for arm64 programs ({error}); run `make image` as root"
        ) from error


def _foreign(architecture: str) -> bool:
    return run("dpkg", "--print-architecture").strip() != architecture


def _digest(recipe: Recipe, pinned: Lock, host: str) -> str:
    """What a base depends on; not the addresses of the archives, since digests say what came from them."""
    wanted = {
        "suite": recipe.base.suite,
        "exclude": recipe.exclude,
        # An opened image is looked into for the recipe's packages while it is made a base, and then no more.
        "image": [recipe.base.source_sha256, *sorted(recipe.packages)] if recipe.base.kind == "image" else "",
        "packages": [pin.line for name in (lock.TARGET, lock.HEADERS, f"twin-{host}") for pin in pinned.sets[name]],
    }
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode())
    for name in ("base.py", "debs.py", "opened.py", "python.py", "twins.py"):
        digest.update((_HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def _bootstrap(recipe: Recipe, files: Mapping[Pin, Path], root: Path, working: Path) -> None:
    patterns = [
        f"--dpkgopt=path-include={item[1:]}" if item.startswith("+") else f"--dpkgopt=path-exclude={item}"
        for item in recipe.exclude
    ]
    enable_emulation(recipe.base.architecture)
    python = shlex.quote(sys.executable)
    borrowed = shlex.quote(str(working / "twin")) if _foreign(recipe.base.architecture) else ""
    archive = debs.write_pool(files, working / "archive", recipe.base.suite, recipe.base.architecture)
    run(
        "mmdebstrap",
        "--mode=root",
        "--variant=essential",
        f"--architectures={recipe.base.architecture}",
        "--aptopt=APT::Install-Recommends false",
        # All by name: what is installed is what is locked, not what apt makes of it a second time.
        f"--include={','.join(sorted(pin.name for pin in files))}",
        "--dpkgopt=force-unsafe-io",
        *patterns,
        f'--extract-hook={python} -m image.twins install "$1" {borrowed}',
        f'--customize-hook={python} -m image.twins remove "$1"',
        recipe.base.suite,
        root,
        archive,
        env={"PYTHONPATH": str(_HERE.parent), "SOURCE_DATE_EPOCH": str(EPOCH)},
        log=working / "bootstrap.log",
    )
    shutil.rmtree(working / "archive")
    if borrowed:
        twins.check_removed(root)


def _pack(root: Path, tar: Path) -> None:
    """The tree as a tar that depends on nothing but the tree: sorted, and no time later than the epoch."""
    run("tar", "--create", "--file", tar, "--directory", root, "--sort=name", "--numeric-owner", "--format=posix",
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime", f"--mtime=@{EPOCH}", "--clamp-mtime",
        "--xattrs", "--xattrs-include=*", ".")  # fmt: skip


def _compile_system(root: Path, twin: Path) -> None:
    """Byte code of the system's Python that no change of a file's time makes invalid: the image's root is read-only."""
    for place in ("usr/lib/python3.13", "usr/lib/python3"):
        for stale in (root / place).rglob("__pycache__"):
            shutil.rmtree(stale)
        compile_python(twin, root / place, f"/{place}")


def _remove_traces(root: Path) -> None:
    for pattern in _TRACES:
        for path in root.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    # Empty, so that systemd makes one at the first boot without taking it for the very first boot of all.
    (root / "etc/machine-id").write_text("")
    (root / "etc/machine-id").chmod(0o444)
