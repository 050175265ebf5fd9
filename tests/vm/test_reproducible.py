"""The same recipe gives the same bits: built twice, in two places, by two people, in two years. No QEMU runs."""

import filecmp
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from image import checksums, factory_key, signing
from image.manifest import ImageManifest
from tests.vm.difference import report
from tests.vm.test_bases import CACHE, ROOT, lend_debs

pytestmark = pytest.mark.vm

RECIPE = """
extends = "picket.toml"
files = ["more"]
factory_key = "factory.pub"
"""


@dataclass(frozen=True)
class Maker:
    """Somebody who builds the image of the product, with one more file on it.

    Attributes:
        place: the directory of the source tree, and of what comes out.
        keys: the directory of the keys; what is signed by another key is another image.
        signing_key: the kind and name of the one that signs.
        cache: what may be used again.
        word: what the file says.
        umask: of the process.
        settings: of its environment.
        before: what the command is started by.
    """

    place: Path
    keys: Path
    cache: Path
    word: str = "the same"
    umask: int = 0o022
    settings: tuple[tuple[str, str], ...] = ()
    before: tuple[str, ...] = ()
    signing_key: tuple[str, str] = ("file", "image")

    def build(self) -> ImageManifest:
        source = self.place / "source"
        for name in ("image", "firmware_agent", "requirements"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        recipes = source / "image/recipes"
        (recipes / "mine.toml").write_text(RECIPE)
        shutil.copyfile(recipes / "picket.lock", recipes / "mine.lock")
        shutil.copyfile(self.keys / "factory.pub", recipes / "factory.pub")
        (recipes / "more/etc").mkdir(parents=True)
        (recipes / "more/etc/word").write_text(self.word)
        kind, key = self.signing_key
        done = subprocess.run(
            [*self.before, sys.executable, "-m", "image", "build", "--recipe", "image/recipes/mine.toml",
             "--output", self.place / "made", "--cache", self.cache,
             "--update-root", self.keys / "root.json", "--signing-key", f"{kind}:{self.keys / key}",
             "--address", "https://images.example.com/"],
            cwd=source, umask=self.umask, env={**os.environ, "PYTHONPATH": str(source), **dict(self.settings)},
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return ImageManifest.load(self.place / "made/picket.json")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    factory_key.ensure(folder / "factory")
    signing.ensure(folder / "image")
    shutil.copyfile(ROOT / "build/updates/repository/root.json", folder / "root.json")
    return folder


@pytest.fixture(scope="module")
def first(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageManifest:
    """As usual: with all that is in the cache."""
    return Maker(tmp_path_factory.mktemp("first"), keys, CACHE).build()


def test_another_place_another_person_and_another_year_give_the_same_image(
    first: ImageManifest, keys: Path, tmp_path: Path
) -> None:
    """From the .debs and wheels on: the second one makes its own base root, and compiles its own packages.

    The clock is another one where Debian's `faketime` is installed; times of files are left alone by it.
    """
    cache = lend_debs(tmp_path / "a cache")
    shutil.copytree(CACHE / "downloads", cache / "downloads")
    home = tmp_path / "home"
    home.mkdir()
    settings = {
        "TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "PYTHONHASHSEED": "7",
        "HOME": str(home), "USER": "somebody", "SOURCE_DATE_EPOCH": "1", "NO_FAKE_STAT": "1",
    }  # fmt: skip
    later = ("faketime", "-f", "+400d") if shutil.which("faketime") else ()
    second = Maker(tmp_path / "another place", keys, cache, "the same", 0o077, tuple(settings.items()), later).build()

    names = sorted(path.name for path in first.directory.iterdir())
    assert names == sorted(path.name for path in second.directory.iterdir())
    different = filecmp.cmpfiles(first.directory, second.directory, names, shallow=False)
    assert different[1:] == ([], []), report(first, second, tmp_path / "taken out")


def test_whoever_has_only_the_public_halves_of_the_keys_builds_the_same_image(
    first: ImageManifest, keys: Path, tmp_path: Path
) -> None:
    public = tmp_path / "public"
    public.mkdir()
    for name in ("factory.pub", "image.pub", "root.json"):
        shutil.copyfile(keys / name, public / name)

    built = Maker(tmp_path, public, CACHE, signing_key=("public", "image.pub")).build()

    assert built.image.sha256 == first.image.sha256, report(first, built, tmp_path / "taken out")
    assert built.bundle is None
    assert not (built.directory / checksums.SIGNATURE).exists()


def test_one_other_byte_in_a_file_of_the_recipe_is_another_image_and_the_report_names_the_file(
    first: ImageManifest, keys: Path, tmp_path: Path
) -> None:
    other = Maker(tmp_path, keys, CACHE, "the sama").build()

    assert subprocess.run(["cmp", "--silent", first.image_path, other.image_path], check=False).returncode == 1
    said = report(first, other, tmp_path / "taken out").splitlines()
    assert any(line.startswith("partition 5 (picket-root) differs, first at byte ") for line in said)
    assert "    /etc/word: content" in said
    assert "    /cmdline.txt: content" in said, "which has the root's hash"
    named = [line for line in said if line.startswith("    /")]
    assert len(named) == 2, named
