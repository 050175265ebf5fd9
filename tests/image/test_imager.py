"""The list for Raspberry Pi Imager, held against what its schema asks for and its program does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from image import imager
from image.errors import ImageError, RecipeError
from image.imager import Offer
from image.recipe import load

RECIPE = Path(imager.__file__).parent / "recipes/picket.toml"

OFFER = Offer(
    name="Picket 1.2.3",
    description="The product's image",
    address="https://example.com/images/1.2.3/",
    image="picket.img.zst",
    size=1_000_000_000,
    sha256="ab" * 32,
    download_size=200_000_000,
    epoch=1_735_689_599,
    boards=("bcm2837-rpi-3-b", "bcm2837-rpi-3-b-plus", "bcm2837-rpi-zero-2-w", "bcm2711-rpi-4-b"),
    icon="picket icon.png",
    bmap="picket.bmap",
)

TEXT, SIZE, ADDRESS = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}, {"pattern": "^https://"}

#: What Imager's schema requires of an entry, and what its notes say about the values.
ENTRY = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "description": TEXT,
        "icon": TEXT | ADDRESS,
        "url": TEXT | ADDRESS,
        "bmap_url": TEXT | ADDRESS,
        "extract_size": SIZE,
        "extract_sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "image_download_size": SIZE,
        "release_date": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
        "devices": {"type": "array", "minItems": 1, "items": TEXT},
        "init_format": {"enum": ["", "systemd", "cloudinit", "cloudinit-rpi", "rpi-preseed", "none"]},
        "architecture": {"enum": ["armel", "armhf", "armv8"]},
    },
    "required": [
        "name", "description", "icon", "url", "extract_size", "extract_sha256", "image_download_size", "release_date",
        "devices",
    ],
}  # fmt: skip
DEVICE = {
    "type": "object",
    "properties": {"name": TEXT, "description": TEXT, "tags": {"type": "array", "minItems": 1, "items": TEXT}},
    "required": ["name", "description", "tags"],
}
LIST = {
    "type": "object",
    "properties": {
        "imager": {"type": "object", "properties": {"devices": {"type": "array", "minItems": 1, "items": DEVICE}}},
        "os_list": {"type": "array", "minItems": 1, "items": ENTRY},
    },
    "required": ["imager", "os_list"],
    "additionalProperties": False,
}


def parsed(offer: Offer) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(imager.os_list(offer))
    return value


def test_the_list_has_all_that_the_schema_requires() -> None:
    jsonschema.validate(parsed(OFFER), LIST)


def test_an_entry_says_what_is_downloaded_and_what_comes_out() -> None:
    entry = parsed(OFFER)["os_list"][0]

    assert entry["url"] == "https://example.com/images/1.2.3/picket.img.zst"
    assert entry["bmap_url"] == "https://example.com/images/1.2.3/picket.bmap"
    assert entry["icon"] == "https://example.com/images/1.2.3/picket%20icon.png"
    assert (entry["extract_size"], entry["image_download_size"]) == (OFFER.size, OFFER.download_size)
    assert entry["release_date"] == "2024-12-31"
    assert entry["init_format"] == "none"
    assert entry["devices"] == ["pi3-64bit", "pi4-64bit"]


def test_every_device_that_can_be_chosen_finds_the_image() -> None:
    value = parsed(OFFER)
    offered = set(value["os_list"][0]["devices"])

    assert [device["name"] for device in value["imager"]["devices"]] == [
        "Raspberry Pi 3",
        "Raspberry Pi Zero 2 W",
        "Raspberry Pi 4",
    ]
    assert all(offered & set(device["tags"]) for device in value["imager"]["devices"])


def test_what_is_not_there_is_not_named() -> None:
    entry = parsed(replace(OFFER, bmap=None))["os_list"][0]

    assert "bmap_url" not in entry
    assert "website" not in entry


def test_every_board_of_the_recipe_has_a_tag() -> None:
    recipe = load(RECIPE)

    jsonschema.validate(parsed(replace(OFFER, boards=(*recipe.boards, *recipe.experimental_boards))), LIST)


@pytest.mark.parametrize(
    ("board", "tag"),
    [
        ("bcm2710-rpi-3-b", "pi3-64bit"),  # as Raspberry Pi OS names it
        ("bcm2710-rpi-zero-2-w", "pi3-64bit"),
        ("bcm2711-rpi-cm4", "pi4-64bit"),
        ("bcm2712d0-rpi-5-b", "pi5-64bit"),
        ("bcm2712-rpi-cm5-cm5io", "pi5-64bit"),
    ],
)
def test_the_names_of_both_kernels_are_known(board: str, tag: str) -> None:
    assert parsed(replace(OFFER, boards=(board,)))["os_list"][0]["devices"] == [tag]


@pytest.mark.parametrize(("boards", "said"), [(("bcm2835-rpi-zero",), "bcm2835-rpi-zero"), ((), "no board")])
def test_a_board_that_imager_does_not_know_is_refused_by_name(boards: tuple[str, ...], said: str) -> None:
    with pytest.raises(ImageError, match=said):
        imager.os_list(replace(OFFER, boards=boards))


def test_a_recipe_with_such_a_board_is_refused_before_it_is_built(tmp_path: Path) -> None:
    wanted = replace(load(RECIPE), file=tmp_path / "mine.toml", boards=("bcm2711-rpi-4-b", "bcm2710-rpi-2-b"))

    with pytest.raises(RecipeError, match=r"mine\.toml: boards: Imager has no tag for the board 'bcm2710-rpi-2-b'"):
        imager.check(wanted)


@pytest.mark.parametrize(
    "address",
    [
        "", "images", "/srv/images", "data:image/png;base64,AA", "https:", "https://a/?b=c", "https://a/#b", "https://[x",
        "https://x/a b",
    ],
)  # fmt: skip
def test_an_address_that_imager_would_drop_is_refused(address: str) -> None:
    with pytest.raises(ImageError, match="file URL"):
        imager.os_list(replace(OFFER, address=address))


def test_a_list_for_this_machine_names_its_files(tmp_path: Path) -> None:
    entry = parsed(replace(OFFER, address=tmp_path.as_uri()))["os_list"][0]

    assert entry["url"] == (tmp_path / "picket.img.zst").as_uri()


def test_the_icon_is_a_png_that_is_the_same_each_time(tmp_path: Path) -> None:
    imager.draw_icon(tmp_path / "a.png")
    imager.draw_icon(tmp_path / "b.png")

    with Image.open(tmp_path / "a.png") as icon:
        assert (icon.format, icon.size) == ("PNG", (80, 80))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
