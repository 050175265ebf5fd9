"""Self-test: the PIR is quiet when nothing moves and fires when something does; the board is cool and healthy."""

import time
from dataclasses import replace
from typing import Any

from factory.answers import Answer
from factory.bench import Agent, Stimulus
from factory.errors import UnitFault
from factory.identify import Identity
from factory.limits import ProductLimits
from factory.record import Step

BASELINE_SECONDS = 1.0
#: How long the PIR may take from the movement until it has fallen again, before it counts as dead.
MOTION_SECONDS = 12.0

_BOARD = "Run the unit again. If it happens twice, put the board on the repair shelf."
_PIR = "Check the PIR's connector (power, ground, signal) and that nothing moves before it; then run the unit again."


def self_test(
    agent: Agent, stimulus: Stimulus, identity: Identity, powered: float, limits: ProductLimits, step: Step
) -> None:
    """Measure the board and its PIR, which has had its supply since `powered` (monotonic clock).

    Raises:
        UnitFault: the PIR is stuck, fires by itself or never, or the board reports a fault.
    """
    _settle(stimulus.settle_seconds, powered, step)
    _pir_quiet(agent, limits, step)
    _pir_motion(agent, stimulus, limits, step)
    _health(agent, identity, limits, step)


def _settle(seconds: float, powered: float, step: Step) -> None:
    while (left := powered + seconds - time.monotonic()) > 0:
        step.progress(round(seconds - left), round(seconds), "the PIR settles: do not move in front of it")
        time.sleep(min(left, 0.5))


def _pir_quiet(agent: Agent, limits: ProductLimits, step: Step) -> None:
    watch = _Watch()
    step.progress(0, 3, "PIR: quiet baseline")
    answer = Answer(
        "watch-pir",
        agent.ask(
            "watch-pir", {"seconds": BASELINE_SECONDS, "until": "end"}, seconds=BASELINE_SECONDS + 30, on_event=watch
        ),
    )
    edges = answer.number("edges")
    step.measure("pir_baseline_edges", edges, "edges", limits.pir_baseline_edges)
    if watch.level_at_start and not edges:
        raise UnitFault("the PIR is stuck high: it reports motion although nothing moves", advice=_PIR)
    if edges not in limits.pir_baseline_edges:
        raise UnitFault(f"the PIR fired in the quiet baseline: {edges:.0f} edges", advice=_PIR)


def _pir_motion(agent: Agent, stimulus: Stimulus, limits: ProductLimits, step: Step) -> None:
    watch, seconds = _Watch(stimulus), MOTION_SECONDS + stimulus.reaction_seconds
    step.progress(1, 3, "PIR: motion")
    agent.ask(
        "watch-pir",
        {"seconds": seconds, "until": "falling"},
        seconds=seconds + 30,
        on_event=watch,
    )
    if watch.rose is None or watch.waved is None or watch.seen is None:
        raise UnitFault(f"the PIR never fired: no edge within {seconds:.0f} s of the movement", advice=_PIR)
    allowed = limits.pir_latency_s
    if allowed.high is not None:
        allowed = replace(allowed, high=allowed.high + stimulus.reaction_seconds)
    step.measure("pir_latency_s", watch.seen - watch.waved, "s", allowed)
    if watch.fell is None:
        raise UnitFault(f"the PIR did not fall again within {seconds:.0f} s", advice=_PIR)
    step.measure("pir_hold_s", watch.fell - watch.rose, "s", limits.pir_hold_s)


def _health(agent: Agent, identity: Identity, limits: ProductLimits, step: Step) -> None:
    step.progress(2, 3, "board health")
    answer = Answer("self-test", agent.ask("self-test"))
    temperature = answer.optional_number("temperature_c")
    if temperature is None and identity.model.startswith("Raspberry Pi"):
        raise UnitFault("the SoC's temperature cannot be read: every Pi has a sensor", advice=_BOARD)
    if temperature is None:
        step.note("temperature_c", "the board has no sensor")
    else:
        step.measure("temperature_c", temperature, "°C", limits.temperature_c)
    step.measure("disk_free_mib", answer.number("disk_free_bytes") / 2**20, "MiB", limits.disk_free_mib)
    step.measure("memory_free_mib", answer.number("memory_free_bytes") / 2**20, "MiB", limits.memory_free_mib)
    throttled = answer.optional_number("throttled")
    step.note("throttled", throttled)
    if throttled:
        raise UnitFault(
            f"the board reports under-voltage or throttling (flags {int(throttled):#x})",
            advice="Check the supply and its cable; then run the unit again.",
        )


class _Watch:
    """The events of one `watch-pir`; moves before the sensor as soon as the unit watches."""

    def __init__(self, stimulus: Stimulus | None = None) -> None:
        self._stimulus = stimulus
        self.level_at_start = 0
        self.waved: float | None = None
        self.seen: float | None = None
        self.rose: float | None = None
        self.fell: float | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if event.get("watching"):
            self.level_at_start = int(event.get("level", 0))
            if self._stimulus is not None:
                self.waved = time.monotonic()
                self._stimulus.wave()
        elif event.get("edge") == "rising" and self.rose is None:
            self.seen, self.rose = time.monotonic(), Answer("watch-pir event", event).number("at")
        elif event.get("edge") == "falling" and self.rose is not None and self.fell is None:
            self.fell = Answer("watch-pir event", event).number("at")
