"""A slot's boot files: the Pi's firmware, its two text files, kernel, initramfs and device trees.

With control `os-prefix` the slot's own lie in a directory of its name beside the firmware, and config.txt includes the
file that names the directory.

config.txt and cmdline.txt are composed here of named parts, each written once: nothing edits them afterwards.
"""

import gzip
import shutil
import tempfile
from pathlib import Path
from typing import Final

from image import initramfs
from image.disk import Verity
from image.errors import ImageError, RecipeError
from image.layout import OS_PREFIX, Layout
from image.possible import nearest
from image.recipe import Recipe
from image.render import render
from image.run import run

_GZIP: Final = b"\x1f\x8b"

#: Raspberry Pi's own kernels have this in their versions; the one for all boards ends in the other.
_RASPBERRY_PI: Final = "+rpt-"
_ALL_BOARDS: Final = "-v8"


def kernel_version(root: Path) -> str:
    """The kernel of the root. Raspberry Pi OS brings several of one version; the one that starts on all boards counts.

    Raises:
        ImageError: there is none, or several of which none is for all boards.
    """
    found = sorted(path.name.removeprefix("vmlinuz-") for path in (root / "boot").glob("vmlinuz-*"))
    fitting = [kernel for kernel in found if _RASPBERRY_PI in kernel and kernel.endswith(_ALL_BOARDS)]
    kernels = found if len(found) == 1 else fitting
    if len(kernels) != 1:
        raise ImageError(f"the base must hold one kernel, it holds {', '.join(found) or 'none'}")
    return kernels[0]


def take_boot_files(root: Path, recipe: Recipe, layout: Layout, boot: Path) -> str:
    """Fill `boot` with what a new image boots from, but for cmdline.txt, which has to name the finished root.

    What only the boot partition needs leaves the root: it is finished then. config.txt is ours: raspi-firmware's hook
    would rewrite it from what it finds on the build host.

    Returns:
        The kernel's version.
    """
    boot.mkdir()
    slot = slot_directory(boot, layout.control)
    slot.mkdir(exist_ok=True)
    kernel = kernel_version(root)
    package = root / "usr/lib" / f"linux-image-{kernel}"
    trees = _device_trees(package / "broadcom", recipe)
    for name, blob in trees.items():
        (slot / f"{name}.dtb").write_bytes(blob)
    # The firmware and QEMU both unpack a gzipped kernel, and a card reads a third of the bytes.
    image = (root / "boot" / f"vmlinuz-{kernel}").read_bytes()
    packed = image if image.startswith(_GZIP) else gzip.compress(image, compresslevel=6, mtime=0)
    (slot / "vmlinuz").write_bytes(packed)
    (slot / "initrd.img").write_bytes(initramfs.build(root, kernel, trees, layout.variables(), recipe.shared))
    if (package / "overlays").is_dir():  # of Raspberry Pi's kernels; the firmware applies some by itself
        shutil.copytree(package / "overlays", slot / "overlays")
    for name, text in config_files(recipe, upstream=_RASPBERRY_PI not in kernel).items():
        (boot / name).write_text(text)
    _take_firmware(root, boot)
    _clear(root, kernel)
    return kernel


def slot_directory(boot: Path, control: str) -> Path:
    """Where the files of slot a lie that belong to its root: kernel, initramfs, device trees, cmdline.txt."""
    return boot / "a" if control == OS_PREFIX else boot


def config_files(recipe: Recipe, *, upstream: bool) -> dict[str, str]:
    """config.txt by name, and with control "os-prefix" what stands for it at the one try of the other slot.

    Args:
        recipe: what is built.
        upstream: whether the kernel is Linux's own, whose device trees have other names than Raspberry Pi's.
    """
    included = {"config.txt": ""}
    if recipe.boot.control == OS_PREFIX:
        included = {"config.txt": "slot.txt", "tryboot.txt": "tryslot.txt"}
    return {name: config_txt(recipe, other, upstream=upstream) for name, other in included.items()}


def config_txt(recipe: Recipe, included: str = "", *, upstream: bool = True) -> str:
    """config.txt, part by part: what every image has, what is included, then the recipe's lines for all boards."""
    values = {"name": recipe.name, "version": recipe.version, "included": included, "lines": recipe.config}
    return render("config.txt", **values, upstream=upstream)


def cmdline_txt(signature: int, verity: Verity, recipe: Recipe) -> str:
    """cmdline.txt: one line. It says nothing of a slot: both slots have the same."""
    words = [f"picket.disk={signature:08x}", f"picket.verity={verity}", "ro", "net.ifnames=0", "panic=10", "quiet",
             "loglevel=3"]  # fmt: skip
    if recipe.wifi_country:
        words.append(f"cfg80211.ieee80211_regdom={recipe.wifi_country}")
    return " ".join([*words, *recipe.cmdline]) + "\n"


def _device_trees(directory: Path, recipe: Recipe) -> dict[str, bytes]:
    """Each board's tree by name, with our overlays merged in."""
    trees = {}
    with tempfile.TemporaryDirectory() as name:
        working = Path(name)
        overlays = []
        for source in recipe.overlays:
            overlays.append(working / f"{source.stem}.dtbo")
            # A device that takes somebody's place has the same address as the one that leaves.
            run("dtc", "-@", "-W", "no-unique_unit_address", "-I", "dts", "-O", "dtb", "-o", overlays[-1], source)
        for board in recipe.boards:
            plain = directory / f"{board}.dtb"
            if not plain.exists():
                there = sorted(path.stem for path in directory.glob("*.dtb"))
                near = nearest(board, there) or f": it has {', '.join(there)}"
                raise RecipeError(f"{recipe.file}: boards: the kernel has no device tree {board}{near}")
            merged = working / plain.name
            run("fdtoverlay", "-i", plain, "-o", merged, *overlays)
            trees[board] = merged.read_bytes()
    for board in recipe.experimental_boards:
        plain = directory / f"{board}.dtb"
        if plain.exists():
            trees[board] = plain.read_bytes()
    return trees


def _take_firmware(root: Path, boot: Path) -> None:
    """The GPU's firmware of Pi 3, Zero 2 W and 4; the camera and debug variants stay away."""
    source = root / "usr/lib/raspi-firmware"
    for name in ("bootcode.bin", "start.elf", "fixup.dat", "start4.elf", "fixup4.dat"):
        shutil.copyfile(source / name, boot / name)
    for name in ("start_cd.elf", "fixup_cd.dat", "start4cd.elf", "fixup4cd.dat"):
        if (source / name).exists():
            shutil.copyfile(source / name, boot / name)
    for name in ("LICENCE.broadcom", "COPYING.linux"):
        if (source / name).exists():
            shutil.copyfile(source / name, boot / name)


def _clear(root: Path, kernel: str) -> None:
    """Take away what only the boot partition needs, and what belongs to kernels that are not started."""
    shutil.rmtree(root / "usr/lib/raspi-firmware")
    for package in (root / "usr/lib").glob("linux-image-*"):
        shutil.rmtree(package)
    for modules in (root / "usr/lib/modules").iterdir():
        if modules.name != kernel:
            shutil.rmtree(modules)
    for path in (root / "boot").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for name in ("vmlinuz", "vmlinuz.old", "initrd.img", "initrd.img.old"):
        (root / name).unlink(missing_ok=True)
