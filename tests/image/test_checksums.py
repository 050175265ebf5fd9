"""The sums over what is shipped: common commands take them, and each fault is told by one line with the file's name."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from image import checksums, signing
from image.checksums import SIGNATURE, SUMS, Checked
from image.errors import ImageError, ManifestError, SigningError
from image.manifest import digest
from image.signing import Signer

NAMES = ("a b.txt", "boot/vmlinuz", "picket.img")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return signing.open_signer(f"file:{signing.ensure(tmp_path_factory.mktemp('key') / 'image')}")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return signing.open_signer(f"file:{signing.ensure(tmp_path_factory.mktemp('key') / 'image')}")


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    directory = tmp_path / "shipped"
    (directory / "boot").mkdir(parents=True)
    for name in NAMES:
        (directory / name).write_text(f"content of {name}\n")
    (directory / ".picket.img.new").write_text("half a file")
    return directory


def verify(directory: Path, signer: Signer) -> subprocess.CompletedProcess[bytes]:
    """The command that the documentation tells people to type."""
    allowed = directory.parent / "allowed-signers"
    allowed.write_text(signing.allowed_signers([signer.public_line], [signing.IMAGE]))
    with (directory / SUMS).open("rb") as sums:
        return subprocess.run(
            ["ssh-keygen", "-Y", "verify", "-f", allowed, "-I", "image", "-n", "picket-image",
             "-s", directory / SIGNATURE],
            stdin=sums, capture_output=True, check=False,
        )  # fmt: skip


def test_sha256sum_takes_the_sums(shipped: Path) -> None:
    assert checksums.write(shipped) == NAMES

    ran = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS], cwd=shipped, capture_output=True, text=True, check=True
    )

    assert ran.stdout.splitlines() == [f"{name}: OK" for name in NAMES]


def test_the_sums_are_the_very_bytes_that_sha256sum_writes(shipped: Path) -> None:
    checksums.write(shipped)

    ran = subprocess.run(["sha256sum", *NAMES], cwd=shipped, capture_output=True, check=True)

    assert (shipped / SUMS).read_bytes() == ran.stdout


def test_ssh_keygen_takes_the_signature(shipped: Path, signer: Signer, stranger: Signer) -> None:
    checksums.write(shipped, signer)

    assert verify(shipped, signer).returncode == 0
    assert verify(shipped, stranger).returncode != 0


def test_what_was_written_is_accepted(shipped: Path, signer: Signer) -> None:
    checksums.write(shipped, signer)

    assert checksums.check(shipped) == Checked(NAMES, (), signer.public_line)
    assert checksums.check(shipped, f"{signer.public_line} somebody@example.com").signer == signer.public_line


def test_sums_without_a_signature_are_enough_where_no_key_is_asked_for(shipped: Path, signer: Signer) -> None:
    checksums.write(shipped)

    assert checksums.check(shipped).signer is None
    with pytest.raises(SigningError, match=r"SHA256SUMS\.sig is missing"):
        checksums.check(shipped, signer.public_line)


def test_new_sums_take_an_older_signature_away(shipped: Path, signer: Signer) -> None:
    checksums.write(shipped, signer)
    (shipped / "picket.img").write_text("another build")

    checksums.write(shipped)

    assert not (shipped / SIGNATURE).exists()
    assert checksums.check(shipped).files == NAMES


def test_sums_of_the_same_files_are_the_same(shipped: Path, signer: Signer) -> None:
    written = []
    for _ in range(2):
        checksums.write(shipped, signer)
        written.append([(shipped / name).read_bytes() for name in (SUMS, SIGNATURE)])

    assert written[0] == written[1]


def test_a_digest_that_is_known_is_not_computed_again(shipped: Path) -> None:
    checksums.write(shipped, known={"picket.img": "ab" * 32})

    assert f"{'ab' * 32}  picket.img\n" in (shipped / SUMS).read_text()


def change(directory: Path) -> None:
    with (directory / "picket.img").open("ab") as file:
        file.write(b"one more line\n")


def remove(directory: Path) -> None:
    (directory / "picket.img").unlink()


def make_a_directory(directory: Path) -> None:
    (directory / "picket.img").unlink()
    (directory / "picket.img").mkdir()


@pytest.mark.parametrize("fault", [change, remove, make_a_directory])
def test_a_file_that_is_another_is_told_by_one_line_with_its_name(
    shipped: Path, signer: Signer, fault: Callable[[Path], None]
) -> None:
    checksums.write(shipped, signer)

    fault(shipped)

    with pytest.raises(ManifestError, match=r"picket\.img") as caught:
        checksums.check(shipped, signer.public_line)
    assert "\n" not in str(caught.value)


def test_a_file_that_the_sums_do_not_list_is_told(shipped: Path) -> None:
    checksums.write(shipped)

    (shipped / "extra").write_text("who put this here?")

    assert checksums.check(shipped).unlisted == ("extra",)


def test_sums_that_were_made_to_fit_do_not_fit_the_signature(shipped: Path, signer: Signer) -> None:
    checksums.write(shipped, signer)
    old = digest(shipped / "picket.img")
    change(shipped)
    sums = (shipped / SUMS).read_text()
    (shipped / SUMS).write_text(sums.replace(old, digest(shipped / "picket.img")))

    for asked in (None, signer.public_line):
        with pytest.raises(SigningError, match=r"SHA256SUMS\.sig: .*does not fit"):
            checksums.check(shipped, asked)


def test_a_signature_by_another_key_is_refused_where_a_key_is_asked_for(
    shipped: Path, signer: Signer, stranger: Signer
) -> None:
    checksums.write(shipped, stranger)

    with pytest.raises(SigningError, match=r"SHA256SUMS\.sig is by the key SHA256:"):
        checksums.check(shipped, signer.public_line)
    assert checksums.check(shipped).signer == stranger.public_line


def test_a_signature_of_another_use_is_refused(shipped: Path, signer: Signer) -> None:
    checksums.write(shipped)
    (shipped / SIGNATURE).write_bytes(signer.sign((shipped / SUMS).read_bytes(), signing.BUNDLE))

    with pytest.raises(SigningError, match="picket-os-bundle"):
        checksums.check(shipped, signer.public_line)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "boot/../../outside", "picket.img\n" + "0" * 64 + "  picket.img"]
)
def test_a_name_that_leads_out_or_comes_twice_is_refused(shipped: Path, name: str) -> None:
    (shipped / SUMS).write_text(f"{'0' * 64}  {name}\n")

    with pytest.raises(ManifestError, match="may not"):
        checksums.check(shipped)


@pytest.mark.parametrize("content", [b"", b"\n", b"nonsense\n", b"\xff\xfe", b"0" * 64 + b"  \n"])
def test_sums_that_are_none_are_refused_by_name(shipped: Path, content: bytes) -> None:
    (shipped / SUMS).write_bytes(content)

    with pytest.raises(ManifestError, match=SUMS):
        checksums.check(shipped)


def test_a_directory_without_sums_is_refused_by_name(shipped: Path) -> None:
    with pytest.raises(ManifestError, match="SHA256SUMS cannot be read"):
        checksums.check(shipped)


@pytest.mark.parametrize("name", ["line\nbreak", "back\\slash"])
def test_a_name_that_would_need_escaping_is_refused_before_anything_is_written(shipped: Path, name: str) -> None:
    (shipped / name).write_text("content")

    with pytest.raises(ManifestError, match="cannot stand in SHA256SUMS"):
        checksums.write(shipped)
    assert not (shipped / SUMS).exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    data=st.binary(max_size=300) | st.from_regex(r"([0-9a-f]{64} [ *].{0,5}\n){1,3}", fullmatch=True).map(str.encode)
)
def test_whatever_the_sums_hold_is_checked_or_refused(shipped: Path, data: bytes) -> None:
    (shipped / SUMS).write_bytes(data)

    with pytest.raises(ImageError):
        checksums.check(shipped)
