"""Opening an official image: all that its file systems say is kept, and what is no such image is named."""

import gzip
import hashlib
import lzma
import os
import shutil
import stat
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image import base, lock, opened, recipe, resolve
from image.errors import SourceError
from image.recipe import BaseSettings

PRODUCT = Path(recipe.__file__).parent / "recipes/picket.toml"
MEBIBYTE = 1 << 20
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw+ep

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("mke2fs", "mcopy")),
    reason="needs root, e2fsprogs and mtools",
)


def mbr(*parts: tuple[int, int, int], size: int = 8 * MEBIBYTE) -> bytes:
    """A partition table: type, start and size in sectors each."""
    table = b"".join(struct.pack("<4xB3xII", *part) for part in parts)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa" + bytes(size - 512)


def tool(*command: object) -> None:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    subprocess.run([str(word) for word in command], check=True, capture_output=True, env=environment)


def grow_tree(root: Path) -> None:
    """One of everything that a file system can hold."""
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/tool").write_bytes(os.urandom(200_000))
    (root / "usr/bin/tool").chmod(0o4755)
    (root / "usr/bin/twin").hardlink_to(root / "usr/bin/tool")
    (root / "bin").symlink_to("usr/bin")
    (root / "usr/broken").symlink_to("/nowhere/" + "x" * 100)
    os.chown(root / "bin", 5, 6, follow_symlinks=False)
    (root / "usr/bin/ping").write_text("ping")
    os.setxattr(root / "usr/bin/ping", "security.capability", CAPABILITY)
    (root / "home/pi").mkdir(parents=True)
    os.chown(root / "home/pi", 1000, 1001)
    (root / "home/pi").chmod(0o2750)
    (root / 'home/pi/ a "name" ä\udcff').write_text("odd")
    os.setxattr(root / "home/pi", "user.bytes", bytes(range(60)))
    (root / "empty").touch()
    with (root / "holes").open("wb") as file:
        file.seek(300_000)
        file.write(b"end")
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "disk", 0o660 | stat.S_IFBLK, os.makedev(179, 300))
    os.mkfifo(root / "pipe", 0o600)
    for number in range(300):
        (root / "many" / f"{number}").mkdir(parents=True)
    os.utime(root / "usr/bin/tool", ns=(981173106_123456789, 2**31 * 10**9 - 1))
    os.utime(root / "empty", ns=(-86400 * 10**9, -86400 * 10**9))
    os.utime(root / "bin", ns=(10**18, 10**18), follow_symlinks=False)
    os.utime(root / "usr", ns=(10**18 + 1, 10**18 + 1))


def look(root: Path) -> dict[str, tuple[object, ...]]:
    """All that can be seen of a tree; hard links by the first name.

    Times in seconds, and none of the root itself: mke2fs does not copy more of them.
    """
    seen: dict[int, str] = {}
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        name = os.fsencode(path.relative_to(root)).decode(errors="backslashreplace")
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        moment = None if path == root else status.st_mtime_ns // 10**9
        found[name] = (
            oct(status.st_mode), status.st_uid, status.st_gid, moment, status.st_rdev, content,
            "" if path.is_dir() else seen.setdefault(status.st_ino, name),
            {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)},
        )  # fmt: skip
    return found


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An image as Raspberry Pi OS makes them, small, and the tree that its root is made of."""
    folder = tmp_path_factory.mktemp("official")
    grow_tree(folder / "root")
    firmware = folder / "firmware"
    (firmware / "overlays").mkdir(parents=True)
    (firmware / "config.txt").write_text("arm_64bit=1\n")
    (firmware / "overlays" / "A Long Name.dtbo").write_bytes(b"overlay")
    parts = (0x0C, 2048, 40 * 2048), (0x83, 41 * 2048, 16 * 2048)
    (folder / "official.img").write_bytes(mbr(*parts, size=57 * MEBIBYTE))
    for name, number in (("fat", 40), ("ext4", 16)):
        with (folder / name).open("wb") as file:
            file.truncate(number * MEBIBYTE)
    tool("mkfs.vfat", "-F", "32", folder / "fat")
    tool("mcopy", "-s", "-i", folder / "fat", *firmware.iterdir(), "::")
    tool("mke2fs", "-q", "-F", "-t", "ext4", "-d", folder / "root", folder / "ext4")
    for name, start in (("fat", 1), ("ext4", 41)):
        tool("dd", f"if={folder / name}", f"of={folder / 'official.img'}", "bs=1M", f"seek={start}", "conv=notrunc")
    return folder / "official.img", folder / "root"


def settings(source: Path) -> BaseSettings:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return BaseSettings(kind="image", source=source, source_sha256=digest)


def open_it(source: Path, folder: Path) -> None:
    (folder / "work").mkdir()
    opened.open_image(settings(source), folder / "root", folder / "boot", folder / "work")


def test_a_source_that_is_no_image_is_named_before_anything_is_fetched(tmp_path: Path) -> None:
    source, nothing = tmp_path / "official.img", tmp_path / "no-archive"
    source.write_bytes(bytes(MEBIBYTE))
    base_settings = replace(settings(source), mirror=nothing.as_uri())
    product = replace(recipe.load(PRODUCT), file=tmp_path / "opened.toml", base=base_settings)
    pins = (lock.Pin("dash", "1", "arm64", 1, "0" * 64, "pool/dash.deb"),)
    lock.write(lock.Lock(resolve.wanted(product), dict.fromkeys(lock.SETS, pins)), product.lock)

    with pytest.raises(SourceError, match=r"official\.img"):
        base.base_root(product, tmp_path / "cache")


@needs_root
@pytest.mark.parametrize("packed", [False, True])
def test_everything_that_an_image_holds_is_kept(official: tuple[Path, Path], tmp_path: Path, *, packed: bool) -> None:
    source, tree = official
    if packed:
        packed_source = tmp_path / "official.img.xz"
        packed_source.write_bytes(lzma.compress(source.read_bytes(), preset=0))
        source = packed_source

    open_it(source, tmp_path)

    assert look(tmp_path / "root") == look(tree)
    assert (tmp_path / "boot/config.txt").read_text() == "arm_64bit=1\n"
    assert (tmp_path / "boot/overlays/A Long Name.dtbo").read_bytes() == b"overlay"
    assert list((tmp_path / "work").iterdir()) == []
    assert not list(tmp_path.glob("root.*"))


@needs_root
def test_a_file_system_that_was_damaged_is_named(official: tuple[Path, Path], tmp_path: Path) -> None:
    content = bytearray(official[0].read_bytes())
    start = 41 * MEBIBYTE
    inodes = struct.unpack_from("<I", content, start + 1024 * 2 + 8)[0] * 1024
    content[start + inodes + 256 : start + inodes + 256 * 40] = os.urandom(256 * 39)
    (tmp_path / "broken.img").write_bytes(content)

    with pytest.raises(SourceError, match=r"broken\.img: its root file system is damaged at"):
        open_it(tmp_path / "broken.img", tmp_path)


@needs_root
def test_a_file_system_that_was_in_use_is_not_taken(official: tuple[Path, Path], tmp_path: Path) -> None:
    content = bytearray(official[0].read_bytes())
    content[41 * MEBIBYTE + 1024 + 0x60] |= 0x4
    (tmp_path / "used.img").write_bytes(content)

    with pytest.raises(SourceError, match="was in use when it was copied; run e2fsck"):
        open_it(tmp_path / "used.img", tmp_path)


def test_another_image_than_the_recipes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"a")

    with pytest.raises(SourceError, match=r"a\.img has the SHA-256 ca978112.*the recipe says 0000"):
        opened.check_digest(tmp_path / "a.img", "0" * 64)


@pytest.mark.parametrize(
    ("content", "name", "complaint"),
    [
        (b"", "x.img", "no disk image"),
        (b"#!/bin/sh\n" * 100, "x.img", "no disk image"),
        (gzip.compress(b"zip"), "x.img.xz", "is no .xz, or damaged"),
        (lzma.compress(bytes(10**6))[:-40], "x.img.xz", "truncated: it ends within its compressed data"),
        (b"", "x.img.xz", "truncated"),
        (lzma.compress(b"no image" * 1000), "x.img.xz", "no disk image"),
        (mbr((0x0C, 2048, 2048), (0x83, 4096, 2048 * 7)), "x.img", "truncated: its partition 2 ends at byte 9437184"),
        (mbr((0xEE, 1, 2**32 - 1)), "x.img", "unknown layout: a GPT"),
        (mbr((0x0C, 2048, 2048)), "x.img", "unknown layout: a FAT; only"),
        (mbr((0x0C, 2048, 2048), (0x8E, 4096, 2048)), "x.img", "unknown layout: a FAT, LVM; only"),
        (mbr((0x83, 2048, 2048), (0x83, 4096, 2048)), "x.img", "a Linux partition, a Linux partition; only"),
        (mbr((0x0C, 2048, 2048), (0x83, 4096, 2048), (0x83, 6144, 2048)), "x.img", "unknown layout"),
        (mbr((0x0C, 2048, 2048), (0x05, 4096, 2048)), "x.img", "a FAT, an extended partition"),
        (mbr((0x0C, 2048, 4096), (0x83, 4096, 2048)), "x.img", "lie over one another"),
        (mbr((0x0C, 0, 2048), (0x83, 4096, 2048)), "x.img", "lie over one another"),
        (mbr(), "x.img", "unknown layout: no partition"),
        (mbr((0x0C, 2048, 2048), (0x83, 4096, 2048)), "x.img", "its partition 1 holds no FAT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_of_a_known_layout_is_named_in_one_line(
    tmp_path: Path, content: bytes, name: str, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(SourceError) as caught:
        open_it(tmp_path / name, tmp_path)

    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@given(st.binary(max_size=1100), st.integers(0, 2**34))
def test_any_bytes_are_a_partition_table_or_a_mistake(head: bytes, size: int) -> None:
    try:
        slices = opened.read_slices(head, size, Path("x.img"))
    except SourceError:
        return
    assert all(part.start + part.size <= size for part in slices)


@given(st.integers(-(2**31), 2**34 - 2**31 - 1), st.integers(0, 10**9 - 1))
def test_the_times_of_ext4_are_read_as_they_were_written(seconds: int, nanoseconds: int) -> None:
    low = seconds & 0xFFFFFFFF
    signed = low - 2**32 if low >= 2**31 else low
    epoch = (seconds - signed) >> 32
    extra = nanoseconds << 2 | epoch

    read = opened._nanoseconds(f"{low:08x}".encode(), f"{extra:08x}".encode())

    assert read == seconds * 10**9 + nanoseconds
