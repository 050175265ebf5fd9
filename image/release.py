"""The agent's releases: a tree, its archive, the deltas that lead to it, and the description that is signed.

The same source gives the same bits, whoever builds it, when and where: the tree holds no times, owners or places of
this machine, the tar has one form only (`firmware_agent.update.archive`), and byte code is compiled by the device's
Python from files in a fixed order, for the place where the device has them.

    <output>/picket-agent-1.2.0.tar.zst                   the archive
    <output>/picket-agent-1.2.0.from-0f3a9c11.zpatch      a delta from the release whose tar has that digest
    <output>/release.json                                 what `cloud.repository` lists and signs

A release for a device brings its packages (`lib/`). One for the simulated board does not: that board runs on the
packages of the station.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firmware_agent.update import BadArchive, archive, delta
from image.base import Base
from image.errors import ImageError
from image.python import PYTHON, compile_python
from image.recipe import Recipe

_AGENT = Path(__file__).parent.parent / "firmware_agent"
_VERSION_LINE = re.compile(r'^__version__ = "(?P<version>[^"]*)"$', re.MULTILINE)

#: Where the device has the release in force; byte code names it in tracebacks.
_IN_FORCE = "/opt/picket/current"

#: What the simulated board's device tree would say.
SIMULATED_HARDWARE = ("picket,simulated",)

DESCRIPTION = "release.json"


class ReleaseError(ImageError, ValueError):
    """A release cannot be built as it was asked for."""


@dataclass(frozen=True)
class Built:
    """A release that was built.

    Attributes:
        description: its `release.json`; the files lie beside it.
        release: name of its directory on a unit.
        tar_sha256: its identity.
        tar_size: unpacked, in bytes.
        archive_size: of the full archive, in bytes.
        delta_sizes: bytes of each delta, by the file's name.
    """

    description: Path
    release: str
    tar_sha256: str
    tar_size: int
    archive_size: int
    delta_sizes: dict[str, int]


def agent_version() -> str:
    """The version that the agent's source says it has."""
    found = _VERSION_LINE.search((_AGENT / "__init__.py").read_text())
    if found is None:
        raise ImageError(f"{_AGENT}/__init__.py does not say __version__")
    return found["version"]


# --- trees --------------------------------------------------------------------------------------------------------


def simulated_release(folder: Path, recipe: Recipe, version: str | None = None, min_from: str | None = None) -> Path:
    """The agent as it stands here as a release directory in `folder`, for the simulated board."""
    manifest = _manifest(recipe, version, SIMULATED_HARDWARE, None, min_from)
    tree = folder / "tree"
    _copy_agent(tree, manifest)
    return _settle(tree, manifest)


def device_release(
    folder: Path, base: Base, library: Path, recipe: Recipe, version: str | None = None, min_from: str | None = None
) -> Path:
    """The agent with its packages as a release directory in `folder`, for the boards of a recipe."""
    manifest = _manifest(recipe, version, recipe.hardware, PYTHON, min_from)
    tree = folder / "tree"
    _copy_agent(tree, manifest)
    compile_python(base.twin, tree / _AGENT.name, f"{_IN_FORCE}/{_AGENT.name}")
    shutil.copytree(library, tree / "lib", symlinks=True)
    return _settle(tree, manifest)


def _manifest(
    recipe: Recipe, version: str | None, hardware: tuple[str, ...], python: str | None, min_from: str | None
) -> archive.Manifest:
    try:
        return archive.Manifest(
            recipe.name, version or agent_version(), recipe.security_version, hardware, python, min_from
        )
    except BadArchive as error:
        raise ReleaseError(str(error)) from error


def _copy_agent(tree: Path, manifest: archive.Manifest) -> None:
    """The agent's source, saying the version that it is released as, and the manifest."""
    shutil.copytree(_AGENT, tree / _AGENT.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    init = tree / _AGENT.name / "__init__.py"
    init.write_text(_VERSION_LINE.sub(f'__version__ = "{manifest.version}"', init.read_text()))
    (tree / archive.MANIFEST).write_bytes(manifest.to_bytes())


def _settle(tree: Path, manifest: archive.Manifest) -> Path:
    """Give the tree's files the modes that a unit gives them, and the directory its name."""
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            path.chmod(0o555 if path.stat().st_mode & 0o100 else 0o444)
        else:
            path.chmod(0o755)
    tree.chmod(0o755)
    return tree.rename(tree.with_name(archive.release_name(manifest.version, archive.digest(tree).sha256)))


# --- archives -----------------------------------------------------------------------------------------------------


def pack(release: Path, output: Path, older: Sequence[Path] = ()) -> Built:
    """The archive of a release, deltas to it from older archives, and the description.

    Args:
        release: a directory that `device_release` or `simulated_release` made.
        output: where the files go; a whole directory takes the place of the one that is there.
        older: archives of releases that units may run.

    Raises:
        ReleaseError: an older archive is none, or the very release that is packed; `output` holds something else.
    """
    manifest = archive.Manifest.parse((release / archive.MANIFEST).read_bytes())
    stem = f"{manifest.product}-agent-{manifest.version}"
    with _new_directory(output) as new:
        tar = new / "tar"
        with tar.open("wb") as file:
            identity = archive.write_tree(release, file)
        content = tar.read_bytes()
        with tar.open("rb") as source, (new / f"{stem}.tar.zst").open("wb") as file:
            archive.compress(source, file, identity.size)
        tar.unlink()
        deltas = [_delta(new, stem, _unpacked(path), content, identity) for path in older]
        full = {**_payload(new / f"{stem}.tar.zst"), "tar_sha256": identity.sha256, "tar_size": identity.size}
        value = {
            "format": 1,
            "kind": "agent",
            "product": manifest.product,
            "version": manifest.version,
            "security_version": manifest.security_version,
            "hardware": list(manifest.hardware),
            "min_from": manifest.min_from,
            "python": manifest.python,
            "archive": full,
            "deltas": sorted(deltas, key=lambda entry: entry["file"]),
        }
        (new / DESCRIPTION).write_text(json.dumps(value, indent=1) + "\n")
    return Built(
        output / DESCRIPTION,
        release.name,
        identity.sha256,
        identity.size,
        full["length"],
        {entry["file"]: entry["length"] for entry in deltas},
    )


def _delta(folder: Path, stem: str, old: bytes, new: bytes, identity: archive.Digest) -> dict[str, Any]:
    source = hashlib.sha256(old).hexdigest()
    if source == identity.sha256:
        raise ReleaseError(f"the older release is this very one ({source[:8]}); nothing has changed")
    path = folder / f"{stem}.from-{source[:8]}.zpatch"
    path.write_bytes(delta.make(old, new))
    return {**_payload(path), "from": source, "to": identity.sha256}


def _unpacked(path: Path) -> bytes:
    """The tar within an archive."""
    try:
        with path.open("rb") as file:
            tar = archive.decompress(file)
            pieces = iter(lambda: tar.read(1 << 20), b"")
            return b"".join(pieces)
    except OSError as error:
        raise ReleaseError(f"the older archive {path} cannot be read: {error.strerror}") from error
    except BadArchive as error:
        raise ReleaseError(f"{path} is no archive of a release: {error}") from error


def _payload(path: Path) -> dict[str, Any]:
    """What is signed about a file."""
    with path.open("rb") as file:
        chunks = archive.chunk_digests(file)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "file": path.name,
        "length": path.stat().st_size,
        "sha256": sha256,
        "chunk_bytes": archive.CHUNK_BYTES,
        "chunks": chunks,
    }


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory that takes its name when it is whole.

    Raises:
        ReleaseError: what it would take the place of is no release.
    """
    if output.exists() and not (output.is_dir() and ((output / DESCRIPTION).is_file() or not any(output.iterdir()))):
        raise ReleaseError(f"{output} is there already and is no release: name a new directory by --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        new = Path(folder, "new")
        new.mkdir()
        yield new
        if output.exists():
            output.rename(Path(folder, "old"))
        new.rename(output)
