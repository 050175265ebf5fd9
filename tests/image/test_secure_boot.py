import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from image import disk, recipe, secure_boot
from image.__main__ import app
from image.boot_key import open_boot_signer
from image.errors import ImageError, RecipeError, SigningError
from image.firmware import PI_4, PI_5, Board, BytesMedium, Choice, FileMedium, NoBootError, Reset, look
from image.recipe import BootSettings, Recipe
from image.secure_boot import sign, signer_of, verify
from tests.image.built import Built, Unit, build_tiny
from tests.image.slots.world import Keys

EPOCH = 1767225600


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "boot.pem"
    subprocess.run(["openssl", "genrsa", "-out", path, "2048"], check=True, capture_output=True)
    return path


def test_a_signature_has_the_three_lines_of_rpi_eeprom_digest(key: Path) -> None:
    lines = sign(b"image", open_boot_signer(f"file:{key}"), EPOCH).splitlines()

    said = subprocess.run(["sha256sum"], input=b"image", capture_output=True, check=True).stdout.split()[0].decode()
    assert lines[:2] == [said, f"ts: {EPOCH}"]
    assert lines[2].startswith("rsa2048: ")
    assert len(lines) == 3


def test_openssl_makes_the_same_signature_and_takes_ours(tmp_path: Path, key: Path) -> None:
    text = sign(b"image", open_boot_signer(f"file:{key}"), EPOCH)
    raw = bytes.fromhex(text.split("rsa2048: ")[1])
    (tmp_path / "raw").write_bytes(raw)

    made = subprocess.run(["openssl", "dgst", "-sha256", "-sign", key], input=b"image", capture_output=True, check=True)
    taken = subprocess.run(
        ["openssl", "dgst", "-sha256", "-prverify", key, "-signature", tmp_path / "raw"],
        input=b"image", capture_output=True, check=False,
    )  # fmt: skip

    assert made.stdout == raw
    assert taken.returncode == 0


@pytest.mark.parametrize(
    ("image", "change", "complaint"),
    [
        (b"Image", ("", ""), "another boot.img"),
        (b"image", ("ts: ", "time: "), "three lines"),
        (b"image", ("rsa2048: ", "rsa4096: "), "three lines"),
    ],
)
def test_what_was_changed_does_not_boot(key: Path, image: bytes, change: tuple[str, str], complaint: str) -> None:
    signer = open_boot_signer(f"file:{key}")
    text = sign(b"image", signer, EPOCH)
    verify(b"image", text, signer.public)

    with pytest.raises(SigningError, match=complaint):
        verify(image, text.replace(*change), signer.public)


def test_another_key_does_not_boot(tmp_path: Path, key: Path) -> None:
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genrsa", "-out", other, "2048"], check=True, capture_output=True)

    with pytest.raises(SigningError, match="not made by this key"):
        verify(
            b"image", sign(b"image", open_boot_signer(f"file:{other}"), EPOCH), open_boot_signer(f"file:{key}").public
        )


def test_a_key_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.pem"
    subprocess.run(["openssl", "genrsa", "-out", path, "3072"], check=True, capture_output=True)

    with pytest.raises(SigningError, match="2048"):
        open_boot_signer(f"file:{path}")


def test_the_outer_partition_holds_the_image_its_signature_and_the_switch(tmp_path: Path, key: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "config.txt").write_text("arm_64bit=1\n")
    signer = open_boot_signer(f"file:{key}")
    outer = tmp_path / "outer"

    secure_boot.make_boot_files(tree, outer, 7, signer, EPOCH)

    verify((outer / "boot.img").read_bytes(), (outer / "boot.sig").read_text(), signer.public)
    inside = subprocess.run(["mtype", "-i", outer / "boot.img", "::config.txt"], capture_output=True, check=True).stdout
    assert inside == b"arm_64bit=1\n"
    assert "boot_ramdisk=1" in (outer / "config.txt").read_text().splitlines()


def test_an_image_that_the_bootloader_cannot_load_is_not_made(tmp_path: Path, key: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "initrd.img").open("wb") as file:
        file.truncate(96 * disk.MEBIBYTE)

    with pytest.raises(ImageError, match=r"boot\.img would have"):
        secure_boot.make_boot_files(tree, tmp_path / "outer", 7, open_boot_signer(f"file:{key}"), EPOCH)


# --- a built image ------------------------------------------------------------------------------------------------

PRODUCT = recipe.load(Path(recipe.__file__).parent / "recipes/picket.toml")
BOARDS = ("bcm2711-rpi-4-b", "bcm2712-rpi-5-b")


def wanted(key: Path, **changes: object) -> Recipe:
    return replace(PRODUCT, boards=BOARDS, experimental_boards=(), boot=BootSettings("autoboot", str(key)), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def built(key: Path, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_tiny(wanted(key), tmp_path_factory.mktemp("built") / "image", keys)


def public(key: Path) -> bytes:
    return subprocess.run(["openssl", "rsa", "-in", key, "-pubout"], check=True, capture_output=True).stdout


def started(medium: Path | bytes, board: Board, key: Path | None, *, tryboot: bool = False) -> Choice:
    fused, reset = None if key is None else public(key), Reset(tryboot=tryboot)
    if isinstance(medium, bytes):
        return look(BytesMedium(medium), board, reset, customer_key=fused)
    with FileMedium(medium) as card:
        return look(card, board, reset, customer_key=fused)


@pytest.mark.parametrize("board", [PI_4, PI_5], ids=lambda board: board.name)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_a_board_starts_what_its_owner_signed(built: Built, key: Path, board: Board, *, fused: bool) -> None:
    choice = started(built.image, board, key if fused else None)

    assert (choice.partition, choice.ramdisk, choice.signed) == (2, True, fused)
    assert choice.command_line == built.files["cmdline.txt"].decode().strip()
    assert choice.files.read("vmlinuz") == built.files["vmlinuz"]


@pytest.mark.parametrize("seed", range(4))
def test_any_bit_of_boot_img_that_is_changed_keeps_a_fused_board_from_starting(
    built: Built, key: Path, seed: int
) -> None:
    disk_image = bytearray(built.image.read_bytes())
    draw = random.Random(seed)
    part = built.places.part("boot-a")
    at = disk_image.index(built.files["vmlinuz"], part.start) + draw.randrange(300_000)
    disk_image[at] ^= 1 << draw.randrange(8)

    with pytest.raises(NoBootError, match="not what its signature is for"):
        started(bytes(disk_image), PI_4, key)


def test_the_same_trees_and_the_same_key_give_the_same_bits(
    built: Built, key: Path, keys: Keys, tmp_path: Path
) -> None:
    again = build_tiny(wanted(key), tmp_path / "again", keys)

    assert again.image.read_bytes() == built.image.read_bytes()
    assert again.bundle.read_bytes() == built.bundle.read_bytes()


def test_a_board_of_somebody_else_does_not_start_it(built: Built, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genrsa", "-out", other, "2048"], check=True, capture_output=True)

    with pytest.raises(NoBootError, match="another key"):
        started(built.image, PI_4, other)


def test_an_update_brings_a_boot_img_of_its_own(built: Built, key: Path, keys: Keys, tmp_path: Path) -> None:
    new = build_tiny(wanted(key, version="0.2.0"), tmp_path / "new", keys)
    (tmp_path / "unit").mkdir()
    unit = Unit(built, tmp_path / "unit", keys)

    assert unit.install("a", new) == {"slot": "b", "version": "0.2.0"}
    unit.slots("a").try_other()

    choice = started(unit.medium, PI_4, key, tryboot=True)
    assert (choice.partition, choice.command_line) == (3, new.files["cmdline.txt"].decode().strip())
    assert started(unit.medium, PI_4, key).partition == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"boards": ("bcm2837-rpi-3-b",)}, "bcm2837-rpi-3-b has no boot loader that checks"),
        ({"boot": BootSettings("os-prefix", "key.pem")}, 'needs boot.control = "autoboot"'),
    ],
)
def test_boards_that_check_no_signature_are_refused(key: Path, change: dict[str, object], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        signer_of(replace(wanted(key), **change))  # type: ignore[arg-type]
    assert signer_of(PRODUCT) is None


def test_lint_names_what_stands_in_the_way(key: Path, tmp_path: Path) -> None:
    path = tmp_path / "zero.toml"
    zero = Path(recipe.__file__).parent / "recipes/picket-zero.toml"
    path.write_text(f'extends = "{zero}"\nboot.secure_boot_key = "{key}"\n')

    said = CliRunner().invoke(app, ["lint", str(path)])

    assert said.exit_code == 2
    assert 'needs boot.control = "autoboot"' in said.output
    assert "bcm2837-rpi-3-b has no boot loader that checks signatures" in said.output
