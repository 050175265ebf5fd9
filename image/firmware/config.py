"""autoboot.txt and config.txt: lines, conditional filters, and what counts for a board.

The rules are those of raspberrypi.com/documentation/computers/config_txt.html ("File format", "include",
"Conditional filters", "autoboot.txt"); `[boot_partition=N]` and expressions are those of the boot loader's release
notes of 2025-02-11 and 2025-03-10 (raspberrypi/rpi-eeprom, firmware-2712/release-notes.md).

Where the page is silent: names of filters and settings count as they are written, a filter that is not known is never
met, and a `[none]` or an unknown filter holds until the next `[all]`. GPIOs read low and no monitor is connected.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from image.firmware.boards import Board
from image.firmware.errors import NoBootError

AUTOBOOT_BYTES = 512
_LINE = 98
_INCLUDES = 8
_FILTER = re.compile(r"\[(?P<name>[^\]]*)\]")
_EXPRESSION = re.compile(
    r"(?P<name>[a-z_0-9]+)(?P<operator>[=&<>])(?P<value>[0-9a-fA-Fx]+)(?:=(?P<masked>[0-9a-fA-Fx]+))?"
)
_GPIO = re.compile(r"gpio[0-9]+=(?P<level>[01])")
_MODEL = re.compile(r"pi(?:0|0w|02|1|2|3|3\+|4|400|5|500)|cm(?:0|1|3|4|4s|5)")
_SERIAL = re.compile(r"0[xX][0-9a-fA-F]{1,16}")

#: The variables of expressions; all but the first are scratch registers that are 0 here.
_VARIABLES = ("boot_partition", "boot_arg1", "boot_count", "bootvar0")


@dataclass(frozen=True)
class Circumstances:
    """What filters ask about.

    Attributes:
        board: the model.
        serial: the SoC's serial number in hexadecimal, of which the last eight digits count.
        tryboot: whether the one-shot flag was set.
        partition: the partition that is booted from.
    """

    board: Board
    serial: str = ""
    tryboot: bool = False
    partition: int = 0


@dataclass(frozen=True)
class Autoboot:
    """What autoboot.txt says: 0 and False where it says nothing."""

    boot_partition: int = 0
    tryboot_a_b: bool = False


@dataclass
class Config:
    """The settings that count; a later one overrules an earlier.

    Attributes:
        values: by name. `initramfs`, which is written without an equals sign, is one of them.
        overlays: the values of every `dtoverlay`, in order.
        includes: names of the files that were included, in order; those that are not there, too.
    """

    values: dict[str, str] = field(default_factory=dict)
    overlays: list[str] = field(default_factory=list)
    includes: list[str] = field(default_factory=list)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A setting that is 0 or another number; what is no number is 0, as for C's strtol."""
        value = self.values.get(name)
        return default if value is None else bool(number(value))


def number(text: str) -> int:
    """The number that a text begins with, decimal or with 0x; 0 where there is none."""
    found = re.match(r"[ \t]*(?:0[xX](?P<hex>[0-9a-fA-F]{1,16})|(?P<decimal>[0-9]{1,19}))", text)
    if found is None:
        return 0
    return int(found["hex"], 16) if found["hex"] else int(found["decimal"])


def parse_autoboot(data: bytes | None, *, tryboot: bool) -> Autoboot:
    """What an autoboot.txt says; None for no such file.

    Only `[all]`, `[none]` and `[tryboot]` may be met. A file of more than 512 bytes is taken as none: the page gives
    the limit, and that is the outcome in which nobody relies on what lies behind it.
    """
    if data is None or len(data) > AUTOBOOT_BYTES:
        return Autoboot()
    met = True
    values = {}
    for line in _lines(data):
        section = _FILTER.fullmatch(line)
        if section:
            met = section["name"] == "all" or (section["name"] == "tryboot" and tryboot)
        elif met:
            name, _, value = line.partition("=")
            values[name] = value
    return Autoboot(number(values.get("boot_partition", "")), number(values.get("tryboot_a_b", "")) == 1)


def parse_config(
    data: bytes, circumstances: Circumstances, include: Callable[[str], bytes | None] | None = None
) -> Config:
    """The settings of a config.txt that count.

    Args:
        data: the file.
        circumstances: what its filters ask about.
        include: gives an included file, or None where there is none; the boot loader, which cannot, has none.

    Raises:
        NoBootError: files include one another without an end.
    """
    config = Config()
    filters = _Filters(circumstances)
    _take(data, config, filters, include, 0)
    return config


def _take(
    data: bytes, config: Config, filters: "_Filters", include: Callable[[str], bytes | None] | None, depth: int
) -> None:
    if depth > _INCLUDES:
        raise NoBootError(f"config.txt includes files more than {_INCLUDES} deep: {config.includes[-1]}")
    for line in _lines(data):
        section = _FILTER.fullmatch(line)
        if section:
            filters.enter(section["name"])
        elif filters.met and line.startswith("include "):
            name = line.removeprefix("include ").strip()
            config.includes.append(name)
            content = include(name) if include is not None else None
            if content is not None:
                _take(content, config, filters, include, depth + 1)
        elif filters.met:
            _set(config, line)


def _set(config: Config, line: str) -> None:
    if line.startswith("initramfs "):
        config.values["initramfs"] = line.removeprefix("initramfs ").strip()
        return
    name, sign, value = line.partition("=")
    if not sign:
        return
    if name in {"dtoverlay", "device_tree_overlay"}:
        config.overlays.append(value)
    else:
        config.values[name] = value


def _lines(data: bytes) -> Iterator[str]:
    """Lines that say something, without what lies behind the 98th character."""
    for raw in data.decode("latin-1").split("\n"):
        line = raw.strip(" \t\r\0")[:_LINE]
        if line and not line.startswith("#"):
            yield line


class _Filters:
    """The filters that are in force: one of each type, and all must be met ("Combine conditional filters")."""

    def __init__(self, circumstances: Circumstances) -> None:
        self._circumstances = circumstances
        self._met: dict[str, bool] = {}

    @property
    def met(self) -> bool:
        return all(self._met.values())

    def enter(self, name: str) -> None:
        if name == "all":
            self._met.clear()
        else:
            kind, met = self._judge(name)
            self._met[kind] = met

    def _judge(self, name: str) -> tuple[str, bool]:
        """A filter's type, and whether it is met."""
        now = self._circumstances
        kind, met = "unknown", False
        if name == "tryboot":
            kind, met = "tryboot", now.tryboot
        elif _MODEL.fullmatch(name):
            kind, met = "model", name in now.board.filters
        elif name.startswith("board-type="):
            kind, met = "model", number(name.partition("=")[2]) == now.board.type
        elif _SERIAL.fullmatch(name):
            kind, met = "serial", bool(now.serial) and int(name, 16) & 0xFFFFFFFF == int(now.serial[-8:], 16)
        elif gpio := _GPIO.fullmatch(name):
            kind, met = "gpio", gpio["level"] == "0"
        elif name.startswith(("EDID=", "HDMI:")):
            kind = name[:4]
        elif (expression := _EXPRESSION.fullmatch(name)) and expression["name"] in _VARIABLES:
            left = now.partition if expression["name"] == "boot_partition" else 0
            kind, met = "expression", _holds(expression, left)
        return kind, met


def _holds(expression: re.Match[str], left: int) -> bool:
    value = number(expression["value"])
    if expression["masked"] is not None:
        return expression["operator"] == "&" and left & value == number(expression["masked"])
    match expression["operator"]:
        case "=":
            return left == value
        case "&":
            return left & value != 0
        case "<":
            return left < value
        case _:
            return left > value
