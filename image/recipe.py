"""The recipe: everything about an image that a person decides.

A recipe is a TOML file. It may begin where others end:

    extends = "debian-trixie.toml"        # or a list; paths are relative to the file that names them

Files are applied in that order, each once, the recipe itself last. A text, a number or a date takes the place of what
was there before; tables are merged key by key; a list takes the place of the list before it, unless it is written as a
change:

    packages.add = ["tcpdump"]            # behind what is there
    packages.remove = ["busybox-static"]  # which must be there

`load` gives a frozen `Recipe`, or the first mistake in one line: the file, the key, and what to write instead.
`lint_recipe` names all mistakes at once.
"""

import datetime as dt
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Final

from image.errors import RecipeError
from image.possible import CHECKS, CHOICES, NOT_EMPTY, STATE, nearest, shown

#: Bytes of the longest file that is read as a recipe.
_LONGEST: Final = 1 << 20


@dataclass(frozen=True)
class Vendor:
    """A second archive beside Debian's, of kind `raspios` only. Of a package that both have, the newer version counts.

    Attributes:
        mirror: its address; there is no default.
        keyring: file with the public keys that sign it.
        suite: its release; empty means the base's.
        components: of the archive.
    """

    mirror: str = ""
    keyring: Path | None = None
    suite: str = ""
    components: tuple[str, ...] = ("main",)


@dataclass(frozen=True)
class BaseSettings:
    """Where the root file system comes from.

    Attributes:
        kind: `debian`, `raspios` (Debian's archive and a vendor's), or `image` (an official .img or .img.xz).
        suite: Debian's release.
        architecture: Debian's name of the target's architecture.
        components: of Debian's archive.
        mirror: Debian's archive; empty means mmdebstrap's default.
        keyring: file with the public keys that sign it; none means Debian's own.
        vendor: the second archive of `raspios`.
        source: the image file of `image`.
        source_sha256: what the image file must be.
    """

    kind: str = "debian"
    suite: str = ""
    architecture: str = "arm64"
    components: tuple[str, ...] = ("main",)
    mirror: str = ""
    keyring: Path | None = None
    vendor: Vendor = Vendor()
    source: Path | None = None
    source_sha256: str = ""


@dataclass(frozen=True)
class BootSettings:
    """How a unit starts.

    Attributes:
        control: where the choice of the slot lives: `autoboot` (Pi 4 and newer) or `os-prefix` (Pi 3, Zero 2 W).
        secure_boot_key: private key file, or `pkcs11:` URI, that signs boot.img; empty for no secure boot.
    """

    control: str = "autoboot"
    secure_boot_key: str = ""


@dataclass(frozen=True)
class DiskSettings:
    """Sizes in MiB.

    Attributes:
        boot_mebibytes: of each slot's boot partition.
        root_mebibytes: of each slot's root partition.
        data_mebibytes: of the data partition as built; a unit grows it to the end of its medium.
    """

    boot_mebibytes: int = 96
    root_mebibytes: int = 320
    data_mebibytes: int = 64


@dataclass(frozen=True)
class Support:
    """What buyers are told.

    Attributes:
        until: last day on which security updates are made.
        contact: where vulnerabilities are reported: `mailto:` or `https:`.
    """

    until: dt.date | None = None
    contact: str = ""


@dataclass(frozen=True)
class Recipe:
    """What the image is made of.

    Attributes:
        name: of the image; with the version it is what the banner says.
        version: of the image.
        packages: to install; recommended packages do not come along. An opened image must have them already.
        boards: device trees (file names without `.dtb`) that must be there.
        hardware: `compatible` strings of the boards that releases are for; others refuse them.
        seed: what identifiers (UUIDs, the disk's signature) derive from; the name, where it is not said. It stays: an
            image with another signature finds nothing in the other slot of a unit.
        hostname: of every unit; each `?` becomes a hex digit that depends on the machine id (image/init).
        security_version: of the agent; units that have run a release never go back below its number.
        base: where the root file system comes from.
        exclude: path patterns that dpkg leaves out, in order; a leading `+` takes one back.
        files: directories whose content is copied over the root.
        overlays: device tree sources (.dts) that are merged into the boards' trees.
        experimental_boards: device trees that are taken where the kernel package has them.
        config: lines for config.txt.
        cmdline: words for the kernel's command line.
        wifi_country: two letters of the regulatory domain; empty keeps the world's common one.
        factory_key: public SSH key of the factory; none means the one that this machine makes.
        endpoint: host of the cloud; empty where the line says it.
        pir_line: GPIO line of the PIR.
        tpm: `yes`, `no`, or `probe`: the first boot decides, for good.
        boot: how a unit starts.
        disk: sizes.
        shared: directories that both slots share; `STATE`, which makes a unit this unit, is one of them or in one.
        support: what buyers are told.
        lock_of: another recipe of the same packages, whose lock is this one's too. It is not inherited.
        file: the recipe's file; its lock lies beside it. Two recipes that say the same are equal.
    """

    name: str
    version: str
    packages: tuple[str, ...]
    boards: tuple[str, ...]
    hardware: tuple[str, ...]
    seed: str = ""
    hostname: str = "picket"
    security_version: int = 1
    base: BaseSettings = BaseSettings()
    exclude: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    overlays: tuple[Path, ...] = ()
    experimental_boards: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    cmdline: tuple[str, ...] = ()
    wifi_country: str = ""
    factory_key: Path | None = None
    endpoint: str = ""
    pir_line: int = 17
    tpm: str = "probe"
    boot: BootSettings = BootSettings()
    disk: DiskSettings = DiskSettings()
    shared: tuple[str, ...] = (STATE,)
    support: Support = Support()
    lock_of: Path | None = field(default=None, compare=False)
    file: Path = field(default=Path("recipe.toml"), compare=False)

    @property
    def lock(self) -> Path:
        """The lock that pins the recipe's packages."""
        return (self.lock_of or self.file).with_suffix(".lock")


def load(path: Path) -> Recipe:
    """Read a recipe and all that it extends.

    Raises:
        RecipeError: a file cannot be read, is no TOML, or says something impossible; one line.
    """
    recipe, mistakes = _read(path)
    if recipe is None or mistakes:
        more = f" (and {len(mistakes) - 1} more: `python -m image lint {path}` names all)" if len(mistakes) > 1 else ""
        raise RecipeError(mistakes[0] + more)
    return recipe


def lint_recipe(path: Path, more: Callable[["Recipe"], Iterable[str]] = lambda _: ()) -> list[str]:
    """All mistakes of a recipe, and what it should say but need not; a line each.

    Args:
        path: of the recipe.
        more: what else is looked at where all values are possible.
    """
    recipe, mistakes = _read(path)
    if recipe is not None:
        mistakes += [*_advice(recipe), *more(recipe)]
    return mistakes


@dataclass(frozen=True)
class Setting:
    """A key of a recipe with its dots, the value in effect, and the files that made it so; none for a default."""

    key: str
    value: Any
    files: tuple[Path, ...]


def explain(path: Path) -> tuple[Recipe, list[Setting]]:
    """A recipe, and every setting of it with where it came from.

    Raises:
        RecipeError: as `load`.
    """
    recipe = load(path)
    files: dict[str, tuple[Path, ...]] = {}
    for file, table in read_chain(path):
        for key in _leaves(table):
            changed = isinstance(_at(table, key), dict)  # by `add` and `remove`
            files[key] = (*files.get(key, ()), file) if changed else (file,)
    keys = [key for key, hint in _all_keys() if not is_dataclass(hint)]
    return recipe, [Setting(key, attrgetter(key)(recipe), files.get(key, ())) for key in keys]


def _read(path: Path) -> tuple[Recipe | None, list[str]]:
    try:
        chain = read_chain(path)
    except RecipeError as error:
        return None, [str(error)]
    mistakes = [mistake for file, table in chain for mistake in check_shape(file, table)]
    if mistakes:
        return None, mistakes
    table: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for file, change in chain:
        absolute = _with_paths(change, file)
        mistakes += check_removals(file, table, absolute)
        table = merge(table, absolute)
        origin.update(dict.fromkeys(_leaves(absolute), file))
    mistakes += check_values(path, table, origin)
    return (None if mistakes else _build(Recipe, table, path)), mistakes


# --- files --------------------------------------------------------------------------------------------------------


def read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe and what it extends, in the order in which they apply, each file once.

    Raises:
        RecipeError: a file cannot be read, is no TOML, or extends itself.
    """
    chain: dict[Path, tuple[Path, dict[str, Any]]] = {}
    _follow(path, (), chain)
    return list(chain.values())


def _follow(path: Path, above: tuple[Path, ...], chain: dict[Path, tuple[Path, dict[str, Any]]]) -> None:
    here = Path(os.path.realpath(path))
    if here in [Path(os.path.realpath(file)) for file in above]:
        circle = " -> ".join(file.name for file in (*above, path))
        raise RecipeError(f"{above[-1]}: extends: {circle} goes in a circle; take one of them out")
    if here in chain:
        return
    table = _parsed(path, above[-1] if above else None)
    if above:
        table.pop("lock_of", None)  # is not inherited
    parents = table.pop("extends", [])
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) and parent for parent in parents):
        raise RecipeError(f'{path}: extends: expected a file or a list of files, like extends = "debian-trixie.toml"')
    for parent in parents:
        if "\0" in parent:
            raise RecipeError(f"{path}: extends: {shown(parent)} is no file's name: it has a zero byte; mend the name")
    for parent in parents:
        _follow(path.parent / parent, (*above, path), chain)
    chain[here] = (path, table)


def _parsed(path: Path, named_by: Path | None) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
    except OSError as error:
        if named_by is not None:
            near = nearest(path.name, [file.name for file in sorted(path.parent.glob("*.toml"))])
            raise RecipeError(
                f"{named_by}: extends: {path} cannot be read: {error.strerror}{near or '; name a recipe that is there'}"
            ) from error
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}; name a file that is there") from error
    if len(content) > _LONGEST:
        raise RecipeError(f"{path} is no recipe: it has more than {_LONGEST >> 20} MiB; name the .toml file of one")
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no TOML: {error}; mend that place") from error
    except RecursionError as error:
        raise RecipeError(f"{path} is no recipe: its lists or tables lie too deep in one another; mend that") from error
    except ValueError as error:  # of a number that Python takes for an attack
        raise RecipeError(f"{path} is no recipe: a number in it has thousands of digits; shorten it") from error


# --- shape: which keys there are and of which type -------------------------------------------------------------------


@cache
def _types(kind: type) -> Mapping[str, Any]:
    """The keys of a table and their types; `file` is ours to fill."""
    hints = typing.get_type_hints(kind)
    names = [item.name for item in fields(kind) if item.name != "file"]
    return MappingProxyType({name: hints[name] for name in names})


def _all_keys(kind: type = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its dots, and its type."""
    for name, hint in _types(kind).items():
        if is_dataclass(hint):
            yield from _all_keys(typing.cast("type", hint), f"{prefix}{name}.")
        yield f"{prefix}{name}", hint


def check_shape(file: Path, table: Mapping[str, Any], kind: type = Recipe, prefix: str = "") -> Iterator[str]:
    """The keys that are not keys, and the values of the wrong type."""
    known = _types(kind)
    for name, value in table.items():
        key = f"{prefix}{name}"
        if name not in known:
            everywhere = [found for found, hint in _all_keys() if not is_dataclass(hint)]
            near = nearest(name, everywhere, prefix) or f"; take it out (keys here: {', '.join(known)})"
            yield f"{file}: {key} is not a key{near}"
        elif is_dataclass(known[name]):
            if isinstance(value, dict):
                yield from check_shape(file, value, typing.cast("type", known[name]), f"{key}.")
            else:
                yield f"{file}: {key}: expected a table, found {shown(value)}; write [{key}] and its keys below"
        else:
            yield from _check_type(file, key, known[name], value)


def _check_type(file: Path, key: str, hint: Any, value: Any) -> Iterator[str]:
    if _is_list(hint) and isinstance(value, dict):
        for verb, items in value.items():
            if verb not in {"add", "remove"}:
                yield f"{file}: {key}.{verb} is not a key: a list is changed by {key}.add and {key}.remove"
            elif not _is_texts(items):
                changed = f"{key}.{verb}"
                yield f"{file}: {changed}: expected a list of texts, found {shown(items)}; {_example(changed, hint)}"
    elif not _fits(hint, value):
        yield f"{file}: {key}: expected {_expected(hint)}, found {shown(value)}; {_example(key, hint)}"


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _plain(hint: Any) -> Any:
    """The type without its `| None`."""
    if isinstance(hint, UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _fits(hint: Any, value: Any) -> bool:
    plain = _plain(hint)
    if _is_list(hint):
        return _is_texts(value)
    if plain is dt.date:
        return type(value) is dt.date
    if plain is Path:
        return isinstance(value, str)
    return type(value) is plain


def _expected(hint: Any) -> str:
    if _is_list(hint):
        return "a list of texts"
    return {int: "a number", str: "a text", Path: "a file's name", dt.date: "a date"}[_plain(hint)]


def _example(key: str, hint: Any) -> str:
    if _is_list(hint):
        return f'write {key} = ["...", "..."]'
    choices = CHOICES.get(key)
    if choices:
        return f"write {key} = " + " or ".join(f'"{choice}"' for choice in choices)
    if hint is int:
        return f"write {key} = {_default_of(key)}"
    return f"write {key} = " + {str: '"..."', Path: '"..."', dt.date: "2031-12-31"}[_plain(hint)]


def _default_of(key: str) -> Any:
    """What a key is where no file says it."""
    *tables, name = key.split(".")
    kind = Recipe
    for table in tables:
        kind = _types(kind)[table]
    return _default(kind, name)


# --- merging ------------------------------------------------------------------------------------------------------


def merge(before: Mapping[str, Any], change: Mapping[str, Any], kind: type = Recipe) -> dict[str, Any]:
    """What a table says after a change: tables key by key, lists by `add` and `remove`, all else replaced."""
    merged = dict(before)
    for name, value in change.items():
        hint = _types(kind)[name]
        if is_dataclass(hint):
            merged[name] = merge(before.get(name, {}), value, typing.cast("type", hint))
        elif _is_list(hint) and isinstance(value, dict):
            kept = [item for item in before.get(name, _default(kind, name)) if item not in value.get("remove", ())]
            merged[name] = list(dict.fromkeys([*kept, *value.get("add", ())]))
        else:
            merged[name] = value
    return merged


def check_removals(
    file: Path, before: Mapping[str, Any], change: Mapping[str, Any], kind: type = Recipe, prefix: str = ""
) -> Iterator[str]:
    """The things that a change takes out of a list in which they are not."""
    for name, value in change.items():
        hint = _types(kind)[name]
        if is_dataclass(hint):
            inner = typing.cast("type", hint)
            yield from check_removals(file, before.get(name, {}), value, inner, f"{prefix}{name}.")
        elif _is_list(hint) and isinstance(value, dict):
            have = [str(item) for item in before.get(name, _default(kind, name))]
            for item in value.get("remove", ()):
                if item not in have:
                    near = nearest(item, have) or "; take that out"
                    yield f"{file}: {prefix}{name}.remove: {item} is not in what this recipe extends{near}"


def _default(kind: type, name: str) -> Any:
    (found,) = [item for item in fields(kind) if item.name == name]
    return () if found.default is MISSING else found.default


def _with_paths(table: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The table with its paths relative to its file; an empty one stays empty."""
    return _map_paths(table, lambda text: os.path.normpath(file.parent / text) if text else "", Recipe)


def _map_paths(table: Mapping[str, Any], place: Callable[[str], str], kind: type) -> dict[str, Any]:
    mapped: dict[str, Any] = {}
    for name, value in table.items():
        hint = _types(kind)[name]
        if is_dataclass(hint):
            mapped[name] = _map_paths(value, place, typing.cast("type", hint))
        elif _plain(hint) is Path or (name == "secure_boot_key" and not value.startswith("pkcs11:")):
            mapped[name] = place(value)
        elif hint == tuple[Path, ...]:
            if isinstance(value, dict):
                mapped[name] = {verb: [place(item) for item in items] for verb, items in value.items()}
            else:
                mapped[name] = [place(item) for item in value]
        else:
            mapped[name] = value
    return mapped


def _leaves(table: Mapping[str, Any], kind: type = Recipe, prefix: str = "") -> Iterator[str]:
    for name, value in table.items():
        hint = _types(kind)[name]
        if is_dataclass(hint):
            yield from _leaves(value, typing.cast("type", hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _build(kind: type, table: Mapping[str, Any], file: Path) -> Any:
    """The frozen dataclass of a table that was found right."""
    values: dict[str, Any] = {}
    for name, value in table.items():
        hint = _types(kind)[name]
        if is_dataclass(hint):
            values[name] = _build(typing.cast("type", hint), value, file)
        elif hint == tuple[Path, ...]:
            values[name] = tuple(Path(item) for item in value)
        elif _is_list(hint):
            values[name] = tuple(value)
        elif _plain(hint) is Path:
            values[name] = Path(value) if value else None
        else:
            values[name] = value
    if kind is Recipe:
        values["seed"] = values.get("seed") or values["name"]
        values["file"] = file
    return kind(**values)


# --- values: what is possible -----------------------------------------------------------------------------------------


def check_values(file: Path, table: Mapping[str, Any], origin: Mapping[str, Path] | None = None) -> Iterator[str]:
    """The keys that are missing, and the values that are impossible.

    Args:
        file: of the recipe, for what no file says.
        table: all files merged.
        origin: which file said a key last.
    """
    origin = origin or {}
    kind = table.get("base", {}).get("kind")
    for item in fields(Recipe):
        if item.default is MISSING and item.name not in table:
            yield f"{file}: {item.name} is missing; {_example(item.name, _types(Recipe)[item.name])}"
    for key, check in CHECKS.items():
        value = _at(table, key)
        if value is None:
            continue
        where = origin.get(key, file)
        if not value and key in NOT_EMPTY and not (key == "packages" and kind == "image"):
            yield f"{where}: {key} is empty; {_example(key, tuple[str, ...])}"
        elif isinstance(value, list) and len(set(value)) < len(value):
            twice = next(item for item in value if value.count(item) > 1)
            yield f"{where}: {key}: {shown(twice)} stands there twice; take one out"
        else:
            complaint = check(value)
            if complaint:
                yield f"{where}: {key}: {complaint}"
    yield from _check_base(file, table.get("base", {}), origin)


def _check_base(file: Path, base: Mapping[str, Any], origin: Mapping[str, Path]) -> Iterator[str]:
    """What each kind of base needs besides."""
    kind = base.get("kind", "debian")
    where = origin.get("base.kind", file)
    vendor = base.get("vendor", {})
    if not base.get("suite"):
        yield f'{where}: base.suite is missing; write base.suite = "trixie" or extend debian-trixie.toml'
    if kind == "raspios" and not vendor.get("mirror"):
        yield f"{where}: base.vendor.mirror is missing; write the address of Raspberry Pi's archive there"
    if kind == "raspios" and not vendor.get("keyring"):
        yield f"{where}: base.vendor.keyring is missing; write the file with that archive's public keys there"
    if kind != "raspios" and vendor.get("mirror"):
        where = origin.get("base.vendor.mirror", file)
        yield f'{where}: base.vendor.mirror is for kind raspios alone; write base.kind = "raspios" or take it out'
    if kind == "image":
        for key, what in (("source", "an .img or .img.xz file"), ("source_sha256", "that file's SHA-256")):
            if not base.get(key):
                yield f'{where}: base.{key} is missing; write {what} as base.{key} = "..."'


def _at(table: Mapping[str, Any], key: str) -> Any:
    *parents, name = key.split(".")
    for parent in parents:
        table = table.get(parent, {})
    return table.get(name)


def _advice(recipe: Recipe) -> list[str]:
    """What an image can be built without, and a product should not be sold without."""
    advice = []
    if recipe.support.until is None:
        advice.append(f"{recipe.file}: support.until is missing: buyers must be told; write support.until = 2031-12-31")
    elif recipe.support.until < dt.datetime.now(dt.UTC).date():
        advice.append(f"{recipe.file}: support.until is past: {recipe.support.until}; write a day to come")
    if not recipe.support.contact:
        advice.append(f'{recipe.file}: support.contact is missing; write support.contact = "mailto:security@..."')
    return advice
