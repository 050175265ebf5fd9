"""Building the image: from nothing, and after a change in the agent."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from bench.clock import median, parts, seconds
from bench.figures import NotMeasuredError, Place, Reading
from bench.tools import ROOT, built_image, need, need_root, python, run
from image.recipe import load

CACHE = ROOT / "build/cache"

_TOOLS = ("mmdebstrap", "mke2fs", "mcopy", "zstd", "dtc")
_RECIPE = Path("image/recipes/picket.toml")
#: What a build reads.
_SOURCES = ("image", "firmware_agent", "requirements")
_COPIES = 3


class ChangeLostError(Exception):
    """A change in the agent did not change the image."""


def cold(place: Place) -> Reading:
    """A build with nothing in any cache, against mmdebstrap that only downloads and unpacks the same packages.

    No image of these packages can be had for less; what configures them, the device's Python packages, the initramfs,
    the file systems and their compression come on top.
    """
    _need_builder()
    place.say("building with empty caches; this takes minutes")
    built = _build(ROOT, place.scratch / "cold", place.scratch / "cache", place)
    place.say("downloading and unpacking the same packages")
    unpacking = seconds(lambda: _unpack_only(place.scratch / "unpacked"))
    return Reading(built.wall, unpacking, parts(built.stages, least=5.0))


def after_agent_change(place: Place) -> Reading:
    """A build after one line of the agent has changed, against a copy of the image and its compression alone.

    The change is made in a copy of the sources; the caches are the real ones.
    """
    _need_builder()
    built_image(place.image)
    _need_free_cache()
    tree = place.scratch / "tree"
    for name in _SOURCES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    place.say("building once, so that the caches know these sources")
    before = _build(tree, place.scratch / "before", CACHE, place)
    with (tree / "firmware_agent" / "__init__.py").open("a") as file:
        file.write("\n# One line more.\n")
    place.say("building after a change in the agent")
    after = _build(tree, place.scratch / "after", CACHE, place)
    if after.sha256 == before.sha256:
        raise ChangeLostError("the image is the same with the changed agent")
    place.say("copying and compressing the image")
    image = place.scratch / "after" / "picket.img"
    copies = [seconds(lambda: _copy_and_compress(image, place.scratch)) for _ in range(_COPIES)]
    return Reading(after.wall, median(copies), parts(after.stages, least=1.0))


class _Built:
    """A finished build."""

    def __init__(self, wall: float, said: dict[str, Any]) -> None:
        self.wall = wall
        self.stages: dict[str, float] = said["seconds"]
        self.sha256: str = said["sha256"]


def _need_builder() -> None:
    need(*_TOOLS)
    need_root()


def _need_free_cache() -> None:
    """A build that waits for another one would be timed with it.

    Raises:
        NotMeasuredError: another build is going on.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NotMeasuredError("another image build is going on; measure when it has ended") from error


def _build(tree: Path, output: Path, cache: Path, place: Place) -> _Built:
    said: list[str] = []
    took = seconds(
        lambda: said.append(
            python(
                "-m", "image", "build", "--json",
                "--output", output, "--cache", cache, "--key", place.scratch / "key",
                cwd=tree,
                env={"PIP_NO_CACHE_DIR": "1"},
            )
        )
    )  # fmt: skip
    return _Built(took, json.loads(said[0]))


def _unpack_only(root: Path) -> None:
    recipe = load(ROOT / _RECIPE)
    run(
        "mmdebstrap", "--mode=root", "--variant=extract",
        f"--architectures={recipe.architecture}",
        f"--components={','.join(recipe.components)}",
        "--aptopt=APT::Install-Recommends false",
        "--include=?essential", f"--include={','.join(recipe.packages)}",
        recipe.suite, root,
        *([recipe.mirror] if recipe.mirror else []),
    )  # fmt: skip
    shutil.rmtree(root)


def _copy_and_compress(image: Path, scratch: Path) -> None:
    """With the settings of the build (image/build.py)."""
    run("cp", "--sparse=always", image, scratch / "copy.img")
    run("zstd", "-q", "-f", "-T0", "-3", scratch / "copy.img", "-o", scratch / "copy.img.zst")
    run("sync", scratch / "copy.img", scratch / "copy.img.zst")
