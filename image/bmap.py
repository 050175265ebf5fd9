"""Block maps: which blocks of an image carry data, and their digests (bmaptool's format 2.0).

The map guards itself with a digest over its own text, in which the digest's place is filled with zeros.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from image.disk import data_ranges
from image.errors import ManifestError

BLOCK_SIZE = 4096
_VERSION = "2.0"
_CHUNK = 4 * 1024 * 1024
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Range:
    """Blocks `first` to `last` (both included) and the SHA-256 of their bytes."""

    first: int
    last: int
    sha256: str

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last or not _DIGEST.fullmatch(self.sha256):
            raise ManifestError(f"a block map holds a bad range: {self.first}-{self.last} {self.sha256!r}")


@dataclass(frozen=True)
class Bmap:
    """A block map.

    Attributes:
        image_size: of the image in bytes; the last block may be cut short by it.
        block_size: in bytes.
        ranges: in ascending order, apart from each other.
    """

    image_size: int
    block_size: int
    ranges: tuple[Range, ...]

    def __post_init__(self) -> None:
        if self.image_size < 0 or self.block_size <= 0:
            raise ManifestError("a block map holds a negative size")
        end = -1
        for item in self.ranges:
            if item.first <= end or item.last >= self.blocks:
                raise ManifestError(f"the block map's range {item.first}-{item.last} overlaps or leaves the image")
            end = item.last

    @property
    def blocks(self) -> int:
        """Blocks of the image, mapped or not."""
        return -(-self.image_size // self.block_size)

    @property
    def mapped_blocks(self) -> int:
        """Blocks that carry data."""
        return sum(item.last - item.first + 1 for item in self.ranges)

    @property
    def mapped_bytes(self) -> int:
        """Bytes that must be written."""
        return sum(self.span(item)[1] for item in self.ranges)

    def span(self, item: Range) -> tuple[int, int]:
        """Offset and length of a range in bytes."""
        start = item.first * self.block_size
        return start, min((item.last + 1) * self.block_size, self.image_size) - start


def create(image: Path, block_size: int = BLOCK_SIZE) -> Bmap:
    """The block map of a sparse image file."""
    ranges: list[Range] = []
    with image.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        merged: list[list[int]] = []
        for start, end in data_ranges(file.fileno()):
            first, last = start // block_size, (end - 1) // block_size
            if merged and first <= merged[-1][1] + 1:
                merged[-1][1] = last
            else:
                merged.append([first, last])
        for first, last in merged:
            length = min((last + 1) * block_size, size) - first * block_size
            ranges.append(Range(first, last, _digest(file, first * block_size, length)))
    return Bmap(size, block_size, tuple(ranges))


def check(image: Path, bmap: Bmap) -> None:
    """Compare an image with its block map.

    Raises:
        ManifestError: the size differs, or the digest of a range; the message names it.
    """
    size = image.stat().st_size
    if size != bmap.image_size:
        raise ManifestError(f"{image.name} has {size} bytes, its block map says {bmap.image_size}")
    with image.open("rb") as file:
        for item in bmap.ranges:
            if _digest(file, *bmap.span(item)) != item.sha256:
                raise ManifestError(f"{image.name} differs from its block map in blocks {item.first}-{item.last}")


def _digest(file: io.BufferedReader, offset: int, length: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    for block in _blocks(file, length):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: io.BufferedReader, length: int) -> Iterator[bytes]:
    while length:
        block = file.read(min(length, _CHUNK))
        if not block:
            raise ManifestError("the image ends inside a mapped range")
        length -= len(block)
        yield block


def write(bmap: Bmap) -> str:
    """The map as text."""
    rows = "".join(
        f'        <Range chksum="{item.sha256}"> {item.first}{"" if item.first == item.last else f"-{item.last}"} '
        "</Range>\n"
        for item in bmap.ranges
    )
    empty = "0" * 64
    text = (
        '<?xml version="1.0" ?>\n'
        f'<bmap version="{_VERSION}">\n'
        f"    <ImageSize> {bmap.image_size} </ImageSize>\n"
        f"    <BlockSize> {bmap.block_size} </BlockSize>\n"
        f"    <BlocksCount> {bmap.blocks} </BlocksCount>\n"
        f"    <MappedBlocksCount> {bmap.mapped_blocks} </MappedBlocksCount>\n"
        "    <ChecksumType> sha256 </ChecksumType>\n"
        f"    <BmapFileChecksum> {empty} </BmapFileChecksum>\n"
        f"    <BlockMap>\n{rows}    </BlockMap>\n"
        "</bmap>\n"
    )
    return text.replace(empty, hashlib.sha256(text.encode()).hexdigest(), 1)


def parse(text: str) -> Bmap:
    """The map in a text.

    Raises:
        ManifestError: it is no block map of this format, it contradicts itself, or its own digest is wrong.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ManifestError("the block map declares entities; a block map has none")
    try:
        root = ET.fromstring(text)  # noqa: S314 - no entities, as checked above
    except ET.ParseError as error:
        raise ManifestError(f"the block map is no XML: {error}") from error
    if root.tag != "bmap" or root.get("version") != _VERSION:
        raise ManifestError(f"the block map is not of version {_VERSION}")
    if _field(root, "ChecksumType") != "sha256":
        raise ManifestError("the block map's digests are not SHA-256")
    claimed = _field(root, "BmapFileChecksum")
    if not _DIGEST.fullmatch(claimed):
        raise ManifestError("the block map's own digest is malformed")
    if hashlib.sha256(text.replace(claimed, "0" * 64, 1).encode()).hexdigest() != claimed:
        raise ManifestError("the block map was changed: its own digest does not match")
    bmap = Bmap(_number(root, "ImageSize"), _number(root, "BlockSize"), tuple(_ranges(root)))
    if bmap.blocks != _number(root, "BlocksCount") or bmap.mapped_blocks != _number(root, "MappedBlocksCount"):
        raise ManifestError("the block map's counts do not fit its ranges")
    return bmap


def _field(root: ET.Element, name: str) -> str:
    text = root.findtext(name)
    if text is None:
        raise ManifestError(f"the block map has no {name}")
    return text.strip()


def _number(root: ET.Element, name: str) -> int:
    return _integer(_field(root, name))


def _integer(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ManifestError(f"the block map holds {text!r} where a number belongs")
    return int(text)


def _ranges(root: ET.Element) -> Iterator[Range]:
    for element in root.iterfind("BlockMap/Range"):
        first, _, last = (element.text or "").strip().partition("-")
        yield Range(_integer(first.strip()), _integer(last.strip() or first.strip()), element.get("chksum", ""))


def load(path: Path) -> Bmap:
    """The map in a file.

    Raises:
        ManifestError: it cannot be read, or see `parse`.
    """
    try:
        return parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"the block map {path} cannot be read: {error}") from error
