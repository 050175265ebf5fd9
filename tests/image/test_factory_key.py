import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from image import factory_key
from image.errors import ImageError


def test_a_key_is_made_once_and_its_owner_alone_can_read_it(tmp_path: Path) -> None:
    path = factory_key.ensure(tmp_path / "keys" / "factory")
    first = path.read_bytes()

    again = factory_key.ensure(path)

    assert again.read_bytes() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "keys" / "factory.pub").read_text().startswith("ssh-ed25519 AAAA")


def test_a_lost_public_half_is_written_again(tmp_path: Path) -> None:
    path = factory_key.ensure(tmp_path / "factory")
    public = tmp_path / "factory.pub"
    line = public.read_text()
    public.unlink()

    factory_key.ensure(path)

    assert public.read_text() == line


def test_two_at_the_same_time_get_the_same_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: factory_key.ensure(tmp_path / "factory"), range(16)))

    assert len({path.read_bytes() for path in paths}) == 1


def test_a_file_that_is_no_key_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "factory"
    path.write_text("something else")

    with pytest.raises(ImageError, match="no SSH key"):
        factory_key.ensure(path)
    assert path.read_text() == "something else"
