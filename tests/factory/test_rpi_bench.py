"""The bench of a real Pi as far as it goes without one: its options, the operator's prompts, the hub."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from factory.bench import Bench, Medium
from factory.benches import load_bench_file
from factory.drivers.blockdev import BlockStorage
from factory.drivers.media import FileStorage
from factory.drivers.power import HubPower, OperatorPower, run
from factory.drivers.rpi import CarriedCard, open_bench
from factory.drivers.ssh import SshShell
from factory.errors import FactoryError, LinkFault, StationFault, UserMistake
from firmware_agent.wire import Banner

BANNER = Banner("10000000deadbeef", ("10.1.2.3", "fe80::1"), "ssh-ed25519 AAAA", "0.1.0", "picket 0.1.0", "a-boot")


class Bystander:
    """An operator who does everything at once and remembers what it was."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.told: list[str] = []

    def ask(self, what: str) -> None:
        self.asked.append(what)

    def tell(self, what: str) -> None:
        self.told.append(what)


@pytest.fixture
def options(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A bench whose reader is not plugged in and whose console is a pty."""
    master, slave = os.openpty()
    yield {
        "storage": "block:/dev/disk/by-path/no-such-reader",
        "console": f"serial:{os.ttyname(slave)}",
        "shell": "ssh:",
        "power": "operator:",
        "stimulus": "operator:",
    }
    os.close(master)
    os.close(slave)


def opened(options: dict[str, Any], operator: Bystander | None = None) -> Bench:
    with open_bench(Path("key"), options, operator or Bystander()) as bench:
        return bench


def refused(options: dict[str, Any], match: str, kind: type[FactoryError] = UserMistake) -> None:
    with pytest.raises(kind, match=match):
        opened(options)


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_sample_says_all_that_a_bench_needs(options: dict[str, Any]) -> None:
    file = load_bench_file(Path("benches/rpi.toml"))

    assert file.board.scheme == "rpi"
    assert {*options} == {*file.board.options}
    assert opened(file.board.options | {"console": options["console"]})


def test_every_seam_of_a_bench_is_filled(options: dict[str, Any]) -> None:
    bench = opened(options)

    assert None not in (bench.storage, bench.power, bench.console, bench.shell, bench.stimulus)


@pytest.mark.parametrize("name", ["storage", "console", "shell", "power", "stimulus"])
def test_what_is_missing_is_named(options: dict[str, Any], name: str) -> None:
    del options[name]

    refused(options, f"board.{name} is missing")


def test_what_is_misspelt_is_named(options: dict[str, Any]) -> None:
    refused(options | {"storrage": "block:/dev/sdb"}, "board.storrage is not known here")


@pytest.mark.parametrize("name", ["storage", "console", "shell", "power", "stimulus"])
@pytest.mark.parametrize("value", ["telepathy:1", "operator", "", ":"])
def test_an_unknown_kind_is_refused_and_never_replaced(options: dict[str, Any], name: str, value: str) -> None:
    refused(options | {name: value}, f"board.{name} is of an unknown kind")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("storage", "block:"),
        ("storage", "block:sdb"),
        ("console", "serial:"),
        ("console", "serial:ttyUSB0"),
        ("console", "socket://"),
        ("shell", "ssh:a host:1"),
        ("shell", "ssh:host:0"),
        ("shell", "ssh:host:65536"),
        ("shell", "ssh:fe80::1"),
        ("power", "operator:please"),
        ("power", "hub:"),
        ("power", "hub:1-1"),
        ("power", "hub:1-1:2; reboot"),
        ("stimulus", "operator:please"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(options: dict[str, Any], name: str, value: str) -> None:
    refused(options | {name: value}, f"board.{name}")


def test_a_value_that_is_no_text_is_refused(options: dict[str, Any]) -> None:
    refused(options | {"power": 1}, "board.power must be a text")


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("", ("10.1.2.3", 22)),
        ("192.168.7.2", ("192.168.7.2", 22)),
        ("pi.local:2222", ("pi.local", 2222)),
        ("[fe80::1%usb0]:2222", ("fe80::1%usb0", 2222)),
        ("[fe80::1%usb0]", ("fe80::1%usb0", 22)),
    ],
)
def test_the_shell_goes_where_the_option_or_the_banner_says(
    options: dict[str, Any], place: str, where: tuple[str, int]
) -> None:
    shell = opened(options | {"shell": f"ssh:{place}"}).shell

    assert isinstance(shell, SshShell)
    assert where == shell._locate(BANNER)


# --- storage ------------------------------------------------------------------------------------------------------


def test_a_second_name_that_differs_is_refused(options: dict[str, Any]) -> None:
    refused(options | {"storage_again": "block:/dev/sdc"}, "board.storage_again is 'block:/dev/sdc'")


def test_a_second_name_that_is_the_same_is_taken(options: dict[str, Any]) -> None:
    opened(options | {"storage_again": options["storage"]})


def test_a_storage_that_is_no_block_device_is_refused_before_any_unit(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    refused(options | {"storage": f"block:{tmp_path / 'file'}"}, "is not a block device")


def test_a_path_that_moves_is_taken_with_a_warning(options: dict[str, Any]) -> None:
    operator = Bystander()

    opened(options | {"storage": "block:/dev/sd-no-such"}, operator)

    assert "/dev/sd-no-such can be another disk" in operator.told[0]


# --- console ------------------------------------------------------------------------------------------------------


def test_a_console_that_does_not_open_is_the_stations_fault(options: dict[str, Any]) -> None:
    refused(options | {"console": "serial:/dev/serial/by-path/none"}, "cannot be opened", StationFault)


def test_a_console_server_that_is_not_there_is_the_stations_fault(options: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    refused(options | {"console": f"socket://127.0.0.1:{port}"}, "cannot be opened", StationFault)


# --- the operator -------------------------------------------------------------------------------------------------


class Reader(BlockStorage):
    """A reader whose card is a file."""

    def __init__(self, card: FileStorage) -> None:
        super().__init__("/dev/disk/by-path/reader")
        self._card = card

    @contextmanager
    def attach(self) -> Iterator[Medium]:  # type: ignore[override]
        with self._card.attach() as medium:
            yield medium


def test_the_operator_is_asked_twice_for_a_unit(tmp_path: Path) -> None:
    operator = Bystander()
    card = CarriedCard(Reader(FileStorage(tmp_path / "card", 4096)), OperatorPower(operator))

    card.off()
    with card.attach() as medium:
        assert medium.size == 4096
    card.off()
    card.on()

    assert [
        "Switch the board's power off, then put the unit's card into the reader /dev/disk/by-path/reader.",
        "Put the card into the board, then switch the board's power on.",
    ] == operator.asked


def test_a_card_in_the_board_is_fetched_back_for_another_flash(tmp_path: Path) -> None:
    operator = Bystander()
    card = CarriedCard(Reader(FileStorage(tmp_path / "card", 4096)), OperatorPower(operator))

    card.on()
    with card.attach():
        pass

    assert [
        "Put the card into the board, then switch the board's power on.",
        "Switch the board's power off, then put the unit's card into the reader /dev/disk/by-path/reader.",
    ] == operator.asked


def test_no_card_is_flashed_twice_unasked(tmp_path: Path) -> None:
    operator = Bystander()
    card = CarriedCard(Reader(FileStorage(tmp_path / "card", 4096)), OperatorPower(operator))

    for _ in range(2):
        with card.attach():
            pass

    assert [
        "Switch the board's power off, then put the unit's card into the reader /dev/disk/by-path/reader.",
        "Put the unit's card into the reader /dev/disk/by-path/reader.",
    ] == operator.asked


def test_a_power_cycle_without_a_flash_leaves_the_card_where_it_is(tmp_path: Path) -> None:
    operator = Bystander()
    card = CarriedCard(Reader(FileStorage(tmp_path / "card", 4096)), OperatorPower(operator))

    card.on()
    card.off()
    card.off()
    card.on()

    assert [
        "Put the card into the board, then switch the board's power on.",
        "Switch the board's power off.",
        "Switch the board's power on.",
    ] == operator.asked


def test_the_wave_is_asked_for_and_not_waited_for(options: dict[str, Any]) -> None:
    operator = Bystander()

    opened(options, operator).stimulus.wave()

    assert ["Wave your hand before the PIR now!"] == operator.told
    assert not operator.asked


def at_terminal(terminal: str | None, code: str) -> "subprocess.Popen[bytes]":
    """Python in a session of its own, with `terminal` as its terminal, or with none."""
    first = f"import os; os.open({terminal!r}, os.O_RDWR)\n" if terminal else ""  # a leader's first tty becomes its own
    return subprocess.Popen(
        [sys.executable, "-c", first + "from factory.drivers.prompts import TerminalOperator\n" + code],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_an_operator_at_the_terminal_answers_although_stdin_is_redirected() -> None:
    master, slave = os.openpty()
    with at_terminal(os.ttyname(slave), "TerminalOperator().ask('Do it.'); print('done')") as station:
        assert station.stderr is not None
        assert station.stderr.readline() == b">>> Do it. Then press Enter.\n"
        os.write(master, b"\n")

        assert (b"done\n", b"") == station.communicate()
    os.close(master)
    os.close(slave)


def test_without_a_terminal_there_is_nobody_to_ask() -> None:
    with at_terminal(None, "TerminalOperator()") as station:
        _, said = station.communicate()

    assert b"StationFault: this bench needs an operator, and there is no terminal" in said


# --- the hub ------------------------------------------------------------------------------------------------------


class Hub:
    """uhubctl and a hub with one port, as uhubctl prints it; refuses any other command line."""

    def __init__(self, *, lies: bool = False) -> None:
        self.powered = True
        self.lies = lies
        self.commands: list[str] = []

    def __call__(self, command: list[str]) -> str:
        self.commands.append(" ".join(command))
        match command:
            case ["uhubctl", "-l", "1-1", "-p", "2", "-a", "on" | "off" as action]:
                self.powered = action == "on" or self.lies
                return "Sent power request\n"
            case ["uhubctl", "-l", "1-1", "-p", "2"]:
                state = "0103 power enable connect [1234:5678 Power off box]" if self.powered else "0000 off"
                return f"Current status for hub 1-1 [0424:9514, USB 2.00, 5 ports, ppps]\n  Port 2: {state}\n"
            case ["uhubctl", *_]:
                return "Current status for hub 1-1 [0424:9514, USB 2.00, 5 ports, ppps]\n"
        raise NotImplementedError(command)


def test_a_hub_switches_its_port_and_is_asked_whether_it_did() -> None:
    hub = Hub()
    power = HubPower.at("1-1:2", Bystander(), hub)

    power.off()
    after_off = hub.powered
    power.on()

    assert (False, True) == (after_off, hub.powered)
    assert ["", " -a off", "", " -a on", ""] == [one.removeprefix("uhubctl -l 1-1 -p 2") for one in hub.commands]


def test_a_hub_that_says_it_switched_and_did_not_is_found_out() -> None:
    power = HubPower.at("1-1:2", Bystander(), Hub(lies=True))

    with pytest.raises(LinkFault, match="port 2 of hub 1-1 did not switch off: it reports 'power enable connect'"):
        power.off()


def test_a_port_that_the_hub_does_not_have_is_the_stations_fault() -> None:
    with pytest.raises(StationFault, match="hub 1-1 has no port 7"):
        HubPower.at("1-1:7", Bystander(), Hub())


def test_with_a_hub_the_operator_moves_the_card_only(tmp_path: Path) -> None:
    operator, hub = Bystander(), Hub()
    card = CarriedCard(Reader(FileStorage(tmp_path / "card", 4096)), HubPower.at("1-1:2", operator, hub))

    with card.attach():
        while_flashed = hub.powered
    card.off()
    card.on()

    assert (False, True) == (while_flashed, hub.powered)
    assert [
        "Put the unit's card into the reader /dev/disk/by-path/reader.",
        "Put the card into the board.",
    ] == operator.asked


def test_a_program_that_is_missing_is_named_with_its_package() -> None:
    with pytest.raises(StationFault, match="no-such-program is not installed") as fault:
        run(["no-such-program", "-l", "1-1"])
    assert "apt install no-such-program" in fault.value.advice


def test_a_program_that_fails_is_shown_ready_to_paste() -> None:
    with pytest.raises(StationFault, match=r"`sh -c 'echo No hub >&2; exit 3'` failed with 3: No hub"):
        run(["sh", "-c", "echo No hub >&2; exit 3"])
