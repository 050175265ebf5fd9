"""The image for Pi 3 and Zero 2 W, whose firmware tells slots apart by directories: built, started, updated."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from factory.drivers.virtual_pi import VirtualPi, raspberry_pi_3
from image import recipe, signing
from image.build import Keys, build_image
from image.disk import read_table
from image.firmware import PI_3, ZERO_2_W, FileMedium, look
from image.ladder import climb
from image.manifest import ImageManifest
from image.progress import Clock
from image.recipe import DiskSettings
from tests.vm.conftest import KEY, await_banner, put_in
from tests.vm.test_bases import CACHE, ROOT

pytestmark = pytest.mark.vm

#: With room for a bundle on the data partition.
RECIPE = replace(recipe.load(ROOT / "image/recipes/picket-zero.toml"), disk=DiskSettings(96, 320, 512))
OLD, NEW = "0.1.0", "0.2.0"
SECONDS = 900.0

#: What the older image does beside its work: it hands a bundle that it finds to root's helper, as the agent does.
UNIT = """
[Unit]
After=picket-slots.socket
ConditionPathExists=/data/update.os.tar

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -I -S /usr/lib/hand-over.py
"""
HAND_OVER = """
import json, os, socket, subprocess

def ask(verb, *handles):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect("/run/picket-slots.sock")
        socket.send_fds(peer, [json.dumps({"verb": verb}).encode() + b"\\n"], handles)
        return peer.makefile().read().splitlines()[-1]

with open("/dev/console", "w") as console, open("/data/update.os.tar", "rb") as bundle:
    for verb, handles in (("install", [bundle.fileno()]), ("try", []), ("status", [])):
        console.write(f"HANDED OVER {verb}: {ask(verb, *handles)}\\n")
        console.flush()
os.rename("/data/update.os.tar", "/data/handed-over")
os.sync()
subprocess.run(["/usr/bin/systemctl", "reboot"], check=True)
"""


def handing_over(folder: Path) -> Path:
    """The files of the older image's recipe."""
    (folder / "etc/systemd/system/multi-user.target.wants").mkdir(parents=True)
    (folder / "usr/lib").mkdir(parents=True)
    (folder / "etc/systemd/system/hand-over.service").write_text(UNIT)
    (folder / "etc/systemd/system/multi-user.target.wants/hand-over.service").symlink_to("../hand-over.service")
    (folder / "usr/lib/hand-over.py").write_text(HAND_OVER)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageManifest]:
    folder = tmp_path_factory.mktemp("zero")
    keys = Keys(KEY, None, f"file:{signing.ensure(folder / 'key')}")
    recipes = (replace(RECIPE, version=OLD, files=(handing_over(folder / "files"),)), replace(RECIPE, version=NEW))
    return {wanted.version: build_image(wanted, folder, CACHE, keys, Clock().stage) for wanted in recipes}


@pytest.fixture
def board(images: dict[str, ImageManifest], tmp_path: Path) -> Iterator[VirtualPi]:
    """A board with the older image, and the newer one's bundle on its data partition."""
    old, new = images[OLD], images[NEW]
    with VirtualPi(tmp_path / "board") as board:
        put_in(old, board)
        assert new.bundle is not None
        (data,) = (part for part in old.partitions if part.label == "picket-data")
        subprocess.run(
            ["/usr/sbin/debugfs", "-w", "-R", f"write {new.directory / new.bundle.file} update.os.tar",
             f"{board.medium}?offset={data.start}"], check=True, capture_output=True,
        )  # fmt: skip
        yield board


def await_image(board: VirtualPi, image: ImageManifest) -> None:
    """The banner of an image, whatever banner comes before it."""
    end = time.monotonic() + SECONDS
    while (said := await_banner(board.console_url()).image) != str(image):
        if time.monotonic() > end:
            log = (board.medium.parent / "console.log").read_text()
            pytest.fail(f"{said} runs, and not {image}; the console said:\n{log[-4000:]}")


def test_the_image_passes_every_static_check(images: dict[str, ImageManifest]) -> None:
    """Without a note: every board of the recipe starts it."""
    assert [said.text for result in climb(images[NEW]) for said in result.findings] == []


def test_the_boards_start_slot_a(images: dict[str, ImageManifest]) -> None:
    for board in (PI_3, ZERO_2_W):
        with FileMedium(images[OLD].image_path) as card:
            choice = look(card, board)
        assert (choice.os_prefix, choice.notes) == ("a/", ())
        root = next(part for part in images[OLD].partitions if part.label == "picket-root")
        assert f"picket.verity={root.uuid}:" in choice.command_line


def test_an_image_is_installed_on_the_unit_tried_once_and_slot_a_comes_back(
    board: VirtualPi, images: dict[str, ImageManifest]
) -> None:
    board.on()
    await_image(board, images[NEW])
    board.off()
    board.on()
    await_image(board, images[OLD])
    board.off()

    said = (board.medium.parent / "console.log").read_text()
    assert 'HANDED OVER install: {"ok": {"slot": "b", "version": "0.2.0"}}' in said
    assert 'HANDED OVER try: {"ok": {"slot": "b", "one_try": "emulator\'s mailbox"}}' in said
    with board.medium.open("rb") as file:

        def sector(place: int) -> bytes:
            file.seek(place)
            return file.read(512)

        data = read_table(sector)[1][-1]
    assert (data.number, data.end) == (4, board.medium_bytes), "grown at the first start"


def test_the_image_boots_on_a_pi_3s_own_peripherals(images: dict[str, ImageManifest], tmp_path: Path) -> None:
    with raspberry_pi_3(images[NEW].image_path, tmp_path) as console:
        banner = await_banner(console, with_address=False)

    assert banner.image == str(images[NEW])
