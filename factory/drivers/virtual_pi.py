"""The virtual Pi: the real image on QEMU's `virt` machine.

One object is medium, supply, console, network, PIR line and TPM at once, so that its parts agree.

- It boots what the medium says, as a Pi's firmware would (`image.firmware`); a medium that does not boot says so on the
  console, and the board sits there with its power on, as a Pi does.
- Its device tree is QEMU's own plus what a Pi's firmware adds: model, serial number, revision code, and below /chosen
  what was booted.
- A reset (the guest's, or its watchdog's) is a Pi's warm reboot: the firmware chooses anew. The tryboot flag outlives
  it, and not a power cut. The guest sets the flag through the virtio port `picket.firmware`: `tryboot 1` and a newline
  are answered by `ok`, once the flag is durable. A Pi has a mailbox for that, which Debian's kernel does not reach.
- Its watchdog is an Intel 6300ESB on the PCI bus.
- Its PIR is line 5 of the machine's PL061, driven by QEMU's test protocol.
- Its TPM is swtpm behind a virtio port; the image's picket-vtpm.service makes /dev/tpm0 of it. It keeps its state and
  is started anew with each start, as a TPM on a Pi's reset line is.
- Its network sees this machine's loopback as 10.0.2.2; `hosts` says which names lie there. Whoever wants to be on its
  cable, and not behind QEMU's address translation, taps it.

What a board keeps lies in its folder: medium.img, soc-serial, reset, tpm/, console.log. Everything listens on loopback
or on Unix sockets in a private folder.
"""

import base64
import secrets
import selectors
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from factory.drivers import qemu
from factory.drivers.qemu import Child, Qmp, Qtest
from factory.errors import StationFault
from factory.files import write_whole
from firmware_agent.wire import Banner
from image.firmware import (
    PI_3,
    VIRT,
    FileMedium,
    NoBootError,
    Property,
    Reset,
    ResetRegister,
    Started,
    boot,
    partitions,
)

#: A Pi 3 B with 1 GiB (raspberrypi.com/documentation, "Raspberry Pi revision codes"); gpiozero wants to know.
REVISION = "a02082"
MEMORY_MEBIBYTES = 1024
PROCESSORS = 2

#: The PIR's line at the PL061. Line 3 is the machine's power button.
PIR_LINE = 5

#: Where a guest of QEMU's user network finds this machine's loopback.
STATION_ADDRESS = "10.0.2.2"

MEDIUM_BYTES = 4 * 2**30

#: Discard (RFC 863): nobody listens there.
_NOBODY = ("127.0.0.1", 9)

#: A machine that reset itself is gone within this time.
_END_SECONDS = 5.0

_MACHINE = ("-M", "virt", "-cpu", "cortex-a53", "-smp", str(PROCESSORS), "-m", str(MEMORY_MEBIBYTES))


class VirtualPi:
    """A virtual Pi in a folder; a context manager that cuts its power at the end.

    Args:
        place: the board's folder; made if it is not there.
        tpm: whether a TPM is fitted.
        hosts: names that the board resolves by itself, e.g. the local cloud's, with their addresses.
        medium_bytes: capacity of its medium.
        customer_key: the public key (PEM) that the board is fused with: it starts nothing that is not signed with it.
        tapped: whether there is a tap on its cable (`tap`).
        power_cut_at_reboot: a fault: at this warm reboot after each power-on (the first is 1) the supply fails.

    Raises:
        ValueError: a reboot before the first was meant.
    """

    def __init__(
        self,
        place: Path,
        *,
        tpm: bool = True,
        hosts: Mapping[str, str] | None = None,
        medium_bytes: int = MEDIUM_BYTES,
        customer_key: bytes | None = None,
        tapped: bool = False,
        power_cut_at_reboot: int | None = None,
    ) -> None:
        if power_cut_at_reboot is not None and power_cut_at_reboot < 1:
            raise ValueError(f"reboots are counted from 1, not {power_cut_at_reboot}")
        self._place = place.absolute()
        self._tpm_fitted = tpm
        self.hosts = dict(hosts or {})
        self.medium_bytes = medium_bytes
        self._place.mkdir(parents=True, exist_ok=True)
        self.serial = _kept_serial(self._place / "soc-serial")
        # Unix sockets have short names (108 bytes), folders of tests have not.
        self._sockets = Path(tempfile.mkdtemp(prefix="picket-"))
        self._console = _Console(self._place / "console.log")
        self._lock = threading.RLock()
        self._customer_key = customer_key
        self._tapped = tapped
        self._power_cut_at_reboot = power_cut_at_reboot
        self._register = ResetRegister(self._place / "reset")
        self._session: _Session | None = None
        self._powered = False
        self._running = False
        self._reboots = 0
        self._qemu: Child | None = None
        self._swtpm: Child | None = None
        self._qmp: Qmp | None = None
        self._qtest: Qtest | None = None
        self._mailbox: _Mailbox | None = None
        self._pl061 = ""
        self._pir_high = False
        self._ssh_port = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the board away: its power is cut, its folder stays."""
        self.off()
        self._console.close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    # --- medium ---------------------------------------------------------------------------------------------------

    @property
    def medium(self) -> Path:
        """The medium as a raw file; it may be written while the board has no power."""
        return self._place / "medium.img"

    @property
    def mac(self) -> str:
        """The MAC of its Ethernet port, made of the serial as a Pi 3 does."""
        return "b8:27:eb:" + ":".join(self.serial[-6:][index : index + 2] for index in (0, 2, 4))

    def damage(self, partition: int) -> None:
        """A fault: the first 64 KiB of a partition become what a worn card gives.

        Raises:
            StationFault: the board has power, or its medium has no such partition.
        """
        with self._lock:
            if self._powered:
                raise StationFault("the board has power: its medium is in use", advice="Cut the power first.")
            try:
                with FileMedium(self.medium) as card:
                    part = partitions(card).get(partition)
            except NoBootError as error:
                raise StationFault(f"there is nothing to damage: {error}") from error
            if part is None:
                raise StationFault(f"the medium has no partition {partition} to damage")
            with self.medium.open("r+b") as file:
                file.seek(part.start)
                file.write(b"\xff" * min(part.size, 65536))

    # --- supply ---------------------------------------------------------------------------------------------------

    @property
    def powered(self) -> bool:
        """Whether the supply is on; a guest that shut itself down does not change that."""
        return self._powered

    @property
    def running(self) -> bool:
        """Whether something runs on it; a reboot does not change that."""
        return self._running

    @property
    def reboots(self) -> int:
        """Warm reboots since power-on."""
        return self._reboots

    @property
    def child_pids(self) -> tuple[int, ...]:
        """Process ids of its machine and its TPM, as far as they run."""
        return tuple(child.pid for child in (self._qemu, self._swtpm) if child is not None and child.running)

    def on(self) -> None:
        """Supply the board; nothing happens if it is supplied. Returns when the machine has begun to boot.

        Raises:
            StationFault: QEMU, swtpm or another tool is missing or does not start; nothing is left running.
        """
        with self._lock:
            if self._powered:
                return
            for tool in ("qemu-system-aarch64", "fdtput", "setpriv", *(("swtpm",) if self._tpm_fitted else ())):
                qemu.program(tool)
            self._register.clear()
            self._reboots = 0
            self._powered = True
            self._session = session = _Session(self._attend)
            try:
                session.thread.start()
                session.begun.result()
            except BaseException:
                self.off()
                raise

    def off(self) -> None:
        """Cut the supply at once, as a plug is pulled: what was not written is lost. Safe when it is off already."""
        with self._lock:
            session, self._session = self._session, None
            self._powered = False
            if session is not None:
                session.off.set()
            self._stop()
            while session is not None and session.thread.is_alive():
                session.thread.join(0.05)  # it may have been about to start something
                self._stop()
            self._running = False
            self._register.clear()

    def cycle(self) -> None:
        """Off and on again."""
        self.off()
        self.on()

    # --- what is wired to the station ------------------------------------------------------------------------------

    def console_url(self) -> str:
        """Where pyserial finds the console; the same with and without power."""
        return self._console.url

    def ssh_address(self, _banner: Banner | None = None) -> tuple[str, int]:
        """Where its SSH port is reached: not at the address that it has in its own network."""
        return ("127.0.0.1", self._ssh_port) if self._ssh_port and self.running else _NOBODY

    def tap(self) -> tuple[Path, Path]:
        """Unix stream sockets of a tapped cable; each Ethernet frame in them follows its length (4 bytes, big-endian).

        What is sent into the first goes to the board, and to nobody else; the second tells all that the board sends,
        and the board waits for who does not read it.
        """
        return self._sockets / "to-board", self._sockets / "from-board"

    def drive_pir(self, high: bool) -> None:
        """Set the level of the wire that the PIR's output is soldered to; it holds across power cycles."""
        with self._lock:
            self._pir_high = high
            if self._qtest is None or self._qemu is None:
                return
            try:
                self._qtest.set_input(self._pl061, PIR_LINE, high=high)
            except StationFault:
                if not self._qemu.ends_within(_END_SECONDS):  # with a machine that reset itself; the next one is told
                    raise

    # --- inside ----------------------------------------------------------------------------------------------------

    def _attend(self, session: "_Session") -> None:
        """Start the board, and again whenever it resets. What this thread starts dies with it, so it stays to the end.

        The first start is made on behalf of `on`, which holds the lock.
        """
        try:
            self._boot()
        except BaseException as error:  # noqa: BLE001 - `on` raises it
            session.begun.set_exception(error)
            return
        session.begun.set_result(None)
        while self._running and self._qmp is not None:
            cause = self._qmp.end()
            if cause not in {"guest-reset", "watchdog"} or not self._reboot(session, cause):
                break
        if self._session is session:
            self._running = False
        session.off.wait()

    def _reboot(self, session: "_Session", cause: str) -> bool:
        """Start again, unless somebody cuts the power meanwhile."""
        while not self._lock.acquire(timeout=0.05):
            if session.off.is_set():
                return False
        try:
            if session.off.is_set():
                return False
            if cause == "guest-reset" and self._tpm_fitted:
                _shut_tpm_down(self._sockets / "tpm")
            self._stop()
            self._reboots += 1
            if self._reboots == self._power_cut_at_reboot:
                self._register.clear()
                self._powered = self._running = False
                self._session = None
                session.off.set()
                return False
            self._boot()
        except (StationFault, OSError) as error:
            self._stop()
            self._console.say(f"station: {error}")
            return False
        finally:
            self._lock.release()
        return self._running

    def _stop(self) -> None:
        """End the machine and its TPM at once."""
        if self._qemu is not None:
            self._qemu.stop()
        if self._swtpm is not None:
            self._swtpm.stop(politely=True)
        for line in (self._mailbox, self._qtest, self._qmp):
            if line is not None:
                line.close()
        self._mailbox = self._qtest = self._qmp = None
        self._qemu = self._swtpm = None
        self._console.detach()
        self._ssh_port = 0

    def _boot(self) -> None:
        """What happens between reset and kernel. A try that fails is followed by a start without the flag.

        (raspberrypi.com documentation, REBOOT_ON_FATAL_ERROR: the boot loader resets the board; the flag is gone.)
        """
        reset = self._register.take()
        for attempt in dict.fromkeys((reset, Reset())):
            try:
                started = boot(
                    self.medium, self._sockets, VIRT, attempt, serial=self.serial, customer_key=self._customer_key
                )
            except NoBootError as error:
                self._console.say(f"boot: {error}")
                continue
            for note in started.choice.notes:
                self._console.say(f"boot: {note}")
            self._start(started)
            self._running = True
            return
        self._running = False

    def _start(self, started: Started) -> None:
        if self._tpm_fitted:
            self._start_tpm()
        tree = self._device_tree(started.choice.properties)
        self._ssh_port = qemu.free_port()
        sockets = {name: self._sockets / name for name in ("console", "qmp", "qtest", "firmware")}
        for path in sockets.values():
            path.unlink(missing_ok=True)
        arguments = [
            *_MACHINE,
            # TCG also where KVM could be had: qtest drives lines with TCG only. One emulator thread per processor.
            "-accel", "tcg,thread=multi",
            "-no-user-config", "-nodefaults", "-display", "none",
            "-dtb", str(tree),
            "-kernel", str(started.kernel),
            "-append", self._command_line(started),
            # A killed QEMU loses nothing that it has handed to this kernel; waiting for our disk shows nothing more.
            "-drive", f"if=none,id=medium,format=raw,cache=unsafe,discard=unmap,file={_escaped(self.medium)}",
            "-device", "virtio-blk-pci,drive=medium",
            "-netdev", f"user,id=lan,hostfwd=tcp:127.0.0.1:{self._ssh_port}-:22",
            "-device", f"virtio-net-pci,netdev=lan,mac={self.mac},romfile=",
            *(self._tap_arguments() if self._tapped else ()),
            "-device", "virtio-rng-pci",
            # A reset ends this QEMU: the next one is started by the firmware.
            "-action", "reboot=shutdown,watchdog=reset",
            "-device", "i6300esb",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=firmware,server=on,wait=off,path={sockets['firmware']}",
            "-device", "virtserialport,chardev=firmware,name=picket.firmware",
            "-chardev", f"socket,id=console,server=on,wait=off,path={sockets['console']}",
            "-serial", "chardev:console",
            "-qmp", f"unix:{sockets['qmp']},server=on,wait=off",
            "-qtest", f"unix:{sockets['qtest']},server=on,wait=off",
            "-qtest-log", "none",
            "-S",
        ]  # fmt: skip
        if started.initramfs is not None:
            arguments += ["-initrd", str(started.initramfs)]
        if self._tpm_fitted:
            arguments += [
                "-chardev", f"socket,id=tpm,path={self._sockets / 'tpm'}",
                "-device", "virtserialport,chardev=tpm,name=picket.tpm",
            ]  # fmt: skip
        machine = self._qemu = Child("qemu-system-aarch64", arguments, self._place / "qemu.log")
        machine.wait_for(lambda: all(path.exists() for path in sockets.values()))
        # Stopped until everything is connected: the console loses no line, and the PIR has its level from the start.
        self._qmp = Qmp(sockets["qmp"])
        self._pl061 = self._qmp.find("pl061")
        self._qtest = Qtest(sockets["qtest"])
        self._qtest.set_input(self._pl061, PIR_LINE, high=self._pir_high)
        self._console.attach(sockets["console"])
        self._mailbox = _Mailbox(sockets["firmware"], self._register)
        self._qmp.ask("cont")

    def _tap_arguments(self) -> list[str]:
        """QEMU's filters see a cable from its other end: what `lan` sends (tx) is what the board receives."""
        arguments = []
        for name, path in zip(("in", "out"), self.tap(), strict=True):
            path.unlink(missing_ok=True)
            arguments += ["-chardev", f"socket,id=tap-{name},server=on,wait=off,path={path}"]
        return [
            *arguments,
            "-object", "filter-redirector,id=tap-to,netdev=lan,queue=tx,indev=tap-in",
            "-object", "filter-mirror,id=tap-from,netdev=lan,queue=rx,outdev=tap-out",
        ]  # fmt: skip

    def _start_tpm(self) -> None:
        state = self._place / "tpm"
        state.mkdir(mode=0o700, exist_ok=True)
        path = self._sockets / "tpm"
        path.unlink(missing_ok=True)
        self._swtpm = Child(
            "swtpm",
            ["socket", "--tpm2", "--tpmstate", f"dir={state}", "--server", f"type=unixio,path={path}",
             "--flags", "not-need-init"],
            self._place / "swtpm.log",
        )  # fmt: skip
        self._swtpm.wait_for(path.exists)

    def _device_tree(self, properties: Iterable[Property]) -> Path:
        """The machine's own tree, plus what a Pi's firmware writes into a Pi's."""
        tree = self._sockets / "board.dtb"
        tree.unlink(missing_ok=True)
        qemu.run(
            "qemu-system-aarch64", *_MACHINE, "-M", f"dumpdtb={tree}", "-nodefaults", "-no-user-config",
            "-display", "none",
        )  # fmt: skip
        qemu.run("fdtput", "-t", "s", tree, "/", "model", "Picket virtual Pi")
        qemu.run("fdtput", "-t", "s", tree, "/", "compatible", "picket,virtual-pi", "linux,dummy-virt")
        qemu.run("fdtput", "-t", "s", tree, "/", "serial-number", self.serial)
        qemu.run("fdtput", "-p", "-t", "x", tree, "/system", "linux,revision", REVISION)
        _write_properties(tree, properties)
        return tree

    def _command_line(self, started: Started) -> str:
        """The medium's command line, plus the names of the network (systemd.system-credentials: network.hosts).

        And without what emulation makes dear and a Pi does not feel: page tables of the kernel's own, which address
        randomization alone has it keep here, as no processor of a Pi needs them (a fifth of a boot); and that memory is
        cleared when it is given out (a fiftieth).
        """
        line = f"{started.command_line} kpti=0 init_on_alloc=0"
        if not self.hosts:
            return line
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in sorted(self.hosts.items()))]
        packed = base64.b64encode("".join(f"{line}\n" for line in lines).encode()).decode()
        return f"{line} systemd.set_credential_binary=network.hosts:{packed}"


def _write_properties(tree: Path, properties: Iterable[Property]) -> None:
    """What the firmware says of its choice; fdtput writes numbers big-endian, as device trees have them."""
    for one in properties:
        kind, value = ("x", f"{one.value:x}") if isinstance(one.value, int) else ("s", one.value)
        qemu.run("fdtput", "-p", "-t", kind, tree, one.node, one.name, value)


def _shut_tpm_down(path: Path) -> None:
    """Send TPM2_Shutdown(CLEAR), as a kernel does to a TPM of its own before it restarts.

    The guest's cannot: its TPM's bridge is a process, and has ended by then. Without it the TPM counts the reset as an
    attack and locks its keys after a few (TPM 2.0 part 1, "Non-orderly Shutdown"). A TPM that does not answer is left.
    """
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tpm:
        tpm.settimeout(_END_SECONDS)
        tpm.connect(str(path))
        tpm.sendall(struct.pack(">HIIH", 0x8001, 12, 0x145, 0))
        tpm.recv(10)


def _escaped(path: Path) -> str:
    """A path inside a QEMU option, where a comma ends a value."""
    return str(path).replace(",", ",,")


def _kept_serial(path: Path) -> str:
    if not path.exists():
        write_whole(path, f"10000000{secrets.token_hex(4)}".encode())
    return path.read_text().strip()


class _Session:
    """The time from one power-on to the next power cut."""

    def __init__(self, attend: Callable[["_Session"], None]) -> None:
        self.off = threading.Event()
        self.begun: Future[None] = Future()
        self.thread = threading.Thread(target=attend, args=(self,), name="virtual Pi", daemon=True)


class _Mailbox:
    """The firmware's end of the virtio port `picket.firmware`, for as long as one QEMU runs.

    A line is a request, and gets one line: `tryboot 1` and `tryboot 0` set the one-shot flag.
    """

    _LINE = 64

    def __init__(self, path: Path, register: ResetRegister) -> None:
        self._register = register
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise StationFault(f"the mailbox of the virtual Pi cannot be reached: {error}") from error
        self._thread = threading.Thread(target=self._serve, name="mailbox", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until the last request is served; the machine must have ended."""
        self._thread.join()

    def _serve(self) -> None:
        rest = b""
        with self._socket, suppress(OSError):
            while data := self._socket.recv(4096):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._socket.sendall(self._answer(line).encode() + b"\n")
                rest = rest[: self._LINE + 1]  # more of it than no request has is not kept

    def _answer(self, line: bytes) -> str:
        match line:
            case b"tryboot 1":
                flag = True
            case b"tryboot 0":
                flag = False
            case _:
                return "error: the firmware knows `tryboot 1` and `tryboot 0`"
        try:
            self._register.set(Reset(tryboot=flag))
        except OSError as error:
            return f"error: the flag cannot be kept: {error.strerror}"
        return "ok"


class _Console:
    """The USB adapter at the board's UART: it stays plugged in while the board's power comes and goes.

    One client at a time is served at a TCP port of loopback, as a serial port is; all that the board says also goes to
    a log.
    """

    def __init__(self, log: Path) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        host, port = self._listener.getsockname()
        self.url = f"socket://{host}:{port}"
        self._log = log.open("ab", buffering=0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._board: socket.socket | None = None
        self._client: socket.socket | None = None
        self._orders: list[socket.socket | bytes | None] = []
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="console", daemon=True)
        self._thread.start()

    def attach(self, path: Path) -> None:
        """Connect to the UART of a machine that was started."""
        board = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            board.connect(str(path))
        except OSError as error:
            board.close()
            raise StationFault(f"the console of the virtual Pi cannot be reached: {error}") from error
        self._order(board)

    def detach(self) -> None:
        """The machine is gone."""
        self._order(None)

    def say(self, line: str) -> None:
        """A line that no machine says: the firmware's."""
        self._order(f"{line}\r\n".encode())

    def close(self) -> None:
        """Pull the adapter."""
        if self._closed:
            return
        self._closed = True
        self._wake.send(b"\0")
        self._thread.join()
        for one in (self._listener, self._wake, self._woken, self._board, self._client):
            if one is not None:
                one.close()
        self._selector.close()
        self._log.close()

    def _order(self, order: socket.socket | bytes | None) -> None:
        if not self._closed:
            self._orders.append(order)
            self._wake.send(b"\0")

    def _serve(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._woken.recv(4096)
                    self._obey()
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._board:
                    self._from_board(self._board)
                elif key.fileobj is self._client:
                    self._from_client(self._client)

    def _obey(self) -> None:
        while self._orders:
            order = self._orders.pop(0)
            if isinstance(order, bytes):
                self._pass_on(order)
                continue
            self._drop_board()
            if order is not None:
                self._board = order
                self._selector.register(order, selectors.EVENT_READ)

    def _accept(self) -> None:
        with suppress(OSError):
            client, _ = self._listener.accept()
            self._drop_client()  # a port that is opened again
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.settimeout(1)  # who does not read must not hold up the board
            self._client = client
            self._selector.register(client, selectors.EVENT_READ)

    def _from_board(self, board: socket.socket) -> None:
        try:
            data = board.recv(65536)
        except OSError:
            data = b""
        if data:
            self._pass_on(data)
        else:
            self._drop_board()

    def _from_client(self, client: socket.socket) -> None:
        try:
            data = client.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._drop_client()
        elif self._board is not None:
            with suppress(OSError):
                self._board.sendall(data)

    def _pass_on(self, data: bytes) -> None:
        self._log.write(data)
        if self._client is not None:
            try:
                self._client.sendall(data)
            except OSError:
                self._drop_client()

    def _drop_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            self._selector.unregister(board)
            board.close()

    def _drop_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            self._selector.unregister(client)
            client.close()


@contextmanager
def raspberry_pi_3(image: Path, place: Path) -> Iterator[str]:
    """QEMU's Pi 3 B with the image on its SD card; yields the URL of its console.

    For a test of the boot path with a Pi's own device tree and SD controller: this machine has no network without a USB
    hub, and nothing drives its GPIO. The image itself is not written to.

    Raises:
        StationFault: a tool is missing or QEMU does not start.
        NoBootError: the image does not boot.
    """
    place.mkdir(parents=True, exist_ok=True)
    started = boot(image, place, PI_3)
    if started.device_tree is None:
        raise NoBootError("config.txt wants no device tree, and this machine has none of its own")
    _write_properties(started.device_tree, started.choice.properties)
    size = 1 << (image.stat().st_size - 1).bit_length()  # the card's size must be a power of two
    card, console_path = place / "card.qcow2", Path(tempfile.mkdtemp(prefix="picket-")) / "console"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image.absolute(), card, str(size))
    console = _Console(place / "console.log")
    machine = None
    try:
        machine = Child(
            "qemu-system-aarch64",
            [
                "-M", "raspi3b", "-no-user-config", "-nodefaults", "-display", "none",
                # QEMU takes the start of the SoC's watchdog for a reset.
                "-kernel", str(started.kernel), "-dtb", str(started.device_tree),
                "-append", f"{started.command_line} systemd.watchdog_sec=0",
                *(["-initrd", str(started.initramfs)] if started.initramfs else []),
                "-drive", f"if=sd,format=qcow2,cache=unsafe,file={_escaped(card)}",
                # The device tree sends the console to the second UART, as on a Pi 3 whose first one serves Bluetooth.
                "-chardev", f"socket,id=console,server=on,wait=off,path={console_path}",
                "-serial", "null", "-serial", "chardev:console",
            ],
            place / "qemu.log",
        )  # fmt: skip
        machine.wait_for(console_path.exists)
        console.attach(console_path)
        yield console.url
    finally:
        if machine is not None:
            machine.stop()
        console.close()
        shutil.rmtree(console_path.parent, ignore_errors=True)
        card.unlink(missing_ok=True)
