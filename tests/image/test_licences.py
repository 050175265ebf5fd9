"""The licences of an image: named as their makers name them, and nothing is left out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from image import licences, wheels
from image.errors import ImageError
from image.licences import Counts
from image.manifest import digest

LOCK = Path(__file__).parent.parent.parent / "requirements/device.lock"
PYTHON = wheels.versions(LOCK.read_text())

DEP5 = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: Somebody
License: GPL-2+ or Artistic

Files: other/*
Copyright: Somebody else
License: Expat
 Permission is hereby granted.

Files: third/*
Copyright: A third one
License: Permission to use, copy, modify, and distribute this software and its documentation is granted
"""

BLOBS = """Format: http://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: boot/*
Copyright: Broadcom
License: Proprietary_1
 All rights reserved.
"""


class Image:
    """A root, a boot tree and a library that a test fills."""

    def __init__(self, top: Path) -> None:
        self.root, self.boot, self.library = top / "root", top / "boot", top / "lib"
        for folder in (self.root / "var/lib/dpkg", self.boot, self.library):
            folder.mkdir(parents=True)
        self.status = self.root / "var/lib/dpkg/status"
        self.status.touch()
        self.output = top / "licences.txt"

    def package(self, name: str, text: str | None = None, state: str = "install ok installed") -> Path:
        with self.status.open("a") as file:
            file.write(f"Package: {name}\nStatus: {state}\nVersion: 1.0-1\n\n")
        place = self.root / "usr/share/doc" / name / "copyright"
        if text is not None:
            place.parent.mkdir(parents=True)
            place.write_text(text)
        return place

    def wheel(self, name: str, metadata: str, licence: str = "") -> None:
        folder = self.library / f"{name.replace('-', '_')}-{PYTHON[name]}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {PYTHON[name]}\n{metadata}")
        if licence:
            (folder / "LICENSE").write_text(licence)

    def write(self) -> tuple[Counts, str]:
        counts = licences.write(self.root, self.boot, self.library, "picket", "1.2.3", self.output)
        return counts, self.output.read_text()


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path)


def said(text: str, name: str) -> list[str]:
    """The lines below a name in the lists of the text."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line == name) + 1
    found = []
    while start < len(lines) and lines[start].startswith("    "):
        found.append(lines[start].strip())
        start += 1
    return found


def test_a_package_has_the_names_that_its_copyright_file_says(image: Image) -> None:
    image.package("tool", DEP5)

    _, text = image.write()

    assert said(text, "tool 1.0-1") == [
        "Expat, GPL-2+ or Artistic, a text without a name",
        "usr/share/doc/tool/copyright",
    ]


def test_a_text_that_a_machine_cannot_read_is_named_by_its_digest(image: Image) -> None:
    place = image.package("busybox", "This package was made by somebody.\n\nIt is under the GPL.\n")

    counts, text = image.write()

    assert said(text, "busybox 1.0-1")[0] == f"free text, sha256 {digest(place)}"
    assert counts.free_text == 1


@pytest.mark.parametrize("content", ["", "Format: nonsense\n", "\xff\xfe", DEP5.replace("Files: *", "Files"), "a: b"])
def test_a_damaged_copyright_file_does_not_stop_the_list(image: Image, content: str) -> None:
    image.package("broken").parent.mkdir(parents=True)
    (image.root / "usr/share/doc/broken/copyright").write_bytes(content.encode("latin-1"))

    _, text = image.write()

    assert said(text, "broken 1.0-1")


def test_what_is_unknown_is_listed_on_top_and_in_its_place(image: Image) -> None:
    image.package("bare")

    counts, text = image.write()

    assert said(text, "bare 1.0-1") == ["unknown"]
    assert "bare 1.0-1" in text.partition("Free texts")[0]
    assert "Debian packages: 1, of which 0 name their licences, 0 have a free text, 1 are unknown" in text
    assert counts.unknown == 1 + len(PYTHON) - ("lgpio" in PYTHON)


def test_a_package_that_was_taken_away_is_not_listed(image: Image) -> None:
    image.package("gone", DEP5, state="deinstall ok config-files")

    _, text = image.write()

    assert "gone" not in text


def test_a_link_to_another_packages_file_is_followed_but_not_out_of_the_root(image: Image, tmp_path: Path) -> None:
    image.package("libtool", BLOBS)
    (tmp_path / "copyright").write_text(DEP5)
    for name, target in {"tool": "libtool", "stray": str(tmp_path)}.items():
        image.package(name).parent.symlink_to(target)

    _, text = image.write()

    assert said(text, "tool 1.0-1")[0] == "Proprietary_1"
    assert said(text, "stray 1.0-1") == ["unknown"]


def test_every_wheel_of_the_lock_is_listed_with_what_its_metadata_say(image: Image) -> None:
    image.wheel("cryptography", "License-Expression: Apache-2.0 OR BSD-3-Clause\n", "text")
    image.wheel("python-pkcs11", "License: MIT\n")
    image.wheel("tuf", "Classifier: Topic :: Security\nClassifier: License :: OSI Approved :: MIT License\n")
    image.wheel("cffi", "License: see below, and read on until you have understood what this long sentence says\n", "t")

    _, text = image.write()

    version = PYTHON["cryptography"]
    assert said(text, f"cryptography {version}") == [
        "Apache-2.0 OR BSD-3-Clause",
        f"lib/cryptography-{version}.dist-info/LICENSE",
    ]
    assert said(text, f"python-pkcs11 {PYTHON['python-pkcs11']}") == ["MIT"]
    assert said(text, f"tuf {PYTHON['tuf']}") == ["MIT License"]
    assert said(text, f"cffi {PYTHON['cffi']}")[0].startswith("free text, sha256 ")
    assert said(text, f"urllib3 {PYTHON['urllib3']}") == ["unknown"]
    assert all(said(text, f"{name} {version}") for name, version in PYTHON.items())


def beside(image: Image) -> None:
    (image.boot / "LICENCE.broadcom").write_text("Redistribution in binary form is permitted.\n")


def packaged(image: Image) -> None:
    image.package("raspi-firmware", BLOBS)


def nowhere(image: Image) -> None:
    """No licence at all."""


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        (beside, ["LICENCE.broadcom", "LICENCE.broadcom"]),
        (packaged, ["Proprietary_1", "usr/share/doc/raspi-firmware/copyright"]),
        (nowhere, ["unknown"]),
    ],
)
def test_the_gpus_firmware_is_listed_file_by_file(
    image: Image, licence: Callable[[Image], None], expected: list[str]
) -> None:
    licence(image)
    for name in ("start4.elf", "fixup4.dat", "bootcode.bin", "config.txt"):
        (image.boot / name).write_text(name)

    _, text = image.write()

    assert [said(text, name) for name in ("start4.elf", "fixup4.dat", "bootcode.bin")] == [expected] * 3
    assert "config.txt" not in text


def test_the_numbers_on_top_are_those_of_the_lists(image: Image) -> None:
    image.package("tool", DEP5)
    image.package("free", "text")
    image.package("bare")

    counts, text = image.write()

    assert "Debian packages: 3, of which 1 name their licences, 1 have a free text, 1 are unknown" in text
    assert counts.named + counts.free_text + counts.unknown == 3 + len(PYTHON) + 1  # and the agent


def test_the_same_image_gives_the_same_text(image: Image) -> None:
    for name in ("b", "a", "c"):
        image.package(name, DEP5)

    assert image.write() == image.write()


def test_a_root_without_dpkgs_list_is_refused_by_name(image: Image) -> None:
    image.status.unlink()

    with pytest.raises(ImageError, match="status is missing"):
        image.write()
