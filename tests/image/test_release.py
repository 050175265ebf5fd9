"""Releases of the agent: the same bits for the same source, and a description that everybody agrees on."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cloud.roles import describe
from firmware_agent import __version__
from firmware_agent.update import archive, delta
from firmware_agent.update.archive import Digest, Manifest
from firmware_agent.update.download import Payload
from firmware_agent.update.releases import Expected, Releases
from firmware_agent.update.target import parse_delta, parse_target
from image import sample
from image.base import base_root
from image.build import LOCK
from image.cache import held
from image.configure import install_agent
from image.recipe import Recipe, load
from image.release import ReleaseError, agent_version, device_release, pack, simulated_release
from image.wheels import device_library

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "image" / "recipes" / "picket.toml"


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return load(RECIPE)


def build(base: Path, recipe: Recipe, version: str, *older: Path) -> Path:
    """A packed release in a directory of its own."""
    folder = base / f"work-{version}"
    folder.mkdir()
    return pack(simulated_release(folder, recipe, version), base / version, older).description.parent


def described(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "release.json").read_text())
    return value


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- the same bits ------------------------------------------------------------------------------------------------

DIFFERENT_CLOCK = """
import time
_real = time.time
time.time = lambda: _real() + 700 * 86400
"""


#: Whoever builds is nobody, where the tests run as root: this interpreter's packages may be root's alone, so all of
#: them are imported before.
AS_NOBODY = """
import os, sys, tempfile, zstandard
from pathlib import Path
from image.recipe import load
from image.release import pack, simulated_release
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
recipe, older, output = map(Path, sys.argv[1:])
with tempfile.TemporaryDirectory() as folder:
    pack(simulated_release(Path(folder), load(recipe), "1.3.0"), output, [older])
"""


def build_elsewhere(place: Path, older: Path) -> Path:
    """From a copy of the source: other directory, times, umask, time zone, clock, hash seed, language, user."""
    copy = place / "a copy" / "picket"
    for name in ("image", "firmware_agent"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for number, path in enumerate(copy.rglob("*")):
        os.utime(path, (number * 1000, number * 1000))
        if path.is_file():
            path.chmod(path.stat().st_mode & 0o100 | 0o604)
    (place / "lies").mkdir()
    (place / "lies" / "sitecustomize.py").write_text(DIFFERENT_CLOCK)
    output = place / "out" / "release"
    output.parent.mkdir()
    output.parent.chmod(0o777)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{place / 'lies'}:{copy}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "7",
        "TZ": "Pacific/Kiritimati",
        "LC_ALL": "C",
        "TMPDIR": str(output.parent),
    }
    command = [sys.executable, "-c", AS_NOBODY, str(copy / "image/recipes/picket.toml"), str(older), str(output)]
    subprocess.run(command, cwd=place, env=environment, check=True, umask=0o077)
    return output


def test_the_same_source_gives_the_same_bits_whoever_builds_it_when_and_where(tmp_path: Path, recipe: Recipe) -> None:
    older = build(tmp_path, recipe, "1.2.0") / "picket-agent-1.2.0.tar.zst"
    here = build(tmp_path, recipe, "1.3.0", older)
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to other users
        base = Path(name)
        base.chmod(0o755)
        there = build_elsewhere(base, Path(shutil.copy(older, base)))

        assert contents(there) == contents(here)
        assert there.stat().st_uid == (65534 if os.geteuid() == 0 else os.geteuid())


@pytest.mark.vm
def test_a_devices_release_has_the_same_bits_in_any_directory_and_is_what_the_image_begins_with(
    tmp_path: Path, recipe: Recipe
) -> None:
    """With packages and byte code: both are made a second time, in a cache of their own."""
    with held(Path("build/cache").resolve()):
        base = base_root(recipe, Path("build/cache").resolve())
        library = device_library(LOCK, base, Path("build/cache").resolve())
        for name in ("first", "second", "cache"):
            (tmp_path / name).mkdir()
        first = device_release(tmp_path / "first", base, library, recipe)
        previous = os.umask(0o077)
        try:
            again = device_library(LOCK, base, tmp_path / "cache")
            second = device_release(tmp_path / "second", base, again, recipe)
        finally:
            os.umask(previous)
        (tmp_path / "root/opt").mkdir(parents=True)  # as in the base
        install_agent(tmp_path / "root", base, library, recipe)

    assert library != again
    assert {path.relative_to(first): digest(path) for path in first.rglob("*") if path.is_file()} == {
        path.relative_to(second): digest(path) for path in second.rglob("*") if path.is_file()
    }
    assert first.name == second.name
    (installed,) = (tmp_path / "root/usr/lib/picket/releases").iterdir()
    assert installed.name == first.name
    assert archive.digest(installed) == archive.digest(first)
    assert Manifest.parse((installed / "manifest.json").read_bytes()).python == "3.13"
    assert not [path for path in installed.rglob("*") if path.is_file() and path.stat().st_mode & 0o222]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what is in it ------------------------------------------------------------------------------------------------


def test_a_release_says_its_version_and_what_it_is_for(tmp_path: Path, recipe: Recipe) -> None:
    release = simulated_release(tmp_path, recipe, "4.5.6", "4.0.0")

    manifest = Manifest.parse((release / "manifest.json").read_bytes())
    assert manifest == Manifest("picket", "4.5.6", recipe.security_version, ("picket,simulated",), None, "4.0.0")
    version = "import firmware_agent; print(firmware_agent.__version__)"
    said = subprocess.run(
        [sys.executable, "-B", "-c", version], cwd=release, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "4.5.6"
    assert release.name == f"4.5.6-{archive.digest(release).sha256[:8]}"


def test_a_release_without_a_version_has_that_of_the_source(tmp_path: Path, recipe: Recipe) -> None:
    assert agent_version() == __version__
    assert simulated_release(tmp_path, recipe).name.startswith(f"{__version__}-")


def test_nothing_of_this_machine_is_in_a_release(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "work").mkdir()
    release = simulated_release(tmp_path / "work", recipe)

    assert {path.name for path in release.iterdir()} == {"manifest.json", "firmware_agent"}
    assert not list(release.rglob("__pycache__"))
    for path in release.rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 in {0o444, 0o555}
        assert path.is_dir() or str(ROOT).encode() not in path.read_bytes()


def test_the_sample_image_begins_with_that_very_release(tmp_path: Path, recipe: Recipe) -> None:
    release = simulated_release(tmp_path, recipe)

    with tarfile.open(fileobj=io.BytesIO(sample.system_tar("picket-sample", "1", None))) as packed:
        assert packed.getmember("opt/picket/current").linkname == f"releases/{release.name}"


# --- the archive and its description ------------------------------------------------------------------------------


def test_a_unit_that_installs_the_archive_has_the_tree_that_was_built(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "work").mkdir()
    release = simulated_release(tmp_path / "work", recipe, "1.2.0")
    built = pack(release, tmp_path / "out")
    for folder in ("unit/releases", "state"):
        (tmp_path / folder).mkdir(parents=True)
    releases = Releases(tmp_path / "unit", tmp_path / "state")

    with (tmp_path / "out" / "picket-agent-1.2.0.tar.zst").open("rb") as file:
        expected = Expected("1.2.0", Digest(built.tar_sha256, built.tar_size))
        name = releases.install(archive.decompress(file), expected)

    assert name == release.name == built.release
    assert archive.digest(releases.path(name)) == archive.digest(release)


def test_what_is_signed_about_a_release_is_what_a_unit_understands(tmp_path: Path, recipe: Recipe) -> None:
    older = build(tmp_path, recipe, "1.2.0")
    newer = build(tmp_path, recipe, "1.3.0", older / "picket-agent-1.2.0.tar.zst")
    signed = describe(described(newer), "main")
    (path, (entry, custom)), (delta_path, (delta_entry, delta_custom)) = signed.items()

    target = parse_target(path, entry["length"], entry["sha256"], custom)
    source = described(older)["archive"]["tar_sha256"]
    patch = parse_delta(
        delta_path, delta_entry["length"], delta_entry["sha256"], delta_custom, source, target.tar_sha256
    )

    assert (path, target.version, target.hardware) == (
        "agent/picket-agent-1.3.0.tar.zst",
        "1.3.0",
        ("picket,simulated",),
    )
    assert [(hint.source, hint.path) for hint in target.deltas] == [(source, delta_path)]
    for payload in (target.full, patch):
        assert Payload(payload.path, payload.length, payload.chunks, payload.chunk_bytes)
        file = newer / payload.path.rpartition("/")[2]
        assert (file.stat().st_size, digest(file)) == (payload.length, payload.sha256)


def test_a_delta_leads_from_an_installed_release_to_the_new_one(tmp_path: Path, recipe: Recipe) -> None:
    older = build(tmp_path, recipe, "1.2.0")
    newer = build(tmp_path, recipe, "1.3.0", older / "picket-agent-1.2.0.tar.zst")
    installed = next((tmp_path / "work-1.2.0").iterdir())
    description = described(newer)
    entry = description["deltas"][0]

    expected = Digest(description["archive"]["tar_sha256"], description["archive"]["tar_size"])
    old = delta.base(installed, entry["from"])
    manifest = archive.unpack(
        delta.apply(old, (newer / entry["file"]).read_bytes(), expected), tmp_path / "unpacked", expected
    )

    assert entry["file"] == f"picket-agent-1.3.0.from-{entry['from'][:8]}.zpatch"
    assert manifest.version == "1.3.0"


def test_building_again_takes_the_place_of_what_was_there(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "left over").touch()
    (tmp_path / "out" / "release.json").touch()
    (tmp_path / "work").mkdir()

    pack(simulated_release(tmp_path / "work", recipe, "1.2.0"), tmp_path / "out")

    assert {path.name for path in (tmp_path / "out").iterdir()} == {"picket-agent-1.2.0.tar.zst", "release.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "work"}


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [True, False])
def test_what_is_no_release_is_not_replaced_by_one(tmp_path: Path, recipe: Recipe, *, folder: bool) -> None:
    """`--output build/updates` would have removed every key of the fleet."""
    kept = tmp_path / "out" / "keys" if folder else tmp_path / "out"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    (tmp_path / "work").mkdir()

    with pytest.raises(ReleaseError, match="is there already and is no release"):
        pack(simulated_release(tmp_path / "work", recipe, "1.2.0"), tmp_path / "out")

    assert kept.read_text() == "precious"


def test_an_older_archive_that_is_none_is_named_and_nothing_is_left(tmp_path: Path, recipe: Recipe) -> None:
    first = build(tmp_path, recipe, "1.2.0")
    same = first / "picket-agent-1.2.0.tar.zst"
    (tmp_path / "noise").write_bytes(b"noise")
    (tmp_path / "work").mkdir()
    release = simulated_release(tmp_path / "work", recipe, "1.2.0")

    for older, reason in (
        (same, "nothing has changed"),
        (tmp_path / "noise", "is no archive of a release"),
        (tmp_path / "missing", "cannot be read"),
    ):
        with pytest.raises(ReleaseError, match=reason):
            pack(release, tmp_path / "out", [older])

    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--for", "toaster"], 2, "say device or simulated"),
        (["--for", "simulated", "--version", "latest"], 2, "version is 'latest', and not two to four numbers"),
        (["--for", "simulated", "--min-from", "v1.0"], 2, "min_from is 'v1.0', and not two to four numbers"),
        (["--for", "simulated", "--from", "missing"], 2, "cannot be read"),
        (["--recipe", "missing"], 2, "cannot be read"),
    ],
)
def test_mistakes_at_the_command_line_are_told_without_a_traceback(
    tmp_path: Path, words: list[str], code: int, reason: str
) -> None:
    command = [sys.executable, "-m", "image", "release", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == code
    assert reason in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "build" / "releases").exists() or not list((tmp_path / "build" / "releases").iterdir())
