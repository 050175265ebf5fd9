"""Product mode: motion becomes an alarm in the cloud, whatever happens in between.

    edge ──▶ keeper ──▶ spool (disk) ──▶ link ──▶ broker
                                          │
                      deleted on PUBACK ◀─┘          supervisor: heartbeats, watchdog

Three threads with one duty each. The keeper does nothing but make edges durable, so a slow network never delays it; the
link owns the connection and is the only one that retries; the supervisor tells systemd that both are alive, and stops
telling when one is not. An alarm is gone from the unit only when the broker has acknowledged it.
"""

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from firmware_agent import files, identity, keys, messages
from firmware_agent.board import Board, ClockReading
from firmware_agent.link import Link
from firmware_agent.pins import Pins
from firmware_agent.settings import Settings
from firmware_agent.spool import Spool
from firmware_agent.systemd import Systemd

_log = logging.getLogger(__name__)

#: How long a thread may go without a sign of life. The longest honest silence is letting go of a connection (5 s).
STALL_SECONDS: Final = 30.0

_TICK_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 5.0
_ACK_SECONDS: Final = 30.0
_STEADY_SECONDS: Final = 30.0  # a link that lasted so long was no failure
_WINDOW: Final = 16  # messages in flight; AWS IoT takes 100 a second on one connection


@dataclass(frozen=True)
class _Edge:
    """A rising edge of the PIR, stamped where it was seen."""

    clock: ClockReading
    uptime: float


@dataclass(frozen=True)
class _Wake:
    """The end has come: look."""


class Product:
    """The alarm system of one unit.

    Args:
        settings: what the image fixes.
        board: what the agent runs on.
        pins: where the PIR is.
        notify: systemd, or nobody.
    """

    def __init__(self, settings: Settings, board: Board, pins: Pins, *, notify: Systemd | None = None) -> None:
        self._settings = settings
        self._board = board
        self._pins = pins
        self._notify = notify or Systemd()
        self._open = ExitStack()
        self._stop = threading.Event()
        self._edges: queue.SimpleQueue[_Edge | _Wake] = queue.SimpleQueue()
        self._link: Link | None = None
        self._beats: dict[str, float] = {}
        self._threads: list[threading.Thread] = []
        #: Why a thread ended that should not have, if one did.
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Open key, certificates, spool and PIR, then watch. Returns when an alarm would be kept.

        A unit whose key store is gone does not start: an alarm that cannot prove who it comes from is none.

        Raises:
            NoTpm: the unit is configured for a TPM and none is usable.
            KeyFault: the key cannot be used.
            WrongState: the unit was never provisioned.
            PirFault: the PIR's line cannot be opened.
        """
        paths = self._settings.paths
        with ExitStack() as opened:
            store = keys.open_store(self._settings)
            opened.callback(store.close)
            found = identity.load(paths.identity)
            key = store.load(found.slot)
            identity.check(found, key.public_key(), self._board.facts().serial)
            spool = opened.enter_context(open_spool(paths.spool))
            pir = opened.enter_context(self._pins.pir())
            link = Link(self._settings, self._board, found, key, spool, self._notify)
            self._link = link
            pir.watch(self._edge)
            self._open = opened.pop_all()
        self._spawn("keeper", lambda: self._keep(spool))
        self._spawn("link", lambda: link.run(self._stop, lambda: self._beat("link")))
        self._spawn("supervisor", lambda: self._supervise(spool))
        self._notify.ready()

    def stop(self) -> None:
        """Ask all threads to end; safe to call at any time, also twice."""
        self._notify.stopping()
        self._stop.set()
        self._edges.put(_Wake())
        self._wake()

    def join(self) -> None:
        """Wait until all threads have ended, then let go of PIR, spool and key.

        Raises:
            BaseException: what ended a thread that should have gone on.
        """
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._open.close()
        if self.failure is not None:
            raise self.failure

    # --- threads ---------------------------------------------------------------------------------------------------

    def _spawn(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - kept, and raised again by `join`
                self.failure = self.failure or error
                _log.exception("the %s has ended", name)
                self.stop()

        self._beat(name)
        thread = threading.Thread(target=run, name=f"picket-{name}")
        self._threads.append(thread)
        thread.start()

    def _wake(self, *, urgent: bool = False) -> None:
        if self._link is not None:
            self._link.wake(urgent=urgent)

    def _beat(self, name: str) -> None:
        self._beats[name] = time.monotonic()

    def _edge(self, rising: bool) -> None:
        """Called by the pin factory's thread."""
        if rising:
            self._edges.put(_Edge(self._board.clock(), self._board.uptime()))

    def _keep(self, spool: Spool) -> None:
        """Make each edge durable, also those that came while the end was asked for."""
        boot_id = self._board.facts().boot_id
        while not self._stop.is_set() or not self._edges.empty():
            self._beat("keeper")
            try:
                edge = self._edges.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                continue
            # The sensor lies while it warms up after power-up; a restart of the agent does not make it cold again.
            if isinstance(edge, _Edge) and edge.uptime >= self._settings.pir.warm_up_seconds:
                self._keep_one(spool, edge, boot_id)
                self._wake(urgent=True)

    def _keep_one(self, spool: Spool, edge: _Edge, boot_id: str) -> None:
        """Keep one alarm, trying again for as long as the disk is full."""
        while True:
            self._beat("keeper")
            try:
                spool.alarm(
                    lambda sequence: messages.alarm(
                        sequence, clock=edge.clock, uptime=edge.uptime, boot_id=boot_id
                    ).payload(),
                )
                return
            except sqlite3.Error as error:
                _log.error("an alarm waits for the disk: %s", error)
                if self._stop.wait(_TICK_SECONDS):
                    return

    def _supervise(self, spool: Spool) -> None:
        """Heartbeats into the spool, and systemd's watchdog."""
        heartbeat = self._settings.tuning.heartbeat_seconds
        tick = min(_TICK_SECONDS, heartbeat)
        if self._notify.watchdog_seconds is not None:
            tick = min(tick, self._notify.watchdog_seconds / 3)
        boot_id = self._board.facts().boot_id
        due = time.monotonic() + heartbeat
        while not self._stop.wait(tick):
            now = time.monotonic()
            stalled = [name for name in ("keeper", "link") if now - self._beats[name] > STALL_SECONDS]
            if stalled:
                self._notify.status(f"{' and '.join(stalled)} stalled")
            else:
                self._notify.alive()
            if now >= due:
                due = now + heartbeat
                self._heartbeat(spool, boot_id)

    def _heartbeat(self, spool: Spool, boot_id: str) -> None:
        beat = messages.Heartbeat(
            at=messages.timestamp(self._board.clock().unix),
            boot_id=boot_id,
            uptime_s=int(self._board.uptime()),
            spool=len(spool),
            temperature_c=self._board.health(self._settings.paths.state).temperature_c,
        )
        try:
            spool.heartbeat(beat.payload())
        except sqlite3.Error as error:
            _log.warning("no heartbeat: %s", error)
        self._wake()


def open_spool(path: Path) -> Spool:
    """The spool, or a new one beside a damaged one: an alarm system must not stay silent over a broken file."""
    try:
        return Spool(path)
    except sqlite3.OperationalError:
        raise  # a full disk, no rights: the file itself may be whole
    except sqlite3.DatabaseError as error:
        _log.error("the spool is damaged (%s); it is kept as %s.damaged and a new one begun", error, path.name)
        path.rename(path.with_name(path.name + ".damaged"))
        for leftover in ("-wal", "-shm"):
            path.with_name(path.name + leftover).unlink(missing_ok=True)
        files.sync_directory(path.parent)
        return Spool(path)
