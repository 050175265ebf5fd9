"""What a slot boots from, by whose kernel the base has."""

import gzip
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from image import boot, initramfs, recipe
from image.errors import ImageError, RecipeError
from image.layout import Layout
from image.recipe import BootSettings, Recipe

RECIPE = recipe.load(Path(recipe.__file__).parent / "recipes/picket.toml")
OURS = RECIPE.overlays[0]
needs_dtc = pytest.mark.skipif(
    shutil.which("dtc") is None, reason="dtc is not installed (package device-tree-compiler)"
)

#: The part of a Pi's tree that our overlay has to do with: Linux's, and Raspberry Pi's, which has more of both.
TREE = """
/dts-v1/;
/ {{
    compatible = "raspberrypi,4-model-b";
    gpio: gpio {{ phandle = <1>; }};
    {labels}spi: spi@7e204000 {{ #address-cells = <1>; #size-cells = <0>; status = "disabled"; {more} }};
}};
"""
SPIDEVS = """
    spidev0: spidev@0 { compatible = "spidev"; reg = <0>; };
    spidev1: spidev@1 { compatible = "spidev"; reg = <1>; };
"""


def compiled(folder: Path, text: str) -> bytes:
    (folder / "source.dts").write_text(text)
    subprocess.run(
        ["dtc", "-@", "-q", "-I", "dts", "-O", "dtb", "-o", folder / "tree.dtb", folder / "source.dts"], check=True
    )
    return (folder / "tree.dtb").read_bytes()


def base_root(folder: Path, kernels: dict[str, bytes], tree: bytes, *, overlays: bool = False) -> Path:
    """A root with kernels and firmware, and nothing else."""
    root = folder / "root"
    for name in ("boot", "usr/lib/raspi-firmware", "usr/lib/modules"):
        (root / name).mkdir(parents=True)
    for name in ("bootcode.bin", "start.elf", "fixup.dat", "start4.elf", "fixup4.dat"):
        (root / "usr/lib/raspi-firmware" / name).write_bytes(b"firmware")
    for kernel, content in kernels.items():
        (root / f"boot/vmlinuz-{kernel}").write_bytes(content)
        (root / f"usr/lib/modules/{kernel}").mkdir()
        package = root / f"usr/lib/linux-image-{kernel}"
        (package / "broadcom").mkdir(parents=True)
        (package / "broadcom/bcm2711-rpi-4-b.dtb").write_bytes(tree)
        if overlays:
            (package / "overlays").mkdir()
            (package / "overlays/README").write_text("overlays\n")
    return root


@pytest.fixture
def wanted() -> Recipe:
    return replace(RECIPE, boards=("bcm2711-rpi-4-b",), experimental_boards=())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "build", lambda *_: b"initramfs")


def take(root: Path, wanted: Recipe, folder: Path) -> str:
    layout = Layout.of(1, 1, 1, 1, 900, wanted.boot.control)
    return boot.take_boot_files(root, wanted, layout, folder / "boot")


@needs_dtc
def test_linuxs_own_kernel_is_packed_and_its_trees_are_asked_for(tmp_path: Path, wanted: Recipe) -> None:
    root = base_root(tmp_path, {"6.12.1-arm64": b"kernel"}, compiled(tmp_path, TREE.format(labels="", more="")))

    assert take(root, wanted, tmp_path) == "6.12.1-arm64"

    assert gzip.decompress((tmp_path / "boot/vmlinuz").read_bytes()) == b"kernel"
    assert "upstream_kernel=1" in (tmp_path / "boot/config.txt").read_text().splitlines()
    assert not (tmp_path / "boot/overlays").exists()
    assert {path.name for path in (root / "usr/lib").iterdir()} == {"modules"}


@needs_dtc
@pytest.mark.parametrize("control", ["autoboot", "os-prefix"])
def test_raspberry_pis_kernel_stays_packed_and_brings_its_overlays(
    tmp_path: Path, wanted: Recipe, control: str
) -> None:
    kernels = {f"6.12.1+rpt-rpi-{board}": gzip.compress(board.encode()) for board in ("v8", "2712")}
    tree = compiled(tmp_path, TREE.format(labels="spi0: ", more=SPIDEVS))
    root = base_root(tmp_path, kernels, tree, overlays=True)

    assert take(root, replace(wanted, boot=BootSettings(control)), tmp_path) == "6.12.1+rpt-rpi-v8"

    slot = boot.slot_directory(tmp_path / "boot", control)
    assert gzip.decompress((slot / "vmlinuz").read_bytes()) == b"v8"
    assert (slot / "overlays/README").is_file()
    for path in (tmp_path / "boot").glob("*.txt"):
        assert "upstream_kernel=1" not in path.read_text().splitlines()
    assert [path.name for path in (root / "usr/lib/modules").iterdir()] == ["6.12.1+rpt-rpi-v8"]
    assert list((root / "usr/lib").glob("linux-image-*")) == []


@needs_dtc
def test_the_tpm_takes_the_place_of_whoever_raspberry_pi_has_at_its_chip_select(tmp_path: Path, wanted: Recipe) -> None:
    tree = compiled(tmp_path, TREE.format(labels="spi0: ", more=SPIDEVS))
    take(base_root(tmp_path, {"6.12.1+rpt-rpi-v8": b"kernel"}, tree), wanted, tmp_path)

    def status(node: str) -> str:
        words = ["fdtget", "-d", "okay", str(tmp_path / "boot/bcm2711-rpi-4-b.dtb"), f"/spi@7e204000{node}", "status"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    assert [status(node) for node in ("", "/tpm@1", "/spidev@0", "/spidev@1")] == ["okay", "okay", "okay", "disabled"]


@pytest.mark.parametrize("kernels", [[], ["6.12.1-arm64", "6.12.2-arm64"], ["6.1+rpt-rpi-v8", "6.2+rpt-rpi-v8"]])
def test_a_base_without_one_kernel_to_start_is_refused(tmp_path: Path, kernels: list[str]) -> None:
    root = base_root(tmp_path, dict.fromkeys(kernels, b"kernel"), b"")

    with pytest.raises(ImageError, match="must hold one kernel"):
        boot.kernel_version(root)


@needs_dtc
def test_a_board_that_the_kernel_does_not_know_is_the_recipes_mistake(tmp_path: Path, wanted: Recipe) -> None:
    root = base_root(tmp_path, {"6.12.1-arm64": b"kernel"}, compiled(tmp_path, TREE.format(labels="", more="")))

    with pytest.raises(RecipeError, match=r"boards: .* bcm2711-rpi-4-c: did you mean bcm2711-rpi-4-b\?"):
        take(root, replace(wanted, boards=("bcm2711-rpi-4-c",)), tmp_path)
