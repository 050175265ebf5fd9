"""`station.py authorise`: what it writes on a unit's medium, and what it refuses before it writes anything."""

import hashlib
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import station
from factory.errors import ExitCode, FactoryError, StationFault, UserMistake
from image import authorisation, checksums, disk, errors, factory_key, sample, signing
from image.authorisation import Table, control_of
from image.disk import FAT32_LBA, LINUX, Slice
from image.files.usr.lib.picket.slots import factory_mode
from image.manifest import ImageManifest, Partition
from tests.factory.test_blockdev import attached, needs_loop
from tests.image.firmware import cards
from tests.image.firmware.cards import FAT32, autoboot, fat, needs_mtools

BOARD = "10000000abcdef01"
SIGNATURE, OTHER = 0x1234ABCD, 0x5776C791
AUTOBOOT = {"autoboot.txt": autoboot("[all]\nboot_partition=2\n")}


def card(files: dict[str, bytes], signature: int = SIGNATURE) -> bytes:
    """A medium as a unit has it, but small: a control partition, and one partition inside an extended one."""
    data = cards.disk([(FAT32, fat(files, kibibytes=1024))], [(LINUX, bytes(65536))])
    struct.pack_into("<I", data, 440, signature)
    return bytes(data)


@dataclass(frozen=True)
class Desk:
    """A repair bench: a unit's medium, the description of its image, and the key that signed that."""

    folder: Path

    @property
    def medium(self) -> Path:
        return self.folder / "medium.img"

    @property
    def image(self) -> Path:
        return self.folder / "image/picket.json"

    def key(self, name: str = "key") -> str:
        return f"file:{factory_key.ensure(self.folder / name, name)}"

    def sign(self, name: str = "key") -> None:
        checksums.write(self.image.parent, signing.open_signer(self.key(name)))

    def authorise(self, *more: str, **changes: str | Path) -> Result:
        named = {"board": BOARD, "medium": self.medium, "signing-key": self.key(), "image": self.image} | {
            name.replace("_", "-"): value for name, value in changes.items()
        }
        words = [word for name, value in named.items() for word in (f"--{name}", str(value))]
        return CliRunner().invoke(station.app, ["authorise", *words, *more], env={"COLUMNS": "400"})

    def read(self) -> bytes:
        """What lies on the medium as the authorisation."""
        place = f"{self.medium}@@{int.from_bytes(self.medium.read_bytes()[454:458], 'little') * 512}"
        words = ["mtype", "-i", place, f"::{authorisation.NAME}"]
        return subprocess.run(words, check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> ImageManifest:
    """An image's description: of the simulated board, with the name and the partitions of a real one."""
    made = sample.build(tmp_path_factory.mktemp("sample") / "sample.json")
    control = Partition(1, "vfat", "CONTROL", 512, 2**20, "-", disk.partuuid(SIGNATURE, 1))
    return replace(made, name="picket", version="1.0", partitions=(control,))


@pytest.fixture
def desk(tmp_path: Path, described: ImageManifest) -> Desk:
    made = Desk(tmp_path)
    made.image.parent.mkdir()
    made.image.write_text(described.dump())
    made.medium.write_bytes(card(AUTOBOOT))
    made.sign()
    return made


def refused(ran: Result, *says: str, code: ExitCode = ExitCode.USER_MISTAKE) -> None:
    """It was refused with these words, however they are wrapped, and with what to do next."""
    told = "".join(ran.stderr.replace("│", "").split())
    assert ran.exit_code == code, told
    for each in ("Next:", *says):
        assert "".join(each.split()) in told
    assert "authorises" not in ran.stdout


@pytest.fixture
def untouched(desk: Desk) -> Iterator[None]:
    """Whatever is refused, the medium stays as it was."""
    before = hashlib.sha256(desk.medium.read_bytes()).digest()
    yield
    assert hashlib.sha256(desk.medium.read_bytes()).digest() == before


# --- what is written ------------------------------------------------------------------------------------------------


@needs_mtools
def test_the_medium_holds_what_the_unit_takes_in_place_of_an_earlier_one(desk: Desk) -> None:
    authorisation.put_on(desk.medium, b"an earlier one" * 200, ImageManifest.load(desk.image))

    ran = desk.authorise("--days", "9")

    assert ran.exit_code == ExitCode.PASS, ran.stderr
    found, _, _ = factory_mode.parse(desk.read())
    assert (found.product, found.board) == ("picket", BOARD)
    assert found.expires - found.issued == 9 * authorisation.DAY


@needs_mtools
def test_an_image_that_nobody_signed_is_no_hindrance(desk: Desk) -> None:
    (desk.image.parent / checksums.SIGNATURE).unlink()

    assert desk.authorise(signing_key=desk.key("another")).exit_code == ExitCode.PASS


def test_the_help_says_which_image_is_meant_where_none_is_named() -> None:
    said = CliRunner().invoke(station.app, ["authorise", "--help"], env={"COLUMNS": "200"}).stdout

    assert f"[default: {station.DESCRIPTION}]" in said


# --- who must act ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("build/keys/image", "begins with none of file:, pkcs11:"),
        ("file:nope", "cannot be read: nope"),
        ("file:{folder}", "Is a directory"),
        ("file:{folder}/key.pub", "cannot be opened as an OpenSSH key"),
        ("pkcs11:token=x", "needs token, object (or id) and module-path"),
        ("pkcs11:token=x;object=y?module-path=/nope.so", "cannot be used"),
    ],
)
def test_a_key_that_is_none_is_the_users_mistake(desk: Desk, key: str, says: str) -> None:
    refused(desk.authorise(signing_key=key.format(folder=desk.folder)), says, "Name the key")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no image description at"),
        (b"{", "is no JSON"),
        (b'{"format": "picket-release-1"}', "is not an image description"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_a_description_that_is_none_is_the_users_mistake(desk: Desk, content: bytes | None, says: str) -> None:
    other = desk.folder / "other.json"
    if content is not None:
        other.write_bytes(content)

    refused(desk.authorise(image=other), says, "Name by --image")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not there"),
        (b"", "no medium at all: it has 0 bytes"),
        (bytes(4096), "is no unit's medium"),
        (b"\xff" * 4096, "is no unit's medium"),
        (b"\x28\xb5\x2f\xfd" * 4096, "is no unit's medium"),
    ],
)
def test_a_medium_that_is_none_is_the_users_mistake_and_left_alone(
    desk: Desk, content: bytes | None, says: str
) -> None:
    other = desk.folder / "other"
    if content is not None:
        other.write_bytes(content)

    refused(desk.authorise(medium=other), f"{other} ", says, "Name the whole disk")

    assert other.exists() is (content is not None)
    assert content is None or other.read_bytes() == content


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_neither_a_file_nor_a_disk_is_no_medium(desk: Desk, make: Callable[[Path], None]) -> None:
    make(desk.folder / "other")

    refused(desk.authorise(medium=desk.folder / "other"), "is neither a raw image nor a disk")


@needs_mtools
@pytest.mark.parametrize("signature", [0, SIGNATURE])
def test_a_card_of_somebodys_camera_is_left_alone(desk: Desk, signature: int) -> None:
    content = card({"dcim/1.jpg": b"x"}, signature)
    desk.medium.write_bytes(content)

    refused(desk.authorise(), "no unit's medium")

    assert desk.medium.read_bytes() == content


@pytest.mark.parametrize(
    ("error", "who"),
    [
        (errors.SigningError("x"), UserMistake),
        (errors.ManifestError("x"), UserMistake),
        (errors.MediumError("x"), UserMistake),
        (errors.ToolMissingError("x"), StationFault),
        (errors.CommandFailedError("x"), StationFault),
        (errors.ImageError("x"), StationFault),
    ],
)
def test_whoever_must_act_is_told_how(error: errors.ImageError, who: type[FactoryError]) -> None:
    fault = station.not_authorised(error)

    assert type(fault) is who
    assert fault.advice


@needs_loop
def test_a_medium_that_cannot_be_read_is_not_the_users_mistake(desk: Desk) -> None:
    with attached(desk.medium) as reader:
        os.truncate(desk.medium, 0)
        ran = desk.authorise(medium=reader.device, medium_again=reader.device)

    refused(ran, f"{reader.device} cannot be read: Input/output error", "another reader", code=ExitCode.STATION_FAULT)


# --- what a unit would refuse ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untouched")
def test_a_key_that_did_not_sign_the_image_is_refused_with_both_named(desk: Desk) -> None:
    other = desk.key("another")
    both = [signing.fingerprint(signing.open_signer(key).public_line) for key in (desk.key(), other)]

    refused(desk.authorise(signing_key=other), "picket 1.0 is signed by", *both)


@pytest.mark.usefixtures("untouched")
def test_a_signature_that_does_not_hold_is_the_images_fault_and_not_the_keys(desk: Desk) -> None:
    with (desk.image.parent / checksums.SUMS).open("ab") as sums:
        sums.write(b"\n")

    refused(desk.authorise(), "whose picket 1.0 is cannot be told", "Name by --image")


@needs_mtools
def test_another_products_medium_is_refused_with_both_named(desk: Desk) -> None:
    content = card(AUTOBOOT, OTHER)
    desk.medium.write_bytes(content)

    refused(desk.authorise(), "with picket 1.0", disk.partuuid(OTHER, 1), disk.partuuid(SIGNATURE, 1), "its --image")

    assert desk.medium.read_bytes() == content


@needs_mtools
@pytest.mark.parametrize("kept", [0.3, 0.97, 0.999])
def test_a_part_of_a_medium_is_refused(desk: Desk, kept: float) -> None:
    """Cut off inside the control partition, before the table of the logical partitions, and inside the last one."""
    whole = desk.medium.read_bytes()
    part = whole[: int(len(whole) * kept) // 512 * 512]
    desk.medium.write_bytes(part)

    refused(desk.authorise(), "is cut off", f"it has {len(part)} bytes", "all of it")

    assert desk.medium.read_bytes() == part


def test_a_medium_may_end_with_its_last_partition_or_behind_it(described: ImageManifest) -> None:
    control, data = Slice(1, FAT32_LBA, 512, 2**20), Slice(2, LINUX, 2**21, 2**20)
    for size in (data.end, data.end + 1):
        assert control_of(Table(SIGNATURE, [control, data], size), described) == control

    with pytest.raises(errors.MediumError, match=f"partition 2 goes up to {data.end}"):
        control_of(Table(SIGNATURE, [control, data], data.end - 1), described)


# --- a disk that does not look removable ----------------------------------------------------------------------------


@needs_loop
@needs_mtools
def test_a_disk_that_is_not_removable_is_taken_as_the_refusal_advises(desk: Desk) -> None:
    with attached(desk.medium) as reader:
        refused(desk.authorise(medium=reader.device), "not removable", f"add --medium-again {reader.device}")

        ran = desk.authorise("--medium-again", reader.device, medium=reader.device)

    assert ran.exit_code == ExitCode.PASS, ran.stderr
    assert factory_mode.parse(desk.read())[0].board == BOARD


@pytest.mark.usefixtures("untouched")
def test_another_disk_named_again_is_a_slip(desk: Desk) -> None:
    refused(desk.authorise(medium_again="/dev/sdb"), "--medium-again is /dev/sdb", f"--medium is {desk.medium}")
