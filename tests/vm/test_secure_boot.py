"""An image with secure boot on a virtual Pi whose fuses name its key: it starts, and not after a change of one bit."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from factory.drivers.virtual_pi import VirtualPi
from image import recipe, signing
from image.build import Keys, build_image
from image.manifest import ImageManifest
from image.progress import Clock
from image.recipe import BootSettings
from tests.vm.conftest import KEY, await_banner, put_in
from tests.vm.test_bases import CACHE, ROOT

pytestmark = pytest.mark.vm

RECIPE = recipe.load(ROOT / "image/recipes/picket.toml")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> ImageManifest:
    folder = tmp_path_factory.mktemp("secure")
    key = folder / "boot.pem"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    subprocess.run(["openssl", "rsa", "-in", key, "-pubout", "-out", folder / "boot.pub"], check=True)
    wanted = replace(RECIPE, boards=("bcm2711-rpi-4-b",), boot=BootSettings("autoboot", str(key)))
    keys = Keys(KEY, None, f"file:{signing.ensure(folder / 'key')}")
    return build_image(wanted, folder, CACHE, keys, Clock().stage)


@pytest.fixture
def board(image: ImageManifest, tmp_path: Path) -> Iterator[VirtualPi]:
    fused = (image.directory.parent / "boot.pub").read_bytes()
    with VirtualPi(tmp_path / "board", customer_key=fused) as board:
        put_in(image, board)
        yield board


def test_it_starts_as_far_as_its_banner(board: VirtualPi, image: ImageManifest) -> None:
    board.on()

    assert await_banner(board.console_url()).image == str(image)


def test_one_bit_keeps_it_from_starting(board: VirtualPi, image: ImageManifest) -> None:
    (slot, *_) = (part for part in image.partitions if part.label == "PICKETBOOT")
    with board.medium.open("r+b") as file:
        file.seek(slot.start + 20 * 2**20)  # within boot.img
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))

    board.on()

    assert "boot.img is not what its signature is for" in (board.medium.parent / "console.log").read_text()
    assert not board.running
