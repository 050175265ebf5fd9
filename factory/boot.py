"""Boot: power the unit, wait for the factory banner on its console, open the session that the banner pins."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from factory.bench import Agent, Bench, Image
from factory.errors import UnitFault
from factory.record import Step
from firmware_agent.wire import Banner, MalformedError, parse_banner

BOOT_SECONDS = 120.0
#: The first banner may come before DHCP has answered; this long a later one with an address is worth waiting for.
ADDRESS_SECONDS = 20.0
#: How much of the console the record keeps of a unit that says nothing useful.
TAIL_LINES = 12


@dataclass(frozen=True)
class Booted:
    """A unit in factory mode: since when it has power (monotonic clock), its banner, a session with its agent."""

    powered: float
    banner: Banner
    agent: Agent


@contextmanager
def boot(bench: Bench, image: Image, step: Step, seconds: float = BOOT_SECONDS) -> Iterator[Booted]:
    """Power the unit, and hold a session with its agent open for as long as the context lasts.

    Raises:
        UnitFault: no banner within `seconds`, a banner of another image, or not the host key of the banner.
    """
    powered = time.monotonic()
    bench.power.on()
    step.progress(0, 0, "waiting for the factory banner")
    banner = _await_banner(bench, step, seconds)
    step.note("seconds_to_banner", round(time.monotonic() - powered, 2))
    step.note("board", banner.board)
    step.note("image", banner.image)
    if banner.image != f"{image.name} {image.version}":
        raise UnitFault(
            f"the unit booted {banner.image}, but {image.name} {image.version} was flashed",
            advice="It boots from another medium: remove any second medium, then run it again.",
        )
    with bench.shell.open(banner) as agent:
        step.note("host_key", banner.host_key)
        yield Booted(powered, banner, agent)


def _await_banner(bench: Bench, step: Step, seconds: float) -> Banner:
    tail: list[str] = []
    first: Banner | None = None
    patience = 0.0
    for line in bench.console.lines(seconds):
        try:
            banner = parse_banner(line)
        except MalformedError as error:
            raise UnitFault(
                f"the unit's banner is not one that this station knows: {error}",
                advice="The image is older or newer than the station. Flash the image of this release.",
            ) from error
        if banner is not None and banner.addresses:
            return banner
        if banner is not None and first is None:
            first, patience = banner, time.monotonic() + ADDRESS_SECONDS
            step.progress(0, 0, "the unit has no network address yet")
        if first is not None and time.monotonic() > patience:
            return first
        tail = [*tail, line.rstrip()][-TAIL_LINES:]
        step.progress(0, 0, line.strip()[:60])
    if first is not None:
        return first
    step.note("console", "\n".join(tail) or None)
    raise UnitFault(
        f"no factory banner within {seconds:.0f} s; the console "
        + (f"ended with: {tail[-1][:120]!r}" if tail else "was silent"),
        advice="Check the power and the console cable (TX and RX swapped?). If both are good, the board is faulty.",
    )
