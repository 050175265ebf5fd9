"""Building the image: from nothing, and after a change in the agent."""

import fcntl
import json
import re
import shutil
from pathlib import Path
from typing import Any

from bench.clock import median, parts, seconds
from bench.figures import NotMeasuredError, Place, Reading
from bench.tools import ROOT, built_image, need, need_root, python, run
from image import factory_key, lock
from image.manifest import ImageManifest
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
    """A build with nothing in any cache, against the root file system alone as a plain recipe makes it.

    That is mmdebstrap and update-initramfs, with the unit's own programs run by QEMU's emulation of its processor. The
    agent, its Python packages, the file systems, the images and what describes them come on top there.
    """
    _need_builder()
    place.say("building with empty caches; this takes minutes")
    built = _build(ROOT, place.scratch / "cold", place.scratch / "cache", place)
    place.say("installing the same packages under emulation; this takes many minutes")
    plain = seconds(lambda: _plain_recipe(place.scratch / "plain"))
    return Reading(built.wall, plain, parts(built.stages, least=5.0))


def compressed_size(place: Place) -> Reading:
    """What is downloaded and flashed, against the packages in it as they were downloaded."""
    _, manifest, _ = built_image(place.image)
    if manifest.compressed is None:
        raise NotMeasuredError("the image was not compressed; make image")
    path = load(ROOT / _RECIPE).lock
    debs = sum(pin.size for pin in lock.parse(path.read_text(), path.name).sets[lock.TARGET])
    return Reading(manifest.compressed.size / 1e6, debs / 1e6)


def root_size(place: Place) -> Reading:
    """A slot's root with its tree of hashes, against the same files unpacked."""
    need("unsquashfs")
    _, manifest, _ = built_image(place.image)
    root = next(part for part in manifest.partitions if part.label == "picket-root")
    listed = run("unsquashfs", "-o", str(root.start), "-lln", "-d", "", manifest.image_path)
    sizes = [int(found[1]) for found in re.finditer(r"^-\S{9} +\d+/\d+ +(\d+) ", listed, re.MULTILINE)]
    return Reading(_filled(manifest.image_path, root.start, root.size) / 1e6, sum(sizes) / 1e6, f"{len(sizes)} files")


def _filled(image: Path, start: int, size: int) -> int:
    """How much of a partition is not zeros at its end."""
    step = 2**20
    with image.open("rb") as file:
        for place in range(start + size - step, start, -step):
            file.seek(place)
            if file.read(step).strip(b"\0"):
                return place + step - start
    return 0


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
    image = ImageManifest.load(place.scratch / "after/picket.json").image_path
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
    key = factory_key.ensure(place.scratch / "key")
    took = seconds(
        lambda: said.append(
            python(
                "-m", "image", "build", "--json",
                "--output", output, "--cache", cache, "--key", key, "--no-updates",
                cwd=tree,
                env={"PIP_NO_CACHE_DIR": "1"},
            )
        )
    )  # fmt: skip
    return _Built(took, json.loads(said[0]))


def _plain_recipe(root: Path) -> None:
    recipe = load(ROOT / _RECIPE)
    packages = [name for name in recipe.packages if name != "tiny-initramfs"]  # which is in the other one's place
    run(
        "mmdebstrap", "--mode=root", "--variant=minbase",
        f"--architectures={recipe.base.architecture}",
        f"--components={','.join(recipe.base.components)}",
        "--aptopt=APT::Install-Recommends false",
        f"--include={','.join((*packages, 'initramfs-tools'))}",
        recipe.base.suite, root,
        *([recipe.base.mirror] if recipe.base.mirror else []),
    )  # fmt: skip
    shutil.rmtree(root)


def _copy_and_compress(image: Path, scratch: Path) -> None:
    """With the settings of the build (image/build.py)."""
    run("cp", "--sparse=always", image, scratch / "copy.img")
    run("zstd", "-q", "-f", "-T0", "-3", scratch / "copy.img", "-o", scratch / "copy.img.zst")
    run("sync", scratch / "copy.img", scratch / "copy.img.zst")
