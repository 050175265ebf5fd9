"""Parts that the alarm can do without: when one of them breaks, it is begun again later, and the alarm goes on."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from firmware_agent import backoff

_log = logging.getLogger(__name__)

#: A part that ran for so long has recovered from what broke it before.
_STEADY_SECONDS: Final = 600.0


@dataclass(frozen=True)
class Health:
    """How a part is.

    Attributes:
        restarts: how often it was begun again.
        fault: what broke it the last time, until it has recovered.
    """

    restarts: int = 0
    fault: str | None = None


class Part:
    """One thread that is begun again when it breaks, ever more rarely.

    Args:
        name: for people.
        run: the work, until the event that it is given is set; called again after it has raised.
        broke: told why, in words, when that is news.
        wake: makes `run` look at its event.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[threading.Event], None],
        *,
        broke: Callable[[str], None],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._run = run
        self._broke = broke
        self._wake = wake
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"picket-{name}", daemon=True)
        self.health = Health()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end; also twice."""
        self._stop.set()
        self._wake()

    def join(self, seconds: float) -> bool:
        """Wait for its end so long; whether it came. A part may be in a download: the process ends all the same."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        failures = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._run(self._stop)
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the alarm goes on
                _log.exception("%s has broken", self.name)
                failures = 0 if time.monotonic() - began >= _STEADY_SECONDS else failures
                fault = f"{type(error).__name__}: {error}"
                if fault != self.health.fault:
                    self._broke(fault)
                self.health = Health(self.health.restarts + 1, fault)
            self._stop.wait(backoff.delay(failures))
            failures += 1
