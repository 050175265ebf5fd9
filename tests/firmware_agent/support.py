"""What the agent's tests stand on: a CA, a broker, a TPM, a board. All real but the board."""

import contextlib
import json
import queue
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from gpiozero.pins.mock import MockFactory

from firmware_agent import wire
from firmware_agent.board import ClockReading, Facts, Health, Quality
from firmware_agent.identity import Identity
from firmware_agent.pins import FactoryPins, Pins
from firmware_agent.provisioning import Provisioning
from firmware_agent.settings import Settings, parse

SERIAL = "PK-000001"
BOARD = "10000000c0ffee01"
LINE = 17
TAMPER = 27


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until `condition` holds; the limit only ends a test that would hang."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("waited in vain")
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- certificates -------------------------------------------------------------------------------------------------


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def pem_key(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


class Ca:
    """A CA that signs whatever a test wants."""

    def __init__(self, name: str = "Test CA") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self.name, self.key.public_key(), ca=True)

    def leaf(
        self,
        key: ec.EllipticCurvePublicKey,
        serial: str = SERIAL,
        board: str = BOARD,
        not_before: datetime | None = None,
    ) -> x509.Certificate:
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Picket"),
                x509.NameAttribute(NameOID.COMMON_NAME, serial),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, board),
            ]
        )
        return self._sign(subject, key, not_before=not_before)

    def server(self) -> tuple[str, str]:
        """Certificate and key of a server on localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        return pem(self._sign(name, key.public_key(), names=["localhost"])), pem_key(key)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *,
        ca: bool = False,
        names: list[str] | None = None,
        not_before: datetime | None = None,
    ) -> x509.Certificate:
        start = not_before or datetime.now(UTC) - timedelta(hours=1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False
            )
        return builder.sign(self.key, hashes.SHA256())


# --- the board ----------------------------------------------------------------------------------------------------


@dataclass
class TestBoard:
    """A board in plain sight; tests change its fields."""

    __test__ = False

    quality: Quality = "ntp"
    clock_offset: float = 0.0
    up_seconds: float = 3600.0
    started: float = field(default_factory=time.monotonic)

    def facts(self) -> Facts:
        return Facts(
            serial=BOARD,
            revision="a02082",
            model="Raspberry Pi 3 Model B Rev 1.2",
            macs={"eth0": "b8:27:eb:00:00:01"},
            medium_cid="1b534d3030303030",
            medium_bytes=8_000_000_000,
            memory_bytes=950_000_000,
            boot_id="7d3f0d4e-0000-4000-8000-000000000001",
            kernel="6.12.48-arm64",
        )

    def health(self, state: Path) -> Health:
        return Health(45.2, 0, shutil.disk_usage(state).free, 500_000_000)

    def clock(self) -> ClockReading:
        return ClockReading(time.time() + self.clock_offset, self.quality)

    def uptime(self) -> float:
        return self.up_seconds + time.monotonic() - self.started


def settings_text(root: Path, *, store: str = "file", tcti: str = "", module: str = "/usr/lib/none.so") -> str:
    return f"""
[image]
name = "picket"
version = "0.1.0"
[key]
store = "{store}"
[tpm]
tcti = "{tcti}"
module = "{module}"
[pir]
warm_up_seconds = 0
blocked_seconds = 0
[mqtt]
keep_alive_seconds = 45
[tuning]
quiet_seconds = 0
heartbeat_seconds = 3600
[paths]
state = "{root}/state"
run = "{root}/run"
host_key = "{root}/host_key.pub"
sealed = "{root}/sealed"
"""


@dataclass
class Unit:
    """A board with its settings and its PIR."""

    root: Path
    settings: Settings
    board: TestBoard
    factory: Any
    pins: Pins

    @classmethod
    def make(cls, root: Path, *, store: str = "file", tcti: str = "", module: str = "/usr/lib/none.so") -> "Unit":
        factory = MockFactory()
        settings = parse(settings_text(root, store=store, tcti=tcti, module=module))
        return cls(root, settings, TestBoard(), factory, FactoryPins(factory, LINE))

    @property
    def pir(self) -> Any:
        """The mock pin: `drive_high`, `drive_low`."""
        return self.factory.pin(f"GPIO{LINE}")

    @property
    def case(self) -> Any:
        """The mock pin of the case's loop, for a unit that has one."""
        return self.factory.pin(f"GPIO{TAMPER}")

    def with_case(self) -> "Unit":
        """The same with a loop through its case, which is open until `case` is driven high."""
        return replace(self, pins=FactoryPins(self.factory, LINE, TAMPER))

    def with_heartbeat(self, seconds: float) -> "Unit":
        tuning = replace(self.settings.tuning, heartbeat_seconds=seconds)
        return replace(self, settings=replace(self.settings, tuning=tuning))


class Station:
    """The other end of the wire, over a real socket."""

    def __init__(self, unit: Unit) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self.stream = ours.makefile("rwb", buffering=0)
        provisioning = Provisioning(unit.settings, unit.board, unit.pins, sleep=lambda _: None)

        def serve() -> None:
            with theirs, theirs.makefile("rwb", buffering=0) as stream:
                provisioning.serve(stream)

        self._thread = threading.Thread(target=serve)
        self._thread.start()
        self._id = 0
        self.events: list[dict[str, Any]] = []

    def send(self, line: bytes) -> None:
        self.stream.write(line)

    def reply(self) -> wire.Reply:
        line = b""
        while not line.endswith(b"\n"):  # an unbuffered file may give a line in parts
            part = self.stream.readline()
            if not part:
                break
            line += part
        return wire.decode_reply(line)

    def ask(
        self,
        verb: str,
        on_event: Callable[[dict[str, Any]], None] = lambda _: None,
        **params: Any,
    ) -> dict[str, Any]:
        """The result, or the fault as an exception."""
        self._id += 1
        self.send(wire.encode_request(wire.Request(self._id, verb.replace("_", "-"), params)))
        while True:
            match self.reply():
                case wire.Event(self._id, event):
                    self.events.append(event)
                    on_event(event)
                case wire.Result(self._id, result):
                    return result
                case wire.Fault(self._id, code, message):
                    raise FaultError(code, message)
                case other:
                    raise AssertionError(other)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._thread.join()
        self.stream.close()
        self._socket.close()


class FaultError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def burn_in_params(ca: Ca, leaf: x509.Certificate, trust: str, port: int = 8883) -> dict[str, Any]:
    return {
        "serial": SERIAL,
        "chain": pem(leaf) + pem(ca.certificate),
        "trust": trust,
        "endpoint": {"host": "localhost", "port": port},
        "batch": "WO-7",
    }


def provision(unit: Unit, ca: Ca, port: int = 8883) -> Identity:
    """Enrol and burn in over the wire, and what is then in force."""
    from firmware_agent import identity  # noqa: PLC0415

    station = Station(unit)
    try:
        csr = x509.load_pem_x509_csr(station.ask("enrol", serial=SERIAL)["csr"].encode())
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        station.ask("burn-in", **burn_in_params(ca, ca.leaf(key), pem(ca.certificate), port))
    finally:
        station.close()
    return identity.load(unit.settings.paths.identity)


# --- the broker ---------------------------------------------------------------------------------------------------


def mosquitto_path() -> str | None:
    return shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


@dataclass(frozen=True)
class Seen:
    topic: str
    payload: dict[str, Any]


class Broker:
    """mosquitto with mutual TLS: each client may publish under its own name, `observer` sees all."""

    def __init__(self, ca: Ca, directory: Path) -> None:
        program = mosquitto_path()
        assert program is not None
        self._program = program
        self._directory = directory
        self.ca = ca
        self.port = free_port()
        certificate, key = ca.server()
        directory.mkdir()
        (directory / "ca.pem").write_text(pem(ca.certificate))
        (directory / "server.pem").write_text(certificate)
        (directory / "server.key").write_text(key)
        (directory / "acl").write_text("user observer\ntopic read #\npattern write dt/picket/%u/#\n")
        (directory / "conf").write_text(
            f"""
listener {self.port} 127.0.0.1
cafile {directory}/ca.pem
certfile {directory}/server.pem
keyfile {directory}/server.key
require_certificate true
use_identity_as_username true
acl_file {directory}/acl
persistence false
user root
"""
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._observer: Any = None
        self.seen: queue.SimpleQueue[Seen] = queue.SimpleQueue()

    def start(self) -> None:
        log = self._directory / "log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [self._program, "-c", str(self._directory / "conf")], stdout=out, stderr=subprocess.STDOUT
            )

        def listens() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
            return False

        wait_for(listens)
        self._observe()

    def stop(self) -> None:
        if self._observer is not None:
            stop, stopped = self._observer
            stop()
            stopped.result(10)
            self._observer = None
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(10)
            self._process = None

    def _observe(self) -> None:
        from awscrt import io, mqtt5  # noqa: PLC0415

        key = ec.generate_private_key(ec.SECP256R1())
        tls = io.TlsContextOptions.create_client_with_mtls(
            pem(self.ca.leaf(key.public_key(), "observer")).encode(), pem_key(key).encode()
        )
        tls.override_default_trust_store(pem(self.ca.certificate).encode())
        up: Future[None] = Future()
        stopped: Future[None] = Future()

        def received(data: Any) -> None:
            packet = data.publish_packet
            self.seen.put(Seen(packet.topic, json.loads(packet.payload)))

        def connected(_: Any) -> None:
            if not up.done():  # a reconnect
                up.set_result(None)

        client = mqtt5.Client(
            mqtt5.ClientOptions(
                host_name="localhost",
                port=self.port,
                tls_ctx=io.ClientTlsContext(tls),
                connect_options=mqtt5.ConnectPacket(client_id="observer"),
                on_publish_callback_fn=received,
                on_lifecycle_event_connection_success_fn=connected,
                on_lifecycle_event_stopped_fn=lambda _: stopped.set_result(None),
            )
        )
        client.start()
        up.result(20)
        client.subscribe(
            mqtt5.SubscribePacket(subscriptions=[mqtt5.Subscription("#", mqtt5.QoS.AT_LEAST_ONCE)])
        ).result(20)
        self._observer = (client.stop, stopped)

    def next(self, kind: str, seconds: float = 20.0) -> dict[str, Any]:
        """The next message of `kind`; others are passed over."""
        end = time.monotonic() + seconds
        while True:
            seen = self.seen.get(timeout=max(0.01, end - time.monotonic()))
            if seen.topic.endswith("/" + kind):
                return seen.payload


# --- the TPM ------------------------------------------------------------------------------------------------------

PKCS11_MODULES = (
    *Path("/usr/lib").glob("*/libtpm2_pkcs11.so.1"),
    *Path("/usr/lib").glob("*/pkcs11/libtpm2_pkcs11.so"),
)


def tpm_parts_missing() -> list[str]:
    missing = [] if shutil.which("swtpm") else ["swtpm"]
    if not PKCS11_MODULES:
        missing.append("libtpm2_pkcs11")
    if not list(Path("/usr/lib").glob("*/libtss2-tcti-swtpm.so.0")):
        missing.append("libtss2-tcti-swtpm")
    return missing


def free_pair() -> int:
    """The lower of two free ports: tpm2-tss takes swtpm's control socket to be one above the data socket."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port


@contextlib.contextmanager
def swtpm(state: Path) -> Iterator[str]:
    """A software TPM with its state in a directory; gives its TCTI."""
    state.mkdir(exist_ok=True)
    port = free_pair()
    process = subprocess.Popen(
        [
            "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}",
            "--server", f"type=tcp,port={port},bindaddr=127.0.0.1",
            "--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1",
            "--flags", "not-need-init,startup-clear",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        from firmware_agent.keys import tpm  # noqa: PLC0415

        tcti = f"swtpm:host=127.0.0.1,port={port}"
        wait_for(lambda: tpm.present(tcti))
        yield tcti
    finally:
        process.terminate()
        process.wait(10)
