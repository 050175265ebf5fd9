"""Resolving, fetching and keeping packages, from a signed archive that is made on the spot; no network."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from image import debs, resolve
from image.__main__ import app
from image.errors import ArchiveError, CommandFailedError, LockError, RecipeError
from image.lock import Lock, Move, Pin
from image.recipe import Recipe, load
from image.twins import PACKAGES
from tests.image.archive import TinyArchive

pytestmark = pytest.mark.skipif(
    not all(shutil.which(name) for name in ("mmdebstrap", "gpg", "dpkg-scanpackages", "apt-get")),
    reason="needs mmdebstrap, gpg and dpkg-dev",
)

RECIPE = """
name = "tiny"
version = "1.0"
packages = ["alarm"]
boards = ["bcm2711-rpi-4-b"]
hardware = ["raspberrypi,4-model-b"]

[base]
suite = "trixie"
mirror = "{mirror}"
keyring = "{keyring}"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyArchive]:
    """What every recipe needs, and an alarm that depends on a bell."""
    archive = TinyArchive(tmp_path_factory.mktemp("archive"))
    archive.add("base-files", more="Essential: yes\n")
    archive.add("alarm", "2:1.0+x~1", depends="bell (>= 2)")
    archive.add("bell", "1.9", "all")
    archive.add("bell", "2.0", "all")
    archive.add("unwanted")
    for name in (*PACKAGES, resolve.HEADERS):
        for architecture in ("amd64", "arm64"):
            archive.add(name, architecture=architecture)
    archive.publish()
    yield archive
    archive.close()


@pytest.fixture(scope="module")
def first_lock(made: TinyArchive, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the archive gives before any test changes it; a lock names no place."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE.format(mirror=made.mirror, keyring=made.keyring))
    return resolve.resolve(load(path)).dump()


@pytest.fixture
def archive(made: TinyArchive, tmp_path: Path) -> TinyArchive:
    """A copy that a test may change."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "a mirror", ignore=shutil.ignore_patterns("S.*")))
    copy = TinyArchive.__new__(TinyArchive)
    copy.__dict__.update(made.__dict__, folder=folder, top=folder / "archive", keyring=folder / "archive-key.gpg")
    return copy


@pytest.fixture
def recipe(archive: TinyArchive, tmp_path: Path) -> Recipe:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(mirror=archive.mirror.replace(" ", "%20"), keyring=archive.keyring))
    return load(path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def names(pins: tuple[Pin, ...]) -> list[str]:
    return [f"{pin.name} {pin.version}" for pin in pins]


def collect(found: Lock, recipe: Recipe, cache: Path) -> dict[Pin, Path]:
    return debs.collect(found.sets["target"], recipe.base, cache, lambda _: None)


@pytest.fixture
def found(recipe: Recipe, first_lock: str) -> Lock:
    recipe.lock.write_text(first_lock)
    return resolve.locked(recipe)


# --- the lock -----------------------------------------------------------------------------------------------------


def test_a_lock_has_what_is_essential_what_is_wanted_and_what_that_needs(found: Lock) -> None:
    assert names(found.sets["target"]) == ["alarm 2:1.0+x~1", "base-files 1.0", "bell 2.0"]
    assert names(found.sets["headers"]) == [f"{resolve.HEADERS} 1.0"]
    assert {pin.architecture for pin in found.sets["twin-amd64"]} == {"amd64"}
    assert {pin.name for pin in found.sets["twin-arm64"]} == set(PACKAGES)
    alarm = found.sets["target"][0]
    assert alarm.file == "pool/main/a/alarm/alarm_1.0+x~1_arm64.deb"


def test_a_package_that_does_not_exist_is_named_when_the_lock_is_made(recipe: Recipe) -> None:
    recipe.file.write_text(recipe.file.read_text().replace('"alarm"', '"alarm", "alrm"'))

    with pytest.raises(
        RecipeError, match=r"tiny\.toml: packages: the archive has no package alrm: did you mean alarm\?"
    ):
        resolve.renew(load(recipe.file), recipe.file.parent)
    assert not recipe.lock.exists()


def test_packages_that_do_not_go_together_are_told_in_apts_words(archive: TinyArchive, recipe: Recipe) -> None:
    archive.add("alarm", "2:2.0", depends="bell (>= 9)")
    archive.publish()

    with pytest.raises(RecipeError, match=r"do not go together:[\s\S]*alarm : Depends: bell \(>= 9\)"):
        resolve.resolve(recipe)


def test_an_index_that_another_key_signed_is_not_believed(recipe: Recipe, tmp_path: Path) -> None:
    other = TinyArchive(tmp_path / "other")
    other.close()
    recipe.base.keyring.write_bytes(other.keyring.read_bytes())  # type: ignore[union-attr]

    with pytest.raises(CommandFailedError, match=r"NO_PUBKEY|not signed|Missing key"):
        resolve.resolve(recipe)


def test_an_index_that_was_changed_after_signing_is_not_believed(archive: TinyArchive, recipe: Recipe) -> None:
    for index in archive.top.glob("dists/trixie/main/binary-arm64/Packages"):
        index.write_text(index.read_text().replace("alarm", "alarn"))
    for index in archive.top.glob("dists/trixie/main/binary-arm64/Packages.gz"):
        index.write_bytes(index.read_bytes() + b"more")

    with pytest.raises(CommandFailedError, match=r"Hash Sum mismatch|unexpected size"):
        resolve.resolve(recipe)


def test_renewing_says_what_moved_and_writes_nothing_when_nothing_did(
    archive: TinyArchive, recipe: Recipe, found: Lock, cache: Path
) -> None:
    before = recipe.lock.stat().st_mtime_ns
    assert resolve.renew(recipe, cache) == []
    assert recipe.lock.stat().st_mtime_ns == before

    archive.add("bell", "2.1", "all", depends="clapper")
    archive.add("clapper")
    archive.publish()

    assert resolve.renew(recipe, cache) == [
        Move("target", "bell", "2.0", "2.1"),
        Move("target", "clapper", None, "1.0"),
    ]
    assert names(resolve.locked(recipe).sets["target"])[-2:] == ["bell 2.1", "clapper 1.0"]


def test_with_missing_only_a_lock_stays_as_long_as_it_can_be_followed(
    archive: TinyArchive, recipe: Recipe, found: Lock, cache: Path
) -> None:
    archive.add("bell", "2.1", "all")
    archive.publish()
    assert resolve.renew(recipe, cache, missing_only=True) == []

    next(archive.top.glob("pool/**/bell_2.0_all.deb")).unlink()
    archive.publish()

    assert resolve.renew(recipe, cache, missing_only=True) == [Move("target", "bell", "2.0", "2.1")]


def test_with_missing_only_what_the_cache_has_is_not_missing(archive: TinyArchive, recipe: Recipe, cache: Path) -> None:
    resolve.renew(recipe, cache)
    collect(resolve.locked(recipe), recipe, cache)
    next(archive.top.glob("pool/**/bell_2.0_all.deb")).unlink()
    archive.publish()

    assert resolve.renew(recipe, cache, missing_only=True) == []


def test_a_lock_of_other_packages_is_refused_and_missing_only_does_not_hide_it(
    recipe: Recipe, found: Lock, cache: Path
) -> None:
    recipe.file.write_text(recipe.file.read_text().replace('"alarm"', '"alarm", "unwanted"'))
    changed = load(recipe.file)

    with pytest.raises(LockError, match=r"packages: it lacks unwanted; `make image-lock RECIPE=.*tiny\.toml`"):
        resolve.locked(changed)
    with pytest.raises(LockError, match="packages: it lacks unwanted"):
        resolve.renew(changed, cache, missing_only=True)
    assert resolve.renew(changed, cache) == [Move("target", "unwanted", None, "1.0")]


def test_the_command_prints_what_moved(archive: TinyArchive, recipe: Recipe, found: Lock, cache: Path) -> None:
    command = ["lock", "--recipe", str(recipe.file), "--cache", str(cache)]
    archive.add("bell", "2.1", "all")
    archive.publish()

    plain = CliRunner().invoke(app, command)
    again = CliRunner().invoke(app, [*command, "--json", "--missing-only"])

    assert plain.output.splitlines()[0] == "target: bell 2.0 -> 2.1"
    assert '"moves": []' in again.output


# --- the cache ----------------------------------------------------------------------------------------------------


def test_what_is_missing_is_fetched_once_and_then_taken_without_an_archive(
    archive: TinyArchive, recipe: Recipe, found: Lock, cache: Path
) -> None:
    said: list[str] = []

    first = debs.collect(found.sets["target"], recipe.base, cache, said.append)
    shutil.rmtree(archive.top)
    second = collect(found, recipe, cache)

    assert first == second
    assert {path.name for path in first.values()} == {f"{pin.sha256}.deb" for pin in found.sets["target"]}
    assert said[-1] == "fetching 3 of 3 packages"
    assert sorted(cache.iterdir()) == [cache / "debs"], "nothing else is left"


def test_packages_of_another_architecture_come_too(recipe: Recipe, found: Lock, cache: Path) -> None:
    pins = (*found.sets["target"], *found.sets["twin-amd64"])

    assert set(debs.collect(pins, recipe.base, cache, lambda _: None)) == set(pins)


def test_a_package_with_other_bits_in_the_cache_is_named(recipe: Recipe, found: Lock, cache: Path) -> None:
    files = collect(found, recipe, cache)
    pin, path = next(iter(files.items()))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(
        ArchiveError, match=rf"{pin.sha256}\.deb is not alarm 2:1\.0\+x~1 \(arm64\) as the lock pins it"
    ):
        collect(found, recipe, cache)


def test_a_version_that_the_archive_rebuilt_is_not_taken_for_the_locked_one(
    archive: TinyArchive, recipe: Recipe, found: Lock, cache: Path
) -> None:
    archive.add("bell", "2.0", "all", content="other bits")
    archive.publish()

    with pytest.raises(ArchiveError, match=r"no more what the lock pins: bell 2\.0 \(all\)\. Either `make image-lock`"):
        collect(found, recipe, cache)


def test_an_archive_that_gives_other_bits_than_its_index_says_is_named(
    archive: TinyArchive, recipe: Recipe, found: Lock, cache: Path
) -> None:
    deb = next(archive.top.glob("pool/**/bell_2.0_all.deb"))
    content = bytearray(deb.read_bytes())
    content[-1] ^= 1
    deb.write_bytes(content)

    with pytest.raises(ArchiveError, match=r"[Hh]ash|bell"):
        collect(found, recipe, cache)
    assert not debs.cached(next(pin for pin in found.sets["target"] if pin.name == "bell"), cache).exists()


def test_a_package_that_the_archive_has_no_more_can_be_put_into_the_cache(
    archive: TinyArchive, recipe: Recipe, found: Lock, cache: Path, tmp_path: Path
) -> None:
    gone = next(archive.top.glob("pool/**/bell_2.0_all.deb")).rename(tmp_path / "kept.deb")
    archive.publish()
    with pytest.raises(ArchiveError) as caught:
        collect(found, recipe, cache)
    named = str(caught.value).rpartition(" as ")[2]

    Path(named).parent.mkdir(exist_ok=True)
    shutil.copy(gone, named)

    assert len(collect(found, recipe, cache)) == 3


def test_what_was_fetched_before_apt_failed_is_kept(
    archive: TinyArchive, recipe: Recipe, found: Lock, cache: Path
) -> None:
    """Its index is intact, and one file of the pool is not there."""
    gone = next(archive.top.glob("pool/**/bell_2.0_all.deb"))
    gone.rename(gone.with_suffix(".away"))

    with pytest.raises(ArchiveError, match="apt could not fetch all of 3 packages"):
        collect(found, recipe, cache)

    gone.with_suffix(".away").rename(gone)
    kept = len(list((cache / "debs").iterdir()))
    assert kept in {0, 2}
    assert len(collect(found, recipe, cache)) == 3


# --- the second archive -------------------------------------------------------------------------------------------


def test_a_vendors_newer_package_counts_and_its_own_are_found(
    archive: TinyArchive, recipe: Recipe, cache: Path, tmp_path: Path
) -> None:
    vendor = TinyArchive(tmp_path / "vendor")
    vendor.add("bell", "2.0+rpt1", "all")
    vendor.add("base-files", "0.9", more="Essential: yes\n")
    vendor.add("linux-image-rpi-v8")
    vendor.publish()
    vendor.close()
    text = recipe.file.read_text().replace('"alarm"', '"alarm", "linux-image-rpi-v8"')
    recipe.file.write_text(
        f'{text}kind = "raspios"\n[base.vendor]\nmirror = "{vendor.mirror}"\nkeyring = "{vendor.keyring}"\n'
    )
    raspios = load(recipe.file)

    resolve.renew(raspios, cache)
    found = resolve.locked(raspios)

    assert names(found.sets["target"]) == [
        "alarm 2:1.0+x~1", "base-files 1.0", "bell 2.0+rpt1", "linux-image-rpi-v8 1.0",
    ]  # fmt: skip
    assert len(collect(found, raspios, cache)) == 4


# --- the local archive --------------------------------------------------------------------------------------------


def test_the_local_archive_is_the_same_for_the_same_packages(recipe: Recipe, found: Lock, cache: Path) -> None:
    files = collect(found, recipe, cache)

    for name in ("one", "two"):
        debs.write_pool(dict(reversed(files.items())) if name == "two" else files, cache / name, "trixie", "arm64")

    assert subprocess.run(["diff", "-r", cache / "one", cache / "two"], check=False).returncode == 0


def test_the_local_archive_gives_apt_what_was_locked(recipe: Recipe, found: Lock, cache: Path, tmp_path: Path) -> None:
    """In a folder whose name apt would not like."""
    line = debs.write_pool(collect(found, recipe, cache), tmp_path / "a folder [1]", "trixie", "arm64")
    root = tmp_path / "root"

    subprocess.run(
        ["mmdebstrap", "--mode=chrootless", "--variant=extract", "--architectures=arm64", "--include=alarm", "trixie",
         root, line], check=True, capture_output=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1"},
    )  # fmt: skip

    assert (root / "usr/share/alarm/content").read_text() == "nothing"
    assert (root / "usr/share/bell/content").exists()
