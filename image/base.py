"""The base root: Debian's packages, unpacked and configured; made once per recipe and then taken from the cache.

A finished base is a directory of the cache:

    base-<digest>/root.tar    the root file system, nothing of a build host and nothing of one unit in it
    base-<digest>/twin/       a root of the host's architecture with the same release's tools (see image.twins)
    base-<digest>/headers/    Python's headers for the target, for the one wheel that we compile ourselves
"""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from image import twins
from image.errors import CommandFailedError, ToolMissingError
from image.recipe import Recipe
from image.run import run

_HERE = Path(__file__).parent
_BINFMT = Path("/proc/sys/fs/binfmt_misc")

#: Recipe keys that the base depends on; a change of any other leaves it in the cache.
_KEYS = ("suite", "architecture", "components", "mirror", "packages", "exclude")

#: Not needed on the unit, and what building needs beside it.
_HEADERS = "libpython3.13-dev"

#: What belongs to one machine or one build, not to the image (each is made again where it is needed).
_TRACES = (
    "boot/System.map-*",
    "dev/*",
    "etc/.pwd.lock",
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

    def unpack(self, root: Path) -> None:
        """A fresh copy of the root file system in `root`, which must not exist."""
        root.mkdir(parents=True)
        run("tar", "--extract", "--file", self.tar, "--directory", root, "--numeric-owner", "--xattrs",
            "--xattrs-include=*", "--same-permissions")  # fmt: skip


def base_root(recipe: Recipe, cache: Path) -> Base:
    """The base for a recipe, from the cache or made now."""
    directory = cache / f"base-{_digest(recipe)}"
    if (directory / "root.tar").exists():
        return Base(directory, cached=True)
    working = cache / f"{directory.name}.unfinished"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    root = working / "root"
    enable_emulation(recipe.architecture)
    _extract_twin(recipe, working / "twin", working / "twin.log")
    _bootstrap(recipe, root, working)
    if _foreign(recipe.architecture):
        twins.check_removed(root)
    _remove_traces(root)
    run("tar", "--create", "--file", working / "root.tar", "--directory", root, "--sort=name", "--numeric-owner",
        "--xattrs", "--xattrs-include=*", ".")  # fmt: skip
    shutil.rmtree(root)
    working.rename(directory)
    return Base(directory, cached=False)


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


def _digest(recipe: Recipe) -> str:
    wanted = {name: value for name, value in asdict(recipe).items() if name in _KEYS}
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode())
    for source in (Path(__file__), _HERE / "twins.py"):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _mmdebstrap(recipe: Recipe, *arguments: str, log: Path) -> None:
    mirror = [recipe.mirror] if recipe.mirror else []
    *options, target = arguments
    run(
        "mmdebstrap",
        "--mode=root",
        f"--components={','.join(recipe.components)}",
        "--aptopt=APT::Install-Recommends false",
        "--aptopt=Acquire::Retries 3",
        *options,
        recipe.suite,
        target,
        *mirror,
        env={"PYTHONPATH": str(_HERE.parent)},
        log=log,
    )


def _extract_twin(recipe: Recipe, twin: Path, log: Path) -> None:
    _mmdebstrap(recipe, "--variant=extract", f"--include={','.join(twins.PACKAGES)}", str(twin), log=log)


def _bootstrap(recipe: Recipe, root: Path, working: Path) -> None:
    patterns = [
        f"--dpkgopt=path-include={item[1:]}" if item.startswith("+") else f"--dpkgopt=path-exclude={item}"
        for item in recipe.exclude
    ]
    borrowed = working / "twin" if _foreign(recipe.architecture) else ""
    headers = working / "headers"
    headers.mkdir()
    python = sys.executable
    _mmdebstrap(
        recipe,
        "--variant=essential",
        f"--architectures={recipe.architecture}",
        f"--include={','.join(recipe.packages)}",
        "--dpkgopt=force-unsafe-io",
        *patterns,
        f'--extract-hook={python} -m image.twins install "$1" {borrowed}',
        f'--customize-hook={python} -m image.twins remove "$1"',
        f"--customize-hook=cd {headers} && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get download {_HEADERS} "
        f"&& dpkg-deb -x {_HEADERS}_*.deb . && rm {_HEADERS}_*.deb",
        str(root),
        log=working / "bootstrap.log",
    )


def _remove_traces(root: Path) -> None:
    for pattern in _TRACES:
        for path in root.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    # Empty, so that systemd makes one at the first boot without taking it for the very first boot of all.
    (root / "etc/machine-id").write_text("")
