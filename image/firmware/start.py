"""From power to kernel: which partition is booted, from which files, with which command line; or why not.

`look` only says it, `boot` also brings the files. Both are functions of the medium's bytes, the board and its reset
register. The pages that they follow (raspberrypi.com/documentation/computers/):

- config_txt.html, "autoboot.txt": read from the first FAT partition; `boot_partition` counts unless `reboot` named a
  partition; partition 0 is the first bootable one.
- raspberry-pi.html, "PARTITION_WALK" (on by default since 2025-08-13): where the partition asked for does not boot, a
  board with an EEPROM looks at each in turn up to 8, then from 1 on, without any autoboot.txt. The firmware of the
  boards before (bootcode.bin) does not walk.
- raspberry-pi.html, "Fail-safe OS updates": with the tryboot flag, tryboot.txt stands for config.txt and tryboot.img
  for boot.img, unless autoboot.txt says `tryboot_a_b=1`.
- config_txt.html, "Boot options": kernel, initramfs, cmdline, os_prefix, overlay_prefix, boot_ramdisk, os_check.
- configuration.html, "Firmware parameters": what is written below /chosen.

What is once found bootable and then lacks its kernel stops the start: the walk is over by then. Where a page is silent,
nothing is forgiven: no tryboot.txt, no cmdline.txt, a missing initramfs or device tree is no start. Overlays that
config.txt asks for are named, not applied. Neither GPT nor other boot modes than the card are there.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from image.firmware.boards import Board
from image.firmware.config import Autoboot, Circumstances, Config, number, parse_autoboot, parse_config
from image.firmware.errors import NoBootError
from image.firmware.fat import Fat
from image.firmware.medium import BytesMedium, FileMedium, Medium, Partition, partitions
from image.firmware.reset import Reset
from image.firmware.signature import public_key, verify

#: "The maximum size for a ramdisk file is 96MB" (config_txt.html, boot_ramdisk).
RAMDISK_BYTES = 96 * 2**20

_WALK_END = 8
_TEXT_LIMIT = 65536
_SD_CARD = 1
#: SIGNED_BOOT is in the EEPROM's configuration, and the customer's key is fused.
_SIGNED = 0b1001
_KERNELS_64 = frozenset({"kernel8.img", "kernel_2712.img"})
_KERNELS_32 = frozenset({"kernel.img", "kernel7.img", "kernel7l.img"})


class _NotBootableError(NoBootError):
    """The walk goes on at the next partition."""


@dataclass(frozen=True)
class Property:
    """A property in the device tree: a number of 32 bits, big-endian, or a string."""

    node: str
    name: str
    value: int | str


@dataclass(frozen=True)
class Overlay:
    """An overlay that config.txt asks for: its path on the partition (None: there is none) and its parameters."""

    name: str
    path: str | None
    parameters: str


@dataclass(frozen=True)
class Choice:
    """What would be started. Paths are those on the partition, or in boot.img.

    Attributes:
        partition: its number.
        tryboot: whether this is the one try.
        ramdisk: whether everything comes out of boot.img.
        signed: whether the board starts nothing but what its owner signed.
        os_prefix: the prefix in effect; "" where config.txt's was not viable.
        kernel: its path.
        initramfs: paths, which are joined; empty where there is none.
        device_tree: its path; None on a machine that makes its own, or where config.txt wants none.
        command_line: the first line of cmdline.txt.
        overlays: those that were asked for.
        config: the settings in effect.
        overlay_prefix: where overlays are looked for, below os_prefix.
        notes: what the firmware passed over, for the console.
        files: the file system.
    """

    partition: int
    tryboot: bool
    ramdisk: bool
    signed: bool
    os_prefix: str
    kernel: str
    initramfs: tuple[str, ...]
    device_tree: str | None
    command_line: str
    overlays: tuple[Overlay, ...]
    config: dict[str, str] = field(repr=False)
    overlay_prefix: str = "overlays/"
    notes: tuple[str, ...] = ()
    files: Fat = field(repr=False, compare=False, kw_only=True)

    @property
    def properties(self) -> tuple[Property, ...]:
        """What the firmware writes into the device tree."""
        return (
            Property("/chosen", "os_prefix", self.os_prefix),
            Property("/chosen", "overlay_prefix", self.overlay_prefix),
            Property("/chosen/bootloader", "boot-mode", _SD_CARD),
            Property("/chosen/bootloader", "partition", self.partition),
            Property("/chosen/bootloader", "tryboot", int(self.tryboot)),
            *([Property("/chosen/bootloader", "signed", _SIGNED)] if self.signed else []),
        )


@dataclass(frozen=True)
class Started:
    """What the firmware hands to the board's processor: the choice, and its files copied off the medium."""

    choice: Choice
    kernel: Path
    initramfs: Path | None
    device_tree: Path | None

    @property
    def command_line(self) -> str:
        """The kernel's command line."""
        return self.choice.command_line


def look(
    medium: Medium, board: Board, reset: Reset | None = None, *, serial: str = "", customer_key: bytes | None = None
) -> Choice:
    """What a board would start from a medium.

    Args:
        medium: the card.
        board: the model.
        reset: what `reboot` was told; by default what a power-on finds.
        serial: the SoC's serial number, for `[0x...]` filters.
        customer_key: the public key (PEM) that the board is fused with; None: it starts anything.

    Raises:
        NoBootError: nothing; the message says why.
        ValueError: the key is none.
    """
    key = None if customer_key is None else public_key(customer_key)
    fats = {one: part for one, part in partitions(medium).items() if part.fat}
    if not fats:
        raise NoBootError("the medium has no FAT partition to boot from")
    power = _Power(medium, board, reset or Reset(), serial, key, fats)
    return power.choose()


def boot(
    medium: Path,
    into: Path,
    board: Board,
    reset: Reset | None = None,
    *,
    serial: str = "",
    customer_key: bytes | None = None,
) -> Started:
    """What `look` says, of a raw image file, with the files copied into a folder.

    Raises:
        NoBootError: it does not boot.
    """
    with FileMedium(medium) as card:
        choice = look(card, board, reset, serial=serial, customer_key=customer_key)
        files = choice.files
        initramfs = into / "initramfs" if choice.initramfs else None
        tree = into / "device-tree.dtb" if choice.device_tree is not None else None
        _copy(files, [choice.kernel], into / "kernel")
        if initramfs is not None:
            _copy(files, choice.initramfs, initramfs)
        if tree is not None and choice.device_tree is not None:
            _copy(files, [choice.device_tree], tree)
    return Started(choice, into / "kernel", initramfs, tree)


def read_file(medium: Path, name: str, partition: int | None = None) -> bytes:
    """One file of a FAT partition; by default of the first.

    Raises:
        NoBootError: there is no such file or partition.
    """
    with FileMedium(medium) as card:
        fats = {one: part for one, part in partitions(card).items() if part.fat}
        part = fats.get(min(fats, default=0) if partition is None else partition)
        if part is None:
            raise NoBootError("the medium has no such FAT partition")
        data = Fat.of(card, part).read(name)
    if data is None:
        raise NoBootError(f"the boot partition has no {name}")
    return data


def _copy(files: Fat, names: Iterator[str] | list[str] | tuple[str, ...], target: Path) -> None:
    with target.open("wb") as file:
        for name in names:
            file.write(files.read(name) or b"")


class _Power:
    """One start."""

    def __init__(
        self,
        medium: Medium,
        board: Board,
        reset: Reset,
        serial: str,
        key: RSAPublicKey | None,
        fats: dict[int, Partition],
    ) -> None:
        self._medium = medium
        self._board = board
        self._reset = reset
        self._serial = serial
        self._key = key
        self._fats = fats
        self._notes: list[str] = []

    def choose(self) -> Choice:
        autoboot = self._autoboot()
        failed: list[str] = []
        for one in self._candidates(self._reset.partition or autoboot.boot_partition):
            try:
                return self._partition(one, autoboot)
            except _NotBootableError as error:
                failed.append(f"{one}: {error}" if len(self._fats) > 1 else str(error))
        raise NoBootError(f"no partition boots ({'; '.join(failed)})")

    def _autoboot(self) -> Autoboot:
        first = self._fats[min(self._fats)]
        try:
            fat = Fat.of(self._medium, first)
            if not self._board.eeprom and not fat.has("bootcode.bin"):
                raise NoBootError("the first FAT partition has no bootcode.bin")
            data = fat.read("autoboot.txt", 513)
        except NoBootError as error:
            if not self._board.eeprom:
                raise
            self._notes.append(f"autoboot.txt: {error}")
            return Autoboot()
        if data is not None and len(data) > 512:
            self._notes.append("autoboot.txt has more than 512 bytes: passed over")
        return parse_autoboot(data, tryboot=self._reset.tryboot)

    def _candidates(self, asked: int) -> list[int]:
        """The partitions to try, in order."""
        if not self._board.eeprom:
            return [asked or min(self._fats)]
        order = [*range(asked or 1, _WALK_END + 1), *range(1, asked or 1)]
        # One that is not there need not be tried; only what was asked for is said to be absent.
        return [one for one in dict.fromkeys([asked or order[0], *order]) if one in self._fats or one == asked]

    def _partition(self, one: int, autoboot: Autoboot) -> Choice:
        files, config_name, ramdisk = self._file_system(one, tryboot_a_b=autoboot.tryboot_a_b)
        try:
            data = files.read(config_name, _TEXT_LIMIT)
        except NoBootError as error:
            raise _NotBootableError(str(error)) from error
        circumstances = self._circumstances(one)
        config = parse_config(data or b"", circumstances, lambda name: files.read(name, _TEXT_LIMIT))
        self._must_be_bootable(files, config, data, config_name)
        return _Files(files, config, self._board).choose(
            one, tryboot=self._reset.tryboot, ramdisk=ramdisk, signed=self._key is not None, notes=self._notes
        )

    def _circumstances(self, one: int) -> Circumstances:
        return Circumstances(self._board, self._serial, self._reset.tryboot, one)

    def _file_system(self, one: int, *, tryboot_a_b: bool) -> tuple[Fat, str, bool]:
        """Where the files come from, what config.txt is called there, and whether that is a RAM disk."""
        part = self._fats.get(one)
        if part is None:
            raise _NotBootableError("there is no such FAT partition")
        other = self._reset.tryboot and not tryboot_a_b
        config_name = "tryboot.txt" if other else "config.txt"
        try:
            fat = Fat.of(self._medium, part)
            early = parse_config(fat.read(config_name, _TEXT_LIMIT) or b"", self._circumstances(one))
        except NoBootError as error:
            raise _NotBootableError(str(error)) from error
        if self._key is None and not early.flag("boot_ramdisk"):
            return fat, config_name, False
        # "tryboot_a_b is implicitly set to 1 when loading files from within a boot.img."
        return self._ramdisk(fat, "tryboot" if other else "boot"), "config.txt", True

    def _ramdisk(self, fat: Fat, name: str) -> Fat:
        entry = fat.find(f"{name}.img")
        if entry is None or entry.folder:
            raise _NotBootableError(f"there is no {name}.img")
        if entry.size > RAMDISK_BYTES:
            raise NoBootError(f"{name}.img has more than 96 MiB")
        image = fat.read(f"{name}.img") or b""
        if self._key is not None:
            verify(image, fat.read(f"{name}.sig"), self._key, f"{name}.img")
        inside = BytesMedium(image)
        try:
            return Fat(inside, 0, len(image))
        except NoBootError:
            parts = [part for part in partitions(inside).values() if part.fat]
            if not parts:
                raise
            return Fat.of(inside, parts[0])

    def _must_be_bootable(self, files: Fat, config: Config, data: bytes | None, config_name: str) -> None:
        if self._board.start is None:
            if data is None:
                raise _NotBootableError(f"there is no {config_name}")
            if (
                self._board.tree
                and config.flag("os_check", default=True)
                and not _Files(files, config, self._board).trees
            ):
                raise _NotBootableError(f"there is no device tree for this board ({self._board.tree})")
            return
        names = [config.values.get("start_file") or self._board.start]
        if number(config.values.get("gpu_mem", "")) == 16 and "start_file" not in config.values:
            names.append(self._board.start.replace(".elf", "cd.elf" if "4" in self._board.start else "_cd.elf"))
        if not any(files.has(name) for name in names):
            raise _NotBootableError(f"there is no {names[0]}")
        if data is None and config_name == "tryboot.txt":
            raise NoBootError("this is one try, and there is no tryboot.txt")


class _Files:
    """The operating system's files under one config.txt."""

    def __init__(self, files: Fat, config: Config, board: Board) -> None:
        self._files = files
        self._config = config
        self._board = board
        values = config.values
        self._upstream = config.flag("upstream_kernel")
        named = values.get("kernel", "")
        self._sixty_four = config.flag("arm_64bit", default=board.arm_64bit) or not board.kernel32
        if named.rpartition("/")[2] in _KERNELS_64 | _KERNELS_32 and board.kernel32:
            self._sixty_four = named.rpartition("/")[2] in _KERNELS_64
        self._kernels = (named,) if named else board.kernels if self._sixty_four else (board.kernel32,)
        self.os_prefix = values.get("os_prefix", "upstream/" if self._upstream else "")

    @property
    def trees(self) -> list[str]:
        """Device trees that are there: below the prefix, or without it."""
        return [path for prefix in {self.os_prefix, ""} for path in self._there(prefix, self._tree_names() or ())]

    def choose(self, partition: int, *, tryboot: bool, ramdisk: bool, signed: bool, notes: list[str]) -> Choice:
        prefix = self.os_prefix
        if prefix and not self._viable(prefix):
            if "os_prefix" in self._config.values:
                notes = [*notes, f"os_prefix={prefix} has no kernel or no device tree: passed over"]
            prefix = ""
        kernel = self._one(prefix, self._kernels, "kernel")
        self._must_suit(kernel)
        names = self._tree_names()
        tree = None if names is None else self._one(prefix, names, "device tree")
        initramfs = self._initramfs(prefix, kernel)
        for path in (*initramfs, *([tree] if tree is not None else []), kernel):
            self._files.check(path)
        overlay_prefix = self._config.values.get("overlay_prefix", "overlays/")
        return Choice(
            partition,
            tryboot,
            ramdisk,
            signed,
            prefix,
            kernel,
            initramfs,
            tree,
            self._command_line(prefix),
            self._overlays(prefix, overlay_prefix),
            dict(self._config.values),
            overlay_prefix,
            tuple(notes),
            files=self._files,
        )

    def _tree_names(self) -> tuple[str, ...] | None:
        """Names to look for, the first one first; None where no device tree is wanted."""
        named = self._config.values.get("device_tree")
        if named is not None:
            return (named,) if named else None
        if not self._board.tree:
            return None
        return (self._board.upstream, self._board.tree) if self._upstream else (self._board.tree,)

    def _there(self, prefix: str, names: tuple[str, ...]) -> list[str]:
        return [path for path in (_under(prefix, name) for name in names) if self._files.has(path)]

    def _viable(self, prefix: str) -> bool:
        names = self._tree_names()
        return bool(self._there(prefix, self._kernels)) and (names is None or bool(self._there(prefix, names)))

    def _one(self, prefix: str, names: tuple[str, ...], what: str) -> str:
        found = self._there(prefix, names)
        if not found:
            raise NoBootError(f"the boot partition has no {what} {_under(prefix, names[0])}")
        return found[0]

    def _must_suit(self, kernel: str) -> None:
        """A 64-bit kernel does not run on a processor that is started with 32 bits."""
        begin = self._files.read(kernel, 4096) or b""
        if begin[:2] == b"\x1f\x8b":
            try:
                begin = zlib.decompressobj(wbits=31).decompress(begin, 64)
            except zlib.error as error:
                raise NoBootError(f"{kernel} is damaged: {error}") from error
        if begin[56:60] == b"ARM\x64" and not self._sixty_four:
            raise NoBootError(f"{kernel} has 64 bits, and config.txt does not say arm_64bit=1")

    def _initramfs(self, prefix: str, kernel: str) -> tuple[str, ...]:
        named = self._config.values.get("initramfs", self._config.values.get("ramfsfile", "")).split()
        if named:
            return tuple(self._one(prefix, (name,), "initramfs") for name in named[0].split(",") if name)
        base = kernel.rpartition("/")[2]
        if not self._config.flag("auto_initramfs") or not base.startswith("kernel"):
            return ()
        # "Using the same rules as the kernel selection": kernel8.img takes initramfs8 along.
        return tuple(self._there(prefix, (base.replace("kernel", "initramfs", 1).removesuffix(".img"),)))

    def _command_line(self, prefix: str) -> str:
        path = _under(prefix, self._config.values.get("cmdline") or "cmdline.txt")
        data = self._files.read(path, _TEXT_LIMIT)
        if data is None:
            raise NoBootError(f"the boot partition has no command line {path}")
        return data.decode("utf-8", errors="replace").partition("\n")[0].strip(" \t\r\0")

    def _overlays(self, prefix: str, overlay_prefix: str) -> tuple[Overlay, ...]:
        """Shared overlays, unless the prefix brings its own, which a README shows."""
        below = prefix if self._files.has(f"{prefix}{overlay_prefix}README") else ""
        found = []
        for value in self._config.overlays:
            name, _, parameters = value.partition(",")
            path = f"{below}{overlay_prefix}{name}.dtbo"
            if name:
                found.append(Overlay(name, path if self._files.has(path) else None, parameters))
        return tuple(found)


def _under(prefix: str, name: str) -> str:
    """A name below a prefix; one that begins with a slash bypasses it."""
    return name.lstrip("/") if name.startswith("/") else f"{prefix}{name}"
