"""What is laid over the base."""

from dataclasses import replace
from pathlib import Path

import pytest

from image import configure, recipe
from image.errors import RecipeError

PRODUCT = Path(recipe.__file__).parent / "recipes/picket.toml"


def test_a_recipes_files_lie_over_the_images_own(tmp_path: Path) -> None:
    ours, root = tmp_path / "ours", tmp_path / "root"
    (ours / "etc").mkdir(parents=True)
    (ours / "etc/motd").write_text("ours\n")
    (ours / "etc/run").write_text("#!/bin/sh\n")
    (ours / "etc/run").chmod(0o700)
    root.mkdir()

    configure.install_files(root, [ours])

    assert (root / "etc/motd").read_text() == "ours\n"
    assert [oct((root / "etc" / name).stat().st_mode & 0o7777) for name in ("motd", "run")] == ["0o644", "0o755"]
    assert (root / "usr/lib/picket").is_dir()


def test_a_link_leads_to_where_it_leads_on_the_unit(tmp_path: Path) -> None:
    ours, root = tmp_path / "ours", tmp_path / "root"
    ours.mkdir()
    (ours / "wanted.service").symlink_to("/etc/systemd/system/our.service")
    (ours / "log").symlink_to("/nowhere/there")
    root.mkdir()
    (root / "log").write_text("in the way")

    configure.install_files(root, [ours])

    assert (root / "wanted.service").readlink() == Path("/etc/systemd/system/our.service")
    assert (root / "log").readlink() == Path("/nowhere/there")


def test_users_of_the_base_lose_their_passwords_and_its_groups_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an official image, which has people and a group for GPIO."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "var/lib").mkdir(parents=True)
    for name, text in {
        "passwd": "root:x:0:0::/root:/bin/sh\npi:x:1000:1000::/home/pi:/bin/bash\n",
        "shadow": "root:!:20000::::::\npi:$y$secret:20000::::::\nguest::20000::::::\ndaemon:*:20000::::::\n",
        "group": "tss:x:110:\ngpio:x:986:pi\n",
        "gshadow": "tss:!::\ngpio:!::pi\n",
    }.items():
        (tmp_path / "etc" / name).write_text(text)
    monkeypatch.setattr("os.chown", lambda *_: None)

    configure.create_users(tmp_path)

    shadow = dict(line.split(":")[:2] for line in (tmp_path / "etc/shadow").read_text().splitlines())
    assert shadow == {"root": "!", "pi": "*", "guest": "*", "daemon": "*", "picket": "*"}
    assert (tmp_path / "etc/group").read_text().splitlines() == [
        "tss:x:110:picket", "gpio:x:986:pi,picket", "picket:x:900:",
    ]  # fmt: skip


def test_what_both_slots_share_must_be_on_the_image(tmp_path: Path) -> None:
    wanted = replace(recipe.load(PRODUCT), shared=("/var/lib/picket", "/var/lib/mine"))
    (tmp_path / "var/lib/picket").mkdir(parents=True)

    with pytest.raises(RecipeError, match="shared: the image has no directory /var/lib/mine"):
        configure.check_shared(tmp_path, wanted)

    (tmp_path / "var/lib/mine").mkdir()
    configure.check_shared(tmp_path, wanted)
