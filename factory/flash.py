"""Flash: forget the medium, write the image's mapped blocks, block 0 last, and read all of it back.

A hole in the image is not written, so the medium is discarded first: a unit that is made again keeps nothing of its
last life. Block 0 holds the partition table; as it comes last, a medium that was cut off half way does not boot.
"""

import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from factory.bench import Image, Medium, Storage
from factory.errors import StationFault, UnitFault
from factory.record import Step
from image import bmap
from image.bmap import Bmap
from image.errors import ManifestError

CHUNK = 4 * 2**20
#: In chunks.
READ_AHEAD = 4

_BAD_MEDIUM = "Put in a new medium. If that fails too, the reader or its cable is faulty."
_BAD_IMAGE = "Build or fetch the image again: the file on the station is not what its block map says."


@dataclass(frozen=True)
class _Chunk:
    offset: int
    length: int


def flash(storage: Storage, image: Image, step: Step) -> None:
    """Write `image` and prove that it is on the medium, which must be without power.

    Raises:
        UnitFault: the medium is too small, or does not hold what was written.
        StationFault: the image does not match its block map; block 0 was not written.
    """
    block_map = load_block_map(image)
    total = block_map.mapped_bytes
    with storage.attach() as medium, ThreadPoolExecutor(1) as beside:
        step.note("medium", medium.name)
        if medium.size < image.size:
            raise UnitFault(
                f"the medium {medium.name} is too small: {medium.size:,} bytes, the image needs {image.size:,}",
                advice="Put in a larger medium.",
            )
        checking = beside.submit(_check, image, block_map)  # while the medium is busy
        medium.discard()
        head = _write(image, block_map, medium, step, total, checking)
        medium.flush()  # a cache of the medium's own must not put block 0 first
        checking.result()
        medium.write(0, head)
        medium.flush()
        digest = _read_back(block_map, medium, step, total)
    step.note("mapped_bytes", total)
    step.note("image_sha256", image.sha256)
    step.note("read_back_sha256", digest)


def load_block_map(image: Image) -> Bmap:
    """The image's block map.

    Raises:
        StationFault: it is missing, damaged, or of another image.
    """
    try:
        block_map = bmap.load(image.block_map)
    except ManifestError as error:
        raise StationFault(f"the block map {image.block_map} is unusable: {error}", advice=_BAD_IMAGE) from error
    if block_map.image_size != image.size or not block_map.ranges or block_map.ranges[0].first != 0:
        raise StationFault(f"the block map {image.block_map} is not of image {image.path}", advice=_BAD_IMAGE)
    return block_map


def _check(image: Image, block_map: Bmap) -> None:
    """Compare the image with its block map.

    Raises:
        StationFault: it differs.
    """
    descriptor = _open(image.path)
    try:
        for one in block_map.ranges:
            digest = hashlib.sha256()
            for chunk in _chunks(block_map, one):
                digest.update(os.pread(descriptor, chunk.length, chunk.offset))
            if digest.hexdigest() != one.sha256:
                raise StationFault(
                    f"the image {image.path} is damaged: blocks {one.first}-{one.last} do not match its block map",
                    advice=_BAD_IMAGE,
                )
    finally:
        os.close(descriptor)


def _write(image: Image, block_map: Bmap, medium: Medium, step: Step, total: int, checking: "Future[None]") -> bytes:
    """Write every mapped range but block 0, which is returned; stop as soon as the check has found the image bad."""
    head, done = b"", 0
    descriptor = _open(image.path)
    try:
        for one in block_map.ranges:
            for chunk in _chunks(block_map, one):
                data = os.pread(descriptor, chunk.length, chunk.offset)
                if chunk.offset == 0:
                    head = data[: block_map.block_size]
                    medium.write(len(head), memoryview(data)[len(head) :])
                else:
                    medium.write(chunk.offset, data)
                done += chunk.length
                step.progress(done, 2 * total, "write")
                if checking.done():
                    checking.result()
    finally:
        os.close(descriptor)
    return head


def _open(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise StationFault(f"the image {path} cannot be read: {error.strerror}", advice=_BAD_IMAGE) from error
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return descriptor


def _read_back(block_map: Bmap, medium: Medium, step: Step, total: int) -> str:
    """Compare every mapped range on the medium; the digest over the ranges' digests."""
    done, whole = total, hashlib.sha256()
    with closing(_read_ahead(block_map, medium)) as read:
        for one in block_map.ranges:
            digest = hashlib.sha256()
            for chunk in _chunks(block_map, one):
                digest.update(next(read))
                done += chunk.length
                step.progress(done, 2 * total, "read back")
            if digest.hexdigest() != one.sha256:
                raise UnitFault(
                    f"the medium does not hold what was written: blocks {one.first}-{one.last} read back differently",
                    advice=_BAD_MEDIUM,
                )
            whole.update(digest.digest())
    return whole.hexdigest()


def _read_ahead(block_map: Bmap, medium: Medium) -> Generator[bytes, None, None]:
    """Every mapped chunk in order, some of them read ahead, so that neither medium nor processor waits."""
    chunks = (chunk for one in block_map.ranges for chunk in _chunks(block_map, one))
    reader = ThreadPoolExecutor(1)
    try:
        waiting = deque(reader.submit(medium.read, chunk.offset, chunk.length) for chunk in islice(chunks, READ_AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(reader.submit(medium.read, chunk.offset, chunk.length) for chunk in islice(chunks, 1))
    finally:
        reader.shutdown(cancel_futures=True)


def _chunks(block_map: Bmap, one: bmap.Range) -> Iterator[_Chunk]:
    offset, length = block_map.span(one)
    end = offset + length
    while offset < end:
        length = min(CHUNK, end - offset)
        yield _Chunk(offset, length)
        offset += length
