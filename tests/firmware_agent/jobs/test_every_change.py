"""The matrix strikes at phases; here a process dies at every single change of the disk in the life of an update."""

import functools
import threading
from pathlib import Path

import pytest

from tests.firmware_agent.jobs.test_matrix import JOB, document
from tests.firmware_agent.jobs.world import DELTA, FULL, SERIAL, Cut, Disks, Goods, Unit, Web, plugged
from tests.firmware_agent.jobs_service import JobsService, LocalLink


class Life:
    """One update, with a death at the `fatal`-th change of the disk."""

    def __init__(self, unit: Unit, service: JobsService, link: LocalLink) -> None:
        self.unit = unit
        self.service = service
        self.link = link

    def play(self, monkeypatch: pytest.MonkeyPatch, fatal: int | None, *, cut: bool) -> tuple[str, int]:
        """The release that runs in the end, and how many changes there were until it died, or in all."""
        with plugged(self.unit.root, monkeypatch) as plug:
            disks = Disks(self.unit.root, plug)
            plug.left = fatal
            deaths = 0
            while True:
                stop = threading.Event()
                self.link.idle = functools.partial(self._rest, stop)
                try:
                    name = self.unit.start()
                    if not self.unit.process(name, stop):
                        return name, plug.count
                except Cut:
                    deaths += 1
                    assert deaths == 1
                    plug.dead, plug.left = False, None
                    if cut:
                        disks.lose()

    def _rest(self, stop: threading.Event) -> None:
        stop.set()
        assert self.unit.runner is not None
        self.unit.runner.wake()


def live(goods: Goods, web: Web, root: Path, *, delta: bool, healthy: bool) -> Life:
    service = JobsService()
    link = LocalLink(service, SERIAL)
    unit = Unit.make(root, goods, link)
    unit.healthy = healthy
    urls = {FULL: f"{web.url}/{FULL}"} | ({DELTA: f"{web.url}/{DELTA}"} if delta else {})
    service.create(JOB, document(urls), SERIAL)
    return Life(unit, service, link)


@pytest.mark.parametrize("cut", [False, True], ids=["kill", "power-cut"])
@pytest.mark.parametrize(("delta", "healthy"), [(True, True), (False, False)], ids=["delta-good", "full-bad"])
def test_one_death_anywhere_changes_nothing_of_the_end(
    goods: Goods, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delta: bool, healthy: bool, cut: bool
) -> None:
    made = functools.partial(live, goods, web, delta=delta, healthy=healthy)
    wanted, changes = made(tmp_path / "whole").play(monkeypatch, None, cut=cut)
    assert wanted == (goods.new if healthy else goods.old.name)
    assert changes > 100

    for fatal in range(changes):
        life = made(tmp_path / str(fatal))

        runs, _ = life.play(monkeypatch, fatal, cut=cut)

        assert (fatal, runs) == (fatal, wanted)
        assert life.service.status(JOB, SERIAL) == ("SUCCEEDED" if healthy else "FAILED"), fatal
        assert life.unit.orphans() == set(), fatal
        assert life.unit.journal()["stage"] == "closed", fatal
