"""An image of tiny trees, put together by the build's own functions, and the unit that has it on its medium."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from image import boot as boot_files
from image import build, bundle, disk, secure_boot
from image.disk import MEBIBYTE
from image.files.usr.lib.picket.slots import control
from image.files.usr.lib.picket.slots.board import Partition, Places, parse_layout
from image.files.usr.lib.picket.slots.slots import Slots, mend
from image.layout import Layout
from image.recipe import Recipe
from tests.image.slots.world import Flag, Keys, MediumBoard

FIRMWARE = ("bootcode.bin", "start.elf", "fixup.dat", "start_cd.elf", "start4.elf", "fixup4.dat", "start4cd.elf")
SIGNATURE = 0x1234ABCD


@dataclass(frozen=True)
class Built:
    """An image, its bundle, and what its slot's boot files are."""

    recipe: Recipe
    places: Layout
    image: Path
    bundle: Path
    files: dict[str, bytes]


def build_tiny(recipe: Recipe, folder: Path, keys: Keys) -> Built:
    """The image of a recipe whose kernel and root are a few bytes."""
    folder.mkdir(parents=True)
    draw = random.Random(f"{recipe.name} {recipe.version}")
    places = Layout.of(SIGNATURE, 64 * MEBIBYTE, 4 * MEBIBYTE, 32 * MEBIBYTE, 900, recipe.boot.control)
    tree = folder / "boot"
    tree.mkdir()
    for name, text in boot_files.config_files(recipe, upstream=True).items():
        (tree / name).write_text(text)
    for name in FIRMWARE:
        (tree / name).write_bytes(name.encode())
    slot = boot_files.slot_directory(tree, recipe.boot.control)
    slot.mkdir(exist_ok=True)
    files = {f"{board}.dtb": draw.randbytes(3000) for board in recipe.boards}
    files |= {"vmlinuz": draw.randbytes(300_000), "initrd.img": draw.randbytes(200_000)}
    (folder / "root.squashfs").write_bytes(draw.randbytes(100_000))
    verity = disk.add_verity(folder / "root.squashfs", b"salt" * 8)
    files["cmdline.txt"] = boot_files.cmdline_txt(SIGNATURE, verity, recipe).encode()
    for name, data in files.items():
        (slot / name).write_bytes(data)
    slot_boot = build.make_partitions(folder, places, tree, recipe, secure_boot.signer_of(recipe))
    disk.assemble(folder / "disk.img", SIGNATURE, places.slices, build.contents(folder, places))
    fields = bundle.Fields(recipe.name, recipe.version, 1, 1, recipe.hardware, recipe.boot.control, f"{SIGNATURE:08x}")
    built = bundle.build(slot_boot, folder / "root.squashfs", fields, keys.sign, folder / "out")
    return Built(recipe, places, folder / "disk.img", built.bundle, files)


class Unit:
    """A unit whose medium is a file, and root's helper on it. The boot FAT is mounted by mtools."""

    def __init__(self, built: Built, folder: Path, keys: Keys) -> None:
        self.built, self.folder = built, folder
        self.medium = folder / "medium"
        shutil.copyfile(built.image, self.medium)
        self.flag = Flag()
        self.places = replace(Places.under(folder), signers=keys.signers)
        for path in (self.places.data, self.places.lock.parent):
            path.mkdir(parents=True)

    def slots(self, running: str, recipe: Recipe | None = None) -> Slots:
        """The helper of the image that runs, in a slot."""
        recipe = recipe or self.built.recipe
        stretches = {name: self.stretch(name) for name in self.built.places.numbers}
        layout_json = self.built.places.description(recipe.name, recipe.version, 1, recipe.hardware)
        board = MediumBoard(parse_layout(layout_json.encode()), running, self.medium, (recipe.hardware[0],), stretches)
        place = control.pick(board, self.places)[0]
        return Slots(self.places, board, place, self.flag, self._mounted, self._mended)

    def install(self, running: str, other: Built, recipe: Recipe | None = None) -> dict[str, object]:
        with other.bundle.open("rb") as file:
            return self.slots(running, recipe).install(file.fileno(), lambda _: None)

    def stretch(self, name: str) -> tuple[int, int]:
        part = self.built.places.part(name)
        return part.start, part.size

    def _mended(self, partition: Partition) -> None:
        """By the real fsck.fat, on a file of its own."""
        alone = self.folder / "alone"
        with self.medium.open("r+b") as file:
            file.seek(partition.start)
            alone.write_bytes(file.read(partition.size))
            mend(Partition(alone, 0, partition.size))
            file.seek(partition.start)
            file.write(alone.read_bytes())

    @contextmanager
    def _mounted(self, partition: Partition) -> Iterator[Path]:
        fat = f"{self.medium}@@{partition.start}"
        top = self.folder / "mounted"
        shutil.rmtree(top, ignore_errors=True)
        top.mkdir()
        _mtools("mcopy", "-s", "-n", "-Q", "-i", fat, "::/", top)
        before, files = _directories(top), {path for path in top.iterdir() if path.is_file()}
        yield top
        for path in sorted(files - set(top.iterdir())):
            _mtools("mdel", "-i", fat, f"::/{path.name}")
        after = _directories(top)
        for name in sorted(name for name in {*before, *after} if before.get(name) != after.get(name)):
            if name in before:
                _mtools("mdeltree", "-i", fat, f"::/{name}")
            if name in after:
                _mtools("mcopy", "-s", "-Q", "-i", fat, top / name, "::/")


def _directories(top: Path) -> dict[str, dict[str, bytes]]:
    """What is in each directory: a driver does not write the one that nobody changes."""
    return {
        path.name: {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for path in top.iterdir()
        if path.is_dir()
    }


def _mtools(*words: str | Path) -> None:
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "1"}
    subprocess.run(words, check=True, capture_output=True, stdin=subprocess.DEVNULL, env=environment)
