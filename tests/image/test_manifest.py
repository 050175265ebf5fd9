import copy
import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image import bmap, sample
from image.disk import Verity
from image.errors import ManifestError
from image.manifest import SCHEMA, ImageManifest, Origin, Shipped, Support, shipped


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

    assert blocks.image_size == manifest.image.size


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

    with pytest.raises(ManifestError, match=manifest.bmap.file):
        manifest.verify()


def test_a_block_map_of_another_image_is_refused_even_with_the_right_digest(description: Path) -> None:
    manifest = ImageManifest.load(description)
    other = description.parent / "other.img"
    other.write_bytes(bytes(4096))
    manifest.bmap_path.write_text(bmap.write(bmap.create(other)))
    change(description, bmap=asdict(shipped(manifest.bmap_path)))

    with pytest.raises(ManifestError, match="4096 bytes"):
        ImageManifest.load(description).verify()


@pytest.mark.parametrize("name", ["image", "bmap"])
def test_a_missing_file_is_named(description: Path, name: str) -> None:
    manifest = ImageManifest.load(description)
    (description.parent / getattr(manifest, name).file).unlink()

    with pytest.raises(ManifestError, match=getattr(manifest, name).file):
        manifest.verify()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "else"}, "picket-image-2"),
        ({"image": {"file": "picket.img", "sha256": "ABC", "size": 1}}, r"image\.sha256"),
        ({"image": {"file": "picket.img", "sha256": "0" * 64, "size": "12"}}, r"image\.size"),
        ({"image": {"file": "picket.img", "sha256": "0" * 64, "size": True}}, r"image\.size"),
        ({"image": {"file": "../../etc/passwd", "sha256": "0" * 64, "size": 1}}, r"image\.file"),
        ({"bmap": {"file": ".hidden", "sha256": "0" * 64, "size": 1}}, r"bmap\.file"),
        ({"compressed": "picket.img.zst"}, "compressed"),
        ({"control": "grub"}, "control"),
        ({"support": {"until": "2031-02-30", "contact": None}}, r"support\.until"),
        ({"support": {"until": None, "contact": "call us"}}, r"support\.contact"),
        ({"name": "picket\x1b[2J"}, "name"),
        ({"flavour": "sweet"}, "flavour is not a field"),
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


# --- the published schema -------------------------------------------------------------------------------------------

VALIDATOR = jsonschema.Draft202012Validator(
    json.loads(SCHEMA.read_text()), format_checker=jsonschema.FormatChecker(["date"])
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A description that has everything that one can have."""
    manifest = replace(
        sample.build(tmp_path_factory.mktemp("sample") / "picket.json"),
        base=Origin("debian", "trixie", "arm64", "1" * 64),
        control="autoboot",
        verity=Verity("2" * 64, "3" * 64, 100),
        support=Support(dt.date(2031, 12, 31), "mailto:security@example.com"),
        factory_key=f"SHA256:{'a' * 43}",
        compressed=Shipped("picket.img.zst", "4" * 64, 1),
        bundle=Shipped("picket.os.tar", "5" * 64, 1),
    )
    return dict(json.loads(manifest.dump()))


def parsed(value: Any) -> str:
    """What the parser complains of; nothing if it takes the value."""
    try:
        ImageManifest.parse(value, Path("picket.json"))
    except ManifestError as error:
        return str(error)
    return ""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def mutated(value: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy in which one place was changed: by another value, or taken out, or with a key added."""
    value = copy.deepcopy(value)
    if not path:
        return change
    here = value
    for key in path[:-1]:
        here = here[key]
    if change == "<gone>":
        del here[path[-1]]
    elif change == "<more>" and isinstance(here[path[-1]], dict):
        here[path[-1]]["more"] = 1
    else:
        here[path[-1]] = change
    return value


def test_the_schema_is_one() -> None:
    VALIDATOR.check_schema(VALIDATOR.schema)


def test_both_take_what_is_written(description: Path, whole: dict[str, Any]) -> None:
    for value in (json.loads(description.read_text()), whole):
        VALIDATOR.validate(value)
        assert not parsed(value)


def test_all_that_is_written_is_read_back(whole: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "picket.json"
    path.write_text(json.dumps(whole))

    assert json.loads(ImageManifest.load(path).dump()) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
#: What is nearly right somewhere.
WRONG: list[Any] = [
    *("<gone>", "<more>", "", "a\n", "0" * 64, "0" * 64 + "\n", "G" * 64, "\u0660" * 64, "\0", "..", "a/b", "\u00e9"),
    *(
        "2031-02-29",
        "2032-02-29",
        "2032-02-29\n",
        "mailto:a@b",
        "https://",
        "SHA256:" + "a" * 43,
        "aa",
        "aaa",
        "a" * 257,
    ),
    *("autoboot", "grub", 0, -1, 1.0, 1.5, True, None, [], {}, ["a"], [1], [[]], [{}]),
]
NEARLY = st.sampled_from(WRONG)


@settings(deadline=None)
@given(data=st.data())
def test_what_the_parser_refuses_the_schema_refuses_too(whole: dict[str, Any], data: st.DataObject) -> None:
    value = whole
    for _ in range(data.draw(st.integers(1, 3))):
        value = mutated(value, data.draw(st.sampled_from(sorted(places(value), key=str))), data.draw(NEARLY | JSON))

    complaint = parsed(value)

    if "overlaps another" not in complaint:  # which no schema can say
        assert VALIDATOR.is_valid(value) is not bool(complaint), complaint or "the parser takes it"


def test_a_directory_of_results_is_read_by_the_one_description_in_it(description: Path) -> None:
    (description.parent / "release.json").write_text("{}")

    assert ImageManifest.load(description.parent) == ImageManifest.load(description)


def test_a_directory_without_a_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="holds no image description"):
        ImageManifest.load(tmp_path)
