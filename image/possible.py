"""What can stand in a recipe, value by value: each check says in words what is wrong, or nothing.

A check knows one value and nothing of the rest of the recipe. It may look at the files that the value names; it asks no
token and no network.
"""

import datetime as dt
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import quote

from image.errors import ImageError

#: The kinds of base that a root file system is made from.
KINDS: Final = ("debian", "raspios", "image")
#: Where the choice of the slot lives.
CONTROLS: Final = ("autoboot", "os-prefix")
#: Whether units have a TPM: all, none, or each finds out at its first boot, for good.
TPM: Final = ("yes", "no", "probe")

#: Where the agent keeps who a unit is.
STATE: Final = "/var/lib/picket"

#: What cannot be shared itself: each image brings its own, and /var is each slot's (ADR 0091).
_OWN: Final = ("/etc", "/opt", "/var")
#: What cannot be shared, nor anything below it: the verified root's programs, the slot's releases, what is in memory or
#: the kernel's, and where what is shared lies itself.
_OWN_TREES: Final = tuple(
    f"/{name}"
    for name in (
        *("bin", "boot", "data", "dev", "lib", "lib64", "opt/picket", "proc", "run", "sbin", "sys", "tmp", "usr"),
        *("var/lock", "var/run", "var/tmp"),
    )
)

Check = Callable[[Any], str | None]


def shown(value: Any) -> str:
    """A value as a complaint shows it, of any length and depth."""
    try:
        said = str(value) if isinstance(value, dt.date) else repr(value)
    except (ValueError, RecursionError):  # thousands of digits (in hex, TOML takes them), or of levels
        return "something too long to show"
    if isinstance(value, bool):
        said = said.lower()
    return said if len(said) <= 40 else f"{said[:37]}..."


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """`: did you mean ...?`, or nothing where nothing is near.

    A key is found by all of its name, by its last part, and first of all by its name in the table `prefix`.
    """
    outer = sorted(known, key=lambda key: -key.count("."))
    names = {key.rpartition(".")[2]: key for key in outer} | {key: key for key in known}
    names |= {key.removeprefix(prefix): key for key in known if key.startswith(prefix)}
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f": did you mean {names[found[0]]}?" if found else ""


# --- kinds of checks ------------------------------------------------------------------------------------------------


def _pattern(expression: str, complaint: str) -> Check:
    """A text, or each text of a list, that must match."""
    compiled = re.compile(expression)

    def check(value: Any) -> str | None:
        for item in value if isinstance(value, list) else [value]:
            if not compiled.fullmatch(item):
                return f"{shown(item)}: {complaint}"
        return None

    return check


def _between(least: int, most: int, unit: str = "") -> Check:
    def check(value: Any) -> str | None:
        if least <= value <= most:
            return None
        return f"{shown(value)} is impossible; write a number from {least} to {most}{unit}"

    return check


def _among(choices: Sequence[str]) -> Check:
    def check(value: Any) -> str | None:
        if value in choices:
            return None
        return f"{shown(value)} is none of {', '.join(choices)}{nearest(value, choices) or '; write one of these'}"

    return check


def _there(test: Callable[[Path], bool], what: str, suffixes: tuple[str, ...] = ()) -> Check:
    """Files or directories that must be there; an empty text is none."""

    def check(value: Any) -> str | None:
        for item in value if isinstance(value, list) else [value]:
            if not item or item.startswith("pkcs11:"):
                continue
            name = item if item.isprintable() else repr(item)
            if not _holds(test, Path(item)):
                return f"there is no {what} {name}; put it there or mend the name"
            if suffixes and not item.endswith(suffixes):
                return f"{name} does not end in {' or '.join(suffixes)}; name such a {what}"
        return None

    return check


def _shared(value: Sequence[str]) -> str | None:
    """Directories that the initramfs can lay over those of the image (image/init), `STATE` among them."""
    complaint = _pattern(r"(/(?!\.\.?(/|$))[^\s/]+)+", "write a whole path like /var/lib/picket")(value)
    if complaint:
        return complaint
    for path in value:
        tree = next((tree for tree in _OWN_TREES if _within(path, tree)), None)
        if tree or path in _OWN:
            return f"{path} cannot be shared: {tree or path} is each image's own; name a directory like {STATE}"
        outer = next((other for other in value if other != path and _within(path, other)), None)
        if outer:
            return f"{path} lies within {outer}, which is shared whole; take one of them out"
    if not any(_within(STATE, path) for path in value):
        return f"{STATE} is missing, so that a unit would be another one after an update of its image; add it"
    return None


def _within(path: str, tree: str) -> bool:
    return f"{path}/".startswith(f"{tree}/")


def _holding(look: Callable[[str], str | None]) -> Check:
    """A file that must be there, and in which `look` finds nothing to complain about; an empty text is none."""
    there = _there(Path.is_file, "file")

    def check(value: Any) -> str | None:
        if not value:
            return None
        try:
            return there(value) or look(value)
        except ImageError as error:
            return str(error)

    return check


def _boot_key(value: str) -> None:
    """A private key that the boot loader's signatures can be made with; a token is not asked for one."""
    from image import boot_key, hsm  # noqa: PLC0415 - cryptography is slow to load, and most recipes name no key

    if value.startswith("pkcs11:"):
        hsm.parse(value)
    else:
        boot_key.open_boot_signer(f"file:{quote(value)}")


def _public_key(value: str) -> None:
    """A public key: what the file holds goes into every unit."""
    from image import factory_key  # noqa: PLC0415 - as above

    factory_key.read_public(Path(value))


def _key_ring(value: str) -> str | None:
    """OpenPGP's public keys, by how they begin: the tag of the first packet (RFC 9580, 4.2), or armor's first line."""
    try:
        with Path(value).open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        return f"{value} cannot be read: {error.strerror}"
    first = head[0] if head else 0
    tag = first & 0x3F if first & 0x40 else first >> 2 & 0xF
    if (first & 0x80 and tag in _SECRET_TAGS) or b"-----BEGIN PGP PRIVATE KEY BLOCK-----" in head:
        return f"{value} holds a private key, which stays with you: `gpg --export KEY` writes the public one"
    if (first & 0x80 and tag == _PUBLIC_TAG) or b"-----BEGIN PGP PUBLIC KEY BLOCK-----" in head:
        return None
    return f"{value} is no OpenPGP key ring; write one by `gpg --export KEY`, or name the file that the archive offers"


def _holds(test: Callable[[Path], bool], path: Path) -> bool:
    try:
        return test(path)
    except OSError:  # a name that is too long, a directory that may not be read
        return False


#: OpenPGP's packets: a public key; a private key and a part of one.
_PUBLIC_TAG: Final = 6
_SECRET_TAGS: Final = (5, 7)

CHOICES: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {"base.kind": KINDS, "boot.control": CONTROLS, "tpm": TPM}
)

#: Names end up in file names and in the banner.
_NAME: Final = _pattern(r"[a-z][a-z0-9-]{0,31}", "write small letters, digits and dashes, at most 32")
_HOST_LABEL: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_COMPONENTS: Final = _pattern(r"[a-z][a-z0-9-]*", "write an archive's component like main")
_ADDRESS: Final = _pattern(
    r"|(https?|file|copy)://?\S+", "write an address that begins with https://, http:// or file:/"
)
_BOARD: Final = _pattern(r"[a-z0-9][a-z0-9+_-]*", "write a device tree's name without .dtb, like bcm2711-rpi-4-b")

#: What each key's value must be. FAT32 needs 65525 clusters; below 33 MiB mkfs.vfat makes a FAT16, which the oldest
#: boot ROMs dislike. The firmware reads at most 98 characters of a line of config.txt.
CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "name": _NAME,
        "seed": _pattern(r"[!-~]{0,64}", "write at most 64 characters without spaces"),
        "version": _pattern(r"[0-9]+(\.[0-9]+){1,3}([a-z0-9.+-]{0,24})", "write a version like 1.2 or 1.2.3"),
        "hostname": _pattern(r"[a-z]([a-z0-9?-]{0,61}[a-z0-9?])?", "write small letters, digits, - and ?: unit-????"),
        "packages": _pattern(r"[a-z0-9][a-z0-9+.-]+", "write a package's name alone; its version stands in the lock"),
        "exclude": _pattern(r"\+?/\S+", "write a path that begins with / or +/"),
        "files": _there(Path.is_dir, "directory"),
        "overlays": _there(Path.is_file, "file", (".dts",)),
        "boards": _BOARD,
        "experimental_boards": _BOARD,
        "hardware": _pattern(r"[a-z0-9-]+,[a-z0-9.+_-]+", "write it as the device tree's compatible, like maker,model"),
        "security_version": _between(1, 2**31 - 1),
        "config": _pattern(r"[ -~]{1,98}", "write one line of at most 98 characters of ASCII"),
        "cmdline": _pattern(r"[!-~]+", "write one word of ASCII each"),
        "wifi_country": _pattern(r"|[A-Z]{2}", 'write two capital letters like DE, or "" for none'),
        "factory_key": _holding(_public_key),
        "lock_of": _there(Path.is_file, "file", (".toml",)),
        "endpoint": _pattern(rf"|{_HOST_LABEL}(\.{_HOST_LABEL})+", 'write a host alone, like mqtt.example.com, or ""'),
        "pir_line": _between(0, 27),
        "shared": _shared,
        "tpm": _among(TPM),
        "base.kind": _among(KINDS),
        "base.suite": _pattern(r"|[a-z][a-z0-9/.-]*", "write a release's name like trixie"),
        "base.architecture": _among(("arm64",)),
        "base.components": _COMPONENTS,
        "base.mirror": _ADDRESS,
        "base.keyring": _holding(_key_ring),
        "base.vendor.mirror": _ADDRESS,
        "base.vendor.keyring": _holding(_key_ring),
        "base.vendor.suite": _pattern(r"|[a-z][a-z0-9/.-]*", "write a release's name like trixie"),
        "base.vendor.components": _COMPONENTS,
        "base.source": _there(Path.is_file, "file", (".img", ".img.xz")),
        "base.source_sha256": _pattern(r"|[0-9a-f]{64}", "write the file's SHA-256 in 64 small hex digits"),
        "boot.control": _among(CONTROLS),
        "boot.secure_boot_key": _holding(_boot_key),
        "disk.boot_mebibytes": _between(64, 1024, " MiB"),
        "disk.root_mebibytes": _between(64, 16384, " MiB"),
        "disk.data_mebibytes": _between(32, 16384, " MiB"),
        "support.contact": _pattern(r"|(mailto:\S+@\S+|https://\S+)", "write mailto:somebody@somewhere or https://..."),
    }
)  # fmt: skip

#: Lists that must not be empty.
NOT_EMPTY: Final = ("packages", "boards", "hardware", "base.components")
