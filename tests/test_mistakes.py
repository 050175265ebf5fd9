"""What people do wrong at the station: each is named, with the right exit code, and nothing of theirs is lost."""

from pathlib import Path

import pytest

from factory import authority
from factory.benches import BOARDS, load_bench_file
from factory.errors import SignerFault, UserMistake
from factory.limits import DEFAULT, load_limits
from station import Station
from tests.site import Site

PASSPHRASE = b"correct horse battery staple"

# --- the authority's folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["root.key", "signing.key", "root.pem", "signing.pem"])
def test_an_authority_is_not_made_over_what_is_left_of_one(tmp_path: Path, kept: str) -> None:
    """A key without its certificate is a backup half restored, or a `ca init` that was interrupted."""
    authority.create_authority(tmp_path, PASSPHRASE)
    for name in authority.FILES:
        if name != kept:
            (tmp_path / name).unlink()
    before = (tmp_path / kept).read_bytes()

    with pytest.raises(UserMistake, match=f"a part of an authority already: {kept}"):
        authority.create_authority(tmp_path, PASSPHRASE)

    assert (tmp_path / kept).read_bytes() == before


def test_an_authority_whose_root_key_is_locked_away_is_not_made_again(tmp_path: Path) -> None:
    authority.create_authority(tmp_path, PASSPHRASE)
    (tmp_path / "root.key").unlink()

    with pytest.raises(UserMistake, match="holds an authority already"):
        authority.create_authority(tmp_path, PASSPHRASE)


def test_an_authority_in_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("no folder")

    with pytest.raises(UserMistake, match="cannot be written"):
        authority.create_authority(tmp_path / "ca", PASSPHRASE)
    with pytest.raises(SignerFault, match=r"signing\.pem cannot be read"):
        authority.load_signing(tmp_path / "ca", PASSPHRASE)


def test_a_signing_key_that_is_a_folder_is_named(tmp_path: Path) -> None:
    authority.create_authority(tmp_path, PASSPHRASE)
    (tmp_path / "signing.key").unlink()
    (tmp_path / "signing.key").mkdir()

    with pytest.raises(SignerFault, match=r"signing\.key cannot be read: Is a directory"):
        authority.load_signing(tmp_path, PASSPHRASE)


# --- the bench file ------------------------------------------------------------------------------------------------

BENCHES = Path(__file__).parent.parent / "benches"


def changed(tmp_path: Path, old: str, new: str, bench: str = "simulated") -> Path:
    """A bench file that somebody edited."""
    text = (BENCHES / f"{bench}.toml").read_text()
    assert old in text
    path = tmp_path / "bench.toml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("simulated:build/demo/boards/{serial}", "simulated:", "board.uri names no folder"),
        ('name = "simulated"', 'name = "../../elsewhere"', "name is '../../elsewhere'"),
        ('name = "simulated"', 'name = ""', "name is empty"),
        ('station = "demo"', 'station = " "', "station is empty"),
        ('"Picket motion alarm"', '"Bewegungsmelder für innen"', "product is 'Bewegungsmelder für innen'"),
        ('"WO-0001"', '"WO 0001 rev B"', "batch is 'WO 0001 rev B'"),
        ('"WO-0001"', f'"{"W" * 33}"', "batch is"),
        ('"WO-0001"', '""', "batch is empty"),
    ],
)
def test_a_text_that_would_go_wrong_later_is_refused_in_the_bench_file(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(UserMistake) as caught:
        load_bench_file(changed(tmp_path, old, new))

    assert says in str(caught.value)


def test_a_real_board_has_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match="nothing stands behind"):
        load_bench_file(changed(tmp_path, '"rpi:"', '"rpi:/dev/sdb"', bench="rpi"))


@pytest.mark.parametrize("board", ["simulated", "virtual"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"faults": "hot"}, "must be a list"),
        ({"faults": 3}, "must be a list"),
        ({"faults": [3]}, "must be a list"),
        ({"faults": [["pir-cut"]]}, "must be a list"),
        ({"faults": ["gremlins"]}, "gremlins"),
        ({"tpm": "yes"}, "true or false"),
        ({"tpm": 0}, "true or false"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_option_of_a_board_that_makes_no_sense_is_the_users_mistake(
    tmp_path: Path, board: str, options: dict[str, object], says: str
) -> None:
    with pytest.raises(UserMistake, match=says), BOARDS[board](tmp_path / "board", tmp_path / "key", options):
        pytest.fail("the bench opened")


def test_a_unit_is_made_on_one_bench_at_a_time(site: Site) -> None:
    """Two slots that were given one label would each close the other's run in the record."""
    serial = site.serial()

    with (
        Station.opened(site.bench(), serial),
        pytest.raises(UserMistake, match=f"unit {serial} is in use"),
        Station.opened(site.bench(), serial),
    ):
        pytest.fail("the second bench opened")


# --- the limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (b"low = 75\nhigh = 0", "low` above `high"),
        (b"low = 0\nhigh = nan", "as numbers"),
        (b"low = 0\nhigh = inf", "as numbers"),
        (b'low = 0\nhigh = "75"', "as numbers"),
        (b"low = 0\nhihg = 75", "as numbers"),
        (b"", "as numbers"),
        (b"high = 75 # \xb0C", "cannot be read"),
    ],
)
def test_limits_that_judge_nothing_are_refused(tmp_path: Path, new: bytes, says: str) -> None:
    """Limits that every unit fails would be blamed on the units; limits that none can fail would be missed."""
    whole = DEFAULT.read_bytes()
    assert b"low = 0\nhigh = 75" in whole
    path = tmp_path / "limits.toml"
    path.write_bytes(whole.replace(b"low = 0\nhigh = 75", new))

    with pytest.raises(UserMistake, match=says):
        load_limits(path)
