"""One process of the agent, as far as jobs go, that kills itself with SIGKILL at a given moment of a given phase.

    python -m tests.firmware_agent.jobs.process ROOT SOCKET HEALTHY TARGET "PHASE MOMENT COUNT"

It ends with 0 when there is nothing to do any more, and with 5 when it is to be started anew.
"""

import json
import os
import signal
import sys
import threading
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

from firmware_agent.update.target import DeltaHint, Payload, Target
from tests.firmware_agent.jobs.world import SERIAL, Unit, plugged
from tests.firmware_agent.jobs_service import JobsService, LocalLink


class Remote(JobsService):
    """A jobs service in another process."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        super().__init__()
        self._connection = connection

    def handle(self, topic: str, payload: bytes) -> tuple[str, bytes] | None:
        self._connection.send((topic, payload))
        answer: tuple[str, bytes] | None = self._connection.recv()
        return answer


def target_of(text: str) -> Target:
    value = json.loads(text)
    for name in ("full", "delta"):
        value[name] = Payload(**{**value[name], "chunks": tuple(value[name]["chunks"])})
    value["deltas"] = tuple(DeltaHint(**hint) for hint in value["deltas"])
    return Target(**{**value, "hardware": tuple(value["hardware"])})


def main(root: str, address: str, healthy: str, target: str, strike: str) -> int:
    stop = threading.Event()
    with Client(address) as connection, pytest.MonkeyPatch.context() as monkeypatch:
        link = LocalLink(Remote(connection), SERIAL)
        unit = Unit(Path(root), link, target_of(target), healthy=healthy == "True")
        with plugged(unit.root, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL)) as plug:

            def hook(moment: str, phase: str) -> None:
                where, when, count = (strike or "- - 0").split()
                if phase != where:
                    return
                if when == "middle" and moment == "begin":
                    plug.left = int(count)
                elif when == moment or (when == "middle" and moment == "end"):
                    plug.pull()

            def rest() -> None:
                stop.set()
                assert unit.runner is not None
                unit.runner.wake()

            unit.hook, link.idle = hook, rest
            return 5 if unit.process(unit.start(), stop) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
