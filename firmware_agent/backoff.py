"""When to try again: soon at first, then ever more rarely, never all units at once.

Delays double from one second to a minute, and each is drawn from its upper half, so that a fleet that lost its cloud in
the same second does not come back in the same second. AWS IoT takes one connection a second from one client id.
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
