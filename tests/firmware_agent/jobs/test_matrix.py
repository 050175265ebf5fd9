"""What became of an update that failed, was killed or lost its power at any phase: the exact reports, and what runs.

By {error, kill, power cut} and {every phase, at its beginning, in its middle, at its end} and {full, delta} and {roll
back works, fails} and {cancelled meanwhile or not}. The expected reports are told by `expected`, which knows the
order of the phases and the rules of docs/adr/0043, and nothing of the state machine.
"""

import functools
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import pytest

from firmware_agent import files, launcher
from tests.firmware_agent.jobs.world import DELTA, FULL, SERIAL, Cut, Disks, Goods, Unit, Web, plugged
from tests.firmware_agent.jobs_service import JobsService, LocalLink

ROOT = Path(__file__).parents[3]
JOB = "job-1"
UNBOUND = ("check", "download", "install")
FORWARD = (*UNBOUND, "switch", "prove", "commit")
UNDO = ("roll-back", "back")
PHASES = (*FORWARD, *UNDO, "clean-up", "report")
FAULTS = ("error", *(f"{how} {moment}" for how in ("kill", "cut") for moment in ("begin", "middle", "end")))

CODES = {"check": "download", "download": "download", "prove": "unhealthy"}


@dataclass(frozen=True)
class Case:
    phase: str
    fault: str
    payload: str
    works: bool
    cancelled: bool

    def __str__(self) -> str:
        words = [self.phase, self.fault.replace(" ", "-"), self.payload]
        words += [] if self.works else ["no-way-back"]
        return "-".join(words + (["cancelled"] if self.cancelled else []))

    @property
    def healthy(self) -> bool:
        """To come to the undo phases, a release has to be bad."""
        return self.phase not in UNDO


CASES = [
    Case(*case)
    for case in itertools.product(PHASES, FAULTS, ("full", "delta"), (True, False), (False, True))
    if not (case[0] == "report" and case[1].endswith("middle"))  # a report has no middle
]


@dataclass(frozen=True)
class Expected:
    reports: list[str]
    status: str
    new_runs: bool


def expected(case: Case) -> Expected:  # noqa: PLR0911 - one rule after the other
    """By the rules, not by the code."""
    error = case.fault == "error"
    reports: list[str] = []
    for phase in UNBOUND:
        reports.append(f"IN_PROGRESS {phase}")
        if phase != case.phase:
            continue
        if case.cancelled:  # found out by the failure's report, or by asking after the restart
            return Expected(reports, "CANCELED", new_runs=False)
        if error:
            return Expected([*reports, f"FAILED {CODES.get(phase, 'install')}"], "FAILED", new_runs=False)
        reports.append(f"IN_PROGRESS {phase}")  # again, after the restart
    reports.append("IN_PROGRESS switch")
    silent = case.cancelled and case.phase == "switch"
    if case.phase == "switch" and error:
        # Nothing was switched yet, so there is a way back whatever became of the release before.
        told = [] if silent else ["FAILED install"]
        return Expected(reports + told, "CANCELED" if silent else "FAILED", new_runs=False)
    if case.healthy and not (case.phase == "prove" and error):
        twice = case.phase == "prove" and not case.fault.endswith("begin")  # it was interrupted after its report
        heard = not case.cancelled or case.phase not in {"switch", "prove"}
        reports += ["IN_PROGRESS prove"] * (twice + heard)
    stuck = not case.works or (case.phase == "roll-back" and error)
    if case.cancelled and not (case.phase == "report" and case.fault.endswith("end")):  # that would be too late
        fails = not case.healthy or (error and case.phase in {"prove", "commit"})
        return Expected(reports, "CANCELED", new_runs=not fails or stuck)
    if not case.healthy:
        return Expected([*reports, "FAILED unhealthy"], "FAILED", new_runs=stuck)
    if error and case.phase in {"prove", "commit"}:
        code = CODES.get(case.phase, "install")
        return Expected([*reports, f"FAILED {code}"], "FAILED", new_runs=not case.works)
    return Expected([*reports, "SUCCEEDED"], "SUCCEEDED", new_runs=True)


class Player:
    """Plays one case: boots the unit as systemd would, until it has nothing to do."""

    def __init__(
        self, case: Case, unit: Unit, service: JobsService, link: LocalLink, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.case = case
        self.old = unit.releases.current()
        self.unit = unit
        self.service = service
        self.link = link
        self.struck = False
        self.boots = 0
        self._monkeypatch = monkeypatch
        unit.hook = self._hook
        unit.healthy = case.healthy
        link.before = lambda _topic, body: self._reporting("begin", body)
        link.after = lambda _topic, body: self._reporting("end", body)

    def play(self) -> str:
        """The release that runs in the end."""
        with plugged(self.unit.root, self._monkeypatch) as self.plug:
            disks = Disks(self.unit.root, self.plug)
            while True:
                self.boots += 1
                assert self.boots < 12, "it does not come to rest"
                self.plug.dead, self.plug.left = False, None
                stop = threading.Event()
                self.link.idle = functools.partial(self._rest, stop)
                try:
                    name = self.unit.start()
                    again = self.unit.process(name, stop)
                except Cut:
                    self.struck = True
                    self._cancel()
                    if self.case.fault.startswith("cut"):
                        disks.lose()
                    continue
                if not again:
                    return name

    def _rest(self, stop: threading.Event) -> None:
        stop.set()
        assert self.unit.runner is not None
        self.unit.runner.wake()

    def _hook(self, moment: str, phase: str) -> None:
        if phase == "prove" and moment == "begin" and not self.case.works:
            program = self.unit.opt / f"releases/{self.old}" / "firmware_agent/__main__.py"
            files.remove(program)
            files.sync_directory(program.parent)
        if phase == self.case.phase:
            self._strike(moment)

    def _reporting(self, moment: str, body: Mapping[str, Any]) -> None:
        """The last report is made: `begin` before the service has it, `end` after."""
        if self.case.phase != "report" or body.get("status") not in {"SUCCEEDED", "FAILED", "REJECTED"}:
            return
        if self.case.fault == "error" and moment == "begin" and not self.struck:
            # Lost on the way there, or on the way back.
            self.link.lose_requests, self.link.lose_answers = (1, 0) if self.case.works else (0, 1)
        self._strike(moment)

    def _strike(self, moment: str) -> None:
        if self.struck and not (self.case.fault == "error" and self.case.phase != "report"):
            return
        how, _, when = self.case.fault.partition(" ")
        if how == "error":
            self.struck = True
            self._cancel()
            if self.case.phase != "report" and moment == "begin":
                raise OSError(5, "Input/output error")
            return
        if when == "middle" and moment == "begin":
            self.plug.left = MIDDLE.get(self.case.phase, 2)
        elif when == moment or (when == "middle" and moment == "end"):
            self.struck = True
            self.plug.pull()

    def _cancel(self) -> None:
        """While the unit is at the phase, or down because of it."""
        if self.case.cancelled and self.service.status(JOB, SERIAL) == "IN_PROGRESS":
            self.service.cancel(JOB, SERIAL, force=True)


#: How many changes of the disk a phase may make before its middle; a phase that makes fewer is struck at its end.
MIDDLE = {"download": 9, "install": 25, "switch": 7, "commit": 4, "roll-back": 5, "clean-up": 4}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_update_that_is_disturbed_ends_as_the_rules_say(
    case: Case, goods: Goods, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = JobsService()
    link = LocalLink(service, SERIAL)
    unit = Unit.make(tmp_path / "disk", goods, link)
    urls = {FULL: f"{web.url}/{FULL}"} | ({DELTA: f"{web.url}/{DELTA}"} if case.payload == "delta" else {})
    service.create(JOB, document(urls), SERIAL)
    player = Player(case, unit, service, link, monkeypatch)
    asked = len(web.asked)

    runs = player.play()

    wanted = expected(case)
    assert reports(service) == wanted.reports
    assert service.status(JOB, SERIAL) == wanted.status
    assert runs == (goods.new if wanted.new_runs else goods.old.name)
    assert unit.orphans() == set()
    assert unit.journal()["stage"] == "closed"
    assert player.struck
    assert set(web.asked[asked:]) <= {f"/{DELTA if case.payload == 'delta' else FULL}"}


def test_what_the_launcher_decides_is_what_the_launcher_starts(
    goods: Goods, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of the matrix, with the launcher as the image has it: a program of its own."""
    for number, (phase, works) in enumerate([("install", True), ("commit", True), ("back", True), ("back", False)]):
        case = Case(phase, "kill end", "delta", works, cancelled=False)
        service = JobsService()
        link = LocalLink(service, SERIAL)
        unit = Unit.make(tmp_path / str(number), goods, link)
        service.create(JOB, document({FULL: f"{web.url}/{FULL}", DELTA: f"{web.url}/{DELTA}"}), SERIAL)

        runs = Player(case, unit, service, link, monkeypatch).play()

        command = [
            sys.executable,
            "-I",
            "-S",
            launcher.__file__,
            "--releases",
            unit.opt,
            "--state",
            unit.state,
            "--",
            "run",
        ]
        said = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
        assert said == f"{runs} run\n"


KILLED = [
    Case(phase, f"kill {moment}", payload, works=True, cancelled=False)
    for phase, moment, payload in (
        ("download", "middle", "full"),
        ("install", "middle", "delta"),
        ("switch", "middle", "full"),
        ("prove", "end", "full"),
        ("commit", "middle", "delta"),
        ("roll-back", "middle", "full"),
        ("clean-up", "begin", "full"),
    )
]


@pytest.mark.parametrize("case", KILLED, ids=str)
def test_a_process_that_is_really_killed_leaves_the_same(case: Case, goods: Goods, web: Web, tmp_path: Path) -> None:
    service = JobsService()
    unit = Unit.make(tmp_path / "disk", goods, LocalLink(service, SERIAL))
    urls = {FULL: f"{web.url}/{FULL}"} | ({DELTA: f"{web.url}/{DELTA}"} if case.payload == "delta" else {})
    service.create(JOB, document(urls), SERIAL)

    ends = run_processes(case, unit, service)

    wanted = expected(case)
    assert ends.count(-9) == 1
    assert reports(service) == wanted.reports
    assert service.status(JOB, SERIAL) == wanted.status
    assert unit.start() == (goods.new if wanted.new_runs else goods.old.name)
    assert unit.orphans() == set()


def run_processes(case: Case, unit: Unit, service: JobsService) -> list[int]:
    """Processes of the agent one after the other, the first one that comes to the phase killed; their exit codes."""
    ends: list[int] = []
    with listening(service) as address:
        while True:
            assert len(ends) < 8, "it does not come to rest"
            left = "" if -9 in ends else f"{case.phase} {case.fault.split()[1]} {MIDDLE.get(case.phase, 2)}"
            facts = [str(unit.root), address, str(case.healthy), json.dumps(asdict(unit.target)), left]
            command = [sys.executable, "-m", "tests.firmware_agent.jobs.process", *facts]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            ends.append(done.returncode)
            if done.returncode == 0:
                return ends
            assert done.returncode in (5, -9), done.stderr


@contextmanager
def listening(service: JobsService) -> Iterator[str]:
    """The service at a socket; one process after the other may ask."""
    with Listener(family="AF_UNIX") as listener:

        def serve() -> None:
            while True:
                with suppress(EOFError, ConnectionError), listener.accept() as asker:
                    while (asked := asker.recv()) is not None:
                        asker.send(service.handle(*asked))
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(listener.address)
        finally:
            with Client(str(listener.address)) as end:
                end.send(None)
            thread.join()


def document(urls: dict[str, str]) -> dict[str, object]:
    return {
        "picket": 1,
        "operation": "update",
        "product": "picket",
        "target": FULL,
        "version": "1.1.0",
        "metadata": "https://updates.example/metadata/",
        "urls": urls,
    }


def reports(service: JobsService) -> list[str]:
    """What was told, without progress within a phase."""
    return [told.short for told in service.told if "progress" not in told.details]
