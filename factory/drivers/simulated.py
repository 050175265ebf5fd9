"""The simulated board: one object that is medium, supply, console, network and sensor, so that its parts agree.

On it runs the real firmware agent, behind a real SSH server on loopback, with gpiozero's mock pins; on its console, a
real pty, stands the real banner. What a board keeps lies in one folder: its SoC serial, its medium, and what the booted
system wrote to that medium. It refuses nonsense (a medium written while the board has power), and faults can be
injected by name.
"""

import io
import os
import pty
import secrets
import shutil
import socket
import struct
import tarfile
import threading
import time
import tty
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from gpiozero.pins.mock import MockFactory, MockPin
from paramiko.ed25519key import Ed25519Key

from factory.bench import Bench
from factory.drivers import faults as injected
from factory.drivers.console import SerialConsole
from factory.drivers.media import FileMedium, FileStorage
from factory.drivers.pir import Pir, PirFault
from factory.drivers.software_tpm import SoftwareTpm, missing
from factory.drivers.ssh import SshShell
from factory.errors import StationFault, UserMistake
from factory.files import write_whole
from firmware_agent import __version__ as agent_version
from firmware_agent.board import ClockReading, Facts, Health
from firmware_agent.errors import SettingsFault
from firmware_agent.keys import tpm_key
from firmware_agent.pins import FactoryPins
from firmware_agent.product import Product
from firmware_agent.provisioning import Provisioning
from firmware_agent.settings import Settings
from firmware_agent.settings import parse as parse_settings
from firmware_agent.wire import Banner

MEDIUM_BYTES = 64 * 2**20
PIR_LINE = 17
BANNER_SECONDS = 0.05
SECTOR = 512


class SimulatedBoard:
    """A board in a folder. `faults` are names of `factory.drivers.faults.KNOWN`."""

    def __init__(self, place: Path, factory_key: str, *, faults: frozenset[str], tpm: bool) -> None:
        self._place = place
        self.factory_key = factory_key
        self.faults = faults
        place.mkdir(parents=True, exist_ok=True)
        self._tpm = SoftwareTpm(place) if tpm else None
        self._root = place / "root"
        self._run = place / "run"
        self.serial = _kept(place / "soc-serial", lambda: f"10000000{secrets.token_hex(4)}")
        size = MEDIUM_BYTES // 8 if injected.SMALL_MEDIUM in faults else MEDIUM_BYTES
        self.storage = _SimulatedStorage(self, place / "medium.img", size)
        self.pins = MockFactory(pin_class=_DrivenPin)
        self.pir = Pir(self._drive, fault=next((PirFault(one) for one in sorted(faults) if one in set(PirFault)), None))
        self._system: _System | None = None
        self.console = _Console()

    # --- supply -----------------------------------------------------------------------------------------------

    @property
    def powered(self) -> bool:
        """Whether the board has power."""
        return self._system is not None

    def on(self) -> None:
        """Power the board: its sensor wakes, and it boots what is on its medium."""
        if self._system is None:
            self.pir.power(on=True)
            if self._tpm is not None:
                self._tpm.on()
            self._system = _System(self, self._boot_medium())
            self._system.start()

    def off(self) -> None:
        """Cut the power. The medium keeps what was written to it, nothing else stays."""
        system, self._system = self._system, None
        if system is not None:
            system.stop()
        if self._tpm is not None:
            self._tpm.off()
        self.pir.power(on=False)

    def close(self) -> None:
        """Take the board away."""
        self.off()
        self.console.close()
        self.pins.close()

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

    def forget(self) -> None:
        """The medium was erased: what the system kept on it is gone."""
        shutil.rmtree(self._root, ignore_errors=True)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _drive(self, high: bool) -> None:
        pin = self.pins.pin(PIR_LINE)
        pin.drive_high() if high else pin.drive_low()

    def _boot_medium(self) -> Settings | None:
        """What the boot ROM and the system find on the medium; None if it does not boot."""
        try:
            settings = parse_settings(_read_settings(self.storage.path))
        except (_NoBootError, OSError, tarfile.TarError, UnicodeDecodeError, SettingsFault) as error:
            self.console.say(f"boot: {error}")
            return None
        paths = replace(
            settings.paths,
            state=(self._root / "var/lib/picket").absolute(),
            run=self._run.absolute(),
            host_key=(self._root / "etc/ssh/ssh_host_ed25519_key.pub").absolute(),
        )
        tpm = replace(settings.tpm, tcti="") if self._tpm is None else self._tpm.fitted(settings.tpm)
        settings = replace(settings, paths=paths, tpm=tpm)
        if self._tpm is not None:
            tpm_key.use(settings)
        return settings


class _DrivenPin(MockPin):  # type: ignore[misc]  # gpiozero is not typed
    """A pin whose wire somebody drives: the pull resistor, set when the agent opens the line, does not move it."""

    def _set_pull(self, value: str) -> None:
        driven = self.state
        super()._set_pull(value)
        self._change_state(driven)


def _new_host_key() -> bytes:
    return ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


class _NoBootError(Exception):
    pass


def _read_settings(path: Path) -> str:
    with path.open("rb") as medium:
        record = medium.read(SECTOR)
        if len(record) < SECTOR or record[510:] != b"\x55\xaa":
            raise _NoBootError("no partition table: no bootable medium")
        start, sectors = struct.unpack_from("<II", record, 446 + 8)
        medium.seek(start * SECTOR)
        content = medium.read(sectors * SECTOR)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        try:
            member = archive.extractfile("etc/picket/agent.toml")
        except KeyError as error:
            raise _NoBootError("the boot partition holds no settings of the agent") from error
        if member is None:
            raise _NoBootError("the boot partition holds no settings of the agent")
        return member.read().decode()


def _kept(path: Path, make: Callable[[], str]) -> str:
    if not path.exists():
        write_whole(path, make().encode())
    return path.read_text()


class _System:
    """What runs while the board has power: factory mode first, product mode once sealed."""

    def __init__(self, hardware: SimulatedBoard, settings: Settings | None) -> None:
        self._hardware = hardware
        self._settings = settings
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._transports: list[paramiko.Transport] = []
        self._listener: socket.socket | None = None
        self._product: Product | None = None
        self.board = _Inside(hardware)

    @property
    def ssh_port(self) -> int:
        """The port that SSH listens on, or 0."""
        return 0 if self._listener is None else int(self._listener.getsockname()[1])

    def start(self) -> None:
        if self._settings is None:
            return
        paths = self._settings.paths
        shutil.rmtree(paths.run, ignore_errors=True)
        for path in (paths.run, paths.state):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._hardware.console.say(f"boot: {self._settings.image}")
        if paths.sealed.exists():
            self._run_product()
        else:
            self._run_factory(paths.host_key)

    def stop(self) -> None:
        self._over.set()
        self._close_ssh()
        if self._product is not None:
            self._product.stop()
            self._product.join()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    # --- factory mode ----------------------------------------------------------------------------------------------

    def _run_factory(self, public: Path) -> None:
        private = public.with_suffix("")
        if not private.exists():
            write_whole(private, _new_host_key())
        host_key = Ed25519Key.from_private_key_file(str(private))
        write_whole(public, f"{host_key.get_name()} {host_key.get_base64()}\n".encode())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread(self._accept, host_key)
        if injected.NO_BANNER not in self._hardware.faults:
            self._thread(self._say_banner, f"{host_key.get_name()} {host_key.get_base64()}")

    def _say_banner(self, host_key: str) -> None:
        settings = self._settings
        if settings is None:
            return
        if injected.WRONG_HOST_KEY in self._hardware.faults:
            other = Ed25519Key.from_private_key(io.StringIO(_new_host_key().decode()))
            host_key = f"{other.get_name()} {other.get_base64()}"
        facts = self.board.facts()
        line = Banner(facts.serial, ("127.0.0.1",), host_key, agent_version, str(settings.image), facts.boot_id).line()
        while not self._over.is_set() and not settings.paths.answered.exists():
            self._hardware.console.say(line)
            self._over.wait(BANNER_SECONDS)

    def _accept(self, host_key: Ed25519Key) -> None:
        listener = self._listener
        while listener is not None and not self._over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(host_key)
            self._transports.append(transport)
            with suppress(paramiko.SSHException, EOFError, OSError):
                transport.start_server(server=_Door(self._hardware.factory_key, self._serve))

    def _serve(self, channel: paramiko.Channel) -> None:
        settings = self._settings
        if settings is None:
            return
        agent = Provisioning(
            settings,
            self.board,
            FactoryPins(self._hardware.pins, PIR_LINE),
            on_seal=lambda: self._thread(self._seal, settings),
        )
        stream = _ChannelStream(channel)
        with suppress(OSError, EOFError):
            agent.serve(stream)
        with suppress(OSError, EOFError):
            channel.close()

    def _seal(self, settings: Settings) -> None:
        """What the unit's root service does: shut the factory's way in, then reboot into product mode."""
        self._close_ssh()
        write_whole(settings.paths.sealed, b"")
        settings.paths.seal_request.unlink(missing_ok=True)
        if not self._over.is_set():
            self.board = _Inside(self._hardware)
            self._run_product()

    def _close_ssh(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for transport in self._transports:
            transport.close()

    # --- product mode ----------------------------------------------------------------------------------------------

    def _run_product(self) -> None:
        if self._settings is not None:
            self._product = Product(self._settings, self.board, FactoryPins(self._hardware.pins, PIR_LINE))
            self._product.start()

    def _thread(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


class _Inside:
    """The board as the agent sees it from inside; one boot."""

    def __init__(self, hardware: SimulatedBoard) -> None:
        self._hardware = hardware
        self._boot_id = str(uuid.uuid4())
        self._started = time.monotonic()

    def facts(self) -> Facts:
        mac = "b8:27:eb:" + ":".join(self._hardware.serial[-6:][i : i + 2] for i in (0, 2, 4))
        return Facts(
            serial=self._hardware.serial,
            revision="a02082",
            model="Simulated Raspberry Pi 3 Model B",
            macs={"eth0": mac},
            medium_cid=None,
            medium_bytes=MEDIUM_BYTES,
            memory_bytes=2**30,
            boot_id=self._boot_id,
            kernel=os.uname().release,
        )

    def health(self, state: Path) -> Health:
        return Health(
            temperature_c=41.5 if injected.HOT not in self._hardware.faults else 97.0,
            throttled=0,
            disk_free_bytes=shutil.disk_usage(state).free,
            memory_free_bytes=2**29,
        )

    def clock(self) -> ClockReading:
        return ClockReading(time.time(), "ntp")

    def uptime(self) -> float:
        return time.monotonic() - self._started


class _Door(paramiko.ServerInterface):
    """SSH that lets the factory key in, to one program only."""

    def __init__(self, factory_key: str, serve: Callable[[paramiko.Channel], None]) -> None:
        self._factory_key = factory_key
        self._serve = serve

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002  (paramiko calls it so)
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = username == "picket" and f"{key.get_name()} {key.get_base64()}" == self._factory_key
        return paramiko.common.AUTH_SUCCESSFUL if known else paramiko.common.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:  # noqa: ARG002  (paramiko calls it so)
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(
        self,
        channel: paramiko.Channel,
        command: bytes,  # noqa: ARG002  (whatever is asked for, the one program runs: a forced command)
    ) -> bool:
        threading.Thread(target=self._serve, args=(channel,), daemon=True).start()
        return True


class _ChannelStream:
    """A paramiko channel as a stream with lines."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._rest = b""

    def readline(self, limit: int = -1, /) -> bytes:
        while b"\n" not in self._rest and (limit < 0 or len(self._rest) < limit):
            data = self._channel.recv(65536)
            if not data:
                break
            self._rest += data
        end = self._rest.find(b"\n") + 1 or len(self._rest)
        if limit >= 0:
            end = min(end, limit)
        line, self._rest = self._rest[:end], self._rest[end:]
        return line

    def write(self, data: bytes, /) -> None:
        self._channel.sendall(data)

    def flush(self) -> None:
        """Nothing is held back."""


class _Console:
    """A pty: the board writes at one end, pyserial reads at the other."""

    def __init__(self) -> None:
        self._ours, self._theirs = pty.openpty()
        tty.setraw(self._theirs)
        os.set_blocking(self._ours, False)
        self.path = os.ttyname(self._theirs)

    def say(self, line: str) -> None:
        """Print a line; as on a wire, what nobody reads is lost."""
        with suppress(BlockingIOError, OSError):
            os.write(self._ours, line.encode() + b"\r\n")

    def close(self) -> None:
        os.close(self._ours)
        os.close(self._theirs)


class _SimulatedStorage:
    """The board's medium while it is in the station's reader."""

    def __init__(self, board: SimulatedBoard, path: Path, size: int) -> None:
        self._board = board
        self._file = FileStorage(path, size)
        self.path = path

    @contextmanager
    def attach(self) -> Iterator["_SimulatedMedium"]:
        """The medium.

        Raises:
            StationFault: the board has power: its medium is in use.
        """
        if self._board.powered:
            raise StationFault("the board has power: its medium cannot be written", advice="Cut the power first.")
        with self._file.attach() as medium:
            yield _SimulatedMedium(medium, self._board)


class _SimulatedMedium:
    """A medium that can lose a bit once it is flushed."""

    def __init__(self, medium: FileMedium, board: SimulatedBoard) -> None:
        self._medium = medium
        self._board = board
        self._flipped = False
        self.name = medium.name
        self.size = medium.size

    def discard(self) -> None:
        self._medium.discard()
        self._board.forget()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._medium.write(offset, data)

    def flush(self) -> None:
        self._medium.flush()
        if injected.FLIPPED_BIT in self._board.faults and not self._flipped:
            self._flipped = True
            where = 2**20 + 700
            (byte,) = self._medium.read(where, 1)
            self._medium.write(where, bytes([byte ^ 1]))
            self._medium.flush()

    def read(self, offset: int, length: int) -> bytes:
        return self._medium.read(offset, length)


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
