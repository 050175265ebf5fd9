"""How an image comes to be: `build_image` is the whole story, from the recipe to the description."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from image import base, bmap, boot, configure, disk, factory_key, wheels
from image.cache import held
from image.manifest import ImageManifest, Package, Partition, digest
from image.recipe import Recipe
from image.release import agent_version
from image.run import run

_HERE = Path(__file__).parent
LOCK = _HERE.parent / "requirements" / "device.lock"

#: Times in the file systems, where no file brings its own: 2026-01-01. A fixed one keeps builds alike.
EPOCH = 1767225600

Stage = Callable[[str], AbstractContextManager[None]]


@dataclass
class Clock:
    """Seconds per stage, in the order in which they ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Time a block of work."""
        began = time.monotonic()
        yield
        self.seconds[title] = round(time.monotonic() - began, 2)


def build_image(
    recipe: Recipe, output: Path, cache: Path, key: Path, update_root: Path | None, stage: Stage
) -> ImageManifest:
    """Build the image of a recipe.

    Args:
        recipe: what to build.
        output: directory for the results: raw image, zstd file, block map and description.
        cache: directory of what can be used again.
        key: the factory's SSH key; made if there is none.
        update_root: the TUF root that units of this image trust; None for an image whose agent takes no updates.
        stage: context manager that shows and times one stage.
    """
    output.mkdir(parents=True, exist_ok=True)
    signature = disk.identifier(recipe.name, recipe.version, "disk").int >> 96 or 1
    boot_partuuid, root_partuuid = disk.partuuid(signature, 1), disk.partuuid(signature, 2)
    with held(cache), tempfile.TemporaryDirectory(dir=cache, prefix="build-") as name:
        working = Path(name)
        root, boot_tree, image = working / "root", working / "boot", working / "picket.img"

        with stage("base root file system"):
            root_base = base.base_root(recipe, cache)
        with stage("device packages"):
            library = wheels.device_library(LOCK, root_base, cache)
        with stage("unpack"):
            root_base.unpack(root)
        with stage("agent and settings"):
            configure.install_agent(root, root_base, library, recipe)
            configure.install_files(root)
            configure.install_launcher(root)
            configure.install_update_root(root, update_root)
            configure.create_users(root)
            configure.give_releases_to_the_agent(root)
            public = factory_key.ensure(key).with_name(key.name + ".pub").read_text().strip()
            configure.write_settings(root, recipe, root_partuuid, boot_partuuid, public)
            configure.choose_units(root)
        with stage("boot files"):
            kernel = boot.kernel_version(root)
            boot.take_boot_files(root, recipe, root_partuuid, boot_tree)
            configure.set_epoch(root, EPOCH)
            configure.mark_updated(root)
        with stage("partitions"):
            boot_size = recipe.boot_mebibytes * disk.MEBIBYTE
            disk.make_fat(boot_tree, working / "boot.fat", boot_size, "PICKETBOOT", signature, EPOCH)
            root_uuid = disk.identifier(recipe.name, recipe.version, "root")
            spare = recipe.root_spare_mebibytes * disk.MEBIBYTE
            root_size = disk.make_ext4(root, working / "root.ext4", spare, "picket-root", root_uuid, EPOCH)
        with stage("disk"):
            slices = disk.lay_out([(disk.FAT32_LBA, boot_size), (disk.LINUX, root_size)])
            disk.assemble(image, signature, slices, [working / "boot.fat", working / "root.ext4"])
            blocks = bmap.create(image)
            (working / "picket.bmap").write_text(bmap.write(blocks))
        with stage("compress"):
            run("zstd", "-q", "-f", "-T0", "-3", "--sparse", image, "-o", working / "picket.img.zst")
        with stage("describe"):
            fat_uuid = f"{signature >> 16:04X}-{signature & 0xFFFF:04X}"
            manifest = ImageManifest(
                name=recipe.name,
                version=recipe.version,
                agent=agent_version(),
                image="picket.img",
                sha256=digest(image),
                size=image.stat().st_size,
                compressed="picket.img.zst",
                compressed_sha256=digest(working / "picket.img.zst"),
                bmap="picket.bmap",
                bmap_sha256=digest(working / "picket.bmap"),
                kernel=kernel,
                partitions=(
                    Partition(1, "vfat", "PICKETBOOT", slices[0].start, slices[0].size, fat_uuid, boot_partuuid),
                    Partition(2, "ext4", "picket-root", slices[1].start, slices[1].size, str(root_uuid), root_partuuid),
                ),
                packages=(*_debian_packages(root), *_python_packages()),
                directory=output,
            )
            (working / "picket.json").write_text(manifest.dump())
        with stage("put in place"):
            _put_in_place(working, output)
        _forget_old(cache, {root_base.directory.name, library.name})
    return manifest


def _debian_packages(root: Path) -> list[Package]:
    """What dpkg's status file of the root says is installed."""
    found = []
    for paragraph in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status") == "install ok installed":
            found.append(Package("debian", fields["Package"], fields["Version"]))
    return sorted(found, key=lambda package: package.name)


def _python_packages() -> list[Package]:
    return [Package("python", name, version) for name, version in sorted(wheels.versions(LOCK.read_text()).items())]


def _put_in_place(working: Path, output: Path) -> None:
    """The description goes away first and comes last: where there is one, all that it names is there."""
    (output / "picket.json").unlink(missing_ok=True)
    for name in ("picket.img", "picket.img.zst", "picket.bmap", "picket.json"):
        source, target = working / name, output / name
        try:
            source.replace(target)
        except OSError:  # the cache lies on another file system
            new = target.with_name(f".{name}.new")
            run("cp", "--sparse=always", source, new)
            new.replace(target)
    directory = os.open(output, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _forget_old(cache: Path, used: set[str]) -> None:
    """Keep what this build used and the newest three others of each kind; a base is half a gigabyte."""
    for kind in ("base-*", "wheels-*"):
        others = [path for path in cache.glob(kind) if path.name not in used]
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[3:]:
            shutil.rmtree(path)
