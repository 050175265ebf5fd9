"""The virtual Pi: the real image on QEMU's `virt` machine.

One object is medium, supply, console, network, PIR line and TPM at once, so that its parts agree.

- It boots what the medium's FAT partition says, as a Pi's firmware would (`pi_boot`); a medium that does not boot says
  so on the console, and the board sits there with its power on, as a Pi does.
- Its device tree is QEMU's own plus what a Pi's firmware adds: model, serial number and revision code.
- Its PIR is line 5 of the machine's PL061, driven by QEMU's test protocol.
- Its TPM is swtpm behind a virtio port; the image's picket-vtpm.service makes /dev/tpm0 of it. It keeps its state and
  is started anew with each power-on, as a TPM is.
- Its network sees this machine's loopback as 10.0.2.2; `hosts` says which names lie there.

What a board keeps lies in its folder: medium.img, soc-serial, tpm/, console.log. Everything listens on loopback or on
Unix sockets in a private folder.
"""

import base64
import secrets
import selectors
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from factory.drivers import qemu
from factory.drivers.pi_boot import BootFiles, NoBootError, copy_file, read_boot_files
from factory.drivers.qemu import Child, Qmp, Qtest
from factory.errors import StationFault
from factory.files import write_whole
from firmware_agent.wire import Banner

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

_MACHINE = ("-M", "virt", "-cpu", "cortex-a53", "-smp", str(PROCESSORS), "-m", str(MEMORY_MEBIBYTES))


class VirtualPi:
    """A virtual Pi in a folder; a context manager that cuts its power at the end.

    Args:
        place: the board's folder; made if it is not there.
        tpm: whether a TPM is fitted.
        hosts: names that the board resolves by itself, e.g. the local cloud's, with their addresses.
        medium_bytes: capacity of its medium.
    """

    def __init__(
        self,
        place: Path,
        *,
        tpm: bool = True,
        hosts: Mapping[str, str] | None = None,
        medium_bytes: int = MEDIUM_BYTES,
    ) -> None:
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
        self._powered = False
        self._qemu: Child | None = None
        self._swtpm: Child | None = None
        self._qmp: Qmp | None = None
        self._qtest: Qtest | None = None
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

    # --- supply ---------------------------------------------------------------------------------------------------

    @property
    def powered(self) -> bool:
        """Whether the supply is on; a guest that shut itself down does not change that."""
        return self._powered

    @property
    def running(self) -> bool:
        """Whether something runs on it."""
        return self._qemu is not None and self._qemu.running

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
            for tool in (
                "qemu-system-aarch64",
                "fdtput",
                "mcopy",
                "setpriv",
                *(("swtpm",) if self._tpm_fitted else ()),
            ):
                qemu.program(tool)
            self._powered = True
            try:
                boot = read_boot_files(self.medium, self._sockets)
            except NoBootError as error:
                self._console.say(f"boot: {error}")
                return
            try:
                self._start(boot)
            except BaseException:
                self.off()
                raise

    def off(self) -> None:
        """Cut the supply at once, as a plug is pulled: what was not written is lost. Safe when it is off already."""
        with self._lock:
            for line in (self._qtest, self._qmp):
                if line is not None:
                    line.close()
            self._qtest = self._qmp = None
            if self._qemu is not None:
                self._qemu.stop()
            if self._swtpm is not None:
                self._swtpm.stop(politely=True)
            self._qemu = self._swtpm = None
            self._console.detach()
            self._ssh_port = 0
            self._powered = False

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

    def drive_pir(self, high: bool) -> None:
        """Set the level of the wire that the PIR's output is soldered to; it holds across power cycles."""
        with self._lock:
            self._pir_high = high
            if self._qtest is not None and self.running:
                self._qtest.set_input(self._pl061, PIR_LINE, high=high)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _start(self, boot: BootFiles) -> None:
        if self._tpm_fitted:
            self._start_tpm()
        tree = self._device_tree()
        self._ssh_port = qemu.free_port()
        sockets = {name: self._sockets / name for name in ("console", "qmp", "qtest")}
        for path in sockets.values():
            path.unlink(missing_ok=True)
        arguments = [
            *_MACHINE,
            # TCG also where KVM could be had: qtest drives lines with TCG only. One emulator thread per processor.
            "-accel", "tcg,thread=multi",
            "-no-user-config", "-nodefaults", "-display", "none",
            "-dtb", str(tree),
            "-kernel", str(boot.kernel),
            "-append", self._command_line(boot),
            # A killed QEMU loses nothing that it has handed to this kernel; waiting for our disk shows nothing more.
            "-drive", f"if=none,id=medium,format=raw,cache=unsafe,discard=unmap,file={_escaped(self.medium)}",
            "-device", "virtio-blk-pci,drive=medium",
            "-netdev", f"user,id=lan,hostfwd=tcp:127.0.0.1:{self._ssh_port}-:22",
            "-device", f"virtio-net-pci,netdev=lan,mac={self.mac},romfile=",
            "-device", "virtio-rng-pci",
            "-chardev", f"socket,id=console,server=on,wait=off,path={sockets['console']}",
            "-serial", "chardev:console",
            "-qmp", f"unix:{sockets['qmp']},server=on,wait=off",
            "-qtest", f"unix:{sockets['qtest']},server=on,wait=off",
            "-qtest-log", "none",
            "-S",
        ]  # fmt: skip
        if boot.initramfs is not None:
            arguments += ["-initrd", str(boot.initramfs)]
        if self._tpm_fitted:
            arguments += [
                "-device", "virtio-serial-pci",
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
        self._qmp.ask("cont")

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

    def _device_tree(self) -> Path:
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
        return tree

    def _command_line(self, boot: BootFiles) -> str:
        """The medium's command line, plus the names of the network (systemd.system-credentials: network.hosts)."""
        if not self.hosts:
            return boot.command_line
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in sorted(self.hosts.items()))]
        packed = base64.b64encode("".join(f"{line}\n" for line in lines).encode()).decode()
        return f"{boot.command_line} systemd.set_credential_binary=network.hosts:{packed}"


def _escaped(path: Path) -> str:
    """A path inside a QEMU option, where a comma ends a value."""
    return str(path).replace(",", ",,")


def _kept_serial(path: Path) -> str:
    if not path.exists():
        write_whole(path, f"10000000{secrets.token_hex(4)}".encode())
    return path.read_text().strip()


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
    boot = read_boot_files(image, place)
    tree = copy_file(image, "bcm2837-rpi-3-b.dtb", place)
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
                "-kernel", str(boot.kernel), "-dtb", str(tree),
                "-append", f"{boot.command_line} systemd.watchdog_sec=0",
                *(["-initrd", str(boot.initramfs)] if boot.initramfs else []),
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
