"""Builds that are interrupted, killed, or run out of disk: nothing half made stays, and the next build is right."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from image import factory_key
from image.base import base_root
from image.build import LOCK, Keys, build_image
from image.cache import held
from image.errors import DiskFullError
from image.manifest import ImageManifest
from image.progress import Clock
from image.recipe import load
from image.wheels import device_library
from tests.machine import small_file_system

pytestmark = pytest.mark.vm

RECIPE = Path("image/recipes/picket.toml")
CACHE = Path("build/cache").resolve()
UPDATE_ROOT = Path("build/updates/repository/root.json").resolve()


@pytest.fixture(scope="module")
def parts() -> list[Path]:
    """What a build of the product takes from the cache."""
    with held(CACHE):
        base = base_root(load(RECIPE), CACHE)
        return [base.directory, device_library(LOCK, base, CACHE), CACHE / "debs", CACHE / "downloads"]


def lend(parts: Sequence[Path], cache: Path) -> Path:
    """A cache of its own, with links to parts of the common one."""
    cache.mkdir(exist_ok=True)
    for part in parts:
        (cache / part.name).symlink_to(part)
    return cache


@pytest.fixture
def cache(parts: list[Path], tmp_path: Path) -> Path:
    return lend(parts, tmp_path / "cache")


def left_in(cache: Path, output: Path) -> set[str]:
    """What a build left beside its log, the lock, and what was there before."""
    names = {path.name for folder in (cache, output) if folder.exists() for path in folder.iterdir()}
    lent = {path.name for path in cache.iterdir() if path.is_symlink()}
    return names - lent - {"lock", "stages.json", "picket-0.1.0.log"}


def begun(cache: Path, output: Path, last: str) -> subprocess.Popen[str]:
    """A build that has just finished a stage."""
    process = subprocess.Popen(
        [sys.executable, "-m", "image", "build", "--cache", cache, "--output", output],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.strip().startswith(last):
            return process
    process.wait()
    pytest.fail(f"the build ended before it was interrupted:\n{''.join(said)}")


def ended(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    process.stderr.read()
    process.stderr.close()
    return process.wait()


def test_the_build_after_one_that_was_killed_is_right(image: ImageManifest, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    killed = begun(cache, output, "boot files")
    killed.send_signal(signal.SIGKILL)
    ended(killed)
    assert any(name.startswith("build-") for name in left_in(cache, output))
    assert any(name.startswith(".picket-0.1.0-") for name in left_in(cache, output))

    subprocess.run([sys.executable, "-m", "image", "build", "--cache", cache, "--output", output, "--json"],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip

    made = ImageManifest.load(output / "picket.json")
    assert left_in(cache, output) == {"picket-0.1.0", "picket.json"}
    assert made.image.sha256 == image.image.sha256
    made.verify()


def test_an_interrupted_build_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    interrupted = begun(cache, output, "root")

    interrupted.send_signal(signal.SIGINT)

    assert ended(interrupted) == 130
    assert left_in(cache, output) == set()
    assert "KeyboardInterrupt" in (output / "picket-0.1.0.log").read_text()


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system that has just the room for a build."""
    with small_file_system(tmp_path / "small", 1000) as place:
        yield place


def filling(place: Path, at: str) -> Callable[[str], AbstractContextManager[Callable[[str], None]]]:
    """Stages, at one of which somebody else takes all the room that is left."""
    clock = Clock()

    @contextmanager
    def stage(title: str) -> Iterator[Callable[[str], None]]:
        if title == at:
            free = shutil.disk_usage(place).free
            with (place / "somebody's").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - (1 << 20))
        with clock.stage(title) as say:
            yield say

    return stage


@pytest.mark.parametrize(("full", "at"), [("cache", "unpack"), ("cache", "root"), ("output", "compress")])
def test_a_disk_that_fills_up_is_named_and_nothing_half_made_stays(
    small: Path, cache: Path, parts: list[Path], tmp_path: Path, full: str, at: str
) -> None:
    places = {"cache": cache, "output": tmp_path / "output", full: small}
    if full == "cache":
        lend(parts, small)
    keys = Keys(factory_key.ensure(), UPDATE_ROOT)

    with pytest.raises(
        DiskFullError, match=rf"{small} is full: \d MiB are free, and a build needs about \d+ MiB there"
    ):
        build_image(load(RECIPE), places["output"], places["cache"], keys, filling(small, at))

    assert left_in(places["cache"], places["output"]) == {"somebody's"}
