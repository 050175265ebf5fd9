"""Packages from the archive: what apt would install, and the .debs themselves, in a cache by digest.

    <cache>/debs/<sha256>.deb

apt decides, from the archive's own signed index, what a lock pins (`Archive.closure`). Afterwards only the lock counts:
`collect` takes .debs from the cache, has apt fetch those that are missing, and lets no other bits pass.
`write_pool` makes a local archive of them, which mmdebstrap installs from without a network.

mmdebstrap lays out apt's directories, because it knows the address of Debian's archive for each release, and we do not.
"""

import difflib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from image.errors import ArchiveError, CommandFailedError
from image.lock import Pin
from image.recipe import BaseSettings
from image.run import note, run, tool

#: Told what is going on, in a few words.
Shown = Callable[[str], None]

_URI = re.compile(r"^'(?P<uri>[^']+)' (?P<deb>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})$", re.MULTILINE)
_FIELD = re.compile(r"^(Package|Version|Architecture|SHA256): (.*)$", re.MULTILINE)
_NOT_THERE = re.compile(
    r"^E: (?:Unable to locate package (\S+)|Package '([^']+)' has no installation candidate"
    r"|Couldn't find any package by (?:glob|regex) '([^']+)')",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Archive:
    """apt's view of a base's archives, for one architecture."""

    architecture: str
    configuration: Path

    def apt(self, program: str, *arguments: str) -> str:
        """What apt-get or apt-cache prints."""
        return run(program, *arguments, env={"APT_CONFIG": str(self.configuration)})

    def closure(self, names: Sequence[str]) -> list[Pin]:
        """What apt would install, were nothing installed, for these names; the best version of each.

        Raises:
            ArchiveError: a package does not exist, or the packages do not go together.
        """
        return self._pins("install", names)

    def single(self, name: str) -> list[Pin]:
        """The package alone, without what it depends on."""
        return self._pins("download", [name])

    def _pins(self, verb: str, names: Sequence[str]) -> list[Pin]:
        try:
            said = self.apt("apt-get", "--yes", "--print-uris", "-oAcquire::ForceHash=SHA256", verb, *names)
        except CommandFailedError as error:
            raise self._unresolved(str(error)) from error
        pins = [_pin(found) for found in _URI.finditer(said)]
        if not pins:
            raise ArchiveError(f"apt names no package for {', '.join(names)}; look at what it says:\n{said[-500:]}")
        return sorted(pins)

    def _unresolved(self, said: str) -> ArchiveError:
        absent = sorted({next(filter(None, groups)) for groups in _NOT_THERE.findall(said)})
        if not absent:
            return ArchiveError(f"these do not go together:\n{said}")
        near = difflib.get_close_matches(absent[0], self.apt("apt-cache", "pkgnames").split(), n=1, cutoff=0.8)
        hint = f": did you mean {near[0]}?" if near and len(absent) == 1 else "; mend the name or take it out"
        return ArchiveError(f"the archive has no package {', '.join(absent)}{hint}")

    def lacking(self, pins: Sequence[Pin]) -> list[Pin]:
        """Those of the pins that the archive does not have any more, or has with other bits."""
        if not pins:
            return []
        try:
            said = self.apt("apt-cache", "show", *sorted({pin.name for pin in pins}))
        except CommandFailedError as error:
            if "No packages found" not in str(error):
                raise
            return list(pins)
        there = {tuple(dict(_FIELD.findall(text)).get(key) for key in ("Package", "Version", "Architecture", "SHA256"))
                 for text in said.split("\n\n")}  # fmt: skip
        return [pin for pin in pins if (pin.name, pin.version, pin.architecture, pin.sha256) not in there]

    def download(self, pins: Sequence[Pin], folder: Path, shown: Shown) -> None:
        """Fetch .debs by name and version into a folder, under apt's names for them."""
        command = [tool("apt-get"), "--quiet", "download", *(f"{pin.name}={pin.version}" for pin in pins)]
        environment = _environment({"APT_CONFIG": str(self.configuration)})
        said: list[str] = []
        note(f"$ {shlex.join(command)}")
        with subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            close_fds=False,  # the lock of the cache goes along (image.cache)
        ) as apt:
            assert apt.stdout is not None  # noqa: S101 - a pipe was asked for
            try:
                for line in apt.stdout:
                    said.append(line)
                    note(line.rstrip())
                    shown(f"fetching {sum(text.startswith('Get:') for text in said)} of {len(pins)} packages")
            except BaseException:
                apt.kill()  # its folder goes
                raise
        if apt.returncode:
            raise ArchiveError(
                f"apt could not fetch all of {len(pins)} packages:\n{''.join(said[-15:])}"
                "Try again; what was fetched is kept"
            )


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8", **more}


@contextmanager
def opened(base: BaseSettings, architecture: str) -> Iterator[Archive]:
    """The archives of a base, their signed indexes fetched and verified by apt.

    Raises:
        CommandFailedError: an archive cannot be reached, or its signature is not one of the keyring's.
    """
    with tempfile.TemporaryDirectory(prefix="picket-apt-") as name:
        working = Path(name)
        root, configuration = working / "root", working / "apt.conf"
        vendor = []
        if base.kind == "raspios":
            listed = working / "vendor.list"
            listed.write_text(_vendor_line(base, working) + "\n")
            vendor = [f'--setup-hook=cp {listed} "$1/etc/apt/sources.list.d/"']
        run(
            "mmdebstrap", "--mode=chrootless", "--variant=custom",
            "--skip=download/empty,cleanup/apt,check/qemu",
            f"--architectures={architecture}",
            f"--components={','.join(base.components)}",
            "--aptopt=APT::Install-Recommends false",
            "--aptopt=Acquire::Retries 3",
            *vendor,
            base.suite, root, *_mirror(base, working),
        )  # fmt: skip
        configuration.write_text(
            f'APT::Architecture "{architecture}";\n'
            f'APT::Architectures "{architecture}";\n'
            f'Dir "{root}";\n'
            f'Dir::State::status "{root}/var/lib/dpkg/status";\n'
            'Dir::Etc::Trusted "/etc/apt/trusted.gpg";\n'
            'Dir::Etc::TrustedParts "/etc/apt/trusted.gpg.d/";\n'
            'APT::Sandbox::User "root";\n'
            'pkgCacheGen::ForceEssential ",";\n'  # apt takes itself for essential
        )
        yield Archive(architecture, configuration)


def _mirror(base: BaseSettings, working: Path) -> list[str]:
    """Debian's archive as mmdebstrap takes it; nothing for its default."""
    if not base.mirror:
        return []
    if base.keyring is None:
        return [base.mirror]
    keyring = _near(base.keyring, working / "debian")
    return [_source_line(base.mirror, keyring, base.suite, base.components)]


def _vendor_line(base: BaseSettings, working: Path) -> str:
    vendor = base.vendor
    if vendor.keyring is None:
        raise ArchiveError("base.vendor.keyring is missing; without it nobody could tell whose packages come")
    keyring = _near(vendor.keyring, working / "vendor")
    return _source_line(vendor.mirror, keyring, vendor.suite or base.suite, vendor.components)


def _near(keyring: Path, place: Path) -> Path:
    """A copy of a keyring at a place that apt's list of sources can name: no spaces."""
    return Path(shutil.copyfile(keyring, place.with_suffix(keyring.suffix)))


def _source_line(mirror: str, keyring: Path, suite: str, components: Sequence[str]) -> str:
    return f"deb [signed-by={keyring}] {mirror} {suite} {' '.join(components)}"


def _pin(found: re.Match[str]) -> Pin:
    """The pin in one line of `--print-uris`."""
    name, version, architecture = urllib.parse.unquote(found["deb"]).removesuffix(".deb").split("_")
    place = urllib.parse.unquote(found["uri"])
    _, pool, inside = place.partition("/pool/")
    file = f"pool/{inside}" if pool else place.rpartition("/")[2]
    return Pin(name, version, architecture, int(found["size"]), found["sha256"], file)


# --- cache --------------------------------------------------------------------------------------------------------


def cached(pin: Pin, cache: Path) -> Path:
    """Where the cache has a package, if it has it."""
    return cache / "debs" / f"{pin.sha256}.deb"


def collect(pins: Sequence[Pin], base: BaseSettings, cache: Path, shown: Shown) -> dict[Pin, Path]:
    """The .deb of each pin, from the cache; what is missing is fetched by apt.

    Raises:
        ArchiveError: the archive does not have a package any more, or it or the cache has other bits than are pinned;
            the message names the package and the way out.
    """
    (cache / "debs").mkdir(parents=True, exist_ok=True)
    missing = [pin for pin in pins if not cached(pin, cache).exists()]
    for architecture in sorted({fetched_as(pin, base) for pin in missing}):
        with opened(base, architecture) as archive:
            wanted = [pin for pin in missing if fetched_as(pin, base) == architecture]
            _check_available(archive.lacking(wanted), cache)
            with tempfile.TemporaryDirectory(dir=cache, prefix="build-debs-") as folder:
                try:
                    archive.download(wanted, Path(folder), shown)
                except ArchiveError:
                    _keep(wanted, Path(folder), cache, whole=False)
                    raise
                _keep(wanted, Path(folder), cache, whole=True)
    return {pin: _verified(pin, cached(pin, cache)) for pin in pins}


def fetched_as(pin: Pin, base: BaseSettings) -> str:
    """The architecture for which apt is asked about a package."""
    return base.architecture if pin.architecture == "all" else pin.architecture


def _check_available(lacking: Sequence[Pin], cache: Path) -> None:
    if lacking:
        named = ", ".join(str(pin) for pin in lacking[:5]) + (f" and {len(lacking) - 5} more" if lacking[5:] else "")
        raise ArchiveError(
            f"the archive has no more what the lock pins: {named}. Either `make image-lock` (newer packages), or put"
            f" the old .deb into the cache as {cached(lacking[0], cache)}"
        )


def _keep(pins: Sequence[Pin], folder: Path, cache: Path, *, whole: bool) -> None:
    """Take what was fetched into the cache, under its digest; where apt gave up (not `whole`), what came intact."""
    by_name = {(pin.name, pin.version, pin.architecture): pin for pin in pins}
    for path in sorted(folder.glob("*.deb")):
        name, version, architecture = urllib.parse.unquote(path.name).removesuffix(".deb").split("_")
        pin = by_name[name, version, architecture]
        if whole or _digest(path) == pin.sha256:
            _verified(pin, path).replace(cached(pin, cache))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(pin: Pin, path: Path) -> Path:
    found = _digest(path)
    if found != pin.sha256:
        raise ArchiveError(
            f"{path} is not {pin} as the lock pins it: its SHA-256 is {found}. Delete it and build again; if the"
            " archive itself has other bits, `make image-lock`"
        )
    return path


# --- local archive ------------------------------------------------------------------------------------------------


def write_pool(debs: Mapping[Pin, Path], folder: Path, suite: str, architecture: str) -> str:
    """Make a local archive of exactly these packages; its line for apt.

    It is not signed, and apt is told to trust it: each file was compared with the lock, whose digests come from the
    archive's signed index. The same packages give the same archive.
    """
    index = folder / f"dists/{suite}/main/binary-{architecture}/Packages"
    index.parent.mkdir(parents=True)
    (folder / "pool").mkdir()
    paragraphs = []
    for pin, deb in sorted(debs.items()):
        place = folder / "pool" / f"{pin.sha256}.deb"
        _link(deb, place)
        control = run("dpkg-deb", "--field", deb).strip()
        paragraphs.append(f"{control}\nFilename: pool/{place.name}\nSize: {pin.size}\nSHA256: {pin.sha256}\n")
    content = "\n".join(paragraphs).encode()
    index.write_bytes(content)
    (folder / f"dists/{suite}/Release").write_text(
        f"Suite: {suite}\nCodename: {suite}\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nArchitectures: {architecture}\n"
        f"Components: main\nSHA256:\n {hashlib.sha256(content).hexdigest()} {len(content)}"
        f" main/binary-{architecture}/Packages\n"
    )
    return f"deb [trusted=yes] copy:{urllib.parse.quote(str(folder))} {suite} main"


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def unpack(debs: Sequence[Path], folder: Path) -> None:
    """The files of packages in a directory, nothing configured."""
    folder.mkdir(parents=True, exist_ok=True)
    for deb in debs:
        run("dpkg-deb", "--extract", deb, folder)
