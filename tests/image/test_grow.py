"""The partition table as the unit changes it at its first boot: image/files/usr/lib/picket/grow."""

import importlib.util
import shutil
import subprocess
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image import disk
from image.disk import ALIGNMENT, EXTENDED_LBA, FAT32_LBA, LINUX, MEBIBYTE, SECTOR
from image.layout import AUTOBOOT, OS_PREFIX, Layout

PROGRAM = Path("image/files/usr/lib/picket/grow")


def load() -> ModuleType:
    loader = SourceFileLoader("picket_grow", str(PROGRAM))
    spec = importlib.util.spec_from_loader("picket_grow", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


GROW = load()
LAYOUT, PREFIX = (
    Layout.of(0x1234ABCD, 96 * MEBIBYTE, 320 * MEBIBYTE, 64 * MEBIBYTE, 900, control)
    for control in (AUTOBOOT, OS_PREFIX)
)
DATA = LAYOUT.numbers["data"]
each_layout = pytest.mark.parametrize("layout", [LAYOUT, PREFIX], ids=lambda layout: layout.control)


def plan(layout: Layout, records: dict[int, bytes], size: int) -> list[tuple[int, bytes]]:
    number = layout.numbers["data"]
    writes, start, sectors = GROW.plan(
        lambda sector: records.get(sector * SECTOR, bytes(SECTOR)), size // SECTOR, number
    )
    assert start * SECTOR == layout.part("data").start
    assert start + sectors <= size // SECTOR
    return list(writes)


def grown(size: int, cuts: int | None = None, layout: Layout = LAYOUT) -> dict[int, bytes]:
    """The boot records after growing to a medium's size, or after a power cut behind some of the writes."""
    records = disk.records(layout.signature, layout.slices)
    for sector, record in plan(layout, records, size)[:cuts]:
        records[sector * SECTOR] = record
    return records


def table(records: dict[int, bytes]) -> list[disk.Slice]:
    return disk.read_table(lambda place: records.get(place, bytes(SECTOR)))[1]


@each_layout
@given(size=st.integers(2 * 2**30, 2**40))
def test_the_data_partition_gets_all_that_the_medium_has(layout: Layout, size: int) -> None:
    data = layout.numbers["data"]
    found = {part.number: part for part in table(grown(size, layout=layout))}

    assert size - ALIGNMENT < found[data].end <= size
    assert found[data].start == layout.part("data").start
    assert [part for number, part in found.items() if number not in {4, data}] == [
        part for part in layout.slices if part.number not in {4, data}
    ]


@each_layout
@pytest.mark.parametrize("cuts", range(4))
def test_a_power_cut_behind_any_sector_leaves_a_table_to_go_on_from(layout: Layout, cuts: int) -> None:
    size = 8 * 2**30
    records = grown(size, cuts, layout)
    found = {part.number: part for part in table(records)}
    for sector, record in plan(layout, records, size):
        records[sector * SECTOR] = record

    assert {number: part.start for number, part in found.items()} == {part.number: part.start for part in layout.slices}
    assert records == grown(size, layout=layout)


@each_layout
def test_a_medium_that_is_full_is_left_alone(layout: Layout) -> None:
    assert plan(layout, disk.records(layout.signature, layout.slices), layout.slices[-1].end) == []


def test_a_table_that_is_not_the_layouts_is_left_alone_and_named() -> None:
    records = disk.records(1, disk.lay_out([(FAT32_LBA, MEBIBYTE), (LINUX, MEBIBYTE)]))

    for number, complaint in ((DATA, "no extended partition"), (1, "not the last one"), (3, "not the last one")):
        with pytest.raises(SystemExit, match=complaint):
            GROW.plan(lambda sector: records[sector * SECTOR], 2**22, number)


@pytest.mark.skipif(shutil.which("sfdisk") is None, reason="sfdisk is not installed (package fdisk)")
def test_sfdisk_finds_nothing_wrong_with_the_grown_table(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    disk.assemble(image, LAYOUT.signature, LAYOUT.slices, {})
    with image.open("r+b") as file:
        file.truncate(4 * 2**30)
        for place, record in grown(4 * 2**30).items():
            file.seek(place)
            file.write(record)

    done = subprocess.run(["sfdisk", "--verify", image], check=False, capture_output=True, text=True)

    assert "No errors detected" in done.stdout + done.stderr
    assert EXTENDED_LBA in {part.type for part in table(grown(4 * 2**30))}
