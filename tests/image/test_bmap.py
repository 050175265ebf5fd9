import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image import bmap
from image.bmap import Bmap, Range
from image.errors import ManifestError


@st.composite
def block_maps(draw: st.DrawFn) -> Bmap:
    block_size = draw(st.sampled_from([512, 4096]))
    cuts = sorted(draw(st.sets(st.integers(0, 10_000), max_size=20)))
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    ranges = tuple(Range(first, last - 1, hashlib.sha256(str(first).encode()).hexdigest()) for first, last in pairs)
    end = (ranges[-1].last + 1) * block_size if ranges else 0
    return Bmap(end + draw(st.integers(0, 10 * block_size)), block_size, ranges)


@given(block_maps())
def test_what_is_written_is_read_back(wanted: Bmap) -> None:
    assert bmap.parse(bmap.write(wanted)) == wanted


@given(block_maps(), st.data())
def test_a_changed_map_is_never_taken_for_another_one(wanted: Bmap, data: st.DataObject) -> None:
    text = bmap.write(wanted)
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.characters(codec="ascii")) + text[place + 1 :]

    if changed != text:
        with pytest.raises(ManifestError):
            bmap.parse(changed)


@given(st.text(max_size=300))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ManifestError):
        bmap.parse(text)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 3), (3, 5)],  # overlapping
        [(4, 5), (0, 1)],  # out of order
        [(0, 10)],  # behind the image's end
    ],
)
def test_ranges_must_ascend_inside_the_image(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ManifestError):
        Bmap(10 * 4096, 4096, tuple(Range(first, last, "0" * 64) for first, last in ranges))


def test_a_map_that_declares_entities_is_refused() -> None:
    with pytest.raises(ManifestError, match="entities"):
        bmap.parse('<!DOCTYPE bmap [<!ENTITY a "b">]><bmap version="2.0"/>')


def sparse_image(path: Path) -> Path:
    with path.open("wb") as file:
        file.write(b"first" * 100)
        file.seek(1024 * 1024)
        file.write(b"second" * 2000)
        file.truncate(3 * 1024 * 1024 + 100)
    return path


def test_only_what_holds_data_is_mapped(tmp_path: Path) -> None:
    image = sparse_image(tmp_path / "sparse.img")

    found = bmap.create(image)

    assert found.image_size == image.stat().st_size
    assert [(item.first, item.last) for item in found.ranges] == [(0, 0), (256, 258)]
    assert found.mapped_bytes == 4 * 4096


def test_the_last_block_may_be_cut_short(tmp_path: Path) -> None:
    image = tmp_path / "short.img"
    image.write_bytes(b"x" * 5000)

    found = bmap.create(image)

    assert found.mapped_bytes == 5000
    assert found.ranges[0].sha256 == hashlib.sha256(b"x" * 5000).hexdigest()


def test_one_flipped_bit_is_named_by_its_blocks(tmp_path: Path) -> None:
    image = sparse_image(tmp_path / "sparse.img")
    found = bmap.create(image)
    with image.open("r+b") as file:
        file.seek(1024 * 1024 + 7)
        file.write(b"\0")

    with pytest.raises(ManifestError, match="blocks 256-258"):
        bmap.check(image, found)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    image = sparse_image(tmp_path / "sparse.img")
    found = bmap.create(image)
    with image.open("ab") as file:
        file.write(b"x")

    with pytest.raises(ManifestError, match="bytes"):
        bmap.check(image, found)


@pytest.mark.skipif(shutil.which("bmaptool") is None, reason="bmaptool is not installed (package bmap-tools)")
def test_bmaptool_writes_the_same_image_by_our_map(tmp_path: Path) -> None:
    image = sparse_image(tmp_path / "sparse.img")
    (tmp_path / "sparse.bmap").write_text(bmap.write(bmap.create(image)))

    subprocess.run(["bmaptool", "copy", "--bmap", "sparse.bmap", "sparse.img", "copy.img"], cwd=tmp_path, check=True)

    assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()


@pytest.mark.skipif(shutil.which("bmaptool") is None, reason="bmaptool is not installed (package bmap-tools)")
def test_we_read_what_bmaptool_writes(tmp_path: Path) -> None:
    image = sparse_image(tmp_path / "sparse.img")

    subprocess.run(["bmaptool", "create", "-o", "theirs.bmap", "sparse.img"], cwd=tmp_path, check=True)

    bmap.check(image, bmap.load(tmp_path / "theirs.bmap"))
