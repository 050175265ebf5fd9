import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image import disk
from image.disk import ALIGNMENT, EXTENDED_LBA, FAT32_LBA, LINUX, MEBIBYTE, SECTOR, Slice
from image.errors import ImageError
from image.firmware import FileMedium
from image.firmware.fat import Fat
from image.recipe import check_values

SIZE = st.tuples(st.sampled_from([FAT32_LBA, LINUX]), st.integers(1, 2**34))
PRIMARY = st.lists(SIZE, min_size=1, max_size=3)
LOGICAL = st.lists(SIZE, max_size=6)


def reader(records: dict[int, bytes]) -> Callable[[int], bytes]:
    return lambda place: records.get(place, bytes(SECTOR))


@given(st.integers(1, 2**32 - 1), PRIMARY, LOGICAL)
def test_the_boot_records_say_what_was_laid_out(
    signature: int, primary: list[tuple[int, int]], logical: list[tuple[int, int]]
) -> None:
    slices = disk.lay_out(primary, logical)

    records = disk.records(signature, slices)

    assert all(len(record) == SECTOR for record in records.values())
    assert disk.read_table(reader(records)) == (signature, slices)


@given(PRIMARY, LOGICAL)
def test_partitions_are_aligned_large_enough_and_apart(
    primary: list[tuple[int, int]], logical: list[tuple[int, int]]
) -> None:
    found = [part for part in disk.lay_out(primary, logical) if part.type != EXTENDED_LBA]

    end = ALIGNMENT
    for part, (_, size) in zip(found, [*primary, *logical], strict=True):
        assert part.start % ALIGNMENT == part.size % ALIGNMENT == 0
        assert part.start >= end
        assert part.size >= size
        end = part.end


@pytest.mark.parametrize(
    "slices",
    [
        [],
        [Slice(1, LINUX, 100, MEBIBYTE)],
        [Slice(1, LINUX, MEBIBYTE, 0)],
        [Slice(1, LINUX, MEBIBYTE, 2**42)],
        [Slice(1, LINUX, MEBIBYTE, MEBIBYTE), Slice(5, LINUX, 8 * MEBIBYTE, MEBIBYTE)],
    ],
)
def test_a_table_that_cannot_be_is_refused(slices: list[Slice]) -> None:
    with pytest.raises(ImageError):
        disk.records(1, slices)


def test_more_primary_partitions_than_an_mbr_holds_are_refused() -> None:
    with pytest.raises(ImageError, match="one to four"):
        disk.lay_out([(LINUX, MEBIBYTE)] * 4, [(LINUX, MEBIBYTE)])


def test_a_disk_without_a_boot_record_is_named_so() -> None:
    with pytest.raises(ImageError, match="boot record"):
        disk.read_table(lambda _: bytes(SECTOR))


@given(st.lists(st.binary(min_size=64, max_size=64), min_size=1, max_size=4))
def test_a_damaged_table_ends_and_ends_in_words(tables: list[bytes]) -> None:
    asked = cycle([bytes(446) + table + b"\x55\xaa" for table in tables])
    with suppress(ImageError):
        _, slices = disk.read_table(lambda _: next(asked))

        assert len(slices) <= 64


def test_a_partition_has_the_name_that_linux_gives_it() -> None:
    assert disk.partuuid(0x9AFCC527, 2) == "9afcc527-02"


def test_identifiers_follow_from_names() -> None:
    assert disk.identifier("picket", "0.1.0", "root") == disk.identifier("picket", "0.1.0", "root")
    assert disk.identifier("picket", "0.1.0", "root") != disk.identifier("picket", "0.1.1", "root")


@pytest.mark.skipif(shutil.which("sfdisk") is None, reason="sfdisk is not installed (package fdisk)")
def test_sfdisk_reads_the_same_table(tmp_path: Path) -> None:
    slices = disk.lay_out([(FAT32_LBA, 96 * MEBIBYTE)], [(LINUX, 10 * MEBIBYTE), (LINUX, 8 * MEBIBYTE)])
    image = tmp_path / "disk.img"
    disk.assemble(image, 0x1234ABCD, slices, {})

    table = json.loads(subprocess.run(["sfdisk", "--json", image], check=True, capture_output=True).stdout)

    found = table["partitiontable"]
    assert found["id"] == "0x1234abcd"
    assert [(part["start"] * SECTOR, part["size"] * SECTOR, part["type"]) for part in found["partitions"]] == [
        (part.start, part.size, f"{part.type:x}") for part in slices
    ]
    assert [int(part["node"].removeprefix(str(image))) for part in found["partitions"]] == [1, 2, 5, 6]


def test_holes_stay_holes_when_the_disk_is_assembled(tmp_path: Path) -> None:
    part = tmp_path / "part"
    with part.open("wb") as file:
        file.seek(8 * MEBIBYTE)
        file.write(b"far away")
        file.truncate(16 * MEBIBYTE)
    slices = disk.lay_out([(LINUX, 16 * MEBIBYTE)])

    disk.assemble(tmp_path / "disk.img", 1, slices, {1: part})

    with (tmp_path / "disk.img").open("rb") as file:
        file.seek(slices[0].start + 8 * MEBIBYTE)
        assert file.read(8) == b"far away"
    assert (tmp_path / "disk.img").stat().st_blocks * 512 < MEBIBYTE


def test_a_file_system_larger_than_its_partition_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(bytes(2 * SECTOR))

    with pytest.raises(ImageError, match="its partition"):
        disk.assemble(tmp_path / "disk.img", 1, [Slice(1, LINUX, ALIGNMENT, SECTOR)], {1: part})


@pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="mksquashfs is not installed (package squashfs-tools)")
def test_the_same_tree_gives_the_same_root_and_veritysetup_verifies_it(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"content" * 5000)
    (tree / "link").symlink_to("file")
    found = []
    for name, moment in (("one", 1_500_000_000), ("two", 1_900_000_000)):
        os.utime(tree / "file", (moment, moment))
        disk.make_squashfs(tree, tmp_path / name, 1767225600)
        found.append(disk.add_verity(tmp_path / name, b"salt" * 8))

    assert found[0] == found[1]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    check = ["/usr/sbin/veritysetup", "verify", "--no-superblock", f"--data-blocks={found[0].blocks}",
             f"--hash-offset={found[0].blocks * 4096}", f"--salt={found[0].salt}"]  # fmt: skip
    image = str(tmp_path / "one")
    assert subprocess.run([*check, image, image, found[0].root_hash], check=False).returncode == 0
    with (tmp_path / "one").open("r+b") as file:
        file.seek(100)
        file.write(b"!")
    assert subprocess.run([*check, image, image, found[0].root_hash], check=False, capture_output=True).returncode != 0


@pytest.mark.skipif(shutil.which("mke2fs", path="/usr/sbin:/sbin") is None, reason="mke2fs is not installed")
def test_the_smallest_data_partition_that_a_recipe_may_ask_for_can_be_made(tmp_path: Path) -> None:
    table = {"disk": {"data_mebibytes": 32}}
    assert not [said for said in check_values(Path("a.toml"), table) if "data_mebibytes" in said]
    assert [said for said in check_values(Path("a.toml"), {"disk": {"data_mebibytes": 31}}) if "data_mebibytes" in said]

    disk.make_data(tmp_path / "data", 32 * MEBIBYTE, "data", disk.identifier("test"), 1)


@pytest.mark.skipif(shutil.which("mcopy") is None, reason="mtools is not installed")
def test_a_fat_has_the_same_bits_whatever_order_its_files_were_made_in(tmp_path: Path) -> None:
    names = ["config.txt", "a/vmlinuz", "a/initrd.img", "a/overlays/one.dtbo", "a/overlays/two.dtbo", "a/z", "b.dat"]
    for folder, order in (("one", names), ("other", names[::-1])):
        for name in order:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(name)
        disk.make_fat(tmp_path / folder, tmp_path / f"{folder}.fat", 36 * MEBIBYTE, "BOOT", 7, 1_700_000_000)

    assert (tmp_path / "one.fat").read_bytes() == (tmp_path / "other.fat").read_bytes()
    with FileMedium(tmp_path / "one.fat") as medium:
        fat = Fat(medium, 0, 36 * MEBIBYTE)
        assert {path for path, entry in fat.walk() if not entry.folder} == set(names)
        assert fat.read("a/overlays/two.dtbo") == b"a/overlays/two.dtbo"
    said = subprocess.run(["mdir", "-/", "-i", tmp_path / "one.fat"], capture_output=True, check=True, text=True,
                          env={**os.environ, "TZ": "UTC"}).stdout  # fmt: skip
    assert set(re.findall(r"\d{4}-\d\d-\d\d", said)) == {"2023-11-14"}
