"""The authorisation that takes one sealed unit back into factory mode for one boot, and its way on to the medium.

The unit's side, which says what an authorisation is, is `slots/factory_mode.py` among the image's files.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from image import checksums, disk, layout
from image.disk import Slice
from image.errors import ImageError, ManifestError, MediumError, SigningError
from image.firmware.medium import FAT_TYPES
from image.manifest import ImageManifest
from image.run import run
from image.signing import FACTORY_MODE, Signer, fingerprint

#: Its name on the control partition.
NAME = "factory.authorisation"

DAY = 86400


@dataclass(frozen=True)
class Table:
    """What a medium says of itself: its disk signature and partitions, and its real size in bytes."""

    signature: int
    slices: Sequence[Slice]
    size: int


def check_key(signer: Signer, image: ImageManifest) -> None:
    """Refuse a key that an image's units do not know: they know the one that signed the image.

    Where nobody signed what lies beside the description, there is nothing to compare with.

    Raises:
        SigningError: another key signed the image.
        ManifestError: the signature beside the description does not hold.
    """
    try:
        known = checksums.signer(image.directory)
    except SigningError as error:
        raise ManifestError(f"whose {image} is cannot be told: {error}") from error
    if known is not None and known.split()[:2] != signer.public_line.split()[:2]:
        raise SigningError(
            f"{image} is signed by the key {fingerprint(known)}, and its units know no other;"
            f" the one that was named is {fingerprint(signer.public_line)}"
        )


def control_of(table: Table, image: ImageManifest) -> Slice:
    """The control partition of a whole medium that an image was flashed on to.

    Raises:
        MediumError: it is another medium, or not all of one; the message goes on after its name.
    """
    control = next((part for part in table.slices if part.number == layout.CONTROL), None)
    if control is None or control.type not in FAT_TYPES:
        raise MediumError("has no control partition: it is no unit's medium")
    last = max(table.slices, key=lambda part: part.end)
    if last.end > table.size:
        raise MediumError(
            f"is cut off: it has {table.size} bytes, and its partition {last.number} goes up to {last.end}"
        )
    expected = image.partitions[0]
    found = disk.partuuid(table.signature, expected.index)
    if found != expected.partuuid:
        raise MediumError(
            f"is no unit's medium with {image}: its partition {expected.index} is {found},"
            f" the image's is {expected.partuuid}"
        )
    return control


def compose(product: str, board: str, issued: int, days: int, signer: Signer) -> bytes:
    """The file's content.

    Args:
        product: the image's name.
        board: the board's serial, 16 lower-case hex digits.
        issued: now, in seconds since 1970; a unit takes none that is not later than the last it took.
        days: how long it counts.
        signer: the key that the unit's image knows.

    Raises:
        SigningError: the key cannot be reached.
    """
    said = {"format": 1, "product": product, "board": board, "issued": issued, "expires": issued + days * DAY}
    line = json.dumps(said).encode() + b"\n"
    return line + signer.sign(line, FACTORY_MODE)


def put_on(medium: Path, authorisation: bytes, image: ImageManifest) -> None:
    """Write it on to the control partition of a unit's medium, in place of one that is there, and read it back.

    A write that is cut off leaves what no unit takes, for the signature is missing.

    Args:
        medium: a block device or a raw image, of a unit that has no power.
        authorisation: the content.
        image: what the unit runs, in any version.

    Raises:
        MediumError: it is no medium of a unit's with this image, or a part of one; nothing is written.
        ImageError: its control partition cannot be read or written, or it does not keep what is written.
        OSError: it cannot be opened or read.
    """
    try:
        control = control_of(_table(medium), image)
    except MediumError as error:
        raise MediumError(f"{medium} {error}") from error
    place = f"{medium}@@{control.start}"
    if not any(name in run("mdir", "-b", "-i", place, "::").lower() for name in ("/autoboot.txt", "/slot.txt")):
        raise MediumError(f"the first partition of {medium} chooses no slot: it is no unit's medium")
    with tempfile.NamedTemporaryFile(prefix="picket-") as file:
        file.write(authorisation)
        file.flush()
        run("mcopy", "-o", "-i", place, file.name, f"::{NAME}")
    _sync(medium)
    if run("mtype", "-i", place, f"::{NAME}").encode() != authorisation:
        raise ImageError(f"{medium} does not give back what was written: it is worn, or write-protected")


def _table(medium: Path) -> Table:
    """What lies on a medium, by its partition table."""
    if not medium.is_file() and not medium.is_block_device():
        raise MediumError("is neither a raw image nor a disk" if medium.exists() else "is not there")
    with medium.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        try:
            return Table(*disk.read_table(lambda place: _sector(opened, place, size)), size)
        except MediumError:
            raise
        except ImageError as error:
            raise MediumError(f"is no unit's medium: {error}") from error
        except OSError as error:
            raise ImageError(f"{medium} cannot be read: {error.strerror}") from error


def _sector(opened: BinaryIO, place: int, size: int) -> bytes:
    if place + disk.SECTOR > size:
        raise MediumError(f"is cut off, or no medium at all: it has {size} bytes, and what is needed lies at {place}")
    opened.seek(place)
    return opened.read(disk.SECTOR)


def _sync(medium: Path) -> None:
    """Past the cache, so that the medium may be pulled and is read back as it is."""
    descriptor = os.open(medium, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
