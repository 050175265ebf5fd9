"""The kind `update`, beyond the matrix: what is refused, what is fetched, what a trial has to prove."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from firmware_agent.jobs.update import Limits
from tests.firmware_agent.jobs.world import DELTA, FULL, SERIAL, Goods, Unit, Web
from tests.firmware_agent.jobs_service import JobsService, LocalLink


@dataclass
class Field:
    """A unit in the field, and the cloud."""

    unit: Unit
    service: JobsService
    link: LocalLink
    web: Web
    started: list[str] = field(default_factory=list)

    def offer(self, job: str = "job-1", **changes: Any) -> None:
        urls = {FULL: f"{self.web.url}/{FULL}", DELTA: f"{self.web.url}/{DELTA}"}
        self.service.create(job, self.document(urls=urls) | changes, SERIAL)

    def document(self, **changes: Any) -> dict[str, Any]:
        return {
            "picket": 1,
            "operation": "update",
            "product": "picket",
            "target": FULL,
            "version": "1.1.0",
            "metadata": "https://updates.example/metadata/",
        } | changes

    def live(self, crashes: Callable[[str], bool] = lambda _: False) -> str:
        """Start the unit, as systemd does, until it has nothing to do; a release that crashes does nothing at all."""
        while True:
            assert len(self.started) < 12, "it does not come to rest"
            name = self.unit.start()
            self.started.append(name)
            if crashes(name):
                continue
            stop = threading.Event()

            def rest(stop: threading.Event = stop) -> None:
                stop.set()
                assert self.unit.runner is not None
                self.unit.runner.wake()

            self.link.idle = rest
            if not self.unit.process(name, stop):
                return name

    @property
    def reports(self) -> list[str]:
        return [told.short for told in self.service.told if "progress" not in told.details]

    def reason(self) -> str:
        return self.service.told[-1].details["reason"]


@pytest.fixture
def away(goods: Goods, web: Web, tmp_path: Path) -> Field:
    service = JobsService()
    link = LocalLink(service, SERIAL)
    web.asked.clear()
    return Field(Unit.make(tmp_path / "disk", goods, link), service, link, web)


WHOLE = [*(f"IN_PROGRESS {phase}" for phase in ("check", "download", "install", "switch", "prove")), "SUCCEEDED"]


def test_a_delta_is_fetched_instead_of_the_full_archive_and_the_floor_rises(away: Field, goods: Goods) -> None:
    away.offer()

    assert away.live() == goods.new

    assert away.reports == WHOLE
    assert away.web.asked == [f"/{DELTA}"]
    assert json.loads((away.unit.state / "floor.json").read_bytes())["security"] == {"agent": 2}
    assert away.unit.releases.previous() == goods.old.name
    assert away.service.told[-1].details == {"release": goods.new}


def test_a_release_that_runs_already_succeeds_without_a_restart(away: Field, goods: Goods) -> None:
    away.offer()
    away.live()
    away.offer("job-2")
    away.started.clear()

    away.live()

    assert away.started == [goods.new]
    assert away.reports == [*WHOLE, "IN_PROGRESS check", "SUCCEEDED"]


def test_a_release_that_lies_here_already_is_not_fetched(away: Field, goods: Goods) -> None:
    away.offer()
    away.live()
    away.unit.target = replace(goods.target, version="1.0.0", tar_sha256=goods.old.tar.sha256, security_version=2)
    away.unit.target = replace(away.unit.target, tar_size=goods.old.tar.size)
    away.offer("back", version="1.0.0")
    away.web.asked.clear()

    assert away.live() == goods.old.name

    assert away.web.asked == []
    assert away.reports[-1] == "SUCCEEDED"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"hardware": ("raspberrypi,5-model-b",)}, "wrong-hardware", "raspberrypi,5-model-b"),
        ({"product": "toaster"}, "wrong-product", "toaster"),
        ({"security_version": 0}, "downgrade", "floor"),
        ({"min_from": "1.0.5"}, "not-possible", "1.0.5"),
        ({"version": "1.3.0"}, "bad-document", "1.3.0"),
    ],
)
def test_what_is_signed_but_not_for_this_unit_is_rejected_before_the_download(
    away: Field, goods: Goods, changes: dict[str, Any], code: str, words: str
) -> None:
    away.unit.target = replace(goods.target, **changes)
    away.offer()

    assert away.live() == goods.old.name

    assert away.reports == ["IN_PROGRESS check", f"REJECTED {code}"]
    assert words in away.reason()
    assert away.web.asked == []


def test_a_disk_without_room_fails_before_the_download(away: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    away.offer()

    away.live()

    assert away.reports == ["IN_PROGRESS check", "FAILED no-space"]
    assert away.web.asked == []


def test_an_agent_that_was_not_started_from_a_release_takes_none(away: Field) -> None:
    update = away.unit.update
    away.unit.kinds = lambda _: [update(None)]  # type: ignore[arg-type]
    away.offer()

    away.live()

    assert away.reports == ["IN_PROGRESS check", "REJECTED not-possible"]


@pytest.mark.parametrize("damage", ["missing", "wrong bytes", "wrong base", "not told"])
def test_a_delta_that_is_of_no_use_is_followed_by_the_full_archive(away: Field, goods: Goods, damage: str) -> None:
    document = away.document(urls={FULL: f"{away.web.url}/{FULL}", DELTA: f"{away.web.url}/{DELTA}"})
    match damage:
        case "missing":
            document["urls"][DELTA] = f"{away.web.url}/nowhere"
        case "wrong bytes":
            document["urls"][DELTA] = f"{away.web.url}/{FULL}"
        case "wrong base":
            program = away.unit.releases.path(goods.old.name) / "firmware_agent/__main__.py"
            program.chmod(0o644)
            program.write_text(program.read_text() + "\n")
        case _:
            del document["urls"][DELTA]
    away.service.create("job-1", document, SERIAL)

    assert away.live() == goods.new

    assert away.reports == WHOLE
    assert f"/{FULL}" in away.web.asked
    assert away.unit.orphans() == set()


def test_an_expired_url_is_asked_for_anew_and_the_download_goes_on(away: Field, goods: Goods) -> None:
    asked = []

    def document() -> dict[str, Any]:
        asked.append(1)
        query = "?stale" if len(asked) <= 4 else "?fresh"
        return away.document(urls={FULL: f"{away.web.url}/{FULL}{query}"})

    away.service.create("job-1", document, SERIAL)

    assert away.live() == goods.new

    assert away.reports == WHOLE
    assert len(asked) > 4


def test_urls_that_are_always_expired_fail(away: Field) -> None:
    away.offer(urls={FULL: f"{away.web.url}/{FULL}?stale"})

    away.live()

    assert away.reports == ["IN_PROGRESS check", "IN_PROGRESS download", "FAILED download"]
    assert "?" not in away.reason()


def test_a_release_that_dies_at_every_start_is_given_up_by_the_launcher_and_reported(away: Field, goods: Goods) -> None:
    away.offer()

    assert away.live(crashes=lambda name: name == goods.new) == goods.old.name

    assert away.started == [goods.old.name, *[goods.new] * 3, goods.old.name]
    assert away.reports == [*WHOLE[:4], "FAILED crashed"]
    assert "did not prove itself in 3 starts" in away.reason()
    assert away.unit.orphans() == set()
    assert away.unit.releases.rolled_back() is None


@pytest.mark.parametrize("healthy", [True, False])
def test_only_the_commit_stops_the_launchers_timer(away: Field, *, healthy: bool) -> None:
    away.unit.limits = replace(away.unit.limits, health_seconds=0.5, soft_seconds=7200.0)
    away.unit.healthy = healthy
    away.offer()

    away.live()

    gate, *then = away.unit.deadlines
    assert gate > 7200
    assert then == ([0] if healthy else [])


def test_a_release_that_dies_once_and_then_proves_itself_is_kept(away: Field, goods: Goods) -> None:
    away.offer()

    assert away.live(crashes=lambda name: name == goods.new and away.started.count(name) == 1) == goods.new

    assert away.reports == WHOLE


def test_a_release_that_does_not_reach_the_cloud_comes_back_if_the_one_before_did(away: Field, goods: Goods) -> None:
    away.offer()
    connected = away.link.connected

    def hook(moment: str, phase: str) -> None:
        if (moment, phase) == ("begin", "prove"):
            away.link.up = False
        if (moment, phase) == ("end", "prove"):
            away.link.up = True

    away.unit.hook = hook
    assert connected()

    assert away.live() == goods.old.name

    assert away.reports == [*WHOLE[:4], "FAILED unhealthy"]
    assert "does not reach the cloud" in away.reason()


def test_a_release_is_kept_offline_if_the_one_before_was_offline_when_it_switched(away: Field, goods: Goods) -> None:
    away.offer()

    def hook(moment: str, phase: str) -> None:
        if (moment, phase) == ("begin", "switch"):
            away.link.up = False
        if phase == "clean-up":
            away.link.up = True

    away.unit.hook = hook

    assert away.live() == goods.new

    assert away.reports == [*WHOLE[:4], "SUCCEEDED"]


def test_an_unhealthy_moment_within_the_time_is_forgiven(away: Field, goods: Goods) -> None:
    away.offer()
    away.unit.limits = Limits(5.0, 5.0, 3)
    update = away.unit.update
    moments = iter(["the spool is locked"])

    def kinds(name: str) -> list[Any]:
        kind = update(name)
        kind._health = lambda: next(moments, None)  # type: ignore[attr-defined]
        return [kind]

    away.unit.kinds = kinds

    assert away.live() == goods.new


@pytest.mark.parametrize("healthy", [True, False])
def test_a_trial_whose_journal_is_lost_is_still_proved_or_rolled_back(away: Field, goods: Goods, healthy: bool) -> None:
    away.offer()
    away.unit.healthy = healthy

    def hook(moment: str, phase: str) -> None:
        if (moment, phase) == ("end", "switch"):
            shutil.rmtree(away.unit.state / "jobs")
            raise KeyboardInterrupt

    away.unit.hook = hook
    with pytest.raises(KeyboardInterrupt):
        away.live()
    away.unit.hook = lambda _moment, _phase: None

    assert away.live() == (goods.new if healthy else goods.old.name)

    ends = ["IN_PROGRESS prove", "SUCCEEDED"] if healthy else ["FAILED unhealthy"]
    assert away.reports == [*WHOLE[:4], *ends]
    assert away.unit.orphans() == set()


def test_the_step_timer_covers_a_trial_with_all_its_starts(away: Field) -> None:
    away.unit.limits = Limits(120.0, 900.0, 3)
    away.offer()
    away.unit.hook = lambda moment, phase: None

    away.live()

    minutes = {told.details.get("phase"): told.minutes for told in away.service.told}
    assert minutes["switch"] == 3 * 2 + 15 + 10


def test_no_url_reaches_the_disk(away: Field) -> None:
    secret = "X-Amz-Signature=5ecret"
    away.offer(urls={FULL: f"{away.web.url}/{FULL}?{secret}"})
    seen: list[bytes] = []

    def hook(moment: str, phase: str) -> None:
        seen.extend(path.read_bytes() for path in away.unit.state.rglob("*") if path.is_file())

    away.unit.hook = hook
    away.live()

    assert seen
    assert not any(b"5ecret" in content or b"http" in content for content in seen)
