"""The agent in the field, and its peer: each a process of its own, behind a meter, at a mosquitto of its own."""

import os
import queue
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cryptography.hazmat.primitives.asymmetric import ec

from bench.figures import NotMeasuredError
from bench.meter import Meter
from bench.tools import ROOT, program
from factory.drivers import simulated_init, simulated_tree
from factory.drivers.gpio_server import GpioServer
from firmware_agent import identity, keys
from firmware_agent.identity import Identity
from firmware_agent.settings import Settings, load
from tests.firmware_agent.jobs_service import Bridge, JobsService
from tests.firmware_agent.linking import permit
from tests.firmware_agent.shadow_service import ShadowService
from tests.firmware_agent.support import BOARD, SERIAL, Broker, Ca, pem, pem_key

LINE = 17
LABEL = "bench-gpio"
START_SECONDS = 60.0
ALARM_SECONDS = 10.0
#: Bytes of an alarm's TLS record, at least.
_LEAST_ALARM = 150

_SETTINGS = """\
[image]
name = "bench"
version = "0.1.0"
[key]
store = "file"
[tpm]
tcti = ""
[gpio]
driver = "unix:{folder}/gpio"
[pir]
warm_up_seconds = 0
blocked_seconds = 0
[pir.lines]
"{label}" = {line}
[tuning]
quiet_seconds = 0
[mqtt]
publishes_per_second = {rate}
[update]
root = "{folder}/root.json"
health_seconds = 10
soft_seconds = 30
[paths]
board = "{folder}/kernel"
state = "{folder}/state"
run = "{folder}/run"
releases = "{folder}/releases"
"""


class Device(ABC):
    """A process that watches a PIR and publishes."""

    def __init__(self, process: "subprocess.Popen[str]", site: "Site") -> None:
        self.process = process
        self.site = site

    @abstractmethod
    def drive(self, *, high: bool) -> None:
        """Set the level of the PIR's line."""

    def edge_to_wire(self) -> float:
        """Seconds from a rising edge until its PUBLISH is on the wire.

        What is on the wire is encrypted: it is the last large record before the alarm has come through the broker. That
        may be one too late, never one too early.
        """
        began = time.monotonic()
        self.drive(high=True)
        self.site.broker.next("alarm", ALARM_SECONDS)
        return self.site.meter.last_sent(began, time.monotonic(), _LEAST_ALARM) - began

    def memory(self) -> float:
        """Resident memory in MB (10^6 bytes): Rss of /proc/PID/smaps_rollup, pages shared with others included."""
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise RuntimeError("the kernel tells no Rss")

    def processor_seconds(self) -> float:
        """Processor time so far, of user and system together."""
        after_name = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")  # proc(5): utime, stime


class _Agent(Device):
    def __init__(self, process: "subprocess.Popen[str]", site: "Site", gpio: GpioServer) -> None:
        super().__init__(process, site)
        self._gpio = gpio

    def drive(self, *, high: bool) -> None:
        self._gpio.drive(LINE, high=high)


class Sample(Device):
    """The SDK's sample."""

    def flood(self, count: int) -> None:
        """Have it publish so often at once, and wait until the last is acknowledged."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"flood {count}\n")
        self.process.stdin.flush()
        if self.process.stdout.readline().strip() != "flooded":
            raise RuntimeError("the SDK's sample did not publish all")

    def drive(self, *, high: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("1\n" if high else "0\n")
        self.process.stdin.flush()


@dataclass(frozen=True)
class Site:
    """A broker with its CA, and the jobs of its devices; agents and samples are put there one at a time."""

    folder: Path
    broker: Broker
    meter: Meter
    jobs: JobsService

    def settings(self, *, rate: int = 90) -> Settings:
        """The agent's settings and identity, made now; its state is empty but for these."""
        for name in ("state", "run"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        text = _SETTINGS.format(folder=self.folder, label=LABEL, line=LINE, rate=rate)
        (self.folder / "agent.toml").write_text(text)
        simulated_tree.boot(self.folder / "kernel", BOARD, medium_bytes=64 * 2**20, celsius=41.5)
        settings = load(self.folder / "agent.toml")
        store = keys.open_store(settings)
        public = store.ensure().public_key()
        store.close()
        ca = self.broker.ca
        leaf = ca.leaf(public, board=BOARD)
        chain = pem(leaf) + pem(ca.certificate)
        found = Identity(SERIAL, chain, pem(ca.certificate), "localhost", self.meter.port, "WO-1")
        identity.install(settings.paths.identity, found)
        return settings

    @contextmanager
    def agent(self) -> Iterator[Device]:
        """Our agent, connected; `settings` was called before."""
        with ExitStack() as stack:
            gpio = GpioServer(self.folder / "gpio", LABEL, frozenset({LINE}))
            stack.callback(gpio.close)
            arguments = ["-m", "firmware_agent", "--settings", str(self.folder / "agent.toml"), "run"]
            process = stack.enter_context(_running(arguments, self.folder / "agent.log"))
            self._await_hello(self.folder / "agent.log")
            yield _Agent(process, self, gpio)

    @contextmanager
    def launched(self) -> Iterator[GpioServer]:
        """Our agent as a unit has it: the release in force, started by the launcher, watched over by a process 1.

        `settings` was called before, and a release is in force in `releases`. It is connected.
        """
        state, log = self.folder / "state", self.folder / "agent.log"
        launcher = ["-I", "-S", str(ROOT / "firmware_agent/launcher.py"), "--state", str(state)]
        agent = [
            "--releases",
            str(self.folder / "releases"),
            "--",
            "--settings",
            str(self.folder / "agent.toml"),
            "run",
        ]
        config = simulated_init.Config(
            command=[sys.executable, *launcher, *agent],
            environment={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"},
            directory=str(self.folder / "run"),
            notify=str(self.folder / "notify"),
            reboot_request=str(state / "reboot-request"),
        )
        config.dump(self.folder / "init.json")
        with ExitStack() as stack:
            gpio = GpioServer(self.folder / "gpio", LABEL, frozenset({LINE}))
            stack.callback(gpio.close)
            init = stack.enter_context(
                subprocess.Popen(
                    simulated_init.command(sys.executable, self.folder / "init.json"),
                    stdin=subprocess.PIPE,  # its supply: when it closes, the power is gone
                    stdout=stack.enter_context(log.open("w")),
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
            assert init.stdin is not None
            stack.callback(init.stdin.close)
            self._await_hello(log)
            yield gpio

    def _await_hello(self, log: Path) -> None:
        try:
            self.broker.next("hello", START_SECONDS)
        except queue.Empty:
            raise RuntimeError(f"the agent does not connect: {log.read_text()[-800:]}") from None

    @contextmanager
    def sample(self) -> Iterator[Sample]:
        """The SDK's sample, connected."""
        key = ec.generate_private_key(ec.SECP256R1())
        ca = self.broker.ca
        files = {"trust": pem(ca.certificate), "certificate": pem(ca.leaf(key.public_key())), "key": pem_key(key)}
        for name, text in files.items():
            (self.folder / name).write_text(text)
        arguments = ["bench/sdk_sample.py", "localhost", str(self.meter.port)]
        arguments += [str(self.folder / name) for name in files] + [SERIAL]
        with _running(arguments, self.folder / "sample.log") as process:
            assert process.stdout is not None
            if _first_line(process.stdout) != "connected":
                raise RuntimeError(
                    "the SDK's sample did not connect: " + (self.folder / "sample.log").read_text()[-500:]
                )
            yield Sample(process, self)


def _first_line(stream: IO[str]) -> str:
    """A process's first line, or nothing after a while."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: lines.put(stream.readline()), daemon=True).start()
    try:
        return lines.get(timeout=START_SECONDS).strip()
    except queue.Empty:
        return ""


@contextmanager
def _running(arguments: list[str], log: Path) -> Iterator["subprocess.Popen[str]"]:
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


@contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """A broker behind a meter, with the cloud's jobs and shadows.

    Raises:
        NotMeasuredError: mosquitto is not installed.
    """
    if program("mosquitto") is None:
        raise NotMeasuredError("mosquitto is not installed; `make setup` installs it")
    with ExitStack() as stack:
        broker = Broker(Ca(), folder / "broker")
        permit(broker)
        broker.start()
        stack.callback(broker.stop)
        jobs = JobsService()
        stack.enter_context(Bridge(jobs, broker.ca, broker.port))
        shadows = ShadowService(broker.ca, broker)
        shadows.start()
        stack.callback(shadows.stop)
        yield Site(folder, broker, stack.enter_context(Meter(broker.port)), jobs)
