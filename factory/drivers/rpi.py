"""The bench of a real Raspberry Pi: each seam a URI in the bench file's [board] table, opened by its scheme.

What can be known to be wrong before a unit is touched is refused when the bench is opened: a driver that is named and
does not open is the station's fault, never a reason to take another one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import serial

from factory.bench import Bench, Console, Medium, Shell, Stimulus
from factory.drivers.blockdev import BlockStorage, lasting_path, moves
from factory.drivers.console import BAUD, SerialConsole
from factory.drivers.power import HubPower, OperatorPower, Switch, run
from factory.drivers.prompts import Operator, TerminalOperator
from factory.drivers.ssh import SshShell, first_address
from factory.drivers.stimulus import OperatorStimulus
from factory.errors import StationFault, UserMistake
from firmware_agent.wire import Banner

_T = TypeVar("_T")


@contextmanager
def open_bench(key: Path, options: Mapping[str, Any], operator: Operator | None = None) -> Iterator[Bench]:
    """The drivers that the options name, checked as far as that goes without a unit.

    Args:
        key: the factory's SSH key.
        options: the [board] table beside its `uri`: `storage`, `storage_again`, `console`, `shell`, `power`,
            `stimulus`.
        operator: who does what no driver can; by default whoever sits at the terminal.

    Raises:
        UserMistake: an option is missing, unknown or makes no sense, or the storage is one that is never written.
        StationFault: one of the drivers cannot be opened.
    """
    slot = _Slot(key, _texts(options), operator or TerminalOperator())
    storage = _pick(slot, "storage", STORAGES)
    power = _pick(slot, "power", POWERS)
    console = _pick(slot, "console", CONSOLES)
    shell = _pick(slot, "shell", SHELLS)
    stimulus = _pick(slot, "stimulus", STIMULI)
    card = CarriedCard(storage, power)
    yield Bench("rpi", card, card, console, shell, stimulus)


class CarriedCard:
    """A card that is in the reader or in the board, and the operator carries it.

    It is storage and power at once, because a card moves only while the board is off, and the prompts of both belong
    in one sentence: for a unit that is begun the operator gets two of them, one before flash and one before boot.
    """

    def __init__(self, reader: BlockStorage, switch: Switch) -> None:
        self._reader = reader
        self._switch = switch
        #: "brought": into the reader, for a flash that is still to come. None: of the unit that comes, not known.
        self._place: Literal["brought", "reader", "board"] | None = None

    @contextmanager
    def attach(self) -> Iterator[Medium]:
        """The card in the reader, after the operator put it there.

        Raises:
            UserMistake: the reader's path names something that is never written.
            StationFault: there is no card in it.
        """
        if self._place != "brought":
            self._bring_to_reader()
        self._place = "reader"  # a second flash asks again: it may be another unit's card
        with self._reader.attach() as medium:
            yield medium

    def on(self) -> None:
        """Supply the board, its card in it."""
        self._switch.on(first="" if self._place == "board" else "put the card into the board")
        self._place = "board"

    def off(self) -> None:
        """Cut the supply. Of a unit that is begun, the card is wanted in the reader next."""
        if self._place is None:
            self._bring_to_reader()
        else:
            self._switch.off()

    def _bring_to_reader(self) -> None:
        self._switch.off(then=f"put the unit's card into the reader {self._reader.path}")
        self._place = "brought"


@dataclass(frozen=True)
class _Slot:
    """What a driver may need to know beside its own place."""

    key: Path
    options: Mapping[str, str]
    operator: Operator


_Maker = Callable[[str, _Slot], _T]


def _block_storage(path: str, slot: _Slot) -> BlockStorage:
    if not path.startswith("/"):
        raise UserMistake(
            f"board.storage: {path!r} is no path of a device",
            advice="E.g. block:/dev/disk/by-path/...; see benches/rpi.toml.",
        )
    again = slot.options.get("storage_again")
    if again is not None and again != slot.options["storage"]:
        raise UserMistake(
            f"board.storage_again is {again!r}, but board.storage is {slot.options['storage']!r}",
            advice="Write the same text twice, or leave storage_again out.",
        )
    storage = BlockStorage(path, named_again=again is not None)
    storage.check()
    if moves(path):
        lasting = lasting_path(path)
        slot.operator.tell(
            f"Careful: {path} can be another disk after the next boot or plug. "
            + (f"Its lasting name is {lasting}." if lasting else "Name the reader by /dev/disk/by-path instead.")
        )
    return storage


def _serial_path(path: str, slot: _Slot) -> SerialConsole:  # noqa: ARG001  (every maker takes the slot)
    if not path.startswith("/"):
        raise UserMistake(
            f"board.console: {path!r} is no path of a serial port", advice="E.g. serial:/dev/serial/by-path/..."
        )
    return _console(path)


def _serial_url(place: str, slot: _Slot) -> SerialConsole:
    url = slot.options["console"]
    if not re.fullmatch(r"//[^\s/]+:\d+(/.*)?", place):
        raise UserMistake(f"board.console: {url!r} is no address", advice="E.g. socket://HOST:PORT.")
    return _console(url)


def _console(url: str) -> SerialConsole:
    try:
        serial.serial_for_url(url, baudrate=BAUD, timeout=0).close()
    except (serial.SerialException, OSError, ValueError) as error:
        raise StationFault(
            f"the console {url} cannot be opened: {error}",
            advice="Check `console` in the bench file, the adapter's USB cable, and that you are in the group dialout.",
        ) from error
    return SerialConsole(lambda: url)


def _ssh_shell(place: str, slot: _Slot) -> SshShell:
    if not place:
        return SshShell(slot.key, first_address)
    match = re.fullmatch(r"(\[(?P<six>[^\]\s]+)\]|(?P<host>[^:\[\]/@\s]+))(:(?P<port>\d{1,5}))?", place)
    if match is None or not 0 < int(match["port"] or 22) < 65536:
        raise UserMistake(
            f"board.shell: {place!r} is no address",
            advice="Write ssh: for the address of the unit's banner, or ssh:HOST, ssh:HOST:PORT, ssh:[IPV6]:PORT.",
        )
    address = (match["six"] or match["host"], int(match["port"] or 22))

    def fixed(_: Banner) -> tuple[str, int]:
        return address

    return SshShell(slot.key, fixed)


def _operator_power(place: str, slot: _Slot) -> Switch:
    _no_place("power", place)
    return OperatorPower(slot.operator)


def _hub_power(place: str, slot: _Slot) -> Switch:
    return HubPower.at(place, slot.operator, run)


def _operator_stimulus(place: str, slot: _Slot) -> OperatorStimulus:
    _no_place("stimulus", place)
    return OperatorStimulus(slot.operator)


STORAGES: dict[str, _Maker[BlockStorage]] = {"block": _block_storage}
CONSOLES: dict[str, _Maker[Console]] = {"serial": _serial_path, "socket": _serial_url, "rfc2217": _serial_url}
SHELLS: dict[str, _Maker[Shell]] = {"ssh": _ssh_shell}
POWERS: dict[str, _Maker[Switch]] = {"operator": _operator_power, "hub": _hub_power}
STIMULI: dict[str, _Maker[Stimulus]] = {"operator": _operator_stimulus}

_NEEDED = ("storage", "console", "shell", "power", "stimulus")
_KNOWN = (*_NEEDED, "storage_again")


def _texts(options: Mapping[str, Any]) -> dict[str, str]:
    for name, value in options.items():
        if name not in _KNOWN:
            raise UserMistake(f"board.{name} is not known here", advice=f"Known: {', '.join(_KNOWN)}.")
        if not isinstance(value, str):
            raise UserMistake(f"board.{name} must be a text")
    for name in _NEEDED:
        if name not in options:
            raise UserMistake(f"board.{name} is missing", advice="benches/rpi.toml shows all of them.")
    return {name: str(value) for name, value in options.items()}


def _pick(slot: _Slot, name: str, makers: Mapping[str, _Maker[_T]]) -> _T:
    scheme, colon, place = slot.options[name].partition(":")
    if not colon or scheme not in makers:
        raise UserMistake(
            f"board.{name} is of an unknown kind {slot.options[name]!r}",
            advice=f"Known: {', '.join(f'{one}:' for one in makers)}",
        )
    return makers[scheme](place, slot)


def _no_place(name: str, place: str) -> None:
    if place:
        raise UserMistake(f"board.{name}: nothing stands behind `operator:`, not {place!r}")
