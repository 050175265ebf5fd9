"""The kind `os-update`: another image, into the slot that does not run.

    check     are there slots at all; what do the signed metadata say            (nothing is changed)
    download  the bundle, resumable and chunk by chunk, as every payload
    install   into the other slot, by root's helper, which believes nothing but the bundle's own signature
    switch    the other slot is to be booted once                                (the board restarts)
    prove     the other slot runs; PIR, spool and key work; the cloud is reached
    commit    the slot stays; the floor rises
    roll-back the slot before is to be booted again                              (the board restarts)

Which slots a board has and how its firmware is told is behind `Slots` (`firmware_agent.slots` on a unit). An image that
has none says so before anything is downloaded. From `try_other` on it is not the agent that ends a trial: the firmware
boots the other slot once, or root counts its boots, and root's timer gives up whatever is not kept within 20 minutes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from firmware_agent.errors import AgentFault
from firmware_agent.jobs import document
from firmware_agent.jobs.kind import (
    Context,
    Done,
    Ended,
    Failed,
    Key,
    Next,
    Orphan,
    Phase,
    Rejected,
    Result,
)
from firmware_agent.jobs.update import RESTART_MINUTES, Limits, Online, Trusts, fetch, judged, until
from firmware_agent.update import download
from firmware_agent.update.releases import RESERVE_BYTES, check_room
from firmware_agent.update.target import Running, Target, TrustFault

_log = logging.getLogger(__name__)

#: How long the board may take to go down after it was asked to restart. In seconds.
_DOWN_SECONDS: Final = 300.0
_TICK_SECONDS: Final = 1.0


class Refused(AgentFault):
    """A bundle that this unit will never take; `code` is one of a rejection's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Slots(Protocol):
    """Where images lie, and which one the firmware boots."""

    def missing(self) -> str | None:
        """Why this board cannot update its image, in words; None if it can."""
        ...

    def booted(self) -> str:
        """The slot that runs."""
        ...

    def other(self) -> str:
        """The slot that does not."""
        ...

    def agent_security_version(self, bundle: Path) -> int:
        """The security version of the agent that a bundle's image brings.

        Raises:
            Refused: it is no bundle.
        """
        ...

    def install(self, bundle: Path, progress: Callable[[float], None]) -> None:
        """Write a bundle into the other slot, durably.

        Raises:
            Refused: it is not for this unit.
            AgentFault, OSError: it cannot be written; the running slot is untouched.
        """
        ...

    def try_other(self) -> None:
        """Boot the other slot once, at the next restart; a crash there comes back to this one by itself."""
        ...

    def ended(self) -> str:
        """Why the last trial ended, in words; empty if there was none since the last install."""
        ...

    def restart(self) -> None:
        """Ask root for a restart of the board; must not block."""
        ...

    def withdraw(self) -> None:
        """Ask for it no more, should root not have heard yet."""
        ...

    def keep(self) -> None:
        """The running slot is the one to boot from now on."""
        ...

    def go_back(self) -> None:
        """The slot before is the one to boot from now on."""
        ...


class NoSlots:
    """An image with one root file system."""

    def missing(self) -> str | None:
        """There is nowhere to install to."""
        return "this image has no slots to install another one into"

    def booted(self) -> str:
        """The only one."""
        return "only"

    def other(self) -> str:
        """There is none."""
        raise NotImplementedError(self.missing())

    def agent_security_version(self, bundle: Path) -> int:
        """There is nowhere to install it to."""
        raise NotImplementedError(self.missing())

    def install(self, bundle: Path, progress: Callable[[float], None]) -> None:
        """There is nowhere to."""
        raise NotImplementedError(self.missing())

    def try_other(self) -> None:
        """There is none."""
        raise NotImplementedError(self.missing())

    def ended(self) -> str:
        """There was none."""
        return ""

    def restart(self) -> None:
        """There would be no use."""
        raise NotImplementedError(self.missing())

    def withdraw(self) -> None:
        """Nobody has asked."""

    def keep(self) -> None:
        """It is kept anyway."""

    def go_back(self) -> None:
        """It never went."""


class OsUpdate:
    """Install another image.

    Args:
        slots: where images lie.
        running: version, security version and hardware of the image that runs.
        boot_id: of the kernel that runs now.
        trust: what signed metadata say.
        link: asked for the connection only.
        health: what is wrong with PIR, spool or key now, in words; None if nothing is.
        limits: of a trial.
        get: downloads a payload.
        clock: monotonic seconds.
    """

    operation = "os-update"

    def __init__(
        self,
        slots: Slots,
        running: Running,
        boot_id: Callable[[], str],
        trust: Trusts,
        link: Online,
        health: Callable[[], str | None],
        limits: Limits | None = None,
        *,
        get: Callable[..., Path] = download.download,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._running = running
        self._boot_id = boot_id
        self._trust = trust
        self._link = link
        self._health = health
        self._limits = limits or Limits()
        self._get = get
        self._clock = clock
        self._target: tuple[Key, Target] | None = None
        minutes = self._limits.minutes + RESTART_MINUTES
        self.phases: Sequence[Phase] = (
            Phase("check", self._check, code="download"),
            Phase("download", self._download, code="download", attempts=10, minutes=60),
            Phase("install", self._install, code="install", minutes=60),
            Phase("switch", self._switch, code="install", bound=True, minutes=minutes),
            Phase("prove", self._prove, code="unhealthy", bound=True, minutes=minutes),
            Phase("commit", self._commit, code="install", bound=True),
        )
        self.undo: Sequence[Phase] = (Phase("roll-back", self._roll_back, code="crashed", minutes=RESTART_MINUTES),)

    def _check(self, context: Context) -> Result:
        if (missing := self._slots.missing()) is not None:
            return Rejected("not-possible", missing)
        target, wanted = self._signed(context), _wanted(context)
        if wanted.version != target.version:
            return Rejected("bad-document", f"the job says {wanted.version}, the signed target is {target.version}")
        if target.version == self._running.version:
            return Done({"image": target.version})
        check_room(context.scratch, target.full.length + RESERVE_BYTES)
        return Next({"image": target.version, "security": target.security_version})

    def _download(self, context: Context) -> Result:
        fetch(context, self._signed(context).full, self._get)
        return Next()

    def _install(self, context: Context) -> Result:
        bundle = fetch(context, self._signed(context).full, self._get)
        try:
            agent, floor = self._slots.agent_security_version(bundle), self._trust.security_floor("agent")
            if agent < floor:
                return Rejected("downgrade", f"its agent has security version {agent}, the agent's floor is {floor}")
            self._slots.install(bundle, context.progress)
        except Refused as refusal:
            return Rejected(refusal.code, str(refusal))
        return Next({"slot": self._slots.other(), "before": self._slots.booted(), "boot_id": self._boot_id()})

    def _switch(self, context: Context) -> Result:
        if self._slots.booted() == context.memo["slot"]:
            return Next()  # the board has restarted
        # The board may have restarted since the install for reasons of its own: consent can take hours. Root has noted
        # whether there was a trial; if its notes are lost, nothing is installed either, and `try_other` says so.
        if self._boot_id() != context.memo["boot_id"] and (ended := self._slots.ended()):
            return Failed("crashed", f"the image {context.memo['image']} was tried and did not stay up: {ended}")
        self._slots.try_other()
        self._restart(context)
        return Failed("crashed", f"the board did not restart within {_DOWN_SECONDS:g} s")

    def _prove(self, context: Context) -> Result:
        if self._slots.booted() != context.memo["slot"]:
            return Failed("crashed", f"the image {context.memo['image']} did not come up")
        if (problem := until(self._health, self._limits.health_seconds, context, self._clock)) is not None:
            return Failed("unhealthy", problem)

        def reached() -> str | None:
            return None if self._link.connected() and context.confirm() else "it does not reach the cloud"

        if (problem := until(reached, self._limits.soft_seconds, context, self._clock)) is not None:
            return Failed("unhealthy", problem)
        return Next()

    def _commit(self, context: Context) -> Result:
        if self._slots.booted() != context.memo["slot"]:
            return Failed("crashed", f"the power went before the image {context.memo['image']} could be kept")
        self._slots.keep()
        try:
            self._trust.commit(context.memo["security"], "os")
        except OSError as error:
            _log.error("the floor cannot be raised: %s", error)
        return Done({"image": context.memo["image"]})

    def _roll_back(self, context: Context) -> Result:
        if self._slots.booted() == context.memo["before"]:
            self._slots.go_back()
            return Next()
        self._slots.go_back()
        self._restart(context)
        return Failed("crashed", f"the board did not restart within {_DOWN_SECONDS:g} s")

    def _restart(self, context: Context) -> None:
        self._slots.restart()
        end = self._clock() + _DOWN_SECONDS
        while self._clock() < end:
            context.wait(_TICK_SECONDS)

    def _signed(self, context: Context) -> Target:
        """What was signed about the target; asked once per process and job."""
        if self._target is None or self._target[0] != context.key:
            wanted = _wanted(context)
            try:
                self._target = (context.key, self._trust.check(wanted.target, wanted.metadata, self._running))
            except TrustFault as fault:
                raise Ended(judged(fault)) from fault
        return self._target[1]

    def clean_up(self, context: Context) -> None:
        """Ask for no restart any more; the bundle goes with the scratch directory."""
        del context
        self._slots.withdraw()
        self._target = None

    def orphan(self) -> Orphan | None:
        """A trial without a journal ends by itself: nobody keeps the slot, so root gives it up."""
        return None


def _wanted(context: Context) -> document.OsUpdate:
    if not isinstance(context.document, document.OsUpdate):
        raise TypeError(f"no document of an image: {context.document!r}")
    return context.document
