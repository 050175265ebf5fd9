"""What became of an update that failed, was killed or lost its power at any phase: the exact reports, and what runs.

{error, kill, power cut} × {every phase, at its beginning, in its middle, at its end} × {full, delta} × {roll back works,
fails} × {cancelled meanwhile or not}. The expected reports are told by `expected`, which knows the phases' order and the
rules of docs/adr/0043 only, and nothing of the state machine.
"""

import itertools
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from firmware_agent import files, launcher
from tests.firmware_agent.jobs.world import DELTA, FULL, SERIAL, Cut, Disks, Goods, Unit, Web, plugged
from tests.firmware_agent.jobs_service import JobsService, LocalLink

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
    Case(*case) for case in itertools.product(PHASES, FAULTS, ("full", "delta"), (True, False), (False, True))
]  # fmt: skip


@dataclass(frozen=True)
class Expected:
    reports: list[str]
    status: str
    new_runs: bool


def expected(case: Case) -> Expected:
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
    if case.cancelled:
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

    def __init__(self, case: Case, unit: Unit, service: JobsService, link: LocalLink, monkeypatch: pytest.MonkeyPatch):
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
        link.before = self._before

    def play(self) -> str:
        """The release that runs in the end."""
        with plugged(self.unit.root, self._monkeypatch) as self.plug:
            disks = Disks(self.unit.root, self.plug)
            while True:
                self.boots += 1
                assert self.boots < 12, "it does not come to rest"
                self.plug.dead, self.plug.left = False, None
                stop = threading.Event()
                self.link.idle = lambda stop=stop: self._rest(stop)
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

    def _before(self, topic: str, body: object) -> None:
        assert isinstance(body, dict)
        if self.case.phase == "report" and body.get("status") in {"SUCCEEDED", "FAILED", "REJECTED"}:
            if self.case.fault == "error" and not self.struck:
                # Lost on the way there, or on the way back.
                if self.case.works:
                    self.link.lose_requests = 1
                else:
                    self.link.lose_answers = 1
            self._strike("begin")

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
        if self.case.phase == "report":
            when = "begin"
        if when == "middle" and moment == "begin":
            self.plug.left = MIDDLE.get(self.case.phase, 2)
        elif when == moment or (when == "middle" and moment == "end"):
            self.struck = True
            self.plug.pull()


    def _cancel(self) -> None:
        """While the unit is at the phase, or down because of it."""
        if self.case.cancelled and self.service.status(JOB, SERIAL) != "CANCELED":
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
