"""An OS update from the job to the slot: the agent's job, root's helper over its socket, a medium with two slots."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from firmware_agent.jobs.os_update import OsUpdate, Refused
from firmware_agent.jobs.runner import Runner
from firmware_agent.jobs.update import Limits
from firmware_agent.slots import NoAnswer, SlotsFault, UnitSlots, image_security_version
from firmware_agent.update import download
from firmware_agent.update.floor import read_floor, write_floor
from firmware_agent.update.target import Payload, Running, Target
from image.files.usr.lib.picket.slots import service as helper
from tests.firmware_agent.jobs.world import HARDWARE, SERIAL, Cut, Goods, SignedTargets, Watched, Web
from tests.firmware_agent.jobs_service import JobsService, LocalLink
from tests.image.slots.world import Kit, World

IMAGE = "os/picket-1.1.0.os.tar"
JOB = "job-1"


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit.make(tmp_path_factory.mktemp("kit"))


@contextlib.contextmanager
def listening(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[Path]:
    """What systemd does for the helper: a socket, and one call for each connection."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = server.accept()
                    with peer:
                        answer(peer)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield path
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            path.unlink()


class Slots(UnitSlots):
    """A restart takes the process with it, as systemd's does."""

    def restart(self) -> None:
        super().restart()
        raise Cut


@dataclass
class Unit:
    """The agent of a unit, process after process and boot after boot."""

    world: World
    state: Path
    socket: Path
    target: Target
    service: JobsService
    link: LocalLink
    ends: str = "well"
    strike: tuple[str, str] | None = None
    power: bool = False
    boots: int = 1
    struck: bool = False

    @property
    def request(self) -> Path:
        return self.state / "reboot-request"

    def kind(self) -> OsUpdate:
        image = self.world.running()
        unwell = self.ends == "unhealthy" and self.world.booted == "b"
        return OsUpdate(
            Slots(self.socket, self.request, pause=0.0),
            Running(image.version, image.security_version, (HARDWARE,)),
            lambda: str(self.boots),
            SignedTargets({IMAGE: self.target}, self.state / "floor.json"),
            self.link,
            lambda: "no sensor" if unwell else None,
            Limits(0.0, 0.0, 3),
            get=functools.partial(download.download, delay=lambda _: 0.0),
        )

    def live(self) -> None:
        """Until there is nothing to do."""
        for _ in range(30):
            if self.world.booted == "b" and self.ends in {"dies", "hangs"}:
                if self.ends == "hangs":
                    assert self.world.slots().end_trial()
                self.boot()
                continue
            try:
                self.process()
            except Cut:
                if self.request.exists():
                    self.request.unlink()
                    self.boot()
                elif self.power:
                    self.boot(power_cut=True)
            else:
                return
        raise AssertionError("it does not come to rest")

    def boot(self, *, power_cut: bool = False) -> None:
        self.boots += 1
        while self.world.boot(power_cut=power_cut):
            self.boots += 1

    def process(self) -> None:
        stop = threading.Event()
        kind = Watched(self.kind(), self._hook)
        runner = Runner(self.link, self.state / "jobs", [kind], product="picket", leave=lambda: None)

        def rest() -> None:
            stop.set()
            runner.wake()

        self.link.idle = rest
        runner.run(stop)

    def _hook(self, moment: str, phase: str) -> None:
        if (moment, phase) == self.strike and not self.struck:
            self.struck = True
            raise Cut

    def told(self) -> tuple[str, str]:
        last = self.service.told[-1]
        return last.status, last.details.get("code", "")


def payload(path: str, data: bytes) -> Payload:
    pieces = [data[at : at + 65536] for at in range(0, len(data), 65536)]
    digests = tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
    return Payload(path, len(data), hashlib.sha256(data).hexdigest(), 65536, digests)


@contextlib.contextmanager
def unit(tmp_path: Path, kit: Kit, goods: Goods, web: Web, how: str, *, counted: bool, **more: Any) -> Iterator[Unit]:
    world = World.make(tmp_path / "disk", kit, how, counted=counted)
    state = tmp_path / "state"
    state.mkdir()
    bundle = more.pop("bundle", world.image("1.1.0").bundle)
    web.content[f"/{IMAGE}"] = bundle
    target = replace(
        goods.target, kind="os", version="1.1.0", security_version=2, full=payload(IMAGE, bundle), delta=None
    )
    service = JobsService()
    urls = {IMAGE: f"{web.url}/{IMAGE}"}
    service.create(
        JOB,
        {"picket": 1, "operation": "os-update", "product": "picket", "target": IMAGE, "version": "1.1.0",
         "metadata": "https://updates.example/", "urls": urls},
        SERIAL,
    )  # fmt: skip
    with listening(tmp_path / "slots.sock", lambda peer: helper.serve(peer, world.slots)) as path:
        yield Unit(world, state, path, target, service, LocalLink(service, SERIAL), **more)


KINDS = [(how, counted) for how in ("autoboot", "os-prefix") for counted in (False, True)]


@pytest.mark.parametrize(("how", "counted"), KINDS)
@pytest.mark.parametrize("ends", ["well", "unhealthy", "dies", "hangs"])
def test_a_job_ends_with_the_new_image_kept_or_the_old_one_back(
    tmp_path: Path, kit: Kit, goods: Goods, web: Web, how: str, counted: bool, ends: str
) -> None:
    with unit(tmp_path, kit, goods, web, how, counted=counted, ends=ends) as one:
        one.live()

        status = one.world.slots().status()
        phases = [told.short for told in one.service.told if "progress" not in told.details]
    floor = read_floor(one.state / "floor.json").security.get("os")
    assert phases[:4] == [f"IN_PROGRESS {phase}" for phase in ("check", "download", "install", "switch")]
    if ends == "well":
        assert one.told() == ("SUCCEEDED", "")
        assert (one.world.booted, one.world.chosen(), floor, status["floor"]) == ("b", "b", 2, 2)
        assert one.world.running().version == "1.1.0"
    else:
        assert one.told() == ("FAILED", "unhealthy" if ends == "unhealthy" else "crashed")
        assert (one.world.booted, one.world.chosen(), floor, status["floor"]) == ("a", "a", None, 1)
    assert status["trial"] is None
    assert not one.request.exists()
    assert [path.name for path in (one.state / "jobs").iterdir()] == ["journal.json"]


STRIKES = [
    (moment, phase)
    for phase in ("check", "download", "install", "switch", "prove", "commit", "clean-up", "roll-back")
    for moment in ("begin", "end")
]


@pytest.mark.parametrize("counted", [False, True], ids=["one try", "counted"])
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("strike", STRIKES, ids=" ".join)
def test_a_death_at_any_phase_leaves_one_of_the_two_ends(
    tmp_path: Path, kit: Kit, goods: Goods, web: Web, strike: tuple[str, str], power: bool, counted: bool
) -> None:
    ends = "unhealthy" if strike[1] == "roll-back" else "well"
    more = {"ends": ends, "strike": strike, "power": power}
    with unit(tmp_path, kit, goods, web, "autoboot", counted=counted, **more) as one:
        one.live()
        status = one.world.slots().status()

    assert one.struck or strike in {("end", "switch"), ("end", "roll-back")}
    assert status["trial"] is None
    assert not one.request.exists()
    assert one.world.chosen() == one.world.booted
    if one.told()[0] == "SUCCEEDED":
        assert (one.world.booted, one.world.running().version) == ("b", "1.1.0")
    else:
        assert one.told() in {("FAILED", "crashed"), ("FAILED", "unhealthy")}
        assert one.world.booted == "a"
    tried = strike[1] in {"prove", "commit"} or strike == ("end", "switch")
    if ends == "well" and (not power or not tried or counted):
        assert one.told()[0] == "SUCCEEDED"


@pytest.mark.parametrize(("how", "counted"), KINDS)
@pytest.mark.parametrize("power", [False, True], ids=["restart", "power cut"])
def test_a_restart_while_the_cloud_is_asked_does_not_cost_an_image_its_try(
    tmp_path: Path, kit: Kit, goods: Goods, web: Web, how: str, counted: bool, power: bool
) -> None:
    """The agent asks for consent between install and switch; that may take hours."""
    with unit(tmp_path, kit, goods, web, how, counted=counted, strike=("begin", "switch"), power=True) as one:
        with contextlib.suppress(Cut):
            one.process()
        assert (one.struck, one.world.booted) == (True, "a")
        for _ in range(3):
            one.boot(power_cut=power)
        one.live()

    assert one.told() == ("SUCCEEDED", "")
    assert one.world.booted == "b"


def test_an_image_whose_notes_were_lost_meanwhile_is_not_called_crashed(
    tmp_path: Path, kit: Kit, goods: Goods, web: Web
) -> None:
    with unit(tmp_path, kit, goods, web, "autoboot", counted=True, strike=("begin", "switch")) as one:
        with contextlib.suppress(Cut):
            one.process()
        (one.world.places.data / "slots.json").write_text("{")
        one.boot()
        one.live()

    assert one.told() == ("FAILED", "install")
    assert "nothing whole is installed in slot b" in one.service.told[-1].details["reason"]
    assert one.world.booted == "a"


def test_what_root_refuses_for_good_is_rejected(tmp_path: Path, kit: Kit, goods: Goods, web: Web) -> None:
    image = kit.images["autoboot", "1.1.0"]
    bundle = image.bundle.replace(b'"product": "picket"', b'"product": "ticket"')

    with unit(tmp_path, kit, goods, web, "autoboot", counted=False, bundle=bundle) as one:
        one.live()

    assert one.told() == ("REJECTED", "bad-signature")
    assert one.world.slots().status()["slots"]["b"] is None


def test_an_image_whose_agent_is_below_the_agents_floor_is_rejected_before_root_is_asked(
    tmp_path: Path, kit: Kit, goods: Goods, web: Web
) -> None:
    with unit(tmp_path, kit, goods, web, "autoboot", counted=False) as one:
        floor = one.state / "floor.json"
        one.target = replace(one.target, security_version=9)
        write_floor(floor, read_floor(floor).committed("agent", 5))
        one.live()

    assert one.told() == ("REJECTED", "downgrade")
    assert "its agent has security version 1" in one.service.told[-1].details["reason"]
    assert one.world.holds("b") == one.world.image("0.9.0")


# --- the conversation ---------------------------------------------------------------------------------------------


def test_progress_comes_through_and_what_it_raises_ends_the_question(tmp_path: Path) -> None:
    seen: list[float] = []
    lines = b'{"progress": 0.5}\n{"progress": "x"}\n{"progress": 7}\n{"ok": {"slot": "b"}}\n'

    def answer(peer: socket.socket) -> None:
        _, handles, _, _ = socket.recv_fds(peer, 4096, 4)
        for handle in handles:
            seen.append(float(os.fstat(handle).st_size))
            os.close(handle)
        peer.sendall(lines)

    def drop(_fraction: float) -> None:
        raise InterruptedError

    (tmp_path / "bundle").write_bytes(b"x" * 7)
    with listening(tmp_path / "socket", answer) as path:
        slots = UnitSlots(path, tmp_path / "request")
        slots.install(tmp_path / "bundle", seen.append)
        with pytest.raises(InterruptedError):
            slots.install(tmp_path / "bundle", drop)

    assert seen == [7.0, 0.5, 0.0, 1.0, 7.0]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (b"", NoAnswer),
        (b'{"ok": {}', NoAnswer),
        (b"[]\n", NoAnswer),
        (b'{"well": 1}\n', SlotsFault),
        (b'{"error": {"code": "io", "detail": "no"}}\n', SlotsFault),
        (b'{"error": {"code": "busy", "detail": "no"}}\n', SlotsFault),
        (b'{"error": {"code": "wrong-hardware", "detail": "no"}}\n', Refused),
        (b'{"error": {"code": "too-large", "detail": "no"}}\n', Refused),
        (b'{"error": 3}\n', SlotsFault),
    ],
)
def test_an_answer_that_is_none_is_a_fault(tmp_path: Path, lines: bytes, fault: type[Exception]) -> None:
    def answer(peer: socket.socket) -> None:
        for handle in socket.recv_fds(peer, 4096, 4)[1]:
            os.close(handle)
        peer.sendall(lines)

    (tmp_path / "bundle").write_bytes(b"x")
    with listening(tmp_path / "socket", answer) as path, pytest.raises(fault) as caught:
        UnitSlots(path, tmp_path / "request").install(tmp_path / "bundle", lambda _: None)
    assert type(caught.value) is fault


def test_what_may_be_asked_twice_is_asked_again_when_the_answer_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bytes] = []

    def answer(peer: socket.socket) -> None:
        asked.append(peer.recv(4096))
        peer.sendall(b'{"ok": {"booted": "b"}}\n' if len(asked) % 3 == 0 else b"")

    with listening(tmp_path / "socket", answer) as path, caplog.at_level(logging.ERROR):
        slots = UnitSlots(path, tmp_path / "request", pause=0.0)
        slots.keep()
        assert (slots.booted(), slots.other(), slots.booted()) == ("b", "a", "b")

    assert asked == [b'{"verb": "keep"}\n'] * 3 + [b'{"verb": "status"}\n'] * 3
    with pytest.raises(NoAnswer, match="cannot be asked"):
        UnitSlots(tmp_path / "socket", tmp_path / "request", pause=0.0).missing()


@pytest.mark.parametrize(("answer", "ended"), [(b'"it was late"', "it was late"), (b'""', ""), (b"null", None)])
def test_how_a_trial_ended_is_roots_word_or_a_fault(tmp_path: Path, answer: bytes, ended: str | None) -> None:
    def say(peer: socket.socket) -> None:
        peer.recv(4096)
        peer.sendall(b'{"ok": {"booted": "a", "ended": ' + answer + b"}}\n")

    with listening(tmp_path / "socket", say) as path:
        slots = UnitSlots(path, tmp_path / "request", pause=0.0)
        if ended is None:
            with pytest.raises(SlotsFault, match="ended by None"):
                slots.ended()
        else:
            assert slots.ended() == ended


def test_a_bundle_that_says_nothing_of_its_agent_is_refused(tmp_path: Path, kit: Kit) -> None:
    slots, path = UnitSlots(tmp_path / "none", tmp_path / "request"), tmp_path / "bundle"
    bundle = kit.images["autoboot", "1.1.0"].bundle
    path.write_bytes(bundle)
    assert slots.agent_security_version(path) == 1

    for data in (
        b"",
        b"x" * 5000,
        bundle[:700],
        bundle[2048:],
        bundle.replace(b'n": 1,\n "hardware', b'n":"1",\n "hardware'),
    ):
        path.write_bytes(data)
        with pytest.raises(Refused):
            slots.agent_security_version(path)


def test_the_images_security_version_is_the_builds(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    assert image_security_version(path) == 0
    path.write_text(json.dumps({"security_version": 4}))
    assert image_security_version(path) == 4
    path.write_text("[]")
    assert image_security_version(path) == 0
