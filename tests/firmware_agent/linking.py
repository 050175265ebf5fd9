"""A link that runs by itself, without the rest of the agent, and what it may say to the broker."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from firmware_agent import identity
from firmware_agent.identity import Identity
from firmware_agent.keys import open_store
from firmware_agent.link import Link
from firmware_agent.spool import Spool
from firmware_agent.systemd import Systemd
from tests.firmware_agent.support import SERIAL, Broker, Ca, Station, Unit, burn_in_params, pem, wait_for

#: As the cloud's policy has it: a unit's own data, and its own reserved topics.
ACL = """user observer
topic read #
user service
topic readwrite $aws/#
pattern write dt/picket/%u/#
pattern readwrite $aws/things/%u/#
"""


def permit(broker: Broker, acl: str = ACL) -> None:
    (broker._directory / "acl").write_text(acl)


def provision_as(unit: Unit, ca: Ca, port: int, serial: str) -> Identity:
    """As `provision`, under a name of its own."""
    station = Station(unit)
    try:
        csr = x509.load_pem_x509_csr(station.ask("enrol", serial=serial)["csr"].encode())
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        params = burn_in_params(ca, ca.leaf(key, serial), pem(ca.certificate), port)
        station.ask("burn-in", **{**params, "serial": serial})
    finally:
        station.close()
    return identity.load(unit.settings.paths.identity)


@dataclass
class Running:
    """A link on its own thread."""

    link: Link
    spool: Spool
    identity: Identity
    beats: list[None]

    @classmethod
    @contextlib.contextmanager
    def of(
        cls,
        unit: Unit,
        ca: Ca,
        port: int,
        *,
        serial: str = SERIAL,
        host: str = "localhost",
        rate: float = 100_000.0,
    ) -> Iterator["Running"]:
        with cls.on(unit, replace(provision_as(unit, ca, port, serial), host=host), rate=rate) as running:
            yield running

    @classmethod
    @contextlib.contextmanager
    def on(cls, unit: Unit, found: Identity, *, rate: float = 100_000.0) -> Iterator["Running"]:
        """For a unit that has its identity already."""
        settings = replace(unit.settings, mqtt=replace(unit.settings.mqtt, publishes_per_second=rate))
        store = open_store(settings)
        stop = threading.Event()
        beats: list[None] = []
        failures: list[BaseException] = []
        with Spool(settings.paths.spool) as spool:
            link = Link(settings, unit.board, found, store.load(), spool, Systemd())

            def run() -> None:
                try:
                    link.run(stop, lambda: beats.append(None))
                except BaseException as error:  # noqa: BLE001 - raised again below
                    failures.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            try:
                yield cls(link, spool, found, beats)
            finally:
                stop.set()
                link.wake()
                thread.join()
                store.close()
            assert failures == []

    def alarm(self, count: int = 1) -> None:
        """As the keeper does it."""
        for _ in range(count):
            self.spool.alarm(
                lambda sequence: json.dumps(
                    {"event_id": f"e-{sequence}", "sequence": sequence, "kind": "motion"}
                ).encode()
            )
        self.link.wake(urgent=True)

    def wait_connected(self, seconds: float = 20.0) -> None:
        wait_for(self.link.connected, seconds)

    def wait_drained(self, seconds: float = 30.0) -> None:
        wait_for(lambda: len(self.spool) == 0, seconds)


def log_of(broker: Broker) -> str:
    return Path(broker._directory / "log").read_text()
