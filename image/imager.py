"""What Raspberry Pi Imager reads to offer an image: `os_list.json`, by the schema in its source (doc/json-schema).

Imager takes whole addresses only, drops icons with any other scheme than http, https and file, and shows a list of its
own only if the list names the devices too. Customisation is off: an image that starts in factory mode has no use for
it, and one that is verified could not take it.
"""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from PIL import Image, ImageDraw

from image.errors import ImageError, RecipeError
from image.recipe import Recipe

#: Device trees of a family, the family's tag, its name, and how Imager's own list describes it.
_FAMILIES = (
    (r"bcm(2710|2837)-rpi-zero-2(-w)?", "pi3-64bit", "Raspberry Pi Zero 2 W", "Zero 2 W"),
    (r"bcm(2710|2837)-rpi-(3-.+|cm3.*)", "pi3-64bit", "Raspberry Pi 3", "Models A+, B, B+ and Compute Modules 3, 3+"),
    (r"bcm2711-rpi-.+", "pi4-64bit", "Raspberry Pi 4", "Models B, 400 and Compute Modules 4, 4S"),
    (r"bcm2712(d0)?-rpi-.+", "pi5-64bit", "Raspberry Pi 5", "Models 5, 500 and Compute Module 5"),
)

_SCHEMES = {"http", "https", "file"}
_SIDE = 80


@dataclass(frozen=True)
class Offer:
    """An image as Imager offers it.

    Attributes:
        name: as the list shows it.
        description: one line below it.
        address: where the files lie: an http, https or file URL of the directory.
        image: name of the compressed image there.
        size: of the raw image, in bytes.
        sha256: of the raw image, in hex; Imager refuses to write another.
        download_size: of the compressed image, in bytes.
        epoch: time of the release, in seconds; only the day is shown.
        boards: names of device trees, as in the recipe: leave out those that it calls experimental.
        icon: name of a PNG there; `draw_icon` makes one.
        bmap: name of the block map there.
        website: more about it.
    """

    name: str
    description: str
    address: str
    image: str
    size: int
    sha256: str
    download_size: int
    epoch: int
    boards: tuple[str, ...]
    icon: str
    bmap: str | None = None
    website: str | None = None


def os_list(offer: Offer) -> str:
    """The list with one offer, as JSON text.

    Raises:
        ImageError: the address is no URL that Imager takes, a board is not known to it, or there is none.
    """
    check_address(offer.address)
    families = _families(offer.boards)
    entry = {
        "name": offer.name,
        "description": offer.description,
        "icon": _at(offer, offer.icon),
        "url": _at(offer, offer.image),
        "bmap_url": _at(offer, offer.bmap) if offer.bmap else None,
        "extract_size": offer.size,
        "extract_sha256": offer.sha256,
        "image_download_size": offer.download_size,
        "release_date": datetime.fromtimestamp(offer.epoch, UTC).date().isoformat(),
        "init_format": "none",
        "architecture": "armv8",
        "devices": sorted({device["tags"][0] for device in families}),
        "website": offer.website,
    }
    listed = {key: value for key, value in entry.items() if value is not None}
    return json.dumps({"imager": {"devices": families}, "os_list": [listed]}, indent=1, ensure_ascii=False) + "\n"


def check_address(address: str) -> None:
    """That Imager could find files there.

    Raises:
        ImageError: it is no whole address, or has more than a directory in it.
    """
    try:
        place = urlsplit(address)
        there = place.scheme in _SCHEMES and bool(place.hostname or place.scheme == "file")
    except ValueError:
        there = False
    if not there or place.query or place.fragment or not re.fullmatch(r"[!-~]+", address):
        raise ImageError(
            f"{address!r} is not where Imager could find an image: name the directory by an http, https or file URL"
        )


def check(recipe: Recipe) -> None:
    """That Imager knows the boards of a recipe.

    Raises:
        RecipeError: it does not.
    """
    try:
        _families(recipe.boards)
    except ImageError as error:
        raise RecipeError(f"{recipe.file}: boards: {error}") from error


def draw_icon(path: Path) -> None:
    """Write a picket fence of 80 x 80 pixels, which is what Imager shows beside the name."""
    image = Image.new("RGBA", (_SIDE, _SIDE))
    draw = ImageDraw.Draw(image)
    for top in (34, 56):
        draw.rectangle((4, top, 75, top + 7), fill="#7a8c5a")
    for left in (8, 32, 56):
        draw.polygon([(left, 74), (left, 20), (left + 8, 8), (left + 16, 20), (left + 16, 74)], fill="#4d6b3c")
    image.save(path, "PNG")


def _at(offer: Offer, name: str) -> str:
    return f"{offer.address.rstrip('/')}/{quote(name)}"


def _families(boards: tuple[str, ...]) -> list[dict[str, Any]]:
    """What Imager lists to choose a board from, in the order of the boards."""
    found: dict[str, dict[str, Any]] = {}
    for board in boards:
        fitting = next((family for family in _FAMILIES if re.fullmatch(family[0], board)), None)
        if fitting is None:
            raise ImageError(f"Imager has no tag for the board {board!r}: add it to image/imager.py")
        _, tag, name, description = fitting
        found[name] = {
            "name": name,
            "description": description,
            "tags": [tag],
            "matching_type": "exclusive",
            "architecture": "armv8",
        }
    if not found:
        raise ImageError("an image for no board cannot be offered by Imager: the recipe names none")
    return list(found.values())
