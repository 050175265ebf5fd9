"""Room on the disk."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from image import space
from image.__main__ import main
from image.errors import CommandFailedError, DiskFullError
from image.run import run
from image.space import MEBIBYTE
from tests.machine import small_file_system

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    with small_file_system(tmp_path / "small", 24) as place:
        yield place


def test_where_there_is_room_nothing_is_said(small: Path) -> None:
    with space.room({small: 20 * MEBIBYTE}):
        pass


def test_a_build_that_has_no_room_does_not_begin_and_says_how_much_it_needs(small: Path) -> None:
    said = rf"{small} is full: 24 MiB are free, and a build needs about 30 MiB"
    with pytest.raises(DiskFullError, match=said), space.room({small: 30 * MEBIBYTE}):
        pytest.fail("it began")


def test_what_two_places_of_one_file_system_need_adds_up(small: Path) -> None:
    (small / "deep/er").mkdir(parents=True)

    with pytest.raises(DiskFullError, match="about 30 MiB"), space.room({small: 15 << 20, small / "deep/er": 15 << 20}):
        pytest.fail("it began")


def test_a_write_that_finds_no_room_is_told_with_its_place(small: Path) -> None:
    said = rf"{small} is full: 0 MiB are free, and a build needs about 10 MiB"
    with pytest.raises(DiskFullError, match=said), space.room({small: 10 * MEBIBYTE}):
        (small / "file").write_bytes(bytes(30 * MEBIBYTE))


def test_a_program_that_finds_no_room_is_told_the_same_way(small: Path) -> None:
    with pytest.raises(DiskFullError, match=f"{small} is full") as caught, space.room({small: 10 * MEBIBYTE}):
        run("dd", "if=/dev/zero", f"of={small}/file", "bs=1M", "count=30")

    assert isinstance(caught.value.__cause__, CommandFailedError)


def test_other_failures_stay_what_they_are(small: Path) -> None:
    with pytest.raises(CommandFailedError, match="false"), space.room({small: 10 * MEBIBYTE}):
        run("false")
    with pytest.raises(FileNotFoundError), space.room({small: 10 * MEBIBYTE}):
        (small / "nowhere").read_bytes()


@pytest.mark.parametrize("option", ["--cache", "--output"])
def test_the_command_leaves_with_3_and_nothing_half_made(
    small: Path, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"--cache": tmp_path / "cache", "--output": tmp_path / "output", option: small}
    arguments = [str(item) for pair in places.items() for item in pair]
    monkeypatch.setattr(sys, "argv", ["image", "build", "--no-updates", *arguments])

    assert main() == 3

    said = capsys.readouterr().err
    assert f"the file system {small} is full" in said
    assert "--cache and --output" in said
    assert {path.name for path in small.iterdir()} <= {"lock", "picket-0.1.0.log"}
