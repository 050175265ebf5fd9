"""A bundle: one slot as an uncompressed tar (ustar) with exactly four members in this order.

    manifest.json       what the other members are, and for which units; at most 64 KiB
    manifest.json.sig   an OpenSSH signature of manifest.json, namespace picket-os-bundle
    boot                control "autoboot": a FAT image, cut off behind its last used cluster;
                        control "os-prefix": a tar of the slot's boot files
    root                squashfs and its dm-verity hash tree

There is one way to write each header, and no other is taken: a header is checked by making it anew. So there are no
links, devices, paths, sparse files or extensions to be careful with. Pure but for `pread`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .faults import Fault

NAMESPACE: Final = "picket-os-bundle"
FORMAT: Final = 1
BLOCK: Final = 512
MEMBERS: Final = ("manifest.json", "manifest.json.sig", "boot", "root")
CONTROLS: Final = ("autoboot", "os-prefix")

MANIFEST_LIMIT: Final = 64 << 10
SIGNATURE_LIMIT: Final = 16 << 10
#: What an eleven-digit octal number can say.
SIZE_LIMIT: Final = 8**11 - 1

#: Boot files of a slot: how many, and what their names may be.
FILES_LIMIT: Final = 1024
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}(?:/[A-Za-z0-9][A-Za-z0-9._+-]{0,63})?")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9,._+-]{0,63}")
_VERSION: Final = re.compile(r"(?:0|[1-9][0-9]{0,5})(?:\.(?:0|[1-9][0-9]{0,5})){1,3}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_DISK: Final = re.compile(r"[0-9a-f]{8}")
_OCTAL: Final = re.compile(rb"[0-7]{11}\0")

#: Reads up to so many bytes at an offset.
Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Part:
    """What a member must be: bytes and hex SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was signed.

    Attributes:
        product, version: of the image.
        security_version: of the image; a unit that has kept a higher one refuses it.
        agent_security_version: of the agent that the image brings; the agent judges that.
        hardware: device-tree `compatible` strings, of which the board must have one.
        control: how the unit tells its slots apart.
        disk: the signature of the medium on which it looks for its partitions, 8 hex digits.
        boot, root: the members.
        boot_partition_size: of the partition that the FAT was made for, in bytes; 0 with control "os-prefix".
    """

    product: str
    version: str
    security_version: int
    agent_security_version: int
    hardware: tuple[str, ...]
    control: str
    disk: str
    boot: Part
    root: Part
    boot_partition_size: int

    def to_bytes(self) -> bytes:
        """As it is signed: the same manifest gives the same bytes."""
        boot: dict[str, Any] = {"size": self.boot.size, "sha256": self.boot.sha256}
        if self.control == "autoboot":
            boot["partition_size"] = self.boot_partition_size
        value = {
            "format": FORMAT,
            "product": self.product,
            "version": self.version,
            "security_version": self.security_version,
            "agent_security_version": self.agent_security_version,
            "hardware": list(self.hardware),
            "control": self.control,
            "disk": self.disk,
            "boot": boot,
            "root": {"size": self.root.size, "sha256": self.root.sha256},
        }
        return json.dumps(value, indent=1).encode() + b"\n"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose outer form is right; nothing in it is believed yet.

    Attributes:
        manifest: its bytes.
        signature: over them.
        boot, root: where these members begin, and how long they are.
    """

    manifest: bytes
    signature: bytes
    boot: tuple[int, int]
    root: tuple[int, int]


def header(name: str, size: int) -> bytes:
    """The one tar header of a plain file: POSIX ustar, owner root, mode 0644, the time 0."""
    fields = (
        (name.encode(), 100), (b"0000644", 8), (b"0000000", 8), (b"0000000", 8), (b"%011o" % size, 12),
        (b"%011o" % 0, 12), (b" " * 8, 8), (b"0", 1), (b"", 100), (b"ustar", 6), (b"00", 2), (b"", 32), (b"", 32),
        (b"0000000", 8), (b"0000000", 8), (b"", 167),
    )  # fmt: skip
    raw = b"".join(value.ljust(length, b"\0") for value, length in fields)
    return raw[:148] + b"%06o\0 " % sum(raw) + raw[156:]


def padding(size: int) -> int:
    """Zero bytes that follow a member of that size."""
    return -size % BLOCK


#: What ends a tar.
END: Final = bytes(2 * BLOCK)


def read_bundle(read: Read, length: int) -> Bundle:
    """Find the members of a bundle.

    Args:
        read: of the file.
        length: of the file, in bytes.

    Raises:
        Fault: bad-bundle.
    """
    spans = {}
    offset = 0
    limits = (MANIFEST_LIMIT, SIGNATURE_LIMIT, SIZE_LIMIT, SIZE_LIMIT)
    for name, limit in zip(MEMBERS, limits, strict=True):
        start, size = _member(read, offset, length, name)
        if size > limit:
            raise Fault("bad-bundle", f"{name} has {size} bytes, more than any bundle of ours")
        spans[name] = (start, size)
        offset = start + size + padding(size)
        _zeros(read, start + size, padding(size), name)
    _zeros(read, offset, len(END), "the last member")
    if offset + len(END) != length:
        raise Fault("bad-bundle", f"the bundle has {length} bytes, its members {offset + len(END)}")
    manifest, signature = (read(span[1], span[0]) for span in (spans["manifest.json"], spans["manifest.json.sig"]))
    return Bundle(manifest, signature, spans["boot"], spans["root"])


def read_files(read: Read, start: int, size: int) -> list[tuple[str, int, int]]:
    """The boot files in a slot's `boot` tar: name, offset and size of each, in order.

    Raises:
        Fault: bad-bundle.
    """
    files: list[tuple[str, int, int]] = []
    offset, end = start, start + size - len(END)
    while offset < end:
        raw = read(BLOCK, offset)
        name = raw[:100].rstrip(b"\0").decode("ascii", "replace")
        if not _FILE_NAME.fullmatch(name) or len(files) == FILES_LIMIT:
            raise Fault("bad-bundle", f"the slot's boot files have one called {name[:70]!r}, or too many")
        if files and name <= files[-1][0]:
            raise Fault("bad-bundle", f"the slot's boot files are not in order at {name}")
        at, length = _member(read, offset, end, name)
        files.append((name, at, length))
        offset = at + length + padding(length)
    if offset != end or not files:
        raise Fault("bad-bundle", "the slot's boot files do not end where they should")
    _zeros(read, end, len(END), "the slot's boot files")
    return files


def _member(read: Read, offset: int, length: int, name: str) -> tuple[int, int]:
    """Where the content of the member with the header at `offset` is; it must be `name`."""
    raw = read(BLOCK, offset)
    if len(raw) < BLOCK:
        raise Fault("bad-bundle", f"the bundle is cut off before {name}")
    if not _OCTAL.fullmatch(raw[124:136]) or raw != header(name, size := int(raw[124:135], 8)):
        raise Fault("bad-bundle", f"there is no plain {name} where it should be")
    if offset + BLOCK + size > length:
        raise Fault("bad-bundle", f"the bundle is cut off within {name}")
    return offset + BLOCK, size


def _zeros(read: Read, offset: int, size: int, name: str) -> None:
    if read(size, offset) != bytes(size):
        raise Fault("bad-bundle", f"something hides behind {name}")


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in its bytes, whose signature has been checked; foreign all the same.

    Raises:
        Fault: bad-bundle.
    """
    try:
        value = json.loads(data)
        _only(value, "format product version security_version agent_security_version hardware control disk boot root")
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r}")
        control = value["control"]
        if control not in CONTROLS:
            raise ValueError(f"control {control!r}")
        boot, root = value["boot"], value["root"]
        _only(boot, "size sha256" + (" partition_size" if control == "autoboot" else ""))
        _only(root, "size sha256")
        hardware = value["hardware"]
        if not isinstance(hardware, list) or not 1 <= len(hardware) <= 64:
            raise TypeError("hardware")
        return Manifest(
            product=_text(value["product"], _NAME),
            version=_text(value["version"], _VERSION),
            security_version=_count(value["security_version"], 2**31 - 1),
            agent_security_version=_count(value["agent_security_version"], 2**31 - 1),
            hardware=tuple(_text(name, _NAME) for name in hardware),
            control=control,
            disk=_text(value["disk"], _DISK),
            boot=_part(boot),
            root=_part(root),
            boot_partition_size=_count(boot.get("partition_size", 0), SIZE_LIMIT),
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Fault("bad-bundle", f"the manifest makes no sense: {error}") from None


def _only(value: Any, names: str) -> None:
    if not isinstance(value, dict) or set(value) != set(names.split()):
        raise ValueError(f"exactly {names} were expected")


def _part(value: Any) -> Part:
    size = _count(value["size"], SIZE_LIMIT)
    if size < BLOCK or size % BLOCK:
        raise ValueError(f"a member of {size} bytes")
    return Part(size, _text(value["sha256"], _DIGEST))


def _text(value: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise TypeError(f"{value!r:.80}")
    return value


def _count(value: Any, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise TypeError(f"{value!r:.80}")
    return value


@dataclass(frozen=True)
class Unit:
    """What a bundle has to fit.

    Attributes:
        product, control, disk: of the image that runs.
        compatible: the board's device-tree strings.
        floor: the lowest security version that may be installed.
        boot_size, root_size: of the other slot's partitions, in bytes; `boot_size` 0 with control "os-prefix".
    """

    product: str
    control: str
    disk: str
    compatible: tuple[str, ...]
    floor: int
    boot_size: int
    root_size: int


def judge(found: Bundle, manifest: Manifest, unit: Unit) -> None:
    """Refuse a signed bundle that is not for this unit as it is.

    Raises:
        Fault: wrong-product, wrong-hardware, wrong-control, wrong-disk, downgrade, too-large, bad-bundle.
    """
    _is_for(manifest, unit)
    if (found.boot[1], found.root[1]) != (manifest.boot.size, manifest.root.size):
        raise Fault("bad-bundle", "its members are not as long as the manifest says")
    if manifest.root.size > unit.root_size:
        raise Fault("too-large", f"its root has {manifest.root.size} bytes, the slot {unit.root_size}")
    if manifest.control == "autoboot":
        if manifest.boot.size > manifest.boot_partition_size:
            raise Fault("bad-bundle", "its boot files are longer than their own partition")
        if manifest.boot_partition_size > unit.boot_size:
            raise Fault(
                "too-large", f"its boot files want {manifest.boot_partition_size} bytes, the slot has {unit.boot_size}"
            )


def _is_for(manifest: Manifest, unit: Unit) -> None:
    if manifest.product != unit.product:
        raise Fault("wrong-product", f"it is for {manifest.product}, and this unit is a {unit.product}")
    if not set(manifest.hardware) & set(unit.compatible):
        board = ", ".join(unit.compatible) or "unknown"
        raise Fault("wrong-hardware", f"it is for {', '.join(manifest.hardware)}, and this board is {board}")
    if manifest.control != unit.control:
        raise Fault("wrong-control", f"it is for control {manifest.control!r}, and this unit has {unit.control!r}")
    if manifest.disk != unit.disk:
        raise Fault("wrong-disk", f"it looks for medium {manifest.disk}, and this unit's is {unit.disk}")
    if manifest.security_version < unit.floor:
        raise Fault("downgrade", f"its security version is {manifest.security_version}, the floor is {unit.floor}")
