"""When to try again, and how fast to send: soon at first, then ever more rarely, never all units at once.

Delays double from one second to a minute, and each is drawn from its upper half, so that a fleet that lost its cloud in
the same second does not come back in the same second. AWS IoT takes one connection a second from one client id, and a
hundred publishes a second on one connection
(https://docs.aws.amazon.com/general/latest/gr/iot-core.html#message-broker-limits).
"""

import random
from collections.abc import Callable
from typing import Final

FIRST_SECONDS: Final = 1.0
LONGEST_SECONDS: Final = 60.0


def delay(failures: int, draw: Callable[[], float] = random.random) -> float:
    """Seconds to wait after so many failures in a row (0: the first try after a lost link).

    Args:
        failures: how many attempts have failed since the link was last steady.
        draw: a number from 0 to 1.
    """
    longest = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(failures, 30))
    return longest * (1 + draw()) / 2


class Pace:
    """Evenly so many a second, after a silence a few more at once.

    Args:
        per_second: how many a second, in the long run.
        burst_seconds: how much of the time that nothing was sent in may be made up for.
    """

    def __init__(self, per_second: float, burst_seconds: float = 0.1) -> None:
        self._gap = 1.0 / per_second
        self._burst = burst_seconds
        self._free_at = 0.0

    def wait(self, now: float) -> float:
        """Seconds until the next may go; 0 when it may go now."""
        return max(0.0, self._free_at - self._burst - now)

    def spend(self, now: float) -> None:
        """One goes now, whether it was time or not."""
        self._free_at = max(self._free_at, now) + self._gap
