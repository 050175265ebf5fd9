"""The simulated board's SSH server: on loopback, with a host key of its own, open to the factory key alone.

Whatever a session asks for, the one program runs, as on a unit whose keys carry a forced command.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import paramiko
from paramiko.ed25519key import Ed25519Key

from firmware_agent.wire import Stream


class FactorySsh:
    """The way in while the board is in factory mode.

    Args:
        host_key: the board's.
        factory_key: the public line of the only key that is let in.
        program: what a session runs, on a stream with lines.
    """

    def __init__(self, host_key: Ed25519Key, factory_key: str, program: Callable[[Stream], None]) -> None:
        self._host_key = host_key
        self._factory_key = factory_key
        self._program = program
        self._transports: list[paramiko.Transport] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="ssh", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody is let in any more, and whoever is in is thrown out."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for transport in self._transports:
            transport.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(self._host_key)
            self._transports.append(transport)
            with suppress(paramiko.SSHException, EOFError, OSError):
                transport.start_server(server=_Door(self._factory_key, self._serve))

    def _serve(self, channel: paramiko.Channel) -> None:
        with suppress(OSError, EOFError):
            self._program(_ChannelStream(channel))
        with suppress(OSError, EOFError):
            channel.close()


class _Door(paramiko.ServerInterface):
    """Lets the factory key in, to one program only."""

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
