import json
from pathlib import Path
from typing import Any

import pytest

from image import bmap, sample
from image.errors import ManifestError
from image.manifest import ImageManifest, digest


@pytest.fixture
def description(tmp_path: Path) -> Path:
    path = tmp_path / "picket.json"
    sample.build(path)
    return path


def change(description: Path, **changes: Any) -> None:
    value = json.loads(description.read_text())
    description.write_text(json.dumps({**value, **changes}))


def test_a_built_image_is_what_its_description_says(description: Path) -> None:
    manifest = ImageManifest.load(description)

    blocks = manifest.verify()

    assert blocks.image_size == manifest.size


def test_a_description_is_read_back_as_it_was_written(description: Path) -> None:
    manifest = ImageManifest.load(description)
    description.write_text(manifest.dump())

    assert ImageManifest.load(description) == manifest


def test_one_flipped_bit_in_the_image_is_found(description: Path) -> None:
    manifest = ImageManifest.load(description)
    with manifest.image_path.open("r+b") as file:
        file.seek(sample.PARTITION_START)
        byte = file.read(1)[0]
        file.seek(sample.PARTITION_START)
        file.write(bytes([byte ^ 1]))

    with pytest.raises(ManifestError, match="digest"):
        manifest.verify()


def test_a_bit_flipped_in_a_hole_is_found(description: Path) -> None:
    manifest = ImageManifest.load(description)
    with manifest.image_path.open("r+b") as file:
        file.seek(sample.SIZE - 10)
        file.write(b"\1")

    with pytest.raises(ManifestError, match="digest"):
        manifest.verify()


def test_an_image_that_was_cut_is_found(description: Path) -> None:
    manifest = ImageManifest.load(description)
    with manifest.image_path.open("r+b") as file:
        file.truncate(sample.SIZE - 4096)

    with pytest.raises(ManifestError, match="bytes"):
        manifest.verify()


def test_a_block_map_that_was_changed_is_named(description: Path) -> None:
    manifest = ImageManifest.load(description)
    text = manifest.bmap_path.read_text()
    manifest.bmap_path.write_text(text.replace("<BlockSize> 4096", "<BlockSize> 8192"))

    with pytest.raises(ManifestError, match=manifest.bmap):
        manifest.verify()


def test_a_block_map_of_another_image_is_refused_even_with_the_right_digest(description: Path) -> None:
    manifest = ImageManifest.load(description)
    other = description.parent / "other.img"
    other.write_bytes(bytes(4096))
    manifest.bmap_path.write_text(bmap.write(bmap.create(other)))
    change(description, bmap_sha256=digest(manifest.bmap_path))

    with pytest.raises(ManifestError, match="4096 bytes"):
        ImageManifest.load(description).verify()


@pytest.mark.parametrize("name", ["image", "bmap"])
def test_a_missing_file_is_named(description: Path, name: str) -> None:
    manifest = ImageManifest.load(description)
    (description.parent / getattr(manifest, name)).unlink()

    with pytest.raises(ManifestError, match=getattr(manifest, name)):
        manifest.verify()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "else"}, "picket-image-1"),
        ({"sha256": "ABC"}, "sha256"),
        ({"size": "12"}, "size"),
        ({"size": True}, "size"),
        ({"image": "../../etc/passwd"}, "image"),
        ({"bmap": ".hidden"}, "bmap"),
        ({"partitions": []}, "partitions"),
        ({"packages": [{"kind": "debian", "name": "x"}]}, r"packages\[0\]\.version"),
    ],
)
def test_a_malformed_field_is_named(description: Path, changes: dict[str, Any], complaint: str) -> None:
    change(description, **changes)

    with pytest.raises(ManifestError, match=complaint):
        ImageManifest.load(description)


def test_partitions_that_leave_the_image_are_refused(description: Path) -> None:
    part = json.loads(description.read_text())["partitions"][0]
    change(description, partitions=[{**part, "size": sample.SIZE}])

    with pytest.raises(ManifestError, match="partition 1"):
        ImageManifest.load(description)


def test_no_description_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="make image"):
        ImageManifest.load(tmp_path / "picket.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '"text"', "[" * 100_000])
def test_other_files_are_no_description(tmp_path: Path, text: str) -> None:
    path = tmp_path / "picket.json"
    path.write_text(text)

    with pytest.raises(ManifestError):
        ImageManifest.load(path)
