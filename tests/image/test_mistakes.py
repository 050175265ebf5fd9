"""What an image engineer does wrong: one line that says what to do, the right exit code, and never a traceback."""

import json
import sys
from pathlib import Path

import pytest

from image.__main__ import main
from image.build import check_update_root
from tests.updates import World

RECIPE = "image/recipes/picket.toml"
ELSEWHERE = ["--output", "{tmp}/out", "--cache", "{tmp}/cache", "--no-updates"]


def told(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["image", *arguments])
    try:
        code = main()
    except SystemExit as done:
        code = int(done.code or 0)
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("updates"))


def test_the_root_of_update_keys_is_one(updates: World) -> None:
    check_update_root(updates.root)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "--recipe", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["build", "--recipe", "{tmp}/bad.toml"], "flavour is not a key"),
        (["build", "--recipe", "{tmp}/lockless.toml", *ELSEWHERE], "make image-lock RECIPE="),
        (["build", "--update-root", "{tmp}/root.json"], "python -m cloud keys init"),
        (["build", "--signing-key", "file:{tmp}/key", *ELSEWHERE], "key cannot be opened as an OpenSSH key"),
        (["build", "--signing-key", "public:{tmp}/key", *ELSEWHERE], "is no public key as OpenSSH writes it"),
        (["build", "--address", "nonsense", *ELSEWHERE], "is not where Imager could find"),
        (["build", "--key", "{tmp}/absent", *ELSEWHERE], "does not exist"),
        (["build", "--key", "{tmp}/key", *ELSEWHERE], "is no SSH key without a passphrase"),
        (["build", "--output", "{tmp}/key", "--no-updates"], "is a file"),
        (["build", *ELSEWHERE[:4], "--update-root", "{tmp}/key"], "is no root of update keys"),
        (["build", *ELSEWHERE[:4], "--update-root", "{tmp}/stranger.json"], "is no root of update keys"),
        (["describe", "{tmp}/nowhere.json"], "`make image` makes one"),
        (["describe", "{tmp}"], "holds no image description"),
        (["describe", "{tmp}/bad.toml"], "flavour is not a key"),
        (["diff", "{tmp}/old", "{tmp}/new"], "no image description at"),
        (["verify", "{tmp}/text.json"], "text.json is not the description of an image but a text that is no JSON"),
        (["verify", "{tmp}/digits.json"], "but a file with a number of thousands of digits; name the image's .json"),
        (["lint", "{tmp}/deep.json"], "but a file whose lists or objects lie too deep in one another"),
        (["describe", "{tmp}/digits.toml"], "digits.toml is no recipe: a number in it has thousands of digits"),
        (["lint", "{tmp}/deep.toml"], "deep.toml is no recipe: its lists or tables lie too deep"),
        (["lint", "{tmp}/zero.toml"], "zero.toml: extends: 'a\\x00b.toml' is no file's name"),
        (["lint", "{tmp}/x-1.0.img"], "x-1.0.img is not the description of an image but an image itself; name the"),
        (["verify", "{tmp}/x-1.0.img.zst"], "x-1.0.img.zst is not the description of an image but an image itself"),
        (["describe", "{tmp}/noise"], "noise is not the description of an image but a file that is no text"),
        (["lint", "{tmp}/large"], "large is not the description of an image but a file of more than 16 MiB"),
        (["verify", RECIPE], "picket.toml is not the description of an image but a recipe; name the image's .json"),
        (["diff", RECIPE, RECIPE], "picket.toml is not the description of an image but a recipe"),
        (["lint", "{tmp}/recipe"], "recipe is not the description of an image but a text that is no JSON (a recipe's"),
        (["lint", "{tmp}/old.json"], "not an image description of the form picket-image-2"),
        (["lint", "{tmp}/bad.toml"], "flavour is not a key"),
        (["lock", "--recipe", "nowhere.toml"], "nowhere.toml cannot be read"),
    ],
)
def test_a_mistake_is_told_in_words_and_leaves_with_2(
    arguments: list[str],
    words: str,
    updates: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.toml").write_text("flavour = 1\n")
    (tmp_path / "lockless.toml").write_text(f'extends = "{Path(RECIPE).resolve()}"\n')
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "old.json").write_text('{"format": "picket-image-1"}')
    (tmp_path / "key").write_text("no key")
    stranger = json.loads(updates.root.read_bytes())
    stranger["signed"]["version"] += 1
    (tmp_path / "stranger.json").write_text(json.dumps(stranger))
    (tmp_path / "digits.json").write_text("9" * 5000)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "digits.toml").write_text(f"pir_line = {'9' * 5000}")
    (tmp_path / "deep.toml").write_text(f"name = {'[' * 5000}{']' * 5000}")
    (tmp_path / "zero.toml").write_text('extends = "a\\u0000b.toml"')
    (tmp_path / "x-1.0.img").write_bytes(bytes(1000))
    for name in ("x-1.0.img.zst", "noise"):
        (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd\xff")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 34)
    (tmp_path / "recipe").write_text('name = "small"')

    code, said = told([argument.format(tmp=tmp_path) for argument in arguments], monkeypatch, capsys)

    assert code == 2
    assert words in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("picket*/")) + list((tmp_path / "cache").glob("b*"))


@pytest.mark.parametrize("command", ["build", "describe", "diff", "lint", "lock", "release", "verify"])
def test_every_commands_help_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["image", command, "--help"])
    with pytest.raises(SystemExit):
        main()

    assert f"python -m image {command}" in " ".join(capsys.readouterr().out.split())
