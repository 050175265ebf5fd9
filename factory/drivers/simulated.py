"""The simulated board: one object that is medium, supply, console, network and sensor, so that its parts agree.

On it runs the real firmware agent, as processes of the release on the board's medium: in factory mode behind a real SSH
server on loopback, in product mode started by the real launcher. It reads its facts from a kernel's files and its
sensor through a socket, so nothing of it knows where it runs. On the console, a real pty, stands the banner. What a
board keeps lies in one folder: its SoC serial, its medium, and the root file system that was on it. It refuses nonsense
(a medium written while the board has power), and faults can be injected by name.

    <place>/medium.img      what the station flashes
    <place>/root/           what the image unpacked: launcher, releases, TUF root; and what the agent keeps
    <place>/kernel/         what the kernel shows (simulated_tree.py)
    <place>/run/            what a boot forgets
    <place>/log             all that was said on the console, and more
"""

import io
import json
import os
import pty
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import tty
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from paramiko.ed25519key import Ed25519Key

from factory.bench import Bench
from factory.drivers import faults as injected
from factory.drivers import simulated_init, simulated_tree
from factory.drivers.console import SerialConsole
from factory.drivers.gpio_server import GpioServer
from factory.drivers.pir import Pir, PirFault
from factory.drivers.simulated_medium import NoBootError, SimulatedStorage, unpack
from factory.drivers.simulated_ssh import FactorySsh, Program
from factory.drivers.software_tpm import SoftwareTpm, missing
from factory.drivers.ssh import SshShell
from factory.errors import StationFault, UserMistake
from factory.files import write_whole
from firmware_agent import __version__ as agent_version
from firmware_agent.board import RaspberryPi
from firmware_agent.errors import SettingsFault
from firmware_agent.settings import Settings
from firmware_agent.settings import parse as parse_settings
from firmware_agent.wire import Banner

MEDIUM_BYTES = 64 * 2**20
GPIO_CHIP = "pinctrl-bcm2835"
PIR_LINE = 17
CASE_LINE = 27
CELSIUS, HOT_CELSIUS = 41.5, 97.0
BANNER_SECONDS = 0.05
#: Of the station's environment, what a program needs to run at all.
PASSED_ON = ("PATH", "HOME", "LD_LIBRARY_PATH", "TSS2_LOG")


class SimulatedBoard:
    """A board in a folder. `faults` are names of `factory.drivers.faults.KNOWN`."""

    def __init__(self, place: Path, factory_key: str, *, faults: frozenset[str], tpm: bool) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place = place.absolute()
        self.factory_key = factory_key
        self.faults = faults
        self.tpm = SoftwareTpm(place) if tpm else None
        self.serial = _kept(place / "soc-serial", lambda: f"10000000{secrets.token_hex(4)}")
        size = MEDIUM_BYTES // 8 if injected.SMALL_MEDIUM in faults else MEDIUM_BYTES
        self.storage = SimulatedStorage(
            place / "medium.img",
            size,
            in_use=lambda: self.powered,
            erased=lambda: shutil.rmtree(self.root, ignore_errors=True),
            bit_flips=injected.FLIPPED_BIT in faults,
        )
        # Unix sockets have short names (108 bytes), folders of tests have not.
        self.sockets = Path(tempfile.mkdtemp(prefix="picket-"))
        self._gpio = GpioServer(self.sockets / "gpio", GPIO_CHIP, frozenset({PIR_LINE, CASE_LINE}))
        self.pir = Pir(
            lambda high: self._gpio.drive(PIR_LINE, high=high),
            fault=next((PirFault(one) for one in sorted(faults) if one in set(PirFault)), None),
        )
        self.console = _Console(place / "log")
        self._system: _System | None = None
        # One thread does all the switching: what it starts (swtpm) would end with a thread that does not last.
        self._switch = ThreadPoolExecutor(1, "power")

    # --- supply -----------------------------------------------------------------------------------------------

    @property
    def powered(self) -> bool:
        """Whether the board has power."""
        return self._system is not None

    def on(self) -> None:
        """Power the board: its sensor wakes, and it boots what is on its medium."""
        self._switch.submit(self._on).result()

    def off(self) -> None:
        """Cut the power. The medium keeps what was written to it, nothing else stays."""
        self._switch.submit(self._off).result()

    def reboot(self, system: "_System") -> None:
        """Boot again soon, as `system` asks for; the power is never cut, so the sensor stays warm."""
        self._switch.submit(self._reboot, system)

    def _on(self) -> None:
        if self._system is None:
            self.pir.power(on=True)
            self.close_case()
            self._boot()

    def _off(self) -> None:
        if self._system is not None:
            self._system.stop()
            self._system = None
        if self.tpm is not None:
            self.tpm.off()
        self.pir.power(on=False)

    def _reboot(self, system: "_System") -> None:
        if self._system is system:
            system.stop()
            if self.tpm is not None:
                self.tpm.off()
            self._boot()

    def close(self) -> None:
        """Take the board away."""
        self.off()
        self._switch.shutdown()
        self._gpio.close()
        self.console.close()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def _boot(self) -> None:
        if self.tpm is not None:
            self.tpm.on()
        hot = injected.HOT in self.faults
        celsius = HOT_CELSIUS if hot else CELSIUS
        simulated_tree.boot(self.kernel, self.serial, medium_bytes=MEDIUM_BYTES, celsius=celsius)
        self._system = _System(self, self._load())
        self._system.start()

    # --- what is wired to the station ----------------------------------------------------------------------------

    def console_url(self) -> str:
        """Where pyserial finds the console."""
        return self.console.path

    def ssh_address(self, _banner: Banner) -> tuple[str, int]:
        """Where SSH listens, or port 9 (discard, nobody listens) while it does not."""
        return "127.0.0.1", (self._system.ssh_port if self._system is not None else 0) or 9

    @property
    def settle_seconds(self) -> float:
        """The simulated sensor is quiet from the start."""
        return 0.0

    @property
    def reaction_seconds(self) -> float:
        """It moves at once."""
        return 0.0

    def wave(self) -> None:
        """Move in front of the sensor."""
        self.pir.wave()

    def open_case(self) -> None:
        """Open the case: its loop is cut, and a pull-down takes the line."""
        self._gpio.drive(CASE_LINE, high=False)

    def close_case(self) -> None:
        """Close the case."""
        self._gpio.drive(CASE_LINE, high=True)

    # --- inside ----------------------------------------------------------------------------------------------------

    @property
    def root(self) -> Path:
        """The root file system that was on the medium."""
        return self.place / "root"

    @property
    def kernel(self) -> Path:
        """What the kernel shows of itself."""
        return self.place / "kernel"

    @property
    def settings_file(self) -> Path:
        """The settings of the image, as they apply on this board."""
        return self.place / "agent.toml"

    def _load(self) -> Settings | None:
        """What the boot ROM and the system find on the medium; None if it does not boot."""
        try:
            unpack(self.storage.path, self.root)
            document = tomllib.loads((self.root / "etc/picket/agent.toml").read_text())
            text = _toml(_merged(document, self._wiring()))
            settings = parse_settings(text)
        except (NoBootError, OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, SettingsFault) as error:
            self.console.say(f"boot: {error}")
            return None
        write_whole(self.settings_file, text.encode())
        return settings

    def _wiring(self) -> dict[str, dict[str, str]]:
        """What this board's system has elsewhere than a Pi's: it is a folder, and its lines are behind a socket."""
        return {
            "gpio": {"driver": f"unix:{self.sockets / 'gpio'}"},
            "tpm": {"tcti": ""} if self.tpm is None else self.tpm.wiring(),
            "update": {"root": str(self.root / "usr/share/picket/root.json")},
            "paths": {
                "state": str(self.root / "var/lib/picket"),
                "releases": str(self.root / "opt/picket"),
                "host_key": str(self.root / "etc/ssh/ssh_host_ed25519_key.pub"),
                "sealed": str(self.root / "data/system/sealed"),
                "run": str(self.place / "run"),
                "clock_epoch": str(self.root / "usr/lib/clock-epoch"),
                "board": str(self.kernel),
            },
        }


def _merged(document: Mapping[str, Any], wiring: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    return {name: {**document.get(name, {}), **wiring.get(name, {})} for name in {**document, **wiring}}


def _toml(document: Mapping[str, Any]) -> str:
    """Tables of plain values as TOML, whose strings, numbers, truths and lists are JSON's."""
    lines = []
    for name, table in document.items():
        lines += [f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def _kept(path: Path, make: Callable[[], str]) -> str:
    if not path.exists():
        write_whole(path, make().encode())
    return path.read_text()


def _new_host_key() -> bytes:
    return ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


class _System:
    """What runs from one boot to the next: factory mode, or product mode once the unit is sealed."""

    def __init__(self, hardware: SimulatedBoard, settings: Settings | None) -> None:
        self._hardware = hardware
        self._settings = settings
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._ssh: FactorySsh | None = None
        self._product: subprocess.Popen[bytes] | None = None

    @property
    def ssh_port(self) -> int:
        """The port that SSH listens on, or 0."""
        return 0 if self._ssh is None else self._ssh.port

    def start(self) -> None:
        if self._settings is None:
            return
        paths = self._settings.paths
        shutil.rmtree(paths.run, ignore_errors=True)
        for path in (paths.run, paths.state):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._hardware.console.say(f"boot: {self._settings.image}")
        if paths.sealed.exists():
            self._run_product(self._settings)
        else:
            self._run_factory(self._settings)

    def stop(self) -> None:
        """Cut the power: the product dies between two instructions."""
        self._over.set()
        ssh, self._ssh = self._ssh, None
        if ssh is not None:
            ssh.close()
        if self._product is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._product.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join()

    def _thread(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    # --- factory mode ----------------------------------------------------------------------------------------------

    def _run_factory(self, settings: Settings) -> None:
        public = settings.paths.host_key
        private = public.with_suffix("")
        if not private.exists():
            write_whole(private, _new_host_key())
        host_key = Ed25519Key.from_private_key_file(str(private))
        line = f"{host_key.get_name()} {host_key.get_base64()}"
        write_whole(public, f"{line}\n".encode())
        current = settings.paths.releases / "current"
        agent = ["-P", "-m", "firmware_agent", "--settings", str(self._hardware.settings_file), "provision"]
        session = Program(
            command=[sys.executable, *agent],
            environment=_environment() | {"PYTHONPATH": str(current), "PYTHONDONTWRITEBYTECODE": "1"},
            errors=self._hardware.console.log,
            ended=lambda: self._after_session(settings),
        )
        self._ssh = FactorySsh(host_key, self._hardware.factory_key, session)
        if injected.NO_BANNER not in self._hardware.faults:
            self._thread(self._say_banner, settings, line)

    def _say_banner(self, settings: Settings, host_key: str) -> None:
        if injected.WRONG_HOST_KEY in self._hardware.faults:
            other = Ed25519Key.from_private_key(io.StringIO(_new_host_key().decode()))
            host_key = f"{other.get_name()} {other.get_base64()}"
        facts = RaspberryPi(settings.paths.board).facts()
        line = Banner(facts.serial, ("127.0.0.1",), host_key, agent_version, str(settings.image), facts.boot_id).line()
        while not self._over.is_set() and not settings.paths.answered.exists():
            self._hardware.console.say(line)
            self._over.wait(BANNER_SECONDS)

    def _after_session(self, settings: Settings) -> None:
        """What the unit's root service does once the agent has asked to be sealed; then the board reboots."""
        if settings.paths.seal_request.exists() and not self._over.is_set():
            settings.paths.sealed.parent.mkdir(parents=True, exist_ok=True)
            write_whole(settings.paths.sealed, b"")
            settings.paths.seal_request.unlink()
            self._hardware.reboot(self)

    # --- product mode ----------------------------------------------------------------------------------------------

    def _run_product(self, settings: Settings) -> None:
        root, paths = self._hardware.root, settings.paths
        agent = ["--settings", str(self._hardware.settings_file), "run"]
        releases = ["--releases", str(paths.releases), "--state", str(paths.state), "--no-wait"]
        config = simulated_init.Config(
            command=[sys.executable, "-I", "-S", str(root / "usr/lib/picket/launcher.py"), *releases, "--", *agent],
            environment=_environment(),
            directory=str(paths.run),
            notify=str(self._hardware.sockets / "notify"),
            reboot_request=str(paths.state / "reboot-request"),
        )
        description = self._hardware.place / "init.json"
        config.dump(description)
        self._product = subprocess.Popen(
            simulated_init.command(sys.executable, description),
            stdin=subprocess.PIPE,  # closes when the station ends, however it ends: the power is gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._thread(self._listen, self._product)

    def _listen(self, product: "subprocess.Popen[bytes]") -> None:
        """Print what the product says, until all of its processes are gone."""
        with product:
            for line in product.stdout or ():
                self._hardware.console.say(line.decode(errors="replace").rstrip())
        if product.returncode == simulated_init.EXIT_REBOOT and not self._over.is_set():
            self._hardware.reboot(self)


def _environment() -> dict[str, str]:
    """What a program on the board finds in its environment, as little as systemd gives it."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"LANG": "C.UTF-8"}


class _Console:
    """A pty: the board writes at one end, pyserial reads at the other. All of it goes to a log, too."""

    def __init__(self, log: Path) -> None:
        self._ours, self._theirs = pty.openpty()
        tty.setraw(self._theirs)
        os.set_blocking(self._ours, False)
        self.path = os.ttyname(self._theirs)
        self.log = log.open("a", buffering=1)

    def say(self, line: str) -> None:
        """Print a line; as on a wire, what nobody reads is lost."""
        self.log.write(f"{time.time():.3f} {line}\n")
        with suppress(BlockingIOError, OSError):
            os.write(self._ours, line.encode() + b"\r\n")

    def close(self) -> None:
        self.log.close()
        os.close(self._ours)
        os.close(self._theirs)


@contextmanager
def open_bench(place: Path, key: Path, options: Mapping[str, Any]) -> Iterator[Bench]:
    """A bench with a simulated board in it.

    Args:
        place: the board's folder.
        key: the factory's SSH key.
        options: `faults`, and `tpm`: whether one is fitted; left out, one is where this machine can emulate it.

    Raises:
        UserMistake: an option or a fault is not known.
        StationFault: a TPM is asked for, and this machine cannot emulate one.
    """
    if unknown := sorted(set(options) - {"faults", "tpm"}):
        raise UserMistake(f"the simulated board knows no {', '.join(unknown)}", advice="Options: faults, tpm.")
    faults, tpm, lacking = injected.chosen(options, injected.KNOWN), injected.tpm_wanted(options), missing()
    if tpm and lacking:
        raise StationFault(f"a TPM needs {', '.join(lacking)}", advice="Install the system packages: make setup")
    try:
        public = " ".join(key.with_name(f"{key.name}.pub").read_text().split()[:2])
    except OSError as error:
        raise StationFault(f"the factory key {key} is missing", advice="make demo makes one.") from error
    with ExitStack() as stack:
        board = SimulatedBoard(place, public, faults=faults, tpm=not lacking if tpm is None else tpm)
        stack.callback(board.close)
        yield Bench(
            name=f"simulated board {board.serial}",
            storage=board.storage,
            power=board,
            console=SerialConsole(board.console_url),
            shell=injected.tampered(SshShell(key, board.ssh_address), faults),
            stimulus=board,
        )
