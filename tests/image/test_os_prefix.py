"""Control "os-prefix" as the build joins it: what the firmware of the boards starts, and updates of the other slot."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from image import build, bundle, recipe
from image.errors import ImageError
from image.files.usr.lib.picket.slots.faults import Fault
from image.firmware import PI_3, VIRT, ZERO_2_W, Board, BytesMedium, Choice, FileMedium, NoBootError, Reset, look
from image.layout import Layout
from tests.image.built import Built, Unit, build_tiny
from tests.image.fat_damage import Fat32
from tests.image.firmware.cards import needs_mtools
from tests.image.slots.world import Keys

pytestmark = needs_mtools

RECIPE = recipe.load(Path(recipe.__file__).parent / "recipes/picket-zero.toml")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def old(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_tiny(RECIPE, tmp_path_factory.mktemp("old") / "image", keys)


@pytest.fixture(scope="module")
def new(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_tiny(replace(RECIPE, version="0.2.0"), tmp_path_factory.mktemp("new") / "image", keys)


@pytest.fixture
def unit(old: Built, keys: Keys, tmp_path: Path) -> Unit:
    return Unit(old, tmp_path, keys)


def started(medium: Path, board: Board = ZERO_2_W, *, tryboot: bool = False) -> Choice:
    with FileMedium(medium) as card:
        return look(card, board, Reset(tryboot=tryboot))


def starts(medium: Path, *, tryboot: bool = False) -> str:
    return started(medium, tryboot=tryboot).command_line


def line(built: Built) -> str:
    return built.files["cmdline.txt"].decode().strip()


@pytest.mark.parametrize("board", [PI_3, ZERO_2_W, VIRT], ids=lambda board: board.name)
def test_a_new_image_starts_slot_a(old: Built, board: Board) -> None:
    choice = started(old.image, board)

    assert (choice.os_prefix, choice.kernel, choice.initramfs) == ("a/", "a/vmlinuz", ("a/initrd.img",))
    assert choice.command_line == line(old)
    assert choice.notes == ()


def test_the_same_trees_give_the_same_bits(old: Built, keys: Keys, tmp_path: Path) -> None:
    again = build_tiny(RECIPE, tmp_path / "again", keys)

    assert again.image.read_bytes() == old.image.read_bytes()
    assert again.bundle.read_bytes() == old.bundle.read_bytes()


def test_nothing_starts_from_the_slot_that_is_empty(old: Built) -> None:
    with pytest.raises(NoBootError, match="has no kernel vmlinuz"):
        started(old.image, tryboot=True)


def test_a_bundle_goes_to_slot_b_is_tried_once_and_kept(unit: Unit, old: Built, new: Built, keys: Keys) -> None:
    assert bundle.verify(new.bundle, keys.signers)[1].control == "os-prefix"
    assert unit.install("a", new) == {"slot": "b", "version": "0.2.0"}
    assert starts(unit.medium) == line(old)

    unit.slots("a").try_other()
    assert unit.flag.armed
    assert starts(unit.medium, tryboot=True) == line(new)
    assert starts(unit.medium) == line(old), "once, and only if it was asked for"

    unit.slots("b", new.recipe).keep()
    assert starts(unit.medium) == line(new)
    unit.slots("b", new.recipe).go_back()
    assert starts(unit.medium) == line(old)


def test_a_slot_that_is_not_kept_is_not_started_again(unit: Unit, old: Built, new: Built) -> None:
    unit.install("a", new)
    unit.slots("a").try_other()

    assert not unit.slots("a").check(), "the next ordinary start ends the trial"
    assert unit.slots("a").status()["trial"] is None
    assert starts(unit.medium) == line(old)


def test_either_slot_takes_the_same_bundle(unit: Unit, new: Built, keys: Keys, tmp_path: Path) -> None:
    third = build_tiny(replace(RECIPE, version="0.3.0"), tmp_path / "third", keys)
    unit.install("a", new)
    unit.slots("a").try_other()
    unit.slots("b", new.recipe).keep()

    assert unit.install("b", third, new.recipe) == {"slot": "a", "version": "0.3.0"}
    assert starts(unit.medium) == line(new)
    unit.slots("b", new.recipe).try_other()
    assert starts(unit.medium, tryboot=True) == line(third)


def test_whatever_sectors_of_an_update_reach_the_medium_slot_a_starts(unit: Unit, old: Built, new: Built) -> None:
    """A FAT's driver writes in no order: each sector that an update changes is on the medium, or is not."""
    before = bytearray(unit.medium.read_bytes())
    unit.install("a", new)
    unit.slots("a").try_other()
    after = unit.medium.read_bytes()
    start, size = unit.stretch("boot")
    changed = [at for at in range(start, start + size, 512) if before[at : at + 512] != after[at : at + 512]]
    draw = random.Random(7)

    assert len(changed) > 1000
    for _ in range(60):
        for at in changed:
            if draw.random() < 0.1:
                before[at : at + 512] = after[at : at + 512]
        choice = look(BytesMedium(before), ZERO_2_W)
        assert choice.command_line == line(old)
        assert {name: choice.files.read(f"a/{name}") for name in old.files} == old.files


def boot_fat(unit: Unit) -> Fat32:
    return Fat32(unit.medium, *unit.stretch("boot"))


@pytest.fixture
def updated(unit: Unit, new: Built, keys: Keys, tmp_path: Path) -> tuple[Unit, Built]:
    """A unit with something in both slots, and what is to be installed next; slot a runs."""
    third = build_tiny(replace(RECIPE, version="0.3.0"), tmp_path / "third", keys)
    unit.install("a", new)
    return unit, third


def test_a_cut_that_left_the_slots_name_on_free_clusters_does_not_end_all_updates(
    updated: tuple[Unit, Built], old: Built
) -> None:
    unit, third = updated
    whole = boot_fat(unit).used()
    fat = boot_fat(unit)
    assert fat.free("B") > 1000
    fat.set_dirty()
    fat.close()

    assert unit.install("a", third)["slot"] == "b"

    unit.slots("a").try_other()
    assert starts(unit.medium, tryboot=True) == line(third)
    assert starts(unit.medium) == line(old)
    assert abs(boot_fat(unit).used() - whole) < 8


def test_clusters_that_a_cut_left_without_a_name_are_free_again_after_the_next_update(
    updated: tuple[Unit, Built], old: Built
) -> None:
    unit, third = updated
    whole, names = boot_fat(unit).used(), boot_fat(unit).names()
    for _ in range(3):
        fat = boot_fat(unit)
        fat.forget("B")
        fat.close()
        unit.install("a", third)

    assert abs(boot_fat(unit).used() - whole) < 8
    assert boot_fat(unit).names() == names, "nothing that fsck.fat found is left over"
    unit.slots("a").try_other()
    assert starts(unit.medium, tryboot=True) == line(third)
    assert starts(unit.medium) == line(old)


def test_a_fat_that_cannot_be_mended_is_named_and_the_slot_does_not_count(updated: tuple[Unit, Built]) -> None:
    unit, third = updated
    start = unit.stretch("boot")[0]
    with unit.medium.open("r+b") as medium:
        medium.seek(start + 11)
        medium.write(bytes(2))  # no size of a sector: fsck.fat gives up, and ends by the 1 of one that mended

    with pytest.raises(Fault, match=r"cannot be mended: .*sector size", check=lambda fault: fault.code == "io"):
        unit.install("a", third)


def test_boot_files_that_two_slots_have_no_room_for_are_refused_by_the_build(tmp_path: Path) -> None:
    places = Layout.of(1, 40 << 20, 4 << 20, 16 << 20, 900, "os-prefix")
    (tmp_path / "boot/a").mkdir(parents=True)
    (tmp_path / "boot/a/vmlinuz").write_bytes(os.urandom(41 << 20))

    with pytest.raises(ImageError, match=r"disk\.boot_mebibytes"):
        build.make_partitions(tmp_path, places, tmp_path / "boot", RECIPE, None)
