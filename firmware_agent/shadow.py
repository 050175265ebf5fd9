"""The unit's named shadows: what the owner wants, and what the unit is.

A shadow is a JSON document in the cloud with a version that rises with each change. The owner writes `desired`, the
unit `reported`; the unit never writes `desired`, but for arming at the unit itself, which is a wish as well. What the
cloud sends by itself is taken for a bell only: it may come late, twice or in the wrong order, so the unit then gets the
document and takes that. A bell with a version that is known already is not worth a get. A delta rings when a wish
differs from what is reported, `accepted` also when a wish was taken back.
https://docs.aws.amazon.com/iot/latest/developerguide/device-shadow-mqtt.html
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from firmware_agent import backoff, files, messages, topics, tuning
from firmware_agent.arming import Arming, ArmingStore, Wanted
from firmware_agent.digests import digest
from firmware_agent.link import Link
from firmware_agent.mqtt import NotDeliveredError
from firmware_agent.session import Answer, Refused
from firmware_agent.tuning import BadTuning, Tuning

_log = logging.getLogger(__name__)

ALARM: Final = "alarm"
SETTINGS: Final = "settings"

_FEATURE: Final = "shadow"
_TRIES: Final = 5  # to write over somebody else's changes
_TICK_SECONDS: Final = 1.0
#: What rings here is often an alarm, which is on its way meanwhile and must not wait for the shadow's words about it.
_AFTER_ALARMS_SECONDS: Final = 0.1
_MOST_REJECTED: Final = 8
_LONGEST_REASON: Final = 160
_LONGEST_NAME: Final = 64


# --- the document -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A shadow, as `get` gives it.

    Attributes:
        version: 0 when there is none yet.
        desired, reported: its two halves.
        desired_at: when each key of `desired` was last written, by the cloud's clock, in seconds since 1970.
    """

    version: int = 0
    desired: Mapping[str, Any] = field(default_factory=dict)
    reported: Mapping[str, Any] = field(default_factory=dict)
    desired_at: Mapping[str, float] = field(default_factory=dict)


def parse(answer: Answer) -> Document:
    """The document in the answer to a `get`.

    Raises:
        ValueError: it is none.
    """
    state, metadata = answer.get("state", {}), answer.get("metadata", {})
    version = answer.get("version")
    if not isinstance(state, dict) or not isinstance(metadata, dict) or not isinstance(version, int):
        raise ValueError("the cloud's answer is no shadow document")  # noqa: TRY004 - data, not a programming error
    desired, reported = state.get("desired") or {}, state.get("reported") or {}
    times = metadata.get("desired") or {}
    if not all(isinstance(part, dict) for part in (desired, reported, times)):
        raise ValueError("the cloud's answer is no shadow document")
    return Document(version, desired, reported, {key: _latest(value) for key, value in times.items()})


def _latest(times: object) -> float:
    """The latest timestamp in the metadata of one key, whose value may be an object of objects."""
    if isinstance(times, dict):
        own = times.get("timestamp")
        if isinstance(own, (int, float)):
            return float(own)
        return max((_latest(one) for one in times.values()), default=0.0)
    if isinstance(times, list):
        return max((_latest(one) for one in times), default=0.0)
    return 0.0


def difference(known: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What an update must say to make `known` into `new`; null deletes a key."""
    change: dict[str, Any] = {key: None for key in known if key not in new}
    for key, value in new.items():
        old = known.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            if inner := difference(old, value):
                change[key] = inner
        elif old != value or isinstance(old, bool) != isinstance(value, bool):  # to Python, False is 0
            change[key] = value
    return change


def _rung(payload: bytes) -> int | None:
    """The version that a message about a change tells of."""
    try:
        change = json.loads(payload)
    except ValueError:
        return None
    version = change.get("version") if isinstance(change, dict) else None
    return version if isinstance(version, int) else None


class Twin(Protocol):
    """What one shadow is about."""

    @property
    def name(self) -> str:
        """Of the shadow."""
        ...

    def take(self, document: Document) -> None:
        """Do what is desired, as far as it makes sense, and keep it."""
        ...

    def reported(self, *, brief: bool) -> dict[str, Any]:
        """How the unit is; without what can be left out, when `brief`."""
        ...

    def wish(self) -> tuple[Mapping[str, Any], Callable[[float, int], None]] | None:
        """What was decided here and is to be written into `desired`, and whom to tell when it is: time and version."""
        ...


# --- the two ------------------------------------------------------------------------------------------------------


class AlarmTwin:
    """Armed or not, and the last alarm.

    Args:
        store: armed or not.
    """

    name = ALARM

    def __init__(self, store: ArmingStore) -> None:
        self._store = store
        self._last: Mapping[str, Any] | None = None
        self._rejected: Mapping[str, str] = {}

    def alarm(self, *, kind: str, event_id: str, at: float, quality: str) -> None:
        """This alarm was raised; `at` in seconds since 1970."""
        self._last = {"kind": kind, "event_id": event_id, "at": messages.timestamp(at), "quality": quality}

    def take(self, document: Document) -> None:
        """Arm or disarm."""
        if self._last is None and isinstance(document.reported.get("last_alarm"), dict):
            self._last = document.reported["last_alarm"]  # of before a restart
        rejected = {key: "there is no such wish" for key in document.desired if key != "armed"}
        armed = document.desired.get("armed")
        if isinstance(armed, bool):
            self._store.by_cloud(Wanted(armed, document.desired_at.get("armed", 0.0), document.version))
        elif armed is not None:
            rejected["armed"] = "must be true or false"
        self._rejected = _few(rejected)

    def reported(self, *, brief: bool) -> dict[str, Any]:
        """Armed, by whom and since when; the last alarm."""
        now = self._store.now
        reported: dict[str, Any] = {"armed": now.armed, "armed_by": now.by}
        if now.at is not None:
            reported |= {"armed_at": messages.timestamp(now.at), "armed_at_quality": now.quality}
        if self._last is not None:
            reported["last_alarm"] = self._last
        if self._rejected and not brief:
            reported["rejected"] = self._rejected
        return reported

    def wish(self) -> tuple[Mapping[str, Any], Callable[[float, int], None]] | None:
        """What was decided at the unit and the cloud does not know."""
        now: Arming = self._store.now
        if not now.pending:
            return None
        return {"armed": now.armed}, lambda at, version: self._store.told(now, at=at, version=version)


class SettingsTwin:
    """The tuning.

    A wish is taken once: a `configure` job that came after it stays in force over the next connect.

    Args:
        path: where it is kept which wish was taken.
        current: the tuning in force.
        defaults: the image's; what nobody wishes otherwise has these.
        apply: put a tuning in force, and keep it; OSError if it cannot be kept.
    """

    name = SETTINGS

    def __init__(
        self, path: Path, current: Callable[[], Tuning], defaults: Tuning, apply: Callable[[Tuning], None]
    ) -> None:
        self._path = path
        self._current = current
        self._defaults = defaults
        self._apply = apply
        self._rejected: Mapping[str, str] = {}
        self._taken = _taken(path)

    def take(self, document: Document) -> None:
        """Put in force what is good of the wishes."""
        wanted, rejected = judge(document.desired, self._defaults)
        wish = digest(json.dumps([document.desired, dict(document.desired_at)], sort_keys=True).encode())
        if wish != self._taken and (document.desired or self._taken is not None):
            try:
                if wanted != self._current():
                    self._apply(wanted)
                files.write_atomic(self._path, json.dumps({"settings": wish}).encode(), 0o600)
                self._taken = wish
            except OSError as error:
                _log.error("the settings cannot be kept: %s", error)
                rejected["settings"] = f"cannot be kept: {error.strerror}"
        self._rejected = _few(rejected)

    def reported(self, *, brief: bool) -> dict[str, Any]:
        """All settings in force, and what was refused and why."""
        reported = asdict(self._current())
        if self._rejected and not brief:
            reported["rejected"] = self._rejected
        return reported

    def wish(self) -> None:
        """None: the unit has no wishes of its own here."""
        return


def judge(desired: Mapping[str, Any], defaults: Tuning) -> tuple[Tuning, dict[str, str]]:
    """The tuning that results from the good wishes, and why the others are none, by key."""
    good, rejected = {}, {}
    for key, value in desired.items():
        try:
            tuning.parse({key: value}, defaults)
            good[key] = value
        except BadTuning as error:
            rejected[key] = str(error)
    return tuning.parse(good, defaults), rejected


def _few(rejected: Mapping[str, str]) -> dict[str, str]:
    """So few and short that the document has room for them."""
    return {key[:_LONGEST_NAME]: rejected[key][:_LONGEST_REASON] for key in sorted(rejected)[:_MOST_REJECTED]}


def _taken(path: Path) -> str | None:
    try:
        kept = files.read_json(path)
    except (OSError, ValueError):
        return None
    return kept.get("settings") if isinstance(kept, dict) else None


# --- keeping both sides the same ----------------------------------------------------------------------------------


class _Sync:
    """One shadow and its twin."""

    def __init__(self, link: Link, twin: Twin) -> None:
        self._link = link
        self._twin = twin
        self._known: Mapping[str, Any] | None = None  # what is reported in the cloud; None to get it
        self._version = 0

    def forget(self) -> None:
        """A new connection: the document may be another."""
        self._known = None

    def rang(self, version: int) -> None:
        """Somebody has written this version."""
        if version > self._version:
            self._known = None

    def sync(self) -> None:
        """Get what is wanted if it may be news, tell what is.

        Raises:
            NotDeliveredError: no link, or no answer.
            Refused: the cloud does not take it.
        """
        for _ in range(_TRIES):
            wish = self._twin.wish()
            if self._known is None or wish is not None:
                self._known = self._get()
                wish = self._twin.wish()
            try:
                if self._tell(wish, brief=False):
                    return
            except Refused as refused:
                if refused.code == "413":  # the document is too large: somebody has filled `desired`
                    self._tell(wish, brief=True)
                    return
                if refused.code != "409":
                    raise
            self._known = None
        raise NotDeliveredError(f"the shadow {self._twin.name} changes with every try")

    def _topic(self, verb: str) -> str:
        return topics.shadow_topic(self._link.serial, self._twin.name, verb)

    def _get(self) -> Mapping[str, Any]:
        """Take the document in; gives what is reported in it."""
        document = self._fetch()
        if document.version < self._version:  # older than known: an answer that was overtaken, or a shadow made anew
            document = self._fetch()
        self._version = document.version
        self._twin.take(document)
        return document.reported

    def _fetch(self) -> Document:
        try:
            return parse(self._link.ask(self._topic("get"), {}))
        except ValueError as error:
            raise NotDeliveredError(str(error)) from error
        except Refused as refused:
            if refused.code == "404":
                return Document()
            raise

    def _tell(self, wish: tuple[Mapping[str, Any], Callable[[float, int], None]] | None, *, brief: bool) -> bool:
        """Whether the cloud now knows, and nothing else has changed meanwhile."""
        reported = self._twin.reported(brief=brief)
        change = difference(self._known or {}, reported)
        if not change and wish is None:
            return True
        state: dict[str, Any] = {"reported": change} if change else {}
        body: dict[str, Any] = {"state": state}
        if wish is not None:
            state["desired"] = wish[0]
            if self._version:
                body["version"] = self._version
        answer = self._link.ask(self._topic("update"), body)
        version = answer.get("version")
        if wish is not None:
            times = answer.get("metadata", {}).get("desired", {})
            wish[1](_latest(times), version if isinstance(version, int) else 0)
        alone = version == self._version + 1 or self._version == 0
        self._version = version if isinstance(version, int) else self._version
        self._known = reported
        return alone


class Shadows:
    """Keeps the unit's shadows and the unit the same, on one thread.

    Args:
        link: the connection.
        twins: what the shadows are about.
    """

    def __init__(self, link: Link, *twins: Twin) -> None:
        self._syncs = {twin.name: _Sync(link, twin) for twin in twins}
        self._link = link
        self._bells: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        self._connected = threading.Event()
        #: Why a shadow could not be told, by name; empty when all is well.
        self.faults: dict[str, str] = {}
        #: Whether there may be something that one side does not know of the other.
        self.busy = True
        link.subscribe(
            _FEATURE,
            [
                topics.shadow_topic(link.serial, name, "update", bell)
                for name in self._syncs
                for bell in ("delta", "accepted")
            ],
            self._on_bell,
        )
        link.on_connect(self._on_connect)

    def changed(self) -> None:
        """Something that is reported has changed: armed at the unit, an alarm, a setting."""
        self._bells.put(None)

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set."""
        failures, retry_at = 0, 0.0
        while not stop.is_set():
            if self._listen():
                self.busy = True
            if self._connected.is_set():
                self._connected.clear()
                failures, retry_at = 0, 0.0
                for sync in self._syncs.values():
                    sync.forget()
            if not self.busy or time.monotonic() < retry_at or not self._link.connected():
                continue
            if self._sync_all():
                failures = 0
                self.busy = not self._bells.empty()
            else:
                failures += 1
                retry_at = time.monotonic() + backoff.delay(failures + 2)

    def _on_bell(self, topic: str, payload: bytes) -> None:
        version = _rung(payload)
        if version is not None:
            name = topic.split("/")[5]
            self._bells.put((name, version))

    def _on_connect(self) -> None:
        self._connected.set()
        self._bells.put(None)

    def _listen(self) -> bool:
        """Wait a moment for something to do, then take in all that has come. Whether there was something."""
        heard = False
        try:
            bell = self._bells.get(timeout=_TICK_SECONDS)
            time.sleep(_AFTER_ALARMS_SECONDS)
            while True:
                heard = True
                if bell is not None:
                    name, version = bell
                    self._syncs[name].rang(version)
                bell = self._bells.get_nowait()
        except queue.Empty:
            return heard

    def _sync_all(self) -> bool:
        for name, sync in self._syncs.items():
            try:
                sync.sync()
                self.faults.pop(name, None)
            except (NotDeliveredError, Refused) as error:
                sync.forget()
                if self.faults.get(name) != str(error):
                    _log.warning("the shadow %s is not told: %s", name, error)
                self.faults[name] = str(error)
        return not self.faults
