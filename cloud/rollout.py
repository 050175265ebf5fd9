"""What a rollout decides: how fast, when to stop, whether a release has soaked. Pure; `fleet` asks AWS and acts.

The numbers become the configuration of an AWS IoT job, so that AWS keeps to them while nobody watches.
https://docs.aws.amazon.com/iot/latest/developerguide/jobs-configurations-details.html
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

#: AWS's bounds. https://docs.aws.amazon.com/iot/latest/apireference/API_ExponentialRolloutRate.html, API_TimeoutConfig
RATES: Final = range(1, 1001)
TIMEOUT_MINUTES: Final = range(1, 10_081)
WINDOW_MINUTES: Final = range(1, 1431)
RETRIES: Final = range(11)

#: AWS takes a start no sooner than this; the spare minutes are for the way there.
START_DELAY: Final = timedelta(minutes=32)

#: A code for what a unit says without one, and for executions that AWS ended.
NO_CODE: Final = "-"


class Ring(StrEnum):
    """Who gets a release when: canaries first."""

    CANARY = "canary"
    MAIN = "main"


class Kind(StrEnum):
    """What is released: the agent, or the whole image. A ring has a rollout of each."""

    AGENT = "agent"
    OS = "os"


class Operation(StrEnum):
    """What can be asked of units, besides updates."""

    SELF_TEST = "self-test"
    COLLECT_LOGS = "collect-logs"
    REBOOT = "reboot"
    ROTATE_CERTIFICATE = "rotate-certificate"
    CONFIGURE = "configure"


class Status(StrEnum):
    """A job execution's status, in AWS's words."""

    QUEUED = "QUEUED"
    IN_PROGRESS = "IN_PROGRESS"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    REJECTED = "REJECTED"
    TIMED_OUT = "TIMED_OUT"
    CANCELED = "CANCELED"
    REMOVED = "REMOVED"


FAILURES: Final = frozenset({Status.FAILED, Status.REJECTED, Status.TIMED_OUT})


@dataclass(frozen=True)
class Execution:
    """One unit's attempt at a job. `number` counts its attempts; `details` are the unit's own words."""

    thing: str
    number: int
    status: Status
    updated_at: datetime
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """Why it failed, for machines."""
        return self.details.get("code", NO_CODE)

    @property
    def reason(self) -> str:
        """Why it failed, in words."""
        return self.details.get("reason", "")


@dataclass(frozen=True)
class Failure:
    """Units that failed in the same way; `reason` is what the last of them said."""

    status: Status
    code: str
    reason: str
    units: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """How far a job is: one count for each unit, by its newest attempt. `waiting` were not told of the job yet."""

    counts: Mapping[Status, int]
    waiting: int
    failures: tuple[Failure, ...]

    @property
    def total(self) -> int:
        """All units that the job is for."""
        return sum(self.counts.values()) + self.waiting

    @property
    def open(self) -> int:
        """Units from which more is to come."""
        return self.waiting + self.counts.get(Status.QUEUED, 0) + self.counts.get(Status.IN_PROGRESS, 0)


def newest(executions: Iterable[Execution]) -> dict[str, Execution]:
    """Each unit's newest attempt."""
    found: dict[str, Execution] = {}
    for each in executions:
        if each.thing not in found or found[each.thing].number < each.number:
            found[each.thing] = each
    return found


def summarise(executions: Iterable[Execution], members: Iterable[str]) -> Summary:
    """How far a job for these members is. Failures that concern most units come first."""
    latest = newest(executions)
    groups: dict[tuple[Status, str], list[Execution]] = {}
    for each in latest.values():
        if each.status in FAILURES:
            groups.setdefault((each.status, each.code), []).append(each)
    failures = [
        Failure(
            status, code, max(group, key=lambda e: e.updated_at).reason, tuple(sorted(each.thing for each in group))
        )
        for (status, code), group in groups.items()
    ]
    return Summary(
        counts=dict(Counter(each.status for each in latest.values())),
        waiting=len(set(members) - latest.keys()),
        failures=tuple(sorted(failures, key=lambda f: (-len(f.units), f.status, f.code))),
    )


# --- how fast, and when to stop ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """How many units a minute are told of a job: `base` at first, `factor` times as many after each `step` successes.

    The rate grows by successes, not by time: where nothing succeeds, nothing speeds up.
    """

    base: int
    factor: float
    step: int
    maximum: int

    def per_minute(self, succeeded: int) -> int:
        """The rate after that many successes."""
        rate = float(self.base)
        for _ in range(succeeded // self.step):
            if rate >= self.maximum:
                break
            rate *= self.factor
        return min(self.maximum, int(rate))

    def minutes(self, units: int) -> int:
        """How long it takes at least until all units are told, if each succeeds within the minute."""
        told = minutes = 0
        while told < units:
            told += self.per_minute(told)
            minutes += 1
        return minutes


@dataclass(frozen=True)
class Abort:
    """The job is cancelled when `percent` of the finished executions failed, once `after` of them are finished."""

    percent: float
    after: int


def default_rate(units: int) -> Rate:
    """A hundredth of the ring in the first minute, a tenth of it at most."""
    base = _within(math.ceil(units / 100))
    return Rate(base=base, factor=2.0, step=2 * base, maximum=_within(max(base, math.ceil(units / 10))))


def default_abort(ring: Ring, units: int) -> Abort:
    """Canaries stop at the first failure; the others at a tenth, judged after ten units or the whole ring."""
    if ring is Ring.CANARY:
        return Abort(percent=1.0, after=1)
    return Abort(percent=10.0, after=max(1, min(10, units)))


def _within(rate: int) -> int:
    return min(max(rate, RATES.start), RATES.stop - 1)


@dataclass(frozen=True)
class Window:
    """A recurring time, in UTC, in which units are told of a job. `days` as in cron, e.g. MON-FRI, or `*`."""

    hour: int
    minute: int
    duration_minutes: int
    days: str = "*"


_WINDOW = re.compile(
    r"(?:(?P<days>[A-Za-z]{3}(?:[-,][A-Za-z]{3})*)\s+)?(?P<h>\d{2}):(?P<m>\d{2})-(?P<H>\d{2}):(?P<M>\d{2})"
)
_DAYS = frozenset({"SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"})


def parse_window(text: str) -> Window:
    """A maintenance window as people write it, in UTC: `02:00-05:00`, `Mon-Fri 22:30-04:00`.

    Raises:
        ValueError: it is none.
    """
    match = _WINDOW.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no maintenance window: write it like 02:00-05:00 or Mon-Fri 22:30-04:00 (UTC)")
    days = (match["days"] or "*").upper()
    if days != "*" and not set(re.split(r"[-,]", days)) <= _DAYS:
        raise ValueError(f"{match['days']!r} names no days of the week: Sun Mon Tue Wed Thu Fri Sat")
    begin, end = (int(match[h]) * 60 + int(match[m]) for h, m in (("h", "m"), ("H", "M")))
    if max(int(match["h"]), int(match["H"])) > 23 or max(int(match["m"]), int(match["M"])) > 59:
        raise ValueError(f"{text!r} has no times of day")
    minutes = (end - begin) % 1440
    if minutes not in WINDOW_MINUTES:
        raise ValueError(f"{text!r}: a maintenance window lasts from a minute to 23 h 50 min")
    return Window(begin // 60, begin % 60, minutes, days)


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(text: str) -> timedelta:
    """A length of time like `90s`, `30m`, `24h`, `2d`, or `0`.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d{1,6})([smhd])|0", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no length of time: write it like 30m, 24h or 2d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])}) if match[1] else timedelta()


@dataclass(frozen=True)
class Plan:
    """How a job goes out: what AWS is told besides the document."""

    rate: Rate | None
    abort: Abort
    retries: int
    timeout: timedelta
    windows: tuple[Window, ...] = ()
    start: datetime | None = None

    def options(self, now: datetime) -> dict[str, Any]:
        """The keywords of CreateJob.

        Raises:
            ValueError: a number is outside what AWS takes.
        """
        minutes = int(self.timeout / timedelta(minutes=1))
        _check("the timeout, in minutes,", minutes, TIMEOUT_MINUTES)
        _check("the number of retries", self.retries, RETRIES)
        found: dict[str, Any] = {
            "timeoutConfig": {"inProgressTimeoutInMinutes": minutes},
            "abortConfig": {"criteriaList": [_criterion(self.abort)]},
        }
        if self.retries:
            found["jobExecutionsRetryConfig"] = {
                "criteriaList": [{"failureType": "ALL", "numberOfRetries": self.retries}]
            }
        if self.rate is not None:
            found["jobExecutionsRolloutConfig"] = _rollout(self.rate)
        if schedule := self._schedule(now):
            found["schedulingConfig"] = schedule
        return found

    def _schedule(self, now: datetime) -> dict[str, Any]:
        if self.start is None and not self.windows:
            return {}
        start = self.start or now + START_DELAY  # windows need a start, and a start some time
        if start < now + START_DELAY - timedelta(minutes=2):
            raise ValueError(
                "AWS starts a job no sooner than 30 minutes from now: leave the start out, or name a later"
            )
        schedule: dict[str, Any] = {"startTime": start.astimezone(UTC).strftime("%Y-%m-%dT%H:%M")}
        if self.windows:
            schedule["maintenanceWindows"] = [
                {
                    "startTime": f"cron({window.minute} {window.hour} ? * {window.days} *)",
                    "durationInMinutes": window.duration_minutes,
                }
                for window in self.windows
            ]
        return schedule


def _rollout(rate: Rate) -> dict[str, Any]:
    _check("the rate", rate.base, RATES)
    _check("the maximal rate", rate.maximum, RATES)
    if not 1.1 <= rate.factor <= 5 or round(rate.factor, 1) != rate.factor:
        raise ValueError(f"the factor of the rate is 1.1 to 5.0 with one digit after the point, not {rate.factor}")
    return {
        "maximumPerMinute": rate.maximum,
        "exponentialRate": {
            "baseRatePerMinute": rate.base,
            "incrementFactor": rate.factor,
            "rateIncreaseCriteria": {"numberOfSucceededThings": rate.step},
        },
    }


def _criterion(abort: Abort) -> dict[str, Any]:
    if not 0 < abort.percent <= 100 or abort.after < 1:
        raise ValueError(f"a rollout stops at 1 to 100 percent failures, after 1 unit or more: not {abort}")
    return {
        "failureType": "ALL",
        "action": "CANCEL",
        "thresholdPercentage": abort.percent,
        "minNumberOfExecutedThings": abort.after,
    }


def _check(what: str, value: int, allowed: range) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {allowed.start} to {allowed.stop - 1}, not {value}")


# --- may it go to everybody? ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Soak:
    """Whether the canaries have run a release for long enough; `sentence` says why, or what is missing."""

    ready: bool
    sentence: str
    since: Mapping[str, datetime]


def soaked(
    version: str,
    executions: Iterable[Execution],
    running: Mapping[str, str],
    *,
    wanted: timedelta,
    now: datetime,
) -> Soak:
    """Whether a release may leave the canary ring.

    A canary counts from the moment its update succeeded (it passed its own health gate then), as long as it still says
    that it runs that version. At least half of the ring must count, none may have failed, and each that counts must
    have run the release for `wanted`.

    Args:
        version: the release's.
        executions: of the canary job for exactly these bits.
        running: canaries, all of the ring, to the version that each reported last ("" for none).
        wanted: how long a canary must have run it.
        now: aware.
    """
    latest = {thing: each for thing, each in newest(executions).items() if thing in running}
    good = {thing: each.updated_at for thing, each in latest.items() if each.status is Status.SUCCEEDED}
    failed = sorted(thing for thing, each in latest.items() if each.status in FAILURES)
    left = sorted(thing for thing in good if running[thing] != version)
    needed = max(1, math.ceil(len(running) / 2))
    since = MappingProxyType(good)
    if not running:
        return Soak(ready=False, sentence="nobody is in the canary ring", since=since)
    if failed:
        return Soak(ready=False, sentence=f"it failed on {_some(failed)}", since=since)
    if left:
        reports = running[left[0]] or "nothing"
        return Soak(ready=False, sentence=f"{_some(left)} went away from it and now reports {reports}", since=since)
    if len(good) < needed:
        return Soak(ready=False, sentence=f"{len(good)} of {len(running)} canaries run it, {needed} must", since=since)
    moments = sorted(good.values())[:needed]
    missing = wanted - (now - moments[-1])
    if missing > timedelta():
        return Soak(ready=False, sentence=f"it must soak for {_words(missing)} more", since=since)
    return Soak(ready=True, sentence=f"{len(good)} of {len(running)} canaries run it well", since=since)


def floor(security_versions: Mapping[str, int], running: Iterable[str]) -> int:
    """What the ring's units may not go below: the highest security version among the releases that they run.

    Args:
        security_versions: by release, of all that are listed.
        running: the versions that the units report; one that is not listed any more says nothing.
    """
    return max((security_versions[version] for version in running if version in security_versions), default=0)


def _some(things: Sequence[str]) -> str:
    shown = ", ".join(things[:3])
    return shown if len(things) <= 3 else f"{shown} and {len(things) - 3} others"


def _words(length: timedelta) -> str:
    if length <= timedelta(minutes=1):
        return f"{max(math.ceil(length.total_seconds()), 1)} s"
    minutes = math.ceil(length / timedelta(minutes=1))
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


# --- jobs and their names ------------------------------------------------------------------------------------------

ACTIVE: Final = frozenset({"IN_PROGRESS", "SCHEDULED"})


@dataclass(frozen=True)
class Job:
    """An AWS IoT job, in short."""

    name: str
    status: str
    created_at: datetime

    @property
    def active(self) -> bool:
        """Whether it still reaches units."""
        return self.status in ACTIVE


def update_stem(product: str, ring: Ring, version: str, tar_sha256: str, kind: Kind = Kind.AGENT) -> str:
    """What the names of the jobs that bring these bits to a ring begin with."""
    return f"{update_prefix(product, ring, kind)}{_safe(version)[:24]}-{tar_sha256[:8]}"


def update_prefix(product: str, ring: Ring, kind: Kind = Kind.AGENT) -> str:
    """What the names of all update jobs of a ring begin with; no kind's is the beginning of the other's."""
    return f"{product}-{ring}-{'os-update' if kind is Kind.OS else 'update'}-"


def operation_stem(product: str, operation: str, target: str, document: Mapping[str, Any]) -> str:
    """What the names of the jobs that ask this of this unit or ring begin with."""
    tuning = document.get("tuning")
    extra = "" if tuning is None else f"-{_digest(tuning)}"
    return f"{product}-{operation}-{_safe(target)}{extra}"


def choose(stem: str, jobs: Iterable[Job]) -> tuple[str, Job | None]:
    """The name for a job, and the job if it is at work already: the same command twice is one job.

    A job that ended, or was cancelled, keeps its name for good, so its successor gets the next number.
    """
    numbered = {number: job for job in jobs if (number := _number(stem, job.name))}
    last = max(numbered, default=0)
    if last and numbered[last].active:
        return numbered[last].name, numbered[last]
    return f"{stem}-{last + 1}", None


def _number(stem: str, name: str) -> int:
    head, _, tail = name.rpartition("-")
    return int(tail) if head == stem and tail.isdecimal() else 0


def _safe(text: str) -> str:
    """As AWS takes it in a job's name: [a-zA-Z0-9_-]."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", text)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
