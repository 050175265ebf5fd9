"""What the unit can do besides alarming, put together: its jobs and what they need.

In safe mode only an update is taken: it is what can mend the unit.
"""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from firmware_agent import identity
from firmware_agent.board import Board
from firmware_agent.jobs.collect_logs import CollectLogs, journal
from firmware_agent.jobs.configure import Configure
from firmware_agent.jobs.kind import Kind
from firmware_agent.jobs.os_update import NoSlots, OsUpdate
from firmware_agent.jobs.reboot import Reboot
from firmware_agent.jobs.runner import Runner
from firmware_agent.jobs.self_test import (
    Check,
    SelfTest,
    check_clock,
    check_disk,
    check_key,
    check_memory,
    check_pir,
    check_spool,
    vital,
)
from firmware_agent.jobs.update import Limits, Update
from firmware_agent.keys import KeyStore
from firmware_agent.link import Link
from firmware_agent.pins import Pir
from firmware_agent.rotation import KeyInForce, Rotation
from firmware_agent.settings import Settings
from firmware_agent.slots import UnitSlots, image_security_version
from firmware_agent.spool import Spool
from firmware_agent.tuning import Tuning
from firmware_agent.update.download import Payload, download
from firmware_agent.update.releases import Releases
from firmware_agent.update.target import Running
from firmware_agent.update.trust import Trust


@dataclass(frozen=True)
class Means:
    """What jobs work with.

    Attributes:
        settings: the image's.
        board: what the agent runs on.
        link: the connection.
        pir, spool: what a health gate tries, beside the key in force.
        store: where the keys are.
        release: the name of the running release; None without a launcher.
        tune: puts a tuning in force.
        status: how the unit is, in words.
        leave: asks this process to end, so that another release is started.
        safe_mode: why the unit does only what is most needed; None in ordinary times.
    """

    settings: Settings
    board: Board
    link: Link
    pir: Pir
    store: KeyStore
    spool: Spool
    release: str | None
    tune: Callable[[Tuning], None]
    status: Callable[[], str]
    leave: Callable[[], None]
    safe_mode: str | None


def runner(means: Means) -> Runner:
    """The unit's jobs."""
    return Runner(
        means.link,
        means.settings.paths.jobs,
        kinds(means),
        product=means.settings.update.product,
        leave=means.leave,
        safe_mode=means.safe_mode is not None,
    )


def kinds(means: Means) -> list[Kind]:
    """What this unit can do; in safe mode it can update its agent."""
    settings, board = means.settings, means.board
    checks = _checks(means)
    gate = _gate(checks, means.safe_mode)
    # The image has no CA store: whoever may be the endpoint may also be where updates come from and logs go to.
    authorities = identity.load(settings.paths.identity).trust
    get = downloader(authorities)
    limits = Limits(settings.update.health_seconds, settings.update.soft_seconds, settings.update.attempts)
    trust = Trust.of(settings, means.link.serial, lambda: _now(means), authorities)
    releases = Releases(settings.paths.releases, settings.paths.state)
    hardware = board.facts().compatible
    update = Update(
        releases, means.release, hardware, trust, means.link, gate, limits, get=get, deadline=_set_launchers_timer
    )
    if means.safe_mode is not None:
        return [update]

    def boot_id() -> str:
        return board.facts().boot_id

    running = Running(settings.image.version, image_security_version(settings.paths.layout), hardware)
    slots = (
        UnitSlots(settings.paths.slots, settings.paths.reboot_request) if settings.paths.slots.exists() else NoSlots()
    )
    return [
        update,
        OsUpdate(slots, running, boot_id, trust, means.link, gate, limits, get=get),
        SelfTest(checks),
        CollectLogs(journal, means.status, authorities=authorities),
        Reboot(settings.paths.reboot_request, boot_id),
        Configure(settings.paths.tuning, settings.tuning, means.tune),
        Rotation(means.link, means.store, settings.paths.identity, board.facts().serial),
    ]


def _set_launchers_timer(seconds: int) -> None:
    """The launcher starts a trial against this timer (`launcher.TRIAL_SECONDS`); it ends the process."""
    signal.alarm(seconds)


def downloader(authorities: str) -> Callable[..., Path]:
    """`download.download` that also trusts these PEM certificates."""

    def get(payload: Payload, url: str, directory: Path, **options: Any) -> Path:
        import ssl  # noqa: PLC0415 - only while there is something to download

        context = ssl.create_default_context()
        context.load_verify_locations(cadata=authorities)
        return download(payload, url, directory, context=context, **options)

    return get


def _checks(means: Means) -> Mapping[str, Check]:
    state = means.settings.paths.state
    key = KeyInForce(means.store, means.settings.paths.identity)
    return {
        "pir": lambda: check_pir(means.pir.level),
        "key": lambda: check_key(key),
        "spool": lambda: check_spool(means.spool.probe, lambda: len(means.spool)),
        "disk": lambda: check_disk(means.board, state),
        "memory": lambda: check_memory(means.board, state),
        "clock": lambda: check_clock(means.board),
    }


def _gate(checks: Mapping[str, Check], safe_mode: str | None) -> Callable[[], str | None]:
    """A release that comes up in safe mode only, because it cannot read the settings, say, is not kept."""
    problem = vital(checks)
    return lambda: f"safe mode: {safe_mode}" if safe_mode is not None else problem()


def _now(means: Means) -> datetime | None:
    """The time, where it can be right: an expired signature is told by it."""
    unix = means.board.clock().unix
    return None if means.link.timekeeper.wrong(unix) else datetime.fromtimestamp(unix, UTC)
