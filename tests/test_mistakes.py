"""What people do wrong at the station: each is named, with the right exit code, and nothing of theirs is lost."""

from pathlib import Path

import pytest

from factory import authority
from factory.errors import SignerFault, UserMistake

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
