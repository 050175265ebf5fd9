"""Static checks of a built image, without mounting or booting it: each rung says what is wrong and what to do about it.

`climb` looks at one image; what `make image` builds passes all. Tests tamper with an image and see each rung break.
"""

import datetime as dt
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Final

from rich.text import Text

from image import disk, inside
from image.errors import CommandFailedError, ImageError, ToolMissingError
from image.firmware import BOARDS, Board, FileMedium, NoBootError, look
from image.firmware.config import AUTOBOOT_BYTES, parse_autoboot
from image.firmware.fat import Fat
from image.inside import File
from image.manifest import ImageManifest, Partition
from image.run import run

#: The MBR type of what a description calls by its file system; an empty slot's is that of what will be in it.
_TYPES: Final[Mapping[str, frozenset[int]]] = MappingProxyType(
    {
        "vfat": frozenset({disk.FAT32_LBA}),
        "squashfs": frozenset({disk.LINUX}),
        "ext4": frozenset({disk.LINUX}),
        "none": frozenset({disk.FAT32_LBA, disk.LINUX}),
    }
)

#: The files by which a slot is chosen, by control.
_CONTROL_FILES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"autoboot": ("autoboot.txt",), "os-prefix": ("slot.txt", "tryslot.txt")}
)

#: Programs that may become another user by being started. There is none: what must be root is started by systemd.
SET_ID: Final[frozenset[str]] = frozenset()

#: Programs that serve nobody but an intruder, by name, wherever they lie.
_TOOLS: Final = frozenset(
    [
        *("sudo", "doas", "pkexec", "apt", "apt-get", "aptitude", "pip", "pip3", "telnetd", "in.telnetd"),
        *("gcc", "g++", "cc", "c++", "clang", "tcc", "ld", "gdb", "strace"),
    ]
)
_PROGRAMS: Final = re.compile(r"/(usr/)?(local/)?s?bin/[^/]+")

#: A private key in a text form with some of its body: programs that read keys have the first line alone in them.
_PRIVATE_KEY: Final = re.compile(
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----\r?\n(?:[A-Za-z-]+: [^\n]*\n|\r?\n)*[A-Za-z0-9+/=]{16}"
)
_HOST_KEY: Final = re.compile(r"/etc/ssh/ssh_host_[^/]*key")

#: What each unit makes for itself.
_OF_ONE_UNIT: Final = ("/var/lib/systemd/random-seed", "/var/lib/dbus/machine-id", "/var/lib/picket/sealed")

#: What stands in /etc/shadow for somebody whom no password lets in (shadow(5)).
_NO_PASSWORD: Final = frozenset({"*", "!", "!*", "!!"})

_WORLD_MAY_WRITE: Final = 0o002
_STICKY: Final = 0o1000
_SET_ID: Final = 0o6000

#: Findings of one rung that are shown.
_SHOWN: Final = 8

#: How long files are that are looked into by name.
_SHORT: Final = 65536


@dataclass(frozen=True)
class Finding:
    """What a rung found; a note is no failure."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Result:
    """A rung that was climbed."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def held(self) -> bool:
        """Whether nothing but notes were found."""
        return all(finding.note for finding in self.findings)


def climb(manifest: ImageManifest) -> Iterator[Result]:
    """Check an image, one rung after the other.

    Raises:
        ManifestError: the image is not there.
        ToolMissingError: a program that looks at it is not on this machine.
    """
    with inside.raw(manifest) as image, tempfile.TemporaryDirectory(prefix="picket-lint-") as folder:
        opened = Opened(manifest, image, Path(folder))
        for name, rung in RUNGS.items():
            try:
                findings = tuple(rung(opened))
            except ToolMissingError:  # nothing was looked at
                raise
            except (ImageError, NoBootError) as error:
                findings = (Finding(str(error)),)
            yield Result(name, findings)


class Opened:
    """An image under examination; what several rungs look at is read once.

    Args:
        manifest: its description.
        image: the raw image.
        folder: for partitions in files of their own.
    """

    def __init__(self, manifest: ImageManifest, image: Path, folder: Path) -> None:
        self.manifest = manifest
        self.image = image
        self._folder = folder

    def parts(self, kind: str) -> list[Partition]:
        """The partitions of a kind."""
        return [part for part in self.manifest.partitions if part.type == kind]

    def carved(self, part: Partition) -> Path:
        """A partition as a file of its own, holes kept as holes."""
        path = self._folder / f"partition-{part.index}"
        if not path.exists():
            run("dd", f"if={self.image}", f"of={path}", "bs=1M", "conv=sparse", "iflag=skip_bytes,count_bytes",
                f"skip={part.start}", f"count={part.size}")  # fmt: skip
        return path

    def boot_file(self, part: Partition, name: str) -> bytes | None:
        """A file of a FAT partition; None where there is none."""
        with FileMedium(self.image) as medium:
            return Fat(medium, part.start, part.size).read(name)

    @property
    def files(self) -> dict[str, File]:
        """The root's files by path."""
        return self._root[0]

    @property
    def keys(self) -> list[str]:
        """Paths of private keys in the root and in the boot partitions."""
        return self._root[2]

    def lines(self, path: str) -> list[str]:
        """The lines of a short file of the root.

        Raises:
            ImageError: there is none.
        """
        found = self._root[1].get(path)
        if found is None:
            raise ImageError(f"the root has no {path}: build the image again")
        return found.decode(errors="replace").splitlines()

    @cached_property
    def _root(self) -> tuple[dict[str, File], dict[str, bytes], list[str]]:
        files: dict[str, File] = {}
        texts: dict[str, bytes] = {}
        keys = []
        for part in self.parts("squashfs"):
            for file, content in inside.files_of_root(self.image, part):
                files[file.path] = file
                if file.path.startswith("/etc/") and file.kind == "-" and file.size < _SHORT:
                    texts[file.path] = content
                if _PRIVATE_KEY.search(content):
                    keys.append(file.path)
        for part in self.parts("vfat"):
            found = inside.files_of_fat(self.image, part)
            keys += [f"{part.label}:{file.path}" for file, content in found if _PRIVATE_KEY.search(content)]
        return files, texts, keys


# --- rungs --------------------------------------------------------------------------------------------------------


def _partition_table(image: Opened) -> Iterator[Finding]:
    with FileMedium(image.image) as medium:
        signature, slices = disk.read_table(lambda place: medium.read(place, disk.SECTOR))
    found = {part.number: part for part in slices if part.type != disk.EXTENDED_LBA}
    for part in image.manifest.partitions:
        there = found.pop(part.index, None)
        if there is None or (there.start, there.size) != (part.start, part.size):
            yield Finding(f"partition {part.index} is not where the description says: build the image again")
        elif part.type not in _TYPES:
            yield Finding(
                f"partition {part.index} is {part.type!r}, says the description, and no rung looks into such a one:"
                f" write one of {', '.join(_TYPES)}"
            )
        elif there.type not in _TYPES[part.type]:
            yield Finding(f"partition {part.index} has the type {there.type:#04x}, which is not for {part.type}")
        if part.partuuid != disk.partuuid(signature, part.index):
            yield Finding(f"partition {part.index} is not {part.partuuid}: the disk's signature is {signature:08x}")
    for number in found:
        yield Finding(f"the description does not know partition {number}: build the image again")


def _boot_control(image: Opened) -> Iterator[Finding]:
    """What says the slot is one sector, in one cluster: it is switched by one write in place."""
    control = image.manifest.control
    fats = image.parts("vfat")
    if control is None:
        yield from _no_control(image)
        return
    for name in _CONTROL_FILES[control]:
        data = image.boot_file(fats[0], name) if fats else None
        if data is None:
            yield Finding(f"the first FAT has no {name}: no slot would be booted")
        elif len(data) != AUTOBOOT_BYTES:
            yield Finding(f"{name} has {len(data)} bytes and must have {AUTOBOOT_BYTES}: pad it with newlines")
        elif control == "autoboot":
            yield from _autoboot(data, [part.index for part in image.manifest.partitions])


def _no_control(image: Opened) -> Iterator[Finding]:
    """An image without slots has no file that chooses one."""
    names = itertools.chain(*_CONTROL_FILES.values())
    pairs = itertools.product(image.parts("vfat"), names)
    found = [f"{part.label} has {name}" for part, name in pairs if image.boot_file(part, name) is not None]
    for what in found:
        yield Finding(f"{what}, and the description names no control: build the image again")
    if not found:
        yield Finding("the description names no control: the image has no slots, and nothing was looked at", note=True)


def _autoboot(data: bytes, partitions: list[int]) -> Iterator[Finding]:
    """That the second partition, slot a, is booted, and the third one tried."""
    usual, trial = (parse_autoboot(data, tryboot=tryboot) for tryboot in (False, True))
    places = [usual.boot_partition, trial.boot_partition]
    if places != partitions[1:3]:
        yield Finding(f"autoboot.txt boots partition {places[0]} and tries {places[1]}: a new image has slot a alone")
    if not usual.tryboot_a_b:
        yield Finding("autoboot.txt does not say tryboot_a_b=1: a trial would look for tryboot.txt")


def _boot_file_systems(image: Opened) -> Iterator[Finding]:
    for part in image.parts("vfat"):
        yield from _checked(f"{part.label} is no clean FAT", "fsck.fat", "-n", image.carved(part))


def _data_file_system(image: Opened) -> Iterator[Finding]:
    for part in image.parts("ext4"):
        yield from _checked(f"{part.label} is no clean ext4", "e2fsck", "-f", "-n", image.carved(part))


def _checked(complaint: str, *command: object) -> Iterator[Finding]:
    try:
        run(*command)
    except CommandFailedError as error:
        yield Finding(f"{complaint}: build the image again. {error}")


def _verity(image: Opened) -> Iterator[Finding]:
    """That each block of the root is what the command line vouches for, and the description says the same."""
    verity, roots = image.manifest.verity, image.parts("squashfs")
    if verity is None:
        yield Finding("the description names no root hash: nothing checks the root of this image")
        return
    for part in roots:
        file = image.carved(part)
        yield from _checked(
            f"{part.label} is not what its root hash vouches for", "veritysetup", "verify", "--no-superblock",
            "--hash", "sha256", f"--data-blocks={verity.blocks}", f"--salt={verity.salt}",
            f"--hash-offset={verity.blocks * disk.VERITY_BLOCK}", file, file, verity.root_hash,
        )  # fmt: skip
    if not roots:
        yield Finding("the image has no squashfs to check")


def _boards(image: Opened) -> Iterator[Finding]:
    """What the firmware of each board makes of the image at power-on; boards of one fault stand together."""
    found: dict[Finding, list[str]] = {}
    with FileMedium(image.image) as medium:
        for name in image.manifest.boards:
            for finding in _board(image.manifest, medium, BOARDS.get(name)):
                found.setdefault(finding, []).append(name)
    for finding, names in found.items():
        yield Finding(f"{', '.join(names)}: {finding.text}", finding.note)


def _board(manifest: ImageManifest, medium: FileMedium, board: Board | None) -> Iterator[Finding]:
    if board is None:
        yield Finding("not known to the emulated firmware: try it on a board", note=True)
        return
    try:
        choice = look(medium, board)
    except NoBootError as error:
        old = not board.eeprom and manifest.control == "autoboot"
        advice = 'older boards need boot.control = "os-prefix"' if old else "mend config.txt and its files"
        yield Finding(f"does not boot: {error}; {advice}", note=old)
        return
    if manifest.verity is not None and f"picket.verity={manifest.verity}" not in choice.command_line.split():
        yield Finding(f"boots with a command line that does not name the root hash: {choice.command_line}")
    for overlay in choice.overlays:
        if overlay.path is None:
            yield Finding(f"config.txt asks for the overlay {overlay.name}, which is not there")


def _empty_slot(image: Opened) -> Iterator[Finding]:
    for part in image.parts("none"):
        if inside.first_used(image.image, part) is not None:
            yield Finding(f"partition {part.index} is not empty: the second slot of a new image is; build it again")


def _secrets(image: Opened) -> Iterator[Finding]:
    for path in image.keys:
        yield Finding(f"{path} holds a private key: every unit would have it; take it out of the recipe's files")
    for path in image.files:
        if _HOST_KEY.fullmatch(path):
            yield Finding(f"{path} is there: every unit would have the same host key; each makes its own")
    for path in _OF_ONE_UNIT:
        if path in image.files:
            yield Finding(f"{path} is there, which belongs to one unit: take it out")
    machine = image.files.get("/etc/machine-id")
    if machine is None or machine.size:
        yield Finding("/etc/machine-id is not an empty file: units would share one, or systemd could make none")


def _passwords(image: Opened) -> Iterator[Finding]:
    for line in image.lines("/etc/shadow"):
        name, _, rest = line.partition(":")
        if rest.partition(":")[0] not in _NO_PASSWORD:
            yield Finding(f"{name} has a password, or none is asked for: write * for it in /etc/shadow")
    for line in image.lines("/etc/passwd"):
        name, _, rest = line.partition(":")
        if not rest.startswith("x:"):
            yield Finding(f"{name} has its password in /etc/passwd: write x for it")
        elif rest.startswith("x:0:") and name != "root":
            yield Finding(f"{name} is root by its number: take it out of /etc/passwd")


def _set_id(image: Opened) -> Iterator[Finding]:
    for path, file in image.files.items():
        if file.kind == "-" and file.mode & _SET_ID and path not in SET_ID:
            yield Finding(
                f"{path} becomes another user ({file.mode:04o}): take its bits away, or list it in image.ladder"
            )


def _tools(image: Opened) -> Iterator[Finding]:
    for path in image.files:
        if _PROGRAMS.fullmatch(path) and path.rpartition("/")[2] in _TOOLS:
            yield Finding(f"{path} is there, which serves nobody but an intruder: take its package out of the recipe")


def _writable(image: Opened) -> Iterator[Finding]:
    for path, file in image.files.items():
        sticky = file.kind == "d" and file.mode & _STICKY
        if file.kind in "-d" and file.mode & _WORLD_MAY_WRITE and not sticky:
            yield Finding(f"everybody may write to {path} ({file.mode:04o}): take the bit away")


def _support(image: Opened) -> Iterator[Finding]:
    """What buyers must be told. An image that was good does not fail by growing old."""
    support = image.manifest.support
    if support.until is None:
        yield Finding("nobody says until when it is supported: write support.until into the recipe", note=True)
    elif support.until < dt.datetime.now(dt.UTC).date():
        yield Finding(f"its support ended on {support.until}: ship a newer one", note=True)
    if support.contact is None:
        yield Finding("nobody says where holes are reported: write support.contact into the recipe", note=True)


#: The rungs, in the order in which they are climbed: what they find needs no later one.
RUNGS: Final[Mapping[str, Callable[[Opened], Iterator[Finding]]]] = MappingProxyType(
    {
        "partition table": _partition_table,
        "boot control": _boot_control,
        "boot file systems": _boot_file_systems,
        "data file system": _data_file_system,
        "root hash": _verity,
        "boards boot": _boards,
        "second slot is empty": _empty_slot,
        "no secrets, nothing of one unit": _secrets,
        "no passwords, one root": _passwords,
        "no set-id programs": _set_id,
        "no compiler, no sudo": _tools,
        "nothing that all may write": _writable,
        "support period": _support,
    }
)


def show(result: Result) -> Text:
    """A rung for a person: one line, and one for each thing that was found, cut where they are many."""
    text = Text("pass  " if result.held else "FAIL  ", style="green" if result.held else "bold red")
    text.append(result.name, style="default")
    for finding in result.findings[:_SHOWN]:
        words = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in finding.text)
        text.append(f"\n      {'note: ' if finding.note else ''}{words}", style="yellow" if finding.note else "red")
    if len(result.findings) > _SHOWN:
        text.append(f"\n      and {len(result.findings) - _SHOWN} more", style="default")
    return text
