"""Who gets a sealed unit back into factory mode: the station's authorisation before the image's own files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image import authorisation, configure, factory_key, signing
from image.files.usr.lib.picket.slots import factory_mode
from image.files.usr.lib.picket.slots.board import Places
from image.files.usr.lib.picket.slots.factory_mode import Authorisation, enter, judge, parse
from image.files.usr.lib.picket.slots.faults import Fault
from image.layout import Layout

PRODUCT, BOARD = "picket", "10000000abcdef01"
#: The image's build, and some time later.
BUILT, NOW = 1_790_000_000, 1_795_000_000
DAY = 86400


@dataclass(frozen=True)
class Sealed:
    """A sealed unit's files, as the build writes them, and the key that it knows."""

    root: Path
    signer: signing.Signer

    @property
    def places(self) -> Places:
        return Places.under(self.root)

    def authorise(self, issued: int = NOW, days: int = 7, **changes: str) -> bytes:
        said = {"product": PRODUCT, "board": BOARD} | changes
        return authorisation.compose(said["product"], said["board"], issued, days, self.signer)

    def refuses(self, data: bytes) -> str:
        with pytest.raises(Fault) as refused:
            enter(data, self.places)
        return refused.value.code


@pytest.fixture
def unit(tmp_path: Path) -> Sealed:
    root = tmp_path / "root"
    key = factory_key.ensure(tmp_path / "image", "image")
    signer = signing.open_signer(f"file:{key}")
    for folder in ("data/system", "proc/device-tree", "usr/lib/picket", "var/lib/systemd/timesync"):
        (root / folder).mkdir(parents=True)
    configure.install_signers(root, signer.public_line)
    described = Layout.of(0x1234ABCD, 96 << 20, 320 << 20, 64 << 20, 900).description(PRODUCT, "0.1.0", 1, ())
    (root / "usr/lib/picket/layout.json").write_text(described)
    (root / "proc/device-tree/serial-number").write_bytes(BOARD.upper().encode() + b"\0")
    for path, moment in (("usr/lib/clock-epoch", BUILT), ("var/lib/systemd/timesync/clock", NOW - 3600)):
        (root / path).touch()
        os.utime(root / path, (moment, moment))
    return Sealed(root, signer)


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pi begins at 1970."""
    monkeypatch.setattr("image.files.usr.lib.picket.slots.factory_mode.time.time", lambda: 12.0)


def test_a_signed_authorisation_for_this_board_opens_factory_mode(unit: Sealed) -> None:
    assert enter(unit.authorise(), unit.places) == Authorisation(PRODUCT, BOARD, NOW, NOW + 7 * DAY)


def test_it_does_so_once(unit: Sealed) -> None:
    data = unit.authorise()
    enter(data, unit.places)

    assert unit.refuses(data) == "used"


def test_one_that_was_issued_before_the_last_is_used_up_with_it(unit: Sealed) -> None:
    older = unit.authorise(issued=NOW - 60)
    enter(unit.authorise(), unit.places)

    assert unit.refuses(older) == "used"
    enter(unit.authorise(issued=NOW + 60), unit.places)


def test_another_boards_is_refused(unit: Sealed) -> None:
    assert unit.refuses(unit.authorise(board="10000000abcdef02")) == "wrong-hardware"


def test_another_products_is_refused(unit: Sealed) -> None:
    assert unit.refuses(unit.authorise(product="other")) == "wrong-product"


def test_one_that_has_expired_by_the_last_known_time_is_refused(unit: Sealed) -> None:
    assert unit.refuses(unit.authorise(issued=NOW - 8 * DAY)) == "expired"


def test_one_that_has_expired_by_the_clock_is_refused(unit: Sealed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("image.files.usr.lib.picket.slots.factory_mode.time.time", lambda: NOW + 8.0 * DAY)

    assert unit.refuses(unit.authorise()) == "expired"


@pytest.mark.parametrize("lost", ["usr/lib/clock-epoch", "var/lib/systemd/timesync/clock"])
def test_what_is_left_of_the_known_times_counts(unit: Sealed, lost: str) -> None:
    (unit.root / lost).unlink()

    assert unit.refuses(unit.authorise(issued=BUILT - 8 * DAY)) == "expired"


def test_another_key_is_refused(unit: Sealed, tmp_path: Path) -> None:
    stranger = replace(unit, signer=signing.open_signer(f"file:{factory_key.ensure(tmp_path / 'stranger', 'x')}"))

    assert unit.refuses(stranger.authorise()) == "bad-signature"


@pytest.mark.parametrize("namespace", [signing.BUNDLE, signing.IMAGE])
def test_a_signature_over_something_else_is_refused(unit: Sealed, namespace: str) -> None:
    line = unit.authorise().partition(b"\n")[0] + b"\n"

    assert unit.refuses(line + unit.signer.sign(line, namespace)) == "bad-signature"


@pytest.mark.parametrize(
    "tampered",
    [
        lambda data: data.replace(b'"expires": ', b'"expires": 9'),
        lambda data: data.replace(b'"issued"', b'"format": 1, "issued"'),
        lambda data: data.replace(b"\n", b" \n", 1),
    ],
)
def test_a_changed_word_is_refused(unit: Sealed, tampered: Callable[[bytes], bytes]) -> None:
    data = unit.authorise()
    changed = tampered(data)
    assert changed != data

    assert unit.refuses(changed) == "bad-signature"


def test_an_authorisation_that_is_cut_off_anywhere_is_refused_and_not_used_up(unit: Sealed) -> None:
    data = unit.authorise()
    for length in range(0, len(data) - 1, 37):
        assert unit.refuses(data[:length]) in {"bad-request", "bad-signature"}

    enter(data, unit.places)


@given(st.binary(max_size=300) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
    lambda value: json.dumps(value).encode() + b"\n"))  # fmt: skip
def test_nonsense_is_a_refusal_and_no_accident(data: bytes) -> None:
    with pytest.raises(Fault):
        parse(data)


def test_more_than_any_authorisation_has_is_not_looked_at(unit: Sealed) -> None:
    assert unit.refuses(unit.authorise() + b"\n" * factory_mode.LIMIT) == "bad-request"


def test_nothing_opens_where_its_use_cannot_be_noted(unit: Sealed) -> None:
    (unit.root / "data/system").rmdir()

    assert unit.refuses(unit.authorise()) == "io"


def test_nothing_opens_where_what_was_used_cannot_be_read(unit: Sealed) -> None:
    enter(unit.authorise(), unit.places)
    (unit.root / "data/system/factory-mode-used").write_bytes(b"\xff")

    assert unit.refuses(unit.authorise(issued=NOW + 60)) == "io"


def test_an_authorisation_that_ends_before_it_begins_never_counts() -> None:
    with pytest.raises(Fault, match="never counted"):
        judge(Authorisation(PRODUCT, BOARD, NOW, NOW), PRODUCT, BOARD, 0, 0)


def run(root: Path, data: bytes) -> subprocess.CompletedProcess[bytes]:
    """As the initramfs runs it, but for its chroot."""
    program = Path("image/files/usr/lib/picket/slots").absolute()
    return subprocess.run(
        [sys.executable, "-I", "-S", program, "factory-mode"],
        input=data, capture_output=True, check=False, env={"PICKET_ROOT": str(root)},
    )  # fmt: skip


def test_the_program_says_by_its_exit_code_what_the_initramfs_needs_to_know(unit: Sealed) -> None:
    data = unit.authorise(issued=NOW * 2)  # this process has a clock

    taken, again = run(unit.root, data), run(unit.root, data)

    assert (taken.returncode, again.returncode) == (0, 1)
    assert b"factory mode, by a signed authorisation" in taken.stderr
    assert b"stays closed" in again.stderr
