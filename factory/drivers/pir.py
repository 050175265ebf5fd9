"""A PIR sensor's physics on any wire: an HC-SR501 whose output somebody else carries to the board.

The output rises with a movement, stays high for the hold time, and after it falls the sensor is blind for the blocked
time (2.5 to 3 s on a real one). Faults can be injected; each is one that a line sees.
"""

import threading
from collections.abc import Callable
from enum import StrEnum

from factory.errors import UserMistake


class PirFault(StrEnum):
    """What can be wrong with a sensor or its cable."""

    CUT = "pir-cut"  # the signal wire is cut: nothing ever arrives
    STUCK = "pir-stuck"  # the output sits at high
    NOISY = "pir-noisy"  # it fires although nothing moves


NOISE_SECONDS = 0.4


class Pir:
    """The sensor. `drive` sets the level of the wire that its output is soldered to."""

    def __init__(
        self,
        drive: Callable[[bool], None],
        *,
        hold_seconds: float = 0.4,
        blocked_seconds: float = 0.3,
        fault: PirFault | None = None,
    ) -> None:
        self._drive = drive
        self._hold = hold_seconds
        self._blocked_for = blocked_seconds
        self._fault = fault
        self._lock = threading.Lock()
        self._timers: list[threading.Timer] = []
        self._powered = False
        self._busy = False

    def power(self, *, on: bool) -> None:
        """Supply the sensor, or cut its supply: without supply its output is low."""
        with self._lock:
            self._powered = on
            self._busy = False
            for timer in self._timers:
                timer.cancel()
            self._timers.clear()
            if on:
                self._drive(self._fault is PirFault.STUCK)
                if self._fault is PirFault.NOISY:
                    self._later(NOISE_SECONDS, self._noise)

    def wave(self) -> None:
        """Something moves before the sensor.

        Raises:
            UserMistake: the sensor has no supply: whoever moves here sees nothing happen.
        """
        with self._lock:
            if not self._powered:
                raise UserMistake("the PIR has no power", advice="Power the board before you move in front of it.")
            if self._fault is None and not self._busy:
                self._rise()

    def _rise(self) -> None:
        self._busy = True
        self._drive(True)
        self._later(self._hold, self._fall)

    def _fall(self) -> None:
        with self._lock:
            if self._powered:
                self._drive(False)
                self._later(self._blocked_for, self._ready)

    def _ready(self) -> None:
        with self._lock:
            self._busy = False

    def _noise(self) -> None:
        with self._lock:
            if self._powered:
                if not self._busy:
                    self._rise()
                self._later(NOISE_SECONDS + self._hold + self._blocked_for, self._noise)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, call)
        timer.daemon = True
        self._timers = [one for one in self._timers if one.is_alive()] + [timer]
        timer.start()
