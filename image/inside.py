"""What lies inside a built image, without mounting it: every file of its root and of its boot partitions, with content.

unsquashfs(1) writes a file system as one stream: a list of what is there, then the content of all files, one behind the
other (squashfs-tools' "pseudo file", 4.5 and newer). FATs are read by the emulated firmware's reader.
"""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

from image.disk import data_ranges
from image.errors import CommandFailedError, DiskFullError, ManifestError
from image.firmware import FileMedium, NoBootError
from image.firmware.fat import Fat
from image.manifest import ImageManifest, Partition
from image.run import run, tool

_DATA: Final = b"# START OF DATA - DO NOT MODIFY\n"

#: One line of the list: name, kind, the rest; a backslash makes the next character a plain one. Names of several lines
#: cannot be told in that form, and there are none.
_LINE: Final = re.compile(rb"((?:\\.|[^\\ ])+) ([A-Za-z]) (.*)\n")
_ESCAPED: Final = re.compile(rb"\\(.)")

#: Letters of the list, and how `ls` shows the same.
_KINDS: Final = {b"R": "-", b"D": "d", b"S": "l", b"B": "b", b"C": "c", b"I": "p"}


@dataclass(frozen=True)
class File:
    """A file, or what else has a name, as `ls -ln` shows it.

    Attributes:
        path: from the top of the file system, beginning with a slash.
        kind: the first letter there: - d l b c p.
        mode: permissions, set-id and sticky bits.
        owner: by number, as is `group`.
        group: ... of the file.
        size: of a plain file, in bytes.
        sha256: of a plain file's content, in hex.
        target: of a symbolic link; a device's numbers.
    """

    path: str
    kind: str
    mode: int
    owner: int
    group: int
    size: int = 0
    sha256: str = ""
    target: str = ""


@contextmanager
def raw(manifest: ImageManifest) -> Iterator[Path]:
    """The raw image; unpacked for the time being where only the compressed one is there.

    Raises:
        ManifestError: neither is there, what is there is not as long as the description says, or the compressed one is
            damaged.
        DiskFullError: there is no room to unpack it.
    """
    packed = manifest.directory / manifest.compressed.file if manifest.compressed else None
    with tempfile.TemporaryDirectory(prefix="picket-image-") as folder:
        image = manifest.image_path
        if not image.is_file():
            if packed is None or manifest.compressed is None or not packed.is_file():
                names = f"neither {image.name} nor {packed.name}" if packed else f"no {image.name}"
                them = "them" if packed else "it"
                raise ManifestError(f"{manifest.directory} holds {names}; `make image` makes {them}")
            _check_size(packed, manifest.compressed.size)
            image = Path(folder, manifest.image.file)
            _unpack(packed, image)
        _check_size(image, manifest.image.size)
        yield image


def _check_size(path: Path, expected: int) -> None:
    if (size := path.stat().st_size) != expected:
        raise ManifestError(f"{path} has {size} bytes, its description says {expected}; build or fetch it again")


def _unpack(packed: Path, image: Path) -> None:
    try:
        run("zstd", "-q", "-d", "--sparse", packed, "-o", image)
    except CommandFailedError as error:
        if "No space left on device" in str(error):
            raise DiskFullError(
                f"there is no room in {image.parent.parent} to unpack {packed.name}: make some, or name another"
                " directory by TMPDIR"
            ) from error
        words = str(error).splitlines()[-1].rpartition(": ")[2].strip()
        raise ManifestError(
            f"{packed} cannot be unpacked: it is damaged, or no zstd ({words:.100}); build or fetch it again"
        ) from error


def first_used(image: Path, part: Partition) -> int | None:
    """Where in a partition the first byte lies that is not 0; None where there is none."""
    with image.open("rb") as file:
        for start, end in data_ranges(file.fileno()):
            place = max(start, part.start)
            file.seek(place)
            while place < min(end, part.start + part.size):
                block = file.read(min(1 << 20, min(end, part.start + part.size) - place))
                if block.strip(b"\0"):
                    return place - part.start + len(block) - len(block.lstrip(b"\0"))
                place += len(block)
    return None


def files_of_fat(image: Path, part: Partition) -> Iterator[tuple[File, bytes]]:
    """Everything in a FAT, sorted by path, and each file's content.

    Raises:
        ManifestError: it is no FAT, or a damaged one.
    """
    try:
        with FileMedium(image) as medium:
            fat = Fat(medium, part.start, part.size)
            for path, entry in sorted(fat.walk(), key=lambda found: found[0]):
                data = b"" if entry.folder else fat.read(path) or b""
                file = File(f"/{path}", "d" if entry.folder else "-", 0o755, 0, 0)
                yield file if entry.folder else _weighed(file, data), data
    except NoBootError as error:
        raise ManifestError(f"{image}: partition {part.index}: {error}; build or fetch the image again") from error


def files_of_root(image: Path, part: Partition) -> Generator[tuple[File, bytes]]:
    """Everything in a squashfs, sorted by path, and each file's content (with the first of its names alone).

    Raises:
        ManifestError: it is no squashfs, or a damaged one.
    """
    command = [
        tool("unsquashfs"),
        "-quiet",
        "-no-progress",
        "-pf",
        "/dev/stdout",
        "-offset",
        str(part.start),
        str(image),
    ]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said) as unsquashfs,
    ):
        assert unsquashfs.stdout is not None  # noqa: S101 - a pipe was asked for
        try:
            yield from _listed(unsquashfs.stdout)
            whole = unsquashfs.stdout.read(1) == b"" and unsquashfs.wait() == 0
        except EOFError:
            whole = False
        finally:
            unsquashfs.kill()  # whoever stops reading has no use for the rest
        if not whole:
            said.seek(0)
            words = " ".join(said.read().decode(errors="replace").split()) or "it ends early"
            raise ManifestError(
                f"{image}: partition {part.index} holds no squashfs that can be read to its end ({words:.200}); build"
                " or fetch the image again"
            )


def _listed(stream: IO[bytes]) -> Iterator[tuple[File, bytes]]:
    """The files of unsquashfs's stream, and their content.

    Raises:
        EOFError: it ends too early.
    """
    lines = []
    while (line := stream.readline()) != _DATA:
        if not line:
            raise EOFError
        lines.append(line)
    stream.readline()  # "#"
    found: dict[str, File] = {}
    for match in filter(None, map(_LINE.fullmatch, lines)):
        path, kind, rest = _path(match[1]), match[2], match[3]
        if kind == b"L":  # another name of one before it
            file = replace(found[_path(rest)], path=path)
        elif kind in _KINDS:
            file = _file(path, _KINDS[kind], rest)
        else:
            continue  # an extended attribute
        content = b""
        if kind == b"R":
            content = stream.read(file.size)
            if len(content) != file.size:
                raise EOFError
            file = _weighed(file, content)
        found[path] = file
        yield file, content


def _path(escaped: bytes) -> str:
    return "/" + _ESCAPED.sub(rb"\1", escaped).decode(errors="surrogateescape").lstrip("/")


def _file(path: str, kind: str, rest: bytes) -> File:
    """One line of the list: time, mode, owner, group, and what belongs to the kind."""
    _, mode, owner, group, *more = rest.split(b" ", 4)
    last = more[0].decode(errors="surrogateescape") if more else ""
    size = int(last.split()[0]) if kind == "-" else 0
    target = last.replace(" ", ":") if kind in "bc" else last if kind == "l" else ""
    return File(path, kind, int(mode, 8), int(owner), int(group), size, target=target)


def _weighed(file: File, content: bytes) -> File:
    return replace(file, size=len(content), sha256=hashlib.sha256(content).hexdigest())
