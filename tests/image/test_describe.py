"""An image, or a recipe, on one page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from image import checksums, signing
from image.__main__ import app
from image.describe import image_page
from image.recipe import explain
from tests.image import small

RECIPE = Path("image/recipes/picket.toml")


def said(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return done.output


@small.needs_tools
def test_an_image_is_told_on_one_page(tmp_path: Path) -> None:
    manifest = small.build(tmp_path / "image")
    assert manifest.verity is not None

    page = said("describe", tmp_path / "image")

    for words in (
        "small 1.0", "debian trixie arm64", "1 debian, 1 python", "bcm2711-rpi-4-b, bcm2712-rpi-5-b", "autoboot",
        manifest.verity.root_hash, manifest.image.sha256, "1" * 64,
        "9999-12-31", "https://example.com/security", "small-1.0.img", "squashfs",
    ):  # fmt: skip
        assert words in page
    assert len(page.splitlines()) < 50


@small.needs_tools
@pytest.mark.parametrize(("width", "whole"), [(None, True), (110, True), (80, False)])
def test_digests_are_cut_on_a_terminal_that_is_too_narrow_alone(
    tmp_path: Path, width: int | None, *, whole: bool
) -> None:
    manifest = small.build(tmp_path / "image")

    lines = image_page(manifest, width).plain.splitlines()

    assert (manifest.image.sha256 in "\n".join(lines)) is whole
    assert any(manifest.image.sha256[:15] in line for line in lines)
    assert width is None or max(map(len, lines)) <= width or not whole
    assert not any(line.endswith(" ") for line in lines)


@small.needs_tools
def test_a_list_of_boards_that_is_wider_than_the_terminal_cuts_no_digest(tmp_path: Path) -> None:
    manifest = replace(small.build(tmp_path / "image"), boards=tuple(f"bcm2711-rpi-{number}" for number in range(30)))

    assert manifest.image.sha256 in image_page(manifest, 120).plain


@small.needs_tools
def test_who_signed_is_said_and_a_signature_that_does_not_hold_is_nobodys(tmp_path: Path) -> None:
    manifest = small.build(tmp_path / "image")
    signer = signing.open_signer(f"file:{signing.ensure(tmp_path / 'key')}")
    checksums.write(manifest.directory, signer)
    assert json.loads(said("describe", tmp_path / "image", "--json"))["signed_by"] == signing.fingerprint(
        signer.public_line
    )

    with (manifest.directory / checksums.SUMS).open("a") as file:
        file.write("\n")

    assert json.loads(said("describe", tmp_path / "image", "--json"))["signed_by"] is None
    assert "NOBODY" in said("describe", tmp_path / "image")


def test_a_recipe_is_told_with_the_file_that_each_value_comes_from() -> None:
    value = json.loads(said("describe", RECIPE, "--json"))["settings"]

    def files(key: str) -> list[str]:
        return [Path(name).name for name in value[key]["from"]]

    assert files("name") == ["picket.toml"]
    assert files("packages") == ["debian-trixie.toml", "picket.toml"]
    assert files("base.suite") == ["debian-trixie.toml"]
    assert files("disk.boot_mebibytes") == []
    assert "libtpm2-pkcs11-1" in value["packages"]["value"]
    assert value["support.until"]["value"] == "2031-12-31"
    assert "debian-trixie.toml + picket.toml" in said("describe", RECIPE)


def test_a_line_of_a_recipe_is_whole_however_narrow_the_page_is() -> None:
    done = CliRunner().invoke(app, ["describe", str(RECIPE)], env={"COLUMNS": "40"})
    settings = explain(RECIPE)[1]

    lines = done.output.splitlines()

    assert len(lines) == 2 + len(settings)
    assert [line.split()[0] for line in lines[2:]] == [setting.key for setting in settings]
    assert "mailto:security@example.com" in done.output


def test_a_files_name_steers_no_terminal_and_breaks_no_line(tmp_path: Path) -> None:
    (tmp_path / "a\n\x1b[31mb").mkdir()
    (tmp_path / "a.toml").write_text(f'extends = "{RECIPE.resolve()}"\nfiles = ["a\\n\\u001b[31mb"]\n')

    assert "/a??[31mb\n" in said("describe", tmp_path / "a.toml")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a/same", "b/same"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a/same/mine.toml").write_text(f'extends = "{RECIPE.resolve()}"\nname = "mine"\n')
    (tmp_path / "b/same/mine.toml").write_text('extends = "../../a/same/mine.toml"\nversion = "2.0"\n')

    page = said("describe", tmp_path / "b/same/mine.toml")

    found = {line.split()[0]: line.split()[1] for line in page.splitlines()[2:]}
    assert found["name"] == "a/same/mine.toml"
    assert found["version"] == "b/same/mine.toml"
    assert found["tpm"] == "picket.toml"


def test_a_list_that_is_replaced_comes_from_who_replaced_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'name = "a"\nversion = "1.0"\npackages = ["aa"]\nboards = ["b"]\nhardware = ["x,y"]\nbase.suite = "trixie"\n'
    )
    (tmp_path / "b.toml").write_text('extends = "a.toml"\npackages.add = ["bb"]\nboards = ["c"]\n')
    (tmp_path / "c.toml").write_text('extends = "b.toml"\npackages = ["cc"]\nboards.add = ["d"]\n')

    recipe, settings = explain(tmp_path / "c.toml")

    found = {setting.key: ([file.name for file in setting.files], setting.value) for setting in settings}
    assert found["packages"] == (["c.toml"], ("cc",))
    assert found["boards"] == (["b.toml", "c.toml"], ("c", "d"))
    assert recipe.packages == ("cc",)


def test_a_recipe_with_a_mistake_is_told_by_the_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("flavour = 1")

    done = CliRunner().invoke(app, ["describe", str(tmp_path / "a.toml")])

    assert "flavour is not a key" in str(done.exception)
