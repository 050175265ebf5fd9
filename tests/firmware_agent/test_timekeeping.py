"""No TLS with a clock that is certainly wrong; and a time from the endpoint, believed within bounds only."""

import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from firmware_agent import __main__, files, https_clock, timekeeping
from firmware_agent.board import RaspberryPi
from firmware_agent.https_clock import NoTime, Told
from firmware_agent.identity import Identity
from firmware_agent.product import Product
from firmware_agent.timekeeping import Bounds, Timekeeper
from tests.firmware_agent.linking import Running
from tests.firmware_agent.support import SERIAL, Broker, Ca, Unit, pem, pem_key, provision, settings_text, wait_for

DAY = 86400.0


def unix(year: int, month: int = 1, day: int = 1) -> float:
    return datetime(year, month, day, tzinfo=UTC).timestamp()


def leaf(ca: Ca, first: datetime, last: datetime, names: list[str] | None = None) -> tuple[x509.Certificate, str]:
    """A certificate of these days and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERIAL)]))
        .issuer_name(ca.name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
    return builder.sign(ca.key, hashes.SHA256()), pem_key(key)


@pytest.fixture
def device(ca: Ca) -> x509.Certificate:
    return leaf(ca, datetime(2026, 3, 1, tzinfo=UTC), datetime(2046, 3, 1, tzinfo=UTC))[0]


# --- what the time can be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (0.0, "before its certificate's first day"),
        (unix(2026, 2, 28), "before its certificate's first day"),
        (unix(2099), "after its certificate's last day"),
        (1e18, "after its certificate's last day"),
        (-1e18, "before"),
    ],
)
def test_a_time_outside_the_certificates_days_is_certainly_wrong(
    device: x509.Certificate, now: float, words: str
) -> None:
    assert words in (timekeeping.certainly_wrong(now, timekeeping.bounds(device)) or "")


def test_a_time_within_the_certificates_days_may_be_right(device: x509.Certificate) -> None:
    assert timekeeping.certainly_wrong(unix(2027), timekeeping.bounds(device)) is None


@dataclass
class Monotonic:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def keeper(unit: Unit, device: x509.Certificate, monotonic: Callable[[], float] | None = None) -> Timekeeper:
    for directory in (unit.settings.paths.state, unit.settings.paths.run):
        directory.mkdir(parents=True, exist_ok=True)
    return Timekeeper(unit.settings.paths, lambda: device, monotonic=monotonic or Monotonic())


def test_the_image_raises_the_floor(unit: Unit, device: x509.Certificate) -> None:
    stamp = unit.root / "clock-epoch"
    stamp.touch()
    os.utime(stamp, (unix(2026, 9), unix(2026, 9)))
    unit = replace(unit, settings=replace(unit.settings, paths=replace(unit.settings.paths, clock_epoch=stamp)))

    assert "the day its image was built" in (keeper(unit, device).wrong(unix(2026, 8)) or "")


def test_the_time_that_the_cloud_told_holds_over_a_reboot(unit: Unit, device: x509.Certificate) -> None:
    first = keeper(unit, device)
    first.confirm(unix(2028))

    after_the_reboot = keeper(unit, device)
    assert "the last time that the cloud told it" in (after_the_reboot.wrong(unix(2027)) or "")
    assert after_the_reboot.wrong(unix(2028)) is None


def test_a_file_that_does_not_parse_leaves_the_other_floors(unit: Unit, device: x509.Certificate) -> None:
    keeper(unit, device)
    for text in ("", "{", "[]", '{"format":2,"unix":9e9}', '{"format":1,"unix":"soon"}', "null"):
        unit.settings.paths.clock.write_text(text)
        assert keeper(unit, device).bounds() == timekeeping.bounds(device)


@pytest.mark.parametrize("lie", [0.0, unix(2020), unix(2099), 1e18])
def test_a_time_outside_the_bounds_does_not_move_the_floor_even_when_the_cloud_tells_it(
    unit: Unit, device: x509.Certificate, lie: float
) -> None:
    told = keeper(unit, device)
    told.confirm(lie)

    assert told.bounds() == timekeeping.bounds(device)
    assert not unit.settings.paths.clock.exists()


def test_the_time_is_written_once_an_hour_and_before_a_reboot(unit: Unit, device: x509.Certificate) -> None:
    clock = Monotonic()
    told = keeper(unit, device, clock)
    written = []

    def look() -> None:
        content = unit.settings.paths.clock.read_text()
        if content not in written:
            written.append(content)

    told.confirm(unix(2028))
    look()
    for _ in range(3600 * 3 // 10):  # three hours in steps of 10 s
        clock.now += 10
        told.confirm(unix(2028) + clock.now - 1000)
        told.tick()
        look()
    assert len(written) == 4
    clock.now += 100
    told.keep()
    look()

    assert [json.loads(text)["unix"] - unix(2028) for text in written] == [0, 3600, 7200, 10800, 10900]


def test_the_time_goes_on_by_the_monotonic_clock_whatever_the_wall_clock_does(
    unit: Unit, device: x509.Certificate
) -> None:
    clock = Monotonic()
    told = keeper(unit, device, clock)
    told.confirm(unix(2028))
    clock.now += 30 * DAY

    assert told.bounds().floor == pytest.approx(unix(2028) + 30 * DAY - 3600)
    assert told.wrong(unix(2028)) is not None  # somebody stepped it back by a month
    assert told.wrong(unix(2028) + 30 * DAY) is None


def test_a_state_that_cannot_be_written_stops_nobody(unit: Unit, device: x509.Certificate) -> None:
    told = Timekeeper(unit.settings.paths, lambda: device)  # no such directories
    told.confirm(unix(2028))

    assert told.wrong(unix(2027)) is not None


def test_the_clock_service_learns_when_the_clock_is_wrong_and_when_no_more(
    unit: Unit, device: x509.Certificate
) -> None:
    told, marker = keeper(unit, device), unit.settings.paths.clock_wrong

    told.wrong(0.0)
    assert marker.exists()
    told.wrong(unix(2027))
    assert not marker.exists()


# --- the link -----------------------------------------------------------------------------------------------------


class Counter:
    """A server that counts who comes, and hangs up."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            connection.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def counter() -> Iterator[Counter]:
    made = Counter()
    yield made
    made.close()


def looked_at_the_clock(unit: Unit, times: int) -> None:
    """Until the agent has looked at the clock so often again."""
    count, look = 0, type(unit.board).clock

    def counted() -> object:
        nonlocal count
        count += 1
        return look(unit.board)

    unit.board.clock = counted  # type: ignore[method-assign,assignment]
    wait_for(lambda: count >= times)


@pytest.mark.parametrize("offset", [-56 * 365 * DAY, 73 * 365 * DAY], ids=["1970", "2099"])
def test_no_tls_is_tried_while_the_clock_is_certainly_wrong_and_it_is_once_it_is_right(
    unit: Unit, ca: Ca, counter: Counter, offset: float
) -> None:
    provision(unit, ca, counter.port)
    unit.board.clock_offset, unit.board.quality = offset, "estimated"
    product = Product(unit.settings, unit.board, unit.pins)
    product.start()
    try:
        looked_at_the_clock(unit, 3)
        while_wrong = counter.accepted
        unit.board.clock_offset = 0.0
        wait_for(lambda: counter.accepted > 0)
    finally:
        product.stop()
        product.join()

    assert while_wrong == 0


def test_a_clock_that_is_stepped_away_while_the_agent_runs_ends_the_attempts(
    unit: Unit, ca: Ca, counter: Counter
) -> None:
    provision(unit, ca, counter.port)
    product = Product(unit.settings, unit.board, unit.pins)
    product.start()
    try:
        wait_for(lambda: counter.accepted > 0)
        unit.board.clock_offset = 73 * 365 * DAY
        wait_for(unit.settings.paths.clock_wrong.exists)
        before = counter.accepted
        looked_at_the_clock(unit, 3)
        after = counter.accepted
    finally:
        product.stop()
        product.join()

    assert before == after


def test_a_step_of_the_clock_does_not_end_a_connection_that_is_up(unit: Unit, ca: Ca, broker: Broker) -> None:
    broker.start()
    with Running.of(unit, ca, broker.port) as running:
        running.wait_connected()
        for years in (-56, 73):
            unit.board.clock_offset = years * 365 * DAY
            running.alarm()
            broker.next("alarm")

        assert running.link.connected()


def test_only_the_board_reads_the_wall_clock() -> None:
    """So a step of it can starve no timer: all others count on a clock that nobody sets."""
    agent = Path(timekeeping.__file__).parent
    readers = {
        path.relative_to(agent).as_posix()
        for path in agent.rglob("*.py")
        if re.search(r"\btime\.time\(|\bdatetime\.(now|utcnow|today)\(|CLOCK_REALTIME\b(?!, unix)", path.read_text())
    }

    assert readers == {"board.py"}


# --- the endpoint's date ------------------------------------------------------------------------------------------


class Https:
    """A server with a certificate of the test's choice, that answers with the bytes of the test's choice."""

    def __init__(self, directory: Path, certificate: x509.Certificate, key: str, answer: bytes) -> None:
        (directory / "c.pem").write_text(pem(certificate))
        (directory / "k.pem").write_text(key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "c.pem", directory / "k.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._context = context
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            with plain:
                try:
                    plain.settimeout(5)
                    with self._context.wrap_socket(plain, server_side=True) as secure:
                        secure.recv(4096)
                        secure.sendall(self._answer)
                except (ssl.SSLError, OSError):
                    continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def answer(at: float) -> bytes:
    date = format_datetime(datetime.fromtimestamp(at, UTC), usegmt=True)
    return f"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\ndate: {date}\r\n\r\n".encode()


@dataclass
class Site:
    """A unit that has lost the time, and the endpoint that it is to ask."""

    unit: Unit
    found: Identity
    set: list[float]

    def run(self) -> str:
        return https_clock.run(self.unit.settings, self.unit.board, set_clock=self.set.append)


Days = tuple[datetime, datetime]
NOW = datetime.now(UTC)
VALID: Days = (NOW - timedelta(days=30), NOW + timedelta(days=300))


@pytest.fixture
def site(unit: Unit, ca: Ca, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    servers: list[Https] = []

    def build(reply: bytes, *, days: Days = VALID, names: tuple[str, ...] = ("localhost",), signer: Ca = ca) -> Site:
        certificate, key = leaf(signer, *days, names=list(names))
        servers.append(Https(tmp_path, certificate, key, reply))
        found = provision(unit, ca)
        settings = replace(unit.settings, clock=replace(unit.settings.clock, port=servers[-1].port))
        unit.board.clock_offset, unit.board.quality = -50 * 365 * DAY, "estimated"
        return Site(replace(unit, settings=settings), found, [])

    yield build
    for server in servers:
        server.close()


def test_where_ntp_is_blocked_the_endpoint_sets_the_clock(site: Callable[..., Site]) -> None:
    now = float(int(time.time()))
    here = site(answer(now))

    assert "is set by localhost" in here.run()
    assert here.set == [now]
    assert here.unit.settings.paths.clock_https.exists()
    assert json.loads(here.unit.settings.paths.clock.read_text())["unix"] == now  # the floor, from now on


def refused(here: Site) -> str:
    with pytest.raises(NoTime) as error:
        here.run()
    assert here.set == []
    assert not here.unit.settings.paths.clock_https.exists()
    assert not here.unit.settings.paths.clock.exists()
    return str(error.value)


def test_an_endpoint_of_another_ca_sets_no_clock(site: Callable[..., Site]) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in refused(site(answer(time.time()), signer=Ca("somebody else")))


def test_an_endpoint_of_another_name_sets_no_clock(site: Callable[..., Site]) -> None:
    assert "Hostname mismatch" in refused(site(answer(time.time()), names=("example.org",)))


def test_an_endpoint_whose_certificate_has_expired_by_its_own_date_sets_no_clock(site: Callable[..., Site]) -> None:
    expired = (NOW - timedelta(days=400), NOW - timedelta(days=35))
    assert "within the days of its own certificate" in refused(site(answer(time.time()), days=expired))


def test_an_expired_certificate_with_a_date_of_its_days_fails_by_the_floor(site: Callable[..., Site]) -> None:
    """Who stole a key that has expired can replay its days, but none before the unit's own floor."""
    expired = (NOW - timedelta(days=400), NOW - timedelta(days=35))
    replayed = answer((NOW - timedelta(days=40)).timestamp())
    assert "before its certificate's first day" in refused(site(replayed, days=expired))


def test_a_certificate_that_expired_after_the_floor_is_believed_within_its_days(site: Callable[..., Site]) -> None:
    """The limit of what the handshake without dates can know, and the reason for the floor."""
    short = (NOW - timedelta(days=400), NOW - timedelta(minutes=10))
    at = float(int((NOW - timedelta(minutes=20)).timestamp()))
    here = site(answer(at), days=short)

    here.run()

    assert here.set == [at]


def test_an_old_date_replayed_is_refused_by_the_time_that_was_known_before(site: Callable[..., Site]) -> None:
    known = time.time() + 200 * DAY
    here = site(answer(time.time() + 100 * DAY))
    files.write_atomic(here.unit.settings.paths.clock, json.dumps({"format": 1, "unix": known}).encode())

    with pytest.raises(NoTime, match="before the last time that the cloud told it"):
        here.run()
    assert here.set == []


def test_a_date_far_ahead_is_refused(site: Callable[..., Site]) -> None:
    forever = (NOW - timedelta(days=30), NOW + timedelta(days=40000))
    assert "after its certificate's last day" in refused(site(answer(unix(2099)), days=forever))


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00\xff" * 50_000,
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ndate: Tue, 15 Nov 1994 08:12:31 GMT\r\n",  # and hangs up
        b"HTTP/1.1 200 OK\r\ndate: yesterday\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ndate: 1763700000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 10:00:00 +0200\r\n\r\n",
        answer(time.time()).replace(b"\r\n\r\n", b"\r\nDate: Sat, 21 Nov 2026 10:00:00 GMT\r\n\r\n"),
    ],
)
def test_garbage_sets_no_clock(site: Callable[..., Site], garbage: bytes) -> None:
    refused(site(garbage))


def test_an_endpoint_that_never_ends_its_answer_is_left_in_time(site: Callable[..., Site], ca: Ca) -> None:
    here = site(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 10_000)
    refused(here)


def test_a_portal_without_tls_tells_no_time(unit: Unit, ca: Ca, counter: Counter) -> None:
    found = provision(unit, ca)
    with pytest.raises(NoTime, match="tells no time"):
        https_clock.ask("localhost", counter.port, found.trust)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_time_or_a_refusal(head: bytes) -> None:
    for data in (head, b"HTTP/1.1 200 OK\r\ndate: " + head + b"\r\n\r\n"):
        try:
            assert https_clock.date(data) >= -62135596800  # the year 1
        except NoTime:
            continue


@given(st.integers(0, 4_000_000_000))
def test_a_date_comes_back_as_it_was_sent(at: int) -> None:
    assert https_clock.date(answer(at)) == at


@given(*(st.floats(0, 1e10) for _ in range(5)))
def test_what_is_believed_lies_within_all_bounds(
    told: float, first: float, last: float, floor: float, ceiling: float
) -> None:
    try:
        believed = https_clock.judge(Told(told, first, last), Bounds(floor, "a", ceiling, "b"))
    except NoTime:
        assert not (max(floor, first) <= told <= min(ceiling, last))
    else:
        assert max(floor, first) <= believed <= min(ceiling, last)


def test_a_clock_that_a_time_server_has_set_is_left_alone_unless_it_is_certainly_wrong(
    site: Callable[..., Site],
) -> None:
    here = site(answer(time.time()))
    here.unit.board.quality, here.unit.board.clock_offset = "ntp", 0.0
    left_alone = here.run()
    here.unit.board.clock_offset = 73 * 365 * DAY  # the time server lies
    here.run()

    assert "nothing to do" in left_alone
    assert len(here.set) == 1


def test_the_endpoint_is_not_asked_again_for_six_hours(site: Callable[..., Site]) -> None:
    here = site(answer(time.time()))
    here.run()
    here.unit.board.clock_offset, here.unit.board.quality = 0.0, "https"
    soon = here.run()
    here.unit.board.up_seconds += 6 * 3600
    late = here.run()

    assert ("nothing to do" in soon, late) == (True, "it was right")


def test_a_clock_that_may_not_be_set_is_a_fault_with_words(site: Callable[..., Site]) -> None:
    here = site(answer(time.time()))

    def forbidden(_: float) -> None:
        raise PermissionError(1, "Operation not permitted")

    with pytest.raises(NoTime, match="the clock cannot be set: Operation not permitted"):
        https_clock.run(here.unit.settings, here.unit.board, set_clock=forbidden)


@contextmanager
def a_board(root: Path) -> Iterator[RaspberryPi]:
    (root / "run/picket").mkdir(parents=True)
    yield RaspberryPi(root)


def test_a_clock_set_by_the_endpoint_is_called_so_until_a_time_server_answers(tmp_path: Path) -> None:
    with a_board(tmp_path) as board:
        first = board.clock().quality
        (tmp_path / "run/picket/clock-https").touch()
        second = board.clock().quality
        (tmp_path / "run/systemd/timesync").mkdir(parents=True)
        (tmp_path / "run/systemd/timesync/synchronized").touch()

        assert (first, second, board.clock().quality) == ("estimated", "https", "ntp")


def test_the_verb_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text(settings_text(tmp_path))

    assert __main__.main(["--settings", str(settings), "clock"]) == __main__.EXIT_FAULT
    assert "nothing is burnt in yet" in capsys.readouterr().err
