import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.drivers import qemu
from factory.drivers.pi_boot import NoBootError, parse_config, read_boot_files
from factory.drivers.virtual_pi import VirtualPi
from factory.errors import StationFault

SBIN = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
needs_mtools = pytest.mark.skipif(
    shutil.which("mcopy") is None or shutil.which("mkfs.vfat", path=SBIN) is None,
    reason="mtools or dosfstools is not installed",
)
FAT_START = 2048


def medium(place: Path, files: dict[str, bytes]) -> Path:
    """A disk with one FAT partition that holds these files."""
    image, fat = place / "medium.img", place / "fat"
    with fat.open("wb") as file:
        file.truncate(2 * 2**20)
    subprocess.run([shutil.which("mkfs.vfat", path=SBIN) or "", fat], check=True, capture_output=True)
    for name, data in files.items():
        (place / "file").write_bytes(data)
        subprocess.run(["mcopy", "-i", fat, place / "file", f"::{name}"], check=True)
    record = bytes(446) + struct.pack("<B3sB3sII", 0, b"", 0x0C, b"", FAT_START, 4096) + bytes(48) + b"\x55\xaa"
    image.write_bytes(record + bytes(FAT_START * 512 - 512) + fat.read_bytes())
    return image


@needs_mtools
def test_the_files_that_config_txt_names_are_read(tmp_path: Path) -> None:
    disk = medium(
        tmp_path,
        {
            "config.txt": b"kernel=vmlinuz\ninitramfs initrd.img followkernel\n",
            "cmdline.txt": b"root=/dev/x quiet\nsecond line\n",
            "vmlinuz": b"the kernel",
            "initrd.img": b"the initramfs",
        },
    )
    (tmp_path / "out").mkdir()

    boot = read_boot_files(disk, tmp_path / "out")

    assert boot.kernel.read_bytes() == b"the kernel"
    assert boot.initramfs is not None
    assert boot.initramfs.read_bytes() == b"the initramfs"
    assert boot.command_line == "root=/dev/x quiet"


@needs_mtools
def test_a_kernel_that_is_not_there_is_named(tmp_path: Path) -> None:
    disk = medium(tmp_path, {"config.txt": b"kernel=other\n", "cmdline.txt": b"\n"})

    with pytest.raises(NoBootError, match="other"):
        read_boot_files(disk, tmp_path)


@needs_mtools
@pytest.mark.parametrize("name", ["../etc/passwd", "a b", "-x"])
def test_names_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    disk = medium(tmp_path, {"config.txt": f"kernel={name}\n".encode(), "cmdline.txt": b"\n"})

    with pytest.raises(NoBootError):
        read_boot_files(disk, tmp_path)


@needs_mtools
@pytest.mark.parametrize("content", [b"", bytes(512), bytes(510) + b"\x55\xaa"])
def test_a_medium_without_a_boot_partition_does_not_boot(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "medium.img"
    path.write_bytes(content)

    with pytest.raises(NoBootError):
        read_boot_files(path, tmp_path)


@needs_mtools
def test_no_medium_does_not_boot(tmp_path: Path) -> None:
    with pytest.raises(NoBootError, match="no medium"):
        read_boot_files(tmp_path / "none", tmp_path)


def test_a_later_line_overrules_and_filters_count() -> None:
    text = "kernel=a\n[pi4]\nkernel=four\n[pi3]\nkernel=three\n[all]\n# kernel=c\ninitramfs i.img followkernel\n"

    assert parse_config(text, "pi3") == {"kernel": "three", "initramfs": "i.img followkernel"}
    assert parse_config(text, "pi4")["kernel"] == "four"
    assert parse_config(text, "pi02")["kernel"] == "a"


@given(st.text())
def test_any_text_is_a_config(text: str) -> None:
    parse_config(text, "pi3")


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
