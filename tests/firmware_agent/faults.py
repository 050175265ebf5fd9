"""What networks do to a TCP connection, between the agent and a real broker, and who else may answer at its port."""

import asyncio
import contextlib
import random
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path

_CHUNK = 4096


class FaultProxy:
    """Passes connections on to `target`, as badly as its fields say; they may be changed at any time.

    Attributes:
        target: the port of the server behind.
        latency: seconds that each byte is under way.
        loss: the share of segments that are lost. TCP sends those again, so a loss is a stall that doubles.
        bytes_per_second: how much goes through, in each direction of each connection; 0 for any.
    """

    def __init__(self, target: int, *, seed: int = 1) -> None:
        self.target = target
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
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
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
            there, on = await asyncio.open_connection("127.0.0.1", self.target)
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
