"""Native twins: while packages of another architecture are configured, their scripts run native tools.

Nearly all the time of a foreign bootstrap is spent in maintainer scripts, and nearly all of that in emulated `sh`,
`perl`, `sed`, `python3`, `systemctl`... So the same release's tools of the host's own architecture stand in for them:
each foreign file is diverted (dpkg-divert's own database), the native one takes its name, and its libraries lie beside
those of the target, by multiarch. When all is configured the diversions are undone and nothing native is left.

`dpkg` itself stays foreign: a native one would take every package for a foreign one.

mmdebstrap calls this module as a hook: `python -m image.twins install ROOT TWIN` after the essential packages are
extracted, `python -m image.twins remove ROOT` at the end.
"""

import shutil
import sys
from pathlib import Path

from image.errors import ImageError
from image.run import multiarch

#: Packages of the host's architecture that the twin root is extracted from.
PACKAGES = (
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "dpkg",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "kmod",
    "mawk",
    "perl-base",
    "python3.13-minimal",
    "sed",
    "systemd",
    "tar",
    "udev",
)

#: Which of their programs stand in; everything below these packages' directories of programs, save what is kept.
_PROGRAM_DIRECTORIES = ("usr/bin", "usr/sbin")

#: Programs that must stay foreign (see above), or whose output depends on the architecture that they were built for.
_KEPT = frozenset({"dpkg", "dpkg-query", "dpkg-trigger", "dpkg-split", "ldconfig", "systemd-machine-id-setup"})

_SUFFIX = ".foreign"
_LEDGER = Path("var/lib/dpkg/picket-twins")

#: Helpers whose work is void on an image (nothing is running that could be restarted).
VOID = ("usr/sbin/invoke-rc.d", "usr/sbin/mktirfs", "usr/sbin/update-tirfs", "etc/kernel/postinst.d/z50-raspi-firmware")

_VOID_SCRIPT = "#!/bin/sh\nexit 0\n"


def install(root: Path, twin: Path | None) -> None:
    """Let the twin's programs stand in for those of `root`.

    Args:
        root: the foreign root, its essential packages extracted and not yet configured.
        twin: a root of the host's architecture; None where both are the same, and then only `VOID` is diverted.
    """
    diverted = list(VOID)
    if twin is not None:
        programs = _programs(twin)
        for name in programs:
            _stand_in(twin / name, root / name)
        diverted += programs
        _lend_libraries(twin, root)
    for name in VOID:
        script = root / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(_VOID_SCRIPT)
        script.chmod(0o755)
    records = "".join(f"/{name}\n/{name}{_SUFFIX}\n:\n" for name in diverted)
    (root / "var/lib/dpkg/diversions").write_text(records)
    (root / _LEDGER).write_text("".join(f"{name}\n" for name in diverted))


def remove(root: Path) -> None:
    """Give every diverted file its name back and take away everything native."""
    for name in (root / _LEDGER).read_text().splitlines():
        (root / name).unlink(missing_ok=True)
        foreign = root / f"{name}{_SUFFIX}"
        if foreign.exists() or foreign.is_symlink():
            foreign.rename(root / name)
    (root / "var/lib/dpkg/diversions").write_text("")
    (root / "var/lib/dpkg/diversions-old").unlink(missing_ok=True)
    for name in _lent(root):
        path = root / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
    (root / f"{_LEDGER}-libraries").unlink(missing_ok=True)
    (root / _LEDGER).unlink()


def check_removed(root: Path) -> None:
    """Make sure that nothing native was left behind.

    Raises:
        ImageError: a diverted or native file is still there.
    """
    left = [str(path.relative_to(root)) for path in root.glob(f"usr/*bin/*{_SUFFIX}")]
    if left or (root / _LEDGER).exists():
        raise ImageError(f"native twins were left in the root: {', '.join(left[:5])}")


def _programs(twin: Path) -> list[str]:
    found = []
    for directory in _PROGRAM_DIRECTORIES:
        for path in sorted((twin / directory).iterdir()):
            owner_ok = path.name not in _KEPT and not path.name.endswith(("-config", "-gnu"))
            if owner_ok and not path.is_symlink() and path.is_file() and _is_elf(path):
                found.append(f"{directory}/{path.name}")
    return found


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _stand_in(native: Path, place: Path) -> None:
    """Put the native program at its place; what stands there already steps aside."""
    if place.exists():
        place.rename(place.with_name(place.name + _SUFFIX))
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(native, place)


def _lend_libraries(twin: Path, root: Path) -> None:
    """Copy the twin's multiarch directories and its loader, and remember them for `remove`."""
    lent = []
    libraries = f"usr/lib/{multiarch()}"
    shutil.copytree(twin / libraries, root / libraries, symlinks=True, dirs_exist_ok=False)
    lent.append(libraries)
    if (twin / "usr/lib64").is_dir() and not (root / "usr/lib64").exists():
        shutil.copytree(twin / "usr/lib64", root / "usr/lib64", symlinks=True)
        (root / "lib64").symlink_to("usr/lib64")
        lent += ["lib64", "usr/lib64"]
    (root / f"{_LEDGER}-libraries").write_text("".join(f"{name}\n" for name in lent))


def _lent(root: Path) -> list[str]:
    ledger = root / f"{_LEDGER}-libraries"
    return ledger.read_text().splitlines() if ledger.exists() else []


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    if verb == "install":
        install(Path(paths[0]), Path(paths[1]) if len(paths) > 1 else None)
    else:
        remove(Path(paths[0]))
