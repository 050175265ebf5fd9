"""The static checks of an image: a good one passes all, and every rung breaks under the fault that it is there for."""

import datetime as dt
import json
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from image import ladder
from image.__main__ import app
from image.layout import autoboot_txt
from image.manifest import ImageManifest, Support
from tests.image import small
from tests.image.small import BOOT_A, BOOT_B, ROOT_B

pytestmark = small.needs_tools

Fault = Callable[[Path], object]


def broken(manifest: ImageManifest) -> dict[str, list[str]]:
    """The rungs that do not hold, and what they say."""
    return {one.name: [said.text for said in one.findings] for one in ladder.climb(manifest) if not one.held}


def written(manifest: ImageManifest, place: int, data: bytes) -> None:
    with manifest.image_path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def start(manifest: ImageManifest, label: str) -> int:
    return next(part.start for part in manifest.partitions if part.label == label)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> ImageManifest:
    return small.build(tmp_path_factory.mktemp("good") / "image")


@pytest.fixture
def copy(good: ImageManifest, tmp_path: Path) -> ImageManifest:
    """A copy that may be tampered with."""
    subprocess.run(["cp", "--sparse=always", good.image_path, tmp_path], check=True)
    return replace(good, directory=tmp_path)


def test_a_good_image_passes_all_rungs(good: ImageManifest) -> None:
    assert broken(good) == {}
    assert [one.name for one in ladder.climb(good)] == list(ladder.RUNGS)


# --- faults in the finished image -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "data"),
    [
        (454, struct.pack("<I", 8200)),  # where the first partition begins
        (450, b"\x83"),  # its type
        (440, b"\0\0\0\1"),  # the disk's signature
        (510, b"\0\0"),  # whether there is a table at all
        (446 + 48 + 4, b"\0"),  # the extended partition
    ],
)
def test_a_partition_table_that_is_not_the_described_one(copy: ImageManifest, place: int, data: bytes) -> None:
    written(copy, place, data)

    assert "partition table" in broken(copy)


def test_a_damaged_fat(copy: ImageManifest) -> None:
    written(copy, start(copy, "CONTROL") + 512 * 32, b"\xf8\xff\xff\x0f" + b"\xff" * 64)

    assert "boot file systems" in broken(copy)


def test_a_damaged_data_file_system(copy: ImageManifest) -> None:
    written(copy, start(copy, "DATA") + 1024 + 12, b"\1\0\0\0")  # the count of free blocks

    assert list(broken(copy)) == ["data file system"]


def test_one_flipped_bit_in_the_root(copy: ImageManifest) -> None:
    with copy.image_path.open("r+b") as file:
        file.seek(start(copy, "ROOT") + 100)
        byte = file.read(1)[0]
    written(copy, start(copy, "ROOT") + 100, bytes([byte ^ 1]))

    assert "root hash" in broken(copy)


def test_a_root_that_is_gone(copy: ImageManifest) -> None:
    written(copy, start(copy, "ROOT"), bytes(8192))

    found = broken(copy)

    assert "no squashfs that can be read" in found["no set-id programs"][0]
    assert {"root hash", "no passwords, one root", "no compiler, no sudo"} <= set(found)


@pytest.mark.parametrize("offset", [0, 3 << 20])
def test_a_second_slot_that_is_not_empty(copy: ImageManifest, offset: int) -> None:
    (second,) = (part for part in copy.partitions if part.index == ROOT_B)
    written(copy, second.start + offset, b"\1")

    assert list(broken(copy)) == ["second slot is empty"]


def test_a_description_without_a_root_hash(good: ImageManifest) -> None:
    assert broken(replace(good, verity=None)) == {
        "root hash": ["the description names no root hash: nothing checks the root of this image"]
    }


def test_a_description_with_another_root_hash(good: ImageManifest) -> None:
    assert good.verity is not None

    assert set(broken(replace(good, verity=replace(good.verity, root_hash="0" * 64)))) == {"root hash", "boards boot"}


# --- faults in what went in -----------------------------------------------------------------------------------------


def text(path: str, content: str = "") -> Fault:
    def change(tree: Path) -> None:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(content)

    return change


def private_key(path: str) -> Fault:
    def change(tree: Path) -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tree / path], check=True)

    return change


PEM = "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMHcCAQEEIJx0Y2x0b3BzZWNyZXQgdGVzdCBrZXkgb25seQ==\n"


@pytest.mark.parametrize(
    ("rung", "fault"),
    [
        ("no secrets, nothing of one unit", private_key("etc/deploy")),
        ("no secrets, nothing of one unit", text("usr/share/doc/note", f"first\n{PEM}")),
        ("no secrets, nothing of one unit", text("etc/ssh/ssh_host_rsa_key", "x")),
        ("no secrets, nothing of one unit", text("etc/machine-id", "0123\n")),
        ("no secrets, nothing of one unit", lambda root: (root / "etc/machine-id").unlink()),
        ("no secrets, nothing of one unit", text("var/lib/systemd/random-seed", "x")),
        ("no passwords, one root", text("etc/shadow", "root:$y$j9T$x:20000::::::\n")),
        ("no passwords, one root", text("etc/shadow", "root::20000::::::\n")),
        ("no passwords, one root", text("etc/passwd", "root:x:0:0::/:/bin/sh\ntoor:x:0:0::/:/bin/sh\n")),
        ("no passwords, one root", text("etc/passwd", "root::0:0::/:/bin/sh\n")),
        ("no passwords, one root", lambda root: (root / "etc/shadow").unlink()),
        ("no set-id programs", lambda root: (root / "usr/bin/agent").chmod(0o4755)),
        ("no set-id programs", lambda root: (root / "usr/bin/agent").chmod(0o2755)),
        ("no compiler, no sudo", text("usr/bin/sudo")),
        ("no compiler, no sudo", text("usr/local/bin/gcc")),
        ("nothing that all may write", lambda root: (root / "etc/hostname").chmod(0o666)),
        ("nothing that all may write", lambda root: (root / "etc").chmod(0o777)),
    ],
)
def test_a_fault_in_the_root(tmp_path: Path, rung: str, fault: Fault) -> None:
    manifest = small.build(tmp_path / "image", root=fault)

    assert list(broken(manifest)) == [rung]


@pytest.mark.parametrize(
    ("rung", "fault"),
    [
        ("boards boot", lambda boot: (boot / "vmlinuz").unlink()),
        ("boards boot", lambda boot: (boot / "bcm2712-rpi-5-b.dtb").unlink()),
        ("boards boot", lambda boot: (boot / "cmdline.txt").unlink()),
        ("boards boot", text("cmdline.txt", "ro quiet")),
        ("boards boot", text("config.txt", "kernel=vmlinuz\ndtoverlay=nowhere\n")),
        ("no secrets, nothing of one unit", private_key("key")),
    ],
)
def test_a_fault_in_the_boot_files(tmp_path: Path, rung: str, fault: Fault) -> None:
    manifest = small.build(tmp_path / "image", boot=fault)

    assert list(broken(manifest)) == [rung]


@pytest.mark.parametrize(
    "content",
    [
        autoboot_txt(BOOT_A, BOOT_B).rstrip(b"\n"),
        autoboot_txt(BOOT_A, BOOT_B) + b"\n",
        autoboot_txt(BOOT_B, BOOT_A),
        autoboot_txt(BOOT_A, BOOT_B).replace(b"tryboot_a_b=1", b"tryboot_a_b=0"),
        None,
    ],
)
def test_a_fault_in_the_boot_control(tmp_path: Path, content: bytes | None) -> None:
    def fault(control: Path) -> None:
        if content is None:
            (control / "autoboot.txt").unlink()
        else:
            (control / "autoboot.txt").write_bytes(content)

    assert "boot control" in broken(small.build(tmp_path / "image", control=fault))


@pytest.mark.parametrize(("size", "held"), [(512, True), (511, False)])
def test_the_files_that_choose_a_directory_are_one_sector_too(tmp_path: Path, size: int, *, held: bool) -> None:
    def files(control: Path) -> None:
        for name, slot in (("slot.txt", "a"), ("tryslot.txt", "b")):
            (control / name).write_bytes(f"os_prefix={slot}/\n".encode().ljust(size, b"\n"))

    manifest = replace(small.build(tmp_path / "image", control=files), control="os-prefix")

    assert ("boot control" not in broken(manifest)) is held


def test_an_image_without_the_files_that_choose_a_directory(good: ImageManifest) -> None:
    assert [said.partition(":")[0] for said in broken(replace(good, control="os-prefix"))["boot control"]] == [
        "the first FAT has no slot.txt", "the first FAT has no tryslot.txt",
    ]  # fmt: skip


def test_a_control_that_the_description_is_silent_of_is_found(good: ImageManifest) -> None:
    assert broken(replace(good, control=None))["boot control"] == [
        "CONTROL has autoboot.txt, and the description names no control: build the image again"
    ]


def test_an_empty_file_of_a_control_that_the_description_is_silent_of_is_found(tmp_path: Path) -> None:
    made = small.build(tmp_path / "image", control=lambda tree: (tree / "autoboot.txt").write_bytes(b""))

    assert "CONTROL has autoboot.txt" in broken(replace(made, control=None))["boot control"][0]


def test_an_image_without_slots_is_told_that_no_control_was_looked_at(tmp_path: Path) -> None:
    made = small.build(tmp_path / "image", control=lambda tree: (tree / "autoboot.txt").unlink())

    (told,) = (one for one in ladder.climb(replace(made, control=None)) if one.name == "boot control")

    assert told.held
    assert ["nothing was looked at" in said.text for said in told.findings] == [True]


def test_a_partition_that_no_rung_looks_into_is_a_fault(good: ImageManifest) -> None:
    parts = tuple(replace(part, type="btrfs") if part.label == "DATA" else part for part in good.partitions)

    (said,) = broken(replace(good, partitions=parts))["partition table"]

    assert said.startswith("partition 7 is 'btrfs', says the description, and no rung looks into such a one")


def test_a_board_whose_firmware_knows_no_autoboot_is_a_note_and_no_fault(good: ImageManifest) -> None:
    (boards,) = (
        one for one in ladder.climb(replace(good, boards=("bcm2837-rpi-3-b", "unknown-9"))) if one.name == "boards boot"
    )

    assert boards.held
    assert ["os-prefix" in said.text for said in boards.findings] == [True, False]


@pytest.mark.parametrize(
    ("support", "words"),
    [
        (Support(None, "mailto:a@b"), ["until when"]),
        (Support(dt.date(2020, 1, 1), "mailto:a@b"), ["ended on 2020-01-01"]),
        (Support(dt.date(9999, 1, 1), None), ["where holes are reported"]),
    ],
)
def test_what_buyers_must_be_told_is_noted_where_it_is_not_said(
    good: ImageManifest, support: Support, words: list[str]
) -> None:
    (told,) = (one for one in ladder.climb(replace(good, support=support)) if one.name == "support period")

    assert told.held
    assert [word in said.text for said, word in zip(told.findings, words, strict=True)] == [True]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_holds_and_leaves_with_0(good: ImageManifest) -> None:
    done = CliRunner().invoke(app, ["lint", str(good.directory)])

    assert done.exit_code == 0
    assert done.output.splitlines() == [f"pass  {name}" for name in ladder.RUNGS]


def test_the_command_says_what_is_wrong_and_what_to_do_and_leaves_with_2(tmp_path: Path) -> None:
    small.build(tmp_path / "image", root=lambda root: (root / "usr/bin/agent").chmod(0o4755))

    done = CliRunner().invoke(app, ["lint", str(tmp_path / "image/small-1.0.json")])

    assert done.exit_code == 2
    assert "FAIL  no set-id programs\n      /usr/bin/agent becomes another user (4755): take its bits" in done.output
    assert "1 of 13 failed" in done.output


def test_the_command_prints_json(tmp_path: Path) -> None:
    small.build(tmp_path / "image", root=lambda root: (root / "etc/hostname").chmod(0o666))

    done = CliRunner().invoke(app, ["lint", str(tmp_path / "image"), "--json"])

    assert done.exit_code == 2
    assert json.loads(done.output)["failed"] == ["nothing that all may write"]


def test_an_image_that_is_gone_is_named(copy: ImageManifest) -> None:
    copy.image_path.unlink()

    with pytest.raises(Exception, match=r"holds no small-1\.0\.img"):
        broken(copy)
