"""What people do wrong at the station: each is named, with the right exit code, and nothing of theirs is lost."""

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

import station
from factory import authority
from factory.benches import BOARDS, load_bench_file
from factory.errors import ExitCode, SignerFault, StationFault, UserMistake
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


# --- the station's folders and files -------------------------------------------------------------------------------


def edited(site: Site, old: str, new: str) -> str:
    """A bench file of the site that somebody edited."""
    path = site.bench()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return str(path)


def said(ran: subprocess.CompletedProcess[str]) -> str:
    """What a command complained of, in one line."""
    return " ".join(ran.stderr.replace("│", " ").split())


def test_records_that_are_no_database_are_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "records.db").write_bytes(b"no database" * 1000)
    bench = edited(site, f"{site.base}/records.db", f"{tmp_path}/records.db")

    for ran in (
        site.command("record", "PK-000001", "--bench", bench, "--json"),
        site.command("run", "--serial", site.serial(), "--bench", bench, "--json"),
    ):
        assert (ran.returncode, ran.stdout) == (ExitCode.STATION_FAULT, "")
        assert "the records cannot be opened: file is not a database" in said(ran)
        assert "defect" not in said(ran)


@pytest.mark.parametrize("setting", ["labels", "records"])
def test_a_folder_that_is_a_file_stops_the_line_before_a_unit_is_touched(
    site: Site, tmp_path: Path, setting: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    old = {"labels": f'"{site.base}/labels"', "records": f"{site.base}/records.db"}[setting]
    new = {"labels": f'"{tmp_path}/file"', "records": f"{tmp_path}/file/records.db"}[setting]
    serial = site.serial()

    ran = site.command("run", "--serial", serial, "--bench", edited(site, old, new))

    assert ran.returncode == ExitCode.STATION_FAULT
    assert f"Check `{setting}` in the bench file" in said(ran)
    assert site.record(serial) == ()


def test_a_full_disk_is_no_defect_of_the_program(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_database(_path: Path) -> None:
        raise OperationalError("COMMIT", None, sqlite3.OperationalError("database or disk is full"))

    for failing, says in ((full, "No space left on device"), (full_database, "database or disk is full")):
        monkeypatch.setattr("station.load_bench_file", failing)
        ran = CliRunner().invoke(station.app, ["run", "--bench", str(site.bench()), "--serial", site.serial()])

        assert ran.exit_code == ExitCode.STATION_FAULT
        assert says in ran.stderr
        assert "defect" not in ran.stderr


@pytest.mark.parametrize(("content", "says"), [(b"no key", "no SSH key"), (None, "No such file")])
def test_a_factory_key_that_opens_nothing_stops_the_line_before_a_unit_is_touched(
    site: Site, tmp_path: Path, content: bytes | None, says: str
) -> None:
    """It used to be found in boot, after a flash, and blamed on the unit's network cable."""
    (tmp_path / "key.pub").write_bytes((site.base / "keys/factory.pub").read_bytes())
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    serial = site.serial()

    with pytest.raises(StationFault, match=says):
        site.run(serial, key=str(tmp_path / "key"))

    assert site.record(serial) == ()


def test_a_unit_that_passed_is_refused_although_the_cloud_is_down(site: Site, tmp_path: Path) -> None:
    """The demo says what to try next; its cloud has stopped by then."""
    serial = site.serial()
    site.run(serial)

    ran = site.command("run", "--bench", str(site.bench(cloud=str(tmp_path / "nowhere"))), "--serial", serial)

    assert ran.returncode == ExitCode.USER_MISTAKE
    assert "already passed" in said(ran)


def test_a_folder_may_be_called_as_one_likes(tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_bytes(PASSPHRASE)
    (tmp_path / "passphrase").chmod(0o600)
    folder = tmp_path / "ca [bold] [/x]"

    ran = CliRunner().invoke(
        station.app, ["ca", "init", "--directory", str(folder), "--passphrase-file", str(tmp_path / "passphrase")]
    )

    assert ran.exit_code == ExitCode.PASS, ran.stderr
    assert (folder / "signing.pem").exists()


# --- the other command lines ---------------------------------------------------------------------------------------


def module(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m image` or `python -m cloud` as a user calls it."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, cwd=BENCHES.parent
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("build", "--nope"), 2, "No such option"),
        (("bake",), 2, "No such command"),
        (("build", "--recipe", "benches"), 2, "Is a directory"),
        (("build", "--recipe", "nowhere.toml", "--json"), 2, "nowhere.toml cannot be read"),
        (("verify", "nowhere.json"), 2, "no image description"),
    ],
)
def test_a_mistake_at_the_images_command_line_is_named(arguments: tuple[str, ...], code: int, says: str) -> None:
    ran = module("image", *arguments)

    assert (ran.returncode, ran.stdout) == (code, "")
    assert says in said(ran)
    assert "Traceback" not in ran.stderr


def test_a_cloud_whose_state_would_be_a_file_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "file"
    state.write_text("no folder")

    up = module("cloud", "up", "--state", str(state))
    down = module("cloud", "down", "--state", str(state))

    assert (up.returncode, down.returncode) == (3, 0)
    assert "no state can be kept" in said(up)
    assert "No local cloud was running" in said(down)
    assert state.read_text() == "no folder"


def test_a_bench_on_a_cloud_whose_state_is_a_file_stops(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")

    ran = site.command("run", "--serial", site.serial(), "--bench", str(site.bench(cloud=str(tmp_path / "file"))))

    assert ran.returncode == ExitCode.STATION_FAULT
    assert "no local cloud runs on" in said(ran)


# --- what a newcomer reads -----------------------------------------------------------------------------------------


def test_the_help_fits_a_terminal_of_80_columns() -> None:
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, check=True, cwd=BENCHES.parent).stdout

    assert [line for line in shown.splitlines() if len(line) > 80] == []


def test_a_missing_passphrase_file_comes_with_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserMistake) as caught:
        station.read_passphrase(tmp_path / "passphrase")

    assert "umask 077" in caught.value.advice
