"""The bases, made for real: the same bits twice, Raspberry Pi OS's way, and from an official image. No QEMU runs."""

import gzip
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from image import debs, factory_key, recipe, resolve, signing
from image.base import Base, base_root
from image.build import Keys, build_image
from image.cache import held
from image.firmware import PI_4, PI_5, Started, boot
from image.lock import HEADERS, TARGET, Pin
from image.manifest import ImageManifest
from image.progress import Clock
from image.recipe import Recipe, load
from tests.image.archive import TinyArchive

pytestmark = pytest.mark.vm

ROOT = Path(__file__).parents[2]
PRODUCT = ROOT / "image/recipes/picket.toml"
CACHE = Path("build/cache").resolve()
MEBIBYTE = 1 << 20

ELSEWHERE = """
import sys
from pathlib import Path
from image.base import base_root
from image.cache import held
from image.recipe import load
cache = Path(sys.argv[1])
with held(cache):
    print(base_root(load(Path("image/recipes/picket.toml")), cache).tar)
"""


@pytest.fixture(scope="module")
def base() -> Base:
    """The product's base."""
    with held(CACHE):
        return base_root(load(PRODUCT), CACHE)


def lend_debs(cache: Path) -> Path:
    """A cache of its own, with the .debs that are there already."""
    (cache / "debs").mkdir(parents=True)
    for deb in (CACHE / "debs").glob("*.deb"):
        try:
            (cache / "debs" / deb.name).hardlink_to(deb)
        except OSError:
            shutil.copyfile(deb, cache / "debs" / deb.name)
    return cache


def test_two_bases_of_one_lock_are_the_same_to_the_bit(base: Base, tmp_path: Path) -> None:
    """From a copy of the source: another folder with a space, umask, time zone, language, hash seed."""
    copy = tmp_path / "a copy"
    shutil.copytree(ROOT / "image", copy / "image", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "firmware_agent", copy / "firmware_agent", ignore=shutil.ignore_patterns("__pycache__"))
    cache = lend_debs(tmp_path / "a cache")
    environment = {
        **os.environ, "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "7", "PYTHONPATH": str(copy),
    }  # fmt: skip

    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, cache], cwd=copy, env=environment, umask=0o077, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    again = Path(done.stdout.strip())

    assert again.parent.name == base.directory.name, "the same sources and the same lock"
    assert again != base.tar
    assert subprocess.run(["cmp", base.tar, again], check=False).returncode == 0


def test_what_is_installed_is_what_is_locked(base: Base, tmp_path: Path) -> None:
    status = subprocess.run(
        ["tar", "--extract", "--to-stdout", "--file", base.tar, "./var/lib/dpkg/status"], check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    installed = set(
        re.findall(
            r"^Package: (\S+)\n(?:.+\n)*?Status: install ok installed\n(?:.+\n)*?Version: (\S+)$", status, re.MULTILINE
        )
    )

    assert installed == {(pin.name, pin.version) for pin in resolve.locked(load(PRODUCT)).sets[TARGET]}


def test_neither_the_machine_nor_the_place_is_in_the_base(base: Base) -> None:
    listed = subprocess.run(["tar", "--list", "--file", base.tar], check=True, capture_output=True, text=True).stdout

    assert "./etc/apt/sources.list\n" not in listed
    assert str(CACHE).encode() not in base.tar.read_bytes()


# --- archives of our own ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def debian(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyArchive]:
    """Debian's packages of the product's lock, all but the kernel and firmware, in an archive that the tests sign."""
    archive = TinyArchive(tmp_path_factory.mktemp("debian"))
    pinned = resolve.locked(load(PRODUCT))
    host = subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True).stdout.strip()
    files: dict[Pin, Path] = {}
    with held(CACHE):
        for name in (TARGET, HEADERS, "twin-amd64", "twin-arm64"):
            if name in {TARGET, HEADERS, f"twin-{host}"}:
                files |= debs.collect(pinned.sets[name], load(PRODUCT).base, CACHE, lambda _: None)
    for pin, path in files.items():
        if not is_vendors(pin):
            archive.add_deb(path, f"{pin.name}_{pin.version.replace(':', '%3a')}_{pin.architecture}.deb")
    other = ({"amd64", "arm64"} - {host}).pop()
    there = {pin.name for pin in files if pin.architecture in {other, "all"}}
    for pin in pinned.sets[f"twin-{other}"]:
        if pin.name not in there and pin.architecture == other:
            archive.add(pin.name, pin.version, other)  # never unpacked here
    archive.publish()
    yield archive
    archive.close()


def is_vendors(pin: Pin) -> bool:
    return pin.name.startswith("linux-image-") or pin.name == "raspi-firmware"


def repack_kernel(deb: Path, folder: Path, old: str, new: str) -> None:
    """Debian's kernel as Raspberry Pi's: another name and version, packed, other device trees' names, overlays."""
    tree = folder / "kernel"
    subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
    for path in sorted(tree.rglob(f"*{old}*"), key=lambda path: len(path.parts), reverse=True):
        path.rename(path.with_name(path.name.replace(old, new)))
    for script in (tree / "DEBIAN").iterdir():
        script.write_text(script.read_text().replace(old, new))
    (tree / "DEBIAN/md5sums").unlink(missing_ok=True)
    image = tree / f"boot/vmlinuz-{new}"
    image.write_bytes(gzip.compress(image.read_bytes(), compresslevel=1))
    overlays = tree / f"usr/lib/linux-image-{new}/overlays"
    overlays.mkdir()
    (overlays / "README").write_text("Overlays\n")
    trees = tree / f"usr/lib/linux-image-{new}/broadcom"
    for board in load_raspios_boards():
        if not (trees / f"{board}.dtb").exists():
            shutil.copy(trees / f"{board.replace('bcm2710', 'bcm2837')}.dtb", trees / f"{board}.dtb")
    result = folder / f"linux-image-{new}_1.0_arm64.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", "-Zzstd", "-z1", tree, result], check=True, capture_output=True
    )


def load_raspios_boards() -> list[str]:
    chain = recipe.read_chain(ROOT / "image/recipes/raspios-trixie.toml")
    return [board for _, table in chain[-1:] for board in (*table["boards"], *table["experimental_boards"])]


@pytest.fixture(scope="module")
def vendor(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyArchive]:
    """What Raspberry Pi's archive adds: its kernel and its firmware."""
    archive = TinyArchive(tmp_path_factory.mktemp("vendor"))
    pins = [pin for pin in resolve.locked(load(PRODUCT)).sets[TARGET] if is_vendors(pin)]
    kernel = next(pin for pin in pins if re.fullmatch(r"linux-image-[0-9].*", pin.name))
    old = kernel.name.removeprefix("linux-image-")
    new = f"{old.partition('+')[0]}+rpt-rpi-v8"
    working = archive.folder / "working"
    working.mkdir()
    repack_kernel(debs.cached(kernel, CACHE), working, old, new)
    archive.add_deb(working / f"linux-image-{new}_1.0_arm64.deb", f"linux-image-{new}_1.0_arm64.deb")
    firmware = next(pin for pin in pins if pin.name == "raspi-firmware")
    archive.add_deb(debs.cached(firmware, CACHE), f"raspi-firmware_{firmware.version.replace(':', '%3a')}_all.deb")
    archive.add("linux-image-rpi-v8", depends=f"linux-image-{new}")
    archive.publish()
    yield archive
    archive.close()


def write_recipe(folder: Path, text: str) -> Recipe:
    path = folder / "mine.toml"
    path.write_text(text)
    return load(path)


def test_raspberry_pi_os_comes_from_debians_archive_and_its_own(
    debian: TinyArchive, vendor: TinyArchive, tmp_path: Path
) -> None:
    mine = write_recipe(
        tmp_path,
        f"""
        extends = ["{ROOT}/image/recipes/raspios-trixie.toml", "{PRODUCT}"]
        base.mirror = "{debian.mirror}"
        base.keyring = "{debian.keyring}"
        base.components = ["main"]
        base.vendor.mirror = "{vendor.mirror}"
        base.vendor.keyring = "{vendor.keyring}"
        """,
    )
    made = build_from_scratch(mine, tmp_path)

    assert made.kernel.endswith("+rpt-rpi-v8")
    for board in (PI_4, PI_5):
        started = boot(made.image_path, tmp_path, board)
        assert_it_starts(started, made)
        assert started.device_tree is not None
        assert started.choice.device_tree == board.tree
        assert "upstream_kernel" not in started.choice.config
        assert started.choice.files.has("overlays/README")


def build_from_scratch(mine: Recipe, folder: Path) -> ImageManifest:
    """The image of a recipe whose lock is made now; downloaded wheels are lent."""
    cache = folder / "cache"
    cache.mkdir()
    shutil.copytree(CACHE / "downloads", cache / "downloads")
    resolve.renew(mine, cache)
    keys = Keys(factory_key.ensure(folder / "factory"), None, f"file:{signing.ensure(folder / 'signing')}")
    return build_image(mine, folder / "made", cache, keys, Clock().stage)


def assert_it_starts(started: Started, made: ImageManifest) -> None:
    """The firmware finds a kernel for arm64, our initramfs with that kernel's modules, and the root's hash."""
    kernel = gzip.decompress(started.kernel.read_bytes())
    assert kernel[56:60] == b"ARM\x64"
    assert started.initramfs is not None
    unpacked = gzip.decompress(started.initramfs.read_bytes())
    assert f"vermagic={made.kernel.partition('+')[0]}".encode() in unpacked
    assert all(f"modules/{module}.ko".encode() in unpacked for module in ("dm_verity", "squashfs", "overlay"))
    (root,) = (part for part in made.partitions if part.label == "picket-root")
    assert f"picket.verity={root.uuid}:" in started.command_line


def test_an_official_image_gives_back_the_very_root_that_it_was_made_of(
    base: Base, debian: TinyArchive, tmp_path: Path
) -> None:
    source = make_official(base, tmp_path)
    mine = write_recipe(
        tmp_path,
        f"""
        extends = "{PRODUCT}"
        packages = ["python3", "openssh-server"]
        [base]
        kind = "image"
        source = "{source}"
        source_sha256 = "{hashlib.sha256(source.read_bytes()).hexdigest()}"
        mirror = "{debian.mirror}"
        keyring = "{debian.keyring}"
        components = ["main"]
        """,
    )
    made = build_from_scratch(mine, tmp_path)

    with held(tmp_path / "cache"):
        opened = base_root(mine, tmp_path / "cache")
    assert opened.cached
    assert subprocess.run(["cmp", base.tar, opened.tar], check=False).returncode == 0
    assert opened.boot is not None
    assert (opened.boot / "config.txt").read_text() == "arm_64bit=1\n"
    started = boot(made.image_path, tmp_path, PI_4)
    assert_it_starts(started, made)
    assert started.choice.config["upstream_kernel"] == "1"


def make_official(base: Base, folder: Path) -> Path:
    """An image in Raspberry Pi OS's layout, whose root is a base of ours."""
    base.unpack(folder / "tree")
    (folder / "config.txt").write_text("arm_64bit=1\n")
    source = folder / "official.img"
    parts = struct.pack("<4xB3xII", 0x0C, 2048, 64 * 2048) + struct.pack("<4xB3xII", 0x83, 65 * 2048, 768 * 2048)
    with source.open("wb") as file:
        file.write(bytes(446) + parts.ljust(64, b"\0") + b"\x55\xaa")
        file.truncate(833 * MEBIBYTE)
    for name, size in (("fat", 64), ("ext4", 768)):
        with (folder / name).open("wb") as file:
            file.truncate(size * MEBIBYTE)
    subprocess.run(["/usr/sbin/mkfs.vfat", "-F", "32", folder / "fat"], check=True, capture_output=True)
    subprocess.run(["mcopy", "-i", folder / "fat", folder / "config.txt", "::"], check=True)
    subprocess.run(
        ["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-d", folder / "tree", folder / "ext4"], check=True,
    )  # fmt: skip
    for name, start in (("fat", 1), ("ext4", 65)):
        subprocess.run(
            ["dd", f"if={folder / name}", f"of={source}", "bs=1M", f"seek={start}", "conv=notrunc,sparse"],
            check=True, capture_output=True,
        )  # fmt: skip
        (folder / name).unlink()
    shutil.rmtree(folder / "tree")
    subprocess.run(["xz", "-0", "-T0", source], check=True)
    return source.with_suffix(".img.xz")
