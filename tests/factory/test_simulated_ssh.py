"""The simulated board's SSH server: what a session runs has no life beyond the station's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from factory.connect import wait_until
from tests.site import ROOT

#: Serves one program and asks for it, as a station does; then the station is killed.
STATION = """
import io, os, signal, socket, sys, threading
import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from paramiko.ed25519key import Ed25519Key
from factory.drivers.simulated_ssh import FactorySsh, Program

def key():
    private = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    return Ed25519Key.from_private_key(io.StringIO(private.decode()))

factory = key()
program = Program(["/bin/sh", "-c", 'echo $$; exec sleep 60'], {}, open(os.devnull, "w"), lambda: None)
ssh = FactorySsh(key(), f"{factory.get_name()} {factory.get_base64()}", program)
transport = paramiko.Transport(socket.create_connection(("127.0.0.1", ssh.port)))
transport.connect(username="picket", pkey=factory)
session = transport.open_session()
session.exec_command("whatever")
print(session.makefile().readline().strip(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_sessions_program_ends_with_a_station_that_is_killed() -> None:
    station = subprocess.run(
        [sys.executable, "-c", STATION],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

    assert station.returncode == -signal.SIGKILL, station.stderr
    assert wait_until(lambda: not _runs(int(station.stdout)), 10.0, 0.01)
