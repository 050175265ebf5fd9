"""The block device driver on loop devices: the kernel's own, with a file in the place of the card.

A loop device on an ordinary file makes zeros itself, as a good card in a native slot does; on ramfs it cannot, as most
USB readers cannot. Both are run.
"""

import errno
import fcntl
import os
import random
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from factory.bench import Image, Medium
from factory.drivers import blockdev
from factory.drivers.blockdev import BlockMedium, BlockStorage
from factory.drivers.rpi import open_bench
from factory.errors import LinkFault, StationFault, UnitFault, UserMistake
from factory.flash import flash
from factory.record import NoWatcher, Step
from image import bmap

MIB = 2**20
DIRT = b"\xa5"

needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("losetup") is None or not Path("/dev/loop-control").exists(),
    reason="loop devices need root and losetup",
)


def command(*words: str | Path) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Card:
    """A loop device and the file behind it."""

    device: str
    file: Path

    def storage(self) -> BlockStorage:
        return BlockStorage(self.device, named_again=True, appear_seconds=0)

    def content(self) -> bytes:
        return self.file.read_bytes()

    def pull(self) -> None:
        """As a USB reader shows it: the device stays, and has no capacity any more."""
        os.truncate(self.file, 0)
        command("losetup", "-c", self.device)

    def flip(self, offset: int, path: str | Path) -> None:
        with Path(path).open("r+b", buffering=0) as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
            os.fsync(file.fileno())


@contextmanager
def attached(file: Path, *options: str) -> Iterator[Card]:
    device = command("losetup", "--find", "--show", *options, file)
    try:
        yield Card(device, file)
    finally:
        command("losetup", "--detach", device)


@contextmanager
def mounted(place: Path, *options: str | Path) -> Iterator[Path]:
    place.mkdir()
    command("mount", *options, place)
    try:
        yield place
    finally:
        command("umount", place)


@contextmanager
def partitions(device: str) -> Iterator[None]:
    command("partx", "--add", device)
    try:
        yield
    finally:
        command("partx", "--delete", device)


def dirty(file: Path, size: int) -> Path:
    file.write_bytes(DIRT * size)
    return file


@pytest.fixture(params=["makes zeros itself", "cannot make zeros"])
def card(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Card]:
    """A card of 16 MiB that is full of a last life."""
    if request.param == "makes zeros itself":
        with attached(dirty(tmp_path / "card", 16 * MIB)) as made:
            yield made
    else:
        with (
            mounted(tmp_path / "ramfs", "-t", "ramfs", "none") as place,
            attached(dirty(place / "card", 16 * MIB)) as made,
        ):
            assert (
                not (Path("/sys/class/block") / Path(made.device).name / "queue")
                .joinpath("write_zeroes_max_bytes")
                .read_text()
                .strip("0\n")
            )
            yield made


@pytest.fixture
def plain_card(tmp_path: Path) -> Iterator[Card]:
    with attached(dirty(tmp_path / "card", 16 * MIB)) as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """10 MiB and one sector: data at both ends and in the middle, holes between."""
    path, size = tmp_path / "picket.img", 10 * MIB + 512
    data = random.Random(7)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in ((0, 5 * MIB), (7 * MIB, 8192), (10 * MIB, 512)):
            file.seek(offset)
            file.write(data.randbytes(length))
    block_map = path.with_suffix(".bmap")
    block_map.write_text(bmap.write(bmap.create(path)))
    return Image("picket", "1", "0" * 64, size, path, block_map)


def a_step() -> Step:
    return Step("flash", NoWatcher())


class Hooked:
    """A storage that lets a test reach in, when the whole medium is flushed or after some writes."""

    def __init__(self, inner: BlockStorage, *, flushed: Callable[[], None] | None = None, write: int = -1) -> None:
        self._inner = inner
        self._flushed = flushed
        self._write = write
        self.hook: Callable[[], None] = lambda: None

    @contextmanager
    def attach(self) -> Iterator[Medium]:
        with self._inner.attach() as medium:
            flush, write, count = medium.flush, medium.write, iter(range(1_000_000))

            whole = False

            def hooked_flush() -> None:
                flush()
                if self._flushed is not None and whole:
                    self._flushed()

            def hooked_write(offset: int, data: bytes | memoryview) -> None:
                nonlocal whole
                whole = offset == 0  # block 0 comes last
                if next(count) == self._write:
                    self.hook()
                write(offset, data)

            medium.flush = hooked_flush  # type: ignore[method-assign]
            medium.write = hooked_write  # type: ignore[method-assign]
            yield medium


# --- flash, as the line does it -----------------------------------------------------------------------------------


@needs_loop
def test_flash_leaves_the_image_and_zeros_in_every_hole_of_a_used_card(card: Card, image: Image) -> None:
    step = a_step()

    flash(card.storage(), image, step)

    assert image.path.read_bytes() + bytes(16 * MIB - image.size) == card.content()
    assert f"{card.device} (0.0 GB)" == step.notes["medium"]


class Carrier:
    """An operator who obeys."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, what: str) -> None:
        self.asked.append(what)

    def tell(self, what: str) -> None:
        """Nothing to do at once."""


@needs_loop
def test_a_bench_opened_from_its_options_flashes_the_card_that_the_operator_brings(
    plain_card: Card, image: Image
) -> None:
    operator, (master, slave) = Carrier(), os.openpty()
    options = {
        "storage": f"block:{plain_card.device}",
        "storage_again": f"block:{plain_card.device}",
        "console": f"serial:{os.ttyname(slave)}",
        "shell": "ssh:",
        "power": "operator:",
        "stimulus": "operator:",
    }

    with open_bench(Path("key"), options, operator) as bench:
        flash(bench.storage, image, a_step())
    os.close(master)
    os.close(slave)

    assert image.path.read_bytes() == plain_card.content()[: image.size]
    assert [f"Switch the board's power off, then put the unit's card into the reader {plain_card.device}."] == (
        operator.asked
    )


@needs_loop
def test_flashing_twice_is_flashing_once(plain_card: Card, image: Image) -> None:
    flash(plain_card.storage(), image, a_step())
    flash(plain_card.storage(), image, a_step())

    assert image.path.read_bytes() == plain_card.content()[: image.size]


@needs_loop
@pytest.mark.parametrize("offset", [0, 4096, 5 * MIB - 1, 7 * MIB + 5000, 10 * MIB + 511])
def test_one_flipped_bit_after_the_write_fails_the_unit_in_flash(plain_card: Card, image: Image, offset: int) -> None:
    storage = Hooked(plain_card.storage(), flushed=lambda: plain_card.flip(offset, plain_card.device))

    with pytest.raises(UnitFault, match="does not hold what was written"):
        flash(storage, image, a_step())


@needs_loop
def test_the_read_back_sees_the_medium_and_not_the_page_cache(plain_card: Card, image: Image) -> None:
    cached: list[bytes] = []

    def corrupt() -> None:
        with Path(plain_card.device).open("rb") as other:  # fill the device's page cache with what was written
            other.read(5 * MIB)
        plain_card.flip(5000, plain_card.file)
        with Path(plain_card.device).open("rb") as other:
            other.seek(5000)
            cached.append(other.read(1))

    with pytest.raises(UnitFault, match=r"blocks 0\D+1279 read back differently"):
        flash(Hooked(plain_card.storage(), flushed=corrupt), image, a_step())

    assert [image.path.read_bytes()[5000:5001]] == cached  # who reads through the cache would have passed it


@needs_loop
def test_a_medium_that_is_too_small_is_left_as_it_was(tmp_path: Path, image: Image) -> None:
    with attached(dirty(tmp_path / "small", 8 * MIB)) as small:
        with pytest.raises(UnitFault, match="too small"):
            flash(small.storage(), image, a_step())

        assert DIRT * 8 * MIB == small.content()


@needs_loop
def test_a_card_pulled_in_the_middle_is_the_links_fault(plain_card: Card, image: Image) -> None:
    storage = Hooked(plain_card.storage(), write=1)
    storage.hook = plain_card.pull

    with pytest.raises(LinkFault, match="went away"):
        flash(storage, image, a_step())


@needs_loop
def test_a_medium_that_refuses_writes_is_the_units_fault(tmp_path: Path, image: Image) -> None:
    with mounted(tmp_path / "tmpfs", "-t", "tmpfs", "-o", "size=6m", "none") as place:
        (place / "card").touch()
        os.truncate(place / "card", 16 * MIB)
        with attached(place / "card") as bad, pytest.raises(UnitFault, match="is bad"):
            flash(bad.storage(), image, a_step())


@needs_loop
def test_a_medium_that_cannot_be_read_is_the_units_fault(plain_card: Card) -> None:
    with plain_card.storage().attach() as medium:
        os.truncate(plain_card.file, 8 * MIB)

        with pytest.raises(UnitFault, match="byte 12,582,912 cannot be read"):
            medium.read(12 * MIB, 4096)


# --- the medium ---------------------------------------------------------------------------------------------------


@needs_loop
def test_discard_makes_every_byte_zero(card: Card) -> None:
    with card.storage().attach() as medium:
        medium.discard()

    assert bytes(16 * MIB) == card.content()


@needs_loop
def test_a_medium_that_keeps_old_data_under_zeros_fails_the_unit(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockMedium, "_forget", lambda self: None)
    monkeypatch.setattr(BlockMedium, "_zero", lambda self, offset, length: None)

    with card.storage().attach() as medium, pytest.raises(UnitFault, match="old data stands at byte 0"):
        medium.discard()


@needs_loop
def test_a_promise_of_zeros_that_is_broken_is_seen_and_mended(
    plain_card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = BlockMedium._zero, []

    def lies_once(self: BlockMedium, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) > 1:
            honest(self, offset, length)

    monkeypatch.setattr(BlockMedium, "_forget", lambda self: None)
    monkeypatch.setattr(BlockMedium, "_zero", lies_once)

    with plain_card.storage().attach() as medium:
        medium.discard()

    assert bytes(16 * MIB) == plain_card.content()


@needs_loop
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (511, 2), (100, 5 * MIB), (4 * MIB - 3, 7), (16 * MIB - 1, 1), (512, 0), (0, 9 * MIB)],
)
def test_any_offset_and_length_is_written_and_read_whole(plain_card: Card, offset: int, length: int) -> None:
    data = random.Random(length).randbytes(length)

    with plain_card.storage().attach() as medium:
        medium.write(offset, memoryview(data))
        medium.flush()

        assert data == medium.read(offset, length)
    whole = bytearray(DIRT * 16 * MIB)
    whole[offset : offset + length] = data
    assert whole == plain_card.content()


@needs_loop
def test_a_medium_with_large_sectors_takes_any_offset_too(tmp_path: Path) -> None:
    with attached(dirty(tmp_path / "card", MIB), "--sector-size", "4096") as card:
        with card.storage().attach() as medium:
            medium.write(4000, b"across two sectors" * 20)
            medium.flush()

            assert b"across two sectors" * 20 == medium.read(4000, 360)
        assert DIRT * 4000 + b"across two sectors" * 20 + DIRT * 100 == card.content()[:4460]


@needs_loop
def test_nothing_is_moved_past_the_end(plain_card: Card) -> None:
    with plain_card.storage().attach() as medium:
        with pytest.raises(StationFault, match="past its end"):
            medium.write(16 * MIB - 1, b"ab")
        with pytest.raises(StationFault, match="past its end"):
            medium.read(16 * MIB - 1, 2)

    assert DIRT * 16 * MIB == plain_card.content()


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(storage: BlockStorage, match: str) -> UserMistake:
    """Refused by the check that opens nothing, and by attach, with advice."""
    with pytest.raises(UserMistake, match=match) as one:
        storage.check()
    with pytest.raises(UserMistake, match=match), storage.attach():
        pass
    assert one.value.advice
    return one.value


@needs_loop
def test_a_device_that_is_not_removable_is_refused_unless_named_twice(plain_card: Card) -> None:
    mistake = refused(BlockStorage(plain_card.device), "not removable")

    assert f'storage_again = "block:{plain_card.device}"' in mistake.advice
    with BlockStorage(plain_card.device, named_again=True).attach() as medium:
        assert medium.size == 16 * MIB


@needs_loop
@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="needs mkfs.ext4")
def test_a_mounted_device_is_refused_even_when_named_twice(plain_card: Card, tmp_path: Path) -> None:
    command("mkfs.ext4", "-q", "-F", plain_card.device)
    before = plain_card.content()

    with mounted(tmp_path / "a place", plain_card.device) as place:
        refused(plain_card.storage(), f"mounted at {place}")

    assert before[:1024] == plain_card.content()[:1024]


@needs_loop
@pytest.mark.skipif(shutil.which("partx") is None or shutil.which("mkfs.ext4") is None, reason="needs partx, mkfs.ext4")
def test_a_disk_with_a_mounted_partition_is_refused_and_so_is_a_partition(tmp_path: Path) -> None:
    # Told by hand, for not every kernel reads partition tables of loop devices by itself: MBR entry 0 is type 0x83 of
    # 8 MiB behind the first.
    entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (16384).to_bytes(4, "little")
    (tmp_path / "disk").write_bytes((bytes(446) + entry + bytes(48) + b"\x55\xaa").ljust(16 * MIB, b"\0"))
    with attached(tmp_path / "disk") as disk, partitions(disk.device):
        part = f"{disk.device}p1"
        command("mkfs.ext4", "-q", "-F", part)
        refused(BlockStorage(part, named_again=True), "is a partition")
        with mounted(tmp_path / "part", part):
            refused(disk.storage(), "mounted at")
        disk.storage().check()


@needs_loop
@pytest.mark.skipif(shutil.which("mkswap") is None, reason="needs mkswap")
def test_a_swap_device_is_refused_as_the_system_disk(plain_card: Card) -> None:
    command("mkswap", plain_card.device)
    if subprocess.run(["swapon", plain_card.device], check=False, capture_output=True).returncode:
        pytest.skip("this kernel does not swap to a loop device")
    try:
        refused(plain_card.storage(), "system disk: it holds swap")
    finally:
        command("swapoff", plain_card.device)


def root_disk() -> str:
    """The whole disk that / is on."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, source = line.split(), line.partition(" - ")[2].split()[1]
        if fields[4] == "/" and Path(source).exists() and stat.S_ISBLK(Path(source).stat().st_mode):
            sysfs = Path("/sys/class/block", Path(source).resolve().name).resolve()
            return f"/dev/{(sysfs.parent if (sysfs / 'partition').exists() else sysfs).name}"
    pytest.skip("/ is on no block device that is seen from here")


def test_the_system_disk_is_refused_without_being_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, opened = root_disk(), []
    monkeypatch.setattr(os, "open", lambda *arguments, **options: opened.append(arguments))

    refused(BlockStorage(disk, named_again=True, appear_seconds=0), "this station's system disk: it holds /")

    assert not opened


@needs_loop
def test_a_read_only_device_is_refused(tmp_path: Path) -> None:
    with attached(dirty(tmp_path / "card", MIB), "--read-only") as card:
        refused(card.storage(), "read-only")


@needs_loop
def test_a_device_that_another_program_holds_is_refused(plain_card: Card) -> None:
    holder = os.open(plain_card.device, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(UserMistake, match="in use by another program"), plain_card.storage().attach():
            pass
    finally:
        os.close(holder)


@needs_loop
def test_while_a_medium_is_attached_nobody_else_gets_it(plain_card: Card) -> None:
    with plain_card.storage().attach():
        with pytest.raises(UserMistake, match="in use"), plain_card.storage().attach():
            pass
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            os.open(plain_card.device, os.O_RDONLY | os.O_EXCL)


@needs_loop
def test_a_device_that_somebody_keeps_locked_is_the_stations_fault(plain_card: Card) -> None:
    with Path(plain_card.device).open("rb") as prober:
        fcntl.flock(prober, fcntl.LOCK_SH)

        with pytest.raises(StationFault, match="locked by another program"), plain_card.storage().attach():
            pass


def test_a_file_is_not_a_block_device(tmp_path: Path) -> None:
    file = dirty(tmp_path / "file", 16)

    refused(BlockStorage(str(file), named_again=True), "is not a block device")

    assert DIRT * 16 == file.read_bytes()


def test_a_reader_that_is_not_there_is_the_stations_fault_and_no_mistake(tmp_path: Path) -> None:
    storage = BlockStorage(str(tmp_path / "no-such-reader"), appear_seconds=0)

    storage.check()
    with pytest.raises(StationFault, match="there is no"), storage.attach():
        pass


@needs_loop
def test_an_empty_reader_is_the_stations_fault(plain_card: Card) -> None:
    plain_card.pull()

    with pytest.raises(StationFault, match="there is no card in"), plain_card.storage().attach():
        pass


@needs_loop
def test_a_card_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "by-path"
    with attached(dirty(tmp_path / "card", MIB)) as card:
        monkeypatch.setattr(time, "sleep", lambda seconds: link.symlink_to(card.device))

        with BlockStorage(str(link), named_again=True).attach() as medium:
            assert medium.size == MIB


# --- what sysfs says ----------------------------------------------------------------------------------------------


def sysfs(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_a_disk_under_the_volume_that_holds_the_root_is_the_system_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sda = sysfs(tmp_path / "sda", dev="8:0", sda2__partition="2", sda2__dev="8:2", removable="1")
    crypt, root = sysfs(tmp_path / "dm-0", dev="253:0"), sysfs(tmp_path / "dm-1", dev="253:1")
    for below, above in ((sda / "sda2", crypt), (crypt, root)):
        (below / "holders").mkdir()
        (below / "holders" / above.name).symlink_to(above)
    disk = blockdev._Disk("/dev/sda", 0, sda)

    monkeypatch.setattr(blockdev, "_uses", lambda: {"253:1": {"/"}})
    with pytest.raises(UserMistake, match="system disk: it holds /"):
        blockdev._refuse_used(disk)

    monkeypatch.setattr(blockdev, "_uses", dict)
    with pytest.raises(UserMistake, match="built on"):
        blockdev._refuse_used(disk)


def test_what_is_made_to_be_taken_out_is_removable(tmp_path: Path) -> None:
    usb = tmp_path / "usb1"
    usb.mkdir()
    (tmp_path / "bus" / "usb").mkdir(parents=True)
    (usb / "subsystem").symlink_to(tmp_path / "bus" / "usb")
    removable = {
        "a card reader": sysfs(tmp_path / "sdb", removable="1"),
        "a USB disk": sysfs(usb / "host0" / "sdc", removable="0"),
        "an SD card in a slot": sysfs(tmp_path / "mmcblk0", removable="0", device__type="SD"),
        "soldered eMMC": sysfs(tmp_path / "mmcblk1", removable="0", device__type="MMC"),
        "a SATA disk": sysfs(tmp_path / "sda", removable="0"),
    }

    assert {"a card reader", "a USB disk", "an SD card in a slot"} == {
        name for name, place in removable.items() if blockdev._Disk("", 0, place).is_removable
    }


def test_a_medium_is_named_as_an_operator_would(tmp_path: Path) -> None:
    place = sysfs(tmp_path / "sdb", size="62333952", device__vendor="Generic ", device__model="STORAGE DEVICE  ")

    assert blockdev._Disk("/dev/sdb", 0, place).name == "/dev/sdb (Generic STORAGE DEVICE, 31.9 GB)"


def test_only_a_path_by_port_stays_put() -> None:
    assert blockdev.moves("/dev/sdb")
    assert blockdev.moves("/dev/disk/by-id/usb-Generic")
    assert not blockdev.moves("/dev/disk/by-path/pci-0000:00:14.0-usb-0:2:1.0-scsi-0:0:0:0")
