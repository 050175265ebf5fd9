"""What the spool has taken it gives back, in order, once it may forget, and whatever kills it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from firmware_agent import topics
from firmware_agent.product import open_spool
from firmware_agent.spool import Spool

ROOT = Path(__file__).parent.parent.parent
CAPACITY = 6


class SpoolMachine(RuleBasedStateMachine):
    """A spool beside a list that should behave the same."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "spool.db"
        self.spool = Spool(self.path, CAPACITY)
        self.model: list[tuple[str, bytes]] = []
        self.sequence = 0

    def teardown(self) -> None:
        self.spool.close()
        self.directory.cleanup()

    def _shrink(self) -> None:
        while len(self.model) > CAPACITY:
            heartbeats = [entry for entry in self.model if entry[0] == topics.HEARTBEAT]
            self.model.remove(heartbeats[0] if heartbeats else self.model[0])

    @rule()
    def alarm(self) -> None:
        self.sequence += 1
        body = f"alarm {self.sequence}".encode()
        assert self.spool.alarm(lambda sequence: f"alarm {sequence}".encode()) == self.sequence
        self.model.append((topics.ALARM, body))
        self._shrink()

    @rule(number=st.integers(0, 1_000_000))
    def heartbeat(self, number: int) -> None:
        body = f"heartbeat {number} {len(self.model)} {self.sequence}".encode()
        self.spool.heartbeat(body)
        self.model.append((topics.HEARTBEAT, body))
        self._shrink()

    @rule(count=st.integers(1, 3))
    def deliver(self, count: int) -> None:
        for message in self.spool.oldest(count):
            self.spool.delete(message)
            self.model.remove((message.kind, message.body))

    @rule()
    def refuse(self) -> None:
        def broken(_: int) -> bytes:
            raise ValueError

        try:
            self.spool.alarm(broken)
        except ValueError:
            return
        raise AssertionError

    @rule()
    def restart(self) -> None:
        self.spool.close()
        self.spool = Spool(self.path, CAPACITY)

    @invariant()
    def gives_back_what_it_took_in_order(self) -> None:
        assert self.model == [(message.kind, message.body) for message in self.spool.oldest(100)]
        assert len(self.spool) == len(self.model)


TestSpool = SpoolMachine.TestCase
TestSpool.settings = settings(
    max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


WRITER = """
import sys
from pathlib import Path
from firmware_agent.spool import Spool
spool = Spool(Path(sys.argv[1]))
while True:
    print(spool.alarm(lambda sequence: b"{}"), flush=True)
"""


def test_what_was_confirmed_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    confirmed = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(20):
                confirmed = int(process.stdout.readline())
            os.kill(process.pid, signal.SIGKILL)
            for line in process.stdout:
                if line.endswith(b"\n"):
                    confirmed = int(line)

    with Spool(path) as spool:
        assert len(spool) >= confirmed
        assert spool.alarm(lambda _: b"") == len(spool)  # no number is used twice, none is left out


def test_a_damaged_spool_is_put_aside_and_a_new_one_begun(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "spool.db"
    path.write_bytes(b"no database at all" * 100)

    with open_spool(path) as spool:
        assert spool.alarm(lambda sequence: json.dumps(sequence).encode()) == 1

    assert (tmp_path / "spool.db.damaged").exists()
    assert "damaged" in caplog.text
