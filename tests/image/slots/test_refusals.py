"""Bundles that a unit must not take: nothing of them reaches the medium."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image.files.usr.lib.picket.slots import bundle as form
from image.files.usr.lib.picket.slots.bundle import NAMESPACE, Manifest, Part
from image.files.usr.lib.picket.slots.faults import Fault
from tests.image.slots.world import Kit, World


@pytest.fixture
def world(tmp_path: Path, kit: Kit) -> World:
    return World.make(tmp_path / "disk", kit, "autoboot", counted=False)


def pack(manifest: bytes, signature: bytes, boot: bytes, root: bytes, *extra: tuple[str, bytes]) -> bytes:
    members = (*zip(form.MEMBERS, (manifest, signature, boot, root), strict=True), *extra)
    return b"".join(form.header(n, len(d)) + d + bytes(form.padding(len(d))) for n, d in members) + form.END


def refusal(world: World, data: bytes) -> str:
    """The code with which a bundle is refused; the medium and the notes stay as they are."""
    path = world.other_places / "bundle"
    path.write_bytes(data)
    before = (world.root / "medium").read_bytes()
    with path.open("rb") as file, pytest.raises(Fault) as caught:
        world.slots().install(file.fileno(), lambda _: None)
    assert (world.root / "medium").read_bytes() == before
    assert list((world.root / "data/system").iterdir()) == []
    return caught.value.code


def signed(world: World, change: Callable[[Manifest], Manifest] = lambda m: m, **how: Any) -> bytes:
    """A bundle whose manifest says something else."""
    image = world.image("1.1.0")
    data = change(image.manifest).to_bytes()
    signature = world.kit.keys.sign(data, how.get("namespace", NAMESPACE), how.get("key", "vendor"))
    return pack(data, signature, how.get("boot", image.boot[: image.manifest.boot.size]), how.get("root", image.root))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: replace(m, product="other"), "wrong-product"),
        (lambda m: replace(m, hardware=("raspberrypi,5-model-b",)), "wrong-hardware"),
        (lambda m: replace(m, control="os-prefix", boot_partition_size=0), "wrong-control"),
        (lambda m: replace(m, disk="feed5eed"), "wrong-disk"),
        (lambda m: replace(m, security_version=0), "downgrade"),
        (lambda m: replace(m, boot_partition_size=1 << 20), "too-large"),
        (lambda m: replace(m, boot_partition_size=512), "bad-bundle"),
        (lambda m: replace(m, root=Part(m.root.size + 512, m.root.sha256)), "bad-bundle"),
        (lambda m: replace(m, boot=Part(m.boot.size - 512, m.boot.sha256)), "bad-bundle"),
        (lambda m: replace(m, version="1.1"), None),
    ],
)
def test_what_was_signed_for_others_is_refused(
    world: World, change: Callable[[Manifest], Manifest], code: str | None
) -> None:
    if code is None:
        path = world.other_places / "bundle"
        path.write_bytes(signed(world, change))
        with path.open("rb") as file:
            assert world.slots().install(file.fileno(), lambda _: None)["version"] == "1.1"
    else:
        assert refusal(world, signed(world, change)) == code


def test_a_root_that_does_not_fit_is_refused(world: World) -> None:
    root = bytes(32 << 10)

    assert refusal(world, signed(world, lambda m: replace(m, root=Part(len(root), "0" * 64)), root=root)) == "too-large"


def test_only_the_image_makers_signature_over_a_bundle_counts(world: World) -> None:
    image = world.image("1.1.0")
    boot, data = image.boot[: image.manifest.boot.size], image.manifest.to_bytes()
    other = world.image("1.2.0").manifest.to_bytes()

    assert refusal(world, signed(world, key="stranger")) == "bad-signature"
    assert refusal(world, signed(world, namespace="picket-factory-mode")) == "bad-signature"
    assert refusal(world, pack(data, b"", boot, image.root)) == "bad-signature"
    assert refusal(world, pack(data, b"no signature\n", boot, image.root)) == "bad-signature"
    assert refusal(world, pack(data, world.kit.keys.sign(other, NAMESPACE), boot, image.root)) == "bad-signature"
    world.places = replace(world.places, signers=world.other_places / "nobody")
    assert refusal(world, signed(world)) == "bad-signature"


def test_the_floor_outlives_what_runs(world: World) -> None:
    (world.root / "data/system/os-floor").write_text("3\n")
    path = world.other_places / "bundle"
    path.write_bytes(world.image("1.1.0").bundle)

    with path.open("rb") as file, pytest.raises(Fault, match="the floor is 3"):
        world.slots().install(file.fileno(), lambda _: None)


@pytest.mark.parametrize("name", ["boot", "root"])
def test_a_member_that_is_not_what_was_signed_never_counts(world: World, name: str) -> None:
    image = world.image("1.1.0")
    data = {"boot": image.boot[: image.manifest.boot.size], "root": image.root}[name]
    path = world.other_places / "bundle"
    damaged: dict[str, Any] = {name: data[:-1] + bytes([data[-1] ^ 1])}
    path.write_bytes(signed(world, **damaged))

    with path.open("rb") as file, pytest.raises(Fault, match="not what was signed"):
        world.slots().install(file.fileno(), lambda _: None)

    assert world.slots().status()["slots"]["b"] is None
    assert not any(world.stretch("boot-b")[:512])  # nothing that a firmware would boot
    assert world.holds("a") == world.image("1.0.0")


@pytest.mark.parametrize("length", [0, 100, 512, 2048, 5000, -1024, -512, -1])
def test_a_bundle_that_is_cut_off_is_none(world: World, length: int) -> None:
    assert refusal(world, world.image("1.1.0").bundle[:length]) == "bad-bundle"


def test_more_or_other_members_are_refused(world: World) -> None:
    good, image = world.image("1.1.0").bundle, world.image("1.1.0")
    signature = world.kit.keys.sign(image.manifest.to_bytes(), NAMESPACE)
    boot, data = image.boot[: image.manifest.boot.size], image.manifest.to_bytes()

    assert refusal(world, pack(data, signature, boot, image.root, ("more", b"x" * 512))) == "bad-bundle"
    assert refusal(world, good + bytes(512)) == "bad-bundle"
    assert refusal(world, good[512:]) == "bad-bundle"
    assert refusal(world, good.replace(b"manifest.json\0", b"manifest.JSON\0", 1)) == "bad-bundle"
    link = bytearray(good)
    link[156:157] = b"2"  # a symbolic link, with a checksum that is not even right
    assert refusal(world, bytes(link)) == "bad-bundle"
    assert refusal(world, pack(data + b" " * (64 << 10), signature, boot, image.root)) == "bad-bundle"


def test_a_bundle_that_is_no_file_is_refused(world: World) -> None:
    reader, writer = os.pipe()
    with pytest.raises(Fault, match="a bundle is a file"):
        world.slots().install(reader, lambda _: None)
    os.close(reader)
    os.close(writer)


@given(st.integers(0, 2599), st.integers(0, 255))
def test_no_byte_of_the_headers_can_be_another(position: int, value: int) -> None:
    """Until the first member of data, whatever is changed is noticed by the form alone or is in the signed text."""
    data = bytearray(pack(b"{}", b"signature", b"boot" * 128, b"root" * 128))
    changed = data[position] != value
    data[position] = value

    def read(size: int, offset: int) -> bytes:
        return bytes(data[offset : offset + size])

    spans = ((512, 2), (1536, 9), (2560, 512), (3584, 512))
    if changed and not any(start <= position < start + size for start, size in spans):
        with pytest.raises(Fault):
            form.read_bundle(read, len(data))
    else:
        found = form.read_bundle(read, len(data))
        assert (found.boot, found.root) == (spans[2], spans[3])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_manifest_parses_or_is_a_bad_bundle(data: bytes) -> None:
    with pytest.raises(Fault) as caught:
        form.parse_manifest(data)
    assert caught.value.code == "bad-bundle"


@given(st.sampled_from(["format", "product", "version", "hardware", "control", "disk", "boot", "root", "more"]), JSON)
def test_a_manifest_with_one_wrong_field_is_a_bad_bundle(field: str, value: object) -> None:
    parts = Part(512, "0" * 64), Part(512, "1" * 64)
    good = Manifest("picket", "1.0.0", 1, 1, ("a,b",), "autoboot", "1234abcd", *parts, 512)
    assert form.parse_manifest(good.to_bytes()) == good
    changed = json.loads(good.to_bytes()) | {field: value}
    with contextlib.suppress(Fault):
        assert json.loads(form.parse_manifest(json.dumps(changed).encode()).to_bytes()) == changed
