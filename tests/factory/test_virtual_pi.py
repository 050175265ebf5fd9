"""The virtual Pi as a board: power, resets, its register and its faults, with a kernel of a dozen instructions."""

import os
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from factory.drivers import qemu
from factory.drivers.virtual_pi import VirtualPi, _Mailbox, _shut_tpm_down
from factory.errors import StationFault
from image.firmware import Reset, ResetRegister
from tests.factory.wire import SECONDS, Wire
from tests.image.firmware.cards import FAT32, LINUX, autoboot, disk, fat, needs_mtools
from tests.machine import alive

needs_qemu = pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("qemu-system-aarch64", "fdtput", "setpriv")),
    reason="QEMU or the device tree compiler is not installed",
)


def kernel(letter: str) -> bytes:
    """Says its letter on the UART and waits for one: `o` powers off, every other resets (PSCI)."""
    code = [
        0xD2A12001,  # movz x1, #0x0900, lsl #16      the PL011
        0x52800000 | ord(letter) << 5,  # movz w0, #letter
        0xB9000020,  # str w0, [x1]
        0x52800140,  # movz w0, #'\n'
        0xB9000020,  # str w0, [x1]
        0xB9401822,  # ldr w2, [x1, #0x18]            its flags
        0x3727FFE2,  # tbnz w2, #4, -4                nothing received
        0xB9400023,  # ldr w3, [x1]
        0x7101BC7F,  # cmp w3, #'o'
        0x52800120,  # movz w0, #0x0009               SYSTEM_RESET
        0x72B08000,  # movk w0, #0x8400, lsl #16
        0x54000041,  # b.ne +8
        0x51000400,  # sub w0, w0, #1                 SYSTEM_OFF
        0xD4000002,  # hvc #0
        0x14000000,  # b .
    ]
    return struct.pack(f"<{len(code)}I", *code)


def slot(letter: str) -> bytes:
    return fat({"config.txt": b"kernel=k\n", "cmdline.txt": b"", "k": kernel(letter)})


def card() -> bytes:
    control = autoboot("[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n")
    return bytes(disk([(FAT32, fat({"autoboot.txt": control})), (FAT32, slot("a")), (FAT32, slot("b"))],
                      [(LINUX, bytes(512))]))  # fmt: skip


@contextmanager
def powered(place: Path, **options: int) -> Iterator[tuple[VirtualPi, Wire]]:
    with VirtualPi(place, tpm=False, **options) as board:  # type: ignore[arg-type]
        board.medium.write_bytes(card())
        wire = Wire(board)
        try:
            board.on()
            yield board, wire
        finally:
            wire.close()


def wait_until_it_stops(board: VirtualPi) -> None:
    deadline = time.monotonic() + SECONDS
    while board.running:
        assert time.monotonic() < deadline, "the board still runs"
        time.sleep(0.01)


def told(board: VirtualPi, node: str, *names: str) -> list[str]:
    """What the device tree of the last start says."""
    return [qemu.run("fdtget", board._sockets / "board.dtb", node, name).strip() for name in names]


# --- without power


def test_a_missing_program_sends_to_setup() -> None:
    with pytest.raises(StationFault) as caught:
        qemu.program("no-such-program-of-ours")

    assert "make setup" in caught.value.advice


def test_without_qemu_the_board_stays_off_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_arguments, **_options: None)
    with VirtualPi(tmp_path) as board:
        with pytest.raises(StationFault, match="qemu-system-aarch64"):
            board.on()

        assert not board.powered


def test_a_board_keeps_its_serial(tmp_path: Path) -> None:
    with VirtualPi(tmp_path) as first, VirtualPi(tmp_path) as again:
        assert first.serial == again.serial
        assert len(first.serial) == 16
        assert first.mac.startswith("b8:27:eb:")


def test_the_console_can_be_opened_without_power(tmp_path: Path) -> None:
    with VirtualPi(tmp_path) as board:
        assert board.console_url().startswith("socket://127.0.0.1:")
        assert board.ssh_address() == ("127.0.0.1", 9)


@pytest.mark.parametrize("number", [0, -1])
def test_a_power_cut_before_the_first_reboot_is_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        VirtualPi(tmp_path, power_cut_at_reboot=number)


@needs_mtools
def test_only_a_partition_that_is_there_can_be_damaged(tmp_path: Path) -> None:
    with VirtualPi(tmp_path) as board:
        with pytest.raises(StationFault, match="no medium"):
            board.damage(1)
        board.medium.write_bytes(card())
        with pytest.raises(StationFault, match="no partition 7"):
            board.damage(7)


# --- power and resets


@needs_mtools
@needs_qemu
def test_a_reset_is_a_warm_reboot_by_the_firmware(tmp_path: Path) -> None:
    with powered(tmp_path) as (board, wire):
        wire.hear("a")
        first = board.child_pids
        wire.say("r")
        wire.hear("a")

        assert board.running
        assert board.powered
        assert board.reboots == 1
        assert board.child_pids != first
        assert not any(alive(pid) for pid in first)
        board.drive_pir(high=True)


@needs_mtools
@needs_qemu
def test_the_tryboot_flag_is_good_for_one_warm_reboot(tmp_path: Path) -> None:
    with powered(tmp_path) as (board, wire):
        register = ResetRegister(tmp_path / "reset")
        wire.hear("a")
        register.set(Reset(tryboot=True))
        wire.say("r")
        wire.hear("b")
        assert register.read() == Reset()
        assert told(board, "/chosen/bootloader", "partition", "tryboot", "boot-mode") == ["3", "1", "1"]
        wire.say("r")
        wire.hear("a")
        assert board.reboots == 2


@needs_mtools
@needs_qemu
def test_a_power_cut_loses_the_flag(tmp_path: Path) -> None:
    with powered(tmp_path) as (board, wire):
        wire.hear("a")
        ResetRegister(tmp_path / "reset").set(Reset(tryboot=True))
        board.cycle()
        wire.hear("a")

        assert board.reboots == 0


@needs_mtools
@needs_qemu
def test_a_flag_that_a_killed_station_left_behind_is_lost_too(tmp_path: Path) -> None:
    tmp_path.joinpath("reset").write_text('{"partition": 0, "tryboot": true}')
    with powered(tmp_path) as (_board, wire):
        wire.hear("a")


@needs_mtools
@needs_qemu
def test_a_guest_that_shuts_down_stays_down_with_its_power_on(tmp_path: Path) -> None:
    with powered(tmp_path) as (board, wire):
        wire.hear("a")
        wire.say("o")
        wait_until_it_stops(board)

        assert board.powered
        assert board.reboots == 0
        assert board.ssh_address() == ("127.0.0.1", 9)
        board.cycle()
        wire.hear("a")


@needs_mtools
@needs_qemu
def test_a_machine_that_dies_is_not_started_again(tmp_path: Path) -> None:
    with powered(tmp_path) as (board, wire):
        wire.hear("a")
        os.kill(board.child_pids[0], 9)
        wait_until_it_stops(board)

        assert board.reboots == 0


@needs_mtools
@needs_qemu
@pytest.mark.parametrize("pause", [0.0, 0.05, 0.3, 0.6])
def test_a_power_cut_during_a_warm_reboot_wins(tmp_path: Path, pause: float) -> None:
    with powered(tmp_path) as (board, wire):
        wire.hear("a")
        before = board.child_pids
        wire.say("r")
        time.sleep(pause)
        board.off()

        assert not board.powered
        assert not board.running
        assert board.child_pids == ()
        assert not any(alive(pid) for pid in before)
        threads = [one.name for one in threading.enumerate() if one.name in {"virtual Pi", "mailbox"}]
        assert threads == []
        board.on()
        wire.hear("a")


@needs_mtools
@needs_qemu
def test_the_board_outlives_the_thread_that_switched_it_on(tmp_path: Path) -> None:
    with VirtualPi(tmp_path, tpm=False) as board:
        board.medium.write_bytes(card())
        wire = Wire(board)
        hand = threading.Thread(target=board.on)
        hand.start()
        hand.join()
        wire.hear("a")
        wire.say("r")
        wire.hear("a")
        wire.close()


@needs_mtools
@needs_qemu
def test_the_supply_fails_at_the_reboot_that_was_asked_for(tmp_path: Path) -> None:
    with powered(tmp_path, power_cut_at_reboot=2) as (board, wire):
        wire.hear("a")
        wire.say("r")
        wire.hear("a")
        ResetRegister(tmp_path / "reset").set(Reset(tryboot=True))
        wire.say("r")
        wait_until_it_stops(board)

        assert not board.powered
        assert board.child_pids == ()
        board.on()
        wire.hear("a")


@needs_mtools
@needs_qemu
@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
def test_the_tpm_is_reset_with_the_board(tmp_path: Path) -> None:
    with VirtualPi(tmp_path) as board:
        board.medium.write_bytes(card())
        wire = Wire(board)
        board.on()
        wire.hear("a")
        before = set(board.child_pids)
        wire.say("r")
        wire.hear("a")

        assert len(before) == len(board.child_pids) == 2
        assert not before & set(board.child_pids)
        wire.close()


@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
@pytest.mark.parametrize("told_before", [True, False])
def test_a_tpm_that_is_told_of_the_reset_counts_no_attack(tmp_path: Path, told_before: bool) -> None:
    with tempfile.TemporaryDirectory() as short:
        path = Path(short) / "tpm"
        for turn in range(2):
            path.unlink(missing_ok=True)
            tpm = qemu.Child(
                "swtpm",
                ["socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--server", f"type=unixio,path={path}",
                 "--flags", "not-need-init"],
                tmp_path / "log",
            )  # fmt: skip
            tpm.wait_for(path.exists)
            startup = ask_tpm(path, "8001 0000000c 00000144 0000")
            assert startup[6:10] == bytes(4)
            if turn == 0 and told_before:
                _shut_tpm_down(path)
            # TPMA_STARTUP_CLEAR (property 0x201), whose highest bit says that the last shutdown was an orderly one.
            state = ask_tpm(path, "8001 00000016 0000017a 00000006 00000201 00000001")[-4:] if turn else b""
            tpm.stop(politely=True)

    assert bool(state[0] & 0x80) is told_before


def ask_tpm(path: Path, command: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as tpm:
        tpm.settimeout(SECONDS)
        tpm.connect(str(path))
        tpm.sendall(bytes.fromhex(command))
        return tpm.recv(4096)


@needs_mtools
@needs_qemu
def test_a_fused_board_starts_nothing_that_is_not_signed(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with VirtualPi(tmp_path, tpm=False, customer_key=pem) as board:
        board.medium.write_bytes(card())
        wire = Wire(board)
        board.on()
        wire.hear("no boot.img")
        wire.close()

        assert board.powered
        assert not board.running


@needs_mtools
@needs_qemu
def test_a_damaged_slot_leads_to_the_other(tmp_path: Path) -> None:
    with powered(tmp_path) as (board, wire):
        wire.hear("a")
        with pytest.raises(StationFault, match="has power"):
            board.damage(2)
        board.off()
        board.damage(2)
        board.on()
        wire.hear("b")


@needs_mtools
@needs_qemu
def test_a_try_that_the_firmware_cannot_start_is_followed_by_a_start_without_it(tmp_path: Path) -> None:
    with VirtualPi(tmp_path, tpm=False) as board:
        board.medium.write_bytes(bytes(disk([(FAT32, slot("a"))])))  # without tryboot.txt
        wire = Wire(board)
        board.on()
        wire.hear("a")
        ResetRegister(tmp_path / "reset").set(Reset(tryboot=True))
        wire.say("r")
        wire.hear("tryboot.txt")
        wire.hear("a")
        wire.close()


def test_an_empty_medium_does_not_boot_and_says_so(tmp_path: Path) -> None:
    if shutil.which("qemu-system-aarch64") is None or shutil.which("fdtput") is None:
        pytest.skip("QEMU is not installed")
    with VirtualPi(tmp_path, tpm=False) as board:
        board.medium.write_bytes(bytes(2**20))
        board.on()

        assert board.powered
        assert not board.running
    assert b"no bootable medium" in (tmp_path / "console.log").read_bytes()


# --- the mailbox


@pytest.mark.parametrize(
    ("request_", "answer", "flag"),
    [
        (b"tryboot 1\n", b"ok\n", True),
        (b"tryboot 1\ntryboot 0\n", b"ok\nok\n", False),
        (b"tryboot 2\n", b"error", False),
        (b"\n", b"error", False),
        (b"reboot\ntryboot 1\n", b"error", True),
        (b"x" * 10000 + b"\n", b"error", False),
        (b"tryboot 1", b"", False),
        (b"\xff\0\n", b"error", False),
    ],
)
def test_the_mailbox_sets_the_flag_and_knows_nothing_else(
    tmp_path: Path, request_: bytes, answer: bytes, flag: bool
) -> None:
    register = ResetRegister(tmp_path / "reset")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "port"))
        listener.listen()
        mailbox = _Mailbox(tmp_path / "port", register)
        guest, _ = listener.accept()
        guest.settimeout(SECONDS)
        guest.sendall(request_)
        guest.shutdown(socket.SHUT_WR)
        said = b""
        while data := guest.recv(4096):
            said += data
        guest.close()
        mailbox.close()

    assert said.startswith(answer)
    assert said.count(b"\n") == request_.count(b"\n")
    assert register.read().tryboot is flag


def test_a_flag_that_cannot_be_kept_is_not_promised(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "port"))
        listener.listen()
        mailbox = _Mailbox(tmp_path / "port", ResetRegister(tmp_path / "gone" / "reset"))
        guest, _ = listener.accept()
        guest.settimeout(SECONDS)
        guest.sendall(b"tryboot 1\n")
        said = guest.recv(4096)
        guest.close()
        mailbox.close()

    assert said.startswith(b"error: the flag cannot be kept")
