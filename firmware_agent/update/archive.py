"""The archive of a release: a tar that has exactly one form, so that its sha256 can be the release's identity.

The form: regular files only; `manifest.json` first, then the others in the order of their names; mode 0555 where the
owner may execute, else 0444; owner 0, group 0, time 0, no names of owners; POSIX ustar headers without extensions; two
empty blocks at the end and nothing behind them. Directories are implied by the names of files.

A tar is read by the same rule: a header is accepted only if writing it anew gives the same 512 bytes. So there is no
room for links, devices, absolute names, extensions or oddities of one tar program, and a release on the disk yields the
very bytes that it was unpacked from (`write_tree`), which is what a delta needs as its base.

The headers are put together here, not by `tarfile`: the bytes are the identity of a release for ever, on whatever
version of Python. Any tar program reads them.

A compressed archive (`.tar.zst`) is one zstd frame; its window is small enough for a unit (`WINDOW_BYTES`).
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from firmware_agent import files
from firmware_agent.digests import sha256
from firmware_agent.update import BadArchive

MANIFEST: Final = "manifest.json"

#: The signed chunks of a payload (archive or delta).
CHUNK_BYTES: Final = 1 << 20

#: What a unit accepts at most, whatever was signed.
MAX_TAR_BYTES: Final = 128 << 20
MAX_FILES: Final = 20_000
MAX_MANIFEST_BYTES: Final = 64 << 10

#: zstd's window: what unpacking costs in memory.
WINDOW_BYTES: Final = 8 << 20
LEVEL: Final = 19

_BLOCK: Final = 512
_PIECE: Final = 256 << 10
_END: Final = bytes(2 * _BLOCK)

_VERSION: Final = re.compile(r"(?:0|[1-9][0-9]{0,5})(?:\.(?:0|[1-9][0-9]{0,5})){1,3}")
_PYTHON: Final = re.compile(r"3\.[0-9]{1,3}")
_WORD: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z,._+-]{0,127}")


def release_name(version: str, sha256: str) -> str:
    """The name of a release's directory: its version and the first 8 hex digits of its tar's sha256."""
    return f"{version}-{sha256[:8]}"


@dataclass(frozen=True)
class Digest:
    """What identifies a tar: sha256 in hex, and the size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What a release says about itself.

    Attributes:
        hardware: device-tree `compatible` strings; one of them must be the board's.
        python: the version of Python that `lib/` was built for, or None where the archive brings no packages.
        min_from: the oldest version that can be updated to this one, or None.
    """

    product: str
    version: str
    security_version: int
    hardware: tuple[str, ...]
    python: str | None = None
    min_from: str | None = None

    def __post_init__(self) -> None:
        if not _is_word(self.product):
            raise BadArchive(f"the manifest's product is {self.product!r}")
        for name, value in (("version", self.version), ("min_from", self.min_from)):
            if not _is_version(value) and (name == "version" or value is not None):
                raise BadArchive(f"the manifest's {name} is {value!r}, and not two to four numbers like 1.2.0")
        if type(self.security_version) is not int or not 0 <= self.security_version < 1 << 31:
            raise BadArchive(f"the manifest's security_version is {self.security_version!r}")
        if not self.hardware or not all(_is_word(name) for name in self.hardware):
            raise BadArchive(f"the manifest's hardware is {self.hardware!r}")
        if self.python is not None and not (isinstance(self.python, str) and _PYTHON.fullmatch(self.python)):
            raise BadArchive(f"the manifest's python is {self.python!r}")

    @classmethod
    def parse(cls, data: bytes) -> "Manifest":
        """A manifest in its canonical JSON.

        Raises:
            BadArchive: it is none; keys are missing, unknown or of the wrong type; or the JSON is not canonical.
        """
        try:
            value = json.loads(data)
        except ValueError as error:
            raise BadArchive(f"the manifest is no JSON: {error}") from None
        except RecursionError:
            raise BadArchive("the manifest is nested too deeply") from None
        if not isinstance(value, dict) or value.pop("format", None) != 1 or not isinstance(value.get("hardware"), list):
            raise BadArchive("not a manifest of format 1")
        try:
            manifest = cls(**value | {"hardware": tuple(value["hardware"])})
        except TypeError as error:
            raise BadArchive(f"the manifest has not the keys of format 1: {error}") from None
        if manifest.to_bytes() != data:
            raise BadArchive("the manifest is not in canonical JSON")
        return manifest

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII."""
        value = {
            "format": 1,
            "product": self.product,
            "version": self.version,
            "security_version": self.security_version,
            "hardware": list(self.hardware),
            "python": self.python,
            "min_from": self.min_from,
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(_WORD.fullmatch(value))


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and bool(_VERSION.fullmatch(value))


# --- headers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One file of an archive."""

    name: str
    size: int
    executable: bool

    @property
    def mode(self) -> int:
        """The file's permissions."""
        return 0o555 if self.executable else 0o444

    @property
    def padding(self) -> int:
        """Bytes of zero behind the content."""
        return -self.size % _BLOCK

    def header(self) -> bytes:
        """The member's 512 bytes (POSIX.1-1988 ustar).

        Raises:
            BadArchive: the name does not fit.
        """
        prefix, name = _split(self.name)
        block = b"".join(
            [
                name.ljust(100, b"\0"),
                b"%07o\0" % self.mode,
                b"0000000\0",  # owner
                b"0000000\0",  # group
                b"%011o\0" % self.size,
                b"00000000000\0",  # time
                b"        ",  # the checksum is taken with spaces in its place
                b"0",  # a regular file
                bytes(100),  # no link
                b"ustar\00000",
                bytes(32 + 32 + 8 + 8),  # no names of owner and group, no device
                prefix.ljust(155, b"\0"),
                bytes(12),
            ]
        )
        return block[:148] + b"%06o\0 " % sum(block) + block[156:]

    @classmethod
    def parse(cls, block: bytes) -> "Member":
        """The member that has exactly this header.

        Raises:
            BadArchive: no member has.
        """
        try:
            name = block[:100].rstrip(b"\0").decode("ascii")
            prefix = block[345:500].rstrip(b"\0").decode("ascii")
            member = cls(f"{prefix}/{name}" if prefix else name, int(block[124:135], 8), block[100:107] == b"0000555")
        except ValueError:
            raise BadArchive("a header of the archive is damaged") from None
        if member.size < 0 or member.header() != block:
            raise BadArchive(f"{member.name!r} in the archive is no plain file in canonical form")
        return member


def _split(name: str) -> tuple[bytes, bytes]:
    """A name as prefix and rest, the prefix as short as it can be; checks that it is one that we let on a disk."""
    parts = name.split("/")
    if not name.isascii() or not name.isprintable() or any(part in {"", ".", ".."} for part in parts):
        raise BadArchive(f"{name!r} is no name for a file in an archive")
    for count in range(len(parts)):
        prefix, rest = "/".join(parts[:count]), "/".join(parts[count:])
        if len(rest) <= 100 and len(prefix) <= 155:
            return prefix.encode(), rest.encode()
    raise BadArchive(f"{name!r} is too long for an archive")


def _position(name: str) -> tuple[bool, str]:
    return name != MANIFEST, name


# --- writing ------------------------------------------------------------------------------------------------------


def members(tree: Path) -> list[Member]:
    """The files under `tree` as members, in their order.

    Raises:
        BadArchive: there is no manifest, or something that is neither file nor directory.
    """
    found = []
    for path in tree.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BadArchive(f"{path} is neither file nor directory")
        if path.is_file():
            status = path.stat()
            found.append(Member(path.relative_to(tree).as_posix(), status.st_size, bool(status.st_mode & 0o100)))
    found.sort(key=lambda member: _position(member.name))
    if not found or found[0].name != MANIFEST:
        raise BadArchive(f"{tree} has no {MANIFEST}")
    return found


def pieces(tree: Path) -> Iterator[bytes]:
    """The canonical tar of `tree`, piece by piece; of an installed release, the very tar that it came from.

    Raises:
        BadArchive: the tree cannot be an archive, or changes under our hands.
    """
    for member in members(tree):
        yield member.header()
        left = member.size
        with (tree / member.name).open("rb") as source:
            while piece := source.read(_PIECE):
                left -= len(piece)
                yield piece
        if left:
            raise BadArchive(f"{tree / member.name} changed while it was read")
        yield bytes(member.padding)
    yield _END


def write_tree(tree: Path, output: IO[bytes]) -> Digest:
    """Write the canonical tar of `tree` to `output`.

    Raises:
        BadArchive: the tree cannot be an archive.
    """
    hashed, size = sha256(), 0
    for piece in pieces(tree):
        output.write(piece)
        hashed.update(piece)
        size += len(piece)
    return Digest(hashed.hexdigest(), size)


def digest(tree: Path) -> Digest:
    """The identity of the release in `tree`: what its canonical tar would be.

    Raises:
        BadArchive: the tree cannot be an archive.
        OSError: it cannot be read.
    """
    hashed, size = sha256(), 0
    for piece in pieces(tree):
        hashed.update(piece)
        size += len(piece)
    return Digest(hashed.hexdigest(), size)


def compress(tar: IO[bytes], output: IO[bytes], size: int) -> None:
    """Compress a tar of `size` bytes: the same bytes for the same tar and the same version of zstd.

    Raises:
        ValueError: the tar has another size.
    """
    import zstandard  # noqa: PLC0415 - only while an archive is handled

    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, window_log=WINDOW_BYTES.bit_length() - 1, write_checksum=False, write_content_size=True, threads=0
    )
    try:
        zstandard.ZstdCompressor(compression_params=parameters).copy_stream(tar, output, size=size)
    except zstandard.ZstdError as error:
        raise ValueError(f"the tar has not {size} bytes: {error}") from None


def chunk_digests(payload: IO[bytes], chunk_bytes: int = CHUNK_BYTES) -> list[str]:
    """The sha256 (hex) of each chunk of a payload; the last may be shorter."""
    found = []
    while chunk := payload.read(chunk_bytes):
        found.append(sha256(chunk).hexdigest())
    return found


# --- reading ------------------------------------------------------------------------------------------------------


def decompress(source: IO[bytes]) -> IO[bytes]:
    """The tar within a `.tar.zst`, as a stream; memory is bounded by `WINDOW_BYTES`.

    Reading from it raises BadArchive for what is no zstd frame, or one that wants a larger window.
    """
    import zstandard  # noqa: PLC0415

    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
    return Frame(decompressor.stream_reader(source, read_size=_PIECE), BadArchive)


class Frame(io.RawIOBase, IO[bytes]):
    """A zstd stream whose errors are ours."""

    def __init__(self, reader: Any, fault: type[Exception]) -> None:
        super().__init__()
        self._reader = reader
        self._fault = fault

    def readable(self) -> bool:
        """It can be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; none at the end."""
        import zstandard  # noqa: PLC0415

        try:
            data: bytes = self._reader.read(size)
        except zstandard.ZstdError as error:
            raise self._fault(f"the compressed data are damaged: {error}") from None
        return data


class _Counted:
    """Reads exactly, counts and hashes; refuses to read beyond `limit`."""

    def __init__(self, source: IO[bytes], limit: int) -> None:
        self._source = source
        self._sha256 = sha256()
        self._left = limit
        self.size = 0

    def exactly(self, count: int) -> bytes:
        if count > self._left:
            raise BadArchive("the archive is longer than was signed")
        collected = bytearray()
        while len(collected) < count:
            piece = self._source.read(count - len(collected))
            if not piece:
                raise BadArchive("the archive ends in its middle")
            collected += piece
        self._left -= count
        self.size += count
        data = bytes(collected)
        self._sha256.update(data)
        return data

    def content(self, count: int) -> Iterator[bytes]:
        while count:
            piece = self.exactly(min(count, _PIECE))
            count -= len(piece)
            yield piece

    def finish(self) -> Digest:
        if self._source.read(1):
            raise BadArchive("there is something behind the end of the archive")
        return Digest(self._sha256.hexdigest(), self.size)


def _walk(source: _Counted) -> Iterator[Member]:
    """The members of a tar in turn; the caller reads each one's content before it asks for the next."""
    before: tuple[bool, str] | None = None
    names: set[str] = set()
    while True:
        block = source.exactly(_BLOCK)
        if not any(block):
            break
        member = Member.parse(block)
        position = _position(member.name)
        if before is None and member.name != MANIFEST:
            raise BadArchive(f"the archive begins with {member.name!r}, not with {MANIFEST}")
        if before is not None and position <= before:
            raise BadArchive(f"{member.name!r} is twice in the archive, or not in its place")
        if not names.isdisjoint(str(folder) for folder in Path(member.name).parents):
            raise BadArchive(f"{member.name!r} lies below a file")
        if len(names) == MAX_FILES:
            raise BadArchive(f"the archive has more than {MAX_FILES} files")
        before = position
        names.add(member.name)
        yield member
        if any(source.exactly(member.padding)):
            raise BadArchive(f"the padding of {member.name!r} is not empty")
    if before is None or any(source.exactly(_BLOCK)):
        raise BadArchive("the archive has no proper end")


def unpack(tar: IO[bytes], into: Path, expected: Digest) -> Manifest:
    """Unpack a tar into the new directory `into` and make it durable, all but its name.

    Nothing in it may be trusted, and the caller gives it no proper name, before this has returned.

    Raises:
        BadArchive: it is not canonical, or not the expected one. `into` is left as it is then.
        OSError: the disk is full, or `into` is there already.
    """
    if expected.size > MAX_TAR_BYTES:
        raise BadArchive(f"the archive would have {expected.size} bytes unpacked; {MAX_TAR_BYTES} are allowed")
    source = _Counted(tar, expected.size)
    files.make_directory(into)
    made = {into}
    manifest: Manifest | None = None
    for member in _walk(source):
        path = into / member.name
        for folder in reversed(path.parents[: len(path.relative_to(into).parts)]):
            if folder not in made:
                files.make_directory(folder)
                made.add(folder)
        if manifest is None:
            if member.size > MAX_MANIFEST_BYTES:
                raise BadArchive("the manifest is too long")
            data = source.exactly(member.size)
            manifest = Manifest.parse(data)
            files.create(path, [data], member.mode)
        else:
            files.create(path, source.content(member.size), member.mode)
    found = source.finish()
    if found != expected or manifest is None:
        raise BadArchive(f"the archive is {found.sha256} of {found.size} bytes, not {expected.sha256}")
    files.sync_tree(into)
    return manifest
