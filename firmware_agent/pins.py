"""The lines of the PIR and of the case's loop: edges as they happen, never a poll.

gpiozero's `MotionSensor` samples ten times a second, which adds 50 ms and misses short pulses; `DigitalInputDevice`
hands over the kernel's edge events. The pin factory is named and passed in: gpiozero's own choice falls back in silence
from one back end to the next.
"""

import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

from firmware_agent.errors import PirFault
from firmware_agent.settings import Settings

#: _IOR(0xB4, 0x01, struct gpiochip_info { char name[32]; char label[32]; __u32 lines; }) of <linux/gpio.h>
_GPIO_GET_CHIPINFO: Final = 0x8044B401
_CHIP_INFO: Final = struct.Struct("32s32sI")


class Pir(Protocol):
    """An opened motion sensor, or the loop through the case."""

    def level(self) -> int:
        """1 while the sensor sees motion, or the case is closed.

        Raises:
            PirFault: the line is gone.
        """
        ...

    def watch(self, edge: Callable[[bool], None]) -> None:
        """Call `edge(True)` on each rising and `edge(False)` on each falling edge, from another thread."""
        ...


class Pins(Protocol):
    """Where the PIR is wired to, and the case's loop, if there is one."""

    def pir(self) -> AbstractContextManager[Pir]:
        """The sensor, ours until the context ends.

        Raises:
            PirFault: there is no such line, or somebody else holds it.
        """
        ...

    def tamper(self) -> AbstractContextManager[Pir | None]:
        """The case's loop, ours until the context ends; None where none is wired.

        Raises:
            PirFault: one is configured, and there is no such line, or somebody else holds it.
        """
        ...


class _GpiozeroPir:
    """A `DigitalInputDevice` seen as a `Pir`."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def level(self) -> int:
        return int(self._device.value)

    def watch(self, edge: Callable[[bool], None]) -> None:
        self._device.when_activated = lambda: edge(True)
        self._device.when_deactivated = lambda: edge(False)


@contextmanager
def _open(factory: Any, line: int) -> Iterator[Pir]:
    from gpiozero import DigitalInputDevice, GPIOZeroError  # noqa: PLC0415 - half a second on a Pi, only where needed

    try:
        # The pull-down makes a cut wire read as "no motion", which the line's self-test then finds, and a cut loop as
        # an open case. No bounce time: it would drop edges, a PIR's output does not bounce, and a switch may.
        device = DigitalInputDevice(line, pull_up=False, pin_factory=factory)
    except (GPIOZeroError, OSError) as error:
        raise PirFault(f"GPIO line {line} cannot be used: {error}") from error
    with device:
        yield _GpiozeroPir(device)


class FactoryPins:
    """Lines of a pin factory that somebody else made and keeps: gpiozero's `MockFactory` in tests."""

    def __init__(self, factory: Any, line: int, tamper: int | None = None) -> None:
        self._factory = factory
        self._line = line
        self._tamper = tamper

    def pir(self) -> AbstractContextManager[Pir]:
        """The sensor on the factory's line."""
        return _open(self._factory, self._line)

    def tamper(self) -> AbstractContextManager[Pir | None]:
        """The loop, if there is one."""
        return nullcontext() if self._tamper is None else _open(self._factory, self._tamper)


def chip_labels(devices: Path = Path("/dev")) -> dict[int, str]:
    """Number and label of each GPIO chip that we may open."""
    labels = {}
    for path in devices.glob("gpiochip*"):
        with suppress(OSError, ValueError):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                answer = fcntl.ioctl(handle, _GPIO_GET_CHIPINFO, bytes(_CHIP_INFO.size))
            finally:
                os.close(handle)
            _, label, _ = _CHIP_INFO.unpack(answer)
            labels[int(path.name.removeprefix("gpiochip"))] = label.rstrip(b"\0").decode(errors="replace")
    return labels


def choose_chip(labels: Mapping[int, str], lines: Mapping[str, int]) -> tuple[int, int]:
    """Chip number and line of the first wanted label that is there.

    Raises:
        PirFault: none is.
    """
    for wanted, line in lines.items():
        for chip, label in sorted(labels.items()):
            if label == wanted:
                return chip, line
    raise PirFault(
        f"no GPIO chip labelled {' or '.join(lines)}; this board has {', '.join(sorted(labels.values())) or 'none'}"
        " that the agent may open (is its user in the group gpio?)",
    )


class LgpioPins:
    """The board's own GPIO through lgpio, the one back end that works on every Pi.

    lgpio makes a notification pipe in the directory that the environment's `LG_WD` names, else in the current one; the
    program's start sets it (`firmware_agent.__main__`).
    """

    def __init__(self, lines: Mapping[str, int], tamper: Mapping[str, int] = MappingProxyType({})) -> None:
        self._lines = lines
        self._tamper = tamper
        self._factories: dict[int, Any] = {}

    def pir(self) -> AbstractContextManager[Pir]:
        """The sensor on the chip that has the right label."""
        return self._line(self._lines)

    def tamper(self) -> AbstractContextManager[Pir | None]:
        """The loop on the chip that has the right label, if one is configured."""
        return self._line(self._tamper) if self._tamper else nullcontext()

    def _line(self, lines: Mapping[str, int]) -> AbstractContextManager[Pir]:
        chip, line = choose_chip(chip_labels(), lines)
        # One factory of a chip for as long as the process lives: gpiozero keeps a factory's pins in its class, so a
        # second one is handed the first one's pins, which belong to a closed chip and see no edges.
        if chip not in self._factories:
            self._factories[chip] = _open_chip(chip)
        return _open(self._factories[chip], line)


def _open_chip(chip: int) -> Any:
    try:
        from gpiozero.pins.lgpio import LGPIOFactory  # noqa: PLC0415 - exists on the device alone

        return LGPIOFactory(chip=chip)
    except (ImportError, OSError) as error:
        raise PirFault(f"lgpio does not open /dev/gpiochip{chip}: {error}") from error
    except Exception as error:
        raise PirFault(f"lgpio does not open /dev/gpiochip{chip}: {error}") from error


def open_pins(settings: Settings) -> Pins:
    """The driver that the settings name; it opens nothing yet."""
    kind, _, place = settings.gpio.driver.partition(":")
    if kind == "unix":
        from firmware_agent.remote_pins import RemotePins  # noqa: PLC0415 - each board needs one of the two

        return RemotePins(Path(place), settings.pir.lines, settings.tamper.lines)
    return LgpioPins(settings.pir.lines, settings.tamper.lines)
