"""The launcher: the real script as a process, with releases that only say who they are; and its decision."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_agent import launcher
from firmware_agent.launcher import Boot, RolledBack, Trial, decide

OLD, NEW, OLDER = "1.0.0-0000000a", "1.10.0-0000000b", "0.9.0-0000000c"

#: A release that says who it is, and what it was given.
PROGRAM = """
import json, os, signal, sys
import helper
names = ("PICKET_RELEASE", "PICKET_SAFE_MODE", "PYTHONDONTWRITEBYTECODE")
print(json.dumps({"arguments": sys.argv[1:], "helper": helper.WHOSE, "path": sys.path[:3], "timer": signal.alarm(0)}
    | {name: os.environ.get(name) for name in names}))
"""


class Board:
    """The directories of a unit."""

    def __init__(self, root: Path) -> None:
        self.directory, self.state = root / "opt", root / "state"
        (self.directory / "releases").mkdir(parents=True)
        self.state.mkdir()

    def install(self, *names: str) -> None:
        for name in names:
            release = self.directory / "releases" / name
            (release / "firmware_agent").mkdir(parents=True)
            (release / "lib").mkdir()
            (release / "manifest.json").write_text("{}")
            (release / "firmware_agent/__init__.py").write_text("")
            (release / "firmware_agent/__main__.py").write_text(PROGRAM)
            (release / "lib/helper.py").write_text(f"WHOSE = {name!r}")

    def point(self, **links: str) -> None:
        for link, name in links.items():
            (self.directory / link).unlink(missing_ok=True)
            (self.directory / link).symlink_to(f"releases/{name}")

    def write(self, boot: Boot) -> None:
        (self.state / "boot.json").write_bytes(boot.to_bytes())

    def boot(self) -> Boot:
        return Boot.parse((self.state / "boot.json").read_bytes())

    def current(self) -> str:
        return os.readlink(self.directory / "current")  # noqa: PTH115

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        places = ["--releases", str(self.directory), "--state", str(self.state), "--no-wait"]
        command = [sys.executable, "-I", "-S", launcher.__file__, *places, *options, "--", "run", "--verbose"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def start(self, *options: str) -> dict[str, Any]:
        done = self.run(*options)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told


@pytest.fixture
def board(tmp_path: Path) -> Board:
    board = Board(tmp_path)
    board.install(OLDER, OLD, NEW)
    board.point(current=OLD, previous=OLDER)
    return board


def on_trial(attempts: int = 0) -> Boot:
    return Boot(trial=Trial(NEW, OLD, attempts, 3, "job-1"))


# --- the process --------------------------------------------------------------------------------------------------


def test_the_current_release_is_started_with_its_own_packages_first(board: Board) -> None:
    release = board.directory / "releases" / OLD

    assert board.start() == {
        "arguments": ["run", "--verbose"],
        "helper": OLD,
        "path": [str(release), str(release / "lib"), *board.start()["path"][2:]],
        "timer": 0,
        "PICKET_RELEASE": OLD,
        "PICKET_SAFE_MODE": None,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    assert list(release.rglob("__pycache__")) == []


def test_an_option_that_is_not_known_is_one_line_and_no_start(board: Board) -> None:
    done = board.run("--relaeses", "/elsewhere")

    assert (done.returncode, done.stdout) == (launcher.WRONG_ARGUMENTS, "")
    assert done.stderr == "launcher: option --relaeses not recognized\n"


def test_a_trial_runs_against_a_timer_while_there_is_a_release_to_go_back_to(board: Board) -> None:
    board.point(current=NEW)
    board.write(on_trial())

    assert 0 < board.start()["timer"] <= launcher.TRIAL_SECONDS

    shutil.rmtree(board.directory / "releases" / OLD)
    shutil.rmtree(board.directory / "releases" / OLDER)
    assert board.start()["timer"] == 0


def test_the_service_manager_starts_the_agent_again_whatever_its_exit_code() -> None:
    """A release on trial that ends by "my key is gone" would else stay down, and the launcher never go back."""
    unit = Path("image/files/usr/lib/systemd/system/picket-agent.service").read_text().splitlines()

    assert "Restart=always" in unit
    assert "StartLimitIntervalSec=0" in unit
    assert [line for line in unit if line.startswith("RestartPreventExitStatus")] == []


def test_a_release_without_packages_finds_those_of_the_library(board: Board, tmp_path: Path) -> None:
    (board.directory / "releases" / OLD / "lib/helper.py").unlink()
    (tmp_path / "library").mkdir()
    (tmp_path / "library/helper.py").write_text("WHOSE = 'library'")

    assert board.start("--library", str(tmp_path / "library"))["helper"] == "library"


def test_a_trial_is_counted_before_it_starts_and_given_up_over_its_limit(board: Board) -> None:
    board.point(current=NEW)
    board.write(on_trial())

    started = [(board.start()["PICKET_RELEASE"], board.boot().trial) for _ in range(3)]
    assert started == [(NEW, on_trial().trial._replace(attempts=n)) for n in (1, 2, 3)]  # type: ignore[union-attr]

    assert board.start()["PICKET_RELEASE"] == OLD
    assert board.current() == f"releases/{OLD}"
    assert board.boot() == Boot(None, RolledBack(NEW, OLD, "did not prove itself in 3 starts", 3, "job-1"), 1)


def test_a_trial_that_is_not_switched_to_is_left_alone(board: Board) -> None:
    board.write(on_trial())

    assert board.start()["PICKET_RELEASE"] == OLD
    assert board.boot() == on_trial()._replace(unsteady=1)


@pytest.mark.parametrize("missing", ["manifest.json", "firmware_agent/__main__.py"])
def test_a_trial_that_is_not_whole_is_given_up_at_once(board: Board, missing: str) -> None:
    board.point(current=NEW)
    board.write(on_trial())
    (board.directory / "releases" / NEW / missing).unlink()

    assert board.start()["PICKET_RELEASE"] == OLD
    assert board.boot().rolled_back == RolledBack(NEW, OLD, "is not whole on the disk", 0, "job-1")


def test_an_interrupted_way_back_is_finished(board: Board) -> None:
    board.point(current=NEW)
    board.write(Boot(rolled_back=RolledBack(NEW, OLD, "unhealthy", 1, "job-1")))

    assert board.start()["PICKET_RELEASE"] == OLD
    assert board.current() == f"releases/{OLD}"
    assert board.boot().rolled_back == RolledBack(NEW, OLD, "unhealthy", 1, "job-1")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 200,
        b"{",
        b"null",
        b'{"format": 2}',
        b'{"format":1,"trial":0}',
        b'{"format":1,"trial":{"release":"/etc"}}',
        b"[" * 9999,
    ],
)
def test_an_unreadable_boot_json_is_taken_for_an_empty_one(board: Board, content: bytes) -> None:
    (board.state / "boot.json").write_bytes(content)

    done = board.run()

    assert json.loads(done.stdout)["PICKET_RELEASE"] == OLD
    assert "is taken for empty" in done.stderr
    assert board.boot() == Boot(unsteady=1)


def test_a_boot_json_that_is_a_directory_does_not_stop_the_start(board: Board) -> None:
    (board.state / "boot.json").mkdir()

    assert board.start()["PICKET_RELEASE"] == OLD


def test_without_its_state_directory_a_committed_release_starts(board: Board) -> None:
    board.state.rmdir()

    assert board.start()["PICKET_RELEASE"] == OLD


def test_a_trial_that_cannot_be_counted_is_not_started(board: Board) -> None:
    """As on a full or read-only disk: the place of the new boot.json is taken by something that cannot be removed."""
    board.point(current=NEW)
    board.write(on_trial(attempts=1))
    (board.state / ".boot.json.new").mkdir()

    assert board.start()["PICKET_RELEASE"] == OLD
    assert board.boot() == on_trial(attempts=1)
    assert board.current() == f"releases/{NEW}"  # the agent of the old release decides what becomes of the trial


def test_a_way_back_that_cannot_be_written_down_is_taken_all_the_same(board: Board) -> None:
    board.point(current=NEW)
    board.write(on_trial(attempts=3))
    (board.state / ".boot.json.new").mkdir()
    (board.directory / ".current.new").mkdir()

    assert board.start()["PICKET_RELEASE"] == OLD


def test_a_full_disk_does_not_stop_a_committed_release(board: Board) -> None:
    (board.state / ".boot.json.new").mkdir()
    (board.directory / ".current.new").mkdir()
    (board.directory / "current").unlink()

    assert board.start()["PICKET_RELEASE"] == OLDER


@pytest.mark.parametrize(
    ("current", "previous", "started"),
    [
        (None, OLDER, OLDER),
        ("2.0.0-0000000d", OLDER, OLDER),
        (None, None, NEW),
        ("../../etc", "2.0.0-0000000d", NEW),
    ],
)
def test_without_a_current_release_the_previous_starts_else_the_newest(
    board: Board, current: str | None, previous: str | None, started: str
) -> None:
    for link, name in (("current", current), ("previous", previous)):
        (board.directory / link).unlink()
        if name:
            board.point(**{link: name})

    assert board.start()["PICKET_RELEASE"] == started
    assert board.current() == f"releases/{started}"


def test_without_any_whole_release_it_says_so(board: Board) -> None:
    for path in board.directory.glob("releases/*/manifest.json"):
        path.unlink()

    done = board.run()

    assert done.returncode == 78
    assert "write the image anew" in done.stderr


def test_a_release_that_is_never_steady_starts_in_safe_mode(board: Board) -> None:
    modes = [board.start()["PICKET_SAFE_MODE"] for _ in range(8)]

    assert modes == [None] * 5 + ["1"] * 3
    assert board.boot().unsteady == 6  # an endless loop does not wear the disk out
    board.write(Boot())
    assert board.start()["PICKET_SAFE_MODE"] is None


@given(st.integers(0, 20))
def test_a_release_that_keeps_dying_is_started_ever_more_slowly_and_never_given_up(unsteady: int) -> None:
    now, later = launcher.pause(Boot(unsteady=unsteady)), launcher.pause(Boot(unsteady=unsteady + 1))

    assert 0.0 <= now <= later <= 60.0


def test_a_start_after_a_steady_run_and_one_on_trial_do_not_wait() -> None:
    assert launcher.pause(Boot(unsteady=1)) == 0.0
    assert launcher.pause(Boot(unsteady=2)) == 0.0
    assert launcher.pause(on_trial()._replace(unsteady=6)) == 0.0


def test_the_first_start_after_power_on_does_not_wait_and_the_next_one_does(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(launcher, "start", lambda *_: waited.append(-1.0))
    places = ["--releases", str(board.directory), "--state", str(board.state), "--run", str(tmp_path)]
    board.write(Boot(unsteady=4))

    launcher.main(places)
    assert waited[0] == -1.0

    del waited[:]
    launcher.main(places)
    assert waited[:2] == [launcher.PAUSES[-1], -1.0]


def test_where_nothing_can_be_noted_it_waits(board: Board, tmp_path: Path) -> None:
    assert not launcher.first_of_this_boot(tmp_path / "absent")


def test_it_needs_nothing_but_the_standard_library() -> None:
    """Nor anything of ours: the image installs this one file alone."""
    code = f"import runpy, sys; runpy.run_path({launcher.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)

    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names - {"__main__", "__mp_main__"} == set()


# --- the decision -------------------------------------------------------------------------------------------------

names = st.sampled_from([OLDER, OLD, NEW, "1.2.0-0000000d"])
counts = st.integers(0, 9)
trials = st.builds(Trial, names, names, counts, counts, st.just("job"))
reports = st.builds(RolledBack, names, names, st.just("unhealthy"), counts, st.just("job"))
boots = st.builds(Boot, st.none() | trials, st.none() | reports, counts)


@given(boot=boots)
def test_boot_json_comes_back_as_it_was_written(boot: Boot) -> None:
    assert Boot.parse(boot.to_bytes()) == boot


@given(
    data=st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_whatever_stands_in_boot_json_parses_or_is_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        Boot.parse(data)


@given(boot=boots, current=st.none() | names, previous=st.none() | names, whole=st.sets(names))
def test_something_whole_starts_whenever_there_is_something_whole(
    boot: Boot, current: str | None, previous: str | None, whole: set[str]
) -> None:
    plan = decide(boot, current, previous, whole, whole.__contains__)

    if not whole:
        assert plan is None
        return
    assert plan
    assert {plan.release, plan.instead} <= whole
    trial = plan.boot.trial
    if trial and plan.release == trial.release == current:
        assert boot.trial
        assert trial.attempts == boot.trial.attempts + 1
        others = whole - {trial.release}
        assert plan.instead != trial.release or not others
        assert trial.attempts <= trial.limit or not others
    if trial is None and boot.rolled_back and plan.release == boot.rolled_back.release:
        assert whole == {plan.release} or current != boot.rolled_back.release


@given(boot=boots, current=names, previous=st.none() | names, whole=st.sets(names, min_size=1))
def test_a_loop_of_crashes_comes_to_rest(
    boot: Boot, current: str | None, previous: str | None, whole: set[str]
) -> None:
    """Whatever the disk says at first: sooner or later one release stays, in safe mode, and nothing is written more."""
    for _ in range(20):
        plan = decide(boot, current, previous, whole, whole.__contains__)
        assert plan
        rest = (plan.boot, plan.release) == (boot, current)
        boot, current = plan.boot, plan.release

    assert rest or whole == {current}


def test_versions_are_compared_as_numbers() -> None:
    assert sorted([NEW, OLDER, "1.9.0-0000000d"], key=launcher.age) == [OLDER, "1.9.0-0000000d", NEW]
