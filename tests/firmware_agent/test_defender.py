"""Health reports: small, true, and with numbers that only rise."""

import json
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from firmware_agent import defender
from firmware_agent.defender import Defender, Kept, message, next_number
from firmware_agent.network import Network, Traffic, listening, network
from firmware_agent.product import Product
from tests.firmware_agent.linking import Running, permit
from tests.firmware_agent.strict_broker import StrictBroker
from tests.firmware_agent.support import SERIAL, Broker, Ca, Unit, provision, wait_for

TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0F02000A:A0D2 0100007F:22B3 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   2: nonsense
"""
TCP6 = """\
  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 0
   1: 0000000000000000FFFF00000F02000A:0016 0000000000000000FFFF00000202000A:D431 01 0
   2: B80D0120000000000000000001000000:0016 B80D0120000000000000000002000000:0050 01 0
"""
UDP = """\
   sl  local_address rem_address   st
  145: 3500007F:0035 00000000:0000 07 0
  146: 0F02000A:0044 0202000A:0043 01 0
"""
RAW6 = """\
  sl  local_address                         remote_address                        st
   58: 00000000000000000000000000000000:003A 00000000000000000000000000000000:0000 07 0
"""
DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier comp
    lo:  999 9 0 0 0 0 0 0 999 9 0 0 0 0 0 0
  eth0: {0} 10 0 0 0 0 0 0 2000 20 0 0 0 0 0 0
 wlan0: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    folder = tmp_path / "net"
    folder.mkdir()
    for name, text in (("tcp", TCP), ("tcp6", TCP6), ("udp", UDP), ("dev", DEV.format(1000))):
        (folder / name).write_text(text)
    return folder


def test_ports_connections_and_traffic_are_read_from_the_kernels_tables(net: Path) -> None:
    assert network(net) == Network(
        tcp=(22,),
        udp=(53,),
        connections=((0xA0D2, "127.0.0.1:8883"), (22, "10.0.2.2:54321"), (22, "[2001:db8::2]:80")),
        traffic=Traffic(1001, 2003, 12, 24),
    )


def test_a_kernel_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    assert network(tmp_path) == Network()
    assert listening(tmp_path) == []


def test_what_somebody_could_reach_is_told_with_its_address_and_without_the_loop(net: Path) -> None:
    (net / "raw6").write_text(RAW6)

    assert listening(net) == ["raw :::58", "tcp 0.0.0.0:22", "tcp :::22"]


def test_a_listener_of_this_machine_is_told_while_it_listens() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:  # noqa: S104 - that is the point
        line = f"tcp 0.0.0.0:{listener.getsockname()[1]}"

        assert line in listening()

    assert line not in listening()


def test_this_machines_own_sockets_are_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            found = network()

    assert port in found.tcp
    assert any(remote == f"127.0.0.1:{port}" for _, remote in found.connections)


def test_the_message_is_as_the_service_documents_it() -> None:
    now = Network((22,), (53,), ((40000, "10.0.2.2:8883"),))

    assert json.loads(message(7, now, Traffic(1, 2, 3, 4), {"spool_depth": 5})) == {
        "header": {"report_id": 7, "version": "1.0"},
        "metrics": {
            "listening_tcp_ports": {"ports": [{"port": 22}], "total": 1},
            "listening_udp_ports": {"ports": [{"port": 53}], "total": 1},
            "tcp_connections": {
                "established_connections": {
                    "connections": [{"local_port": 40000, "remote_addr": "10.0.2.2:8883"}],
                    "total": 1,
                }
            },
            "network_stats": {"bytes_in": 1, "bytes_out": 2, "packets_in": 3, "packets_out": 4},
        },
        "custom_metrics": {"spool_depth": [{"number": 5}]},
    }


PORTS = st.lists(st.integers(0, 65535), max_size=2000).map(tuple)
REMOTE = st.sampled_from(["10.0.0.1:8883", "[2001:db8:1234:5678:9abc:def0:1234:5678]:65535"])


MANY = tuple(range(60000, 62000))
CONNECTIONS = st.lists(st.tuples(st.integers(0, 65535), REMOTE), max_size=2000).map(tuple)


@settings(deadline=None)
@given(PORTS, PORTS, CONNECTIONS, st.integers(0, 2**63))
@example(MANY, MANY, tuple((port, "[2001:db8:1234:5678:9abc:def0:1234:5678]:65535") for port in MANY), 2**63)
def test_every_message_is_under_five_kilobytes_and_keeps_the_totals(
    tcp: Any, udp: Any, connections: Any, number: int
) -> None:
    custom = dict.fromkeys("abcdefghijklmnop", -123456789.123)
    text = message(number, Network(tcp, udp, connections), Traffic(*(number,) * 4), custom)

    assert len(text) < 5000
    metrics = json.loads(text)["metrics"]
    established = metrics["tcp_connections"]["established_connections"]
    assert metrics["listening_tcp_ports"]["total"] == len(tcp)
    assert metrics["listening_udp_ports"]["total"] == len(udp)
    assert established["total"] == len(connections)
    assert (
        metrics["listening_tcp_ports"]["ports"]
        == [{"port": port} for port in tcp][: len(metrics["listening_tcp_ports"]["ports"])]
    )


@settings(deadline=None, max_examples=50)  # it writes files
@given(st.lists(st.tuples(st.floats(0, 4e9), st.booleans()), max_size=50))
def test_numbers_rise_over_restarts_and_clock_steps(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, bool]]
) -> None:
    path = tmp_path_factory.mktemp("reports") / "reports.json"
    last, kept = 0, Kept()
    for unix, restart in steps:
        kept = Kept(next_number((defender.load(path) if restart else kept).number, unix), unix)
        defender.save(path, kept)

        assert kept.number > last
        last = kept.number


@settings(deadline=None, max_examples=50)  # it writes files
@given(st.binary(max_size=80) | st.sampled_from([b'{"format":1,"number":1e999,"at":0,"false":[]}', b'{"format":1}']))
def test_a_damaged_record_is_none(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("reports") / "reports.json"
    path.write_bytes(content)

    assert defender.load(path) == Kept()


def test_a_counter_that_began_anew_gives_no_difference() -> None:
    assert Traffic(5, 5, 5, 5).since(Traffic(1, 2, 3, 4)) == Traffic(4, 3, 2, 1)
    assert Traffic(5, 0, 5, 5).since(Traffic(1, 2, 3, 4)) is None


def make(running: Running, unit: Unit, net: Path, seconds: float = 0.0) -> Defender:
    paths = unit.settings.paths
    return Defender(
        running.link,
        unit.board,
        state=paths.state,
        path=paths.reports,
        spool=lambda: len(running.spool),
        seconds=lambda: seconds,
        net=net,
    )


def test_reports_go_out_with_traffic_as_a_difference_and_what_is_said_to_them_is_known(
    unit: Unit, ca: Ca, broker: Broker, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defender, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(defender, "_TICK_SECONDS", 0.01)
    permit(broker)
    broker.start()
    reports: list[dict[str, Any]] = []
    refuse = threading.Event()

    with ExitStack() as opened:
        running = opened.enter_context(Running.of(unit, ca, broker.port))
        # The service answers on its own topics, without a client token.
        topic = f"$aws/things/{SERIAL}/defender/metrics/json"

        def serve(_: str, payload: bytes) -> None:
            report = json.loads(payload)
            reports.append(report)
            status = "REJECTED" if refuse.is_set() else "ACCEPTED"
            answer = {"thingName": SERIAL, "reportId": report["header"]["report_id"], "status": status}
            if refuse.is_set():
                answer["statusDetails"] = {"ErrorCode": "Throttled", "ErrorMessage": "too many"}
            running.link.publish(f"{topic}/{status.lower()}", json.dumps(answer).encode())

        running.link.subscribe("service", [topic], serve)
        running.wait_connected()
        wait_for(lambda: running.link._session is not None and len(running.link._session.made) == 1)
        one = make(running, unit, net)
        one.alarm()
        one.disarmed()
        stop = threading.Event()
        thread = threading.Thread(target=one.run, args=(stop,))
        thread.start()
        opened.callback(thread.join)
        opened.callback(stop.set)

        wait_for(lambda: len(reports) >= 1)
        (net / "dev").write_text(DEV.format(1500))
        wait_for(lambda: any(r["metrics"].get("network_stats", {}).get("bytes_in") == 500 for r in reports))
        refuse.set()
        wait_for(lambda: one.fault is not None and "Throttled" in one.fault)
        refuse.clear()
        wait_for(lambda: one.fault is None)

    assert "network_stats" not in reports[0]["metrics"]
    custom = reports[0]["custom_metrics"]
    assert custom["temperature_c"] == [{"number": 45.2}]
    assert custom["false_alarm_percent"] == [{"number": 100}]
    assert custom["certificate_days"] == [{"number": 364}]
    numbers = [report["header"]["report_id"] for report in reports]
    assert numbers == sorted(set(numbers))
    again = make(running, unit, net)
    assert again.incidents.false == (True,)


def test_the_pause_between_reports_holds_over_a_restart(unit: Unit, ca: Ca, broker: Broker, net: Path) -> None:
    with Running.of(unit, ca, broker.port) as running:
        assert make(running, unit, net)._rest() == 0.0
        defender.save(unit.settings.paths.reports, Kept(5, unit.board.clock().unix - 100, ()))

        assert 190 < make(running, unit, net)._rest() <= 200  # five minutes, whatever less was asked for
        assert 790 < make(running, unit, net, seconds=900.0)._rest() <= 800
        unit.board.clock_offset = -1e9  # a clock that stepped back must not silence it for thirty years
        assert make(running, unit, net)._rest() == 0.0


def test_product_mode_reports_and_counts_alarms(unit: Unit, ca: Ca, tmp_path: Path) -> None:
    strict = StrictBroker(ca, tmp_path / "strict")
    try:
        provision(unit, ca, strict.port)
        product = Product(unit.settings, unit.board, unit.pins)
        product.start()
        try:
            unit.pir.drive_high()
            wait_for(lambda: any(topic.endswith("/defender/metrics/json") for topic, _ in strict.published))
            health = product._defender
            assert health is not None
            wait_for(lambda: health.incidents.false == (False,))
            product._armed(False)
            assert health.incidents.false == (True,)
        finally:
            product.stop()
            product.join()
    finally:
        strict.close()

    assert defender.load(unit.settings.paths.reports).false == (True,)
