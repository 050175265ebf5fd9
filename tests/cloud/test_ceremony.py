"""The keys of updates at the command line: what holders type, and what they are told."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cloud import ceremony
from cloud.errors import RepositoryFault
from cloud.keyring import load_keys, read_public
from cloud.repository import Repository
from tests.updates import build

PASSPHRASE = "correct horse battery"


class Desk:
    """A person at a terminal, in a directory."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.repository = base / "repository"
        self.keys = base / "keys"
        self.passphrase = base / "passphrase"
        self.passphrase.write_text(PASSPHRASE + "\n")

    def run(self, *words: str, passphrase: Path | None = None) -> Result:
        arguments = [*words, "--repository", str(self.repository)]
        if words[0] not in {"status", "canaries"}:
            arguments += ["--passphrase-file", str(passphrase or self.passphrase)]
        return CliRunner().invoke(ceremony.app, arguments, catch_exceptions=False)

    def say(self, *words: str) -> str:
        """Run what must succeed; what was said."""
        result = self.run(*words)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    def init(self) -> "Desk":
        self.say("init", "--keys", str(self.keys), "--holders", "alice,bob,carol")
        return self

    def of(self, *names: str) -> list[str]:
        return [word for name in names for word in ("--keys", str(self.keys / name))]

    def status(self) -> Any:
        return json.loads(self.run("status", "--json").stdout)


@pytest.fixture
def empty(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def desk(empty: Desk) -> Desk:
    return empty.init()


def test_init_leaves_a_published_repository_and_a_directory_for_each_holder(desk: Desk) -> None:
    status = desk.status()
    roles = {role["role"]: (role["threshold"], role["holders"]) for role in status["roles"]}

    assert roles == {
        "root": (2, ["alice", "bob", "carol"]),
        "targets": (2, ["alice", "bob", "carol"]),
        "picket": (2, ["alice", "bob", "carol"]),
        "picket-canary": (1, ["builder"]),
        "snapshot": (1, ["online"]),
        "timestamp": (1, ["online"]),
    }
    assert status["staged"] == []
    assert {path.name for path in desk.keys.iterdir()} == {"alice", "bob", "carol", "online", "builder"}
    assert {path.name.partition("-")[0] for path in (desk.keys / "alice").glob("*.pem")} == {
        "root",
        "targets",
        "picket",
    }


def test_private_keys_are_encrypted_and_for_their_owner_only(desk: Desk) -> None:
    for path in desk.keys.rglob("*.pem"):
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"ENCRYPTED" in path.read_bytes()
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in desk.keys.iterdir())
    with pytest.raises(RepositoryFault, match="does not open with this passphrase"):
        load_keys(desk.keys / "alice", b"wrong")


def test_three_holders_make_their_keys_apart_and_sign_one_after_the_other(empty: Desk) -> None:
    for name in ("alice", "bob", "carol"):
        home = empty.base / "home" / name
        result = CliRunner().invoke(
            ceremony.app, ["new", str(home), "--holder", name, "--passphrase-file", str(empty.passphrase)]
        )
        assert result.exit_code == 0, result.output
        (empty.keys / name).mkdir(parents=True)
        (empty.keys / name / "public.json").write_bytes((home / "public.json").read_bytes())

    said = empty.say("init", "--keys", str(empty.keys), "--holders", "alice,bob,carol")
    assert "root 1: 2 more of alice, bob, carol" in said
    assert not list((empty.keys / "alice").glob("*.pem"))

    said = empty.say("sign", "--keys", str(empty.base / "home/alice"))
    assert "root 1: 1 more of bob, carol" in said
    said = empty.say("sign", "--keys", str(empty.base / "home/carol"))
    assert "root 1: all signatures are there" in said
    empty.say("publish", *empty.of("online"))

    assert len(empty.status()["roles"]) == 6


def test_a_release_waits_for_a_second_holder(desk: Desk) -> None:
    Repository(desk.repository).add(build(desk.base / "built", "1.2.0"), "main")

    assert "picket 2: 1 more of bob, carol" in desk.say("sign", *desk.of("alice"))
    assert "have signed before" in desk.say("sign", *desk.of("alice"))
    desk.say("publish", *desk.of("online"))
    assert desk.status()["releases"] == []

    assert "picket 2: all signatures are there" in desk.say("sign", "picket", *desk.of("bob"))
    assert "In force now: picket, timestamp." in desk.say("publish", *desk.of("online"))
    assert [release["path"] for release in desk.status()["releases"]] == ["agent/picket-agent-1.2.0.tar.zst"]


def test_the_builder_alone_reaches_the_canaries(desk: Desk) -> None:
    Repository(desk.repository).add(build(desk.base / "built", "1.2.0"), "canary")

    assert "picket-canary 2: all signatures are there" in desk.say("sign", *desk.of("builder"))
    desk.say("publish", *desk.of("online"))

    assert [release["ring"] for release in desk.status()["releases"]] == ["canary"]


@pytest.mark.parametrize("role", ["root", "targets", "picket"])
def test_a_holder_replaces_a_key_and_the_others_sign_it(desk: Desk, role: str) -> None:
    before = read_public(desk.keys / "bob").keys[role].keyid

    said = desk.say("rotate", role, *desk.of("bob"))
    assert f"takes the place of {before[:8]}" in said
    desk.say("sign", *desk.of("alice", "carol"))
    desk.say("publish", *desk.of("online"))

    keys = {key.keyid: holder for holder, key in Repository(desk.repository).keys_of(role)}
    assert sorted(keys.values()) == ["alice", "bob", "carol"]
    assert before not in keys
    assert read_public(desk.keys / "bob").keys[role].keyid in keys
    assert desk.status()["staged"] == []


def test_a_lost_directory_is_replaced_by_key_id(desk: Desk) -> None:
    lost = read_public(desk.keys / "bob").keys["root"].keyid
    new = desk.base / "bobs-new-stick"

    desk.say("rotate", "root", "--keys", str(new), "--old", lost[:8])
    desk.say("sign", *desk.of("alice", "carol"))
    desk.say("publish", *desk.of("online"))

    assert read_public(new).holder == "bob"
    assert lost not in {key.keyid for _, key in Repository(desk.repository).keys_of("root")}


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_a_stolen_online_key_is_replaced_by_two_holders(desk: Desk, role: str) -> None:
    desk.say("rotate", role, *desk.of("online"))
    assert "staged: root 2" in desk.say("renew", *desk.of("online"))  # nothing has changed yet

    desk.say("sign", *desk.of("alice", "bob"))
    desk.say("publish", *desk.of("online"))

    assert {entry["role"]: entry["version"] for entry in desk.status()["roles"]}["root"] == 2
    metadata = Repository(desk.repository).in_force(role)
    assert metadata is not None
    assert set(metadata.signatures) == {read_public(desk.keys / "online").keys[role].keyid}


def test_what_is_due_is_renewed_with_the_keys_at_hand(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Nothing is due." in desk.say("renew", *desk.of("online"))
    later = datetime.now(UTC) + timedelta(days=50)
    monkeypatch.setattr(ceremony, "Repository", lambda path: Repository(path, lambda: later))

    said = desk.say("renew", *desk.of("online", "builder"))
    assert "In force now: picket-canary, timestamp." in said
    assert "targets 2: 2 more of alice, bob, carol" in said

    said = desk.say("renew", *desk.of("online", "alice", "carol"))
    assert "In force now: targets, picket, timestamp." in said
    assert Repository(desk.repository, lambda: later).due() == ()


def test_canaries_are_named_by_two_holders(desk: Desk) -> None:
    desk.say("canaries", "PK-000002", "PK-000001")
    desk.say("sign", *desk.of("alice", "carol"))
    desk.say("publish", *desk.of("online"))

    assert desk.run("canaries").stdout.split() == ["PK-000001", "PK-000002"]
    desk.say("canaries", "--none")
    assert desk.status()["canaries"] == []


def test_status_speaks_in_words(desk: Desk) -> None:
    said = desk.say("status")

    assert "alice, bob, carol" in said
    assert "365 days" in said
    assert "7 days" in said


@pytest.mark.parametrize(
    ("days", "words"),
    [(364.98, "365 days"), (1.99, "47 hours"), (0.05, "1 hour"), (0, "0 hours"), (-3, "EXPIRED 3 days ago")],
)
def test_days_are_told_in_words(days: float, words: str) -> None:
    assert ceremony.words_for_days(days) == words


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("init", "--holders", "alice,bob"), "3 different names"),
        (("init", "--holders", "alice,bob,alice"), "3 different names"),
        (("init", "--holders", "alice,../bob,carol"), "3 different names"),
        (("init", "--holders", "alice,online,carol"), "3 different names"),
        (("rotate", "kettle"), "no role 'kettle'"),
        (("rotate", "timestamp"), "which key of timestamp goes?"),
        (("rotate", "root", "--old", "zzzz"), "which key of root goes?"),
    ],
)
def test_mistakes_are_told_and_change_nothing(desk: Desk, words: tuple[str, ...], reason: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in desk.base.rglob("*")}

    result = desk.run(*words, "--keys", str(desk.keys / "alice"))

    assert result.exit_code == 2
    assert reason in " ".join(result.output.replace("│", "").split())
    assert {path: path.stat().st_mtime_ns for path in desk.base.rglob("*")} == before


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe"])
def test_a_passphrase_file_that_holds_none_is_a_mistake(desk: Desk, content: bytes | None) -> None:
    file = desk.base / "other"
    if content is not None:
        file.write_bytes(content)

    assert desk.run("sign", *desk.of("alice"), passphrase=file).exit_code == 2


def test_the_cloud_s_command_line_tells_faults_without_a_traceback(desk: Desk) -> None:
    """Through the real program, with the wrong passphrase, a directory without keys, and no repository."""
    wrong = desk.base / "wrong"
    wrong.write_text("wrong")

    for words, reason in (
        (["sign", *desk.of("alice"), "--repository", desk.repository, "--passphrase-file", wrong], "does not open"),
        (["status", "--repository", desk.base / "nowhere"], "holds no update repository"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cloud", "keys", *map(str, words)], capture_output=True, text=True, check=False
        )

        assert done.returncode == 3
        assert reason in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr


def test_nothing_is_overwritten(desk: Desk) -> None:
    with pytest.raises(RepositoryFault, match="already"):
        desk.run("init", "--keys", str(desk.keys), "--holders", "alice,bob,carol")
    with pytest.raises(RepositoryFault, match="holds keys already"):
        CliRunner().invoke(
            ceremony.app,
            ["new", str(desk.keys / "alice"), "--holder", "eve", "--passphrase-file", str(desk.passphrase)],
            catch_exceptions=False,
        )


@pytest.mark.parametrize("damage", ["{", "[]", '{"holder": "x"}', '{"holder": "x", "keys": {"root": {}}}'])
def test_a_damaged_public_half_is_named(desk: Desk, damage: str) -> None:
    (desk.keys / "alice" / "public.json").write_text(damage)

    with pytest.raises(RepositoryFault, match="is damaged"):
        read_public(desk.keys / "alice")
