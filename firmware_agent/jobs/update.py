"""The kind `update`: another release of the agent, proved before it is kept.

    check     what do the signed metadata say; is it for this unit; is there room      (nothing is changed)
    download  the delta from the running release if one was signed, else the full archive
    install   into an immutable directory beside the running one; a delta that does not fit is followed by the full one
    switch    boot.json: on trial; `current` points to it                              (the process ends)
    prove     PIR, spool and key work; the cloud is reached, if the release before could
    commit    previous = the release before; the floor rises
    roll-back boot.json: given up; `current` points to the release before              (the process ends)
    back      the release before runs

Of the job document only the target's path and the URLs are used. What is installed is decided by `update.trust`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from firmware_agent.jobs import document
from firmware_agent.jobs.kind import (
    Context,
    Done,
    Dropped,
    Ended,
    Failed,
    Key,
    Next,
    Orphan,
    Phase,
    Rejected,
    Restart,
    Result,
    Stopping,
)
from firmware_agent.launcher import Trial
from firmware_agent.update import BadArchive, BadDelta, Cancelled, DownloadFault, InstallFault, UrlExpired, download
from firmware_agent.update import delta as deltas
from firmware_agent.update.archive import Digest, decompress
from firmware_agent.update.releases import RESERVE_BYTES, Expected, Releases, check_room, room_needed
from firmware_agent.update.target import Payload, Running, Target, TrustFault

_log = logging.getLogger(__name__)

#: How often a URL may turn out to be expired before the download fails.
_FRESH_URLS: Final = 5

_TICK_SECONDS: Final = 1.0

#: What a trial has beyond its gate's own limits: to commit, or to go back.
_SPARE_SECONDS: Final = 600

#: What a board needs at worst to come up again and set its clock, beside what a trial needs. In minutes.
RESTART_MINUTES: Final = 10


class Trusts(Protocol):
    """What signed metadata say (`update.trust.Trust`)."""

    def check(self, path: str, metadata_url: str, running: Running) -> Target:
        """The release that the target path is, if this unit may run it."""
        ...

    def commit(self, security_version: int, kind: str = "agent") -> None:
        """Raise the floor."""
        ...

    def security_floor(self, kind: str = "agent") -> int:
        """The security version that was committed to."""
        ...


class Online(Protocol):
    """The part of the link that a trial needs."""

    def connected(self) -> bool:
        """Whether there is a connection."""
        ...


@dataclass(frozen=True)
class Limits:
    """How long a trial may take, and how often it is started.

    Attributes:
        health_seconds: for PIR, spool and key.
        soft_seconds: for the cloud, if the release before could reach it.
        attempts: starts of a release on trial.
    """

    health_seconds: float = 120.0
    soft_seconds: float = 900.0
    attempts: int = 3

    @property
    def minutes(self) -> int:
        """The step timer that covers a trial with all its restarts."""
        return int((self.attempts * self.health_seconds + self.soft_seconds) / 60) + RESTART_MINUTES


class Update:
    """Install another release of the agent.

    Args:
        releases: the releases on this unit.
        running: the name of the release that this process runs; None if it was not started by the launcher.
        hardware: the board's device-tree `compatible` strings.
        trust: what signed metadata say.
        link: asked for the connection only.
        health: what is wrong with PIR, spool or key now, in words; None if nothing is.
        limits: of a trial.
        get: downloads a payload.
        clock: monotonic seconds.
        deadline: so many seconds from now the launcher's timer ends a trial; 0 stops the timer.
    """

    operation = "update"

    def __init__(
        self,
        releases: Releases,
        running: str | None,
        hardware: Sequence[str],
        trust: Trusts,
        link: Online,
        health: Callable[[], str | None],
        limits: Limits | None = None,
        *,
        get: Callable[..., Path] = download.download,
        clock: Callable[[], float] = time.monotonic,
        deadline: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._releases = releases
        self._running = running
        self._hardware = tuple(hardware)
        self._trust = trust
        self._link = link
        self._health = health
        self._limits = limits or Limits()
        self._download_payload = get
        self._clock = clock
        self._deadline = deadline
        self._target: tuple[Key, Target] | None = None
        trial = self._limits.minutes
        self.phases = (
            Phase("check", self._check, code="download"),
            Phase("download", self._download, code="download", attempts=10, minutes=30),
            Phase("install", self._install, code="install", minutes=30),
            Phase("switch", self._switch, code="install", bound=True, minutes=trial),
            # The launcher counts the starts of a trial, and ends it; this bound is only the second net.
            Phase("prove", self._prove, code="unhealthy", bound=True, attempts=10, minutes=trial),
            Phase("commit", self._commit, code="install", bound=True),
        )
        self.undo = (
            Phase("roll-back", self._roll_back, code="install", minutes=RESTART_MINUTES),
            Phase("back", self._back, code="crashed"),
        )

    # --- before the switch -----------------------------------------------------------------------------------------

    def _check(self, context: Context) -> Result:
        if self._running is None:
            return Rejected("not-possible", "this agent was not started from a release")
        wanted, target = _wanted(context), self._signed(context)
        if wanted.version != target.version:
            return Rejected("bad-document", f"the job says {wanted.version}, the signed target is {target.version}")
        if target.release == self._running:
            return Done({"release": self._running})
        if not self._installed(target):
            payload = self._choose(context, target)
            check_room(self._releases.directory, room_needed(target.tar_size, payload.length))
            check_room(context.scratch, payload.length + RESERVE_BYTES)
        return Next({"release": target.release, "from": self._running})

    def _download(self, context: Context) -> Result:
        target = self._signed(context)
        if self._installed(target):
            return Next()
        payload = self._choose(context, target)
        try:
            self._fetch(context, payload)
        except DownloadFault as error:
            if payload is target.full:
                raise
            _log.warning("the delta does not come, so the full archive is fetched: %s", error)
            self._fetch(context, target.full)
        return Next()

    def _install(self, context: Context) -> Result:
        target = self._signed(context)
        if not self._installed(target) and not self._install_delta(context, target):
            with self._fetch(context, target.full).open("rb") as archive:
                self._releases.install(decompress(archive), _expected(target))
        return Next()

    def _install_delta(self, context: Context, target: Target) -> bool:
        """Whether the release could be made from the running one and its delta."""
        payload = self._choose(context, target)
        if payload is target.full:
            return False
        source = next(hint.source for hint in target.deltas if hint.path == payload.path)
        try:
            patch = self._fetch(context, payload).read_bytes()
            old = deltas.base(self._releases.path(self._started()), source)
            self._releases.install(deltas.apply(old, patch, _expected(target).tar), _expected(target))
        except (BadDelta, BadArchive, DownloadFault) as error:
            _log.warning("the delta is of no use, so the full archive is taken: %s", error)
            return False
        return True

    def _installed(self, target: Target) -> bool:
        """Whether the release lies here whole."""
        if target.release not in self._releases.names():
            return False
        try:
            return self._releases.digest(target.release) == _expected(target).tar
        except (BadArchive, OSError):
            return False

    def _choose(self, context: Context, target: Target) -> Payload:
        """The delta, if it is one from the running release and the job says where it is; else the full archive."""
        if target.delta is not None and target.delta.path in _wanted(context).urls:
            return target.delta
        return target.full

    def _fetch(self, context: Context, payload: Payload) -> Path:
        """The payload in the scratch directory, complete and checked; at once if it is there already."""
        return fetch(context, payload, self._download_payload)

    def _signed(self, context: Context) -> Target:
        """What was signed about the target; asked once per process and job."""
        if self._target is None or self._target[0] != context.key:
            manifest = self._releases.manifest(self._started())
            digits = self._started().rpartition("-")[2]
            running = Running(manifest.version, manifest.security_version, self._hardware, digits)
            wanted = _wanted(context)
            try:
                self._target = (context.key, self._trust.check(wanted.target, wanted.metadata, running))
            except TrustFault as fault:
                raise Ended(judged(fault)) from fault
        return self._target[1]

    def _started(self) -> str:
        """The name of the release that this process runs."""
        if self._running is None:
            raise InstallFault("this agent was not started from a release")
        return self._running

    # --- the switch, and after -------------------------------------------------------------------------------------

    def _switch(self, context: Context) -> Result:
        release = context.memo["release"]
        if self._running == release:
            return Next()  # the process was killed between the switch and its note; the launcher has gone on
        if (given_up := self._given_up(context.key)) is not None:
            return Failed("crashed", given_up)
        self._releases.begin_trial(release, job=str(context.key), limit=self._limits.attempts)
        self._releases.switch()
        return Restart({"online": self._link.connected()})

    def _prove(self, context: Context) -> Result:
        release = context.memo["release"]
        if self._running != release:
            instead = f"{self._running} was started instead of {release}"
            return Failed("crashed", self._given_up(context.key) or instead)
        self._deadline(int(self._limits.health_seconds + self._limits.soft_seconds) + _SPARE_SECONDS)
        if (problem := until(self._health, self._limits.health_seconds, context, self._clock)) is not None:
            return Failed("unhealthy", f"{release}: {problem}")
        if not context.memo.get("online", True):
            return Next()  # the release before had no connection either

        def reached() -> str | None:
            reached = self._link.connected() and context.confirm()
            return None if reached else f"it does not reach the cloud, which {context.memo.get('from')} did"

        if (problem := until(reached, self._limits.soft_seconds, context, self._clock)) is not None:
            return Failed("unhealthy", f"{release}: {problem}")
        return Next()

    def _commit(self, context: Context) -> Result:
        release = context.memo["release"]
        self._releases.commit()
        self._deadline(0)
        try:
            self._trust.commit(self._releases.manifest(release).security_version)
        except OSError as error:
            _log.error("the floor cannot be raised, so the running release is the only one: %s", error)
        return Done({"release": release})

    # --- the way back ----------------------------------------------------------------------------------------------

    def _roll_back(self, context: Context) -> Result:
        trial = self._releases.trial()
        if trial is not None and self._releases.current() == trial.release:
            self._releases.roll_back(context.reason or "the job was given up")
        elif trial is not None:
            self._releases.discard_trial()
        else:
            self._releases.forget_rolled_back()  # which finishes it first, if the power failed in its middle
        return Next() if self._running == self._releases.current() else Restart()

    def _back(self, context: Context) -> Result:
        if self._running != context.memo.get("release"):
            return Next()
        return Failed("crashed", f"the unit goes on with {self._running}")

    def _given_up(self, key: Key) -> str | None:
        """Why the launcher (or a roll back) has given this job's release up."""
        found = self._releases.rolled_back()
        return f"{found.release} {found.reason}" if found is not None and found.job == str(key) else None

    # --- at the end ------------------------------------------------------------------------------------------------

    def clean_up(self, context: Context) -> None:
        """Remove what nothing points to; forget a trial that was never switched to, and a roll back that was told."""
        self._target = None
        trial = self._releases.trial()
        if trial is not None and trial.job == str(context.key) and self._releases.current() != trial.release:
            self._releases.discard_trial()
        if self._given_up(context.key) is not None:
            self._releases.forget_rolled_back()
        self._releases.garbage_collect()

    def orphan(self) -> Orphan | None:
        """A trial, or a roll back that nobody has reported."""
        found = self._releases.trial() or self._releases.rolled_back()
        if found is None:
            return None
        try:
            key = Key.parse(found.job)
        except ValueError:
            return None
        before = found.origin if isinstance(found, Trial) else found.to
        return Orphan(key, "prove", {"release": found.release, "from": before})


# --- shared with os-update ------------------------------------------------------------------------------------------


def judged(fault: TrustFault) -> Result:
    """What a release that is not taken comes to: REJECTED, unless the same job may end better later."""
    return Failed("download", str(fault)) if fault.retry else Rejected(fault.code, str(fault))


def until(
    problem: Callable[[], str | None], seconds: float, context: Context, clock: Callable[[], float]
) -> str | None:
    """Wait until there is no problem; the last one when the time is over."""
    end = clock() + seconds
    while (found := problem()) is not None:
        left = end - clock()
        if left <= 0:
            return f"{found} ({seconds:g} s)"
        context.wait(min(left, _TICK_SECONDS))
    return None


def fetch(context: Context, signed: Payload, get: Callable[..., Path]) -> Path:
    """A payload in the scratch directory; a URL that has expired is asked for anew.

    Raises:
        DownloadFault: it does not come.
        NoSpace: the disk is full.
        NotDeliveredError: a fresh URL is needed, and there is no link.
        Dropped, Stopping: as the context says.
    """
    payload = download.Payload(signed.path, signed.length, signed.chunks, signed.chunk_bytes)
    ended: list[Exception] = []
    have = 0.0

    def progress(there: int, size: int) -> None:
        nonlocal have
        have = there / size

    def cancelled() -> bool:
        try:
            context.progress(have)
        except (Dropped, Stopping) as end:
            ended.append(end)
        return bool(ended)

    wanted = context.document
    for _ in range(_FRESH_URLS):
        if not isinstance(wanted, document.Bundle) or signed.path not in wanted.urls:
            raise DownloadFault(f"the job does not say where {signed.path} is")
        try:
            return get(payload, wanted.urls[signed.path], context.scratch, progress=progress, cancelled=cancelled)
        except UrlExpired as error:
            _log.info("%s: a fresh URL is asked for", error)
            wanted = context.refresh()
        except Cancelled:
            raise ended[0] from None
    raise DownloadFault(f"{signed.path}: {_FRESH_URLS} URLs in a row had expired")


def _wanted(context: Context) -> document.Update:
    if not isinstance(context.document, document.Update):  # the runner gives each kind its own documents
        raise TypeError(f"no document of an update: {context.document!r}")
    return context.document


def _expected(target: Target) -> Expected:
    return Expected(target.version, Digest(target.tar_sha256, target.tar_size))
