"""What changed from one image to another: what the descriptions say, packages, files, sizes.

`changes` reads two images; comparing and showing are functions of what was read.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from image import inside
from image.bundle import used_length
from image.disk import VERITY_BLOCK
from image.inside import File
from image.manifest import ImageManifest, Package

#: How many lines of a list are shown where not all are asked for.
SHORT: Final = 20

#: Fields that list words.
_LISTS: Final = frozenset({"boards", "hardware"})

#: What can differ about a file, in the order in which it is told.
_ASPECTS: Final[Mapping[str, Callable[[File], object]]] = {
    "kind": lambda file: file.kind,
    "content": lambda file: file.sha256,
    "target": lambda file: file.target,
    "mode": lambda file: file.mode,
    "owner": lambda file: (file.owner, file.group),
}


@dataclass(frozen=True)
class Field:
    """Something that the two descriptions say differently."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class PackageChange:
    """A package's versions, joined by commas if there are several; None where there is none."""

    kind: str
    name: str
    old: str | None
    new: str | None


@dataclass(frozen=True)
class FileChange:
    """A file before and after; None where there is none.

    Attributes:
        path: in the root; in a boot partition, behind its label: `PICKETBOOT:/config.txt`.
        old: before.
        new: after.
        aspects: what differs of a file that is in both: kind, content, target, mode, owner.
    """

    path: str
    old: File | None
    new: File | None
    aspects: tuple[str, ...]

    @property
    def grown(self) -> int:
        """By how many bytes."""
        return (self.new.size if self.new else 0) - (self.old.size if self.old else 0)


@dataclass(frozen=True)
class Move:
    """A folder that has another name, and mostly the same in it: its files are compared under the new name."""

    old: str
    new: str


@dataclass(frozen=True)
class SizeChange:
    """Bytes of something; None where there is none."""

    name: str
    old: int | None
    new: int | None


@dataclass(frozen=True)
class Changes:
    """From one image to another: all that differs, and all sizes."""

    old: str
    new: str
    fields: tuple[Field, ...]
    packages: tuple[PackageChange, ...]
    moves: tuple[Move, ...]
    files: tuple[FileChange, ...]
    sizes: tuple[SizeChange, ...]

    @property
    def nothing(self) -> bool:
        """Whether the two are the same."""
        return not (self.fields or self.packages or self.moves or self.files)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        value = asdict(self)
        for change in value["files"]:
            for side in ("old", "new"):
                if change[side]:
                    del change[side]["path"]
                    change[side]["mode"] = f"{change[side]['mode']:04o}"
        return value


def changes(old: ImageManifest, new: ImageManifest) -> Changes:
    """Compare two images.

    Raises:
        ManifestError: one is not there, or is not what its description says.
    """
    (old_files, old_sizes), (new_files, new_sizes) = _read(old), _read(new)
    old_files, moves = follow_moves(old_files, new_files)
    return Changes(
        str(old),
        str(new),
        tuple(compare_fields(old, new)),
        tuple(compare_packages(old.packages, new.packages)),
        tuple(moves),
        tuple(compare_files(old_files, new_files)),
        tuple(SizeChange(name, old_sizes.get(name), new_sizes.get(name)) for name in {**old_sizes, **new_sizes}),
    )


def _read(manifest: ImageManifest) -> tuple[dict[str, File], dict[str, int]]:
    """The files of an image by path, and sizes by what they are of."""
    sizes = {"image": manifest.image.size}
    for name, shipped in (("compressed", manifest.compressed), ("bundle", manifest.bundle)):
        if shipped is not None:
            sizes[name] = shipped.size
    files: dict[str, File] = {}
    with inside.raw(manifest) as image:
        for part in manifest.partitions:
            if part.type == "vfat":
                files |= {f"{part.label}:{file.path}": file for file, _ in inside.files_of_fat(image, part)}
                sizes[part.label] = _used(image, part.start)
            elif part.type == "squashfs":
                found = {file.path: file for file, _ in inside.files_of_root(image, part)}
                sizes["files of the root"] = sum(file.size for file in found.values())
                files |= found
    if manifest.verity is not None:
        sizes["root"] = manifest.verity.blocks * VERITY_BLOCK
    return files, sizes


def _used(image: Path, start: int) -> int:
    """Bytes of a FAT up to its last used cluster, which is what a bundle carries."""
    with image.open("rb") as file:
        return used_length(lambda size, offset: os.pread(file.fileno(), size, start + offset))


# --- comparing ----------------------------------------------------------------------------------------------------


def compare_fields(old: ImageManifest, new: ImageManifest) -> Iterator[Field]:
    """What the descriptions say differently; digests and sizes aside."""
    before, after = _fields(old), _fields(new)
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            yield Field(name, before.get(name, "-"), after.get(name, "-"))


def _fields(manifest: ImageManifest) -> dict[str, str]:
    base = manifest.base
    return {
        "name": manifest.name,
        "version": manifest.version,
        "agent": manifest.agent,
        "kernel": manifest.kernel,
        "security version": str(manifest.security_version),
        "base": f"{base.kind} {base.suite} {base.architecture}" if base else "-",
        "lock": base.lock_sha256[:16] if base else "-",
        "boards": " ".join(manifest.boards),
        "hardware": " ".join(manifest.hardware),
        "boot control": manifest.control or "-",
        "root hash": manifest.verity.root_hash[:16] if manifest.verity else "-",
        "supported until": str(manifest.support.until or "-"),
        "contact": manifest.support.contact or "-",
        "factory key": manifest.factory_key or "-",
        **{
            f"partition {part.index}": f"{part.type} {part.label} {part.size >> 20} MiB at {part.start >> 20} MiB"
            for part in manifest.partitions
        },
    }


def compare_packages(old: Sequence[Package], new: Sequence[Package]) -> Iterator[PackageChange]:
    """Packages that came, went or have another version, by kind and name."""
    before, after = _versions(old), _versions(new)
    for kind, name in sorted({*before, *after}):
        was, now = before.get((kind, name)), after.get((kind, name))
        if was != now:
            yield PackageChange(kind, name, was, now)


def _versions(packages: Sequence[Package]) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], list[str]] = {}
    for package in packages:
        found.setdefault((package.kind, package.name), []).append(package.version)
    return {key: ", ".join(sorted(versions)) for key, versions in found.items()}


def follow_moves(old: Mapping[str, File], new: Mapping[str, File]) -> tuple[dict[str, File], list[Move]]:
    """The old files, under their new paths where a folder was renamed.

    The kernel's modules and the agent's releases lie in folders that are named after versions.
    """
    followed, moves = dict(old), list[Move]()
    while move := _moved(followed, new):
        inside_old = f"{move.old}/"
        followed = {
            move.new + path.removeprefix(move.old) if path == move.old or path.startswith(inside_old) else path: file
            for path, file in followed.items()
        }
        moves.append(move)
    return followed, moves


def _moved(old: Mapping[str, File], new: Mapping[str, File]) -> Move | None:
    """A folder that went, and one that came beside it with more than half of the same names in it."""
    gone, came = _folders(old, new), _folders(new, old)
    for left, names in gone.items():
        parent = left.rpartition("/")[0]
        for right, others in came.items():
            if right.rpartition("/")[0] == parent and 2 * len(names & others) > len(names | others):
                return Move(left, right)
    return None


def _folders(here: Mapping[str, File], there: Mapping[str, File]) -> dict[str, set[str]]:
    """The folders that are here alone, in one that is in both, and the names of all in them."""
    alone = [
        path
        for path, file in here.items()
        if file.kind == "d" and path not in there and (path.rpartition("/")[0] or "/") in there
    ]
    return {folder: {path.removeprefix(folder) for path in here if path.startswith(f"{folder}/")} for folder in alone}


def compare_files(old: Mapping[str, File], new: Mapping[str, File]) -> Iterator[FileChange]:
    """Files that came, went or are others, by path."""
    for path in sorted({*old, *new}):
        was, now = old.get(path), new.get(path)
        if was is None or now is None:
            yield FileChange(path, was, now, ())
        elif aspects := tuple(name for name, of in _ASPECTS.items() if of(was) != of(now)):
            yield FileChange(path, was, now, aspects)


# --- showing ------------------------------------------------------------------------------------------------------


def show(found: Changes, *, whole: bool = False) -> RenderableType:
    """The changes for a person: a summary first, then each list, cut where it is long.

    Args:
        found: the changes.
        whole: cut nothing.
    """
    parts: list[RenderableType] = [Text(f"{found.old} -> {found.new}", style="bold")]
    if found.nothing:
        return Group(*parts, Text("nothing changed"))
    parts += [
        Text(f"packages: {_counted(found.packages)}"),
        Text(f"files: {_counted(found.files)}{f' (folders renamed: {len(found.moves)})' if found.moves else ''}"),
        _sizes(found.sizes),
    ]
    limit = None if whole else SHORT
    for title, lines in (
        (
            "What the descriptions say",
            [_field_line(field) for field in found.fields],
        ),
        ("Packages", [_package_line(change) for change in found.packages]),
        ("Files", [*map(_move_line, found.moves), *map(_file_line, found.files)]),
    ):
        if lines:
            parts += [Text(""), Text(title, style="bold"), *lines[:limit]]
            if limit is not None and len(lines) > limit:
                parts.append(Text(f"    and {len(lines) - limit} more: --all", style="dim"))
    return Group(*parts)


def _sizes(sizes: Sequence[SizeChange]) -> Table:
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "right"):
        table.add_column(justify=justify)
    for size in sizes:
        moved = (size.new or 0) - (size.old or 0)
        style = "" if not moved else "yellow" if moved > 0 else "green"
        table.add_row(size.name, mebibytes(size.old), mebibytes(size.new), Text(_signed(moved), style=style))
    return table


def _counted(changed: Sequence[PackageChange] | Sequence[FileChange]) -> str:
    added = sum(change.old is None for change in changed)
    removed = sum(change.new is None for change in changed)
    return f"{added} added, {removed} removed, {len(changed) - added - removed} changed" if changed else "as before"


def _field_line(field: Field) -> Text:
    if field.name not in _LISTS:
        return _whole(f"    {field.name}: {field.old} -> {field.new}")
    old, new = field.old.split(), field.new.split()
    words = [*(f"+{word}" for word in new if word not in old), *(f"-{word}" for word in old if word not in new)]
    return _whole(f"    {field.name}: {' '.join(words) or 'in another order'}")


def _package_line(change: PackageChange) -> Text:
    name = f"{change.kind} {change.name}"
    if change.old is None:
        return Text(f"  + {name} {change.new}", style="green")
    if change.new is None:
        return Text(f"  - {name} {change.old}", style="red")
    return Text(f"    {name} {change.old} -> {change.new}")


def _move_line(move: Move) -> Text:
    return _whole(f"    {_printable(move.old)} -> {_printable(move.new.rpartition('/')[2])}", "cyan")


def _file_line(change: FileChange) -> Text:
    path = _printable(change.path)
    if change.old is None and change.new is not None:
        return _whole(f"  + {path}{_weight(change.new)}", "green")
    if change.new is None and change.old is not None:
        return _whole(f"  - {path}{_weight(change.old)}", "red")
    return _whole(f"    {path}: {', '.join(_told(change))}")


def _whole(line: str, style: str = "") -> Text:
    """A line that can be copied, however long it is."""
    return Text(line, style, no_wrap=True, overflow="ignore")


def _weight(file: File) -> str:
    return f" ({file.size:,} bytes)" if file.kind == "-" else ""


def _told(change: FileChange) -> Iterator[str]:
    """Each aspect, with the values where they are short."""
    assert change.old is not None  # noqa: S101 - for the type checker
    assert change.new is not None  # noqa: S101
    for aspect in change.aspects:
        if aspect == "content" and change.grown:
            yield f"content ({change.grown:+,} bytes)"
        elif aspect == "mode":
            yield f"mode {change.old.mode:04o} -> {change.new.mode:04o}"
        elif aspect == "owner":
            owners = (f"{file.owner}:{file.group}" for file in (change.old, change.new))
            yield f"owner {' -> '.join(owners)}"
        elif aspect == "target" and change.old.kind == change.new.kind:
            yield f"target {_printable(change.old.target)} -> {_printable(change.new.target)}"
        else:
            yield aspect


def _printable(name: str) -> str:
    """A name of a file, of which nothing may steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def mebibytes(size: int | None) -> str:
    """Bytes for a person."""
    if size is None:
        return "-"
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 // 10 or not size else f"{size / 2**10:,.1f} KiB"


def _signed(moved: int) -> str:
    if not moved:
        return "="
    return f"{moved / 2**20:+,.1f} MiB" if abs(moved) >= 2**20 // 10 else f"{moved:+,} bytes"
