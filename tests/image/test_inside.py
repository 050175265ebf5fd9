"""Every file of an image, read without mounting it."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from image import disk, inside
from image.errors import DiskFullError, ManifestError
from image.manifest import ImageManifest, Partition, Shipped, shipped
from tests.image import small

pytestmark = small.needs_tools

EVERYTHING = Partition(1, "squashfs", "root", 0, 1 << 20, "-", "-")


def squashfs(tree: Path) -> Path:
    file = tree.parent / "squashfs"
    disk.make_squashfs(tree, file, small.EPOCH)
    return file


def part_of(manifest: ImageManifest, label: str) -> Partition:
    return next(part for part in manifest.partitions if part.label == label)


def test_names_of_every_kind_are_read_with_all_that_ls_shows(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a b").mkdir(parents=True)
    (tree / "a b/tab\t").write_text("one")
    (tree / 'quote"and\\slash').write_text("two")
    (tree / "empty").write_text("")
    (tree / "link").symlink_to('to a\\b "q"')
    os.mkfifo(tree / "pipe")
    (tree / "a b/plain \\ name").write_text("four")
    os.link(tree / "a b/plain \\ name", tree / "other name")
    (tree / "empty").chmod(0o4751)
    (tree / "-R 0 644").write_text("three")

    found = {file.path: (file, content) for file, content in inside.files_of_root(squashfs(tree), EVERYTHING)}

    assert {path: file.kind for path, (file, _) in found.items()} == {
        "/": "d", "/a b": "d", "/a b/plain \\ name": "-", "/a b/tab\t": "-", '/quote"and\\slash': "-", "/empty": "-",
        "/link": "l", "/pipe": "p", "/other name": "-", "/-R 0 644": "-",
    }  # fmt: skip
    assert found["/a b/tab\t"][1] == b"one"
    assert found['/quote"and\\slash'][1] == b"two"
    assert found["/-R 0 644"][1] == b"three"
    assert found["/link"][0].target == 'to a\\b "q"'
    assert found["/empty"][0].mode == 0o4751
    assert found["/empty"][0].owner == os.geteuid()
    assert found["/other name"][0].sha256 == found["/a b/plain \\ name"][0].sha256


def test_a_damaged_root_is_named(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(1 << 20))
    file = squashfs(tree)
    os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(ManifestError, match="partition 1 holds no squashfs that can be read"):
        list(inside.files_of_root(file, EVERYTHING))


def test_what_is_no_file_system_is_named(tmp_path: Path) -> None:
    file = tmp_path / "zeros"
    file.write_bytes(bytes(1 << 20))

    with pytest.raises(ManifestError, match="no squashfs"):
        list(inside.files_of_root(file, EVERYTHING))
    with pytest.raises(ManifestError, match="no FAT file system"):
        list(inside.files_of_fat(file, EVERYTHING))


def test_a_reader_that_has_enough_leaves_nothing_running(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(8 << 20))
    files = inside.files_of_root(squashfs(tree), EVERYTHING)
    next(files)

    files.close()

    said = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "comm="], check=False, capture_output=True, text=True
    )
    assert "unsquashfs" not in said.stdout


def test_boot_files_are_read_with_their_content(tmp_path: Path) -> None:
    manifest = small.build(tmp_path / "image")

    found = {
        file.path: content for file, content in inside.files_of_fat(manifest.image_path, part_of(manifest, "BOOT"))
    }

    assert found["/bcm2711-rpi-4-b.dtb"] == b"bcm2711-rpi-4-b.dtb"


def test_an_image_of_which_the_compressed_form_is_left_is_unpacked(tmp_path: Path) -> None:
    manifest = small.build(tmp_path / "image")
    subprocess.run(["zstd", "-q", "--rm", manifest.image_path], check=True)
    packed = manifest.image_path.with_name(f"{manifest.image.file}.zst")

    with inside.raw(replace(manifest, compressed=shipped(packed))) as image:
        assert shipped(image) == manifest.image
    assert not image.exists()


@pytest.mark.parametrize("content", [b"(\xb5/\xfd and no more", b"something else", b"", None])
def test_a_compressed_image_that_is_damaged_or_foreign_is_the_images_fault_in_words(
    tmp_path: Path, content: bytes | None
) -> None:
    manifest = small.build(tmp_path / "image")
    subprocess.run(["zstd", "-q", "--rm", manifest.image_path], check=True)
    packed = manifest.image_path.with_name(f"{manifest.image.file}.zst")
    whole = shipped(packed)
    packed.write_bytes(packed.read_bytes()[:1000] if content is None else content)

    with pytest.raises(ManifestError) as caught, inside.raw(replace(manifest, compressed=shipped(packed))):
        pass
    with pytest.raises(ManifestError, match=r"\.zst has \d+ bytes, its description says"):
        inside.raw(replace(manifest, compressed=whole)).__enter__()

    said = str(caught.value)
    assert "img.zst cannot be unpacked: it is damaged, or no zstd (" in said or "img has 0 bytes" in said
    assert said.endswith("; build or fetch it again")
    assert "\n" not in said


def test_a_disk_without_room_for_the_image_is_not_the_images_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = small.build(tmp_path / "image")
    subprocess.run(["zstd", "-q", "--rm", manifest.image_path], check=True)
    packed = manifest.image_path.with_name(f"{manifest.image.file}.zst")
    zstd = tmp_path / "bin/zstd"
    zstd.parent.mkdir()
    zstd.write_text(
        "#!/bin/sh\necho 'zstd: error 93 : Write error : cannot write block : No space left on device' >&2\nexit 1\n"
    )
    zstd.chmod(0o755)
    monkeypatch.setenv("PATH", f"{zstd.parent}:/usr/bin:/bin")

    with pytest.raises(DiskFullError, match=r"no room in .* to unpack small"):
        inside.raw(replace(manifest, compressed=shipped(packed))).__enter__()


def test_an_image_that_is_gone_or_cut_is_named(tmp_path: Path) -> None:
    manifest = small.build(tmp_path / "image")
    os.truncate(manifest.image_path, 1000)
    with pytest.raises(ManifestError, match="1000 bytes"), inside.raw(manifest):
        pass
    manifest.image_path.unlink()
    with pytest.raises(ManifestError, match=r"holds no small-1\.0\.img; `make image` makes it"), inside.raw(manifest):
        pass
    with pytest.raises(ManifestError, match=r"holds neither small-1\.0\.img nor x\.zst; `make image` makes them"):
        inside.raw(replace(manifest, compressed=Shipped("x.zst", "0" * 64, 1))).__enter__()
