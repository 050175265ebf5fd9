"""What an image is, or what a recipe says, on one page of whole lines, which can be copied.

Digests and UUIDs are cut where a terminal is too narrow for them; the JSON forms cut nothing.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from image import checksums, signing
from image.diff import mebibytes
from image.errors import SigningError
from image.manifest import ImageManifest
from image.recipe import Recipe, Setting


def image_page(manifest: ImageManifest, width: int | None = None) -> Text:
    """An image for a person; `width` is the terminal's in characters, None where nothing has to be cut."""
    signed = signed_by(manifest.directory)
    whole, cut = _lines(manifest, signed, str), _lines(manifest, signed, _short)
    digests = [cell_len(line.plain) for line, short in zip(whole, cut, strict=True) if line.plain != short.plain]
    return Text("\n").join(whole if width is None or max(digests, default=0) <= width else cut)


def _lines(manifest: ImageManifest, signed: str, shown: Callable[[str], str]) -> list[Text]:
    base, support, verity = manifest.base, manifest.support, manifest.verity
    counts = Counter(package.kind for package in manifest.packages)
    rows = {
        "agent": manifest.agent,
        "kernel": manifest.kernel,
        "base": f"{base.kind} {base.suite} {base.architecture}" if base else "none",
        "lock": f"SHA-256 {shown(base.lock_sha256)}" if base else "none",
        "packages": ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())),
        "boards": ", ".join(manifest.boards),
        "hardware": ", ".join(manifest.hardware),
        "boot control": manifest.control or "none: it has no slots",
        "root": f"dm-verity, root hash {shown(verity.root_hash)}" if verity else "not checked",
        "security version": str(manifest.security_version),
        "supported until": str(support.until or "nobody says"),
        "report holes to": support.contact or "nobody says",
        "factory key": manifest.factory_key or "none",
        "signed by": signed,
    }
    grid = _aligned([[name, value] for name, value in rows.items()])
    for line, name in zip(grid, rows, strict=True):
        line.stylize("dim", 0, len(name))
    title = Text(str(manifest), style="bold")
    return [title, *grid, Text(), *_partitions(manifest, shown), Text(), *_files(manifest, shown)]


def image_json(manifest: ImageManifest) -> dict[str, Any]:
    """An image for a program: its description, counts in place of packages, and who signed."""
    counts = Counter(package.kind for package in manifest.packages)
    value = {**json.loads(manifest.dump()), "packages": dict(sorted(counts.items()))}
    try:
        line = checksums.signer(manifest.directory)
    except SigningError:
        line = None
    return {**value, "signed_by": signing.fingerprint(line) if line else None, "directory": str(manifest.directory)}


def signed_by(directory: Path) -> str:
    """Who signed the files of a directory, or why nobody did."""
    try:
        line = checksums.signer(directory)
    except SigningError as error:
        return f"NOBODY: {error}"
    return f"{signing.fingerprint(line)}" if line else "nobody"


def _short(name: str) -> str:
    """The beginning of a digest or UUID: enough to tell two apart by eye."""
    return name if len(name) <= 16 else f"{name[:15]}…"


def _partitions(manifest: ImageManifest, shown: Callable[[str], str]) -> list[Text]:
    rows = [["partition", "start", "size", "type", "label", "uuid"]]
    for part in manifest.partitions:
        place = (mebibytes(part.start), mebibytes(part.size))
        rows.append([str(part.index), *place, part.type, part.label, shown(part.uuid)])
    return _headed(_aligned(rows, right=(0, 1, 2)))


def _files(manifest: ImageManifest, shown: Callable[[str], str]) -> list[Text]:
    files = [one for one in (manifest.image, manifest.compressed, manifest.bmap, manifest.bundle) if one is not None]
    rows = [[one.file, mebibytes(one.size), shown(one.sha256)] for one in files]
    return _headed(_aligned([["file", "size", "SHA-256"], *rows], right=(1,)))


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[Text]:
    """Rows in columns, each row one line however long it is; those of `right` end below one another."""
    rows = [["".join(letter if letter.isprintable() else "?" for letter in cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blank = " " * (width - cell_len(cell))
            cells.append(blank + cell if number in right else cell + blank)
        lines.append(Text("  ".join(cells).rstrip(" ")))
    return lines


def _headed(lines: list[Text]) -> list[Text]:
    lines[0].stylize("bold")
    return lines


# --- recipes ------------------------------------------------------------------------------------------------------


def recipe_page(recipe: Recipe, settings: Sequence[Setting]) -> Text:
    """A recipe for a person: each setting in effect, and the files that made it so."""
    names = _names({file for setting in settings for file in setting.files})
    rows = [
        [setting.key, " + ".join(names[file] for file in setting.files) or "default", _told(setting.value)]
        for setting in settings
    ]
    head, *lines = _headed(_aligned([["setting", "from", "value"], *rows]))
    for line, setting in zip(lines, settings, strict=True):
        line.stylize("" if setting.files else "dim")
    lock = str(recipe.lock) if recipe.lock.exists() else f"{recipe.lock}, which is not there: `make image-lock`"
    title = Text(f"{recipe.name} {recipe.version} as {recipe.file} makes it; its lock is {lock}", style="bold")
    return Text("\n").join([title, head, *lines])


def _names(files: Iterable[Path]) -> dict[Path, str]:
    """Files by as much of the end of their paths as tells them apart."""
    paths = {file: Path(os.path.realpath(file)) for file in files}
    names = {}
    for file, path in paths.items():
        others = {other for other in paths.values() if other != path}
        length = 1
        while any(other.parts[-length:] == path.parts[-length:] for other in others):
            length += 1
        names[file] = "/".join(path.parts[-length:]).replace("//", "/")
    return names


def recipe_json(recipe: Recipe, settings: Sequence[Setting]) -> dict[str, Any]:
    """A recipe for a program."""
    return {
        "recipe": str(recipe.file),
        "lock": str(recipe.lock),
        "settings": {
            setting.key: {"value": _plain(setting.value), "from": [str(file) for file in setting.files]}
            for setting in settings
        },
    }


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(str(item) for item in value) or "none"
    return "none" if value in {None, ""} else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return value if value is None or isinstance(value, (str, int)) else str(value)
