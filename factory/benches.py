"""Bench files: TOML in, an open bench out. The one table of what a board's URI scheme means."""

import fcntl
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.bench import Bench
from factory.drivers import rpi, simulated, virtual
from factory.errors import UserMistake


@dataclass(frozen=True)
class AuthoritySettings:
    """Where the signing CA lives, and the file that holds its passphrase."""

    directory: Path
    passphrase_file: Path


@dataclass(frozen=True)
class CloudSettings:
    """Which cloud: `local` with its state folder, or `aws`.

    `guest` says that the units live in a network of their own, as a virtual Pi does: they know the local cloud under
    another name than this machine does. At AWS it makes no difference.
    """

    target: str
    state: Path
    guest: bool


@dataclass(frozen=True)
class BoardSettings:
    """The board: its URI, and the options of its scheme."""

    scheme: str
    place: str
    options: dict[str, Any]


@dataclass(frozen=True)
class BenchFile:
    """What a bench file says. Paths are relative to the folder that the command runs in."""

    path: Path
    name: str
    station: str
    product: str
    batch: str
    image: Path
    records: str
    labels: Path
    factory_key: Path
    authority: AuthoritySettings
    cloud: CloudSettings
    board: BoardSettings


Opener = Callable[[Path, Path, dict[str, Any]], AbstractContextManager[Bench]]

#: What a board's URI scheme means. An opener takes the place behind the scheme, the factory key and the options.
BOARDS: dict[str, Opener] = {
    "simulated": simulated.open_bench,
    "virtual": virtual.open_bench,
    "rpi": lambda _place, key, options: rpi.open_bench(key, options),
}


@contextmanager
def open_bench(file: BenchFile, serial: str, endpoint: str) -> Iterator[Bench]:
    """The bench that a file describes, ours alone until the context ends, and the unit too.

    `{serial}` in the board's place stands for the unit's: a simulated or virtual slot gets a board of its own for each
    unit, and finds it again when the unit comes back. A bench in a network of its own (`cloud.guest`) is told that the
    host `endpoint` is to be found at the station.

    Raises:
        UserMistake: its board's options are wrong, or another command uses it or makes this unit.
        StationFault: one of its drivers cannot be opened.
    """
    options = file.board.options | ({"hosts": [endpoint]} if file.cloud.guest else {})
    with (
        _only_one(f"{file.name}.lock", f"bench {file.name}"),
        _only_one(f"{serial}.unit.lock", f"unit {serial}"),
        BOARDS[file.board.scheme](
            Path(file.board.place.replace("{serial}", serial)), file.factory_key, options
        ) as bench,
    ):
        yield bench


@contextmanager
def _only_one(name: str, what: str) -> Iterator[None]:
    lock = Path("build") / "locks" / name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserMistake(
                f"{what} is in use by another command", advice="Wait until it ends, or name another."
            ) from error
        yield


def load_bench_file(path: Path) -> BenchFile:
    """Read a bench file.

    Raises:
        UserMistake: it is missing, no TOML, or lacks or misspells something; the message names it.
    """
    try:
        top = _Table(path, "", tomllib.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UserMistake(
            f"there is no bench file {path}", advice="`ls benches` shows those that are there."
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserMistake(f"the bench file {path} cannot be read: {error}") from error
    authority, cloud, board = top.table("authority"), top.table("cloud"), top.table("board")
    scheme, _, place = board.text("uri").partition(":")
    if scheme not in BOARDS:
        raise UserMistake(f"{path}: board.uri is of an unknown kind {scheme!r}", advice=f"Known: {', '.join(BOARDS)}.")
    if scheme == "rpi" and place:
        raise UserMistake(f"{path}: board.uri: nothing stands behind `rpi:`, not {place!r}")
    if scheme != "rpi" and not place:
        raise UserMistake(
            f"{path}: board.uri names no folder", advice=f"E.g. {scheme}:build/boards/{{serial}}: one for each unit."
        )
    target = cloud.text("target")
    if target not in {"local", "aws"}:
        raise UserMistake(f"{path}: cloud.target is {target!r}; it can be local or aws")
    file = BenchFile(
        path=path,
        name=top.name("name", _NAME, "1 to 32 letters, digits, dots, dashes and underscores"),
        station=top.text("station"),
        product=top.name("product", _PRODUCT, "1 to 32 plain characters: the label's font has no others"),
        batch=top.name(
            "batch", _BATCH, "1 to 32 of letters, digits and _.,@/:#-, which AWS takes in a thing's attribute"
        ),
        image=Path(top.text("image")),
        records=top.text("records"),
        labels=Path(top.text("labels")),
        factory_key=Path(top.text("factory_key")),
        authority=AuthoritySettings(Path(authority.text("directory")), Path(authority.text("passphrase_file"))),
        cloud=CloudSettings(target, Path(cloud.text("state", "build/cloud")), guest=cloud.flag("guest")),
        board=BoardSettings(scheme, place, board.rest()),
    )
    for table in (top, authority, cloud):
        table.done()
    return file


#: A bench's name is that of its lock's file.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_PRODUCT = re.compile(r"[!-~]([ -~]{0,30}[!-~])?")
#: https://docs.aws.amazon.com/iot/latest/apireference/API_AttributePayload.html
_BATCH = re.compile(r"[A-Za-z0-9_.,@/:#-]{1,32}")


class _Table:
    """A TOML table, read field by field; what nobody asked for is a mistake."""

    def __init__(self, path: Path, name: str, fields: dict[str, Any]) -> None:
        self._path, self._name, self._fields = path, name, dict(fields)

    def optional(self, field: str) -> str | None:
        value = self._fields.pop(field, None)
        if value is not None and not isinstance(value, str):
            raise UserMistake(f"{self._path}: {self._name}{field} must be a text")
        return value

    def text(self, field: str, default: str | None = None) -> str:
        value = self.optional(field)
        if value is None and default is None:
            raise UserMistake(f"{self._path}: {self._name}{field} is missing")
        if value is not None and (not value.strip() or "\0" in value):
            raise UserMistake(f"{self._path}: {self._name}{field} is empty")
        return value if value is not None else str(default)

    def name(self, field: str, form: re.Pattern[str], said: str) -> str:
        value = self.text(field)
        if not form.fullmatch(value):
            raise UserMistake(f"{self._path}: {self._name}{field} is {value!r}; it can be {said}")
        return value

    def flag(self, field: str) -> bool:
        value = self._fields.pop(field, False)
        if not isinstance(value, bool):
            raise UserMistake(f"{self._path}: {self._name}{field} must be true or false")
        return value

    def table(self, field: str) -> "_Table":
        value = self._fields.pop(field, None)
        if not isinstance(value, dict):
            raise UserMistake(f"{self._path}: the table [{field}] is missing")
        return _Table(self._path, f"{field}.", value)

    def rest(self) -> dict[str, Any]:
        rest, self._fields = self._fields, {}
        return rest

    def done(self) -> None:
        if self._fields:
            raise UserMistake(f"{self._path}: {self._name}{next(iter(self._fields))} is not known here")
