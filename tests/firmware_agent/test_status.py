"""How a unit is, in words: from the running agent, from a hanging one, and from the disk alone."""

import json
import logging
import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_agent import arming, log, messages, status
from firmware_agent.__main__ import main
from firmware_agent.arming import Arming
from firmware_agent.board import ClockReading
from firmware_agent.product import Product
from firmware_agent.spool import Spool
from tests.firmware_agent.support import SERIAL, Ca, Station, Unit, free_port, provision, settings_text, wait_for


def lines(text: str) -> dict[str, str]:
    return {name: rest.strip() for name, _, rest in (line.partition(":") for line in text.splitlines())}


def keep(unit: Unit, count: int) -> None:
    clock = ClockReading(1_795_000_000, "ntp")
    with Spool(unit.settings.paths.spool) as spool:
        for _ in range(count):
            spool.alarm(lambda n: messages.alarm(n, clock=clock, uptime=1, boot_id="b").payload())


def test_without_an_agent_the_disk_tells(unit: Unit, ca: Ca) -> None:
    provision(unit, ca, 8883)
    keep(unit, 3)
    arming.save(unit.settings.paths.arming, Arming(armed=False, by="cloud"))
    unit.settings.paths.sealed.touch()

    said = lines(status.words(status.collect(unit.settings, unit.board)))

    assert said["agent"].startswith("not running, product mode; version ")
    assert said["unit"] == f"{SERIAL} at localhost:8883"
    assert said["armed"] == "no, by cloud"
    assert said["spool"] == "3 alarms, 0 events, 0 heartbeats wait, the oldest since 2026-11-18T11:06:40.000Z"
    assert said["certificate"] == "365 days left"
    assert said["clock"].endswith("set by ntp")


def test_a_unit_fresh_from_the_flasher_tells_what_it_can(unit: Unit) -> None:
    said = lines(status.words(status.collect(unit.settings, unit.board)))

    assert said["agent"].startswith("not running, factory mode")
    assert set(said) == {"agent", "host", "armed", "listening", "clock"}
    assert said["host"] == os.uname().nodename


def test_nothing_that_lies_on_a_broken_disk_keeps_the_unit_from_telling(unit: Unit, ca: Ca) -> None:
    provision(unit, ca, 8883)
    paths = unit.settings.paths
    paths.run.mkdir(exist_ok=True)
    for path in (paths.spool, paths.arming, paths.boot, paths.status):
        path.write_bytes(b"\xff\x00 rubbish")
    (paths.identity.resolve() / "chain.pem").write_text("rubbish")

    assert lines(status.words(status.collect(unit.settings, unit.board)))["agent"].startswith("not running")


@pytest.fixture
def running(unit: Unit, ca: Ca) -> Any:
    provision(unit, ca, free_port())
    complaints = log.Complaints(unit.board.uptime)
    logging.getLogger().addHandler(complaints)
    product = Product(unit.settings, unit.board, unit.pins, release="0.1.0-00000000", complaints=complaints)
    product.start()
    yield product
    logging.getLogger().removeHandler(complaints)
    product.stop()
    product.join()


def test_the_running_agent_tells_of_sensor_spool_link_parts_and_complaints(unit: Unit, running: Product) -> None:
    for _ in range(2):
        logging.getLogger("firmware_agent.link").warning("no luck at https://example.com/a?secret=1")
    unit.pir.drive_high()

    def told() -> bool:
        document = status.collect(unit.settings, unit.board)
        return bool(document["state"] == "running" and document["spool"]["alarms"] == 1)

    wait_for(told)
    document = status.collect(unit.settings, unit.board)
    said = lines(status.words(document))

    assert said["agent"].startswith("running, product mode")
    assert said["armed"] == "yes, by default"
    assert said["sensor"].startswith("sees motion; last edge ")
    assert said["sensor"].endswith("1 pulses so far")
    assert said["spool"].startswith("1 alarms, 0 events, 0 heartbeats wait, the oldest since 20")
    assert said["link"].startswith(("offline: ", "connecting: "))
    assert "no luck at https://example.com/a?[query] (2 times)" in status.words(document)
    assert set(document["parts"]) == {"jobs", "shadows", "health", "house"}
    json.dumps(document, allow_nan=False)


def test_an_agent_that_says_nothing_any_more_hangs_and_a_dead_one_does_not_run(unit: Unit) -> None:
    unit.settings.paths.run.mkdir(parents=True)
    unit.settings.paths.state.mkdir()
    document = {"boot_id": unit.board.facts().boot_id, "pid": os.getpid(), "uptime": unit.board.uptime() - 90}

    status.write(unit.settings.paths.status, document)
    assert "hangs: no sign of life for 90 s" in status.words(status.collect(unit.settings, unit.board))

    status.write(unit.settings.paths.status, {**document, "pid": 2**22 + 1})
    assert "not running" in status.words(status.collect(unit.settings, unit.board))

    status.write(unit.settings.paths.status, {**document, "boot_id": "another"})
    assert "not running" in status.words(status.collect(unit.settings, unit.board))


anything = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["held", "armed", "x"]), inner),
    max_leaves=6,
)
names = ["armed", "sensor", "spool", "link", "job", "clock", "certificate", "tuning", "parts", "complaints", "release",
         "host", "listening"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(names), anything))
def test_a_document_of_whatever_release_can_be_told(document: dict[str, Any]) -> None:
    assert "agent:" in status.words(document)


def test_the_last_edge_is_remembered_within_a_boot(unit: Unit) -> None:
    unit.settings.paths.run.mkdir(parents=True)
    status.write(unit.settings.paths.status, {"boot_id": "b", "sensor": {"heard_at": 12.5}})

    assert status.heard_at(unit.settings.paths.status, "b") == 12.5
    assert status.heard_at(unit.settings.paths.status, "c") is None
    assert status.heard_at(unit.settings.paths.state / "none", "b") is None


@pytest.mark.parametrize(("high", "boot_id", "low"), [(False, "b", True), (True, "b", False), (False, "c", False)])
def test_the_last_level_is_remembered_within_a_boot(unit: Unit, *, high: bool, boot_id: str, low: bool) -> None:
    unit.settings.paths.run.mkdir(parents=True)
    status.write(unit.settings.paths.status, {"boot_id": "b", "sensor": {"high": high}})

    assert status.was_low(unit.settings.paths.status, boot_id) is low
    assert not status.was_low(unit.settings.paths.state / "none", boot_id)


# --- the command and the verb -------------------------------------------------------------------------------------


def test_the_command_tells_it_in_words_and_for_programs(
    tmp_path: Path, unit: Unit, ca: Ca, capsys: pytest.CaptureFixture[str]
) -> None:
    provision(unit, ca, 8883)
    settings = tmp_path / "agent.toml"
    settings.write_text(settings_text(tmp_path))

    assert main(["--settings", str(settings), "status"]) == 0
    assert capsys.readouterr().out.startswith("agent:       not running, factory mode")
    assert main(["--settings", str(settings), "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["serial"] == SERIAL


def test_the_command_works_with_settings_that_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text(settings_text(tmp_path) + "[nonsense]\n")

    assert main(["--settings", str(settings), "status"]) == 0

    told = capsys.readouterr()
    assert "not running" in told.out
    assert "unknown section [nonsense]" in told.err


def test_the_station_can_ask_over_its_wire(station: Station, unit: Unit) -> None:
    answer = station.ask("status")

    assert answer["words"].startswith("agent:       not running, factory mode")
    assert answer["status"]["image"] == "picket 0.1.0"


# --- the log ------------------------------------------------------------------------------------------------------


def logged(record: Any) -> str:
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(log.Line())
    logger = logging.Logger("firmware_agent.jobs.runner")  # noqa: LOG001 - one that nobody else hears
    logger.addHandler(handler)
    record(logger)
    return stream.getvalue()


def test_a_record_is_one_line_with_priority_level_and_place() -> None:
    assert logged(lambda to: to.warning("two\nlines of %s", "text")) == "<4>warning jobs.runner: two lines of text\n"
    assert logged(lambda to: to.info("all is well")).startswith("<6>info jobs.runner: ")


def test_a_traceback_is_part_of_the_line() -> None:
    def fail(to: logging.Logger) -> None:
        try:
            raise ValueError("bad\nnews")
        except ValueError:
            to.exception("the part has broken")

    line = logged(fail)

    assert line.count("\n") == 1
    assert line.startswith("<3>error jobs.runner: the part has broken | ValueError: bad news (test_status.py:")


@pytest.mark.parametrize(
    "secret",
    [
        "https://bucket.s3.amazonaws.com/log?X-Amz-Signature=5ec2e7",
        "-----BEGIN EC PRIVATE KEY-----\n5ec2e7\n-----END EC PRIVATE KEY-----",
        'pin: "5ec2e7"',
        "token=5ec2e7",
    ],
)
def test_no_line_holds_a_secret_wherever_it_came_from(secret: str) -> None:
    def fail(to: logging.Logger) -> None:
        try:
            raise ValueError(secret)
        except ValueError:
            to.exception("with %s", secret)

    assert "5ec2e7" not in logged(fail)


def test_a_line_has_an_end() -> None:
    assert len(logged(lambda to: to.error("x" * 100_000))) < log.LONGEST + 100


def test_the_last_complaints_are_kept_and_the_same_ones_counted() -> None:
    times = iter(range(1000))
    complaints = log.Complaints(lambda: float(next(times)))
    logger = logging.Logger("firmware_agent.spool")  # noqa: LOG001 - one that nobody else hears
    logger.addHandler(complaints)
    logger.info("nobody complains")
    for number in range(30):
        logger.error("number %d", number)
        logger.error("number %d", number)

    kept = complaints.last()

    assert [one.text for one in kept] == [f"spool: number {number}" for number in range(10, 30)]
    assert {one.times for one in kept} == {2}


def test_setting_up_replaces_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(root, "handlers", [])
    stream = StringIO()
    try:
        log.set_up(stream)
        logging.getLogger("firmware_agent").info("hello")
        assert stream.getvalue() == "<6>info agent: hello\n"
    finally:
        root.handlers[:] = before
        root.setLevel(level)
