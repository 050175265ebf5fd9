"""The recipe: everything about an image that a person decides."""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from image.errors import RecipeError

#: Names end up in file names and in the banner.
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){1,3}([a-z0-9.+-]{0,24})")
_KEY_STORES = ("file", "tpm", "probe-once")


@dataclass(frozen=True)
class Recipe:
    """What the image is made of.

    Attributes:
        name: of the image; with the version it is what the banner says.
        version: of the image.
        hostname: of every unit that runs it.
        suite: Debian's release.
        architecture: Debian's name of the target's architecture.
        components: of the archive.
        mirror: where packages come from; empty means mmdebstrap's default.
        packages: to install; recommended packages do not come along.
        exclude: path patterns that dpkg leaves out, in order; a leading `+` takes one back.
        boards: device trees (file names without `.dtb`) that must be there.
        experimental_boards: device trees that are taken where the kernel package has them.
        hardware: `compatible` strings of the boards that the agent's releases are for; others refuse them.
        security_version: of the agent; units that have run a release never go back below its number.
        boot_mebibytes: size of the FAT boot partition.
        root_spare_mebibytes: free space in the root file system.
        key_store: where units keep their key: `file`, `tpm`, or `probe-once` (the first boot decides, for good).
    """

    name: str
    version: str
    hostname: str
    suite: str
    architecture: str
    components: tuple[str, ...]
    mirror: str
    packages: tuple[str, ...]
    exclude: tuple[str, ...]
    boards: tuple[str, ...]
    experimental_boards: tuple[str, ...]
    hardware: tuple[str, ...]
    security_version: int
    boot_mebibytes: int
    root_spare_mebibytes: int
    key_store: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RecipeError(f"name {self.name!r}: small letters, digits and dashes, at most 32")
        if not _VERSION.fullmatch(self.version):
            raise RecipeError(f"version {self.version!r} does not look like 1.2 or 1.2.3")
        if not _NAME.fullmatch(self.hostname):
            raise RecipeError(f"hostname {self.hostname!r}: small letters, digits and dashes, at most 32")
        if self.key_store not in _KEY_STORES:
            raise RecipeError(f"key.store {self.key_store!r} is none of {', '.join(_KEY_STORES)}")
        if not self.packages or not self.boards:
            raise RecipeError("packages and boards must not be empty")
        if not self.hardware or self.security_version < 1:
            raise RecipeError("hardware must not be empty, and security_version counts from 1")
        # FAT32 needs 65525 clusters; below 33 MiB mkfs.vfat makes a FAT16, which the oldest boot ROMs dislike.
        if not 64 <= self.boot_mebibytes <= 1024:
            raise RecipeError(f"boot_mebibytes {self.boot_mebibytes} is not between 64 and 1024")
        if not 32 <= self.root_spare_mebibytes <= 16384:
            raise RecipeError(f"root_spare_mebibytes {self.root_spare_mebibytes} is not between 32 and 16384")


def load(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: the file cannot be read, is no TOML, or says something impossible; the message names the key.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} is no TOML: {error}") from error
    return parse(table)


def parse(table: dict[str, Any]) -> Recipe:
    """The recipe in a parsed TOML table; every key is asked for and no other is let in."""
    flat = dict(table)
    key = flat.pop("key", {})
    if not isinstance(key, dict) or set(key) - {"store"}:
        raise RecipeError("[key] takes `store` and nothing else")
    flat["key_store"] = key.get("store")
    known = {field.name: field.type for field in fields(Recipe)}
    unknown = sorted(set(flat) - set(known))
    missing = sorted(name for name in known if flat.get(name) is None)
    if unknown or missing:
        raise RecipeError(
            "; ".join(
                ([f"unknown: {', '.join(unknown)}"] if unknown else [])
                + ([f"missing: {', '.join(missing)}"] if missing else [])
            )
        )
    return Recipe(**{name: _value(name, kind, flat[name]) for name, kind in known.items()})


def _value(name: str, kind: Any, value: Any) -> Any:
    if kind is int and type(value) is int:
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind not in (int, str) and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise RecipeError(f"{name} has the wrong type: {value!r}")
