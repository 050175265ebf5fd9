"""Block maps: which blocks of an image hold data, with a digest each range.

The format is bmaptool's, version 2.0 (github.com/yoctoproject/bmaptool, `bmaptool/BmapCreate.py` documents it): XML with
the image's size, the block size, and ranges of mapped blocks with their SHA-256; the file carries its own SHA-256, made
while that field holds zeros.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as Xml

BLOCK_SIZE = 4096
CHUNK = 4 * 2**20
_ZEROS = "0" * 64


class BmapError(ValueError):
    """A file that is no block map, or one that was changed."""


@dataclass(frozen=True)
class BlockRange:
    """Mapped blocks `first` to `last`, both included, and the SHA-256 (hex) of their bytes."""

    first: int
    last: int
    sha256: str


@dataclass(frozen=True)
class BlockMap:
    """An image's size in bytes, its block size, and its mapped ranges in order."""

    image_size: int
    block_size: int
    ranges: tuple[BlockRange, ...]

    @property
    def mapped_blocks(self) -> int:
        """How many blocks hold data."""
        return sum(one.last - one.first + 1 for one in self.ranges)

    @property
    def blocks(self) -> int:
        """How many blocks the image has, the last one perhaps short."""
        return -(-self.image_size // self.block_size)

    def __str__(self) -> str:
        ranges = "\n".join(f'    <Range chksum="{one.sha256}"> {_span(one)} </Range>' for one in self.ranges)
        text = f"""<?xml version="1.0" ?>
<bmap version="2.0">
  <ImageSize> {self.image_size} </ImageSize>
  <BlockSize> {self.block_size} </BlockSize>
  <BlocksCount> {self.blocks} </BlocksCount>
  <MappedBlocksCount> {self.mapped_blocks} </MappedBlocksCount>
  <ChecksumType> sha256 </ChecksumType>
  <BmapFileChecksum> {_ZEROS} </BmapFileChecksum>
  <BlockMap>
{ranges}
  </BlockMap>
</bmap>
"""
        return text.replace(_ZEROS, hashlib.sha256(text.encode()).hexdigest(), 1)


def _span(one: BlockRange) -> str:
    return str(one.first) if one.first == one.last else f"{one.first}-{one.last}"


def parse_bmap(text: str) -> BlockMap:
    """The block map in `text`.

    Raises:
        BmapError: it is no block map, or it was changed after it was written.
    """
    stated = re.search(r"<BmapFileChecksum>\s*([0-9a-f]{64})\s*</BmapFileChecksum>", text)
    if stated is None:
        raise BmapError("no block map of version 2.0: its own checksum is missing")
    if hashlib.sha256(text.replace(stated[1], _ZEROS, 1).encode()).hexdigest() != stated[1]:
        raise BmapError("the block map was changed: its own checksum does not match")
    try:
        root = Xml.fromstring(text)  # noqa: S314  (checked above; and entities do not expand without a DTD)
        ranges = tuple(_range(element) for element in root.iterfind("BlockMap/Range"))
        block_map = BlockMap(_number(root, "ImageSize"), _number(root, "BlockSize"), ranges)
        stated_blocks = _number(root, "MappedBlocksCount")
        kind = (root.findtext("ChecksumType") or "").strip()
    except (Xml.ParseError, ValueError) as error:
        raise BmapError(f"no block map: {error}") from error
    if kind != "sha256":
        raise BmapError(f"the block map's checksums are of kind {kind!r}; only sha256 is taken")
    _check(block_map, stated_blocks)
    return block_map


def _check(block_map: BlockMap, stated_blocks: int) -> None:
    if block_map.block_size <= 0 or block_map.image_size <= 0:
        raise BmapError("the block map speaks of an empty image")
    end = -1
    for one in block_map.ranges:
        if not end < one.first <= one.last < block_map.blocks:
            raise BmapError(f"the range {_span(one)} is out of order or outside of the image")
        end = one.last
    if block_map.mapped_blocks != stated_blocks:
        raise BmapError(f"the block map lists {block_map.mapped_blocks} mapped blocks, but states {stated_blocks}")


def _number(root: Xml.Element, name: str) -> int:
    return int((root.findtext(name) or "").strip())


def _range(element: Xml.Element) -> BlockRange:
    first, _, last = (element.text or "").strip().partition("-")
    digest = element.get("chksum", "")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise BmapError(f"the range {element.text} has no SHA-256")
    return BlockRange(int(first), int(last or first), digest)


def make_bmap(image: Path, block_size: int = BLOCK_SIZE) -> BlockMap:
    """The block map of a sparse file: what the file system holds as data is mapped, its holes are not."""
    with image.open("rb") as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        ranges = tuple(
            BlockRange(first, last, _digest(descriptor, first * block_size, min((last + 1) * block_size, size)))
            for first, last in _merged(_extents(descriptor, size), block_size)
        )
    return BlockMap(size, block_size, ranges)


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    offset = 0
    while offset < size:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole from here on
            return
        offset = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, offset


def _merged(extents: Iterator[tuple[int, int]], block_size: int) -> Iterator[tuple[int, int]]:
    """Extents in bytes as ranges of whole blocks, those that touch made one."""
    held: tuple[int, int] | None = None
    for start, end in extents:
        first, last = start // block_size, (end - 1) // block_size
        if held is None:
            held = first, last
        elif first <= held[1] + 1:
            held = held[0], last
        else:
            yield held
            held = first, last
    if held is not None:
        yield held


def _digest(descriptor: int, start: int, end: int) -> str:
    digest = hashlib.sha256()
    while start < end:
        data = os.pread(descriptor, min(CHUNK, end - start), start)
        digest.update(data)
        start += len(data)
    return digest.hexdigest()
