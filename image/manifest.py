"""The image's description: one JSON file beside it, and all that the factory knows about an image.

`image.schema.json` says the same to other programs (JSON Schema, draft 2020-12); a copy of it lies beside each image. A
test holds the two together: what the one refuses, the other does. Only here is looked at whether partitions overlap.
"""

import datetime as dt
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from image import bmap
from image.bmap import Bmap
from image.disk import Verity
from image.errors import ManifestError

FORMAT: Final = "picket-image-2"

#: The published schema, and the name of its copies.
SCHEMA: Final = Path(__file__).parent / "image.schema.json"

#: Bytes of the longest file that is read as a description: 100 000 packages.
_LONGEST: Final = 16 << 20

CONTROLS: Final = ("autoboot", "os-prefix")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SALT = re.compile(r"([0-9a-f]{2}){1,128}")
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_TEXT = re.compile(r"[ -~]{1,256}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,254}")
_CONTACT = re.compile(r"(mailto:[!-?A-~]+@[!-~]+|https://[!-~]+)")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True)
class Partition:
    """A partition of the image: where it is (bytes) and what is in it."""

    index: int
    type: str
    label: str
    start: int
    size: int
    uuid: str
    partuuid: str


@dataclass(frozen=True)
class Package:
    """A package in the image; `kind` is `debian` or `python`."""

    kind: str
    name: str
    version: str


@dataclass(frozen=True)
class Shipped:
    """A file beside the description: its name, SHA-256 in hex, and bytes."""

    file: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Origin:
    """What the root file system was made from: the recipe's `base`, and the SHA-256 of the lock beside the recipe."""

    kind: str
    suite: str
    architecture: str
    lock_sha256: str


@dataclass(frozen=True)
class Support:
    """What buyers are told: the last day on which security updates are made, and where holes are reported."""

    until: dt.date | None
    contact: str | None


@dataclass(frozen=True)
class ImageManifest:
    """An image as its builder describes it.

    Attributes:
        name: of the image.
        version: of the image.
        agent: version of the firmware agent in it.
        kernel: version of the kernel.
        security_version: units that have run an image never go back below its number.
        epoch: no time in the image is later: seconds since 1970.
        base: what the root was made from; None for the simulated board's image.
        boards: device trees in it.
        hardware: `compatible` strings of the boards that its releases are for.
        control: where the choice of the slot lives; None for an image without slots.
        verity: by what the kernel checks the root; None where it is not checked.
        support: what buyers are told.
        factory_key: fingerprint of the SSH key that opens units in factory mode; None where there is none.
        image: the raw image.
        compressed: the same in zstd, if there is one.
        bmap: the block map.
        bundle: one slot for units in the field, if there is one.
        partitions: in the order of their places.
        packages: everything installed, sorted by kind and name.
        directory: where the files lie; not part of the description.
    """

    name: str
    version: str
    agent: str
    kernel: str
    security_version: int
    epoch: int
    base: Origin | None
    boards: tuple[str, ...]
    hardware: tuple[str, ...]
    control: str | None
    verity: Verity | None
    support: Support
    factory_key: str | None
    image: Shipped
    compressed: Shipped | None
    bmap: Shipped
    bundle: Shipped | None
    partitions: tuple[Partition, ...]
    packages: tuple[Package, ...]
    directory: Path

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def image_path(self) -> Path:
        """The raw image."""
        return self.directory / self.image.file

    @property
    def bmap_path(self) -> Path:
        """Its block map."""
        return self.directory / self.bmap.file

    @classmethod
    def load(cls, path: Path) -> "ImageManifest":
        """Read a description; the files that it names are looked at by `verify` only.

        Args:
            path: the JSON file, or the directory of a build's results.

        Raises:
            ManifestError: it cannot be read, or a field is missing or malformed; the message names it.
        """
        if path.is_dir():
            path = _within(path)
        try:
            return cls.parse(_json(path), path)
        except RecursionError as error:  # of the parser, or of what would show a malformed field
            raise _other(path, "a file whose lists or objects lie too deep in one another") from error

    @classmethod
    def parse(cls, value: Any, path: Path) -> "ImageManifest":
        """A description from its JSON value; `path` is where it was.

        Raises:
            ManifestError: a field is missing, malformed or unknown; the message names it.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ManifestError(f"{path} is not an image description of the form {FORMAT}; `make image` makes one")
        read = _Fields(path, value)
        read.only("$schema", "format", *cls.__dataclass_fields__.keys() - {"directory"})
        if "$schema" in value:
            read.text("$schema")
        manifest = cls(
            name=read.text("name"),
            version=read.text("version"),
            agent=read.text("agent"),
            kernel=read.text("kernel"),
            security_version=read.number("security_version"),
            epoch=read.number("epoch"),
            base=read.maybe("base", lambda name: read.object(name, _origin)),
            boards=read.texts("boards"),
            hardware=read.texts("hardware"),
            control=read.maybe("control", lambda name: read.choice(name, CONTROLS)),
            verity=read.maybe("verity", lambda name: read.object(name, _verity)),
            support=read.object("support", _support),
            factory_key=read.maybe("factory_key", lambda name: read.text(name, _FINGERPRINT)),
            image=read.object("image", _shipped),
            compressed=read.maybe("compressed", lambda name: read.object(name, _shipped)),
            bmap=read.object("bmap", _shipped),
            bundle=read.maybe("bundle", lambda name: read.object(name, _shipped)),
            partitions=tuple(_partition(item) for item in read.items("partitions")),
            packages=tuple(_package(item) for item in read.items("packages")),
            directory=path.resolve().parent,
        )
        end = 0
        for part in manifest.partitions:
            if part.start < end or part.start + part.size > manifest.image.size:
                raise ManifestError(f"{path}: partition {part.index} overlaps another or leaves the image")
            end = part.start + part.size
        return manifest

    def dump(self) -> str:
        """The description as JSON text."""
        value = {"$schema": SCHEMA.name, "format": FORMAT, **asdict(self)}
        del value["directory"]
        return json.dumps(value, indent=1, allow_nan=False, default=str) + "\n"

    def verify_files(self, image: Path | None = None) -> Bmap:
        """Check that the files are there and belong together; returns the block map.

        The image's bytes are not read: the block map has a digest of every range, which a flash checks as it writes.

        Args:
            image: the raw image, where it lies in another place.

        Raises:
            ManifestError: a file is missing or is not what the description says; the message names it.
        """
        image = image or self.image_path
        for path in (image, self.bmap_path):
            if not path.is_file():
                raise ManifestError(f"{path} is missing; `make image` makes it")
        _compare(self.bmap_path, self.bmap.sha256)
        blocks = bmap.load(self.bmap_path)
        expected = self.image.size
        if blocks.image_size != expected:
            raise ManifestError(f"{self.bmap.file} is for an image of {blocks.image_size} bytes, not of {expected}")
        size = image.stat().st_size
        if size != expected:
            raise ManifestError(f"{image} has {size} bytes, its description says {expected}")
        return blocks

    def verify(self, image: Path | None = None) -> Bmap:
        """Check every byte: that image, block map and description agree; returns the block map.

        Args:
            image: the raw image, where it lies in another place.

        Raises:
            ManifestError: a file is missing or is not what the description says; the message names it.
        """
        image = image or self.image_path
        blocks = self.verify_files(image)
        _compare(image, self.image.sha256)
        bmap.check(image, blocks)
        return blocks


def shipped(path: Path, sha256: str | None = None) -> Shipped:
    """A file as a description names it; `sha256` where it was computed before."""
    return Shipped(path.name, sha256 or digest(path), path.stat().st_size)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(path: Path, expected: str) -> None:
    found = digest(path)
    if found != expected:
        raise ManifestError(f"{path} has the digest {found}, its description says {expected}; build or fetch it again")


def _within(directory: Path) -> Path:
    """The description in a directory of results: the one JSON file that says it is one."""
    found = [path for path in sorted(directory.glob("*.json")) if _is_description(path)]
    real = {path.resolve() for path in found}
    if len(real) != 1:
        what = "no image description" if not real else "more than one image description"
        raise ManifestError(f"{directory} holds {what}; name the JSON file, like {directory}/picket-1.0.0.json")
    return found[0]


def _is_description(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return f'"format": "{FORMAT}"'.encode() in file.read(1000)
    except OSError:
        return False


def _json(path: Path) -> Any:
    """What a description's file holds; of any other file no more is read than of the longest description.

    Raises:
        ManifestError: it cannot be read, or is no JSON; the message says what it seems to be.
    """
    if path.suffix == ".toml":
        raise _other(path, "a recipe")
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
    except OSError as error:
        raise ManifestError(f"no image description at {path} ({error.strerror}); `make image` makes one") from error
    if {".img", ".wic"} & set(path.suffixes):
        raise _other(path, "an image itself")
    if len(content) > _LONGEST:
        raise _other(path, f"a file of more than {_LONGEST >> 20} MiB")
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise _other(path, "a file that is no text") from error
    except json.JSONDecodeError as error:
        hint = "" if path.suffix == ".json" else " (a recipe's name would end in .toml)"
        raise _other(path, f"a text that is no JSON{hint}: {error}") from error
    except ValueError as error:  # of a number that Python takes for an attack
        raise _other(path, "a file with a number of thousands of digits") from error


def _other(path: Path, what: str) -> ManifestError:
    return ManifestError(
        f"{path} is not the description of an image but {what}; name the image's .json, or the directory of its results"
    )


# --- reading ------------------------------------------------------------------------------------------------------


def _shipped(read: "_Fields") -> Shipped:
    read.only("file", "sha256", "size")
    return Shipped(read.text("file", _FILE_NAME), read.text("sha256", _DIGEST), read.number("size"))


def _origin(read: "_Fields") -> Origin:
    read.only("kind", "suite", "architecture", "lock_sha256")
    return Origin(read.text("kind"), read.text("suite"), read.text("architecture"), read.text("lock_sha256", _DIGEST))


def _verity(read: "_Fields") -> Verity:
    read.only("root_hash", "salt", "blocks")
    return Verity(read.text("root_hash", _DIGEST), read.text("salt", _SALT), read.number("blocks"))


def _support(read: "_Fields") -> Support:
    read.only("until", "contact")
    return Support(read.maybe("until", read.day), read.maybe("contact", lambda name: read.text(name, _CONTACT)))


def _partition(read: "_Fields") -> Partition:
    read.only(*Partition.__dataclass_fields__)
    return Partition(
        index=read.number("index"),
        type=read.text("type"),
        label=read.text("label"),
        start=read.number("start"),
        size=read.number("size"),
        uuid=read.text("uuid"),
        partuuid=read.text("partuuid"),
    )


def _package(read: "_Fields") -> Package:
    read.only("kind", "name", "version")
    return Package(read.text("kind"), read.text("name"), read.text("version"))


_T = TypeVar("_T")


class _Fields:
    """Typed access to a parsed JSON object that says where it was wrong."""

    def __init__(self, path: Path, value: dict[str, Any], place: str = "") -> None:
        self._path = path
        self._value = value
        self._place = place

    def _wrong(self, name: str) -> ManifestError:
        return ManifestError(
            f"{self._path}: {self._place}{name} is missing or malformed: {self._value.get(name)!r:.80}"
        )

    def only(self, *names: str) -> None:
        """Refuse any other field: what is not understood may matter."""
        if unknown := sorted(self._value.keys() - set(names)):
            raise ManifestError(f"{self._path}: {self._place}{unknown[0]!s:.80} is not a field of the form {FORMAT}")

    def maybe(self, name: str, read: Callable[[str], _T]) -> _T | None:
        """None for null; the field has to be there."""
        if name in self._value and self._value[name] is None:
            return None
        return read(name)

    def text(self, name: str, pattern: re.Pattern[str] = _TEXT) -> str:
        value = self._value.get(name)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self._wrong(name)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._value.get(name)
        if not isinstance(value, list) or not value:
            raise self._wrong(name)
        if not all(isinstance(item, str) and _TEXT.fullmatch(item) for item in value):
            raise self._wrong(name)
        return tuple(value)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in choices:
            raise self._wrong(name)
        return value

    def day(self, name: str) -> dt.date:
        try:
            return dt.date.fromisoformat(self.text(name, _DAY))
        except ValueError as error:
            raise self._wrong(name) from error

    def number(self, name: str) -> int:
        value = self._value.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON knows one kind of number: 1.0 is 1
        if type(value) is not int or value < 0:
            raise self._wrong(name)
        return value

    def object(self, name: str, read: Callable[["_Fields"], _T]) -> _T:
        value = self._value.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name)
        return read(_Fields(self._path, value, f"{self._place}{name}."))

    def items(self, name: str) -> list["_Fields"]:
        value = self._value.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            raise self._wrong(name)
        return [_Fields(self._path, item, f"{name}[{index}].") for index, item in enumerate(value)]
