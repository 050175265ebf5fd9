"""kill -9 at every system call that changes the disk: afterwards there is the old or the new, never half."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from firmware_agent import identity
from firmware_agent.errors import KeyFault, WrongState
from firmware_agent.keys.file_key import FileKeys
from firmware_agent.spool import Spool
from tests.firmware_agent.support import Broker, Ca, Unit, burn_in_params, pem, provision, settings_text, wait_for
from tests.firmware_agent.test_safe_mode import RUN as AGENT
from tests.firmware_agent.test_safe_mode import agent

ROOT = Path(__file__).parent.parent.parent

#: Runs the given statement with an `os` that kills the process at the n-th call that changes the disk.
KILLER = """
import os, shutil, signal, sys
from firmware_agent import files

left = int(sys.argv[1])

class Os:
    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in ("open", "write", "fsync", "fchmod", "mkdir", "rename", "replace", "symlink"):
            return call
        def counted(*args, **kwargs):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return counted

files.os = Os()
"""

INSTALL = (
    KILLER
    + """
import json
from pathlib import Path
from firmware_agent import identity
identity.install(Path(sys.argv[2]), identity.Identity(**json.loads(Path(sys.argv[3]).read_text())))
"""
)

ENSURE = (
    KILLER
    + """
from pathlib import Path
from firmware_agent.keys.file_key import FileKeys
FileKeys(Path(sys.argv[2])).ensure()
"""
)


def run(script: str, *arguments: str) -> bool:
    """Whether the script came to its end; it must end so or by the kill."""
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert process.returncode in (0, -9), process.stderr
    return process.returncode == 0


def test_burn_in_is_whole_whenever_it_is_killed(unit: Unit, ca: Ca, tmp_path: Path) -> None:
    old = provision(unit, ca)
    params = burn_in_params(ca, ca.leaf(FileKeys(unit.settings.paths.key_file).load().public_key()), "other trust")
    new = dataclasses.replace(old, chain=params["chain"], trust=pem(Ca().certificate), port=443)
    wanted = tmp_path / "new.json"
    wanted.write_text(json.dumps(dataclasses.asdict(new)))
    link = unit.settings.paths.identity

    seen = []
    for call in range(1, 100):
        identity.install(link, old)
        done = run(INSTALL, str(call), str(link), str(wanted))
        seen.append(identity.load(link))
        assert seen[-1] in (old, new)
        identity.install(link, new)  # what a crash leaves behind does not stand in the way
        assert identity.load(link) == new
        if done:
            break

    assert done
    assert old in seen
    assert seen[-1] == new
    assert len(seen) > 10


def test_a_key_is_whole_whenever_its_making_is_killed(tmp_path: Path) -> None:
    for call in range(1, 20):
        directory = tmp_path / str(call)
        directory.mkdir()
        keys = FileKeys(directory / "key.pem")
        done = run(ENSURE, str(call), str(directory / "key.pem"))
        try:
            before = keys.load().public_key()
        except WrongState:
            assert not done
        else:
            assert keys.ensure().public_key() == before
        keys.ensure()
        if done:
            break

    assert done


@pytest.mark.parametrize("content", [b"", b"-----BEGIN EC PRIVATE KEY-----\n", b"\x00" * 227])
def test_a_damaged_key_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content)

    with pytest.raises(KeyFault):
        FileKeys(path).ensure()

    assert path.read_bytes() == content


# --- the whole agent ----------------------------------------------------------------------------------------------


def next_from(broker: Broker, kinds: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    while True:
        seen = broker.seen.get(timeout=30)
        kind = seen.topic.rpartition("/")[2]
        if kind in kinds:
            return kind, seen.payload


def test_an_agent_that_is_killed_again_and_again_loses_no_alarm_that_it_kept(
    unit: Unit, ca: Ca, broker: Broker
) -> None:
    """Motion without a pause, and kill -9 at moments that are not chosen: some fall into writing, some into sending."""
    broker.start()
    provision(unit, ca, broker.port)
    settings = unit.root / "agent.toml"
    settings.write_text(settings_text(unit.root))
    ids: dict[int, str] = {}

    def take(alarm: dict[str, Any]) -> None:
        assert ids.setdefault(alarm["sequence"], alarm["event_id"]) == alarm["event_id"]

    draw = random.Random(3)
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", AGENT, str(settings)],
            cwd=ROOT,
            env={**os.environ, "LG_WD": str(unit.root)},
            stderr=subprocess.DEVNULL,
        ) as process:
            kind = ""
            while kind != "hello":
                kind, message = next_from(broker, ("hello", "alarm"))
                if kind == "alarm":
                    take(message)
            for _ in range(draw.randrange(5, 60)):
                process.send_signal(signal.SIGUSR1)
                time.sleep(draw.random() * 0.005)
            process.kill()

    with agent(settings):
        wait_for(lambda: stored(unit) == 0)
    while not broker.seen.empty():
        seen = broker.seen.get()
        if seen.topic.endswith("/alarm"):
            take(seen.payload)

    assert len(ids) > 20
    assert sorted(ids) == list(range(1, len(ids) + 1))  # no gap: what had a number has come
    assert len(set(ids.values())) == len(ids)


def stored(unit: Unit) -> int:
    with Spool(unit.settings.paths.spool) as spool:
        return spool.depth().alarms
