"""Taking times."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def alternating(rounds: int, ours: Callable[[], float], peer: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Ours and the peer's in turn, so that whatever else the machine does meets both."""
    pairs = [(ours(), peer()) for _ in range(rounds)]
    return [one for one, _ in pairs], [other for _, other in pairs]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Iterable[float]) -> str:
    """`0.91 to 1.20`"""
    ordered = sorted(values)
    return f"{ordered[0]:.2f} to {ordered[-1]:.2f}"


def parts(values: Mapping[str, float], *, least: float = 0.0) -> str:
    """`flash 0.9, boot 23.1`: the largest first, the small ones together."""
    ordered = sorted(values.items(), key=lambda item: item[1], reverse=True)
    shown = [f"{name} {value:.2f}" for name, value in ordered if value >= least]
    rest = sum(value for _, value in ordered if value < least)
    return ", ".join([*shown, *([f"rest {rest:.2f}"] if rest else [])])
