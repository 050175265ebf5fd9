"""Flash: what is written, in which order, and every way in which it must fail."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factory.bench import Image, Medium
from factory.drivers.media import FileMedium, FileStorage
from factory.errors import StationFault, UnitFault
from factory.flash import flash
from factory.record import NoWatcher, Step
from image import bmap
from image.bmap import BLOCK_SIZE

SIZE = 3 * 2**20


def make_image(folder: Path, pieces: dict[int, bytes], size: int = SIZE) -> Image:
    """A sparse image with `pieces` at their offsets."""
    path = folder / "picket.img"
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
    block_map = folder / "picket.bmap"
    block_map.write_text(bmap.write(bmap.create(path)))
    return Image("picket", "1", "0" * 64, size, path, block_map)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make_image(tmp_path, {0: os.urandom(9000), 2**20: os.urandom(300_000), 2 * 2**20: os.urandom(5)})


def step() -> Step:
    return Step("flash", NoWatcher())


class Recorder(FileMedium):
    """A medium that remembers what was asked of it, and may do worse."""

    def __init__(self, path: Path, descriptor: int) -> None:
        super().__init__(path, descriptor)
        self.asked: list[tuple[str, int]] = []
        self.after_flush: Callable[[], None] = lambda: None

    def discard(self) -> None:
        self.asked.append(("discard", 0))
        super().discard()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.asked.append(("write", offset))
        super().write(offset, data)

    def flush(self) -> None:
        self.asked.append(("flush", 0))
        super().flush()
        self.after_flush()

    def read(self, offset: int, length: int) -> bytes:
        self.asked.append(("read", offset))
        return super().read(offset, length)


class Slot:
    """A slot with such a medium in it."""

    def __init__(self, path: Path, size: int = 2 * SIZE, fill: bytes = b"\xa5") -> None:
        path.write_bytes(fill * size)
        self.path = path
        self.medium: Recorder | None = None
        self.break_after_flush = False

    @contextmanager
    def attach(self) -> Iterator[Medium]:
        descriptor = os.open(self.path, os.O_RDWR)
        self.medium = Recorder(self.path, descriptor)
        if self.break_after_flush:
            self.medium.after_flush = self._flip_once
        try:
            yield self.medium
        finally:
            os.close(descriptor)

    def _flip_once(self) -> None:
        assert self.medium is not None
        if ("write", 0) not in self.medium.asked:
            return
        with self.path.open("r+b") as file:
            file.seek(2**20 + 12345)
            byte = file.read(1)[0]
            file.seek(2**20 + 12345)
            file.write(bytes([byte ^ 0x10]))


def test_the_medium_holds_the_image_and_nothing_of_its_last_life(tmp_path: Path, image: Image) -> None:
    slot = Slot(tmp_path / "medium")

    flash(slot, image, step())

    written = slot.path.read_bytes()
    assert written[:SIZE] == image.path.read_bytes()
    assert not any(written[SIZE:])


def test_block_0_is_written_last_and_read_back_comes_after_the_flush(tmp_path: Path, image: Image) -> None:
    slot = Slot(tmp_path / "medium")

    flash(slot, image, step())

    assert slot.medium is not None
    asked = slot.medium.asked
    kinds = [what for what, _ in asked]
    assert asked[0] == ("discard", 0)
    assert asked.count(("write", 0)) == 1
    block_0 = asked.index(("write", 0))
    assert "write" not in kinds[block_0 + 1 :]
    assert (kinds[block_0 - 1], kinds[block_0 + 1]) == ("flush", "flush")
    assert kinds.index("read") == block_0 + 2


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pieces=st.dictionaries(st.integers(0, 700), st.binary(min_size=1, max_size=3 * BLOCK_SIZE), max_size=6))
def test_any_layout_of_holes_arrives_whole(tmp_path: Path, pieces: dict[int, bytes]) -> None:
    image = make_image(tmp_path, {0: b"mbr", **{BLOCK_SIZE * block: data for block, data in pieces.items()}})
    slot = Slot(tmp_path / "medium", size=4 * 2**20)

    flash(slot, image, step())

    assert slot.path.read_bytes()[: image.size] == image.path.read_bytes()


def test_a_medium_that_is_too_small_is_refused_untouched(tmp_path: Path, image: Image) -> None:
    slot = Slot(tmp_path / "medium", size=SIZE - 4096)

    with pytest.raises(UnitFault, match="too small"):
        flash(slot, image, step())

    assert set(slot.path.read_bytes()) == {0xA5}


def test_one_flipped_bit_fails_the_unit(tmp_path: Path, image: Image) -> None:
    slot = Slot(tmp_path / "medium")
    slot.break_after_flush = True

    with pytest.raises(UnitFault, match="read back differently"):
        flash(slot, image, step())


def test_a_damaged_image_stops_the_line_and_never_boots(tmp_path: Path, image: Image) -> None:
    with image.path.open("r+b") as file:
        file.seek(2**20 + 77)
        file.write(b"X")
    slot = Slot(tmp_path / "medium")

    with pytest.raises(StationFault, match="is damaged"):
        flash(slot, image, step())

    assert not any(slot.path.read_bytes()[:BLOCK_SIZE])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("MappedBlocksCount> ", "MappedBlocksCount> 1", 1),
        lambda text: text[: len(text) // 2],
        lambda _text: "",
        lambda _text: "<bmap/>",
    ],
)
def test_a_changed_block_map_stops_the_line(tmp_path: Path, image: Image, change: Callable[[str], str]) -> None:
    image.block_map.write_text(change(image.block_map.read_text()))
    slot = Slot(tmp_path / "medium")

    with pytest.raises(StationFault, match="block map"):
        flash(slot, image, step())

    assert set(slot.path.read_bytes()) == {0xA5}


def test_a_block_map_of_another_image_stops_the_line(tmp_path: Path, image: Image) -> None:
    (tmp_path / "other").mkdir()
    other = make_image(tmp_path / "other", {0: b"x"}, size=2**20)
    image.block_map.write_text(other.block_map.read_text())

    with pytest.raises(StationFault, match="not of image"):
        flash(Slot(tmp_path / "medium"), image, step())


def test_a_missing_image_stops_the_line(tmp_path: Path, image: Image) -> None:
    image.path.unlink()

    with pytest.raises(StationFault, match="cannot be read"):
        flash(Slot(tmp_path / "medium"), image, step())


def test_a_medium_has_one_writer(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path / "medium", SIZE)

    with storage.attach(), pytest.raises(StationFault, match="in use"), storage.attach():
        pass


def test_the_step_says_what_it_wrote(tmp_path: Path, image: Image) -> None:
    done = step()

    flash(Slot(tmp_path / "medium"), image, done)

    assert done.notes["mapped_bytes"] == bmap.create(image.path).mapped_bytes
    assert done.notes["image_sha256"] == image.sha256
