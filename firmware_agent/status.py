"""How the unit is, in words: `picket-agent status`, the station's verb `status`, and the head of every collected log.

The running agent writes a document into its run directory every few seconds, so that whoever asks needs neither its
leave nor its help. Where no agent runs, or a hanging one, the document is put together from what lies on the disk.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firmware_agent import __version__, files, network
from firmware_agent.board import Board
from firmware_agent.settings import Settings

if TYPE_CHECKING:
    from firmware_agent.jobs.machine import Execution

#: An agent that has not written for so long does not run, or hangs.
STALE_SECONDS: Final = 30.0

Document = Mapping[str, Any]


def write(path: Path, document: Document) -> None:
    """Let others read this. It need not survive anything, so it costs no fsync; half of it is never seen.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(document))
    os.replace(new, path)  # noqa: PTH105 - as in `files`


def heard_at(path: Path, boot_id: str) -> float | None:
    """When the sensor was last heard, by an earlier run of the agent in this boot; in seconds of uptime."""
    said = _said(path)
    if said is None or said.get("boot_id") != boot_id:
        return None
    at = _part(said, "sensor").get("heard_at")
    return _number(at) if at is not None else None


def was_low(path: Path, boot_id: str) -> bool:
    """Whether the sensor was low when an earlier run of the agent in this boot last looked."""
    said = _said(path)
    return said is not None and said.get("boot_id") == boot_id and _part(said, "sensor").get("high") is False


def moment(body: bytes) -> str | None:
    """When a message was made, by its own words."""
    at = json.loads(body).get("at")
    return at if isinstance(at, str) else None


def job(execution: "Execution") -> dict[str, Any]:
    """The job in hand, or the last one."""
    outcome = execution.outcome
    ended = None
    if outcome is not None:
        ended = " ".join(filter(None, (outcome.status, outcome.code, outcome.reason)))
    return {
        "job": str(execution.key),
        "operation": execution.operation,
        "phase": execution.phase,
        "stage": str(execution.stage),
        "outcome": ended,
    }


def collect(settings: Settings, board: Board) -> Document:
    """How the unit is: as the running agent says, else as the disk does."""
    said = _said(settings.paths.status)
    uptime = board.uptime()
    if said is not None and said.get("boot_id") == board.facts().boot_id:
        age = uptime - _number(said.get("uptime"))
        if _alive(said.get("pid")) and age <= STALE_SECONDS:
            return {**said, **here(), "state": "running"}
        if _alive(said.get("pid")):
            return {**said, **here(), "state": "hangs", "age": age}
    return _from_disk(settings, board) | here() | {"state": "not running"}


def here() -> dict[str, Any]:
    """What whoever asks sees for himself."""
    return {"host": os.uname().nodename, "listening": network.listening()}


def _said(path: Path) -> dict[str, Any] | None:
    try:
        said = files.read_json(path)
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else 0.0
    except OverflowError:
        return 0.0


def _alive(pid: object) -> bool:
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()


# --- without a running agent --------------------------------------------------------------------------------------


def _from_disk(settings: Settings, board: Board) -> dict[str, Any]:
    paths = settings.paths
    clock = board.clock()
    document: dict[str, Any] = {
        "mode": "product" if paths.sealed.exists() else "factory",
        "agent": __version__,
        "image": str(settings.image),
        "boot_id": board.facts().boot_id,
        "uptime": board.uptime(),
        "clock": {"unix": clock.unix, "quality": clock.quality},
        **releases(settings),
    }
    with suppress(Exception):  # a unit that is not provisioned, or a damaged one, is to be told all the same
        document |= _identity(paths.identity)
    with suppress(OSError, ValueError, sqlite3.Error):
        document["spool"] = _spool(paths.spool)
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = files.read_json(paths.arming)
        document["armed"] = {"armed": True, "by": "default"} if kept is None else {k: kept[k] for k in ("armed", "by")}
    return document


def releases(settings: Settings) -> dict[str, Any]:
    """The releases on this unit, by the launcher's files."""
    from firmware_agent.update.releases import Releases  # noqa: PLC0415 - not for the provisioning verbs

    found = Releases(settings.paths.releases, settings.paths.state)
    document: dict[str, Any] = {"release": None, "previous": None, "trial": None, "rolled_back": None}
    with suppress(OSError, ValueError):
        trial, back = found.trial(), found.rolled_back()
        document |= {
            "release": found.current(),
            "previous": found.previous(),
            "trial": None if trial is None else trial.release,
            "rolled_back": None if back is None else f"{back.release}: {back.reason}",
        }
    return document


def _identity(link: Path) -> dict[str, Any]:
    from firmware_agent import identity  # noqa: PLC0415 - it brings all of X.509 along

    found = identity.load(link)
    return {
        "serial": found.serial,
        "endpoint": f"{found.host}:{found.port}",
        "certificate": {"not_after": found.validity.not_valid_after_utc.timestamp()},
    }


def _spool(path: Path) -> dict[str, Any]:
    """Looked at without writing: the agent may be about to start."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        counts = dict(database.execute("SELECT kind, count(*) FROM message GROUP BY kind").fetchall())
        oldest = database.execute("SELECT body FROM message ORDER BY id LIMIT 1").fetchone()
    found: dict[str, Any] = {name + "s": counts.get(name, 0) for name in ("alarm", "event", "heartbeat")}
    if oldest is not None:
        found["oldest_at"] = moment(oldest[0])
    return found


# --- words --------------------------------------------------------------------------------------------------------


def words(document: Document) -> str:
    """The document for people, one line per thing; what it does not say is left out.

    It may come from another release, so nothing in it is relied on.
    """
    return "".join(f"{name + ':':<13}{text}\n" for name, text in _lines(document) if text)


def _lines(said: Document) -> Iterator[tuple[str, str]]:
    yield "agent", _agent(said)
    yield "safe mode", str(said.get("safe_mode") or "")
    yield "release", _release(said)
    yield "unit", " at ".join(str(one) for one in (said.get("serial"), said.get("endpoint")) if one)
    yield "host", str(said.get("host") or "")
    yield "armed", _armed(_part(said, "armed"))
    yield "sensor", _sensor(_part(said, "sensor"), _number(said.get("uptime")))
    yield "spool", _spool_words(_part(said, "spool"))
    yield "link", _link(_part(said, "link"))
    for feature, reason in _part(_part(said, "link"), "held").items():
        yield "on hold", f"{feature}: {reason}"
    yield "job", _job(_part(said, "job"))
    yield "listening", _listening(said.get("listening"))
    yield "clock", _clock(_part(said, "clock"))
    yield "certificate", _certificate(_part(said, "certificate"), _part(said, "clock"))
    yield "settings", ", ".join(f"{name} {value}" for name, value in _part(said, "tuning").items())
    for name, part in _part(said, "parts").items():
        if isinstance(part, dict) and part.get("fault"):
            yield "broken", f"{name}, begun again {part.get('restarts')} times: {part['fault']}"
    complaints = said.get("complaints")
    for one in complaints if isinstance(complaints, list) else ():
        if isinstance(one, dict):
            ago = _span(_number(said.get("uptime")) - _number(one.get("uptime")))
            times = f" ({one['times']} times)" if _number(one.get("times")) > 1 else ""
            yield "complaint", f"{ago} ago, {one.get('level')}: {one.get('text')}{times}"


def _part(said: Document, name: str) -> Document:
    part = said.get(name)
    return part if isinstance(part, dict) else {}


def _agent(said: Document) -> str:
    state = said.get("state", "running")
    if state == "hangs":
        state = f"hangs: no sign of life for {_span(_number(said.get('age')))}"
    mode = f", {said['mode']} mode" if said.get("mode") else ""
    return f"{state}{mode}; version {said.get('agent')} on {said.get('image')}; up {_span(_number(said.get('uptime')))}"


def _release(said: Document) -> str:
    if not said.get("release"):
        return ""
    text = str(said["release"])
    if said.get("trial"):
        text += f"; on trial: {said['trial']}"
    if said.get("previous"):
        text += f"; before it {said['previous']}"
    if said.get("rolled_back"):
        text += f"; given up: {said['rolled_back']}"
    return text


def _armed(part: Document) -> str:
    if "armed" not in part:
        return ""
    return ("yes" if part["armed"] else "no") + (f", by {part['by']}" if part.get("by") else "")


def _sensor(part: Document, uptime: float) -> str:
    if not part:
        return ""
    if part.get("fault"):
        return f"cannot be read: {part['fault']}"
    faults = [name for name in ("stuck", "silent", "chattering") if part.get(name)]
    text = ", ".join([*faults, "sees motion" if part.get("high") else "quiet"])
    if part.get("warms_up"):
        text += ", still warming up"
    text += f"; last edge {_span(uptime - _number(part.get('heard_at')))} ago, {part.get('pulses')} pulses so far"
    return text + {"True": "; the case is closed", "False": "; THE CASE IS OPEN"}.get(str(part.get("case")), "")


def _spool_words(part: Document) -> str:
    if not part:
        return ""
    counts = [f"{part.get(name, 0)} {name}" for name in ("alarms", "events", "heartbeats")]
    text = ", ".join(counts) + " wait"
    if part.get("oldest_at"):
        text += f", the oldest since {part['oldest_at']}"
    if part.get("lost"):
        text += f"; {part['lost']} lost"
    if part.get("fault"):
        text += f"; the disk takes nothing ({part['fault']}), {part.get('unsaved')} are in memory alone"
    return text


def _link(part: Document) -> str:
    if not part:
        return ""
    detail = str(part.get("detail", ""))
    state = str(part.get("state", ""))
    text = detail if state == "connected" else f"{state}: {detail}"
    if _number(part.get("failures")):
        text += f"; {part['failures']} attempts in a row have failed"
    return text


def _listening(sockets: object) -> str:
    if not isinstance(sockets, list):
        return ""
    return ", ".join(str(one) for one in sockets) or "nothing"


def _job(part: Document) -> str:
    if not part:
        return ""
    text = f"{part.get('operation')} {part.get('job')}: {part.get('phase')} ({part.get('stage')})"
    return text + (f", {part['outcome']}" if part.get("outcome") else "")


def _clock(part: Document) -> str:
    if "unix" not in part:
        return ""
    from firmware_agent.messages import timestamp  # noqa: PLC0415 - each caller needs its own part

    text = f"{timestamp(_number(part['unix']))}, set by {part.get('quality')}"
    if part.get("quality") == "estimated":
        text = f"{timestamp(_number(part['unix']))}, estimated: nobody has told the time since the start"
    return text + (f"; {part['wrong']}" if part.get("wrong") else "")


def _certificate(part: Document, clock: Document) -> str:
    if "not_after" not in part:
        return ""
    days = (_number(part["not_after"]) - _number(clock.get("unix"))) / 86400
    return f"{days:.0f} days left" if days >= 0 else f"EXPIRED {-days:.0f} days ago"


def _span(seconds: float) -> str:
    """A span of time in the largest unit that is not too coarse."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
