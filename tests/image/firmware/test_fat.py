"""The FAT reader against mtools, and against damage."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from image.firmware import BytesMedium, NoBootError
from image.firmware.fat import Fat
from tests.image.firmware.cards import fat, needs_mtools

pytestmark = needs_mtools

#: Without the tilde: mtools 4.0.32 itself writes a damaged name for `0~.+`.
NAMES = st.text("abcdXYZ019_-+. äß", min_size=1, max_size=30).filter(lambda name: name.strip(" .-") == name)
#: (bits, KiB, sectors per cluster): mkfs.vfat wants the size to fit the kind.
SHAPES = [(12, 512, 1), (12, 1024, 4), (16, 8192, 1), (32, 34 * 1024, 1)]


def opened(image: bytes | bytearray) -> Fat:
    return Fat(BytesMedium(image), 0, len(image))


@pytest.mark.parametrize(("bits", "kibibytes", "cluster"), SHAPES)
def test_files_of_every_kind_of_fat_are_read(bits: int, kibibytes: int, cluster: int) -> None:
    large = bytes(range(256)) * 700
    files = {"a.txt": b"one", "EMPTY": b"", "a long name with spaces.text": b"two", "folder/inner/deep.bin": large}

    found = opened(fat(files, kibibytes=kibibytes, bits=bits, cluster=cluster))

    assert {path: found.read(path) for path, entry in found.walk() if not entry.folder} == files
    assert found.read("FOLDER/Inner/DEEP.bin") == large
    assert found.read("folder/inner/deep.bin", 300) == large[:300]
    assert found.read("folder") is None
    assert found.read("a.txt/b") is None
    assert not found.has("none")
    assert found.names("folder") == ["inner"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.tuples(NAMES, NAMES).map("/".join) | NAMES, st.binary(max_size=3000), max_size=8).filter(
        lambda files: (
            len({part.casefold() for name in files for part in name.split("/")})
            == sum(name.count("/") + 1 for name in files)
        )
    )
)
def test_a_random_tree_is_read_as_mtools_wrote_it(files: dict[str, bytes]) -> None:
    found = opened(fat(files))

    assert {path: found.read(path) for path, entry in found.walk() if not entry.folder} == files


def test_mtools_and_this_reader_agree_on_short_names(tmp_path: Path) -> None:
    image = tmp_path / "fat"
    image.write_bytes(fat({"config.txt": b"", "KERNEL8.IMG": b"", "bcm2837-rpi-3-b.dtb": b"x", "mixedCase.Txt": b""}))
    listed = subprocess.run(["mdir", "-b", "-i", image, "::"], check=True, capture_output=True, text=True).stdout

    assert sorted(opened(image.read_bytes()).names()) == sorted(line.removeprefix("::/") for line in listed.split())


def test_many_files_in_one_folder_are_found() -> None:
    files = {f"folder/file number {index}.txt": str(index).encode() for index in range(200)}

    found = opened(fat(files, kibibytes=1024))

    assert found.read("folder/FILE NUMBER 199.TXT") == b"199"


def test_a_deleted_file_is_gone(tmp_path: Path) -> None:
    image = tmp_path / "fat"
    image.write_bytes(fat({"a long name that goes.txt": b"1", "stays.txt": b"2"}))
    subprocess.run(["mdel", "-i", image, "::a long name that goes.txt"], check=True)

    found = opened(image.read_bytes())

    assert found.names() == ["stays.txt"]


def test_a_file_whose_chain_is_cut_is_damaged_and_not_short() -> None:
    image = bytearray(fat({"large.bin": bytes(5000)}))
    image[512 : 512 + 6 * 512] = bytes(6 * 512)  # the table, of which all clusters are free now

    with pytest.raises(NoBootError, match=r"large\.bin"):
        opened(image).read("large.bin")
    with pytest.raises(NoBootError, match=r"large\.bin"):
        opened(image).check("large.bin")


def test_a_chain_that_bites_its_tail_ends() -> None:
    image = bytearray(fat({"folder/a.txt": b"1"}, kibibytes=8192, bits=16))
    found = opened(image)
    entry = found.find("folder")
    assert entry is not None
    image[512 + 2 * entry.cluster : 512 + 2 * entry.cluster + 2] = entry.cluster.to_bytes(2, "little")

    assert opened(image).read("folder/a.txt") == b"1"
    assert opened(image).read("folder/b.txt") is None


@pytest.mark.parametrize("offset", [11, 13, 14, 16, 22, 510])
def test_a_damaged_first_sector_is_no_file_system(offset: int) -> None:
    image = bytearray(fat({"a": b"1"}))
    image[offset : offset + 2] = b"\0\0" if offset != 13 else b"\x03"

    with pytest.raises(NoBootError):
        opened(image)


def test_a_file_system_larger_than_its_partition_is_none() -> None:
    image = fat({"a": b"1"})

    with pytest.raises(NoBootError):
        Fat(BytesMedium(image), 0, len(image) - 512)


def images() -> list[bytes]:
    files = {"config.txt": b"kernel=a\n", "folder/a long name.txt": bytes(3000)}
    return [fat(files, bits=bits, kibibytes=size, cluster=count) for bits, size, count in SHAPES[:3]]


IMAGES = [] if needs_mtools.args[0] else images()


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(IMAGES or [b""]),
    st.lists(st.tuples(st.integers(0, 40000), st.binary(min_size=1, max_size=40)), max_size=6),
)
def test_whatever_is_damaged_reading_ends_with_bytes_or_no_boot(image: bytes, damages: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(image)
    for offset, data in damages:
        damaged[offset : offset + len(data)] = data

    try:
        found = opened(damaged)
        paths = [path for path, _ in zip(found.walk(), range(500), strict=False)]
    except NoBootError:
        return
    for path, _ in paths:
        try:
            found.check(path)
            found.read(path)
        except NoBootError:
            continue


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=512, max_size=4096))
def test_any_bytes_are_a_file_system_or_no_boot(data: bytes) -> None:
    image = data[:510] + b"\x55\xaa" + data[512:]

    try:
        list(opened(image).walk())
    except NoBootError:
        return
