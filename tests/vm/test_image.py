"""What is on the built image, looked at from outside, without booting it."""

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest

from image import checksums, recipe, signing
from image.firmware import PI_4, boot, read_file
from image.ladder import RUNGS, climb
from image.manifest import SCHEMA, ImageManifest
from tests.vm.conftest import KEY, Root, partition

pytestmark = pytest.mark.vm

RECIPE = Path("image/recipes/picket.toml")
SLOT_A = 2
BOARDS = recipe.load(RECIPE).boards


def test_the_image_is_what_its_description_says(image: ImageManifest) -> None:
    image.verify()


def test_the_image_passes_every_static_check(image: ImageManifest) -> None:
    results = {result.name: [said.text for said in result.findings if not said.note] for result in climb(image)}

    assert results == {name: [] for name in RUNGS}


def test_the_description_names_the_packages_of_both_kinds(image: ImageManifest) -> None:
    found = {package.name: package.version for package in image.packages}

    assert {"systemd", "openssh-server", "python3", "raspi-firmware", "awscrt", "lgpio", "gpiozero"} <= set(found)
    assert all(found.values())


def test_nothing_of_one_unit_is_on_the_image(root: Root) -> None:
    assert not {name for name in root.names("/etc/ssh") if name.startswith("ssh_host_")}
    assert root.text("/etc/machine-id") == ""
    assert "random-seed" not in root.names("/var/lib/systemd")
    assert root.names("/var/lib/picket") == set()
    assert root.names("/var/log") == set()


def test_nothing_of_the_build_host_is_on_the_image(root: Root) -> None:
    assert not {name for name in root.names("/usr/lib") if "x86_64" in name}
    assert not {name for name in root.names("/usr/bin") | root.names("/usr/sbin") if name.endswith(".foreign")}
    assert root.text("/var/lib/dpkg/diversions") == ""
    assert root.entries["/etc/hosts"].target == "../run/hosts"


def test_the_factory_key_opens_one_command_only(root: Root) -> None:
    public = KEY.with_name("factory.pub").read_text().strip()

    assert root.text("/etc/picket/factory_authorized_keys") == (
        f'restrict,command="/usr/bin/picket-agent provision" {public}\n'
    )


def test_keys_are_looked_for_in_one_place_only(root: Root) -> None:
    settings = root.text("/etc/ssh/sshd_config.d/10-picket.conf")

    assert "AuthorizedKeysFile /etc/picket/factory_authorized_keys" in settings
    assert "AllowUsers picket" in settings
    assert "PasswordAuthentication no" in settings


def test_the_agents_files_are_roots_alone_to_change(root: Root) -> None:
    for path in ("/usr/bin/picket-agent", "/etc/picket/agent.toml", "/etc/picket/factory_authorized_keys"):
        assert root.entries[path].owner == "0/0", path
        assert re.fullmatch(r"-rw[x-]r-[x-]r-[x-]", root.entries[path].mode), path


@pytest.mark.parametrize(
    "unit",
    ["picket-agent.service", "picket-factory.service", "picket-hostkey.service", "picket-seal.path", "ssh.service"],
)
def test_our_units_are_enabled(root: Root, unit: str) -> None:
    assert unit in root.names("/etc/systemd/system/multi-user.target.wants")


@pytest.mark.parametrize("unit", ["getty.target", "serial-getty@.service", "systemd-logind.service", "ssh.socket"])
def test_what_has_no_use_here_is_masked(root: Root, unit: str) -> None:
    assert root.entries[f"/etc/systemd/system/{unit}"].target == "/dev/null"


def test_config_txt_names_files_that_are_there(image: ImageManifest, tmp_path: Path) -> None:
    started = boot(image.image_path, tmp_path, PI_4)

    assert started.kernel.read_bytes()[:2] == b"\x1f\x8b"
    assert started.initramfs is not None
    (root_a,) = (part for part in image.partitions if part.label == "picket-root")
    assert f"picket.verity={root_a.uuid}:" in started.command_line
    assert started.choice.partition == 2
    assert started.choice.config["arm_64bit"] == "1"
    assert started.choice.config["enable_uart"] == "1"


@pytest.mark.parametrize("name", ["bootcode.bin", "start.elf", "fixup.dat", "start4.elf", "fixup4.dat"])
def test_the_firmware_is_there(image: ImageManifest, name: str) -> None:
    assert len(read_file(image.image_path, name, SLOT_A)) > 1000


@pytest.mark.parametrize("board", BOARDS)
def test_every_board_has_a_console_and_a_place_for_the_tpm(image: ImageManifest, tmp_path: Path, board: str) -> None:
    tree = tmp_path / "board.dtb"
    tree.write_bytes(read_file(image.image_path, f"{board}.dtb", SLOT_A))

    source = subprocess.run(["dtc", "-q", "-I", "dtb", "-O", "dts", tree], check=True, capture_output=True, text=True)

    assert 'compatible = "infineon,slb9670"' in source.stdout
    assert 'stdout-path = "serial' in source.stdout


def test_the_initramfs_carries_the_way_to_every_medium(image: ImageManifest) -> None:
    unpacked = gzip.decompress(read_file(image.image_path, "initrd.img", SLOT_A))

    for module in (
        "virtio_blk",
        "sdhci_iproc",
        "bcm2835",
        "gpio_regulator",
        "ext4",
        "dm_verity",
        "squashfs",
        "overlay",
    ):
        assert f"modules/{module}.ko".encode() in unpacked


def test_the_data_partition_is_clean_and_empty(image: ImageManifest, folder: Path) -> None:
    data = partition(image, "picket-data", folder)

    subprocess.run(["/usr/sbin/e2fsck", "-fn", data], check=True, capture_output=True)
    listed = subprocess.run(["/usr/sbin/debugfs", "-R", "ls -p /", data], check=True, capture_output=True, text=True)

    assert {line.split("/")[5] for line in listed.stdout.splitlines() if line.startswith("/")} == {
        ".",
        "..",
        "lost+found",
    }


def test_bmaptool_takes_our_block_map(image: ImageManifest, tmp_path: Path) -> None:
    if shutil.which("bmaptool") is None:
        pytest.skip("bmaptool is not installed (package bmap-tools)")
    copy = tmp_path / "copy.img"

    subprocess.run(["bmaptool", "copy", "--bmap", image.bmap_path, image.image_path, copy], check=True)

    assert subprocess.run(["cmp", copy, image.image_path], check=False).returncode == 0


def test_the_description_is_what_the_published_schema_says(image: ImageManifest) -> None:
    value = json.loads((image.directory / f"{image.name}-{image.version}.json").read_text())
    schema = json.loads((image.directory / value["$schema"]).read_text())

    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["date"])).validate(value)

    assert schema == json.loads(SCHEMA.read_text())
    assert [part["label"] for part in value["partitions"]] == [
        "PICKETCTL", "PICKETBOOT", "none", "picket-root", "none", "picket-data",
    ]  # fmt: skip
    assert value["boards"][-1] == "bcm2712-rpi-5-b"
    assert value["support"] == {"until": "2031-12-31", "contact": "mailto:security@example.com"}
    assert value["verity"]["root_hash"] == next(part.uuid for part in image.partitions if part.type == "squashfs")


def test_what_is_shipped_is_summed_and_signed(image: ImageManifest) -> None:
    key = signing.open_signer(f"file:{signing.ensure()}").public_line

    checked = checksums.check(image.directory, key)

    stem = f"{image.name}-{image.version}"
    wanted = {"img", "img.zst", "bmap", "json", "os.tar", "spdx.json", "cdx.json", "licences.txt"}
    assert {f"{stem}.{suffix}" for suffix in wanted} | {"os_list.json", "release.json", SCHEMA.name} <= set(
        checked.files
    )
    assert checked.signer is not None
