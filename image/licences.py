"""What an image is licensed under, as one text: each package and each boot file, with the names that its makers gave.

The names stand as they are written in Debian's copyright files and in the wheels' metadata: nothing is translated, and
what names no licence is listed with the digest of its text, or as unknown, but never left out. The texts themselves
stay in the image, at the paths that are given here.
"""

import importlib.metadata
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from debian import copyright as debian_copyright
from debian.deb822 import Deb822

from image import wheels
from image.errors import ImageError
from image.manifest import digest
from image.release import agent_version
from image.sbom import GPU_FIRMWARE

_LOCK = Path(__file__).parent.parent / "requirements/device.lock"

#: A licence's name; a whole sentence in its place is a text.
_NAME = re.compile(r"[A-Za-z0-9][^\s]*( [^\s]+){0,7}")
_NAME_LENGTH = 60
_UNNAMED = "a text without a name"

#: Wheels that are compiled here, without metadata, and what their setup.py says.
_COMPILED = {"lgpio": "Unlicense"}

_DOCUMENTS = Path("usr/share/doc")
_BROADCOM = "LICENCE.broadcom"
_GROUPS = {"ours": "Ours", "debian": "Debian packages", "python": "Python packages", "firmware": "Firmware files"}


@dataclass(frozen=True)
class Counts:
    """How many packages and files name their licences, have a text without names, or say nothing that is known."""

    named: int
    free_text: int
    unknown: int


@dataclass(frozen=True)
class _Entry:
    """A package or a file.

    Attributes:
        group: a key of `_GROUPS`.
        name: of the package or the file.
        version: "" for a file.
        licences: names, sorted; none if only a text is there.
        place: of the text, in the image; "" if there is none.
        sha256: of a text that names no licence.
    """

    group: str
    name: str
    version: str
    licences: tuple[str, ...] = ()
    place: str = ""
    sha256: str = ""

    @property
    def verdict(self) -> str:
        """The name of its number in `Counts`."""
        if self.licences:
            return "named"
        return "free_text" if self.sha256 else "unknown"

    def lines(self) -> Iterator[str]:
        yield f"{self.name} {self.version}".rstrip()
        if self.licences:
            yield f"    {', '.join(self.licences)}"
        else:
            yield f"    free text, sha256 {self.sha256}" if self.sha256 else "    unknown"
        if self.place:
            yield f"    {self.place}"


def write(root: Path, boot: Path, library: Path, name: str, version: str, output: Path) -> Counts:
    """Write the licences of an image.

    Args:
        root: the root tree with dpkg's list and the packages' copyright files.
        boot: the tree that the boot partition holds.
        library: the directory with the agent's Python packages (`lib` of its release).
        name: of the image.
        version: of the image.
        output: the text file to write.

    Raises:
        ImageError: the root has no list of packages.
    """
    # python-debian warns of each file whose format is named by an older address.
    logging.getLogger(debian_copyright.__name__).setLevel(logging.ERROR)
    entries = [
        _Entry("ours", "picket-agent", agent_version(), ("Apache-2.0",), "LICENSE of Picket's source"),
        *_debian(root),
        *_python(library),
        *_firmware(root, boot),
    ]
    output.write_text("\n".join(_text(entries, f"{name} {version}")) + "\n")
    found = Counter(entry.verdict for entry in entries)
    return Counts(found["named"], found["free_text"], found["unknown"])


# --- where licences are named -------------------------------------------------------------------------------------


def _debian(root: Path) -> Iterator[_Entry]:
    status = root / "var/lib/dpkg/status"
    if not status.is_file():
        raise ImageError(f"{status} is missing: the licences are listed by it")
    with status.open() as file:
        installed = {
            paragraph["Package"]: paragraph["Version"]
            for paragraph in Deb822.iter_paragraphs(file, use_apt_pkg=False)
            if paragraph.get("Status") == "install ok installed"
        }
    for name, version in sorted(installed.items()):
        place = _DOCUMENTS / name / "copyright"
        text = _within(root, place)
        if text is None:
            yield _Entry("debian", name, version)
        else:
            licences = tuple(sorted(_names(text)))
            yield _Entry("debian", name, version, licences, str(place), "" if licences else digest(text))


def _names(text: Path) -> set[str]:
    """The licences that a copyright file names in the form that a machine reads; none if it has another form."""
    content = _parsed(text)
    if content is None:
        return set()
    licences = (getattr(paragraph, "license", None) for paragraph in content.all_paragraphs())
    return {_named(licence.synopsis) for licence in licences if licence is not None}


def _named(synopsis: str | None) -> str:
    name = " ".join((synopsis or "").split())
    return name if len(name) <= _NAME_LENGTH and _NAME.fullmatch(name) else _UNNAMED


def _parsed(text: Path) -> debian_copyright.Copyright | None:
    try:
        with text.open(encoding="utf-8", errors="replace") as file:
            return debian_copyright.Copyright(file, strict=False)
    except (debian_copyright.Error, ValueError):
        return None


def _python(library: Path) -> Iterator[_Entry]:
    found = {_key(one.metadata["Name"]): one for one in importlib.metadata.distributions(path=[str(library)])}
    for name, version in sorted(wheels.versions(_LOCK.read_text()).items()):
        distribution = found.get(_key(name))
        if distribution is not None:
            yield _wheel(name, version, distribution, library)
        elif name in _COMPILED:
            yield _Entry("python", name, version, (_COMPILED[name],))
        else:
            yield _Entry("python", name, version)


def _key(name: str) -> str:
    """The one form of a Python package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _wheel(name: str, version: str, distribution: importlib.metadata.Distribution, library: Path) -> _Entry:
    folder = next(path for path in library.glob("*.dist-info") if _key(path.stem) == _key(f"{name}-{version}"))
    texts = sorted(path for path in folder.rglob("*") if re.match(r"(?i)licen[cs]e|copying", path.name))
    texts = [path for path in texts if path.is_file()]
    place = f"lib/{texts[0].relative_to(library)}" if texts else ""
    metadata = distribution.metadata
    classes = [text for text in metadata.get_all("Classifier", []) if text.startswith("License ::")]
    for said in (*metadata.get_all("License-Expression", []), *metadata.get_all("License", []), *classes):
        licence = _named(said.rpartition("::")[2])
        if licence != _UNNAMED:
            return _Entry("python", name, version, (licence,), place)
    return _Entry("python", name, version, (), place, digest(texts[0]) if texts else "")


def _firmware(root: Path, boot: Path) -> Iterator[_Entry]:
    """The GPU's programs: Raspberry Pi puts a licence beside them, and Debian writes it into the package's file."""
    beside = next((path for path in sorted(boot.rglob(_BROADCOM)) if path.is_file()), None)
    place = _DOCUMENTS / "raspi-firmware/copyright"
    text = _within(root, place)
    content = _parsed(text) if text is not None else None
    for path in sorted(path for path in boot.rglob("*") if GPU_FIRMWARE.fullmatch(path.name)):
        name = str(path.relative_to(boot))
        if beside is not None:
            yield _Entry("firmware", name, "", (_BROADCOM,), str(beside.relative_to(boot)))
            continue
        licence = getattr(content and content.find_files_paragraph(f"boot/{path.name}"), "license", None)
        if licence is not None:
            yield _Entry("firmware", name, "", (_named(licence.synopsis),), str(place))
        elif text is not None:
            yield _Entry("firmware", name, "", (), str(place), digest(text))
        else:
            yield _Entry("firmware", name, "")


def _within(root: Path, place: Path) -> Path | None:
    """A file of the root behind its links, unless they lead out of the root."""
    found, top = (root / place).resolve(), root.resolve()
    return found if found.is_file() and found.is_relative_to(top) else None


# --- the text -----------------------------------------------------------------------------------------------------


def _text(entries: list[_Entry], image: str) -> Iterator[str]:
    yield f"Licences of the image {image}"
    yield ""
    for group, title in _GROUPS.items():
        of_group = [entry for entry in entries if entry.group == group]
        count = Counter(entry.verdict for entry in of_group)
        yield (
            f"{title}: {len(of_group)}, of which {count['named']} name their licences, {count['free_text']} have a"
            f" free text, {count['unknown']} are unknown"
        )
    yield from _list("Unknown", (f"{entry.name} {entry.version}".rstrip() for entry in _only(entries, "unknown")))
    yield from _list("Free texts", (f"{entry.name}  {entry.place}" for entry in _only(entries, "free_text")))
    named = Counter(licence for entry in entries for licence in entry.licences)
    longest = max(map(len, named), default=0)
    yield from _list("Licences, and how many name them", (f"{name:{longest}}  {named[name]}" for name in sorted(named)))
    for group, title in _GROUPS.items():
        lines = (line for entry in entries if entry.group == group for line in entry.lines())
        yield from _list(title, lines, indent="")


def _only(entries: list[_Entry], verdict: str) -> Iterator[_Entry]:
    return (entry for entry in entries if entry.verdict == verdict)


def _list(title: str, lines: Iterable[str], indent: str = "    ") -> Iterator[str]:
    yield from ("", title, "-" * len(title))
    found = [indent + line for line in lines]
    yield from found or [f"{indent}none"]
