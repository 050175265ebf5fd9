"""The boot partition: the Pi's firmware, its two text files, kernel, initramfs and device trees."""

import gzip
import shutil
import tempfile
from pathlib import Path

from image import initramfs
from image.errors import ImageError
from image.recipe import Recipe
from image.render import render
from image.run import run

_OVERLAYS = Path(__file__).with_name("overlays")


def kernel_version(root: Path) -> str:
    """The one kernel of the root.

    Raises:
        ImageError: there is none, or more than one.
    """
    found = sorted(path.name.removeprefix("vmlinuz-") for path in (root / "boot").glob("vmlinuz-*"))
    if len(found) != 1:
        raise ImageError(f"the base must hold one kernel, it holds {found or 'none'}")
    return found[0]


def take_boot_files(root: Path, recipe: Recipe, root_partuuid: str, boot: Path) -> None:
    """Fill `boot` with everything that the boot partition holds; what only it needs leaves the root.

    config.txt and cmdline.txt are ours: raspi-firmware's hook rewrites them from what it finds on the build host.
    """
    boot.mkdir()
    kernel = kernel_version(root)
    trees = _device_trees(root / "usr/lib" / f"linux-image-{kernel}" / "broadcom", recipe)
    for name, blob in trees.items():
        (boot / f"{name}.dtb").write_bytes(blob)
    # The firmware and QEMU both unpack a gzipped kernel, and a card reads a third of the bytes.
    image = (root / "boot" / f"vmlinuz-{kernel}").read_bytes()
    (boot / "vmlinuz").write_bytes(gzip.compress(image, compresslevel=6, mtime=0))
    (boot / "initrd.img").write_bytes(initramfs.build(root, kernel, trees))
    values = {"name": recipe.name, "version": recipe.version, "root_partuuid": root_partuuid}
    (boot / "config.txt").write_text(render("config.txt", **values))
    (boot / "cmdline.txt").write_text(render("cmdline.txt", **values))
    _take_firmware(root, boot)
    _clear(root, kernel)


def _device_trees(directory: Path, recipe: Recipe) -> dict[str, bytes]:
    """Each board's tree by name, with our overlays merged in."""
    trees = {}
    with tempfile.TemporaryDirectory() as name:
        working = Path(name)
        overlays = []
        for source in sorted(_OVERLAYS.glob("*.dts")):
            overlays.append(working / f"{source.stem}.dtbo")
            run("dtc", "-@", "-I", "dts", "-O", "dtb", "-o", overlays[-1], source)
        for board in recipe.boards:
            plain = directory / f"{board}.dtb"
            if not plain.exists():
                raise ImageError(f"the kernel package has no device tree for {board}")
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
    shutil.rmtree(root / "usr/lib/raspi-firmware")
    shutil.rmtree(root / "usr/lib" / f"linux-image-{kernel}")
    for path in (root / "boot").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (root / "boot/firmware").mkdir()
    for name in ("vmlinuz", "vmlinuz.old", "initrd.img", "initrd.img.old"):
        (root / name).unlink(missing_ok=True)
