"""Pack the functions: our handlers and their pure-Python dependencies in one zip whose bytes depend on nothing else.

The dependencies are taken from the installed environment, which the hash-pinned lock decides, so no other list of
versions exists. boto3 is Lambda's own.
"""

import hashlib
import importlib.metadata
import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cloud.errors import CloudMisconfigured

BUILD = Path("build/cloud-code")

#: Packed with the handlers: the logger with what it needs, and the time zones.
DISTRIBUTIONS = ("aws-lambda-powertools", "jmespath", "typing-extensions", "tzdata")

_HERE = Path(__file__).resolve().parent
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """The functions' code, ready to upload; `key` carries the content's hash, so new code has a new key."""

    path: Path
    key: str


def pack(directory: Path = BUILD) -> Package:
    """The functions' zip, made anew only when its content changed.

    Raises:
        CloudMisconfigured: a dependency is not installed, or is not pure Python.
    """
    files = {f"cloud/{path.relative_to(_HERE).as_posix()}": path for path in sorted(_HERE.glob("handlers/*.py"))}
    files["cloud/__init__.py"] = _HERE / "__init__.py"
    for name in DISTRIBUTIONS:
        files |= _files_of(name)
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    key = f"functions-{digest.hexdigest()[:32]}.zip"
    target = directory / key
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{key}.{os.getpid()}"
        temporary.write_bytes(_zip(files))
        temporary.replace(target)
    return Package(target, key)


def _files_of(distribution: str) -> dict[str, Path]:
    try:
        listed = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise CloudMisconfigured(f"{distribution} is not installed: install requirements/station.lock") from error
    found: dict[str, Path] = {}
    for file in listed:
        name = file.as_posix()
        if name.startswith("../") or "__pycache__" in name or name.endswith((".pyc", ".pth")):
            continue
        if ".dist-info/" in name and not name.endswith("/METADATA"):
            continue  # RECORD and INSTALLER differ between installers
        if name.endswith(".so"):
            raise CloudMisconfigured(f"{distribution} has compiled parts ({name}): Lambda's machine is another one")
        found[name] = Path(str(file.locate()))
    return found


def _zip(files: dict[str, Path]) -> bytes:
    """Sorted names, one date, one mode: the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, path in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    return buffer.getvalue()
