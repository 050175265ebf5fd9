import lzma
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image import initramfs
from image.errors import ImageError
from image.initramfs import Entry, Modules


def unpack(archive: bytes) -> list[tuple[str, int, bytes]]:
    """Names, modes and contents, read as the kernel reads them: fixed header, name, data, each padded to four."""
    found: list[tuple[str, int, bytes]] = []
    position = 0
    while True:
        header = archive[position : position + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * index : 14 + 8 * index], 16) for index in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        position += 110
        name = archive[position : position + name_size]
        assert name.endswith(b"\0")
        position += name_size + -(110 + name_size) % 4
        data = archive[position : position + size]
        position += size + -size % 4
        if name == b"TRAILER!!!\0":
            assert position == len(archive)
            return found
        found.append((name[:-1].decode(), mode, data))


@given(st.lists(st.tuples(st.text("abc/-_.", min_size=1, max_size=30), st.binary(max_size=50)), max_size=8))
def test_what_is_packed_comes_out_again(files: list[tuple[str, bytes]]) -> None:
    entries = [initramfs.file(name, data) for name, data in files]

    found = unpack(initramfs.cpio(entries))

    assert found == [(name, stat.S_IFREG | 0o644, data) for name, data in files]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_itself_unpacks_it(tmp_path: Path) -> None:
    entries = [initramfs.directory("bin"), initramfs.file("bin/run", b"#!/bin/sh\n", executable=True)]

    subprocess.run(["cpio", "-id", "--quiet"], cwd=tmp_path, input=initramfs.cpio(entries), check=True)

    assert (tmp_path / "bin/run").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "bin/run").stat().st_mode & 0o777 == 0o755


def test_the_same_entries_give_the_same_bytes() -> None:
    entries = [Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)), initramfs.file("init", b"x")]

    assert initramfs.cpio(entries) == initramfs.cpio(list(entries))


@pytest.fixture
def modules(tmp_path: Path) -> Modules:
    (tmp_path / "modules.dep").write_text(
        "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc16.ko.xz\n"
        "kernel/fs/jbd2/jbd2.ko.xz:\n"
        "kernel/lib/crc16.ko.xz:\n"
        "kernel/drivers/mmc/host/sdhci-iproc.ko.xz: kernel/drivers/mmc/host/sdhci.ko.xz\n"
        "kernel/drivers/mmc/host/sdhci.ko.xz:\n"
        "kernel/drivers/gpu/vc4.ko.xz:\n"
    )
    (tmp_path / "modules.alias").write_text(
        "# Aliases extracted from modules themselves.\n"
        "alias of:N*T*Cbrcm,bcm2711-emmc2 sdhci_iproc\n"
        "alias of:N*T*Cbrcm,bcm2711-emmc2C* sdhci_iproc\n"
        "alias of:N*T*Cbrcm,bcm2711-vc5 vc4\n"
        "alias pci:v00001AF4d* virtio_pci\n"
    )
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    place = tmp_path / "kernel/fs/jbd2"
    place.mkdir(parents=True)
    (place / "jbd2.ko.xz").write_bytes(lzma.compress(b"\x7fELF"))
    return Modules(tmp_path)


def test_a_module_comes_behind_what_it_needs(modules: Modules) -> None:
    assert modules.in_order(["ext4"]) == [
        "kernel/lib/crc16.ko.xz",
        "kernel/fs/jbd2/jbd2.ko.xz",
        "kernel/fs/ext4/ext4.ko.xz",
    ]


def test_a_built_in_module_needs_no_file(modules: Modules) -> None:
    assert modules.in_order(["virtio_pci"]) == []


def test_a_kernel_has_what_is_loadable_or_built_in(modules: Modules) -> None:
    assert [modules.has(name) for name in ("ext4", "virtio_pci", "virtio_blk")] == [True, True, False]


def test_a_module_that_is_nowhere_stops_the_build(modules: Modules) -> None:
    with pytest.raises(ImageError, match="btrfs"):
        modules.in_order(["btrfs"])


def test_a_boards_device_tree_names_the_drivers_on_the_way_to_its_card(modules: Modules) -> None:
    tree = b"\0brcm,bcm2711-emmc2\0brcm,bcm2711-vc5\0"

    assert modules.for_device_trees([tree]) == {"sdhci_iproc"}


def test_modules_are_unpacked(modules: Modules) -> None:
    assert modules.read("kernel/fs/jbd2/jbd2.ko.xz") == b"\x7fELF"


@pytest.mark.parametrize(
    ("path", "name"), [("kernel/drivers/block/virtio_blk.ko.xz", "virtio_blk"), ("a/sdhci-iproc.ko", "sdhci_iproc")]
)
def test_the_kernel_knows_a_module_by_its_name_with_underscores(path: str, name: str) -> None:
    assert initramfs.module_name(path) == name


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("picket", "picket"),
        ("picket-????", "picket-0123"),
        ("a?b-?", "a0b-1"),
        ("u" + "?" * 62, "u" + ("0123456789abcdef" * 4)[:62]),
    ],
)
def test_a_hostnames_question_marks_become_the_units_digits(pattern: str, name: str) -> None:
    function = re.search(r"^name_from\(\) \{\n.*?^\}\n", Path("image/init").read_text(), re.MULTILINE | re.DOTALL)
    assert function is not None

    said = subprocess.run(
        ["busybox", "sh", "-c", f'{function[0]}name_from "$1" "$2"', "sh", pattern, "0123456789abcdef" * 4 + "  -"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert said.stdout == f"{name}\n"
