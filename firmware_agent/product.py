"""Product mode: motion becomes an alarm in the cloud, whatever happens in between.

    edge ──▶ keeper ──▶ spool (disk) ──▶ link ──▶ broker
                                          │
                      deleted on PUBACK ◀─┘          supervisor: watchdog
                                                     parts: jobs, shadows, health, house

The keeper and the link are vital: when one of them ends, the agent ends, and systemd starts it anew; when one of them
hangs, the supervisor stops feeding the watchdog, and systemd does the same. The parts are not vital: when jobs, shadows
or the house-keeping (heartbeats, status) break, they are begun again later. An alarm is gone from the unit only when
the broker has acknowledged it.

In safe mode (the release does not stay up, or the image's settings are broken) the unit does what it is there for and
nothing else: it watches, alarms, and takes an update.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any, Final

from firmware_agent import __version__, identity, keys, messages, status, tuning, vetting
from firmware_agent.arming import ArmingStore
from firmware_agent.assembly import Means, runner
from firmware_agent.board import Board, ClockReading
from firmware_agent.defender import Defender
from firmware_agent.errors import PirFault
from firmware_agent.identity import Identity
from firmware_agent.jobs.runner import Runner
from firmware_agent.keeper import Keeper
from firmware_agent.link import Link
from firmware_agent.log import Complaints
from firmware_agent.messages import Alarm
from firmware_agent.parts import Part
from firmware_agent.pins import Pins, Pir
from firmware_agent.sensing import Decision, Rules
from firmware_agent.settings import Settings
from firmware_agent.shadow import AlarmTwin, SettingsTwin, Shadows
from firmware_agent.spool import Spool
from firmware_agent.systemd import Systemd
from firmware_agent.timekeeping import certainly_wrong
from firmware_agent.tuning import BadTuning, Tuning
from firmware_agent.update.releases import Releases

_log = logging.getLogger(__name__)

#: How long a thread may go without a sign of life. The longest honest silence is letting go of a connection (5 s).
STALL_SECONDS: Final = 30.0

#: A release that has run for so long does not fall over at its start.
STEADY_SECONDS: Final = 60.0

_TICK_SECONDS: Final = 1.0
_STATUS_SECONDS: Final = 5.0
_PART_SECONDS: Final = 5.0  # what a part may take to end before the process ends without it

_LONGEST_DETAIL: Final = 300

#: "Start me again at once": another release is in force.
EXIT_RESTART: Final = 5


class Product:
    """The alarm system of one unit.

    Args:
        settings: what the image fixes.
        board: what the agent runs on.
        pins: where the PIR is, and the case's loop.
        notify: systemd, or nobody.
        release: the name of the release that runs; None without a launcher.
        safe_mode: why only what is most needed is to be done; None in ordinary times.
        complaints: what the log has complained about lately.
    """

    def __init__(
        self,
        settings: Settings,
        board: Board,
        pins: Pins,
        *,
        notify: Systemd | None = None,
        release: str | None = None,
        safe_mode: str | None = None,
        complaints: Complaints | None = None,
    ) -> None:
        self._settings = settings
        self._board = board
        self._boot_id = board.facts().boot_id
        self._pins = pins
        self._notify = notify or Systemd()
        self._release = release
        self._releases = Releases(settings.paths.releases, settings.paths.state)
        self._safe_mode = safe_mode
        self._complaints = complaints or Complaints()
        self._tuning = settings.tuning
        self._open = ExitStack()
        self._stop = threading.Event()
        self._beats: dict[str, float] = {}
        self._threads: list[threading.Thread] = []
        self._parts: list[Part] = []
        self._keeper: Keeper | None = None
        self._link: Link | None = None
        self._shadows: Shadows | None = None
        self._alarm_twin: AlarmTwin | None = None
        self._defender: Defender | None = None
        self._runner: Runner | None = None
        #: Why a thread ended that should not have, if one did.
        self.failure: BaseException | None = None
        #: What the process should end with, if nothing has failed.
        self.exit_code = 0

    def start(self) -> None:
        """Watch at once; connect when key and certificates have been looked at. Returns when both go on.

        A unit whose key store is gone does not start: an alarm that cannot prove who it comes from is none.

        Raises:
            NoTpm: the unit is configured for a TPM and none is usable.
            KeyFault: the key cannot be used.
            WrongState: the unit was never provisioned.
            PirFault: the PIR's line cannot be opened.
        """
        try:
            with vetting.begun(self._settings, self._board.facts().serial) as verdict:
                try:
                    spool, arming, pir = self._watch()
                except PirFault:
                    verdict()  # a key that is gone is worse than a sensor that is: it halts the unit
                    raise
                verdict()
            self._connect(spool, arming, pir)
        except BaseException:
            self._end()
            self._join()
            raise
        self._notify.ready()

    def _watch(self) -> tuple[Spool, ArmingStore, Pir]:
        """From here on no edge is lost."""
        settings, paths = self._settings, self._settings.paths
        self._tuning = self._load_tuning()
        spool = self._open.enter_context(Spool(paths.spool))
        arming = ArmingStore(paths.arming, lambda now: self._armed(now.armed))
        rules = Rules(settings.pir.warm_up_seconds, settings.pir.blocked_seconds, self._tuning)
        keeper = Keeper(self._board, rules, spool, told=self._told, believable=self._believable)
        pir = self._open.enter_context(self._pins.pir())
        case = self._open.enter_context(self._pins.tamper())
        heard_at = status.heard_at(paths.status, self._boot_id)
        was_low = status.was_low(paths.status, self._boot_id)
        keeper.watch(pir, case, armed=arming.now.armed, heard_at=heard_at, was_low=was_low)
        self._keeper = keeper
        self._spawn("keeper", lambda: keeper.run(self._stop, lambda: self._beat("keeper")))
        return spool, arming, pir

    def _connect(self, spool: Spool, arming: ArmingStore, pir: Pir) -> None:
        store = keys.open_store(self._settings)
        self._open.callback(store.close)
        found = identity.load(self._settings.paths.identity)
        key = store.vetted(found.slot)
        link = Link(
            self._settings,
            self._board,
            found,
            key,
            spool,
            self._notify,
            release=self._release,
            safe_mode=self._safe_mode,
        )
        self._link = link
        self._runner = runner(
            Means(
                settings=self._settings,
                board=self._board,
                link=link,
                pir=pir,
                store=store,
                spool=spool,
                release=self._release,
                tune=self._use_tuning,
                status=lambda: status.words({**self._snapshot(spool, arming, found), **status.here()}),
                leave=self._leave,
                safe_mode=self._safe_mode,
            )
        )
        self._add_part("jobs", self._runner.run, self._runner.wake)
        if self._safe_mode is None:
            self._alarm_twin = AlarmTwin(arming)
            settings_twin = SettingsTwin(
                self._settings.paths.shadows, lambda: self._tuning, self._settings.tuning, self._keep_tuning
            )
            self._shadows = Shadows(link, self._alarm_twin, settings_twin)
            self._add_part("shadows", self._shadows.run, self._shadows.changed)
            self._defender = Defender(
                link,
                self._board,
                state=self._settings.paths.state,
                path=self._settings.paths.reports,
                spool=lambda: len(spool),
                seconds=lambda: self._tuning.report_seconds,
            )
            self._add_part("health", self._defender.run)
        self._spawn("link", lambda: link.run(self._stop, lambda: self._beat("link")))
        self._add_part("house", lambda stop: self._keep_house(stop, spool, arming, found))
        self._spawn("supervisor", self._supervise)
        for part in self._parts:
            part.start()

    def stop(self) -> None:
        """Ask all threads to end; safe to call at any time, also twice."""
        self._notify.stopping()
        self._end()

    def join(self) -> None:
        """Wait until all threads have ended, then let go of PIR, spool and key.

        Raises:
            BaseException: what ended a thread that should have gone on.
        """
        self._join()
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

    def _add_part(
        self, name: str, run: Callable[[threading.Event], None], wake: Callable[[], None] = lambda: None
    ) -> None:
        def broke(fault: str) -> None:
            if self._keeper is not None:
                self._keeper.say(Decision("part-broken", detail=f"{name}: {fault}"[:_LONGEST_DETAIL]))

        self._parts.append(Part(name, run, broke=broke, wake=wake))

    def _beat(self, name: str) -> None:
        self._beats[name] = time.monotonic()

    def _end(self) -> None:
        self._stop.set()
        for part in self._parts:
            part.stop()
        if self._keeper is not None:
            self._keeper.wake()
        self._wake_link()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for part in self._parts:
            if not part.join(_PART_SECONDS):
                _log.warning("%s does not end; the agent ends without", part.name)
        self._open.close()

    def _leave(self) -> None:
        """Another release is in force now."""
        self.exit_code = EXIT_RESTART
        self.stop()

    # --- what one thread has to tell another ------------------------------------------------------------------------

    def _wake_link(self, *, urgent: bool = False) -> None:
        if self._link is not None:
            self._link.wake(urgent=urgent)

    def _told(self, message: Alarm, clock: ClockReading, *, alarm: bool) -> None:
        """The keeper has kept something."""
        self._wake_link(urgent=alarm)
        if alarm and self._defender is not None:
            self._defender.alarm()
        if alarm and self._alarm_twin is not None and self._shadows is not None:
            self._alarm_twin.alarm(kind=message.kind, event_id=message.event_id, at=clock.unix, quality=clock.quality)
            self._shadows.changed()

    def _armed(self, armed: bool) -> None:
        if self._keeper is not None:
            self._keeper.arm(armed=armed)
        if self._defender is not None and not armed:
            self._defender.disarmed()
        if self._shadows is not None:
            self._shadows.changed()

    def _believable(self, unix: float) -> bool:
        """Whether a clock that claims to be set can be right."""
        return self._link is not None and certainly_wrong(unix, self._link.timekeeper.bounds()) is None

    # --- tuning -----------------------------------------------------------------------------------------------------

    def _load_tuning(self) -> Tuning:
        """What the owner has set. A damaged file costs the owner's wishes until the shadow brings them again."""
        paths, defaults = self._settings.paths, self._settings.tuning
        if self._safe_mode is not None:
            return defaults
        try:
            return tuning.load(paths.tuning, defaults)
        except (BadTuning, OSError) as error:
            _log.error("the image's settings hold until the owner's come again: %s", error)
            with suppress(OSError):
                paths.shadows.unlink(missing_ok=True)  # so that the wishes are taken once more
            return defaults

    def _use_tuning(self, new: Tuning) -> None:
        self._tuning = new
        if self._keeper is not None:
            self._keeper.tune(new)
        if self._shadows is not None:
            self._shadows.changed()

    def _keep_tuning(self, new: Tuning) -> None:
        tuning.save(self._settings.paths.tuning, new, self._settings.tuning)
        self._use_tuning(new)

    # --- the supervisor ---------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        """Systemd's watchdog. It waits for nobody, so that it can tell of a thread that does."""
        tick = _TICK_SECONDS if self._notify.watchdog_seconds is None else self._notify.watchdog_seconds / 3
        while not self._stop.wait(min(tick, _TICK_SECONDS)):
            now = time.monotonic()
            stalled = [name for name in ("keeper", "link") if now - self._beats[name] > STALL_SECONDS]
            if stalled:
                self._notify.status(f"{' and '.join(stalled)} stalled")
            else:
                self._notify.alive()

    def _keep_house(self, stop: threading.Event, spool: Spool, arming: ArmingStore, found: Identity) -> None:
        """Heartbeats into the spool, the status for whoever asks, and a word to the launcher."""
        began = beat_at = time.monotonic()
        status_at = -_STATUS_SECONDS
        steady = False
        while not stop.wait(min(_TICK_SECONDS, self._tuning.heartbeat_seconds)):
            now = time.monotonic()
            if now - beat_at >= self._tuning.heartbeat_seconds:
                beat_at = now
                self._heartbeat(spool)
            if now - status_at >= _STATUS_SECONDS:
                status_at = now
                with suppress(OSError):
                    status.write(self._settings.paths.status, self._snapshot(spool, arming, found))
            if not steady and now - began >= STEADY_SECONDS:
                steady = True
                self._call_steady()

    def _call_steady(self) -> None:
        """The launcher may count this release's starts from zero again."""
        if self._release is not None:
            with suppress(OSError):
                self._releases.steady()

    def _heartbeat(self, spool: Spool) -> None:
        beat = messages.Heartbeat(
            at=messages.timestamp(self._board.clock().unix),
            boot_id=self._boot_id,
            uptime_s=int(self._board.uptime()),
            spool=len(spool),
            temperature_c=self._board.health(self._settings.paths.state).temperature_c,
            safe_mode=self._safe_mode,
        )
        with suppress(sqlite3.Error):  # the spool complains by itself
            spool.heartbeat(beat.payload())
        self._wake_link()

    def _snapshot(self, spool: Spool, arming: ArmingStore, found: Identity) -> dict[str, Any]:
        """How the unit is, as `status` tells it."""
        assert self._keeper is not None  # noqa: S101 - for the type checker
        assert self._link is not None  # noqa: S101
        clock, uptime = self._board.clock(), self._board.uptime()
        oldest = spool.oldest(1)
        link, sensor, now = self._link.status(), self._keeper.state, arming.now
        execution = None if self._runner is None else self._runner.execution
        return {
            "format": 1,
            "pid": os.getpid(),
            "boot_id": self._boot_id,
            "uptime": uptime,
            "mode": "product",
            "agent": __version__,
            "image": str(self._settings.image),
            "safe_mode": self._safe_mode,
            **status.releases(self._settings),
            "serial": found.serial,
            "endpoint": f"{found.host}:{found.port}",
            "certificate": {"not_after": self._link.identity.validity.not_valid_after_utc.timestamp()},
            "armed": {"armed": now.armed, "by": now.by},
            "sensor": {
                "high": sensor.high,
                "heard_at": sensor.heard_at,
                "warms_up": uptime < self._settings.pir.warm_up_seconds,
                "stuck": sensor.stuck,
                "silent": sensor.silent,
                "chattering": sensor.chattering,
                "pulses": sensor.pulses,
                "glitches": sensor.glitches,
                "fault": self._keeper.fault,
                "case": sensor.closed if self._keeper.has_case else None,
            },
            "spool": {**asdict(spool.depth()), "oldest_at": status.moment(oldest[0].body) if oldest else None},
            "link": {
                "state": link.state,
                "detail": link.detail,
                "failures": link.failures,
                "held": dict(link.held),
            },
            "job": None if execution is None else status.job(execution),
            "clock": {
                "unix": clock.unix,
                "quality": clock.quality,
                "wrong": certainly_wrong(clock.unix, self._link.timekeeper.bounds()),
            },
            "tuning": tuning.changes(self._tuning, Tuning()),
            "parts": {part.name: asdict(part.health) for part in self._parts},
            "complaints": [asdict(one) for one in self._complaints.last()],
        }
