"""SHA256SUMS over a directory that is shipped, and its signature: checked by this module, or by two common commands.

    sha256sum --check SHA256SUMS
    ssh-keygen -Y verify -f allowed-signers -I image -n picket-image -s SHA256SUMS.sig < SHA256SUMS

The signature is over the sums, and the sums are over everything else, so one look at a key covers all files.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from image import signing
from image.errors import ManifestError, SigningError
from image.manifest import digest
from image.signing import Signer

SUMS: Final = "SHA256SUMS"
SIGNATURE: Final = "SHA256SUMS.sig"

#: One line: a digest, a space, the mode (text or binary, which is one on Linux), the name.
_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<name>.+)")


@dataclass(frozen=True)
class Checked:
    """A directory whose files are what its sums say.

    Attributes:
        files: the names that the sums list, sorted.
        unlisted: files that lie there too, of which nobody has said anything.
        signer: the public line of the key that signed the sums; None if nobody did.
    """

    files: tuple[str, ...]
    unlisted: tuple[str, ...]
    signer: str | None


def write(directory: Path, signer: Signer | None = None, known: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Write the sums over all files of a directory, but the hidden ones, and sign them; returns the names.

    Args:
        directory: what is shipped; directories in it are looked into.
        signer: who answers for it; without one, an older signature is taken away and none is made.
        known: digests in hex that were computed before, by name: large images need not be read once more.

    Raises:
        ManifestError: a name cannot stand in the sums.
        SigningError: the key cannot be reached.
    """
    known = known or {}
    names = tuple(_files(directory))
    for name in names:
        if re.search(r"[\\\n\r]", name):
            raise ManifestError(f"{name!r} cannot stand in {SUMS}: take the line break or backslash out of the name")
    sums = "".join(f"{known.get(name) or digest(directory / name)}  {name}\n" for name in names).encode()
    signature = signer.sign(sums, signing.IMAGE) if signer else None
    # A signature never lies beside sums that it does not fit.
    (directory / SIGNATURE).unlink(missing_ok=True)
    _replace(directory / SUMS, sums)
    if signature is not None:
        _replace(directory / SIGNATURE, signature)
    return names


def check(
    directory: Path, allowed_public_line: str | None = None, elsewhere: Mapping[str, Path] | None = None
) -> Checked:
    """Check that a directory's files are what its sums say, and who says so.

    Args:
        directory: with SHA256SUMS in it.
        allowed_public_line: the one key that may have signed, as OpenSSH writes it; None looks at no key, and only
            says whose signature there is.
        elsewhere: files by name that lie in another place.

    Raises:
        ManifestError: a file is missing or another, or the sums are no sums; the message names the file.
        SigningError: the signature is missing, by another key, or does not hold.
    """
    path = directory / SUMS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror}): there is nothing to check by") from error
    signer = _signer(directory, data, allowed_public_line)
    expected = _parse(path, data)
    for name, sha256 in expected.items():
        _compare((elsewhere or {}).get(name, directory / name), sha256)
    unlisted = tuple(name for name in _files(directory) if name not in expected)
    return Checked(tuple(expected), unlisted, signer)


def signer(directory: Path) -> str | None:
    """The public line of the key that signed the sums of a directory; None if nobody did. The files are not looked at.

    Raises:
        SigningError: the signature does not hold.
    """
    try:
        return _signer(directory, (directory / SUMS).read_bytes(), None)
    except FileNotFoundError:
        return None


def _files(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*"), key=lambda path: path.relative_to(directory).as_posix()):
        name = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and str(name) not in {SUMS, SIGNATURE}:
            yield name.as_posix()


def _signer(directory: Path, sums: bytes, allowed: str | None) -> str | None:
    path = directory / SIGNATURE
    try:
        signature = path.read_bytes()
    except FileNotFoundError as error:
        if allowed is None:
            return None
        raise SigningError(f"{path} is missing: nobody answers for these files") from error
    except OSError as error:
        raise SigningError(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = signing.check(signature, sums, signing.IMAGE)
    except SigningError as error:
        raise SigningError(f"{path}: {error}") from error
    if allowed is not None and found.split()[:2] != allowed.split()[:2]:
        raise SigningError(f"{path} is by the key {signing.fingerprint(found)}, not by the one that was asked for")
    return found


def _parse(path: Path, data: bytes) -> dict[str, str]:
    """Digest by name; every name stays below the directory."""
    expected: dict[str, str] = {}
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not text: get it again") from error
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        found = _LINE.fullmatch(line)
        if found is None:
            raise ManifestError(f"{path}: line {number} is no checksum: get the file again")
        name = PurePosixPath(found["name"])
        if name.is_absolute() or ".." in name.parts or "\0" in found["name"] or found["name"] in expected:
            raise ManifestError(f"{path}: line {number} names {found['name']!r:.80}, which it may not")
        expected[found["name"]] = found["sha256"]
    if not expected:
        raise ManifestError(f"{path} is empty: get it again")
    return expected


def _compare(path: Path, sha256: str) -> None:
    try:
        found = digest(path)
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror}), but {SUMS} lists it: get it again") from error
    if found != sha256:
        raise ManifestError(f"{path} has the digest {found}, {SUMS} says {sha256}: get it again")


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
