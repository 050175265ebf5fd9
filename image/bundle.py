"""A bundle: what a unit needs to put another image into its free slot, in one signed file.

The form, and what a unit looks at, is in `image/files/usr/lib/picket/slots/bundle.py`: that parser of the unit's is the
one that reads bundles here, too. The same parts and the same key give the same bits (an ECDSA signature aside).

    <output>/picket-0.2.0.os.tar     the bundle
    <output>/release.json            kind "os": what `cloud.repository` lists and signs
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from image.errors import ImageError
from image.files.usr.lib.picket.slots import bundle as form
from image.files.usr.lib.picket.slots import signature
from image.files.usr.lib.picket.slots.bundle import NAMESPACE, Bundle, Manifest, Part
from image.files.usr.lib.picket.slots.faults import Fault

DESCRIPTION: Final = "release.json"
CHUNK_BYTES: Final = 1 << 20
_PIECE: Final = 1 << 20

#: Signs bytes for a namespace; an armored OpenSSH signature.
Sign = Callable[[bytes, str], bytes]


class BundleError(ImageError, ValueError):
    """A bundle cannot be made of this, or is none."""


@dataclass(frozen=True)
class Fields:
    """What a manifest says beside the members' sizes and digests.

    Attributes:
        product, version, security_version: of the image.
        agent_security_version: of the agent that it brings.
        hardware: device-tree `compatible` strings of its boards.
        control: `autoboot` or `os-prefix`.
        disk: the signature of the units' media, 8 hex digits.
    """

    product: str
    version: str
    security_version: int
    agent_security_version: int
    hardware: tuple[str, ...]
    control: str
    disk: str


@dataclass(frozen=True)
class Built:
    """A bundle that was built: the file, its description, and what was signed."""

    bundle: Path
    description: Path
    manifest: Manifest


# --- what goes in --------------------------------------------------------------------------------------------------


def used_length(read: Callable[[int, int], bytes]) -> int:
    """Where the last used cluster of a FAT file system ends, in bytes. Pure but for `read(size, offset)`.

    FAT32 says so by a FAT16 length of 0; FAT12 and FAT16 are told apart by the count of clusters (Microsoft, "FAT:
    General Overview of On-Disk Format" 1.03, page 14).

    Raises:
        BundleError: it is no FAT file system with sectors of 512 bytes.
    """
    boot = read(512, 0)
    if len(boot) < 512 or boot[510:] != b"\x55\xaa":
        raise BundleError("the boot partition holds no FAT file system: build the image again")
    per_sector, per_cluster, reserved, fats, entries = struct.unpack_from("<HBHBH", boot, 11)
    if per_sector != 512 or not per_cluster or not fats:
        raise BundleError(f"the boot partition's FAT has sectors of {per_sector} bytes; 512 are wanted")
    short = struct.unpack_from("<H", boot, 22)[0]
    fat_sectors = short or struct.unpack_from("<I", boot, 36)[0]
    sectors = struct.unpack_from("<H", boot, 19)[0] or struct.unpack_from("<I", boot, 32)[0]
    data = reserved + fats * fat_sectors + -(-entries * 32 // 512)
    clusters = (sectors - data) // per_cluster
    table = read(fat_sectors * 512, reserved * 512)
    bits = 32 if not short else 12 if clusters < 4085 else 16
    last = max((number for number in range(2, clusters + 2) if _used(table, number, bits)), default=1)
    return int((data + (last - 1) * per_cluster) * 512)


def _used(table: bytes, number: int, bits: int) -> bool:
    """Whether the table, of entries of so many bits, says that a cluster belongs to a file."""
    start = number * bits // 8
    entry = int.from_bytes(table[start : start + (bits + 7) // 8], "little")
    if bits == 12:
        return bool(entry >> 4 if number % 2 else entry & 0xFFF)
    return bool(entry & 0x0FFFFFFF)


def pack_files(files: Sequence[tuple[str, bytes]]) -> bytes:
    """The `boot` member of a unit with control "os-prefix": the slot's boot files as a tar, in the order of names.

    Raises:
        BundleError: a name is none that units take.
    """
    packed = b"".join(
        form.header(name, len(data)) + data + bytes(form.padding(len(data))) for name, data in sorted(files)
    )
    packed += form.END
    try:
        form.read_files(lambda size, offset: packed[offset : offset + size], 0, len(packed))
    except Fault as fault:
        raise BundleError(str(fault)) from fault
    return packed


# --- making --------------------------------------------------------------------------------------------------------


def build(boot: Path, root: Path, fields: Fields, sign: Sign, output: Path) -> Built:
    """Make a bundle and its description.

    Args:
        boot: the boot partition's FAT image as long as its partition (control "autoboot"), or what `pack_files` gave.
        root: squashfs with its hash tree.
        fields: what else the manifest says.
        sign: signs the manifest.
        output: directory for both files; made if it is not there.

    Raises:
        BundleError: units would refuse it.
        ImageError: it cannot be signed.
    """
    output.mkdir(parents=True, exist_ok=True)
    with boot.open("rb") as boot_file, root.open("rb") as root_file:
        partition_size, boot_length = boot.stat().st_size, boot.stat().st_size
        if fields.control == "autoboot":
            boot_length = used_length(lambda size, offset: os.pread(boot_file.fileno(), size, offset))
        manifest = Manifest(
            product=fields.product,
            version=fields.version,
            security_version=fields.security_version,
            agent_security_version=fields.agent_security_version,
            hardware=fields.hardware,
            control=fields.control,
            disk=fields.disk,
            boot=_part(boot_file, boot_length),
            root=_part(root_file, root.stat().st_size),
            boot_partition_size=partition_size if fields.control == "autoboot" else 0,
        )
        signed = manifest.to_bytes()
        _check(signed, manifest)
        path = output / f"{fields.product}-{fields.version}.os.tar"
        with _new_file(path) as file:
            for name, data in (("manifest.json", signed), ("manifest.json.sig", sign(signed, NAMESPACE))):
                file.write(form.header(name, len(data)) + data + bytes(form.padding(len(data))))
            for name, part, source in (("boot", manifest.boot, boot_file), ("root", manifest.root, root_file)):
                file.write(form.header(name, part.size))
                for piece in _pieces(source, part.size):
                    file.write(piece)
            file.write(form.END)
    description = output / DESCRIPTION
    with _new_file(description) as file:
        file.write(json.dumps(_describe(path, manifest), indent=1).encode() + b"\n")
    return Built(path, description, manifest)


def _check(signed: bytes, manifest: Manifest) -> None:
    """Refuse to sign what no unit would parse."""
    try:
        if form.parse_manifest(signed) != manifest or len(signed) > form.MANIFEST_LIMIT:
            raise BundleError("the manifest does not say what it was made from")
    except Fault as fault:
        raise BundleError(f"units would refuse this: {fault}") from fault


def _describe(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """What the fleet's side is told. A bundle is not compressed again, so it is its own tar."""
    with bundle.open("rb") as file:
        size = bundle.stat().st_size
        chunks = [hashlib.sha256(piece).hexdigest() for piece in _pieces(file, size, CHUNK_BYTES)]
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "format": 1,
        "kind": "os",
        "product": manifest.product,
        "version": manifest.version,
        "security_version": manifest.security_version,
        "hardware": list(manifest.hardware),
        "min_from": None,
        "python": None,
        "archive": {
            "file": bundle.name,
            "length": size,
            "sha256": sha256,
            "chunk_bytes": CHUNK_BYTES,
            "chunks": chunks,
            "tar_sha256": sha256,
            "tar_size": size,
        },
        "deltas": [],
    }


def _part(file: BinaryIO, size: int) -> Part:
    found = hashlib.sha256()
    for piece in _pieces(file, size):
        found.update(piece)
    return Part(size, found.hexdigest())


def _pieces(file: BinaryIO, size: int, length: int = _PIECE) -> Iterator[bytes]:
    """The first `size` bytes of a file."""
    file.seek(0)
    for start in range(0, size, length):
        piece = file.read(min(length, size - start))
        if len(piece) != min(length, size - start):
            raise BundleError(f"{file.name} is shorter than it says")
        yield piece


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when it is whole."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


# --- reading -------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[Bundle, Manifest]:
    """What a bundle says; who signed it is not looked at.

    Raises:
        BundleError: it is none.
    """
    try:
        with path.open("rb") as file:
            found = form.read_bundle(_reader(file), path.stat().st_size)
        return found, form.parse_manifest(found.manifest)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except Fault as fault:
        raise BundleError(f"{path} is no bundle: {fault}; build it again") from fault


def verify(path: Path, signers: Path) -> tuple[str, Manifest]:
    """Check a bundle as a unit does: its form, its signature, the digests of its members.

    Args:
        path: the bundle.
        signers: allowed signers of ssh-keygen(1), as the image has them.

    Returns:
        Who signed it, and its manifest.

    Raises:
        BundleError: something does not hold; it says what.
    """
    found, manifest = read(path)
    try:
        principal = signature.verify(found.manifest, found.signature, NAMESPACE, signers)
    except Fault as fault:
        raise BundleError(f"{path}: {fault}") from fault
    with path.open("rb") as file:
        for name, span, part in (("boot", found.boot, manifest.boot), ("root", found.root, manifest.root)):
            if span[1] != part.size or _digest(file, span) != part.sha256:
                raise BundleError(f"{path}: its {name} is not what was signed; build it or fetch it again")
    return principal, manifest


def _digest(file: BinaryIO, span: tuple[int, int]) -> str:
    found, read_at = hashlib.sha256(), _reader(file)
    for offset in range(span[0], sum(span), _PIECE):
        found.update(read_at(min(_PIECE, sum(span) - offset), offset))
    return found.hexdigest()


def _reader(file: BinaryIO) -> form.Read:
    return lambda size, offset: os.pread(file.fileno(), size, offset)
