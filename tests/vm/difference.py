"""Where two builds of an image differ: the partition, the byte in it, the files, and diffoscope's words on them."""

import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from image.manifest import ImageManifest, Partition

_PIECE = 1 << 20

#: What copies a file system's files into a directory, by the kind that the description names.
_OPEN: dict[str, Callable[[Path, Path], list[str | Path]]] = {
    "vfat": lambda file, tree: ["mcopy", "-s", "-n", "-Q", "-m", "-i", file, "::/", tree],
    "squashfs": lambda file, tree: ["unsquashfs", "-quiet", "-no-progress", "-force", "-d", tree, file],
}


def report(one: ImageManifest, other: ImageManifest, folder: Path) -> str:
    """The differences of two images of one layout, a line each; diffoscope's report on the files, if it is there.

    Args:
        one, other: descriptions beside which the images lie.
        folder: an empty directory for what is taken out of them.
    """
    lines = []
    for part in one.partitions:
        place = first_difference(one.image_path, other.image_path, part)
        if place is not None:
            lines.append(f"partition {part.index} ({part.label}) differs, first at byte {place}")
            lines += _files(one.image_path, other.image_path, part, folder)
    return "\n".join(lines) or "the partitions are alike; what differs is outside of them, or beside the image"


def first_difference(one: Path, other: Path, part: Partition) -> int | None:
    """The first byte of a partition that is another one, counted from its start; None if all are alike."""
    with one.open("rb") as left, other.open("rb") as right:
        left.seek(part.start)
        right.seek(part.start)
        for offset in range(0, part.size, _PIECE):
            first, second = left.read(_PIECE), right.read(_PIECE)
            if first != second:
                pairs = enumerate(zip(first, second, strict=True))
                place = offset + next(number for number, (mine, yours) in pairs if mine != yours)
                return place if place < part.size else None
    return None


def _files(one: Path, other: Path, part: Partition, folder: Path) -> Iterator[str]:
    """The files in a partition that differ."""
    if part.type not in _OPEN:
        return
    trees = []
    for name, image in (("one", one), ("other", other)):
        file, tree = folder / f"{part.label}.{name}", folder / name / part.label
        tree.mkdir(parents=True)
        subprocess.run(["dd", f"if={image}", f"of={file}", "bs=1M", f"skip={part.start >> 20}", "conv=sparse",
                        f"count={part.size >> 20}"], check=True, capture_output=True)  # fmt: skip
        subprocess.run(_OPEN[part.type](file, tree), check=True, capture_output=True)
        trees.append(tree)
    names = {path.relative_to(tree) for tree in trees for path in tree.rglob("*")}
    for path in sorted(names):
        left, right = (_seen(tree / path) for tree in trees)
        if left != right:
            what = ", ".join(key for key in sorted({*left, *right}) if left.get(key) != right.get(key))
            yield f"    /{path}: {what}"
            yield from _diffoscope(*(tree / path for tree in trees))


def _seen(path: Path) -> dict[str, object]:
    """What of a file can differ; empty where there is none."""
    try:
        details = path.lstat()
    except FileNotFoundError:
        return {}
    seen: dict[str, object] = {"mode": details.st_mode, "owner": (details.st_uid, details.st_gid),
                               "time": details.st_mtime_ns}  # fmt: skip
    if stat.S_ISREG(details.st_mode):
        seen["content"] = path.read_bytes()
    elif stat.S_ISLNK(details.st_mode):
        seen["target"] = path.readlink()
    return seen


def _diffoscope(one: Path, other: Path) -> Iterator[str]:
    if shutil.which("diffoscope") and one.is_file() and other.is_file():
        command: list[str | Path] = ["diffoscope", "--max-text-report-size", "20000", one, other]
        said = subprocess.run(command, check=False, capture_output=True, text=True).stdout
        yield from (f"        {line}" for line in said.splitlines())
