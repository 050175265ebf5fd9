"""The other kinds: self-test, collect-logs, reboot, configure, os-update."""

import gzip
import shutil
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from firmware_agent import tuning
from firmware_agent.jobs import collect_logs, self_test
from firmware_agent.jobs.collect_logs import CollectLogs, UploadFault
from firmware_agent.jobs.configure import Configure
from firmware_agent.jobs.kind import Kind
from firmware_agent.jobs.os_update import NoSlots, OsUpdate
from firmware_agent.jobs.reboot import Reboot
from firmware_agent.jobs.self_test import SelfTest, Unwell, check_key, check_pir, check_spool, vital
from firmware_agent.jobs.update import Limits
from firmware_agent.spool import Spool
from firmware_agent.tuning import Tuning
from firmware_agent.update.floor import read_floor
from firmware_agent.update.target import Running, Target
from tests.firmware_agent.jobs.test_runner import Stand
from tests.firmware_agent.jobs.world import FULL, HARDWARE, SERIAL, Goods, SignedTargets, Web
from tests.firmware_agent.support import TestBoard


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path / "state")


def offer(stand: Stand, operation: str, **more: Any) -> None:
    stand.service.create("j", {"picket": 1, "operation": operation, "product": "picket", **more}, SERIAL)


# --- self-test ----------------------------------------------------------------------------------------------------


class Key:
    """A key that signs with another one than it shows, if told so."""

    def __init__(self, *, honest: bool = True) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._shown = self._key if honest else ec.generate_private_key(ec.SECP256R1())

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._shown.public_key()

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))


def checks(tmp_path: Path, key: Key, spool: Spool) -> dict[str, self_test.Check]:
    board = TestBoard()
    return {
        "pir": lambda: check_pir(lambda: 0),
        "key": lambda: check_key(key),
        "spool": lambda: check_spool(spool.probe, lambda: len(spool)),
        "disk": lambda: self_test.check_disk(board, tmp_path),
        "memory": lambda: self_test.check_memory(board, tmp_path),
        "clock": lambda: self_test.check_clock(board),
    }


def test_a_self_test_tells_what_each_check_has_seen(stand: Stand, tmp_path: Path) -> None:
    offer(stand, "self-test")
    with Spool(tmp_path / "spool.db") as spool:
        stand.process(SelfTest(checks(tmp_path, Key(), spool)))

    told = stand.service.told[-1]
    assert told.status == "SUCCEEDED"
    assert told.details["pir"] == "ok: the line reads low"
    assert told.details["key"] == "ok: signs"
    assert told.details["spool"] == "ok: keeps messages; 0 wait"
    assert told.details["clock"] == "ok: set by ntp"
    assert told.details["memory"] == "ok: 476 MiB free"


def test_a_self_test_that_finds_something_fails_and_tells_the_rest_all_the_same(stand: Stand, tmp_path: Path) -> None:
    offer(stand, "self-test")
    with Spool(tmp_path / "spool.db") as spool:
        stand.process(SelfTest(checks(tmp_path, Key(honest=False), spool)))

    told = stand.service.told[-1]
    assert (told.status, told.details["code"]) == ("FAILED", "unhealthy")
    assert told.details["reason"] == "not well: key"
    assert told.details["key"].startswith("bad: ")
    assert told.details["pir"].startswith("ok: ")


def test_the_health_gate_looks_at_what_an_alarm_needs_and_at_nothing_else() -> None:
    def bad() -> str:
        raise Unwell("broken")

    good = dict.fromkeys(("pir", "key", "spool"), lambda: "fine")

    assert vital(good | {"clock": bad})() is None
    assert vital(good | {"pir": bad})() == "pir: broken"


def test_a_spool_that_keeps_nothing_is_unwell() -> None:
    def probe() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(Unwell, match="could not be kept"):
        check_spool(probe, lambda: 0)


# --- collect-logs -------------------------------------------------------------------------------------------------

LOG = "2026-11-21 link: GET https://b.example/a?X-Amz-Signature=5ecret failed\n2026-11-21 texting +49 151 23456789\n"


def test_logs_are_redacted_packed_and_put_where_the_job_says(stand: Stand, web: Web) -> None:
    offer(stand, "collect-logs", upload=f"{web.url}/logs/1?sig=5ecret")

    stand.process(CollectLogs(lambda: LOG, lambda: "picket 1.2.0, armed\n"))

    text = gzip.decompress(web.content["/logs/1"]).decode()
    assert stand.reports[-1] == "SUCCEEDED"
    assert "==== status ====\npicket 1.2.0, armed\n" in text
    assert "https://b.example/a?[query] failed" in text
    assert "5ecret" not in text
    assert "23456789" not in text
    assert not list((stand.root / "jobs").glob("work*"))


def test_an_upload_url_that_has_expired_is_asked_for_anew(stand: Stand, web: Web) -> None:
    def document() -> dict[str, Any]:
        query = "fresh" if "IN_PROGRESS upload" in stand.reports else "stale"
        return {"picket": 1, "operation": "collect-logs", "product": "picket", "upload": f"{web.url}/logs/2?{query}"}

    stand.service.create("j", document, SERIAL)

    stand.process(CollectLogs(lambda: LOG, lambda: ""))

    assert stand.reports == ["IN_PROGRESS collect", "IN_PROGRESS upload", "SUCCEEDED"]
    assert "/logs/2" in web.content


def test_a_server_that_takes_nothing_fails_the_job_without_telling_the_url(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(stand, "collect-logs", upload=f"{web.url}/logs/3?stale")

    stand.process(CollectLogs(lambda: LOG, lambda: ""))

    assert stand.reports[-1] == "FAILED upload"
    assert stand.reason() == "upload: 127.0.0.1 does not take this URL: 403"


def test_half_of_the_log_is_better_than_none(stand: Stand, web: Web) -> None:
    def broken() -> str:
        raise UploadFault("journalctl ended with 1")

    offer(stand, "collect-logs", upload=f"{web.url}/logs/4")

    stand.process(CollectLogs(broken, lambda: "armed\n"))

    text = gzip.decompress(web.content["/logs/4"]).decode()
    assert "armed" in text
    assert "(not to be had: journalctl ended with 1)" in text


def test_the_end_of_a_long_log_is_taken_in_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "agent.log"
    path.write_text("".join(f"line {number} {'x' * 990}\n" for number in range(6000)))

    text = collect_logs.log_file(path)()

    assert len(text) <= collect_logs.MAX_BYTES
    assert text.startswith("line ")
    assert text.endswith("x\n")
    assert text.splitlines()[-1].startswith("line 5999 ")


def test_the_journal_is_asked_for_our_units_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "journalctl"
    program.write_text('#!/bin/sh\necho "asked: $@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    assert "--unit=picket-*" in collect_logs.journal()

    program.write_text("#!/bin/sh\necho no such unit >&2\nexit 1\n")
    with pytest.raises(UploadFault, match="no such unit"):
        collect_logs.journal()


# --- reboot -------------------------------------------------------------------------------------------------------


def test_a_reboot_is_proved_by_another_boot_id(stand: Stand) -> None:
    request = stand.root / "reboot-request"
    boots = ["boot-1"]
    kind = Reboot(request, lambda: boots[-1])
    offer(stand, "reboot")
    stand.process(kind, until=request.exists)
    assert stand.reports == ["IN_PROGRESS note", "IN_PROGRESS request"]

    boots.append("boot-2")
    stand.process(kind)

    assert stand.reports[2:] == ["SUCCEEDED"]
    assert sorted(path.name for path in stand.root.iterdir()) == ["jobs"]


def test_a_board_that_does_not_restart_fails_and_the_request_is_withdrawn(stand: Stand) -> None:
    request = stand.root / "reboot-request"
    offer(stand, "reboot")

    stand.process(Reboot(request, lambda: "boot-1", wait_seconds=0.05))

    assert stand.reports[-1] == "FAILED interrupted"
    assert not request.exists()


def test_an_agent_that_only_restarts_itself_has_not_rebooted_the_board(stand: Stand) -> None:
    request = stand.root / "reboot-request"
    offer(stand, "reboot")
    stand.process(Reboot(request, lambda: "boot-1"), until=request.exists)

    stand.process(Reboot(request, lambda: "boot-1", wait_seconds=0.05))

    assert stand.reports[-1] == "FAILED interrupted"


# --- configure ----------------------------------------------------------------------------------------------------


@dataclass
class Applied:
    seen: list[Tuning] = field(default_factory=list)


def test_settings_are_changed_kept_and_applied_and_the_others_stay(stand: Stand) -> None:
    path, applied = stand.root / "tuning.json", Applied()
    tuning.save(path, replace(Tuning(), quiet_seconds=30.0), Tuning())
    offer(stand, "configure", tuning={"sensitivity": "low"})

    stand.process(Configure(path, Tuning(), applied.seen.append))

    wanted = replace(Tuning(), quiet_seconds=30.0, sensitivity="low")
    assert stand.service.told[-1].status == "SUCCEEDED"
    assert stand.service.told[-1].details == {"sensitivity": "low"}
    assert applied.seen == [wanted]
    assert tuning.load(path, Tuning()) == wanted


@pytest.mark.parametrize("wanted", [{"volume": 11}, {"quiet_seconds": "long"}, {"sensitivity": "low", "volume": 1}])
def test_settings_that_no_unit_takes_are_rejected_by_name_and_nothing_changes(
    stand: Stand, wanted: dict[str, Any]
) -> None:
    path, applied = stand.root / "tuning.json", Applied()
    offer(stand, "configure", tuning=wanted)

    stand.process(Configure(path, Tuning(), applied.seen.append))

    assert stand.reports[-1] == "REJECTED bad-document"
    assert "volume" in stand.reason() or "quiet_seconds" in stand.reason()
    assert applied.seen == []
    assert not path.exists()


# --- os-update ----------------------------------------------------------------------------------------------------


@dataclass
class TwoSlots:
    """Slots on paper: a board whose firmware boots the other slot once, when told so."""

    directory: Path
    good: bool = True
    requested: bool = False

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self._write("default", "a")
        self._write("booted", "a")
        self._write("ended", "")

    def missing(self) -> str | None:
        return None

    def booted(self) -> str:
        return self._read("booted")

    def other(self) -> str:
        return "b" if self.booted() == "a" else "a"

    def agent_security_version(self, bundle: Path) -> int:
        return 1

    def install(self, bundle: Path, progress: Callable[[float], None]) -> None:
        progress(0.5)
        shutil.copy(bundle, self.directory / f"slot-{self.other()}")

    def try_other(self) -> None:
        self._write("once", self.other())
        self._write("ended", "")

    def ended(self) -> str:
        return self._read("ended")

    def restart(self) -> None:
        self.requested = True

    def withdraw(self) -> None:
        self.requested = False

    def keep(self) -> None:
        self._write("default", self.booted())

    def go_back(self) -> None:
        self._write("default", "a")

    def boot(self) -> None:
        """The board comes up."""
        once = self.directory / "once"
        self._write("booted", once.read_text() if once.exists() and self.good else self._read("default"))
        if once.exists() and not self.good:
            self._write("ended", "it did not come up")
        once.unlink(missing_ok=True)
        self.requested = False

    def _read(self, name: str) -> str:
        return (self.directory / name).read_text()

    def _write(self, name: str, value: str) -> None:
        (self.directory / name).write_text(value)


IMAGE = "os/picket-2.0.0.img"


def os_target(goods: Goods) -> Target:
    return replace(goods.target, kind="os", version="2.0.0", full=replace(goods.target.full, path=IMAGE), delta=None)


def os_kind(stand: Stand, goods: Goods, slots: Any, *, boot: str, health: str | None = None) -> Kind:
    return OsUpdate(
        slots,
        Running("1.0.0", 1, (HARDWARE,)),
        lambda: boot,
        SignedTargets({IMAGE: os_target(goods)}, stand.root / "floor.json"),
        stand.link,
        lambda: health,
        Limits(0.0, 0.0, 3),
    )


def offer_image(stand: Stand, web: Web) -> None:
    urls = {IMAGE: f"{web.url}/{FULL}"}
    offer(stand, "os-update", target=IMAGE, version="2.0.0", metadata="https://updates.example/", urls=urls)


def test_an_image_without_slots_rejects_another_one_before_any_download(stand: Stand, goods: Goods, web: Web) -> None:
    web.asked.clear()
    offer_image(stand, web)

    stand.process(os_kind(stand, goods, NoSlots(), boot="1"))

    assert stand.reports == ["IN_PROGRESS check", "REJECTED not-possible"]
    assert "no slots" in stand.reason()
    assert web.asked == []


@pytest.mark.parametrize("ends", ["well", "does not come up", "unhealthy"])
def test_an_image_is_installed_tried_once_and_kept_or_given_up(
    stand: Stand, goods: Goods, web: Web, tmp_path: Path, ends: str
) -> None:
    slots = TwoSlots(tmp_path / "slots", good=ends != "does not come up")
    offer_image(stand, web)
    boots = 1
    health = "no sensor" if ends == "unhealthy" else None
    while stand.service.status("j", SERIAL) in {"QUEUED", "IN_PROGRESS"}:
        assert boots < 6
        stand.process(
            os_kind(stand, goods, slots, boot=str(boots), health=health),
            until=lambda: slots.requested or stand.service.status("j", SERIAL) not in {"QUEUED", "IN_PROGRESS"},
        )
        if slots.requested:
            slots.boot()
            boots += 1

    assert (tmp_path / "slots/slot-b").read_bytes() == goods.full
    phases = [f"IN_PROGRESS {phase}" for phase in ("check", "download", "install", "switch")]
    reports = [told.short for told in stand.service.told if "progress" not in told.details]
    floor = read_floor(stand.root / "floor.json").security.get("os")
    match ends:
        case "well":
            assert reports == [*phases, "IN_PROGRESS prove", "SUCCEEDED"]
            assert (slots.booted(), (tmp_path / "slots/default").read_text(), floor) == ("b", "b", 2)
        case "does not come up":
            assert reports == [*phases, "FAILED crashed"]
            assert (slots.booted(), floor) == ("a", None)
        case _:
            assert reports == [*phases, "FAILED unhealthy"]
            assert (slots.booted(), (tmp_path / "slots/default").read_text(), floor) == ("a", "a", None)
