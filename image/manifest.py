"""The image's description: one JSON file beside it, and all that the factory knows about an image."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from image import bmap
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
        image: file name of the raw image; `compressed` and `bmap` are the names of its zstd file and its block map.
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
    compressed: str
    compressed_sha256: str
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
            **{name: read.file_name(name) for name in ("image", "compressed", "bmap")},
            **{name: read.digest(name) for name in ("sha256", "compressed_sha256", "bmap_sha256")},
            size=read.number("size"),
            partitions=tuple(
                Partition(
                    **{name: item.number(name) for name in ("index", "start", "size")},
                    **{name: item.text(name) for name in ("type", "label", "uuid", "partuuid")},
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

    def verify(self) -> bmap.Bmap:
        """Check that image, block map and description agree; returns the block map.

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
        return ManifestError(f"{self._path}: {self._place}{name} is missing or malformed: {self._value.get(name)!r:.80}")

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
