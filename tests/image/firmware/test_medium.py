"""Partition tables: what a Pi finds on a card."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image.firmware import BytesMedium, FileMedium, NoBootError, partitions
from tests.image.firmware.cards import EXTENDED, FAT32, LINUX, disk


def test_primary_and_logical_partitions_are_numbered_as_linux_numbers_them() -> None:
    card = disk(
        [(FAT32, bytes(1024)), (FAT32, bytes(512))], [(LINUX, bytes(1536)), (LINUX, bytes(512)), (LINUX, bytes(512))]
    )

    found = partitions(BytesMedium(card))

    assert list(found) == [1, 2, 5, 6, 7]
    assert [part.fat for part in found.values()] == [True, True, False, False, False]
    assert (found[2].start, found[2].size) == (3 * 512, 512)
    assert (found[5].start, found[5].size) == (5 * 512, 3 * 512)
    assert (found[6].start, found[7].start) == (9 * 512, 11 * 512)


@pytest.mark.parametrize("content", [b"", bytes(511), bytes(512)])
def test_no_table_is_no_boot(content: bytes) -> None:
    with pytest.raises(NoBootError, match="no bootable medium"):
        partitions(BytesMedium(content))


def test_a_gpt_is_refused_by_its_name() -> None:
    with pytest.raises(NoBootError, match="GPT"):
        partitions(BytesMedium(disk([(0xEE, bytes(512))])))


def test_a_chain_of_logical_partitions_that_bites_its_tail_ends() -> None:
    card = disk([], [(LINUX, bytes(512)), (LINUX, bytes(512))])
    second = 3 * 512
    card[second + 446 + 16 : second + 446 + 32] = bytes([0, 0, 0, 0, EXTENDED, 0, 0, 0]) + (2).to_bytes(4, "little") * 2

    assert len(partitions(BytesMedium(card))) == 2


def test_a_damaged_link_ends_the_chain_and_leaves_the_rest() -> None:
    card = disk([(FAT32, bytes(512))], [(LINUX, bytes(512)), (LINUX, bytes(512))])
    second = 4 * 512
    card[second : second + 512] = bytes(512)

    assert list(partitions(BytesMedium(card))) == [1, 5]


def test_no_medium_is_said(tmp_path: Path) -> None:
    with pytest.raises(NoBootError, match="no medium"):
        FileMedium(tmp_path / "none")


@given(st.lists(st.binary(min_size=64, max_size=64), min_size=1, max_size=6))
def test_any_table_gives_partitions_or_no_boot(tables: list[bytes]) -> None:
    card = b"".join(bytes(446) + table + b"\x55\xaa" for table in tables)

    try:
        found = partitions(BytesMedium(card))
    except NoBootError:
        return
    assert all(part.start >= 0 and part.size > 0 for part in found.values())
