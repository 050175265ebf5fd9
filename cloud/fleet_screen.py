"""How a rollout looks in a terminal: a bar and the failures for each ring. Pure: values in, something to print out."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cloud.fleet import Progress, RingStatus, Unit
from cloud.rollout import FAILURES, NO_CODE, Status, Summary

#: What a bar is made of, in its order: a name for people, a sign, a colour.
PARTS = (
    ("done", (Status.SUCCEEDED,), "█", "green"),
    ("failed", tuple(sorted(FAILURES)), "█", "red"),
    ("at work", (Status.IN_PROGRESS,), "▓", "cyan"),
    ("told", (Status.QUEUED,), "▒", "blue"),
    ("stopped", (Status.CANCELED, Status.REMOVED), "░", "yellow"),
)

WIDTH = 40

#: So many units of a failure are named.
NAMED = 4


def bar(summary: Summary, width: int = WIDTH) -> Text:
    """The whole job in `width` characters; whatever is not nothing is seen.

    Each part has at least one character, and the largest gives way for it.
    """
    counts = [*(sum(summary.counts.get(each, 0) for each in statuses) for _, statuses, _, _ in PARTS), summary.waiting]
    cells = shares(counts, width)
    text = Text()
    for (_, _, sign, colour), length in zip(PARTS, cells, strict=False):
        text.append(sign * length, style=colour)
    text.append("·" * cells[-1], style="dim")
    return text


def count(number: int, name: str) -> str:
    """As people say it: `1 unit`, `2 units`."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def shares(counts: Sequence[int], width: int) -> list[int]:
    """`width` cells shared out by `counts`: all of them, and at least one for each that is not 0.

    Raises:
        ValueError: there are more parts than cells.
    """
    total = sum(counts)
    if not total:
        return [0] * (len(counts) - 1) + [width]
    if sum(count > 0 for count in counts) > width:
        raise ValueError(f"{width} cells are too few for {counts}")
    cells = [max(1, count * width // total) if count else 0 for count in counts]
    while sum(cells) != width:
        widest = max(range(len(cells)), key=lambda index: (cells[index], counts[index]))
        cells[widest] += 1 if sum(cells) < width else -1
    return cells


def words(summary: Summary) -> str:
    """The counts as people say them: `12 done, 1 failed, 7 waiting`."""
    counts = [(sum(summary.counts.get(each, 0) for each in statuses), name) for name, statuses, _, _ in PARTS]
    counts.append((summary.waiting, "waiting"))
    return ", ".join(f"{number} {name}" for number, name in counts if number) or "nobody is in it"


def progress(each: Progress) -> RenderableType:
    """A job: its bar, its counts, and why units failed."""
    state = {"IN_PROGRESS": "at work", "SCHEDULED": "scheduled"}.get(each.status, each.status.lower())
    lines: list[RenderableType] = [
        Text.assemble("  ", (f"{each.version} {state}", "bold"), "  ", (each.job, "dim")),
        Text.assemble("  ", bar(each.summary), "  ", words(each.summary)),
    ]
    if each.comment:
        lines.append(Text(f"  {each.comment}", style="yellow"))
    for failure in each.summary.failures:
        code = "" if failure.code == NO_CODE else f" ({failure.code})"
        named = ", ".join(failure.units[:NAMED])
        more = f" and {len(failure.units) - NAMED} others" if len(failure.units) > NAMED else ""
        what = f"  {count(len(failure.units), 'unit')} {failure.status.lower().replace('_', ' ')}{code}"
        lines.append(Text.assemble((what, "red"), f": {failure.reason or 'no reason given'}  ", (named + more, "dim")))
    return Group(*lines)


def rings(status: Iterable[RingStatus]) -> RenderableType:
    """Everything that `fleet status` shows."""
    lines: list[RenderableType] = []
    for ring in status:
        versions = ", ".join(f"{version or 'never seen'} ({count})" for version, count in ring.versions.items())
        lines.append(Text.assemble((ring.ring, "bold"), f"  {count(len(ring.units), 'unit')}  {versions}"))
        images = ", ".join(f"{version} ({number})" for version, number in ring.images.items())
        lines += [Text(f"  image {images}", style="dim")] if images else []
        lines += [progress(each) for each in ring.updates] or [Text("  no rollout yet", style="dim")]
    return Group(*lines)


def units(found: Iterable[Unit]) -> RenderableType:
    """Everything that `fleet units` shows."""
    table = Table("unit", "ring", "agent", "image", "mode", "last hello", box=None)
    for unit in found:
        table.add_row(
            unit.serial,
            unit.ring,
            unit.version or "never seen",
            unit.image or "",
            unit.mode or "",
            _ago(unit.last_seen),
        )
    return table


def _ago(moment: datetime | None) -> str:
    if moment is None:
        return ""
    seconds = int((datetime.now(UTC) - moment).total_seconds())
    for length, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length} {name} ago"
    return "just now"
