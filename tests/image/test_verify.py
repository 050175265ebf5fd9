"""`python -m image verify`: the files of an image, and who answers for them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from image import checksums, signing
from image.__main__ import main
from image.manifest import ImageManifest, shipped
from tests.image import small

pytestmark = small.needs_tools


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return signing.ensure(tmp_path_factory.mktemp("keys") / "image")


@pytest.fixture
def signed(tmp_path: Path, key: Path) -> ImageManifest:
    manifest = small.build(tmp_path / "image")
    checksums.write(manifest.directory, signing.open_signer(f"file:{key}"))
    return manifest


def verify(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["image", "verify", *map(str, arguments)])
    try:
        return main()
    except SystemExit as done:
        return int(done.code or 0)


def test_files_that_are_what_was_signed(
    signed: ImageManifest, key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    public = key.with_name(f"{key.name}.pub")
    public.write_text(signing.open_signer(f"file:{key}").public_line)
    (signed.directory / "more").write_text("not in the sums")

    assert verify(monkeypatch, signed.directory, "--key", public) == 0

    said = capsys.readouterr().out
    assert f"signed by {signing.fingerprint(public.read_text())}" in said
    assert "nothing is said of more" in said


@pytest.mark.parametrize("name", ["small-1.0.img", "small-1.0.json", "small-1.0.bmap", checksums.SUMS])
def test_a_file_that_was_changed_is_named(
    signed: ImageManifest, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (signed.directory / name).open("ab") as file:
        file.write(b"\n")

    assert verify(monkeypatch, signed.directory) == 2
    assert name in capsys.readouterr().err


def test_another_key_than_the_one_that_is_asked_for(
    signed: ImageManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.pub"
    other.write_text(signing.open_signer(f"file:{signing.ensure(tmp_path / 'other')}").public_line)

    assert verify(monkeypatch, signed.directory, "--key", other) == 2
    assert "not by the one that was asked for" in capsys.readouterr().err


def test_a_key_that_is_none(
    signed: ImageManifest, key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(monkeypatch, signed.directory, "--key", signed.directory / "absent.pub") == 2
    assert "absent.pub" in capsys.readouterr().err
    assert verify(monkeypatch, signed.directory, "--key", signed.directory / checksums.SUMS) == 2
    assert "is no public key as OpenSSH writes it" in " ".join(capsys.readouterr().err.split())
    assert verify(monkeypatch, signed.directory, "--key", key) == 2
    assert "holds the private half" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", [checksums.SUMS, checksums.SIGNATURE])
def test_an_image_that_nobody_answers_for(
    signed: ImageManifest, name: str, key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed.directory / name).unlink()
    public = key.with_name("asked.pub")
    public.write_text(signing.open_signer(f"file:{key}").public_line)

    assert verify(monkeypatch, signed.directory, "--key", public) == 2
    assert name in capsys.readouterr().err


def test_an_image_that_nobody_has_signed_is_taken_by_those_who_say_so_only(
    signed: ImageManifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed.directory / checksums.SIGNATURE).unlink()

    assert verify(monkeypatch, signed.directory) == 2
    assert "nobody has signed" in capsys.readouterr().err
    assert verify(monkeypatch, signed.directory, "--unsigned", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["signer"] is None
    assert "small-1.0.img" in said["files"]


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_the_compressed_image_is_enough(
    signed: ImageManifest, key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = signed.directory / "small-1.0.img.zst"
    subprocess.run(["zstd", "-q", signed.image_path, "-o", packed], check=True)
    description = replace(signed, compressed=shipped(packed))
    (signed.directory / "small-1.0.json").write_text(description.dump())
    checksums.write(signed.directory, signing.open_signer(f"file:{key}"))
    signed.image_path.unlink()

    assert verify(monkeypatch, signed.directory) == 0
    assert "signed by" in capsys.readouterr().out
    packed.write_bytes(packed.read_bytes()[:-100])
    assert verify(monkeypatch, signed.directory) != 0
