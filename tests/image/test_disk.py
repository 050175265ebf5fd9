import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image import disk
from image.disk import ALIGNMENT, FAT32_LBA, LINUX, MEBIBYTE, SECTOR, Slice
from image.errors import ImageError

SIZES = st.lists(st.tuples(st.sampled_from([FAT32_LBA, LINUX]), st.integers(1, 2**34)), min_size=1, max_size=4)


@given(st.integers(1, 2**32 - 1), SIZES)
def test_the_boot_record_says_what_was_laid_out(signature: int, sizes: list[tuple[int, int]]) -> None:
    slices = disk.lay_out(sizes)

    sector = disk.mbr(signature, slices)

    assert len(sector) == SECTOR
    assert disk.read_mbr(sector) == (signature, slices)


@given(SIZES)
def test_partitions_are_aligned_large_enough_and_apart(sizes: list[tuple[int, int]]) -> None:
    end = ALIGNMENT
    for part, (_, size) in zip(disk.lay_out(sizes), sizes, strict=True):
        assert part.start % ALIGNMENT == part.size % ALIGNMENT == 0
        assert part.start >= end
        assert part.size >= size
        end = part.start + part.size


@pytest.mark.parametrize(
    "slices",
    [
        [],
        [Slice(LINUX, MEBIBYTE * index, MEBIBYTE) for index in range(1, 6)],
        [Slice(LINUX, 100, MEBIBYTE)],
        [Slice(LINUX, MEBIBYTE, 0)],
        [Slice(LINUX, MEBIBYTE, 2**42)],
    ],
)
def test_a_table_that_cannot_be_is_refused(slices: list[Slice]) -> None:
    with pytest.raises(ImageError):
        disk.mbr(1, slices)


def test_a_disk_without_a_boot_record_is_named_so() -> None:
    with pytest.raises(ImageError, match="boot record"):
        disk.read_mbr(bytes(SECTOR))


def test_a_partition_has_the_name_that_linux_gives_it() -> None:
    assert disk.partuuid(0x9AFCC527, 2) == "9afcc527-02"


def test_identifiers_follow_from_names() -> None:
    assert disk.identifier("picket", "0.1.0", "root") == disk.identifier("picket", "0.1.0", "root")
    assert disk.identifier("picket", "0.1.0", "root") != disk.identifier("picket", "0.1.1", "root")


@pytest.mark.skipif(shutil.which("sfdisk") is None, reason="sfdisk is not installed (package fdisk)")
def test_sfdisk_reads_the_same_table(tmp_path: Path) -> None:
    slices = disk.lay_out([(FAT32_LBA, 96 * MEBIBYTE), (LINUX, 10 * MEBIBYTE)])
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.write(disk.mbr(0x1234ABCD, slices))
        file.truncate(slices[-1].start + slices[-1].size)

    table = json.loads(subprocess.run(["sfdisk", "--json", image], check=True, capture_output=True).stdout)

    found = table["partitiontable"]
    assert found["id"] == "0x1234abcd"
    assert [(part["start"] * SECTOR, part["size"] * SECTOR, part["type"]) for part in found["partitions"]] == [
        (slices[0].start, slices[0].size, "c"),
        (slices[1].start, slices[1].size, "83"),
    ]


def test_holes_stay_holes_when_the_disk_is_assembled(tmp_path: Path) -> None:
    part = tmp_path / "part"
    with part.open("wb") as file:
        file.seek(8 * MEBIBYTE)
        file.write(b"far away")
        file.truncate(16 * MEBIBYTE)
    slices = disk.lay_out([(LINUX, 16 * MEBIBYTE)])

    disk.assemble(tmp_path / "disk.img", 1, slices, [part])

    with (tmp_path / "disk.img").open("rb") as file:
        file.seek(slices[0].start + 8 * MEBIBYTE)
        assert file.read(8) == b"far away"
    assert (tmp_path / "disk.img").stat().st_blocks * 512 < MEBIBYTE


def test_a_file_system_larger_than_its_partition_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(bytes(2 * SECTOR))

    with pytest.raises(ImageError, match="larger"):
        disk.assemble(tmp_path / "disk.img", 1, [Slice(LINUX, ALIGNMENT, SECTOR)], [part])
