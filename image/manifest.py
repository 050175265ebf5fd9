"""The image's description: one JSON file beside it, and all that the factory knows about an image."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from image import bmap
from image.bmap import Bmap
from image.errors import ManifestError

FORMAT = "picket-image-1"

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 4 * 1024 * 1024


@dataclass(frozen=True)
class Partition:
    """A partition of the image: where it is (bytes) and what is in it."""

    index: int
    type: str
    label: str
    start: int
    size: int
    uuid: str
    partuuid: str


@dataclass(frozen=True)
class Package:
    """A package in the image; `kind` is `debian` or `python`."""

    kind: str
    name: str
    version: str


@dataclass(frozen=True)
class ImageManifest:
    """An image as its builder describes it.

    Attributes:
        name: of the image.
        version: of the image.
        agent: version of the firmware agent in it.
        image: file name of the raw image; `bmap` is that of its block map, `compressed` of its zstd file if it has one.
        sha256: of the raw image.
        size: of the raw image, in bytes.
        compressed_sha256: of the zstd file.
        bmap_sha256: of the block map's file.
        kernel: version of the kernel.
        partitions: in the order of the table.
        packages: everything installed, sorted by kind and name.
        directory: where the files lie; not part of the description.
    """

    name: str
    version: str
    agent: str
    image: str
    sha256: str
    size: int
    compressed: str | None
    compressed_sha256: str | None
    bmap: str
    bmap_sha256: str
    kernel: str
    partitions: tuple[Partition, ...]
    packages: tuple[Package, ...]
    directory: Path

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def image_path(self) -> Path:
        """The raw image."""
        return self.directory / self.image

    @property
    def bmap_path(self) -> Path:
        """Its block map."""
        return self.directory / self.bmap

    @classmethod
    def load(cls, path: Path) -> "ImageManifest":
        """Read a description; the files that it names are looked at by `verify` only.

        Raises:
            ManifestError: it cannot be read, or a field is missing or malformed; the message names it.
        """
        try:
            value = json.loads(path.read_text())
        except OSError as error:
            raise ManifestError(f"no image description at {path} ({error.strerror}); `make image` makes one") from error
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ManifestError(f"{path} is no JSON: {error}") from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ManifestError(f"{path} is not an image description of the form {FORMAT}")
        read = _Fields(path, value)
        manifest = cls(
            **{name: read.text(name) for name in ("name", "version", "agent", "kernel")},
            **{name: read.file_name(name) for name in ("image", "bmap")},
            **{name: read.digest(name) for name in ("sha256", "bmap_sha256")},
            compressed=read.file_name("compressed") if read.has("compressed") else None,
            compressed_sha256=read.digest("compressed_sha256") if read.has("compressed") else None,
            size=read.number("size"),
            partitions=tuple(
                Partition(
                    index=item.number("index"),
                    type=item.text("type"),
                    label=item.text("label"),
                    start=item.number("start"),
                    size=item.number("size"),
                    uuid=item.text("uuid"),
                    partuuid=item.text("partuuid"),
                )
                for item in read.items("partitions")
            ),
            packages=tuple(
                Package(**{name: item.text(name) for name in ("kind", "name", "version")})
                for item in read.items("packages")
            ),
            directory=path.resolve().parent,
        )
        end = 0
        for part in manifest.partitions:
            if part.start < end or part.start + part.size > manifest.size:
                raise ManifestError(f"{path}: partition {part.index} overlaps another or leaves the image")
            end = part.start + part.size
        return manifest

    def dump(self) -> str:
        """The description as JSON text."""
        value = {"format": FORMAT, **asdict(self)}
        del value["directory"]
        return json.dumps(value, indent=1, allow_nan=False) + "\n"

    def verify_files(self) -> Bmap:
        """Check that the files are there and belong together; returns the block map.

        The image's bytes are not read: the block map has a digest of every range, which a flash checks as it writes.

        Raises:
            ManifestError: a file is missing or is not what the description says; the message names it.
        """
        for name in (self.image, self.bmap):
            if not (self.directory / name).is_file():
                raise ManifestError(f"{self.directory / name} is missing; `make image` makes it")
        _compare(self.bmap_path, self.bmap_sha256)
        blocks = bmap.load(self.bmap_path)
        if blocks.image_size != self.size:
            raise ManifestError(f"{self.bmap} is for an image of {blocks.image_size} bytes, not of {self.size}")
        size = self.image_path.stat().st_size
        if size != self.size:
            raise ManifestError(f"{self.image_path} has {size} bytes, its description says {self.size}")
        return blocks

    def verify(self) -> Bmap:
        """Check every byte: that image, block map and description agree; returns the block map.

        Raises:
            ManifestError: a file is missing or is not what the description says; the message names it.
        """
        blocks = self.verify_files()
        _compare(self.image_path, self.sha256)
        bmap.check(self.image_path, blocks)
        return blocks


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(path: Path, expected: str) -> None:
    found = digest(path)
    if found != expected:
        raise ManifestError(f"{path} has the digest {found}, its description says {expected}; build or fetch it again")


class _Fields:
    """Typed access to a parsed JSON object that says where it was wrong."""

    def __init__(self, path: Path, value: dict[str, Any], place: str = "") -> None:
        self._path = path
        self._value = value
        self._place = place

    def _wrong(self, name: str) -> ManifestError:
        return ManifestError(
            f"{self._path}: {self._place}{name} is missing or malformed: {self._value.get(name)!r:.80}"
        )

    def has(self, name: str) -> bool:
        return self._value.get(name) is not None

    def text(self, name: str) -> str:
        value = self._value.get(name)
        if not isinstance(value, str) or not value:
            raise self._wrong(name)
        return value

    def file_name(self, name: str) -> str:
        value = self.text(name)
        if "/" in value or value.startswith("."):
            raise self._wrong(name)
        return value

    def digest(self, name: str) -> str:
        value = self.text(name)
        if not _DIGEST.fullmatch(value):
            raise self._wrong(name)
        return value

    def number(self, name: str) -> int:
        value = self._value.get(name)
        if type(value) is not int or value < 0:
            raise self._wrong(name)
        return value

    def items(self, name: str) -> list["_Fields"]:
        value = self._value.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            raise self._wrong(name)
        return [_Fields(self._path, item, f"{name}[{index}].") for index, item in enumerate(value)]
