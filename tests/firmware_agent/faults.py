"""What networks do to a TCP connection, between the agent and a real broker, and who else may answer at its port."""

import asyncio
import contextlib
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_CHUNK = 4096


class FaultProxy:
    """Passes connections on to `target`, as badly as its fields say; they may be changed at any time.

    Attributes:
        target: the port of the server behind, at the address `to`.
        latency: seconds that each byte is under way.
        loss: the share of segments that are lost. TCP sends those again, so a loss is a stall that doubles.
        bytes_per_second: how much goes through, in each direction of each connection; 0 for any.
    """

    def __init__(self, target: int, *, to: str = "127.0.0.1", at: str = "127.0.0.1", seed: int = 1) -> None:
        self.target = target
        self._to = to
        self._at = at
        self.latency = 0.0
        self.loss = 0.0
        self.bytes_per_second = 0
        self._flow = asyncio.Event()
        self._flow.set()
        #: How many connections there were.
        self.accepted = 0
        self._random = random.Random(seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.port = 0
        self._thread.start()
        self._ready.wait()

    def blackhole(self, on: bool) -> None:
        """Let nothing through, and tell nobody; or let everything through again."""
        self._loop.call_soon_threadsafe(self._flow.clear if on else self._flow.set)

    def reset(self) -> None:
        """Break all connections, as a router does that has forgotten them."""
        self._loop.call_soon_threadsafe(self._reset)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._accept, self._at, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _reset(self) -> None:
        for writer in self._writers:
            linger = struct.pack("ii", 1, 0)  # close(2) then sends RST
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        try:
            await self._flow.wait()
            there, on = await asyncio.open_connection(self._to, self.target)
            self._writers.add(on)
            await asyncio.gather(self._pump(reader, on), self._pump(there, writer))
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction. Segments are under way side by side, but arrive in order."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        deliver = asyncio.create_task(self._deliver(under_way, writer))
        try:
            while True:
                data = await reader.read(_CHUNK)
                await under_way.put((self._loop.time() + self.latency, data))
                if not data:
                    break
            await deliver
        finally:
            deliver.cancel()
            self._writers.discard(writer)
            writer.transport.abort()

    async def _deliver(self, under_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            stall = 0.2  # Linux' least time until it sends again
            while self.loss and self._random.random() < self.loss:
                await asyncio.sleep(stall)
                stall = min(stall * 2, 5.0)
            if self.bytes_per_second:
                await asyncio.sleep(len(data) / self.bytes_per_second)
            await self._flow.wait()
            if not data:
                return
            writer.write(data)
            await writer.drain()


class Cable:
    """A real link of the kernel that connections pass twice: into a network namespace, and out again.

    Args:
        target: the port of the server behind, on this machine.

    Raises:
        OSError: this machine does not let us make namespaces.
    """

    def __init__(self, target: int) -> None:
        self._name = f"picket{os.getpid()}"
        self._ours, self._theirs = f"pk{os.getpid()}a", f"pk{os.getpid()}b"
        near, far = "10.231.77.1", "10.231.77.2"
        with contextlib.ExitStack() as opened:
            _ip("netns", "add", self._name)
            opened.callback(_ip, "netns", "del", self._name)
            _ip("link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self._name)
            _ip("addr", "add", f"{near}/30", "dev", self._ours)
            _ip("link", "set", self._ours, "up")
            _ip("-n", self._name, "addr", "add", f"{far}/30", "dev", self._theirs)
            _ip("-n", self._name, "link", "set", self._theirs, "up")
            out = FaultProxy(target, at=near)
            opened.callback(out.close)
            relay = subprocess.Popen(
                ["ip", "netns", "exec", self._name, sys.executable, "-c", _RELAY, far, near, str(out.port)],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            opened.callback(relay.wait)
            assert relay.stdin is not None
            assert relay.stdout is not None
            opened.callback(relay.stdin.close)  # it ends with its input
            opened.callback(relay.stdout.close)
            into = FaultProxy(int(relay.stdout.readline()), to=far)
            opened.callback(into.close)
            self.port = into.port
            self.close = opened.pop_all().close

    def pull(self) -> None:
        """Out of its socket."""
        _ip("link", "set", self._ours, "down")

    def plug_in(self) -> None:
        """Again."""
        _ip("link", "set", self._ours, "up")

    def netem(self, *how: str) -> None:
        """As tc-netem(8): `delay 1s loss 50%`, one way.

        Raises:
            OSError: this kernel has no netem.
        """
        _run("tc", "qdisc", "replace", "dev", self._ours, "root", "netem", *how)


_RELAY = """
import sys
from tests.firmware_agent.faults import FaultProxy
far, near, port = sys.argv[1:]
proxy = FaultProxy(int(port), at=far, to=near)
print(proxy.port, flush=True)
sys.stdin.read()
proxy.close()
"""


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


class Impostor:
    """Somebody else at the port: handles each connection by `behave`, on a thread of its own.

    Args:
        behave: gets the plain socket.
    """

    def __init__(self, behave: Callable[[socket.socket], None]) -> None:
        self._behave = behave
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._handle, args=(connection,)))
            self._threads[-1].start()

    def _handle(self, connection: socket.socket) -> None:
        connection.settimeout(40)
        with connection, contextlib.suppress(OSError, ssl.SSLError):
            self._behave(connection)


def login_page(connection: socket.socket) -> None:
    """A hotel's network: whatever is said, it answers in HTTP that one should log in."""
    connection.recv(_CHUNK)
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\nContent-Length: 0\r\n\r\n")


def tls_server(directory: Path, certificate: str, key: str) -> Callable[[socket.socket], None]:
    """A TLS server with this certificate, that never says more than its greeting."""
    directory.mkdir()
    (directory / "c").write_text(certificate)
    (directory / "k").write_text(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "c", directory / "k")

    def greet(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(_CHUNK)

    return greet
