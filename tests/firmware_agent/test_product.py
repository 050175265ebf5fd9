"""Product mode against a real broker: no alarm is lost, none is sent twice for one edge, and systemd knows."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from firmware_agent import arming, files, messages, status, tuning
from firmware_agent.arming import Arming
from firmware_agent.errors import KeyFault, KeyMismatch, NoTpm, PirFault, WrongState
from firmware_agent.jobs.runner import Runner
from firmware_agent.pins import LgpioPins, Pir
from firmware_agent.product import EXIT_RESTART, Product
from firmware_agent.spool import Spool
from firmware_agent.systemd import Systemd
from tests.firmware_agent.support import BOARD, Broker, Ca, Unit, free_port, provision, wait_for

ROOT = Path(__file__).parent.parent.parent

Start = Callable[..., Product]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts product mode, and ends it with the test."""
    running: list[Product] = []

    def start_product(unit: Unit, notify: Systemd | None = None) -> Product:
        product = Product(unit.settings, unit.board, unit.pins, notify=notify)
        running.append(product)
        product.start()
        return product

    yield start_product
    for product in running:
        end(product)


def end(product: Product) -> None:
    product.stop()
    product.join()


def wave(unit: Unit) -> None:
    unit.pir.drive_high()
    unit.pir.drive_low()


def test_motion_becomes_one_alarm(unit: Unit, ca: Ca, broker: Broker, start: Start) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    start(unit)
    broker.next("hello")

    wave(unit)

    alarm = broker.next("alarm")
    assert set(alarm) == {"event_id", "sequence", "at", "at_quality", "boot_id", "monotonic_ms", "kind"}
    assert (alarm["sequence"], alarm["at_quality"], alarm["kind"]) == (1, "ntp", "motion")
    assert abs((datetime.fromisoformat(alarm["at"]) - datetime.now(UTC)).total_seconds()) < 60
    wait_for(lambda: spooled(unit) == 0)
    assert broker.seen.empty()


def spooled(unit: Unit) -> int:
    with Spool(unit.settings.paths.spool) as spool:
        return len(spool)


def test_each_connection_begins_with_a_hello(unit: Unit, ca: Ca, broker: Broker, start: Start) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    start(unit)
    first = broker.next("hello")
    broker.stop()
    broker.start()

    second = broker.next("hello")

    assert (first["mode"], first["nonce"], first["board"], first["key"]) == ("product", None, BOARD, "file")
    assert second["mode"] == "product"


def test_alarms_raised_offline_arrive_in_order_once_the_link_is_back(
    unit: Unit, ca: Ca, broker: Broker, start: Start
) -> None:
    provision(unit, ca, broker.port)
    start(unit)
    for _ in range(40):  # more than one window
        wave(unit)
    wait_for(lambda: spooled(unit) == 40)

    broker.start()

    # QoS 1 may repeat; it must not leave out, nor reorder what it has not sent before.
    sequences = [broker.next("alarm")["sequence"]]
    while sequences[-1] < 40:
        sequences.append(broker.next("alarm")["sequence"])
    assert sorted(set(sequences)) == list(range(1, 41))
    assert sorted(sequences) == sequences
    wait_for(lambda: spooled(unit) == 0)


KILLED = """
import os, signal, sys
from pathlib import Path
from firmware_agent.product import Product
from firmware_agent.spool import Spool
from tests.firmware_agent.support import Unit, wait_for

unit = Unit.make(Path(sys.argv[1]))
product = Product(unit.settings, unit.board, unit.pins)
product.start()
unit.pir.drive_high()
def kept():
    with Spool(unit.settings.paths.spool) as spool:
        return len(spool) == int(sys.argv[2])
wait_for(kept)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_alarm_just_before_kill_9_is_delivered_after_the_next_start(
    unit: Unit, ca: Ca, broker: Broker, start: Start
) -> None:
    provision(unit, ca, broker.port)  # nobody listens there yet
    for count in (1, 2):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(unit.root), str(count)], cwd=ROOT, check=False, capture_output=True
        )
        assert killed.returncode == -9, killed.stderr.decode()

    broker.start()
    start(unit)

    alarms = [broker.next("alarm"), broker.next("alarm")]
    assert [alarm["sequence"] for alarm in alarms] == [1, 2]
    assert alarms[0]["event_id"] != alarms[1]["event_id"]


def test_a_broker_that_refuses_a_message_does_not_make_it_vanish(
    unit: Unit, ca: Ca, broker: Broker, start: Start
) -> None:
    acl = broker._directory / "acl"
    allowed = acl.read_text()
    acl.write_text(allowed.replace("pattern write dt/picket/%u/#", "pattern write dt/picket/%u/hello"))
    broker.start()
    provision(unit, ca, broker.port)
    start(unit)
    broker.next("hello")
    wave(unit)
    wait_for(lambda: spooled(unit) == 1)
    broker.stop()
    acl.write_text(allowed)
    broker.start()

    assert broker.next("alarm")["sequence"] == 1


def test_motion_at_the_very_end_is_still_kept(unit: Unit, ca: Ca, start: Start) -> None:
    provision(unit, ca, free_port())
    product = start(unit)
    for _ in range(5):
        wave(unit)

    end(product)

    assert spooled(unit) == 5


@pytest.mark.parametrize(("seen_high", "alarms"), [(False, 1), (True, 0)])
def test_motion_that_began_while_the_agent_was_started_anew_is_an_alarm(
    unit: Unit, ca: Ca, start: Start, *, seen_high: bool, alarms: int
) -> None:
    provision(unit, ca, free_port())
    unit.settings.paths.run.mkdir(parents=True, exist_ok=True)
    before = {"boot_id": unit.board.facts().boot_id, "sensor": {"heard_at": 1.0, "high": seen_high}}
    status.write(unit.settings.paths.status, before)

    @contextmanager
    def already_high() -> Iterator[Pir]:
        with unit.pins.pir() as pir:
            unit.pir.drive_high()  # only now: a line of the mock's is low when it is opened
            yield pir

    end(start(replace(unit, pins=SimpleNamespace(pir=already_high, tamper=unit.pins.tamper))))

    assert spooled(unit) == alarms


def test_heartbeats_go_on(unit: Unit, ca: Ca, broker: Broker, start: Start) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    start(unit.with_heartbeat(0.1))

    beats = [broker.next("heartbeat"), broker.next("heartbeat")]

    assert set(beats[0]) == {"at", "boot_id", "uptime_s", "spool", "temperature_c"}
    assert beats[0]["temperature_c"] == 45.2


def test_the_sensor_is_not_believed_while_it_warms_up(unit: Unit, ca: Ca, start: Start) -> None:
    provision(unit, ca, free_port())
    cold = replace(
        unit, settings=replace(unit.settings, pir=replace(unit.settings.pir, warm_up_seconds=60.0)), board=unit.board
    )
    cold.board.up_seconds = 5.0
    start(cold)
    wave(cold)
    cold.board.up_seconds += 3600.0  # an hour goes by
    cold.board.clock_offset += 3600.0
    wave(cold)

    wait_for(lambda: spooled(cold) == 1)
    with Spool(cold.settings.paths.spool) as spool:
        assert b'"sequence":1,' in spool.oldest(1)[0].body


def test_a_clock_before_the_certificate_keeps_alarms_and_tries_no_tls(unit: Unit, ca: Ca, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        provision(unit, ca, listener.getsockname()[1])
        unit.board.clock_offset, unit.board.quality = -40 * 365 * 86400, "estimated"
        start(unit)
        wave(unit)
        wait_for(lambda: spooled(unit) == 1)

        listener.settimeout(1.5)
        with pytest.raises(TimeoutError):
            listener.accept()

        unit.board.clock_offset = 0.0  # a time server has answered
        listener.settimeout(20)
        listener.accept()[0].close()

    with Spool(unit.settings.paths.spool) as spool:
        assert b'"at_quality":"estimated"' in spool.oldest(1)[0].body


# --- armed, tampered with, tuned ----------------------------------------------------------------------------------


def disarm(unit: Unit) -> None:
    arming.save(unit.settings.paths.arming, Arming(armed=False, by="cloud"))


def test_motion_while_disarmed_is_an_event_and_no_alarm(unit: Unit, ca: Ca, broker: Broker, start: Start) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    disarm(unit)
    start(unit)

    wave(unit)

    event = broker.next("event")
    assert (event["kind"], event["sequence"]) == ("motion", 1)
    wait_for(lambda: spooled(unit) == 0)
    assert broker.seen.empty()


def test_an_opened_case_is_an_alarm_though_disarmed(unit: Unit, ca: Ca, broker: Broker, start: Start) -> None:
    broker.start()
    provision(unit, ca, broker.port)
    disarm(unit)
    start(unit.with_case())  # nothing holds the mock's line up yet: the case is open from the start
    unit.case.drive_high()

    first = broker.next("alarm")
    over = broker.next("event")
    unit.case.drive_low()
    again = broker.next("alarm")

    assert (first["kind"], first["detail"], over["kind"], again["kind"]) == (
        "tamper",
        "the case is open",
        "tamper-over",
        "tamper",
    )
    assert again["sequence"] == 2


def test_what_the_owner_has_tuned_outlives_a_restart(unit: Unit, ca: Ca, start: Start) -> None:
    provision(unit, ca, free_port())
    tuning.save(unit.settings.paths.tuning, replace(unit.settings.tuning, quiet_seconds=600.0), unit.settings.tuning)
    start(unit)

    for _ in range(5):
        wave(unit)

    wait_for(lambda: spooled(unit) == 1)


def test_damaged_tuning_costs_the_owners_wishes_and_no_alarm(
    unit: Unit, ca: Ca, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    provision(unit, ca, free_port())
    unit.settings.paths.tuning.write_text("{")
    unit.settings.paths.shadows.write_text("{}")
    start(unit)
    wave(unit)

    wait_for(lambda: spooled(unit) == 1)
    assert "the image's settings hold until the owner's come again" in caplog.text
    assert not unit.settings.paths.shadows.exists()  # the shadow's wishes will be taken once more


# --- the clock ----------------------------------------------------------------------------------------------------


def test_alarms_of_a_unit_without_time_arrive_with_the_time_that_it_learns_later(
    unit: Unit, ca: Ca, broker: Broker, start: Start
) -> None:
    provision(unit, ca, broker.port)
    unit.board.clock_offset, unit.board.quality = -56 * 365 * 86400, "estimated"
    start(unit)
    wave(unit)
    wait_for(lambda: spooled(unit) == 1)
    broker.start()
    unit.board.clock_offset, unit.board.quality = 0.0, "ntp"

    alarm = broker.next("alarm")
    told = broker.next("event")

    assert alarm["at_quality"] == "corrected"
    assert abs((datetime.fromisoformat(alarm["at"]) - datetime.now(UTC)).total_seconds()) < 60
    assert told["kind"] == "clock-set"
    assert told["detail"].endswith("s (ntp)")


def test_a_clock_that_leaps_to_2099_and_back_corrects_nothing_wrongly(
    unit: Unit, ca: Ca, broker: Broker, start: Start
) -> None:
    provision(unit, ca, broker.port)
    unit.board.quality = "estimated"
    start(unit)
    wave(unit)
    wait_for(lambda: spooled(unit) == 1)
    unit.board.clock_offset, unit.board.quality = 73 * 365 * 86400, "ntp"  # after its certificate's last day
    wave(unit)
    wait_for(lambda: spooled(unit) == 2)
    time.sleep(1.5)  # long enough to look at the clock
    unit.board.clock_offset = 0.0
    broker.start()

    first = broker.next("alarm")

    assert first["sequence"] == 1
    assert abs((datetime.fromisoformat(first["at"]) - datetime.now(UTC)).total_seconds()) < 60


# --- what keeps it from starting ----------------------------------------------------------------------------------


def test_a_unit_whose_tpm_is_gone_halts_with_a_clear_message(tmp_path: Path) -> None:
    unit = Unit.make(tmp_path, store="tpm", tcti=f"swtpm:host=127.0.0.1,port={free_port()}")
    unit.settings.paths.state.mkdir()

    with pytest.raises(NoTpm, match="configured for a TPM and none answers"):
        Product(unit.settings, unit.board, unit.pins).start()


def test_a_unit_that_was_never_provisioned_does_not_start(unit: Unit) -> None:
    unit.settings.paths.state.mkdir()

    with pytest.raises(WrongState):
        Product(unit.settings, unit.board, unit.pins).start()


def test_a_unit_whose_key_was_exchanged_does_not_start(unit: Unit, ca: Ca, tmp_path: Path) -> None:
    provision(unit, ca)
    other = Unit.make(tmp_path / "other")
    provision(other, ca)
    files.write_atomic(unit.settings.paths.key_file, other.settings.paths.key_file.read_bytes(), 0o600)

    with pytest.raises(KeyMismatch):
        Product(unit.settings, unit.board, unit.pins).start()


def test_a_damaged_key_stops_the_unit(unit: Unit, ca: Ca) -> None:
    provision(unit, ca)
    unit.settings.paths.key_file.write_bytes(b"")

    with pytest.raises(KeyFault):
        Product(unit.settings, unit.board, unit.pins).start()


def test_a_unit_without_a_pir_does_not_call_itself_ready(unit: Unit, ca: Ca, tmp_path: Path) -> None:
    provision(unit, ca)
    systemd = Listener(tmp_path)

    with pytest.raises(PirFault):
        Product(unit.settings, unit.board, LgpioPins({"no-such-chip": 1}), notify=systemd.notify).start()

    assert systemd.heard() == []
    systemd.close()


# --- systemd ------------------------------------------------------------------------------------------------------


class Listener:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, directory: Path, watchdog_seconds: float = 0.3) -> None:
        path = directory / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.notify = Systemd.from_environment(
            {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(int(watchdog_seconds * 1e6))}
        )

    def next(self, wanted: str) -> None:
        self._socket.settimeout(20)
        while self._socket.recv(4096).decode() != wanted:
            pass

    def heard(self) -> list[str]:
        self._socket.setblocking(False)
        messages = []
        while True:
            try:
                messages.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(tmp_path)
    yield listener
    listener.close()


def test_systemd_hears_ready_then_the_watchdog_then_the_end(
    unit: Unit, ca: Ca, start: Start, systemd: Listener
) -> None:
    provision(unit, ca, free_port())
    product = start(unit, systemd.notify)

    systemd.next("READY=1")
    systemd.next("WATCHDOG=1")
    systemd.next("WATCHDOG=1")
    end(product)
    systemd.next("STOPPING=1")


def test_the_watchdog_is_not_fed_when_a_thread_hangs(
    unit: Unit, ca: Ca, start: Start, systemd: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firmware_agent.product.STALL_SECONDS", 0.2)
    release = threading.Event()
    alarm = messages.alarm

    def slow(*args: Any, **kwargs: Any) -> messages.Alarm:
        release.wait()
        return alarm(*args, **kwargs)

    monkeypatch.setattr("firmware_agent.messages.alarm", slow)
    provision(unit, ca, free_port())
    start(unit, systemd.notify)
    systemd.next("READY=1")

    wave(unit)

    systemd.next("STATUS=keeper stalled")
    release.set()


def test_a_thread_that_dies_ends_the_whole_product(
    unit: Unit, ca: Ca, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    provision(unit, ca, free_port())
    monkeypatch.setattr("firmware_agent.messages.alarm", broken)
    product = Product(unit.settings, unit.board, unit.pins)
    product.start()
    wave(unit)

    with pytest.raises(ZeroDivisionError):
        product.join()
    assert "the keeper has ended" in caplog.text


def test_a_part_that_breaks_is_begun_again_and_the_alarm_goes_on(
    unit: Unit, ca: Ca, broker: Broker, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firmware_agent.backoff.FIRST_SECONDS", 0.05)
    begun = []

    def broken(_: Runner, stop: threading.Event) -> None:
        begun.append(stop)
        raise ZeroDivisionError("jobs are hard")

    monkeypatch.setattr(Runner, "run", broken)
    broker.start()
    provision(unit, ca, broker.port)
    start(unit)

    event = broker.next("event")
    wait_for(lambda: len(begun) >= 3)
    wave(unit)

    assert (event["kind"], event["detail"]) == ("part-broken", "jobs: ZeroDivisionError: jobs are hard")
    assert broker.next("alarm")["kind"] == "motion"
    wait_for(lambda: spooled(unit) == 0)  # told once, not each time


def test_a_job_that_changes_the_release_ends_the_agent_with_its_own_code(unit: Unit, ca: Ca, start: Start) -> None:
    provision(unit, ca, free_port())
    product = start(unit)

    product._leave()
    product.join()

    assert product.exit_code == EXIT_RESTART
    assert product.failure is None


def test_product_mode_starts_and_stops_any_number_of_times(unit: Unit, ca: Ca) -> None:
    provision(unit, ca, free_port())
    before = threading.active_count()
    for _ in range(3):
        product = Product(unit.settings, unit.board, unit.pins)
        product.start()
        product.stop()
        product.stop()
        product.join()

    assert threading.active_count() <= before + 2  # the SDK's own event loops stay
