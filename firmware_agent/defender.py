"""Health reports to AWS IoT Device Defender: open ports, connections, traffic, and the unit's own metrics.

One message of less than 5 KB: when there are more ports or connections than fit, the lists are cut and the totals stay.
Numbers of reports only ever rise, over restarts, a lost state and a clock that steps back: the service drops others.
https://docs.aws.amazon.com/iot-device-defender/latest/devguide/detect-device-side-metrics.html
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from firmware_agent import files, health, topics
from firmware_agent.board import Board
from firmware_agent.health import Incidents
from firmware_agent.link import Link
from firmware_agent.mqtt import NotDeliveredError
from firmware_agent.network import Network, Traffic, network
from firmware_agent.session import Refused

_log = logging.getLogger(__name__)

#: The service takes no more than one report in five minutes.
LEAST_SECONDS: Final = 300.0

LIMIT_BYTES: Final = 5_000

_FORMAT: Final = 1
_TICK_SECONDS: Final = 1.0


# --- the message --------------------------------------------------------------------------------------------------


def message(number: int, now: Network, traffic: Traffic | None, custom: Mapping[str, float]) -> bytes:
    """The report, under `LIMIT_BYTES`.

    Args:
        number: of the report.
        now: what is open.
        traffic: since the last report, if that is known.
        custom: the unit's own metrics.
    """
    tcp: list[Any] = [{"port": port} for port in now.tcp]
    udp: list[Any] = [{"port": port} for port in now.udp]
    connections: list[Any] = [{"local_port": port, "remote_addr": remote} for port, remote in now.connections]
    metrics: dict[str, Any] = {
        "listening_tcp_ports": {"ports": tcp, "total": len(tcp)},
        "listening_udp_ports": {"ports": udp, "total": len(udp)},
        "tcp_connections": {"established_connections": {"connections": connections, "total": len(connections)}},
    }
    if traffic is not None:
        metrics["network_stats"] = vars(traffic)
    report = {
        "header": {"report_id": number, "version": "1.0"},
        "metrics": metrics,
        "custom_metrics": {name: [{"number": value}] for name, value in custom.items()},
    }
    while True:
        text = json.dumps(report, separators=(",", ":"), allow_nan=False).encode()
        longest = max((tcp, udp, connections), key=len)
        if len(text) < LIMIT_BYTES or not longest:
            return text
        del longest[len(longest) // 2 :]


# --- what is kept -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What survives a restart.

    Attributes:
        number: of the last report.
        at: when that was, in seconds since 1970.
        false: see `Incidents`.
    """

    number: int = 0
    at: float = 0.0
    false: tuple[bool, ...] = field(default=())


def load(path: Path) -> Kept:
    """What was kept; nothing, when it cannot be read."""
    try:
        kept: Any = files.read_json(path)
        if kept is None or kept["format"] != _FORMAT:
            return Kept()
        return Kept(int(kept["number"]), float(kept["at"]), tuple(bool(one) for one in kept["false"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return Kept()


def save(path: Path, kept: Kept) -> None:
    """Keep it, durably.

    Raises:
        OSError: the disk is full.
    """
    document = {"format": _FORMAT, "number": kept.number, "at": kept.at, "false": kept.false}
    files.write_atomic(path, json.dumps(document).encode(), 0o600)


def next_number(last: int, unix: float) -> int:
    """Higher than the last, also when the last is lost, as long as the clock is not far off."""
    return max(last + 1, int(unix))


class Defender:
    """Sends a report at most every five minutes, and counts incidents.

    Args:
        link: the connection.
        board: what it reports on.
        state: the directory whose free space counts.
        path: where the number of the last report is kept.
        spool: how many messages wait.
        seconds: how often to report; never more often than `LEAST_SECONDS`.
        net: the kernel's tables.
    """

    def __init__(
        self,
        link: Link,
        board: Board,
        *,
        state: Path,
        path: Path,
        spool: Callable[[], int],
        seconds: Callable[[], float],
        net: Path = Path("/proc/net"),
    ) -> None:
        self._link = link
        self._board = board
        self._state = state
        self._path = path
        self._spool = spool
        self._seconds = seconds
        self._net = net
        self._lock = threading.Lock()
        self._kept = load(path)
        self._incidents = Incidents(self._kept.false)
        self._traffic: Traffic | None = None
        #: Why the last report was not taken; None when it was.
        self.fault: str | None = None

    def alarm(self) -> None:
        """An alarm was raised."""
        self._count(lambda incidents, now: incidents.alarm(now))

    def disarmed(self) -> None:
        """The unit was disarmed."""
        self._count(lambda incidents, now: incidents.disarmed(now))

    @property
    def incidents(self) -> Incidents:
        """The last ones."""
        return self._incidents

    def metrics(self) -> Mapping[str, float]:
        """How the unit is now."""
        return health.metrics(
            self._board.health(self._state),
            uptime=self._board.uptime(),
            spool=self._spool(),
            incidents=self._incidents,
            expires=self._link.identity.validity.not_valid_after_utc,
            now=datetime.fromtimestamp(self._board.clock().unix, UTC),
        )

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set."""
        due = time.monotonic() + self._rest()
        while not stop.wait(_TICK_SECONDS):
            if time.monotonic() < due or not self._link.connected():
                continue
            self.report()
            due = time.monotonic() + self._interval()
        with self._lock:
            if self._incidents.false != self._kept.false:
                self._keep(Kept(self._kept.number, self._kept.at, self._incidents.false))

    def report(self) -> None:
        """Send one report now."""
        unix = self._board.clock().unix
        with self._lock:
            kept = Kept(next_number(self._kept.number, unix), unix, self._incidents.false)
            self._keep(kept)  # before it is used, so that no number is used twice
        now = network(self._net)
        since = now.traffic.since(self._traffic) if now.traffic is not None and self._traffic is not None else None
        body = json.loads(message(kept.number, now, since, self.metrics()))
        try:
            self._link.ask(topics.defender_topic(self._link.serial), body, token=False)
        except (NotDeliveredError, Refused) as error:
            fault = str(error.body.get("statusDetails", error)) if isinstance(error, Refused) else str(error)
            if fault != self.fault:
                _log.warning("the health report was not taken: %s", fault)
            self.fault = fault
        else:
            self.fault = None
            self._traffic = now.traffic

    def _interval(self) -> float:
        return max(LEAST_SECONDS, self._seconds())

    def _rest(self) -> float:
        """Seconds until the first report of this process: the last one's pause is kept over a restart."""
        passed = self._board.clock().unix - self._kept.at
        return self._interval() - passed if 0 <= passed < self._interval() else 0.0

    def _count(self, change: Callable[[Incidents, float], Incidents]) -> None:
        """In memory: alarms have better things to wait for than a statistic's fsync."""
        with self._lock:
            self._incidents = change(self._incidents, self._board.uptime())

    def _keep(self, kept: Kept) -> None:
        self._kept = kept
        try:
            save(self._path, kept)
        except OSError as error:
            _log.warning("the reports' number cannot be kept: %s", error)
