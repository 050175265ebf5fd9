"""A bench with a virtual Pi in it: the real image in QEMU, with a sensor's physics on its PIR line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from factory.bench import Bench, Medium
from factory.drivers.console import SerialConsole
from factory.drivers.faults import WIRE, chosen, tampered, tpm_wanted
from factory.drivers.media import FileStorage
from factory.drivers.pir import Pir, PirFault
from factory.drivers.ssh import SshShell
from factory.drivers.virtual_pi import STATION_ADDRESS, VirtualPi
from factory.errors import StationFault, UserMistake


class _Board:
    """The virtual Pi with its sensor: they share the supply."""

    #: Power, console and sensor are machines: nothing has to settle, and nobody has to react.
    settle_seconds = 0.0
    reaction_seconds = 0.0

    def __init__(self, pi: VirtualPi, fault: PirFault | None) -> None:
        self._pi = pi
        self._pir = Pir(pi.drive_pir, fault=fault)
        self._medium = FileStorage(pi.medium, pi.medium_bytes)

    def on(self) -> None:
        """Supply board and sensor."""
        self._pir.power(on=True)
        self._pi.on()

    def off(self) -> None:
        """Cut the supply of both."""
        self._pir.power(on=False)
        self._pi.off()

    def wave(self) -> None:
        """Move in front of the sensor."""
        self._pir.wave()

    @contextmanager
    def attach(self) -> Iterator[Medium]:
        """The board's medium.

        Raises:
            StationFault: the board has power: its medium is in use.
        """
        if self._pi.powered:
            raise StationFault("the board has power: its medium cannot be written", advice="Cut the power first.")
        with self._medium.attach() as medium:
            yield medium


@contextmanager
def open_bench(place: Path, key: Path, options: Mapping[str, Any]) -> Iterator[Bench]:
    """A bench with the virtual Pi that lives in `place`.

    Args:
        place: the board's folder.
        key: the factory's SSH key.
        options: `hosts` (names that the board finds at the station), `tpm` (true unless it is to have none), `faults`
            (of the PIR and of the wire).

    Raises:
        UserMistake: an option or a fault is not known.
        StationFault: QEMU or swtpm is missing.
    """
    if unknown := sorted(set(options) - {"faults", "tpm", "hosts"}):
        raise UserMistake(f"the virtual Pi knows no {', '.join(unknown)}", advice="Options: faults, hosts, tpm.")
    faults, tpm = chosen(options, {*PirFault, *WIRE}), tpm_wanted(options)
    pir = sorted(faults - WIRE)
    if len(pir) > 1:
        raise UserMistake("board.faults: a PIR has one fault at a time", advice="Name one.")
    hosts = dict.fromkeys(options.get("hosts", []), STATION_ADDRESS)
    with VirtualPi(place, tpm=tpm is not False, hosts=hosts) as pi:
        board = _Board(pi, PirFault(pir[0]) if pir else None)
        try:
            yield Bench(
                name=f"virtual Pi {pi.serial}",
                storage=board,
                power=board,
                console=SerialConsole(pi.console_url),
                shell=tampered(SshShell(key, pi.ssh_address), faults),
                stimulus=board,
            )
        finally:
            board.off()
