import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from cloud.repository import Repository
from image import bundle
from image.bundle import BundleError, Fields
from tests.image.slots.world import DISK, HARDWARE, Keys, fat
from tests.updates import World

FIELDS = Fields("picket", "1.1.0", 2, 3, (HARDWARE,), "autoboot", DISK)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    fat(tmp_path / "boot", 64 << 10, {"config.txt": b"arm_64bit=1\n", "kernel.img": b"k" * 5000})
    (tmp_path / "root").write_bytes(b"hsqs" + bytes(8188))
    return tmp_path / "boot", tmp_path / "root"


def test_the_same_parts_and_key_give_the_same_bundle(parts: tuple[Path, Path], keys: Keys, tmp_path: Path) -> None:
    first = bundle.build(*parts, FIELDS, keys.sign, tmp_path / "one")
    second = bundle.build(*parts, FIELDS, keys.sign, tmp_path / "two")

    assert first.bundle.name == "picket-1.1.0.os.tar"
    assert first.bundle.read_bytes() == second.bundle.read_bytes()
    assert first.description.read_bytes() == second.description.read_bytes()
    assert bundle.verify(first.bundle, keys.signers) == ("image", first.manifest)


@pytest.mark.parametrize(("bits", "size"), [(12, 1 << 20), (16, 8 << 20), (32, 36 << 20)])
def test_a_boot_partition_is_cut_off_behind_its_last_used_cluster(tmp_path: Path, bits: int, size: int) -> None:
    content = fat(tmp_path / "fat", size, {"a.txt": b"a" * 700, "b.txt": b"b" * 1500}, bits, 128)

    length = bundle.used_length(lambda count, offset: content[offset : offset + count])

    assert content[length - 512 : length].rstrip(b"\0").endswith(b"b")
    assert not any(content[length:])
    assert length < size / 2


def test_an_empty_file_system_ends_with_its_directory(tmp_path: Path) -> None:
    content = fat(tmp_path / "fat", 1 << 20, {})

    length = bundle.used_length(lambda count, offset: content[offset : offset + count])

    assert not any(content[length:])


def test_a_bundle_can_be_read_by_any_tar(parts: tuple[Path, Path], keys: Keys, tmp_path: Path) -> None:
    built = bundle.build(*parts, FIELDS, keys.sign, tmp_path / "out")

    with tarfile.open(built.bundle, "r:") as tar:
        assert tar.getnames() == ["manifest.json", "manifest.json.sig", "boot", "root"]
        member = tar.extractfile("manifest.json")
        assert member is not None
        value = json.load(member)
    assert value["agent_security_version"] == 3
    assert value["boot"]["partition_size"] == 64 << 10
    assert value["root"]["sha256"] == hashlib.sha256(parts[1].read_bytes()).hexdigest()


def test_what_units_would_refuse_is_not_built(parts: tuple[Path, Path], keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no FAT file system"):
        bundle.build(parts[1], parts[1], FIELDS, keys.sign, tmp_path / "out")
    with pytest.raises(BundleError, match="units would refuse"):
        bundle.build(*parts, replace(FIELDS, version="1.1-rc1"), keys.sign, tmp_path / "out")
    with pytest.raises(BundleError, match="boot files have one called"):
        bundle.pack_files([("../etc/passwd", b"")])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("position", [600, 3000, -2000])
def test_a_damaged_bundle_is_named(parts: tuple[Path, Path], keys: Keys, tmp_path: Path, position: int) -> None:
    built = bundle.build(*parts, FIELDS, keys.sign, tmp_path / "out")
    data = bytearray(built.bundle.read_bytes())
    data[position] ^= 1
    built.bundle.write_bytes(data)

    with pytest.raises(BundleError, match=r"picket-1\.1\.0\.os\.tar"):
        bundle.verify(built.bundle, keys.signers)


def test_a_bundle_is_a_release_that_the_fleet_takes(parts: tuple[Path, Path], keys: Keys, tmp_path: Path) -> None:
    built = bundle.build(*parts, FIELDS, keys.sign, tmp_path / "out")
    repository: Repository = World(tmp_path / "world").repository

    assert repository.add(built.description, "canary") == "os/canary/picket-1.1.0.os.tar"
