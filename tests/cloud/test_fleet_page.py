"""docs/fleet.md is true: its commands are typed one after the other, and units answer them."""

import contextlib
import functools
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cloud import fleet_commands
from cloud.cli import app, main
from cloud.errors import NoSuchName, NotYet
from cloud.fleet import Fleet as Operator
from cloud.repository import Repository
from cloud.rollout import Kind, Ring
from firmware_agent.jobs import document as documents
from image import bundle
from tests.cloud.conftest import Fleet, deployed, eventually
from tests.cloud.test_fleet import GOOD, Outcome, working
from tests.cloud.test_jobs_overlay import fetch
from tests.image.slots.world import Keys, fat

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/fleet.md").read_text()

#: What other tests run, and what this one types instead.
INSTEAD = {
    "make cloud": "python -m cloud deploy",
    "make release VERSION=1.2.0": "python -m image release --for simulated --version 1.2.0",
    "make image": "python -m cloud fleet units",  # its bundle is `bundled`'s
}


def commands() -> list[str]:
    """What the page tells to type, in its order."""
    return [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def fleet(place: Path) -> Iterator[Fleet]:
    with deployed(place / "build", place / "build/cloud") as made:
        yield made


@pytest.fixture(scope="module")
def bundled(place: Path) -> None:
    """An image's bundle, where `make image` puts it."""
    keys = Keys.make(place)
    fat(place / "boot", 64 << 10, {"config.txt": b"arm_64bit=1\n"})
    (place / "root").write_bytes(bytes(8192))
    fields = bundle.Fields("picket", "0.2.0", 1, 1, ("raspberrypi,4-model-b",), "autoboot", "1234abcd")
    bundle.build(place / "boot", place / "root", fields, keys.sign, place / "build/image/picket-0.2.0")


def _answer(_: str, document: dict[str, Any]) -> Outcome:
    if document["operation"] == "collect-logs":
        assert fetch(document["upload"], "PUT", b"redacted lines")[0] == 200
    return GOOD


def _type(command: str, place: Path) -> str:
    """Run a command of the page in `place`; what it says.

    Commands that ask for passphrases get a terminal of their own; the others run in this process, which is faster.
    """
    program, *arguments = shlex.split(command)
    assert program == "python"
    if arguments[1] == "cloud" and "--keys" not in arguments and arguments[-1] != "init":
        done = CliRunner().invoke(app, arguments[2:])
        assert done.exit_code == 0, (command, done.output, done.exception)
        return str(done.output)
    return _at_a_terminal([sys.executable, *arguments], place)


def _at_a_terminal(arguments: list[str], place: Path) -> str:
    """Run a command at a terminal where somebody knows the passphrase."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        arguments, cwd=place, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    said, answered = b"", 0
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while chunk := os.read(ours, 4096):
            said += chunk
            if re.search(rb"(Passphrase of|Repeat)[^\n]*: $", said[answered:]):
                answered = len(said)
                os.write(ours, b"correct horse battery staple\n")
    os.close(ours)
    assert process.wait() == 0, (arguments, said.decode())
    return said.decode()


@pytest.mark.usefixtures("bundled")
def test_the_pages_commands_ship_watch_stop_and_take_back_a_release(
    fleet: Fleet, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(fleet_commands, "WATCH_SECONDS", 0.1)
    units = [fleet.admitted() for _ in range(3)]
    operator = Operator(fleet.target)
    operator.move(Ring.MAIN, [unit.serial for unit in units])
    said: dict[str, str] = {}

    with working(fleet, units, _answer, says_hello=True):
        for command in commands():
            if " rollout " in command:
                with pytest.raises(NotYet, match="must not go to all units yet"):
                    _refused(command.partition(" --soak")[0] + " --yes")
                version, kind = ("0.2.0", Kind.OS) if "--os" in command else ("1.2.0", Kind.AGENT)
                eventually(functools.partial(_soaked, operator, place, version, kind))
            if command.startswith("python -m cloud fleet logs"):
                eventually(lambda: operator.logs(units[1].serial, place / "build/logs"))
            said[command] = _type(INSTEAD.get(command, command), place)
        eventually(lambda: {(unit.version, unit.image) for unit in operator.units()} == {("1.2.0", "picket 0.2.0")})

    assert "PK-000001" in said["python -m cloud fleet units"]
    assert "1.2.0" in said["python -m cloud fleet status"]
    rings = json.loads(said["python -m cloud fleet status --json"])["rings"]
    assert [(ring["ring"], len(ring["units"])) for ring in rings] == [("canary", 1), ("main", 2)]
    assert all(ring["updates"][0]["summary"]["counts"]["SUCCEEDED"] == len(ring["units"]) for ring in rings)
    assert "Stopped: picket-" in said["python -m cloud fleet abort"]
    (log,) = (place / "build/logs").iterdir()
    assert log.read_bytes() == b"redacted lines"


def _refused(command: str) -> None:
    done = CliRunner().invoke(app, shlex.split(command)[3:])
    assert isinstance(done.exception, Exception), done.output
    raise done.exception


def _soaked(operator: Operator, place: Path, version: str, kind: Kind) -> bool:
    repository = Repository(place / "build/updates/repository")
    zero, now = timedelta(), datetime.now(UTC)
    return operator.soak(repository, version, zero, now, kind).ready


def test_the_page_names_every_code_that_a_unit_may_report() -> None:
    """The codes are the agent's; a code that the page lacks would leave an operator alone with it."""
    agent = ROOT / "firmware_agent"
    files = [*agent.glob("jobs/*.py"), *agent.glob("update/*.py"), agent / "rotation.py"]
    source = "".join(path.read_text() for path in files)
    codes = set(re.findall(r'(?:Failed|Rejected)\("([a-z-]+)"', source))
    codes |= set(re.findall(r'\bcode(?:: str)? = "([a-z-]+)"', source)) - {"cancelled"}
    table = PAGE.partition("| code |")[2].partition("\n\n")[0]
    explained = {code for row in table.splitlines()[2:] for code in re.findall(r"`([a-z-]+)`", row.split("|")[1])}

    assert len(codes) > 8
    assert codes <= explained


def test_the_page_asks_for_every_operation_that_there_is() -> None:
    asked = {match for command in commands() for match in re.findall(r"fleet job ([a-z-]+)", command)}

    assert asked == set(documents.OPERATIONS) - {"update", "os-update"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("canary", "Missing argument"),
        ("rollback 1.2.0 --ring nowhere", "nowhere"),
        ("job self-test", "say --unit SERIAL or --ring RING"),
        ("job self-test --unit PK-1 --tuning {}", "--tuning goes with configure"),
        ("job configure --unit PK-1", "--tuning goes with configure"),
        ("job configure --unit PK-1 --tuning nonsense", "no JSON"),
        ("job configure --unit PK-1 --tuning []", "at least one setting"),
        ("job reboot --unit PK-1 --timeout soon", "no length of time"),
        ("job reboot --ring canary --timeout 0", "the timeout, in minutes, is 1 to"),
        ("status --target mars", "no cloud is called"),
    ],
)
def test_a_mistake_at_the_command_line_is_told_in_words(arguments: str, complaint: str, fleet: Fleet) -> None:
    state = [] if "mars" in arguments else ["--state", str(fleet.state)]

    done = CliRunner().invoke(app, ["fleet", *arguments.split(), *state])

    assert done.exit_code == 2
    assert complaint in " ".join(re.sub(r"[│╭╰─╮╯]", " ", done.output).split())


def test_the_main_ring_is_not_reached_without_a_yes(fleet: Fleet) -> None:
    done = CliRunner().invoke(app, ["fleet", "job", "reboot", "--ring", "main", "--state", str(fleet.state)])

    assert (done.exit_code, "say --yes" in done.output) == (2, True)
    assert Operator(fleet.target).jobs("picket-reboot-main") == []


def test_a_job_that_nobody_started_is_not_shown(fleet: Fleet) -> None:
    with pytest.raises(NoSuchName, match="no job is called picket-nothing-1"):
        _refused(f"python -m cloud fleet status picket-nothing-1 --state {fleet.state}")


def test_a_name_that_nobody_has_is_a_mistake_on_the_command_line(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ("ring canary PK-NOBODY", "logs PK-NOBODY", "job reboot --unit PK-NOBODY", "abort --job nothing-1"):
        monkeypatch.setattr(sys, "argv", ["cloud", "fleet", *words.split(), "--state", str(fleet.state)])
        with pytest.raises(SystemExit) as ended:
            main()

        assert (words, ended.value.code) == (words, 2)
        assert "see `python -m cloud fleet" in capsys.readouterr().err
