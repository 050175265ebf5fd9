"""Bad networks, real broker: the unit keeps its alarms, says why it is offline, comes back by itself, loses nothing.

TLS libraries hold back the news of a failed handshake for up to half a minute, so that all units of this file suffer
at the same time, and the tests only look at one after the other.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.firmware_agent.faults import Cable, FaultProxy, Impostor, login_page, tls_server
from tests.firmware_agent.linking import Running, permit
from tests.firmware_agent.support import Broker, Ca, Unit, free_port, mosquitto_path, pem, pem_key, wait_for

#: How many alarms each unit raises, in three lots.
ALARMS = 30

#: Who may be waited for, and how long; only a test that would hang reaches it.
PATIENCE = 120.0


@dataclass
class Case:
    """One unit and its network."""

    name: str
    running: Running
    proxy: FaultProxy
    #: What its status said, each once.
    said: list[str] = field(default_factory=list)

    @property
    def serial(self) -> str:
        return self.running.link.serial


class Scene:
    """All units, one broker, and what it got."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self.folder = folder
        self.opened = opened
        self.ca = Ca()
        self.broker = Broker(self.ca, folder / "broker")
        permit(self.broker)
        self.cases: dict[str, Case] = {}
        #: Alarms as they came: unit, sequence, event id.
        self.got: list[tuple[str, int, str]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._collect), threading.Thread(target=self._listen)]

    def case(self, name: str, target: int, *, host: str = "localhost") -> FaultProxy:
        """A unit behind a proxy of its own."""
        proxy = FaultProxy(target, seed=len(self.cases))
        self.opened.callback(proxy.close)
        serial = f"PK-NET-{len(self.cases):02d}"
        unit = Unit.make(self.folder / name)
        running = self.opened.enter_context(Running.of(unit, self.ca, proxy.port, serial=serial, host=host))
        self.cases[name] = Case(name, running, proxy)
        return proxy

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def alarms(self, count: int) -> None:
        for case in self.cases.values():
            case.running.alarm(count)

    def restart_broker(self) -> None:
        """Nobody gets to the new one before the observer does: what nobody observes would count as lost."""
        behind = {name: case.proxy.target for name, case in self.cases.items()}
        nowhere = free_port()
        self.broker.stop()
        for case in self.cases.values():
            case.proxy.target = nowhere
        self.broker.start()
        for name, case in self.cases.items():
            case.proxy.target = behind[name]

    def of(self, case: Case) -> list[tuple[int, str]]:
        return [(sequence, event) for serial, sequence, event in list(self.got) if serial == case.serial]

    def _collect(self) -> None:
        while not self._over.is_set():
            try:
                seen = self.broker.seen.get(timeout=0.1)
            except queue.Empty:
                continue
            if seen.topic.endswith("/alarm"):
                self.got.append((seen.topic.split("/")[2], seen.payload["sequence"], seen.payload["event_id"]))

    def _listen(self) -> None:
        while not self._over.wait(0.02):
            for case in self.cases.values():
                detail = case.running.link.status().detail
                if detail not in case.said:
                    case.said.append(detail)


def server_certificate(ca: Ca, *, name: str = "localhost", age_days: int = 0) -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = datetime.now(UTC) - timedelta(days=age_days, hours=1)
    return pem(ca._sign(subject, key.public_key(), names=[name], not_before=start)), pem_key(key)


WEATHER = ("latency", "loss", "narrow", "resets", "partition", "broker-restart")
IMPOSTORS = {
    "login-page": r"answers, but not in TLS: perhaps a login page",
    "other-ca": r"does not trust: (unable to get local issuer|self.signed) certificate",
    "expired": r"does not trust: certificate has expired",
    "other-name": r"does not trust: Hostname mismatch",
}
UNREACHABLE = {
    "no-name": r"the name nowhere\.invalid is not found",
    "nobody": r"SOCKET_CONNECTION_REFUSED|SOCKET_CLOSED|dropped",
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if mosquitto_path() is None:
        pytest.skip("needs mosquitto")
    with ExitStack() as opened:
        scene = Scene(tmp_path_factory.mktemp("network"), opened)
        scene.broker.start()
        opened.callback(scene.broker.stop)
        port = scene.broker.port

        scene.case("latency", port).latency = 3.0  # each way
        scene.case("loss", port).loss = 0.5
        scene.case("narrow", port).bytes_per_second = 2000
        scene.case("resets", port)
        scene.case("partition", port)
        scene.case("broker-restart", port)

        directory = scene.folder
        other = Ca("Another CA")
        behaviours: dict[str, Callable[..., None]] = {
            "login-page": login_page,
            "other-ca": tls_server(directory / "other-ca-server", *server_certificate(other)),
            "expired": tls_server(directory / "expired-server", *server_certificate(scene.ca, age_days=400)),
            "other-name": tls_server(
                directory / "other-name-server", *server_certificate(scene.ca, name="elsewhere.example")
            ),
        }
        for name, behave in behaviours.items():
            impostor = Impostor(behave)
            opened.callback(impostor.close)
            scene.case(name, impostor.port)
        scene.case("no-name", port, host="nowhere.invalid")
        scene.case("nobody", free_port())

        scene.begin()
        opened.callback(scene.end)
        scene.alarms(ALARMS // 3)
        yield scene


@pytest.fixture(scope="module")
def worst(scene: Scene) -> Scene:
    """After everything that can go wrong has gone wrong, while people walked about."""
    for name in ("resets", "partition", "broker-restart"):
        case = scene.cases[name]
        wait_for(case.running.link.connected, PATIENCE)
    scene.cases["partition"].proxy.blackhole(True)
    for _ in range(3):
        scene.cases["resets"].running.alarm(2)
        scene.cases["resets"].proxy.reset()
        time.sleep(0.7)
    scene.restart_broker()
    scene.cases["resets"].running.alarm(ALARMS // 3 - 6)
    for name in scene.cases:
        if name != "resets":
            scene.cases[name].running.alarm(ALARMS // 3)
    return scene


@pytest.fixture(scope="module")
def mended(worst: Scene) -> Scene:
    """After the impostors have gone, the name is found, and the partition is over."""
    for name, words in {**IMPOSTORS, **UNREACHABLE}.items():
        wait_for(lambda name=name, words=words: said(worst.cases[name], words), PATIENCE)  # type: ignore[misc]
    for case in worst.cases.values():
        case.proxy.target = worst.broker.port
    nameless = worst.cases["no-name"].running.link
    nameless.use(replace(worst.cases["no-name"].running.identity, host="localhost"), nameless._key)
    worst.cases["partition"].proxy.blackhole(False)
    worst.alarms(ALARMS // 3)
    return worst


def said(case: Case, words: str) -> bool:
    return any(re.search(words, one) for one in list(case.said))


@pytest.mark.parametrize("name", [*IMPOSTORS, *UNREACHABLE])
def test_the_status_says_in_words_why_the_unit_is_offline_and_alarms_are_kept(worst: Scene, name: str) -> None:
    case = worst.cases[name]

    wait_for(lambda: said(case, {**IMPOSTORS, **UNREACHABLE}[name]), PATIENCE)

    assert len(case.running.spool) == 2 * ALARMS // 3
    assert worst.of(case) == []
    assert not case.running.link.connected()


def test_a_partition_is_noticed_without_an_end_of_the_connection(worst: Scene) -> None:
    case = worst.cases["partition"]

    wait_for(lambda: not case.running.link.connected(), PATIENCE)

    wait_for(lambda: said(case, "nothing is acknowledged any more|TIMEOUT"))


@pytest.mark.parametrize("name", [*WEATHER, *IMPOSTORS, *UNREACHABLE])
def test_everything_arrives_once_the_network_lets_it_and_repetitions_are_known_by_their_id(
    mended: Scene, name: str
) -> None:
    case = mended.cases[name]

    wait_for(lambda: {number for number, _ in mended.of(case)} == set(range(1, ALARMS + 1)), PATIENCE)
    wait_for(lambda: len(case.running.spool) == 0, PATIENCE)

    got = mended.of(case)
    assert len({event for _, event in got}) == ALARMS
    first = list(dict.fromkeys(number for number, _ in got))
    assert first == sorted(first)  # without the repetitions, they came in order
    # The weather goes on: a connection may end even now, and then there is another.
    wait_for(lambda: case.running.link.status().detail == "connected to localhost", PATIENCE)


def test_nobody_hammers_on_the_door(mended: Scene) -> None:
    assert {name: case.proxy.accepted for name, case in mended.cases.items() if case.proxy.accepted > 60} == {}


# --- the kernel's own faults --------------------------------------------------------------------------------------


@pytest.fixture
def cable(broker: Broker) -> Iterator[Cable]:
    permit(broker)
    broker.start()
    try:
        cable = Cable(broker.port)
    except OSError as error:
        pytest.skip(f"needs root and network namespaces ({error})")
    yield cable
    cable.close()


def test_a_cable_that_is_pulled_and_plugged_in_again_costs_nothing(
    unit: Unit, ca: Ca, broker: Broker, cable: Cable
) -> None:
    with Running.of(unit, ca, cable.port) as running:
        running.wait_connected()
        cable.pull()
        running.alarm(5)
        wait_for(lambda: not broker.seen.empty())  # the hello, from before
        time.sleep(1.0)
        assert len(running.spool) == 5
        cable.plug_in()

        assert [broker.next("alarm", PATIENCE)["sequence"] for _ in range(5)] == [1, 2, 3, 4, 5]
        running.wait_drained()


def test_half_of_all_packets_lost_and_a_second_of_delay_cost_only_time(
    unit: Unit, ca: Ca, broker: Broker, cable: Cable
) -> None:
    try:
        cable.netem("delay", "500ms", "100ms", "loss", "50%")
    except OSError as error:
        pytest.skip(f"needs a kernel with netem ({error})")
    with Running.of(unit, ca, cable.port) as running:
        running.alarm(20)

        got = [broker.next("alarm", PATIENCE)["sequence"]]
        while got[-1] < 20:
            got.append(broker.next("alarm", PATIENCE)["sequence"])
        assert sorted(set(got)) == list(range(1, 21))
        running.wait_drained(PATIENCE)
