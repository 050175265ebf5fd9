"""What is on the built image, looked at from outside, without booting it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from factory.drivers.pi_boot import copy_file, parse_config, read_boot_files
from image import recipe
from image.manifest import ImageManifest
from tests.vm.conftest import KEY, debugfs

pytestmark = pytest.mark.vm

RECIPE = Path("image/recipes/picket.toml")
BOARDS = recipe.load(RECIPE).boards


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("image")


@pytest.fixture
def read(image: ImageManifest, folder: Path) -> "Reader":
    return Reader(image, folder)


class Reader:
    def __init__(self, image: ImageManifest, folder: Path) -> None:
        self._image = image
        self._folder = folder

    def text(self, path: str) -> str:
        return debugfs(self._image, self._folder, f"cat {path}")

    def names(self, path: str) -> set[str]:
        listed = debugfs(self._image, self._folder, f"ls -p {path}")
        return {line.split("/")[5] for line in listed.splitlines() if line.startswith("/")} - {".", ".."}

    def stat(self, path: str) -> str:
        return debugfs(self._image, self._folder, f"stat {path}")


def test_the_image_is_what_its_description_says(image: ImageManifest) -> None:
    image.verify()


def test_the_description_names_the_packages_of_both_kinds(image: ImageManifest) -> None:
    found = {package.name: package.version for package in image.packages}

    assert {"systemd", "openssh-server", "python3", "raspi-firmware", "awscrt", "lgpio", "gpiozero"} <= set(found)
    assert all(found.values())


def test_nobody_has_a_password(read: Reader) -> None:
    for line in read.text("/etc/shadow").splitlines():
        assert line.split(":")[1] in {"*", "!", "!*"}, line


def test_nobody_but_root_is_root(read: Reader) -> None:
    roots = [line.split(":")[0] for line in read.text("/etc/passwd").splitlines() if line.split(":")[2] == "0"]

    assert roots == ["root"]


def test_nothing_of_one_unit_is_on_the_image(read: Reader) -> None:
    assert not {name for name in read.names("/etc/ssh") if name.startswith("ssh_host_")}
    assert read.text("/etc/machine-id") == ""
    assert "random-seed" not in read.names("/var/lib/systemd")
    assert read.names("/var/lib/picket") == set()
    assert read.names("/var/log") == set()


def test_nothing_of_the_build_host_is_on_the_image(read: Reader) -> None:
    assert not {name for name in read.names("/usr/lib") if "x86_64" in name}
    assert not {name for name in read.names("/usr/bin") | read.names("/usr/sbin") if name.endswith(".foreign")}
    assert read.text("/var/lib/dpkg/diversions") == ""
    assert "hosts" not in read.names("/etc")


def test_the_factory_key_opens_one_command_only(read: Reader) -> None:
    public = KEY.with_name("factory.pub").read_text().strip()

    assert read.text("/etc/picket/factory_authorized_keys") == (
        f'restrict,command="/usr/bin/picket-agent provision" {public}\n'
    )


def test_keys_are_looked_for_in_one_place_only(read: Reader) -> None:
    settings = read.text("/etc/ssh/sshd_config.d/10-picket.conf")

    assert "AuthorizedKeysFile /etc/picket/factory_authorized_keys" in settings
    assert "AllowUsers picket" in settings
    assert "PasswordAuthentication no" in settings


def test_the_agents_files_are_roots_alone_to_change(read: Reader) -> None:
    for path in ("/usr/bin/picket-agent", "/etc/picket/agent.toml", "/etc/picket/factory_authorized_keys"):
        stat = read.stat(path)
        assert re.search(r"User:\s+0\s+Group:\s+0", stat), path
        assert re.search(r"Mode:\s+0[67][45][45]", stat), path


@pytest.mark.parametrize(
    "unit",
    ["picket-agent.service", "picket-factory.service", "picket-hostkey.service", "picket-seal.path", "ssh.service"],
)
def test_our_units_are_enabled(read: Reader, unit: str) -> None:
    assert unit in read.names("/etc/systemd/system/multi-user.target.wants")


@pytest.mark.parametrize("unit", ["getty.target", "serial-getty@.service", "systemd-logind.service", "ssh.socket"])
def test_what_has_no_use_here_is_masked(read: Reader, unit: str) -> None:
    assert '"/dev/null"' in read.stat(f"/etc/systemd/system/{unit}")


def test_config_txt_names_files_that_are_there(image: ImageManifest, tmp_path: Path) -> None:
    boot = read_boot_files(image.image_path, tmp_path)

    assert boot.kernel.read_bytes()[:2] == b"\x1f\x8b"
    assert boot.initramfs is not None
    assert f"root=PARTUUID={image.partitions[1].partuuid}" in boot.command_line.split()
    config = parse_config((tmp_path / "config.txt").read_text(), "pi4")
    assert config["arm_64bit"] == "1"
    assert config["enable_uart"] == "1"


@pytest.mark.parametrize("name", ["bootcode.bin", "start.elf", "fixup.dat", "start4.elf", "fixup4.dat"])
def test_the_firmware_is_there(image: ImageManifest, tmp_path: Path, name: str) -> None:
    assert copy_file(image.image_path, name, tmp_path).stat().st_size > 1000


@pytest.mark.parametrize("board", BOARDS)
def test_every_board_has_a_console_and_a_place_for_the_tpm(image: ImageManifest, tmp_path: Path, board: str) -> None:
    tree = copy_file(image.image_path, f"{board}.dtb", tmp_path)

    source = subprocess.run(["dtc", "-q", "-I", "dtb", "-O", "dts", tree], check=True, capture_output=True, text=True)

    assert 'compatible = "infineon,slb9670"' in source.stdout
    assert 'stdout-path = "serial' in source.stdout


def test_the_initramfs_carries_the_way_to_every_medium(image: ImageManifest, tmp_path: Path) -> None:
    archive = copy_file(image.image_path, "initrd.img", tmp_path)
    unpacked = subprocess.run(["gzip", "-dc", archive], check=True, capture_output=True).stdout

    for module in ("virtio_blk", "sdhci_iproc", "bcm2835", "gpio_regulator", "ext4"):
        assert f"modules/{module}.ko".encode() in unpacked


def test_the_root_file_system_is_clean(image: ImageManifest, folder: Path) -> None:
    debugfs(image, folder, "stat /")

    subprocess.run(["/usr/sbin/e2fsck", "-fn", folder / "root.ext4"], check=True, capture_output=True)


def test_bmaptool_takes_our_block_map(image: ImageManifest, tmp_path: Path) -> None:
    if shutil.which("bmaptool") is None:
        pytest.skip("bmaptool is not installed (package bmap-tools)")
    copy = tmp_path / "copy.img"

    subprocess.run(["bmaptool", "copy", "--bmap", image.bmap_path, image.image_path, copy], check=True)

    assert subprocess.run(["cmp", copy, image.image_path], check=False).returncode == 0


def test_the_description_is_plain_json(image: ImageManifest) -> None:
    value = json.loads((image.directory / "picket.json").read_text())

    assert value["sha256"] == image.sha256
    assert [part["label"] for part in value["partitions"]] == ["PICKETBOOT", "picket-root"]
