"""The simulated board's SSH server: on loopback, with a host key of its own, open to the factory key alone.

Whatever a session asks for, the one program runs, as on a unit whose keys carry a forced command. The program is a
process of its own whose standard input and output are the session. It ends with the station, however that ends: what
outlived it would go on writing to a board that the next station has already started.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import paramiko
from paramiko.ed25519key import Ed25519Key

_PIECE = 65536

#: Becomes the program in argv[2:] once the kernel will kill it with process argv[1] (prctl(2): PR_SET_PDEATHSIG). It
#: counts the thread that started it, not the process.
_MORTAL = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Program:
    """What a session runs.

    Attributes:
        command: program, by its whole path, and arguments.
        environment: all of its environment.
        errors: where its standard error goes.
        ended: called when a session is over.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    errors: IO[str]
    ended: Callable[[], None]


class FactorySsh:
    """The way in while the board is in factory mode.

    Args:
        host_key: the board's.
        factory_key: the public line of the only key that is let in.
        program: what a session runs.
    """

    def __init__(self, host_key: Ed25519Key, factory_key: str, program: Program) -> None:
        self._host_key = host_key
        self._factory_key = factory_key
        self._program = program
        self._transports: list[paramiko.Transport] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="ssh", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody is let in any more, and whoever is in is thrown out, between two instructions."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for process in self._processes:
            process.kill()
            process.wait()
        for transport in self._transports:
            transport.close()

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
        program = self._program
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _MORTAL, str(os.getpid()), *program.command],
            env=program.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=program.errors,
            start_new_session=True,  # a Ctrl-C at the station is the station's to handle
        ) as process:
            self._processes.append(process)
            threading.Thread(target=_feed, args=(channel, process), daemon=True).start()
            output = process.stdout
            with suppress(OSError, EOFError):
                while output is not None and (piece := os.read(output.fileno(), _PIECE)):
                    channel.sendall(piece)
        with suppress(OSError, EOFError):
            channel.send_exit_status(process.returncode % 256)  # a killed one's is negative
            channel.close()
        program.ended()


def _feed(channel: paramiko.Channel, process: "subprocess.Popen[bytes]") -> None:
    """What the session sends becomes the program's standard input, until either ends."""
    source = process.stdin
    with suppress(OSError, EOFError, ValueError):
        while source is not None and (piece := channel.recv(_PIECE)):
            source.write(piece)
            source.flush()
    with suppress(OSError, ValueError):
        if source is not None:
            source.close()


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
